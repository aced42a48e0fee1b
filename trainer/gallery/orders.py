"""In which order a gallery is upgraded: what is searched most, or is least certain, gains first.

An order is said as ``stored`` (as it lies there), ``random``, ``confidence`` (the old vector's cosine to its own
identity's centre less that to the nearest other one, lowest first; needs the images' labels), ``distance`` (how far the
new model expects T₁₂ of the old vector to be from the image's new embedding, largest first: FastFill, Jaeckle et al.,
ICLR 2023; needs a model with ``compat.distance``), ``highest:WHERE`` or ``lowest:WHERE``: by a number of each row,
which a column of a table or a .npy of as many numbers holds (how often a row was searched: highest first; a stored
confidence or quality: lowest first).
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trainer.data.index import Dataset
from trainer.errors import DataError
from trainer.evaluation.arrays import FloatArray, IntArray
from trainer.evaluation.backfill import backfill_order, distance_order
from trainer.gallery.convert import space_of, usable
from trainer.gallery.files import status
from trainer.gallery.formats import Format
from trainer.gallery.open import open_gallery
from trainer.reading import read_array

if TYPE_CHECKING:
    from trainer.models.model import EmbeddingModel

KINDS = ("stored", "random", "confidence", "distance", "highest", "lowest")


def parse_order(text: str) -> tuple[str, str]:
    """``highest:hits`` → (highest, hits); ``random`` → (random, ""). Raises :class:`DataError` for any other form."""
    kind, _, where = text.partition(":")
    if kind not in KINDS or (kind in ("highest", "lowest")) != bool(where):
        raise DataError(
            f"order {text!r}: expected stored, random, confidence, distance, highest:WHERE or lowest:WHERE, where "
            "WHERE is a table's column or a .npy with one number a row"
        )
    return kind, where


def order_rows(
    text: str, path: Path, dataset: Dataset | None = None, seed: int = 0, model: "EmbeddingModel | None" = None
) -> IntArray | None:
    """The order (rows,) of a gallery file's rows; None: as they are stored.

    Args:
        dataset: for ``confidence``; a gallery id is its record's number. model: the new one, for ``distance``.

    Raises:
        DataError: an unknown order, what it needs is missing, or, for ``distance``, vectors that are not the old
            model's.
        ModelError: the model does not predict distances, or those of another dimension.
    """
    kind, where = parse_order(text)
    if kind == "stored":
        return None
    gallery = open_gallery(path)
    every = slice(0, gallery.rows)
    if kind == "random":
        return np.random.default_rng(seed).permutation(gallery.rows)
    if kind == "distance":
        if model is None:
            raise DataError(f"{path}: the order distance needs the new model; give it with `model`")
        return distance_order(model.distance(_old_vectors(gallery, path, model)))
    if kind == "confidence":
        if dataset is None:
            raise DataError(f"{path}: the order confidence needs the images' identities; give them with `images`")
        ids, vectors = gallery.ids(every), gallery.read(every)
        if ids.min() < 0 or ids.max() >= len(dataset):
            raise DataError(f"{path}: ids {ids.min()} to {ids.max()} are not all records of {dataset.path}")
        unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return backfill_order("confidence", unit, np.asarray(dataset.labels)[ids], seed)
    numbers = _numbers(Path(where), gallery.rows)
    return np.argsort(-numbers if kind == "highest" else numbers, kind="stable")


def _old_vectors(gallery: Format, path: Path, model: "EmbeddingModel") -> FloatArray:
    """The vectors, where nothing says that they are not of the model's old one. Raises :class:`DataError`."""
    state, source, every = status(path), model.card.compatible_with_hash, slice(0, gallery.rows)
    through = gallery.applied or (() if state is None else state.through)
    if through and source != space_of(through[-1]):
        raise DataError(
            f"{path}: its vectors are in the space of {through[-1]}, and {model.path} predicts distances of those of "
            f"{source or 'an old model that it does not name'}; the order distance is of the old model's vectors"
        )
    return usable(gallery.read(every), gallery.ids(every), str(path))


def _numbers(path: Path, rows: int) -> FloatArray:
    numbers = read_array(path, DataError)
    if numbers.shape != (rows,) or numbers.dtype.kind not in "fiu" or not np.isfinite(numbers).all():
        raise DataError(f"{path}: expected one finite number for each of {rows:,} rows, found {numbers.shape}")
    return np.asarray(numbers, np.float64)
