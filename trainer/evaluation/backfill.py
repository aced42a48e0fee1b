"""Backfill curves: what search is worth while a growing share of the gallery is re-encoded with the new model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainer.evaluation.arrays import FloatArray, IntArray, class_index
from trainer.evaluation.compatibility import class_centres
from trainer.evaluation.verification import BINS, PairList, PairScores, histogram

ORDERS = ("random", "confidence", "class", "distance")
"""random; least confident old embedding first; whole classes in random order; what T₁₂ is expected to map worst first
(FastFill, Jaeckle et al., ICLR 2023)."""


@dataclass(frozen=True)
class BackfillCurve:
    """Metrics at shares (p,) of the gallery re-encoded; area: the mean over the share (trapezoid), by metric."""

    order: str
    shares: list[float]
    rank1: list[float]
    tar: list[float]
    far: float
    area: dict[str, float]


def distance_order(distances: FloatArray) -> IntArray:
    """The order (n,) in which entries are re-encoded by their expected distances (n,): the largest first."""
    return np.argsort(-distances, kind="stable")


def backfill_order(name: str, old: FloatArray, labels: IntArray, seed: int) -> IntArray:
    """The order (n,) in which gallery images are re-encoded, by the old embeddings alone. Confidence: the old
    embedding's cosine to its own class's centre less that to the nearest other one, lowest first."""
    generator = np.random.default_rng(seed)
    if name == "random":
        return generator.permutation(len(labels))
    index = class_index(labels, "backfill")
    if name == "class":
        return np.argsort(generator.permutation(int(index.max()) + 1)[index], kind="stable")
    centres = class_centres(old, index)
    confidence = np.empty(len(labels))
    rows = max(1, (1 << 22) // len(centres))
    for a in range(0, len(labels), rows):
        block = old[a : a + rows] @ centres.T
        own_cells = (np.arange(len(block)), index[a : a + rows])
        own = block[own_cells].copy()
        block[own_cells] = -2
        confidence[a : a + rows] = own - block.max(1)
    return np.argsort(confidence, kind="stable")


def backfill_curve(
    queries: tuple[FloatArray, FloatArray],
    gallery: tuple[FloatArray, FloatArray],
    labels: IntArray,
    order: IntArray,
    far: float,
    name: str,
    steps: int = 10,
) -> BackfillCurve:
    """Rank-1 (leave-one-out) and TAR at ``far`` at ``steps`` + 1 shares of the gallery.

    Args:
        queries: new-model queries as they meet an old entry and as they meet a new one, each (n, D).
        gallery: the images as old entries and as new ones (n, D), in the spaces of the respective queries.
        labels: (n,). order: (n,) which gallery images are re-encoded first.

    All pairs of different images count. Memory: a block of scores, and ``steps`` histograms.
    """
    n = len(labels)
    cuts = np.linspace(0, n, steps + 1).astype(int)
    counts = np.zeros((2, BINS), np.int64)  # genuine, impostor, with no part re-encoded
    change = np.zeros((2, steps, BINS), np.int32)  # what re-encoding a part adds and takes away
    best = np.full((2, 2, steps, n), -2, np.float32)  # old or new entry, own identity or other, part, query
    for part in range(steps):
        columns = order[cuts[part] : cuts[part + 1]]
        for entry in (0, 1):
            if len(columns):
                found = _score_part(queries[entry], gallery[entry][columns], labels, columns, best[entry, :, part])
                change[:, part] += found if entry else -found
                counts += 0 if entry else found
    _, index, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    counted = sizes[index] > 1
    empty = PairList(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    rank1, tar = [], []
    for done in range(steps + 1):
        if done:
            counts += change[:, done - 1]
        own, other = (np.maximum(_top(best[1, kind, :done]), _top(best[0, kind, done:])) for kind in (0, 1))
        rank1.append(float((own > other)[counted].mean()))
        tar.append(PairScores(counts[0], counts[1], empty, empty).tar_at(far))
    shares = [float(cut / n) for cut in cuts]
    return BackfillCurve(name, shares, rank1, tar, far, {"rank-1": _area(shares, rank1), "TAR": _area(shares, tar)})


def _top(parts: FloatArray) -> FloatArray:
    return parts.max(0) if len(parts) else np.full(parts.shape[1], -2, np.float32)


def _area(shares: Sequence[float], values: Sequence[float]) -> float:
    return float(np.trapezoid(values, shares))


def _score_part(
    queries: FloatArray, part: FloatArray, labels: IntArray, columns: IntArray, best: FloatArray
) -> npt.NDArray[np.int32]:
    """Score all queries against one part of the gallery: histograms (2, BINS) of genuine and impostor pairs.

    ``best`` (2, n) is filled with each query's highest score of its own and of another identity.
    """
    counts = np.zeros((2, BINS), np.int32)
    rows = max(1, (1 << 22) // len(columns))
    for a in range(0, len(queries), rows):
        stop = min(a + rows, len(queries))
        block = queries[a:stop] @ part.T
        itself = np.arange(a, stop)[:, None] == columns[None, :]
        same = labels[a:stop, None] == labels[columns][None, :]
        own = same & ~itself
        counts[0] += histogram(block[own]).astype(np.int32)
        best[0, a:stop] = np.where(own, block, -2).max(1)
        block[same] = -2  # falls into the lowest bin, whose count is corrected
        counts[1] += histogram(block).astype(np.int32)
        counts[1, 0] -= np.count_nonzero(same)
        best[1, a:stop] = block.max(1)
    return counts
