"""In which model's space stored vectors are: told by what both models make of the same pictures, or by the centres of a
bank. The dimension tells nothing where both have the same."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.compat.bank.center_bank import CenterBank
from trainer.data.index import Dataset
from trainer.errors import DataError, ModelError
from trainer.evaluation.arrays import FloatArray, IntArray
from trainer.models.model import EmbeddingModel, embed_dataset

UNCLEAR = 0.02
"""Two cosines nearer to each other than this do not tell the spaces apart."""
_CLASSES = 1 << 16  # of a bank at a time


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


def by_bank(vectors: Sequence[FloatArray], bank: CenterBank, new: EmbeddingModel) -> Spaces:
    """Compare stored vectors with the nearest centre of a bank of the old model, and with the nearest of T₁₂ of these.

    Raises:
        ModelError: the new model has no T₁₂ from the bank's dimension.
    """
    card = new.card.transforms.get("t12")
    if card is None or card.dim_in != bank.dim:
        raise ModelError(f"{new.path}: has no T₁₂ of dimension {bank.dim} to put the bank's centres into the new space")
    best = {"old": np.full(len(vectors), -1.0), "new": np.full(len(vectors), -1.0)}
    for start in range(0, bank.num_classes, _CLASSES):
        rows = bank.rows(start, min(start + _CLASSES, bank.num_classes))
        centers = rows.centers[rows.mask].numpy()
        if not len(centers):
            continue
        for space, given in (("old", centers), ("new", new.transform("t12", centers))):
            for dim in {len(vector) for vector in vectors} & {given.shape[1]}:
                at = [i for i, vector in enumerate(vectors) if len(vector) == dim]
                some = np.stack([vectors[i] for i in at])
                unit = some / np.maximum(np.linalg.norm(some, axis=1, keepdims=True), 1e-12)
                best[space][at] = np.maximum(best[space][at], (unit @ given.T).max(axis=1))
    return _shares(best["old"], best["new"])


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
