"""What a gallery's vectors become: T₁₂ of the old vector (no image needed), or the image's new embedding."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from trainer.data.index import Dataset
from trainer.errors import DataError, ModelError
from trainer.evaluation.arrays import FloatArray, IntArray, check_unit

if TYPE_CHECKING:
    from trainer.models.model import EmbeddingModel


class Converter(Protocol):
    """From old rows to new ones.

    Attributes:
        version: names the result, so that no gallery mixes two upgrades: how it was made, a hyphen, and the space that
            it is in (the model's hash).
        source: the space that it converts from, where that is known.
        by_id: the result depends on the id alone, whatever the stored vector is: it may be made again.
    """

    dim_in: int
    dim_out: int
    version: str
    source: str | None
    by_id: bool

    def __call__(self, ids: IntArray, vectors: FloatArray) -> FloatArray:
        """ids (n,), old vectors (n, D1) → new unit vectors (n, D2) float32."""


class Forward:
    """T₁₂ of the new model: the gallery is converted without its images.

    Raises:
        ModelError: the model has no T₁₂ (it was not trained with compat.mode forward, both or cross-model).
    """

    def __init__(self, model: "EmbeddingModel") -> None:
        if "t12" not in model.card.transforms:
            raise ModelError(
                f"{model.path}: has no T₁₂ to convert stored vectors with; train with compat.mode forward, both or "
                "cross-model, or re-encode from images"
            )
        card = model.card.transforms["t12"]
        self._model, self.dim_in, self.dim_out, self.version = model, card.dim_in, card.dim_out, f"t12-{model.hash}"
        self.source, self.by_id = model.card.compatible_with_hash, False

    def __call__(self, ids: IntArray, vectors: FloatArray) -> FloatArray:
        """See :class:`Converter`. Vectors that are not unit are normalised first."""
        return checked(self._model.transform("t12", np.asarray(vectors, np.float32)), self.version)


class Reencode:
    """The new model's embedding of each image; a gallery id is the record's number in ``dataset``."""

    def __init__(self, model: "EmbeddingModel", dataset: Dataset, dim_in: int) -> None:
        self._model, self._dataset = model, dataset
        self.dim_in, self.dim_out, self.version = dim_in, model.dim, f"images-{model.hash}"
        self.source: str | None = None
        self.by_id = True

    def __call__(self, ids: IntArray, vectors: FloatArray) -> FloatArray:
        """See :class:`Converter`."""
        wrong = np.flatnonzero((ids < 0) | (ids >= len(self._dataset)))
        if len(wrong):
            raise DataError(
                f"{self._dataset.path}: gallery id {ids[wrong[0]]} is no record of it ({len(self._dataset):,})"
            )
        from trainer.models.model import embed_dataset

        return checked(embed_dataset(self._model, self._dataset, ids), self.version)


def space_of(version: str) -> str:
    """The space that a conversion's result is in, of :attr:`Converter.version`."""
    return version.partition("-")[2] or version


def check_direction(where: str, applied: Sequence[str], converter: Converter, forget: str) -> None:
    """Whether a conversion fits vectors that went through ``applied``.

    Args:
        where: the gallery, for messages. forget: what to do if the vectors were replaced since.

    Raises:
        DataError: it was applied already, or it converts from another space than the one that they are in.
    """
    if converter.by_id or not applied:
        return
    if space_of(converter.version) in {space_of(version) for version in applied}:
        raise DataError(
            f"{where}: was converted to {converter.version} already, and converting it again would spoil it; if its "
            f"vectors were replaced by old ones since, {forget} first"
        )
    if converter.source is not None and converter.source != space_of(applied[-1]):
        raise DataError(
            f"{where}: its vectors are in the space of {applied[-1]}, and {converter.version} converts those of model "
            f"{converter.source}; if they were replaced since, {forget} first"
        )


def checked(vectors: FloatArray, what: str) -> FloatArray:
    """The vectors, if they are finite and unit. Raises :class:`ModelError`."""
    check_unit(vectors, what)
    return vectors


def usable(vectors: FloatArray, ids: IntArray, where: str) -> FloatArray:
    """Stored vectors (n, D), if all are finite and none is zero. Raises :class:`DataError` naming the id."""
    norms = np.linalg.norm(vectors, axis=1)
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if len(bad):
        raise DataError(f"{where}: the vector of id {ids[bad[0]]} is zero or not finite; repair or remove it")
    return vectors
