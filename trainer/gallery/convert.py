"""What a gallery's vectors become: T₁₂ of the old vector (no image needed), or the image's new embedding."""

from typing import Protocol

import numpy as np

from trainer.data.index import Dataset
from trainer.errors import DataError, ModelError
from trainer.evaluation.arrays import FloatArray, IntArray, check_unit
from trainer.models.model import EmbeddingModel, embed_dataset


class Converter(Protocol):
    """From old rows to new ones. version: names the result, so that no gallery mixes two upgrades."""

    dim_in: int
    dim_out: int
    version: str

    def __call__(self, ids: IntArray, vectors: FloatArray) -> FloatArray:
        """ids (n,), old vectors (n, D1) → new unit vectors (n, D2) float32."""


class Forward:
    """T₁₂ of the new model: the gallery is converted without its images.

    Raises:
        ModelError: the model has no T₁₂ (it was not trained with compat.mode forward, both or cross-model).
    """

    def __init__(self, model: EmbeddingModel) -> None:
        if "t12" not in model.card.transforms:
            raise ModelError(
                f"{model.path}: has no T₁₂ to convert stored vectors with; train with compat.mode forward, both or "
                "cross-model, or re-encode from images"
            )
        card = model.card.transforms["t12"]
        self._model, self.dim_in, self.dim_out, self.version = model, card.dim_in, card.dim_out, f"t12-{model.hash}"

    def __call__(self, ids: IntArray, vectors: FloatArray) -> FloatArray:
        """See :class:`Converter`. Vectors that are not unit are normalised first."""
        return checked(self._model.transform("t12", np.asarray(vectors, np.float32)), self.version)


class Reencode:
    """The new model's embedding of each image; a gallery id is the record's number in ``dataset``."""

    def __init__(self, model: EmbeddingModel, dataset: Dataset, dim_in: int) -> None:
        self._model, self._dataset = model, dataset
        self.dim_in, self.dim_out, self.version = dim_in, model.dim, f"images-{model.hash}"

    def __call__(self, ids: IntArray, vectors: FloatArray) -> FloatArray:
        """See :class:`Converter`."""
        wrong = np.flatnonzero((ids < 0) | (ids >= len(self._dataset)))
        if len(wrong):
            raise DataError(
                f"{self._dataset.path}: gallery id {ids[wrong[0]]} is no record of it ({len(self._dataset):,})"
            )
        return checked(embed_dataset(self._model, self._dataset, ids), self.version)


def checked(vectors: FloatArray, what: str) -> FloatArray:
    """The vectors, if they are finite and unit. Raises :class:`ModelError`."""
    check_unit(vectors, what)
    return vectors


def usable(vectors: FloatArray, ids: IntArray, where: str) -> FloatArray:
    """Stored vectors (n, D), if all are finite and none is zero. Raises :class:`DataError` naming the id."""
    norms = np.linalg.norm(vectors, axis=1)
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if len(bad):
        raise DataError(f"{where}: the vector of id {ids[bad[0]]} is zero or not finite; mend or remove it")
    return vectors
