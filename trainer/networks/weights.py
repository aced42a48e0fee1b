"""Start a backbone from saved weights: a safetensors file, a torch state dict, or a run or model folder."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.errors import ModelError
from trainer.networks.scale import add_scale, fit_scale
from trainer.reading import regular


def load_backbone_weights(backbone: nn.Module, path: Path) -> None:
    """Load ``path`` (see :func:`read_weights`) into the backbone. Raises :class:`ModelError` unless every name fits."""
    backbone.load_state_dict(matching_weights(backbone, path))


def matching_weights(backbone: nn.Module, path: Path) -> dict[str, Tensor]:
    """The state dict in ``path``, for a backbone of the same names and shapes (it may be on the meta device).

    Only the factors and shifts of the last batch norm may be on one side alone: where the backbone has none it gets
    them, where the file has none they are 1 and 0 (:mod:`trainer.networks.scale`).

    Raises:
        ModelError: missing, not a state dict, or of another network; the first differing names are listed.
    """
    state = read_weights(path)
    fit_scale(backbone, state)
    add_scale(backbone, state)
    have = {name: tuple(value.shape) for name, value in backbone.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    wrong = [f"{n} is missing" for n in have if n not in given] + [f"{n} is unknown" for n in given if n not in have]
    wrong += [f"{n} is {given[n]}, not {have[n]}" for n in have if n in given and given[n] != have[n]]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ModelError(f"{path}: not the weights of this backbone: {'; '.join(wrong[:3])}{more}")
    return state


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file or folder, on the CPU.

    Args:
        path: ``*.safetensors``; a state dict saved by torch (``*.pt``, ``*.pth``, such as those of insightface, also
            inside its training checkpoints), read with ``weights_only``; or a folder: an export, or a run whose
            ``model/`` is taken.

    Raises:
        ModelError: missing, or not a state dict.
    """
    if path.is_dir():
        folder = path / "model" if (path / "model").is_dir() else path
        found = sorted(folder.glob("*.safetensors"))
        if not found:
            raise ModelError(f"{path}: no .safetensors file in it; give a model folder, a run folder or a file")
        path = next((f for f in found if "backbone" in f.name), found[0])
    regular(path, ModelError)
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:
        raise ModelError(f"{path}: cannot be read as weights: {str(error).splitlines()[0]}") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict_backbone"), dict):
        state = state["state_dict_backbone"]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ModelError(f"{path}: not a state dict (names with tensors)")
    return {name.removeprefix("module."): value for name, value in state.items()}
