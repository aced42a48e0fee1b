"""The opened inputs of a run, as the compatibility methods and the tasks take them."""

from dataclasses import dataclass
from typing import Protocol

from trainer.compat.bank.center_bank import CenterBank
from trainer.compat.methods.cross import CrossInputs
from trainer.compat.methods.old_embeddings import OldEmbeddings
from trainer.data import Dataset
from trainer.data.config import DataConfig
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
    """

    dataset: Dataset | None
    num_classes: int
    image_size: tuple[int, int]
    bank: CenterBank | None
    old: OldEmbeddings | None = None
    cross: CrossInputs | None = None

    @property
    def old_model(self) -> tuple[str | None, str | None]:
        """The name and the hash of the model to be compatible with, as far as they are known."""
        if self.old is not None and self.old.model is not None:
            return self.old.model
        return (None, None) if self.bank is None else (self.bank.info.model, self.bank.info.model_hash)
