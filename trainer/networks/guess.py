"""Which of our networks a state dict belongs to, by the names and shapes in it."""

from collections.abc import Callable, Mapping
from math import isqrt
from pathlib import Path

from torch import Tensor

from trainer.errors import ModelError
from trainer.networks import ir, iresnet, vit
from trainer.networks.config import BackboneConfig
from trainer.networks.weights import listed

Size = tuple[int, int]
_Shapes = Mapping[str, tuple[int, ...]]
_STRIDE = 16
_USUAL = 112


def guess_backbone(given: Mapping[str, Tensor], path: Path, name: str | None = None) -> tuple[BackboneConfig, Size]:
    """The network, its dimension and width, and (H, W) of its images (square where the shapes leave that open).

    Args:
        name: of the network where it is known; it must be of a kind whose names are in the file.

    Raises:
        ModelError: no network of ours; the first names are shown.
    """
    for anchor, read in _KINDS.items():
        prefixes = {full.removesuffix(anchor) for full in given if full == anchor or full.endswith(f".{anchor}")}
        if not prefixes:
            continue
        prefix = min(prefixes, key=len)
        shapes = {n.removeprefix(prefix): tuple(v.shape) for n, v in given.items() if n.startswith(prefix)}
        try:
            found, width, dim, side = read(shapes)
        except (KeyError, IndexError, ValueError) as error:
            raise ModelError(
                f"{path}: its names are like {anchor} of a network known here, but its layers are not ({error}); "
                "export it to ONNX"
            ) from None
        if name is not None and name != found:
            raise ModelError(f"{path}: its layers are those of {found}, not of {name}")
        return BackboneConfig(name=found, dim=dim, width=width), (side, side)
    raise ModelError(
        f"{path}: of no network known here (it has {listed(list(given))}; looked for {', '.join(_KINDS)}); "
        "export it to ONNX"
    )


def _iresnet(shapes: _Shapes) -> tuple[str, int | None, int, int]:
    units = tuple(_count(shapes, f"layer{stage}.", 1) for stage in range(1, 5))
    width, (dim, inner) = shapes["conv1.weight"][0], shapes["fc.weight"]
    return f"iresnet{_depth(iresnet.UNITS, units)}", _unless(width, 64), dim, _side(inner // shapes["bn2.weight"][0])


def _ir(shapes: _Shapes) -> tuple[str, int | None, int, int]:
    if any(".se_block." in name or ".res_layer.7." in name for name in shapes):
        raise ValueError("squeeze-and-excitation or bottleneck units, which IR networks here do not have")
    width, (dim, inner) = shapes["input_layer.0.weight"][0], shapes["output_layer.3.weight"]
    total = _count(shapes, "body.", 1)
    into = [shapes[f"body.{unit}.res_layer.1.weight"][0] for unit in range(total)]
    units = tuple(into.count(width << stage) for stage in range(4))
    return f"ir_{_depth(ir.UNITS, units)}", _unless(width, 64), dim, _side(inner // into[-1])


def _mobilefacenet(shapes: _Shapes) -> tuple[str, int | None, int, int]:
    width = shapes["layers.0.layers.0.weight"][0]
    area = shapes["features.layers.0.layers.0.weight"][2:]
    return "mobilefacenet", _unless(width, 128), shapes["features.layers.2.weight"][0], _STRIDE * area[0]


def _vit(shapes: _Shapes) -> tuple[str, int | None, int, int]:
    width, tokens = shapes["patch_embed.proj.weight"][0], shapes["pos_embed"][1]
    blocks, side = _count(shapes, "blocks.", 1), shapes["patch_embed.proj.weight"][2] * isqrt(tokens)
    found = [size for size, (w, depth, *_) in vit.SIZES.items() if (w, depth) == (width, blocks)]
    if not found:
        raise ValueError(f"{blocks} blocks of width {width}")
    return f"vit_{found[0]}", None, shapes["feature.2.weight"][0], _USUAL if side == 108 else side


def _small(shapes: _Shapes) -> tuple[str, int | None, int, int]:
    width, (dim, inner) = shapes["stages.0.weight"][0], shapes["embed.weight"]
    return "small", _unless(width, 12), dim, _side(inner // (2 * width)) // 2


def _small_resnet(shapes: _Shapes) -> tuple[str, int | None, int, int]:
    width, (dim, inner) = shapes["stem.0.weight"][0], shapes["embed.weight"]
    return "small_resnet", _unless(width, 12), dim, _side(inner // (4 * width)) // 2


_KINDS: dict[str, Callable[[_Shapes], tuple[str, int | None, int, int]]] = {
    "layer1.0.bn1.weight": _iresnet,
    "body.0.res_layer.0.weight": _ir,
    "conv_sep.layers.0.weight": _mobilefacenet,
    "patch_embed.proj.weight": _vit,
    "stem.0.weight": _small_resnet,
    "stages.0.weight": _small,
}
"""A name that only one kind of network has → what its shapes say: name, width, D, side of the images in pixels."""


def _count(shapes: _Shapes, prefix: str, at: int) -> int:
    """How many numbered parts there are below a prefix."""
    return len({name.split(".")[at] for name in shapes if name.startswith(prefix)})


def _depth(units: Mapping[int, tuple[int, int, int, int]], found: tuple[int, ...]) -> int:
    for depth, stages in units.items():
        if stages == found:
            return depth
    raise ValueError(f"stages of {', '.join(map(str, found))} units")


def _side(area: int) -> int:
    """Side of the images, in pixels, from the positions that are left after strides of 16."""
    if isqrt(area) ** 2 != area or not area:
        raise ValueError(f"{area} positions before the linear layer, which are no square; state `size`")
    return _STRIDE * isqrt(area)


def _unless(width: int, published: int) -> int | None:
    return None if width == published else width
