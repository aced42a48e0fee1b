"""A model straight from a training checkpoint, of a run that has not finished or of an earlier step."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from trainer.checkpoint import load_tensors, read_index
from trainer.checkpoint_folder import SEAL, Checkpoint, find_damage, list_checkpoints, read_seal
from trainer.config import parse_section
from trainer.data.identities import identities_of
from trainer.data.index import DatasetInfo, open_dataset
from trainer.errors import LceError, ModelError
from trainer.models.card import trained_card
from trainer.models.model import TorchModel
from trainer.networks import build_backbone
from trainer.networks.config import BackboneConfig
from trainer.networks.scale import fit_scale

# The moving average is what a finished run would hand over.
_PREFIXES = ("average.backbone.", "module.backbone.")


def is_checkpointed(path: Path) -> bool:
    """Whether ``path`` is a complete checkpoint, or a run folder that holds one."""
    return (path / SEAL).is_file() or any((p / SEAL).is_file() for p in list_checkpoints(path / "checkpoints"))


def open_checkpoint(path: Path, device: str | torch.device = "cpu") -> TorchModel:
    """The backbone in a checkpoint (a run folder means its newest complete one), with the preprocessing of its data
    set. Transformations are handed over by finished runs alone: the card says that they are left out.

    Raises:
        ModelError: a damaged checkpoint, one without a backbone, or the data set that says how images are read is gone.
    """
    if not (path / SEAL).is_file():
        path = [p for p in list_checkpoints(path / "checkpoints") if (p / SEAL).is_file()][-1]
    try:
        checkpoint = Checkpoint(path, read_seal(path))
        damage = find_damage(path, checkpoint.seal["files"])
        if damage:
            raise ModelError(damage)
        config, source = checkpoint.seal["config"], str(path / SEAL)
        chosen: BackboneConfig = parse_section(BackboneConfig, config["backbone"], source)
        info = _image_info(config["data"])
        index = read_index(path).state_dict_metadata
        found = {n: entry for n, entry in index.items() if isinstance(entry, TensorStorageMetadata)}
        prefix = next(p for p in (*_PREFIXES, "") if any(n.startswith(p) for n in found))
        state = {n: torch.empty(e.size, dtype=e.properties.dtype) for n, e in found.items() if n.startswith(prefix)}
        if not prefix:
            raise ModelError(f"{path}: holds no backbone")
        load_tensors(checkpoint, state)
        backbone = build_backbone(chosen, info.image_size)
        state = {name.removeprefix(prefix): value for name, value in state.items()}
        fit_scale(backbone, state)
        backbone.load_state_dict(state)
    except ModelError:
        raise
    except (LceError, RuntimeError, KeyError) as error:
        raise ModelError(f"{path}: no model can be taken from it: {error}") from None
    card = trained_card(
        info,
        config["data"].get("path"),
        checkpoint.seal.get("old_model", (None, None)),  # seals of version 0.1 do not have it
        backbone=chosen.model_copy(update={"weights": None}),
        dim=chosen.dim,
        step=checkpoint.step,
        classes=int(checkpoint.seal["num_classes"]),
        mode=_label(config["compat"]),
        left_out=tuple(d for d in ("t21", "t12") if any(n.startswith(f"module.{d}.") for n in found)),
        notes=f"from the checkpoint {path}",
    )
    content = hashlib.sha256(repr(sorted(checkpoint.seal["files"].items())).encode()).hexdigest()[:16]
    model = TorchModel(card, path, content, backbone, {}, device)
    model.identities = identities_of(config["data"].get("path"), config["data"].get("labels"), chosen.weights)
    return model


def _image_info(data: dict[str, Any]) -> DatasetInfo:
    if data.get("path") is None:
        return DatasetInfo(image_size=(data["synthetic_size"], data["synthetic_size"]))
    return open_dataset(Path(data["path"])).info


def _label(compat: dict[str, Any]) -> str:
    """How the model is made compatible, as its card names it: LCE's mode, another method, or empty."""
    method = str(compat["method"])
    return {"none": "", "lce": str(compat.get("mode", "direct"))}.get(method, method)
