"""Compatibility of a new model with a deployed one, on unit embeddings of one set of images under both.

A *cell* of the compatibility matrix is a query model against a gallery model. The pairwise criterion (BCT, Shen et al.,
CVPR 2020) asks M(new, old) > M(old, old) of a retrieval metric M; the point-to-set criterion (LCE, Meng et al., ICCV
2021) asks that a new embedding lies within its own old class and nearer to it than to any other.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainer.errors import ModelError
from trainer.evaluation.arrays import BoolArray, FloatArray, IntArray, class_index
from trainer.evaluation.bootstrap import LEVEL, Interval, interval, resample_share, resample_tar
from trainer.evaluation.identification import Ranking, leave_one_out
from trainer.evaluation.verification import PairScores, score_pairs

CELLS = (("old", "old"), ("new", "old"), ("new", "new"), ("old", "new"), ("paragon", "paragon"), ("paragon", "old"))
"""The (query, gallery) models that are compared; the paragon was trained without compatibility."""


def cell_pairs(models: Iterable[str]) -> list[tuple[str, str]]:
    """The (query, gallery) pairs to compare of these models: :data:`CELLS`, and every pair of a longer chain."""
    given = list(models)
    chain = [model for model in given if model != "paragon"]
    known = [pair for pair in CELLS if set(pair) <= set(given)]
    return known + [(query, gallery) for query in chain for gallery in chain if (query, gallery) not in CELLS]


MAPS = {"t21": "T₂₁", "t12": "T₁₂"}
"""How a map that carries one end of a cell is written."""


@dataclass(frozen=True)
class Spaces:
    """The same n images under every model.

    native: model → (n, D) unit embeddings. mapped: (model, space) → unit embeddings of ``model`` carried into the
    space of another by trained transformations (see :mod:`trainer.evaluation.chain`): ("new", "old") by T₂₁, ("old",
    "new") by T₁₂. norms: model → (n,) the embeddings' norms before they were made unit, where these were asked for.
    distance: (n,) how far the new model expects T₁₂ of the old embeddings to be from its own, where it predicts that.
    """

    native: dict[str, FloatArray]
    mapped: dict[tuple[str, str], FloatArray] = field(default_factory=dict)
    norms: dict[str, FloatArray] = field(default_factory=dict)
    distance: FloatArray | None = None

    def title(self, query: str, gallery: str) -> str:
        """``query → gallery`` with the map at the end that is carried: ``T₂₁(new) → old``, ``new → T₁₂(old)``."""
        view = self.view(query, gallery)
        how = "" if view is None else view[2]
        mapped = {"t21": max, "t12": min}.get(how)
        if mapped is None:
            return f"{query} → {gallery}" + (f" ({how})" if how.startswith("in ") else "")
        end = mapped(query, gallery, key=list(self.native).index)
        shown = {model: model for model in (query, gallery)} | {end: f"{MAPS[how]}({end})"}
        return f"{shown[query]} → {shown[gallery]}"

    def view(self, query: str, gallery: str) -> tuple[FloatArray, FloatArray | None, str] | None:
        """What is compared when ``query`` searches ``gallery``: query and gallery embeddings and how they meet.

        The gallery is None when it is the query's own. ``t21`` carries the newer of the two into the older one's
        space, ``t12`` the older into the newer one's, be it query or gallery; ``in NAME`` both into a
        third one's, ``direct`` nothing. None when a model is missing or the spaces cannot be compared.
        """
        if query not in self.native or gallery not in self.native:
            return None
        if query == gallery:
            return self.native[query], None, "own"
        for space in dict.fromkeys([gallery, query, *self.native]):
            left, right = (self.native[m] if m == space else self.mapped.get((m, space)) for m in (query, gallery))
            if left is not None and right is not None:
                moved = left is not self.native[query] or right is not self.native[gallery]
                older, newer = sorted((query, gallery), key=list(self.native).index)
                how = {older: "t21", newer: "t12"}.get(space, f"in {space}")
                return left, right, how if moved else "direct"
        if self.native[query].shape[1] == self.native[gallery].shape[1]:
            return self.native[query], self.native[gallery], "direct"
        return None


@dataclass(frozen=True)
class Cell:
    """One query model against one gallery model: scores, ranks, and the figures over the bootstrap's replicates.

    value: name of the metric → figure on the whole set; names are :func:`tar_name` and ``rank-1``.
    replicates: the same names → (r,).
    """

    query: str
    gallery: str
    how: str
    scores: PairScores
    ranking: Ranking
    value: dict[str, float]
    replicates: dict[str, FloatArray]

    def figure(self, metric: str, level: float = LEVEL) -> Interval:
        """A metric with its interval of this level."""
        return interval(self.value[metric], self.replicates[metric], level)


def tar_name(far: float) -> str:
    """The metric's name in results: ``TAR@FAR=1e-4``."""
    return f"TAR@FAR={rate_text(far)}"


def rate_text(rate: float) -> str:
    """A rate as people write it: ``1e-4``, ``2.5e-3``, ``0.5``."""
    if rate >= 0.1 or rate <= 0:
        return f"{rate:g}"
    digits, exponent = f"{rate:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def compare(
    spaces: Spaces, query: str, gallery: str, labels: IntArray, fars: Sequence[float], draws: IntArray
) -> Cell | None:
    """Measure one cell; None when the two cannot be compared.

    Args:
        spaces: the images under every model. labels: (n,) identities.
        fars: false accept rates of interest. draws: (r, C) of :func:`trainer.evaluation.bootstrap.draw_identities`.
    """
    view = spaces.view(query, gallery)
    if view is None:
        return None
    left, right, how = view
    return measured(query, gallery, how, left, right, labels, fars, draws)


def measured(
    query: str,
    gallery: str,
    how: str,
    left: FloatArray,
    right: FloatArray | None,
    labels: IntArray,
    fars: Sequence[float],
    draws: IntArray,
) -> Cell:
    """The cell of queries ``left`` (n, D) against a gallery ``right`` (n, D) of the same images; None: their own."""
    index = class_index(labels, f"{query}→{gallery}")
    scores = score_pairs(left, labels, right, keep_far=max(fars))
    ranking = leave_one_out(left, labels, right)
    value = {tar_name(far): scores.tar_at(far) for far in fars} | {"rank-1": ranking.rate()}
    replicates = {tar_name(far): resample_tar(scores, index, draws, far) for far in fars}
    replicates["rank-1"] = resample_share(ranking.hits(), ranking.counted, index, draws)
    return Cell(query, gallery, how, scores, ranking, value, replicates)


@dataclass(frozen=True)
class Gain:
    """What compatibility gives and takes, in one metric; new* is the paragon.

    update_gain: [M(new,old) − M(old,old)] / [M(new*,new*) − M(old,old)]. cost: M(new*,new*) − M(new,new). headroom: the
    gain's denominator; where its interval reaches 0 the ratio says nothing.
    """

    update_gain: Interval
    cost: Interval
    headroom: Interval


def gain(cells: dict[tuple[str, str], Cell], metric: str) -> Gain | None:
    """Update gain and cost; None without a paragon. The gain is NaN where the paragon does not beat the old model."""
    needed = [("old", "old"), ("new", "old"), ("new", "new"), ("paragon", "paragon")]
    if any(key not in cells for key in needed):
        return None
    parts = [(cells[key].value[metric], cells[key].replicates[metric]) for key in needed]
    (old, olds), (cross, crosses), (new, news), (best, bests) = parts
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(bests > olds, (crosses - olds) / (bests - olds), np.nan)
    ratio = (cross - old) / (best - old) if best > old else float("nan")
    return Gain(interval(ratio, ratios), interval(best - new, bests - news), interval(best - old, bests - olds))


def no_gain(value: Mapping[str, Any]) -> str:
    """Why a gain (a :class:`Gain` as plain values, None for NaN) is no share of a way; empty where it is one."""
    gain, room = value["update_gain"], value["headroom"]
    if gain["value"] is None:
        return "the paragon is no better than the old model, so that there is no way to go"
    if gain["value"] < 0:
        return "new → old is below old → old, so that users would lose"
    if gain["low"] is None or gain["high"] - gain["low"] > 2 or room["low"] <= 0:
        return "the paragon is not clearly better than the old model on these identities"
    return ""


@dataclass(frozen=True)
class PointToSet:
    """LCE's criterion over samples: the shares within the own old class's boundary, nearest to its centre, and both.

    The old embeddings' own shares stand next to them (within is 1 by construction).
    """

    within: float
    nearest: float
    both: float
    old_nearest: float


def point_to_set(new_in_old: FloatArray, old: FloatArray, labels: IntArray) -> PointToSet:
    """LCE's point-to-set criterion of new embeddings carried into the old space.

    Args:
        new_in_old: (n, D1) unit, φ₂(x) or T₂₁(φ₂(x)). old: (n, D1) unit, φ₁(x). labels: (n,).

    The centre o_j is the normalised mean of the class's old embeddings, the boundary b_j the smallest cosine of these
    to it.
    """
    index = class_index(labels, "point-to-set criterion")
    centres = class_centres(old, index)
    boundary = np.full(len(centres), np.inf)
    np.minimum.at(boundary, index, np.einsum("nd,nd->n", old, centres[index]))
    own = np.einsum("nd,nd->n", new_in_old, centres[index])
    within = own >= boundary[index] - 1e-6
    nearest = _nearest_centre(new_in_old, centres) == index
    old_nearest = _nearest_centre(old, centres) == index
    shares = (within, nearest, within & nearest, old_nearest)
    return PointToSet(*(float(share.mean()) for share in shares))


def centre_queries(gallery: FloatArray, labels: IntArray, fars: Sequence[float]) -> dict[str, float]:
    """What queries find that stand at the centre of their identity's gallery embeddings: metric → figure, as the
    ``value`` of a :class:`Cell`.

    In the old gallery it is what a new model reaches whose embeddings are where LCE pulls them (Meng et al., ICCV 2021:
    alignment to the old class centre), so it is a mark on the way to the paragon. It is no ceiling: a query that also
    knows how an image differs from its centre can find more.

    Args:
        gallery: (n, D) unit. labels: (n,). fars: false accept rates of interest.

    A gallery image is compared with the normalised mean of the *other* images of its identity, so that it does not find
    itself, and with the whole mean of every other identity. Pairs and ranks count as with one query an image.
    """
    index = class_index(labels, "queries at the centres")
    sums, sizes = class_sums(gallery, index), np.bincount(index)
    centres = directions(sums)
    own = np.empty(len(gallery))
    for a in range(0, len(gallery), 1 << 16):
        part = slice(a, a + (1 << 16))
        others = sums[index[part]] - gallery[part]
        norms = np.linalg.norm(others, axis=1)
        own[part] = np.einsum("nd,nd->n", others, gallery[part]) / np.where(norms > 0, norms, 1)
    pairs = sizes[index] - 1  # queries for each gallery image
    impostors = score_pairs(centres[index], labels, gallery, keep_far=max(fars))
    thresholds = {tar_name(far): impostors.threshold_at(far) for far in fars}
    found = {name: float(pairs[own >= t].sum() / pairs.sum()) for name, t in thresholds.items()}
    # The best image of the own identity but the query's: its best one, for that one itself the second.
    order = np.lexsort((-own, index))
    first = order[np.cumsum(sizes) - sizes]
    second = order[np.minimum(np.cumsum(sizes) - sizes + 1, len(order) - 1)]
    best = own[first][index]
    best[first] = own[second]
    other = _best_impostor(centres, gallery, index)[index]
    counted = pairs > 0
    return found | {"rank-1": float((best > other)[counted].mean())}


def _best_impostor(centres: FloatArray, gallery: FloatArray, index: IntArray) -> FloatArray:
    """The highest cosine of each centre (C, D) with an image (n, D) of another class: (C,)."""
    rows = max(1, (1 << 22) // len(gallery))
    out = np.empty(len(centres))
    for a in range(0, len(centres), rows):
        block = centres[a : a + rows] @ gallery.T
        block[index[None] == np.arange(a, a + len(block))[:, None]] = -2
        out[a : a + rows] = block.max(1)
    return out


def class_sums(embeddings: FloatArray, index: IntArray) -> FloatArray:
    """The sum (C, D) float64 of each class's embeddings (n, D); index: (n,) class numbers 0 … C−1."""
    order = np.argsort(index, kind="stable")
    starts = np.searchsorted(index[order], np.arange(index.max() + 1))
    return np.add.reduceat(embeddings[order].astype(np.float64), starts, axis=0)


def class_centres(embeddings: FloatArray, index: IntArray) -> FloatArray:
    """The normalised mean (C, D) float32 of each class's unit embeddings (n, D); index: (n,) class numbers 0 … C−1."""
    return directions(class_sums(embeddings, index))


def directions(sums: FloatArray) -> FloatArray:
    """Sums (C, D) of embeddings → unit rows, float32. Raises :class:`ModelError`: one is zero."""
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    if not norms.all():
        raise ModelError("embeddings of a class cancel out: their mean is zero and has no direction")
    return np.asarray(sums / norms, np.float32)


def _nearest_centre(embeddings: FloatArray, centres: FloatArray) -> IntArray:
    rows = max(1, (1 << 22) // len(centres))
    parts = [np.argmax(embeddings[a : a + rows] @ centres.T, axis=1) for a in range(0, len(embeddings), rows)]
    return np.concatenate(parts)


@dataclass(frozen=True)
class OperatingPoint:
    """What becomes of the deployed threshold when new queries meet the old gallery.

    The threshold gives ``far`` on old → old. Kept for new → old it gives ``far_kept`` and ``tar_kept``; ``restored``
    is the threshold that brings FAR back to ``far``, with ``tar_restored``.
    """

    far: float
    threshold: float
    tar: float
    far_kept: float
    tar_kept: float
    restored: float
    tar_restored: float


def operating_point(deployed: PairScores, upgraded: PairScores, far: float) -> OperatingPoint:
    """The deployed operating point before (``deployed``: old → old) and after the upgrade (new → old, or new → new)."""
    threshold, restored = deployed.threshold_at(far), upgraded.threshold_at(far)
    return OperatingPoint(
        far,
        threshold,
        deployed.tar(threshold),
        upgraded.far(threshold),
        upgraded.tar(threshold),
        restored,
        upgraded.tar(restored),
    )


@dataclass(frozen=True)
class Flips:
    """Rank-1 answers that changed: negative (right before, wrong now) and positive (wrong before, right now).

    negative, positive: (k,) image numbers. share_negative, share_positive: of the counted images.
    worse: how many identities lost more answers than they gained; worst: the first of them, by the difference:
    (label, lost, gained, images counted).
    """

    negative: IntArray
    positive: IntArray
    share_negative: float
    share_positive: float
    worse: int
    worst: list[tuple[int, int, int, int]]


def flips(before: Ranking, after: Ranking, labels: IntArray, keep: int = 20) -> Flips:
    """Which rank-1 answers an upgrade turns; ``keep`` identities are listed. labels: (n,)."""
    lost: BoolArray = before.hits() & ~after.hits()
    won: BoolArray = ~before.hits() & after.hits() & before.counted
    counted = int(before.counted.sum())
    names, index = np.unique(labels, return_inverse=True)
    table = [np.bincount(index[mask], minlength=len(names)) for mask in (lost, won, before.counted)]
    order = np.argsort(table[1] - table[0], kind="stable")
    worst = [
        (int(names[c]), int(table[0][c]), int(table[1][c]), int(table[2][c]))
        for c in order
        if table[0][c] > table[1][c]
    ]
    shares = float(lost.sum() / counted), float(won.sum() / counted)
    return Flips(np.flatnonzero(lost), np.flatnonzero(won), *shares, len(worst), worst[:keep])


@dataclass(frozen=True)
class Example:
    """A pair worth looking at: image numbers of query and gallery, the cosine, and what it shows."""

    query: int
    gallery: int
    cosine: float
    kind: str


def examples(scores: PairScores, threshold: float, each: int = 5) -> list[Example]:
    """Right and wrong pairs at a threshold: hardest right ones first for ``accepted``, worst first for the wrong ones.

    Kinds: ``accepted`` (genuine, above), ``missed`` (genuine, below), ``false`` (impostor, above), ``near``
    (impostors just below). Each image occurs once a kind.
    """
    own, other = scores.genuine_pairs, scores.impostor_pairs
    above, over = int((own.score >= threshold).sum()), int((other.score >= threshold).sum())
    ranges = {
        "accepted": (own, range(above - 1, -1, -1)),
        "missed": (own, range(len(own) - 1, above - 1, -1)),
        "false": (other, range(over)),
        "near": (other, range(over, len(other))),
    }
    out = []
    for kind, (pairs, places) in ranges.items():
        seen: set[int] = set()
        chosen = 0
        for at in places:
            query, gallery = int(pairs.query[at]), int(pairs.gallery[at])
            if query in seen or gallery in seen:
                continue
            seen |= {query, gallery}
            out.append(Example(query, gallery, float(pairs.score[at]), kind))
            chosen += 1
            if chosen == each:
                break
    return out
