"""Writing a model folder: ``model.json`` (the card and the checksums of all), ``backbone.safetensors`` and, where there
are any, the maps ``t21.safetensors`` (new → old) and ``t12.safetensors`` (old → new), and ``t12_distance.safetensors``,
which predicts how far T₁₂ errs."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from trainer.data.identities import Identities, save_identities
from trainer.errors import ModelError
from trainer.files import checksum, replaced
from trainer.models.card import CARD_FILE, DISTANCE, IDENTITIES, Direction, ModelCard, card_text
from trainer.tensor_files import save_tensors


def save_model(
    folder: str | Path,
    backbone: nn.Module | None,
    card: ModelCard,
    transforms: Mapping[Direction, nn.Module] | None = None,
    identities: Identities | None = None,
    distance: nn.Module | None = None,
) -> None:
    """Write a model folder, atomically; an earlier model folder of that name is replaced.

    Args:
        backbone: the plain network (not wrapped for training); its state dict is copied to the CPU. None: the folder
            holds maps alone, and the card names no backbone.
        transforms: the modules that ``card.transforms`` describes.
        identities: which the model was trained on, where known; hashes of them are kept.
        distance: the head that ``card.distance`` announces.

    Raises:
        ModelError: the card and the modules do not fit each other, or the folder cannot be written.
    """
    folder = Path(folder)
    modules: dict[str, nn.Module] = {} if backbone is None else {"backbone": backbone}
    modules.update((str(name), module) for name, module in (transforms or {}).items())
    modules |= {} if distance is None else {DISTANCE: distance}
    described = (
        ({"backbone"} if card.backbone else set()) | set(card.transforms) | ({DISTANCE} if card.distance else set())
    )
    if not modules or set(modules) != described:
        raise ModelError(f"{folder}: the model card describes {sorted(described)}, given are {sorted(modules)}")
    refuse_foreign(folder)
    if card.backbone is not None:
        card = card.model_copy(update={"backbone": card.backbone.model_copy(update={"weights": None})})
    with replaced(folder, ModelError) as partial:
        partial.mkdir(parents=True)
        for name, module in modules.items():
            state = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
            save_tensors(state, partial / f"{name}.safetensors")
        known = None if identities is None else save_identities(identities, partial / IDENTITIES)
        card = card.model_copy(update={"identities": known})
        files = {file.name: checksum(file) for file in sorted(partial.iterdir())}
        (partial / CARD_FILE).write_text(card_text(card, files), encoding="utf-8")


def refuse_foreign(folder: Path) -> None:
    """Raise :class:`ModelError` where a folder exists that is neither empty nor a model folder: it is not replaced."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CARD_FILE).is_file():
        raise ModelError(f"{folder}: exists and is no model folder; nothing was replaced")
