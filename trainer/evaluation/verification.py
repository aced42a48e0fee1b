"""Verification (1:1): every pair of a set counted exactly in bounded memory; ROC, TAR at FAR, EER, 10-fold accuracy.

Cosines fall on a grid of :data:`BINS` steps over [−1, 1] (2⁻¹⁹ ≈ 1.9e-6 wide). Counts at the grid's thresholds are
exact, so FAR and TAR are those of a threshold that can be deployed as it is printed; only the choice of the threshold
is limited by the grid. A pair is accepted when its cosine is at least the threshold.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from trainer.errors import DataError
from trainer.evaluation.arrays import BoolArray, FloatArray, IntArray, class_index
from trainer.randomness import GOLDEN

BINS = 1 << 20
_BLOCK = 1 << 22  # scores held at a time (16 MiB of float32)
_EXCLUDED = np.float32(-2)  # marks what is no impostor pair; below every cosine

FOLDS = 10
"""Of the LFW protocol."""


@dataclass(frozen=True)
class PairList:
    """Pairs by descending score: image numbers of query and gallery (m,), cosines (m,) float32.

    ``stride`` > 1: one in ``stride`` pairs was drawn (by a hash of the pair), the list stands for that many more.
    """

    query: IntArray
    gallery: IntArray
    score: FloatArray
    stride: int = 1

    def __len__(self) -> int:
        return len(self.score)


@dataclass(frozen=True)
class PairScores:
    """Scores of genuine and impostor pairs: exact histograms (:data:`BINS`,), and the pairs that matter one by one.

    ``genuine_pairs`` is complete up to its stride; ``impostor_pairs`` holds the highest-scoring impostors only.
    Both are empty when the scores came without image numbers.
    """

    genuine: IntArray
    impostor: IntArray
    genuine_pairs: PairList
    impostor_pairs: PairList

    @property
    def genuine_count(self) -> int:
        """Number of genuine pairs."""
        return int(self.genuine.sum())

    @property
    def impostor_count(self) -> int:
        """Number of impostor pairs."""
        return int(self.impostor.sum())

    @cached_property
    def _accepted(self) -> IntArray:
        """Impostor pairs at or above each threshold of the grid, highest first (:data:`BINS`,)."""
        return np.cumsum(self.impostor[::-1])

    def far(self, threshold: float) -> float:
        """False accept rate: the share of impostor pairs with a cosine of at least ``threshold``."""
        return float(self.impostor[_edge(threshold) :].sum() / self.impostor_count)

    def tar(self, threshold: float) -> float:
        """True accept rate: the share of genuine pairs with a cosine of at least ``threshold``."""
        return float(self.genuine[_edge(threshold) :].sum() / self.genuine_count)

    def threshold_at(self, far: float) -> float:
        """The lowest threshold on the grid whose FAR is at most ``far``; above 1 when no cosine is high enough."""
        bins = int(np.searchsorted(self._accepted, far * self.impostor_count + 1e-9, side="right"))
        return (BINS - bins) / (BINS / 2) - 1 if bins else 1 + 2 / BINS

    def tar_at(self, far: float) -> float:
        """TAR at the threshold of :meth:`threshold_at`."""
        return self.tar(self.threshold_at(far))

    def roc(self, points: int = 200) -> tuple[FloatArray, FloatArray]:
        """Up to ``points`` points of the ROC, logarithmic from one impostor pair to all: FAR (p,), TAR (p,)."""
        accepted = self._accepted
        true = np.cumsum(self.genuine[::-1])
        wanted = np.geomspace(1, self.impostor_count, points)
        bins = np.unique(np.searchsorted(accepted, wanted + 1e-9, side="right")) - 1
        bins = bins[bins >= 0]
        return accepted[bins] / self.impostor_count, true[bins] / self.genuine_count

    def auc(self) -> float:
        """Area under the ROC: the chance that a genuine pair scores above an impostor pair (ties count half)."""
        below = np.cumsum(self.impostor) - self.impostor / 2
        return float(np.dot(self.genuine, below) / (self.genuine_count * self.impostor_count))

    def eer(self) -> float:
        """Equal error rate: where FAR and 1 − TAR cross; their mean at the nearest threshold of the grid."""
        far = self._accepted / self.impostor_count
        frr = 1 - np.cumsum(self.genuine[::-1]) / self.genuine_count
        at = int(np.argmin(np.abs(far - frr)))
        return float((far[at] + frr[at]) / 2)

    def shares(self, bins: int = 100) -> tuple[FloatArray, FloatArray, FloatArray]:
        """A coarse histogram for plots: bin edges (bins + 1,), shares of genuine (bins,) and impostor pairs (bins,)."""
        cuts = (np.arange(bins) * BINS) // bins
        edges = np.append(cuts, BINS) / (BINS / 2) - 1
        genuine = np.add.reduceat(self.genuine, cuts) / self.genuine_count
        return edges, genuine, np.add.reduceat(self.impostor, cuts) / self.impostor_count


def _edge(threshold: float) -> int:
    return int(np.clip(np.ceil((threshold + 1) * (BINS / 2) - 1e-6), 0, BINS))


def histogram(scores: FloatArray) -> IntArray:
    """Counts of scores (any shape) on the grid: (BINS,) int64."""
    bins = (scores.ravel() * np.float32(BINS / 2) + np.float32(BINS / 2)).astype(np.int32)
    np.clip(bins, 0, BINS - 1, out=bins)
    return np.bincount(bins, minlength=BINS)


class _Keeper:
    """Collects pairs: one in ``stride``, and of these the ``limit`` highest."""

    def __init__(self, limit: int, stride: int) -> None:
        self._limit, self._stride = limit, stride
        self.floor = np.float32(-1.5)
        self._kept: list[tuple[IntArray, IntArray, FloatArray]] = []
        self._count = 0

    def add(self, query: IntArray, gallery: IntArray, score: FloatArray) -> None:
        if self._stride > 1:
            mixed = (query.astype(np.uint64) << np.uint64(32) | gallery.astype(np.uint64)) * np.uint64(GOLDEN)
            drawn = (mixed >> np.uint64(33)) % np.uint64(self._stride) == 0
            query, gallery, score = query[drawn], gallery[drawn], score[drawn]
        self._kept.append((query, gallery, score))
        self._count += len(score)
        if self._count > 2 * self._limit:
            self._trim()

    def _trim(self) -> None:
        query, gallery, score = (np.concatenate(part) for part in zip(*self._kept, strict=True))
        if len(score) > self._limit:
            top = np.argpartition(-score, self._limit)[: self._limit]
            query, gallery, score = query[top], gallery[top], score[top]
            self.floor = score.min()
        self._kept, self._count = [(query, gallery, score)], len(score)

    def sorted(self, order: IntArray) -> PairList:
        """All that was kept, numbered by ``order`` (position → image number)."""
        if not self._kept:
            empty = np.empty(0, np.int64)
            return PairList(empty, empty, np.empty(0, np.float32), self._stride)
        self._trim()
        query, gallery, score = self._kept[0]
        by_score = np.argsort(-score, kind="stable")
        return PairList(order[query[by_score]], order[gallery[by_score]], score[by_score], self._stride)


def pair_counts(sizes: IntArray, same: bool) -> tuple[int, int]:
    """Genuine and impostor pairs of classes of these sizes (C,): unordered for one model (``same``), else ordered."""
    n = int(sizes.sum())
    genuine = int((sizes * (sizes - 1)).sum())
    impostor = n * n - int((sizes * sizes).sum())
    return (genuine // 2, impostor // 2) if same else (genuine, impostor)


def score_pairs(
    queries: FloatArray,
    labels: IntArray,
    gallery: FloatArray | None = None,
    *,
    keep_far: float = 1e-2,
    keep: int = 1 << 20,
) -> PairScores:
    """Compare every image with every other one: all pairs, an image never with itself.

    Args:
        queries: (n, D) float32 unit embeddings of the query model.
        labels: (n,) identities.
        gallery: (n, D) unit embeddings of the same images by the gallery model; None: the query model's own.
            With one model each unordered pair counts once, with two each ordered pair of different images.
        keep_far: the largest FAR of interest: the kept impostor pairs reach about eight times as far down.
        keep: at most about this many pairs of each kind are kept; beyond it they are thinned (:attr:`PairList.stride`).

    Returns:
        Exact histograms and the kept pairs. Memory: these and one block of scores, whatever n.
    """
    index = class_index(labels, "score_pairs")
    order = np.argsort(index, kind="stable")
    y, x = index[order], np.ascontiguousarray(queries[order])
    same = gallery is None
    z = x if gallery is None else np.ascontiguousarray(gallery[order])
    if x.shape != z.shape:
        raise DataError(
            f"score_pairs: query embeddings {x.shape} against gallery embeddings {z.shape}; shapes must be equal"
        )
    sizes = np.bincount(y)
    ends = np.cumsum(sizes)
    genuine_count, impostor_count = pair_counts(sizes, same)
    own = _Keeper(2 * genuine_count, -(-genuine_count // keep))
    wanted = int(8 * keep_far * impostor_count) + 1000
    top = _Keeper(min(wanted, keep), -(-wanted // keep))
    genuine, impostor = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
    n, rows = len(y), max(1, _BLOCK // len(y))
    for a in range(0, n, rows):
        b = min(a + rows, n)
        first = a if same else 0
        block = x[a:b] @ z[first:].T
        # Sorted by identity, genuine pairs lie in a band of columns around the diagonal.
        low, high = (a if same else ends[y[a]] - sizes[y[a]]), ends[y[b - 1]]
        band = block[:, low - first : high - first]
        equal = y[a:b, None] == y[None, low:high]
        i, j = np.arange(a, b)[:, None], np.arange(low, high)[None, :]
        outside = j <= i if same else j == i
        row, column = np.nonzero(equal & ~outside)
        score = band[row, column]
        genuine += histogram(score)
        own.add(row + a, column + low, score)
        band[equal | outside] = _EXCLUDED
        impostor += histogram(block)
        impostor[0] -= np.count_nonzero(equal | outside)
        row, column = np.nonzero(block >= top.floor)
        top.add(row + a, column + first, block[row, column])
    return PairScores(genuine, impostor, own.sorted(order), top.sorted(order))


def scores_of(cosines: FloatArray, genuine: BoolArray) -> PairScores:
    """Histograms of given pairs: cosines (m,), genuine or not (m,). Raises :class:`DataError` if one kind lacks."""
    if genuine.all() or not genuine.any():
        raise DataError(f"pair list: all {len(genuine)} pairs are of one kind; it needs genuine and impostor pairs")
    empty = PairList(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    cosines = np.asarray(cosines, np.float32)
    return PairScores(histogram(cosines[genuine]), histogram(cosines[~genuine]), empty, empty)


def fold_accuracy(cosines: FloatArray, genuine: BoolArray, folds: int = FOLDS) -> tuple[float, float]:
    """Accuracy by the LFW protocol: each of ``folds`` contiguous folds is judged at the best threshold of the others.

    Args:
        cosines: (m,) in the published order of the pairs. genuine: (m,) whether a pair is of one person.

    Returns:
        Mean and standard deviation of the folds' accuracies.
    """
    if len(cosines) < folds:
        raise DataError(f"pair list: {len(cosines)} pairs are too few for {folds} folds")
    accuracies = []
    for fold in np.array_split(np.arange(len(cosines)), folds):
        rest = np.setdiff1d(np.arange(len(cosines)), fold)
        threshold = best_threshold(cosines[rest], genuine[rest])
        accuracies.append(np.mean((cosines[fold] >= threshold) == genuine[fold]))
    return float(np.mean(accuracies)), float(np.std(accuracies))


def best_threshold(cosines: FloatArray, genuine: BoolArray) -> float:
    """The threshold of highest accuracy: halfway between the two scores that it separates; the highest such one."""
    order = np.argsort(-cosines, kind="stable")
    score, own = cosines[order].astype(np.float64), genuine[order]
    right = np.concatenate(
        [[0], np.cumsum(np.where(own, 1, -1))]
    )  # right answers when the first k are accepted, up to a constant
    cuts = np.concatenate([[True], score[1:] < score[:-1], [True]])  # between equal scores no threshold fits
    k = int(np.argmax(np.where(cuts, right, np.iinfo(np.int64).min)))
    padded = np.concatenate([[score[0] + 2e-3], score, [score[-1] - 2e-3]])
    return float((padded[k] + padded[k + 1]) / 2)


def resample_pairs(scores: PairScores, fars: Sequence[float], replicates: int, seed: int) -> FloatArray:
    """TAR at each FAR over Poisson bootstrap replicates of the pairs: (replicates, len(fars)).

    For sets whose identities are not known (pair lists, templates): pairs are taken as independent, which they are
    not quite, so intervals from it are somewhat too narrow.
    """
    generator = np.random.default_rng(seed)
    used = np.flatnonzero(scores.genuine + scores.impostor)[::-1]
    impostor, genuine = scores.impostor[used], scores.genuine[used]
    # Bins far below every threshold of interest are resampled as one.
    reach = int(np.searchsorted(np.cumsum(impostor), 4 * max(fars) * scores.impostor_count + 100)) + 1
    impostor = np.append(impostor[:reach], impostor[reach:].sum())
    genuine = np.append(genuine[:reach], genuine[reach:].sum())
    out = np.empty((replicates, len(fars)))
    for r in range(replicates):
        accepted, true = np.cumsum(generator.poisson(impostor)), np.cumsum(generator.poisson(genuine))
        for f, far in enumerate(fars):
            bins = int(np.searchsorted(accepted, far * accepted[-1] + 1e-9, side="right"))
            out[r, f] = true[bins - 1] / max(1, true[-1]) if bins else 0.0
    return out
