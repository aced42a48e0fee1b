"""Models put together for an evaluation: maps that were handed over alone, and embeddings that lie on disk."""

from pathlib import Path

import numpy as np

from trainer.errors import ModelError
from trainer.models.card import Color, Direction, ModelCard
from trainer.models.model import EmbeddingModel


class StoredModel(EmbeddingModel):
    """Stands for a model of which there are embeddings alone. path: of their file."""

    def __init__(self, path: Path, dim: int) -> None:
        super().__init__(ModelCard(dim=dim, image_size=(1, 1)), path, "")

    def _embed(self, images: np.ndarray) -> np.ndarray:
        raise ModelError(f"{self.path}: holds embeddings and no network")

    def transform(self, direction: Direction, vectors: np.ndarray) -> np.ndarray:
        """Always raises :class:`ModelError`."""
        raise ModelError(f"{self.path}: holds embeddings and no map; give the maps with `maps`")


class MappedModel(EmbeddingModel):
    """A model with the maps of a folder that was trained for its embeddings (``compat.mode = cross-model``).

    Raises:
        ModelError: the folder has no maps, or they are of another model or dimension.
    """

    def __init__(self, model: EmbeddingModel, maps: EmbeddingModel) -> None:
        known = maps.card
        if not known.transforms:
            raise ModelError(f"{maps.path}: has no maps; give what a run with compat.mode = cross-model wrote")
        if known.maps_of is not None and model.hash and known.maps_of != model.hash:
            raise ModelError(
                f"{maps.path}: its maps are of the embeddings of another model than {model.path} (or of the same file, "
                "read in another way)"
            )
        for direction, part in known.transforms.items():
            dim = part.dim_in if direction == "t21" else part.dim_out
            if dim != model.dim:
                raise ModelError(
                    f"{maps.path}: its {direction} is of embeddings of dimension {dim}, {model.path} gives {model.dim}"
                )
        kept = {
            name: getattr(known, name) for name in ("transforms", "mode", "compatible_with", "compatible_with_hash")
        }
        super().__init__(model.card.model_copy(update=kept), model.path, model.hash)
        self.model, self.maps = model, maps
        self.identities = model.identities if maps.identities is None else maps.identities  # those of the maps: of both
        self.foreign, self.allow_collapsed, self.reading = model.foreign, model.allow_collapsed, model.reading

    def embed(self, images: np.ndarray, color: Color = "RGB", flip: bool = False, unit: bool = True) -> np.ndarray:
        """As the model's own."""
        return self.model.embed(images, color, flip, unit)

    def _embed(self, images: np.ndarray) -> np.ndarray:
        return self.model._embed(images)

    def transform(self, direction: Direction, vectors: np.ndarray) -> np.ndarray:
        """As the maps' own."""
        return self.maps.transform(direction, vectors)

    @property
    def predicts_distance(self) -> bool:
        """As the maps do."""
        return self.maps.predicts_distance

    def distance(self, vectors: np.ndarray) -> np.ndarray:
        """As the maps' own."""
        return self.maps.distance(vectors)
