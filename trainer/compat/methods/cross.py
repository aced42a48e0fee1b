"""Cross-model training's inputs: two frozen models, by their embeddings on disk or run along on the batch's images.

What is trained are only the maps T₁₂ (old → new) and T₂₁ (new → old) between their spaces.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.compat.bank.center_bank import CenterBank
from trainer.compat.methods.config import LceCrossConfig
from trainer.compat.methods.old_embeddings import ModelEmbeddings, OldEmbeddings, StoredEmbeddings
from trainer.data import Dataset
from trainer.errors import CenterBankError, ConfigError, named
from trainer.models.model import EmbeddingModel
from trainer.models.open import load_model


@dataclass(frozen=True)
class CrossInputs:
    """The checked inputs.

    Attributes:
        new: the new model's embedding of every image.
        old: the old model's; None when the pairs to align are the centres of two banks.
        bank, new_bank: old and new centres by class. The boundary needs the old ones.
        model: the new model; a network of torch is handed over with the maps. None, or an ONNX graph: the maps are
        handed over alone.
        dim_old, dim_new: D1, D2.
        images: whether images have to be read at all.
    """

    new: OldEmbeddings
    old: OldEmbeddings | None
    bank: CenterBank | None
    new_bank: CenterBank | None
    model: EmbeddingModel | None
    dim_old: int
    dim_new: int
    images: bool

    @property
    def fingerprint(self) -> str:
        """Of everything that is read, the same on all ranks."""
        parts = (self.new, self.old, self.bank, self.new_bank)
        return "; ".join("none" if part is None else part.fingerprint for part in parts)


def open_cross(compat: LceCrossConfig, dataset: Dataset | None, device: torch.device) -> CrossInputs:
    """Open and check what ``compat.mode = cross-model`` works on.

    Raises:
        LceError: what is missing, or does not fit: number of records or classes, dimensions.
    """
    if dataset is None:
        raise ConfigError("compat.mode = cross-model: needs labelled records; set data.path")
    new = _embeddings("new", compat.new_embeddings, compat.new_model, dataset, device)
    if new is None:
        raise ConfigError(
            "compat.mode = cross-model: needs the new model's embeddings: set compat.new_embeddings (.npy by record) "
            "or compat.new_model"
        )
    bank = None if compat.bank is None else _bank("compat.bank", compat.bank, dataset)
    new_bank = None if compat.new_bank is None else _bank("compat.new_bank", compat.new_bank, dataset)
    old = None
    if new_bank is None:
        old = _embeddings("old", compat.old_embeddings, compat.old_model, dataset, device)
        if old is None:
            raise ConfigError(
                "compat.mode = cross-model: nothing to align; set compat.old_embeddings or compat.old_model (pairs of "
                "the same image), or compat.bank and compat.new_bank (pairs of class centres)"
            )
    elif bank is None:
        raise ConfigError("compat.new_bank: new centres need old ones too; set compat.bank")
    elif new_bank.dim != new.dim:
        raise CenterBankError(f"{compat.new_bank}: dimension {new_bank.dim}, the new embeddings have {new.dim}")
    if old is not None and bank is not None and old.dim != bank.dim:
        raise CenterBankError(f"{compat.bank}: dimension {bank.dim}, the old embeddings have {old.dim}")
    dim_old = old.dim if old is not None else bank.dim if bank is not None else 0
    images = any(isinstance(source, ModelEmbeddings) for source in (new, old))
    return CrossInputs(new, old, bank, new_bank, _new_model(compat.new_model, new, device), dim_old, new.dim, images)


def _embeddings(
    which: str, stored: Path | None, model: Path | None, dataset: Dataset, device: torch.device
) -> OldEmbeddings | None:
    """Stored embeddings where there are some (the model then only names itself), else the model run along."""
    if stored is not None:
        key = f"compat.{which}_embeddings"
        with named(**{key: stored}):
            return StoredEmbeddings(stored, len(dataset), key, dataset)
    if model is not None:
        with named(**{f"compat.{which}_model": model}):
            return ModelEmbeddings(model, dataset.info, device)
    return None


def _bank(key: str, path: Path, dataset: Dataset) -> CenterBank:
    with named(**{key: path}):
        bank = CenterBank.open(path)
    bank.check_classes(dataset.num_classes, dataset, key)
    return bank


def _new_model(path: Path | None, new: OldEmbeddings, device: torch.device) -> EmbeddingModel | None:
    """The model that gives the new embeddings, where it is known. Raises :class:`ConfigError`: of another dimension."""
    if isinstance(new, ModelEmbeddings):
        return new.old
    with named(compat__new_model=path):
        model = None if path is None else load_model(path, device)
    if model is not None and model.dim != new.dim:
        raise ConfigError(
            f"compat.new_model = {path}: gives dimension {model.dim}, compat.new_embeddings have {new.dim}; these are "
            "of another model"
        )
    return model
