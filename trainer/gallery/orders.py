"""In which order a gallery is upgraded: what is searched most, or is least certain, gains first.

An order is said as ``stored`` (as it lies there), ``random``, ``confidence`` (the old vector's cosine to its own
identity's centre less that to the nearest other one, lowest first; needs the images' labels), ``highest:WHERE`` or
``lowest:WHERE``: by a number of each row, which a column of a table or a .npy of as many numbers holds (how often a row
was searched: highest first; a stored confidence or quality: lowest first).
"""

from pathlib import Path

import numpy as np

from trainer.data.index import Dataset
from trainer.errors import DataError
from trainer.evaluation.arrays import FloatArray, IntArray
from trainer.evaluation.backfill import backfill_order
from trainer.gallery.open import open_gallery
from trainer.reading import read_array

KINDS = ("stored", "random", "confidence", "highest", "lowest")


def parse_order(text: str) -> tuple[str, str]:
    """``highest:hits`` → (highest, hits); ``random`` → (random, ""). Raises :class:`DataError` for any other form."""
    kind, _, where = text.partition(":")
    if kind not in KINDS or (kind in ("highest", "lowest")) != bool(where):
        raise DataError(
            f"order {text!r}: expected stored, random, confidence, highest:WHERE or lowest:WHERE, where WHERE is a "
            "table's column or a .npy with one number a row"
        )
    return kind, where


def order_rows(text: str, path: Path, dataset: Dataset | None = None, seed: int = 0) -> IntArray | None:
    """The order (rows,) of a gallery file's rows; None: as they are stored.

    Args:
        dataset: for ``confidence``; a gallery id is its record's number.

    Raises:
        DataError: an unknown order, or what it needs is missing.
    """
    kind, where = parse_order(text)
    if kind == "stored":
        return None
    gallery = open_gallery(path)
    every = slice(0, gallery.rows)
    if kind == "random":
        return np.random.default_rng(seed).permutation(gallery.rows)
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


def _numbers(path: Path, rows: int) -> FloatArray:
    numbers = read_array(path, DataError)
    if numbers.shape != (rows,) or numbers.dtype.kind not in "fiu" or not np.isfinite(numbers).all():
        raise DataError(f"{path}: expected one finite number for each of {rows:,} rows, found {numbers.shape}")
    return np.asarray(numbers, np.float64)
