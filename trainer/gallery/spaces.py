"""In which model's space stored vectors are: told by what both models make of the same pictures, or by the centres of a
bank. The dimension tells nothing where both have the same."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.data.index import Dataset
from trainer.errors import DataError, ModelError
from trainer.evaluation.arrays import FloatArray, IntArray
from trainer.models.model import EmbeddingModel, embed_dataset

UNCLEAR = 0.02
"""Two cosines nearer to each other than this do not tell the spaces apart."""


@dataclass(frozen=True)
class Spaces:
    """Of a sample of rows, the share that is in the old model's space, in the new one's, and that fits both alike."""

    rows: int
    old: float
    new: float
    unclear: float


def by_images(
    ids: IntArray, vectors: Sequence[FloatArray], dataset: Dataset, old: EmbeddingModel, new: EmbeddingModel
) -> Spaces:
    """Compare stored vectors with what both models make of the pictures; an id (n,) is a record's number.

    Vectors that T₁₂ made count as new. Raises :class:`DataError`: an id is no record of the data set.
    """
    wrong = np.flatnonzero((ids < 0) | (ids >= len(dataset)))
    if len(wrong):
        raise DataError(f"{dataset.path}: gallery id {ids[wrong[0]]} is no record of it ({len(dataset):,})")
    as_old = embed_dataset(old, dataset, ids)
    as_new = [embed_dataset(new, dataset, ids)]
    if "t12" in new.card.transforms and new.card.transforms["t12"].dim_in == old.dim:
        as_new.append(new.transform("t12", as_old))
    return _shares(
        np.array([_cosine(vector, reference) for vector, reference in zip(vectors, as_old, strict=True)]),
        np.max([[_cosine(v, made) for v, made in zip(vectors, each, strict=True)] for each in as_new], axis=0),
    )


def by_centers(vectors: Sequence[FloatArray], centers: Iterable[FloatArray], new: EmbeddingModel) -> Spaces:
    """Compare stored vectors with the nearest of the old model's class centres, and with the nearest of T₁₂ of these.

    Args:
        centers: (c, D1) float32, unit, a block of classes at a time.

    Raises:
        ModelError: the new model has no T₁₂ from the centres' dimension.
    """
    best_old, best_new = np.full(len(vectors), -1.0), np.full(len(vectors), -1.0)
    card = new.card.transforms.get("t12")
    for block in centers:
        if card is None or card.dim_in != block.shape[1]:
            raise ModelError(
                f"{new.path}: has no T₁₂ of dimension {block.shape[1]} to put the centres into the new space; give the "
                "pictures instead"
            )
        if len(block):
            best_old = np.maximum(best_old, _nearest(vectors, block))
            best_new = np.maximum(best_new, _nearest(vectors, new.transform("t12", block)))
    return _shares(best_old, best_new)


def _nearest(vectors: Sequence[FloatArray], references: FloatArray) -> FloatArray:
    """The largest cosine (n,) of each vector to one of the unit references (c, D); −1 for one of another dimension."""
    best = np.full(len(vectors), -1.0)
    at = [i for i, vector in enumerate(vectors) if len(vector) == references.shape[1]]
    if at:
        some = np.stack([vectors[i] for i in at])
        unit = some / np.maximum(np.linalg.norm(some, axis=1, keepdims=True), 1e-12)
        best[at] = (unit @ references.T).max(axis=1)
    return best


def _cosine(vector: FloatArray, reference: FloatArray) -> float:
    """−1 for vectors of two dimensions."""
    if vector.shape != reference.shape:
        return -1.0
    length = float(np.linalg.norm(vector)) * float(np.linalg.norm(reference))
    return float(vector @ reference) / max(length, 1e-12)


def _shares(old: FloatArray, new: FloatArray) -> Spaces:
    count = max(len(old), 1)
    is_old, is_new = float((old > new + UNCLEAR).sum()) / count, float((new > old + UNCLEAR).sum()) / count
    return Spaces(len(old), is_old, is_new, max(0.0, 1.0 - is_old - is_new))
