"""The opened inputs of a run, as the compatibility methods and the tasks take them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from trainer.compat.bank.center_bank import CenterBank
from trainer.compat.methods.config import MethodConfig, UniBctConfig, WithOldConfig
from trainer.compat.methods.cross import CrossInputs
from trainer.compat.methods.old_embeddings import ModelEmbeddings, OldEmbeddings, StoredEmbeddings
from trainer.data import Dataset, DatasetInfo
from trainer.data.config import DataConfig, SyntheticConfig
from trainer.errors import ConfigError, named
from trainer.head.config import HeadConfig
from trainer.networks.config import BackboneConfig


class Sections(Protocol):
    """What a method may read of the run's configuration besides its own section."""

    @property
    def data(self) -> DataConfig: ...

    @property
    def backbone(self) -> BackboneConfig: ...

    @property
    def head(self) -> HeadConfig: ...

    @property
    def seed(self) -> int: ...

    @property
    def accumulate(self) -> int:
        """Steps of an update."""


@dataclass(frozen=True)
class Inputs:
    """The opened and checked inputs of a run.

    Attributes:
        dataset: None for synthetic data.
        num_classes: C.
        image_size: (H, W) in pixels.
        bank: the old model's centres, when the run is to be compatible.
        old: where the images' old embeddings come from, for the methods that need them.
        cross: what cross-model training works on; bank and old are then None.
        start: of the weights that backbone and head begin with, a short text that tells them from others.
    """

    dataset: Dataset | None
    num_classes: int
    image_size: tuple[int, int]
    bank: CenterBank | None
    old: OldEmbeddings | None = None
    cross: CrossInputs | None = None
    start: str = "none"

    @property
    def old_dim(self) -> int | None:
        """D1, as far as it is known."""
        source = self.old or self.bank
        return None if source is None else source.dim

    @property
    def stored(self) -> list[StoredEmbeddings]:
        """The files of embeddings of which every step reads its batch's rows."""
        sources = (self.old,) if self.cross is None else (self.cross.new, self.cross.old)
        return [source for source in sources if isinstance(source, StoredEmbeddings)]

    @property
    def old_model(self) -> tuple[str | None, str | None]:
        """The name and the hash of the model to be compatible with, as far as they are known."""
        if self.old is not None and self.old.model is not None:
            return self.old.model
        return (None, None) if self.bank is None else (self.bank.info.model, self.bank.info.model_hash)


def open_bank(methods: Sequence[MethodConfig], classes: int, dataset: Dataset | None) -> CenterBank | None:
    """The one centre bank that the methods name (:func:`trainer.compat.methods.config.check_together`).

    Raises:
        CenterBankError: damaged, or of other classes.
    """
    path = next((one.bank for one in methods if one.bank is not None), None)
    if path is None:
        return None
    with named(compat__bank=path):
        bank = CenterBank.open(path)
    bank.check_classes(classes, dataset, "compat.bank")
    return bank


def open_old(
    methods: Sequence[MethodConfig], data: DataConfig, dataset: Dataset | None, device: torch.device
) -> OldEmbeddings | None:
    """The one source of old embeddings that the methods name. Raises :class:`LceError`: missing, or not of the data."""
    for one in methods:
        if isinstance(one, WithOldConfig) and one.old_model is not None:
            with named(compat__old_model=one.old_model):
                return ModelEmbeddings(one.old_model, dataset.info if dataset is not None else DatasetInfo(), device)
        if isinstance(one, WithOldConfig | UniBctConfig):
            assert one.old_embeddings is not None
            records = data.synthetic_records if isinstance(data, SyntheticConfig) else len(dataset or ())
            with named(compat__old_embeddings=one.old_embeddings):
                return StoredEmbeddings(one.old_embeddings, records, dataset=dataset)
    return None


def check_old(bank: CenterBank | None, old: OldEmbeddings | None, methods: Sequence[MethodConfig]) -> None:
    """Raise :class:`ConfigError` for centres and embeddings of two old models: the dimensions differ, or the models'
    hashes where both are known.
    """
    if bank is None or old is None:
        return
    path = next(one.bank for one in methods if one.bank is not None)
    if bank.dim != old.dim:
        raise ConfigError(f"{path}: dimension {bank.dim}, the old embeddings have {old.dim}")
    if None not in (bank.info.model_hash, old.model_hash) and bank.info.model_hash != old.model_hash:
        raise ConfigError(
            f"compat.bank = {path} is of the model {bank.info.model} (hash {bank.info.model_hash}), the old embeddings "
            f"are of one with the hash {old.model_hash}; make both from one model (`lce centers from-model`)"
        )
