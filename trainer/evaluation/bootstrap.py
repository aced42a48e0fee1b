"""Intervals by resampling identities (not images or pairs, which are not independent within an identity).

A replicate draws C of the C identities with replacement; an identity drawn w times counts w times: a genuine pair of
identity a weighs w_a, an impostor pair of a and b weighs w_a · w_b (never an identity against its own copy).
Thresholds are found anew in each replicate. All figures of a set share the same draws, so that differences between
models are paired.
"""

from dataclasses import dataclass

import numpy as np

from trainer.evaluation.arrays import BoolArray, FloatArray, IntArray
from trainer.evaluation.verification import PairScores

LEVEL = 0.95
"""Of the intervals, unless another one is asked for."""


@dataclass(frozen=True)
class Interval:
    """A figure with its two-sided bootstrap interval."""

    value: float
    low: float
    high: float


def draw_identities(classes: int, replicates: int, seed: int) -> IntArray:
    """How often each identity is drawn: (replicates, classes), each row sums to ``classes``."""
    return (
        np.random.default_rng(seed)
        .multinomial(classes, np.full(classes, 1 / classes), size=replicates)
        .astype(np.int64)
    )


def interval(value: float, replicates: FloatArray, level: float = LEVEL) -> Interval:
    """The figure of the whole set with the percentile interval of its replicates (r,); NaN replicates are left out."""
    good = replicates[np.isfinite(replicates)]
    if len(good) == 0 or not np.isfinite(value):
        return Interval(float(value), float("nan"), float("nan"))
    low, high = np.quantile(good, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))


def resample_tar(scores: PairScores, index: IntArray, draws: IntArray, far: float) -> FloatArray:
    """TAR at ``far`` in each replicate: (replicates,).

    Args:
        scores: the pairs of :func:`trainer.evaluation.verification.score_pairs`.
        index: (n,) class number of each image. draws: (replicates, C) of :func:`draw_identities`.
    """
    top, own = scores.impostor_pairs, scores.genuine_pairs
    first, second = index[top.query], index[top.gallery]
    whose = index[own.query]
    sizes = np.bincount(index)
    both_orders = scores.impostor_count == int(sizes.sum()) ** 2 - int((sizes**2).sum())
    falling = -own.score
    reach = int(2 * far * scores.impostor_count / top.stride) + 100  # nearly always enough, and much less than all
    out = np.empty(len(draws))
    for r, drawn in enumerate(draws):
        weight = drawn * sizes
        allowed = far * (int(weight.sum()) ** 2 - int((weight**2).sum())) / (1 if both_orders else 2) + 1e-9
        accepted = np.cumsum(drawn[first[:reach]] * drawn[second[:reach]]) * top.stride
        if accepted[-1] <= allowed:
            accepted = np.cumsum(drawn[first] * drawn[second]) * top.stride
        k = int(np.searchsorted(accepted, allowed, side="right"))
        # The first impostor too many, at k, must be rejected: accept what scores above it.
        limit = -top.score[k] if k < len(top) else -(top.score[-1] - 1e-6)
        genuine = np.cumsum(drawn[whose])
        kept = int(np.searchsorted(falling, limit, side="left"))
        out[r] = np.nan if genuine[-1] == 0 else (genuine[kept - 1] / genuine[-1] if kept else 0.0)
    return out


def resample_share(hits: BoolArray, counted: BoolArray, index: IntArray, draws: IntArray) -> FloatArray:
    """The share of hits (n,) among the counted images (n,) of classes ``index`` (n,) in each replicate."""
    classes = draws.shape[1]
    right = np.bincount(index[counted & hits], minlength=classes)
    all_of = np.bincount(index[counted], minlength=classes)
    with np.errstate(invalid="ignore"):
        return (draws @ right) / (draws @ all_of)
