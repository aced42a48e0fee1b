"""Networks from saved weights: a safetensors file, a torch state dict in any wrapping, or a run or model folder."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn, zeros

from trainer.errors import ModelError
from trainer.networks.scale import add_scale, embedding_norm, fit_scale
from trainer.reading import regular, why_unreadable
from trainer.tensor_files import load_torch

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar", ".safetensors")
_COUNTER = "num_batches_tracked"  # files of old trainers lack it; nothing is computed from it
_SHOWN = 3


def load_backbone_weights(backbone: nn.Module, path: Path) -> None:
    """Load ``path`` (see :func:`read_weights`) into the backbone. Raises :class:`ModelError` unless every name fits."""
    backbone.load_state_dict(matching_weights(backbone, path))


def matching_weights(backbone: nn.Module, path: Path) -> dict[str, Tensor]:
    """The state dict in ``path``, for a backbone of the same names and shapes (it may be on the meta device).

    Only the factors and shifts of the last batch norm may be on one side alone: where the backbone has none it gets
    them, where the file has none they are 1 and 0 (:mod:`trainer.networks.scale`).

    Raises:
        ModelError: missing, not a state dict, or of another network; the names that do not meet are listed.
    """
    return fitted(backbone, read_weights(path), path)[0]


def fitted(backbone: nn.Module, given: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], str]:
    """As :func:`fitting` for a backbone, whose last batch norm may have its factors and shifts on one side alone."""
    norm = embedding_norm(backbone)
    free = set() if norm is None else {f"{norm[0]}.weight", f"{norm[0]}.bias"}
    state, prefix = fitting(given, backbone.state_dict(), path, free)
    fit_scale(backbone, state)
    add_scale(backbone, state)
    return state, prefix


def fitting(
    given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path, free: Collection[str] = ()
) -> tuple[dict[str, Tensor], str]:
    """The tensors of a network among those of a file: below the one prefix at which all its names are found.

    Prefixes are what wrappers put before a network's names (``module.``, ``model.``, ``_orig_mod.``, ``state_dict.``
    and any others); what else the file holds (a head, an optimizer) does not matter.

    Args:
        free: names that may be in the file or in the network alone.

    Returns:
        The state dict by the network's own names, and the prefix.

    Raises:
        ModelError: no prefix fits, or several do.
    """
    counts: dict[str, int] = {}
    for name in given:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in wanted:
                prefix = name[: len(name) - len(".".join(parts[start:]))]
                counts[prefix] = counts.get(prefix, 0) + 1
    found = [prefix for prefix in counts if not any(_differences(given, wanted, prefix, free))]
    if len(found) > 1:
        raise ModelError(
            f"{path}: holds {len(found)} networks that fit, below {', '.join(map(repr, found))}; "
            "save the one meant alone"
        )
    if not found:
        raise ModelError(_unlike(given, wanted, max(counts, key=lambda p: counts[p], default=""), path))
    prefix = found[0]
    state = {name: given[prefix + name] for name in dict.fromkeys([*wanted, *free]) if prefix + name in given}
    counters = {name: zeros((), dtype=value.dtype) for name, value in wanted.items() if name.endswith(_COUNTER)}
    return counters | state, prefix


def _differences(
    given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], prefix: str, free: Collection[str] = ()
) -> tuple[list[str], list[str], list[str]]:
    """Names that the file lacks, names that it has beyond, and those of another shape."""
    lacking = [n for n in wanted if prefix + n not in given and n not in free and not n.endswith(_COUNTER)]
    own = {prefix + n for n in (*wanted, *free)}
    beyond = [n for n in given if n.startswith(prefix) and n not in own]
    shapes = [
        f"{n} is {tuple(given[prefix + n].shape)}, not {tuple(wanted[n].shape)}"
        for n in wanted
        if prefix + n in given and given[prefix + n].shape != wanted[n].shape
    ]
    return lacking, beyond, shapes


def _unlike(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], prefix: str, path: Path) -> str:
    lacking, beyond, shapes = _differences(given, wanted, prefix)
    parts = [f"the file lacks {listed(lacking)}"] if lacking else []
    parts += [f"it has {listed(beyond)}, which the network does not"] if beyond else []
    parts += [listed(shapes, "; ")] if shapes else []
    below = f" (below {prefix!r})" if prefix else ""
    return f"{path}: not the weights of this backbone{below}: {'; '.join(parts)}"


def listed(names: list[str], separator: str = ", ") -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return separator.join(names[:_SHOWN]) + more


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file or folder by name, on the CPU; those of nested dictionaries with dots between the names.

    Args:
        path: ``*.safetensors``; what torch saved (``*.pt``, ``*.pth``, ``*.ckpt``, such as the state dicts and training
            checkpoints of insightface, AdaFace, MagFace or Lightning), read with ``weights_only``; or a folder: an
            export, or a run whose ``model/`` is taken.

    Raises:
        ModelError: missing, or no tensors in it.
    """
    if path.is_dir():
        folder = path / "model" if (path / "model").is_dir() else path
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{path}: no .safetensors file in it; give a model folder, a run folder or a file")
        path = next((f for f in files if "backbone" in f.name), files[0])
    regular(path, ModelError)
    if path.suffix != ".safetensors":
        content = load_torch(path, ModelError)
    else:
        try:
            content = load_file(path)
        except Exception as error:  # safetensors fails as variously as files can be damaged
            reason = why_unreadable(path) or f"cannot be read as weights: {str(error).splitlines()[0]}"
            raise ModelError(f"{path}: {reason}") from None
    found = _flat(content) if isinstance(content, dict) else {}
    if not found:
        held = f"a {type(content).__name__}" if not isinstance(content, dict) else listed([str(k) for k in content])
        raise ModelError(f"{path}: not a state dict (names with tensors); it holds {held or 'nothing'}")
    return found


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for key, value in tree.items():
        if isinstance(value, Tensor):
            flat[f"{prefix}{key}"] = value
        elif isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
    return flat
