"""Every way in which a new model can be deployed, each measured as it would be and judged against today's old → old.

Besides new → old: the gallery converted by T₁₂, the gallery re-encoded, one that is partly re-encoded, expanded
queries, and, with a paragon, maps that are fitted afterwards to a model that knew nothing of the old one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from trainer.errors import ModelError
from trainer.evaluation.arrays import BoolArray, FloatArray, IntArray, class_index
from trainer.evaluation.bootstrap import Interval, interval, resample_share
from trainer.evaluation.compatibility import Cell, Spaces, class_sums, directions, measured
from trainer.evaluation.identification import search
from trainer.evaluation.verdict import Rules
from trainer.evaluation.verification import BINS, PairList, PairScores, histogram

SHARE = 0.5
"""Of a partly re-encoded gallery: the images, drawn at random, that are new."""

FOLDS = 5
"""Parts of the identities for maps fitted afterwards: each part is mapped by a map fitted on the other ones."""


@dataclass(frozen=True)
class Deployment:
    """One kind of deployment: its cell and the thresholds that give the FAR (store → threshold).

    name: query → gallery. meaning: what is deployed, and its cost. judged: whether it has intervals and a verdict; a
    comparison only (maps fitted afterwards) has none.
    """

    name: str
    meaning: str
    cell: Cell
    thresholds: dict[str, float]
    judged: bool = True


def deployments(
    spaces: Spaces,
    cells: Mapping[tuple[str, str], Cell],
    labels: IntArray,
    fars: tuple[float, ...],
    far: float,
    draws: IntArray,
    seed: int,
) -> list[Deployment]:
    """Measure every deployment that these models allow.

    Args:
        spaces: with ``old`` and ``new``. cells: measured already, at least new → old and new → new.
        labels: (n,) identities. fars: false accept rates of interest; far: the one that thresholds are given for.
        draws: (r, C) of :func:`trainer.evaluation.bootstrap.draw_identities`. seed: of the random share and the folds.
    """

    def measure(name: str, meaning: str, pair: tuple[FloatArray, FloatArray | None], judged: bool = True) -> Deployment:
        cell = measured("new", "old", name, *pair, labels, fars, draws if judged else draws[:0])
        return Deployment(name, meaning, cell, {"all": cell.scores.threshold_at(far)}, judged)

    view = spaces.view("new", "old")
    if view is None or view[1] is None:
        raise ModelError("old and new cannot be compared")  # measure_cells has refused them already
    left, right, how = view[0], view[1], view[2]
    old, new = cells["new", "old"], cells["new", "new"]
    found = [
        Deployment(spaces.title("new", "old"), _MEANINGS.get(how, how), old, {"all": old.scores.threshold_at(far)})
    ]
    if how == "t21" and ("old", "new") in spaces.mapped:
        found.append(measure("new → T₁₂(old)", _MEANINGS["t12"], (spaces.native["new"], spaces.mapped["old", "new"])))
    found.append(
        Deployment(
            "new → new", "the whole gallery re-encoded from its images", new, {"all": new.scores.threshold_at(far)}
        )
    )
    found += _mixed((left, right), spaces.native["new"], (old, new), far, seed, measure)
    found.append(
        measure(
            f"{spaces.title('new', 'old')}, expanded",
            "each query is the mean of itself and its two nearest gallery vectors: one more search a query",
            (expanded(left, right), right),
        )
    )
    if "paragon" in spaces.native:
        found += _post_hoc(spaces, labels, seed, measure)
    return found


_MEANINGS = {
    "direct": "queries as they are, the gallery as it is",
    "t21": "queries carried through T₂₁, the gallery as it is",
    "t12": "queries as they are, the gallery converted by T₁₂ (`lce gallery upgrade`)",
}

_Measure = Callable[..., Deployment]


def _mixed(
    old: tuple[FloatArray, FloatArray],
    new: FloatArray,
    cells: tuple[Cell, Cell],
    far: float,
    seed: int,
    measure: _Measure,
) -> list[Deployment]:
    """A gallery of which :data:`SHARE` is re-encoded, with one threshold for both stores and with one for each.

    Both spaces stand side by side in one vector, of which a gallery vector fills one half: the product is the score
    within its own store. A further entry takes off the scores what the store's threshold is above the lower one.
    """
    queries, gallery = old
    n = len(queries)
    renewed = np.zeros(n, bool)
    renewed[np.random.default_rng(seed).permutation(n)[: round(SHARE * n)]] = True
    stores = np.where(
        renewed[:, None], np.hstack([np.zeros_like(gallery), new]), np.hstack([gallery, np.zeros_like(new)])
    )
    asked = np.hstack([queries, new])
    share = f"{SHARE:.0%} of the gallery re-encoded"
    one = measure("new → mixed, one threshold", f"{share}; scores of both stores compared as they are", (asked, stores))
    thresholds = [cell.scores.threshold_at(far) for cell in cells]
    above = np.array(thresholds, np.float32) - np.float32(min(thresholds))
    asked = np.hstack([asked, np.ones((n, 1), np.float32)])
    stores = np.hstack([stores, -above[renewed.astype(int)][:, None]])
    two = measure(
        "new → mixed, two thresholds", f"{share}; scores compared by their excess over the store's", (asked, stores)
    )
    each = {store: two.thresholds["all"] + float(up) for store, up in zip(("old", "re-encoded"), above, strict=True)}
    return [one, Deployment(two.name, two.meaning, two.cell, each)]


def expanded(queries: FloatArray, gallery: FloatArray, neighbours: int = 2) -> FloatArray:
    """The directions (n, D) of the means of each query (n, D) and its nearest vectors of the gallery (n, D), of which
    the image's own is left out."""
    found = search(queries, gallery, neighbours + 1)[1]
    others = found != np.arange(len(queries))[:, None]
    order = np.argsort(~others, axis=1, kind="stable")[:, :neighbours]
    near = np.take_along_axis(found, order, 1)
    return directions(queries + gallery[near].sum(1))


def _post_hoc(spaces: Spaces, labels: IntArray, seed: int, measure: _Measure) -> list[Deployment]:
    """Maps fitted afterwards from the paragon's embeddings to the old ones, on identities that they are not used on."""
    free, old = spaces.native["paragon"], spaces.native["old"]
    index = class_index(labels, "maps fitted afterwards")
    part = np.random.default_rng(seed).permutation(int(index.max()) + 1)[index] % FOLDS
    rotated, affine = (_cross_fitted(free, old, part, fit) for fit in (rotation, affine_map))
    fitted = "fitted afterwards to a model trained without compatibility, on other identities of this set"
    return [
        measure("rotation(paragon) → old", f"a rotation {fitted}", (rotated, old), judged=False),
        measure("affine(paragon) → old", f"an affine map {fitted}", (affine, old), judged=False),
        measure(
            "old + affine(paragon) → old",
            "both queries fused half-way on the sphere (SLERP): two models at query time",
            (directions(old + affine), old),
            judged=False,
        ),
    ]


_Fit = Callable[[FloatArray, FloatArray], Callable[[FloatArray], FloatArray]]


def _cross_fitted(given: FloatArray, wanted: FloatArray, part: IntArray, fit: _Fit) -> FloatArray:
    """Each image (n, D₂) through a map fitted on the pairs of the other parts: (n, D₁) unit."""
    out = np.empty_like(wanted)
    for one in np.unique(part):
        apart = part != one
        out[~apart] = directions(fit(given[apart], wanted[apart])(given[~apart]).astype(np.float64))
    return out


def rotation(given: FloatArray, wanted: FloatArray) -> Callable[[FloatArray], FloatArray]:
    """The orthogonal map of least squares (Schönemann 1966); semi-orthogonal between different dimensions."""
    u, _, v = np.linalg.svd(given.T @ wanted, full_matrices=False)
    turn = u @ v
    return lambda x: x @ turn


def affine_map(given: FloatArray, wanted: FloatArray) -> Callable[[FloatArray], FloatArray]:
    """The affine map of least squares; of least norm where the pairs are too few."""
    ones = np.ones((len(given), 1), given.dtype)
    weights = np.linalg.lstsq(np.hstack([given, ones]), wanted, rcond=None)[0]
    return lambda x: x @ weights[:-1] + weights[-1]


@dataclass(frozen=True)
class Pooled:
    """Queries against one vector an identity. tar, threshold, resolved (whether the pairs suffice): by FAR (p,)."""

    name: str
    fars: tuple[float, ...]
    tar: list[float]
    threshold: list[float]
    resolved: list[bool]
    impostor_pairs: int
    rank1: Interval
    protocol: str = field(
        default="template protocol: one vector an identity, the mean direction of all its images but the query's"
    )


def pooled_gallery(
    name: str,
    queries: FloatArray,
    gallery: FloatArray,
    labels: IntArray,
    fars: tuple[float, ...],
    draws: IntArray,
    rules: Rules,
) -> Pooled:
    """Search a gallery that is pooled by identity, which needs neither images nor a model.

    Args:
        queries, gallery: (n, D) unit, of the same images. labels: (n,). draws: for the interval of rank-1.
        rules: say which FARs the pairs resolve.

    An image is compared with the mean direction of the *other* images of its identity, where it has any, and with the
    whole mean of every other identity.
    """
    index = class_index(labels, name)
    sums, sizes = class_sums(gallery, index), np.bincount(index)
    centres = directions(sums)
    counted: BoolArray = sizes[index] > 1
    own = np.full(len(queries), -2.0)
    best = np.empty(len(queries))
    impostor = np.zeros(BINS, np.int64)
    rows = max(1, (1 << 22) // max(len(centres), gallery.shape[1]))
    for a in range(0, len(queries), rows):
        part = np.arange(a, min(a + rows, len(queries)))
        here = part[counted[part]]
        if len(here):
            others = directions(sums[index[here]] - gallery[here])
            own[here] = np.einsum("nd,nd->n", others, queries[here])
        block = queries[part] @ centres.T
        apart = index[part, None] != np.arange(len(centres))[None]
        impostor += histogram(block[apart])
        best[part] = np.where(apart, block, -2).max(1)
    none = PairList(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    scores = PairScores(histogram(own[counted].astype(np.float32)), impostor, none, none)
    hits = counted & (own > best)
    rank1 = interval(float(hits[counted].mean()), resample_share(hits, counted, index, draws))
    thresholds = [scores.threshold_at(far) for far in fars]
    pairs = int(impostor.sum())
    resolved = [rules.resolves(far, pairs) for far in fars]
    return Pooled(name, fars, [scores.tar(t) for t in thresholds], thresholds, resolved, pairs, rank1)
