"""The backbone's parameters and what autograd keeps of a batch, counted on tensors without memory.

``python -m trainer.planning.activations [NAME…]`` counts networks of the package and writes
trainer/planning/backbones.json.
"""

import contextlib
import functools
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from trainer.networks import BACKBONES, build_backbone
from trainer.networks.config import BackboneConfig
from trainer.networks.recompute import Recompute
from trainer.planning.stored import (
    STORED_DIM,
    STORED_PRECISIONS,
    STORED_SIZE,
    Kept,
    NetworkSizes,
    Unit,
    as_json,
    read_table,
    write_lines,
)

PRIME = 1_000_003


@functools.cache
def count_network(config: BackboneConfig, precisions: Sequence[str], image_size: tuple[int, int]) -> NetworkSizes:
    """Build the network without memory and send batches (b, 3, H, W) through it, in each precision.

    Raises:
        ConfigError: an unknown network, or one that has no width to choose.
    """
    with torch.device("meta"):
        network = build_backbone(config, image_size)
    parameters = list(network.parameters())
    return NetworkSizes(
        sum(p.numel() for p in parameters if p.requires_grad),
        sum(p.numel() for p in parameters if not p.requires_grad),
        sum(b.numel() for b in network.buffers() if b.is_floating_point()),
        len(network.units()) if isinstance(network, Recompute) else 0,
        unit_shapes(network),
        {one: (_kept(network, one, image_size, False), _kept(network, one, image_size, True)) for one in precisions},
    )


def unit_shapes(network: nn.Module) -> tuple[Unit, ...]:
    """Shapes of the parameters as FSDP shards them: of each unit, then of the rest."""
    groups = [list(unit.parameters()) for unit in network.units()] if isinstance(network, Recompute) else []
    inside = {id(p) for group in groups for p in group}
    groups.append([p for p in network.parameters() if id(p) not in inside])
    return tuple(tuple((tuple(p.shape), p.requires_grad) for p in group) for group in groups)


def _kept(network: nn.Module, precision: str, image_size: tuple[int, int], recompute: bool) -> Kept:
    """Every tensor that is kept is so many bytes for each image of the batch, or has nothing to do with it: with a
    large prime number of images, which is a factor of nothing else, the sizes tell."""
    sizes = saved_sizes(network, precision, image_size, PRIME, recompute)
    tensors = [(size, 0) if size % PRIME else (0, size // PRIME) for size in sizes]
    largest: list[tuple[int, int]] = []
    top = -1
    for fixed, image in sorted(set(tensors), reverse=True):  # whoever is passed in both can never be the largest
        if image > top:
            largest, top = [*largest, (fixed, image)], image
    return Kept(sum(fixed for fixed, _ in tensors), sum(image for _, image in tensors), tuple(largest))


def saved_sizes(
    network: nn.Module, precision: str, image_size: tuple[int, int], batch: int, recompute: bool
) -> list[int]:
    """Bytes of every storage that autograd keeps of a batch, in order."""
    dtype = torch.float64 if precision == "float64" else torch.float32
    half = precision in ("bfloat16", "float16")
    with FakeTensorMode():
        for module in network.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    empty = torch.empty(parameter.shape, dtype=dtype)
                    module._parameters[name] = nn.Parameter(empty, parameter.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    kind = dtype if buffer.is_floating_point() else buffer.dtype
                    module._buffers[name] = torch.empty(buffer.shape, dtype=kind)
        if isinstance(network, Recompute):
            network.recompute = recompute
        own = {t.untyped_storage()._cdata for t in (*network.parameters(), *network.buffers())}
        kept: dict[int, tuple[int, Tensor]] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = (storage.nbytes(), tensor)  # the tensor too, so that no address is used twice
            return tensor

        # Fake tensors stand for the CPU's, whose autocast makes the same products half as large as CUDA's does.
        context = torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext()
        images = torch.empty((batch, 3, *image_size), dtype=dtype).requires_grad_()
        own.add(images.untyped_storage()._cdata)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), context:
            network.train()
            network(images)
    return [size for size, _ in kept.values()]


def write_table(names: Sequence[str]) -> None:
    """Count networks and put them into the table of :mod:`trainer.planning.stored`: JSON, a network a line."""
    version = torch.__version__.partition("+")[0]
    table = read_table(version)
    for name in names:
        sizes = count_network(BackboneConfig(name=name, dim=STORED_DIM), STORED_PRECISIONS, STORED_SIZE)
        table[name] = as_json(sizes)
        write_lines(version, {one: table[one] for one in BACKBONES if one in table})


if __name__ == "__main__":
    write_table(sys.argv[1:] or tuple(BACKBONES))
