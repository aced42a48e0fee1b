"""Opening a model of any kind: model folder, run folder, checkpoint, ONNX file. The one file that knows them all."""

import hashlib
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from trainer.data.identities import identities_of_run, load_identities
from trainer.errors import ConfigError, ModelError
from trainer.models.card import CARD_FILE, DISTANCE, IDENTITIES, Direction, Files, ModelCard, read_folder_card
from trainer.models.description import Reading, is_description, with_description
from trainer.models.foreign_weights import open_weights
from trainer.models.model import EmbeddingModel, NoNetwork, TorchModel
from trainer.networks import build_backbone
from trainer.networks.scale import fit_scale
from trainer.networks.transform import build_distance_head, build_transform
from trainer.networks.weights import SUFFIXES
from trainer.reading import as_path, open_regular, other_framework, read_json, regular, why_unreadable

_HUB_WEIGHTS = ("model.safetensors", "model.pt", "pytorch_model.bin")


def load_model(
    path: str | Path, device: str | torch.device = "cpu", reading: Reading | None = None, described: bool = True
) -> EmbeddingModel:
    """Open a model folder, a run folder (its ``model/``, else its newest checkpoint), a checkpoint, an ONNX file, torch
    weights without a card (:mod:`trainer.models.foreign_weights`; also in a folder as Hugging Face's hub has them), or
    the description of a foreign model (``NAME.model.json``).

    Args:
        reading: what is stated of a foreign model (one without a card of ours); it counts before what its description
            states. Models with a card are read as the card says.
        described: False: the description next to a model file does not count.

    Raises:
        ModelError: nothing there, an unfinished run, damaged files, weights that do not fit the card, or an ONNX graph
            that does not map a batch of images to one embedding each.
    """
    path = as_path(path, "path", "the path of a model")
    if is_description(path) or (described and (path.is_file() or path.suffix == ".onnx")):
        path, reading = with_description(path, reading or Reading())
    if path.suffix == ".onnx":
        from trainer.models.onnx import OnnxModel  # onnxruntime takes a second to import

        return OnnxModel.open(path, device, reading)
    if path.suffix in SUFFIXES and not path.is_dir():
        return open_weights(path, device, reading or Reading())
    if path.is_file() and (kind := why_unreadable(path) or other_framework(path)):
        raise ModelError(f"{path}: {kind}")
    if not path.exists():
        raise ModelError(f"{path}: no such file or folder")
    folder = path if (path / CARD_FILE).is_file() else path / "model"
    if not (folder / CARD_FILE).is_file():
        from trainer.models.checkpointed import is_checkpointed, open_checkpoint

        if is_checkpointed(path):
            return open_checkpoint(path, device)
        if (path / "config.json").is_file() or any(path.glob("model.safetensors*")):
            return _open_hub_folder(path, device, reading or Reading())
        kind = f"no {CARD_FILE} in it" if path.is_dir() else "a file of no kind that is known"
        reason = "the run has no checkpoint yet" if (path / "checkpoints").is_dir() else kind
        raise ModelError(
            f"{path}: no model ({reason}); give a model folder, a run folder, a checkpoint, "
            "an .onnx file or torch weights"
        )
    card, files = read_folder_card(folder)
    if card.backbone is None and not card.transforms:
        raise ModelError(f"{folder / CARD_FILE}: names no backbone")
    if card.distance and "t12" not in card.transforms:
        raise ModelError(f"{folder / CARD_FILE}: distance: is of T₁₂, which the card does not describe")
    _check_size(card, folder)
    try:
        backbone = NoNetwork(path) if card.backbone is None else build_backbone(card.backbone, card.image_size)
    except ConfigError as error:
        raise ModelError(f"{folder / CARD_FILE}: {error}") from None
    digest = hashlib.sha256(card.model_dump_json(include={"backbone", "image_size", "color", "mean", "std"}).encode())
    if card.backbone is not None:
        _load_state(backbone, folder / "backbone.safetensors", digest.update, files)
    transforms: dict[Direction, nn.Module] = {}
    for direction, part in card.transforms.items():
        transforms[direction] = build_transform(part.config, part.dim_in, part.dim_out)
        _load_state(transforms[direction], folder / f"{direction}.safetensors", digest.update, files)
    distance: nn.Module | None = None
    if card.distance:
        distance = build_distance_head(card.transforms["t12"].dim_in)
        _load_state(distance, folder / f"{DISTANCE}.safetensors", digest.update, files)
    model = TorchModel(card, path, digest.hexdigest()[:16], backbone, transforms, device, distance)
    model.identities = load_identities(card.identities, folder / IDENTITIES) or identities_of_run(path)
    return model


def _open_hub_folder(folder: Path, device: str | torch.device, reading: Reading) -> EmbeddingModel:
    """The weights in a folder as Hugging Face's hub has it, if they are of a network of ours.

    Raises:
        ModelError: they are of another network, or there are none: what the folder is, what is taken, how to convert.
    """
    weights = next((folder / name for name in _HUB_WEIGHTS if (folder / name).is_file()), None)
    stated: Any = read_json(folder / "config.json", ModelError) if (folder / "config.json").is_file() else {}
    stated = stated if isinstance(stated, dict) else {}
    kind = stated.get("architectures") or stated.get("model_type") or stated.get("architecture") or "of no stated kind"
    kind = ", ".join(map(str, kind)) if isinstance(kind, list) else str(kind)
    if weights is None:
        reason = f"it holds none of {', '.join(_HUB_WEIGHTS)} (weights in several shards are not taken)"
    else:
        try:
            path, reading = with_description(weights, reading)
            return open_weights(path, device, reading)
        except ModelError as error:
            reason = str(error)
    raise ModelError(
        f"{folder}: a model folder of Hugging Face ({kind[:80]}); taken are weights of iResNet, MobileFaceNet, ViT and "
        f"IR networks in one file; export it with torch.onnx.export and give the .onnx: {reason}"
    )


def _check_size(card: ModelCard, folder: Path) -> None:
    """Refuse a card whose networks have more numbers than their files have bytes, before they are built."""
    parts: dict[str, Callable[[], nn.Module]] = {}
    if (backbone := card.backbone) is not None:
        parts["backbone"] = lambda: build_backbone(backbone, card.image_size)
    for direction, part in card.transforms.items():
        parts[direction] = lambda part=part: build_transform(part.config, part.dim_in, part.dim_out)  # type: ignore[misc]
    if card.distance:
        parts[DISTANCE] = lambda: build_distance_head(card.transforms["t12"].dim_in)
    for name, build in parts.items():
        try:
            with torch.device("meta"):
                count = sum(value.numel() for value in build().parameters())
        except (ConfigError, RuntimeError, OverflowError) as error:
            raise ModelError(f"{folder / CARD_FILE}: {name}: {' '.join(str(error).split())[:200]}") from None
        size = regular(folder / f"{name}.safetensors", ModelError).stat().st_size
        if count > size:
            raise ModelError(
                f"{folder / CARD_FILE}: describes a {name} of {count:,} numbers, its file has {size:,} bytes"
            )


def _load_state(module: nn.Module, path: Path, update: Callable[[bytes], None], files: Files | None) -> None:
    try:
        crc, size = 0, 0
        with open_regular(path, ModelError) as file:
            while data := file.read(2**22):
                update(data)
                crc, size = zlib.crc32(data, crc), size + len(data)
        if files is not None and files.get(path.name) != (size, crc):
            raise ModelError(f"{path}: is not what was written (its checksum in {CARD_FILE} differs); copy it again")
        state = load_file(path)
        fit_scale(module, state)
        module.load_state_dict(state)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{path}: missing, damaged or not of the network in {CARD_FILE}: {reason}") from None
