"""Everything that is measured of the sets, as plain values that JSON can hold; the report is made from the same."""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainer.errors import DataError, ModelError
from trainer.evaluation.arrays import IntArray, check_unit, class_index
from trainer.evaluation.backfill import ORDERS, backfill_curve, backfill_order, distance_order
from trainer.evaluation.bootstrap import draw_identities
from trainer.evaluation.compatibility import (
    Cell,
    OperatingPoint,
    PointToSet,
    Spaces,
    cell_pairs,
    centre_queries,
    compare,
    examples,
    flips,
    gain,
    no_gain,
    operating_point,
    point_to_set,
    tar_name,
)
from trainer.evaluation.deployments import Deployment, deployments, pooled_gallery
from trainer.evaluation.next_steps import next_steps
from trainer.evaluation.overlap import Known, unknown_words
from trainer.evaluation.verdict import Rules, SetVerdict, decide, judge_set, resolved_far

Result = dict[str, Any]
Cells = dict[tuple[str, str], Cell]


@dataclass(frozen=True)
class Options:
    """fars: the false accept rates of interest. replicates, seed: of the bootstrap. backfill_images: larger sets are
    reduced to about so many images (whole identities) for the backfill curves; 0 leaves them out. pooled: measure
    galleries of one vector an identity as well."""

    fars: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    replicates: int = 500
    seed: int = 0
    backfill_images: int = 5000
    pooled: bool = False
    rules: Rules = field(default_factory=Rules)

    def __post_init__(self) -> None:
        if not self.fars or not all(0 < far < 1 for far in self.fars):
            raise DataError(f"FARs {self.fars}: expected at least one, each between 0 and 1, for example 1e-4,1e-3")


@dataclass(frozen=True)
class NamedSet:
    """A labelled set under every model.

    labels: (n,) identities. records: (n,) the data set's own numbers of the images. class_names: by label, where known.
    known: which of the identities the models were trained on.
    """

    name: str
    spaces: Spaces
    labels: IntArray
    records: IntArray
    class_names: Sequence[str] | None = None
    known: Known | None = None

    @property
    def deployed(self) -> list[str]:
        """The models whose galleries the new one must serve: the old one, then those between."""
        return [model for model in self.spaces.native if model not in ("new", "paragon")]

    def identity(self, label: int) -> str:
        """An identity's name, or its label where it has none."""
        return str(label) if self.class_names is None else self.class_names[label]


def measure_sets(
    sets: Sequence[NamedSet], options: Options, notify: Callable[[str], None] = lambda stage: None
) -> Result:
    """Measure every set and give the verdict.

    Args:
        sets: each with at least the models ``old`` and ``new``, and in this order those that were deployed between
            them; the new one must be comparable with each of these, and is judged on the galleries of all of them.
        notify: told what comes next, once a stage (see :func:`stages`).

    Returns:
        ``{"verdict": …, "options": …, "sets": {name: …}}`` of plain values; NaN is None.

    Raises:
        ModelError: embeddings that are not finite unit vectors, or old and new cannot be compared.
        DataError: a set without genuine or impostor pairs.
    """
    judged: list[SetVerdict] = []
    points: dict[str, OperatingPoint] = {}
    shares: dict[str, PointToSet] = {}
    results: dict[str, Result] = {}
    for one in sets:
        cells = measure_cells(one, options, notify)
        notify(f"{one.name}: criteria")
        judged += [judge_pair(one, cells, "new", gallery, options) for gallery in one.deployed]
        far = resolved_far(options.fars, cells["old", "old"].scores.impostor_count, options.rules) or max(options.fars)
        points[one.name] = operating_point(cells["old", "old"].scores, cells["new", "old"].scores, far)
        share = _point_to_set(one)
        if share is not None:
            shares[one.name] = share
        results[one.name] = _describe(one, cells, far, points[one.name], share, options)
        notify(f"{one.name}: ways of deploying")
        results[one.name]["deployments"] = _deployments(one, cells, far, options)
        results[one.name]["pooled"] = _pooled(one, options) if options.pooled else []
        notify(f"{one.name}: backfill")
        results[one.name]["backfill"] = backfill(one, far, options)
    trained_on = {one.name: one.known for one in sets if one.known is not None}
    verdict = decide(judged, points, shares, options.rules.level, unknown_words(trained_on))
    result: Result = plain({"verdict": verdict, "options": options, "sets": results, "trained_on": trained_on})
    result["verdict"]["next"] = next_steps(result["verdict"], result["sets"], result["options"]["rules"])
    return result


def stages(sets: int, models: Collection[str]) -> int:
    """How often :func:`measure_sets` notifies, at most."""
    return sets * (3 + len(cell_pairs(models)))


def judge_pair(one: NamedSet, cells: Cells, query: str, gallery: str, options: Options) -> SetVerdict:
    """``query``'s model on the gallery of ``gallery``'s against that one itself."""
    size = (len(np.unique(one.labels)), len(one.labels))
    name = one.name if gallery == "old" else f"{one.name}, gallery of {gallery}"
    pair = cells[gallery, gallery], cells[query, gallery]
    seen = "" if one.known is None else one.known.sentence
    return judge_set(name, *pair, size, options.fars, options.rules, gallery, seen)


def chain(one: NamedSet, cells: Cells, options: Options) -> list[Result]:
    """The criterion of every later model on every earlier one's gallery; empty for two models."""
    if len(one.deployed) < 2:
        return []
    models = [*one.deployed, "new"]
    return [
        {"query": query, "gallery": gallery, "findings": judge_pair(one, cells, query, gallery, options).findings}
        for at, query in enumerate(models)
        for gallery in models[:at]
        if (query, gallery) in cells
    ]


def chain_summary(one: NamedSet, cells: Cells, metrics: Sequence[str]) -> Result | None:
    """A chain in three figures; None for two models.

    average_compatibility: by metric, the share of (later query, earlier gallery) pairs above the gallery's own model
    (their point figures). average: by metric, the mean over those pairs and every model on its own gallery. drift: by
    later model, 1 less the mean cosine of an image's embedding, carried into the first gallery's space, to the one that
    is stored there.
    """
    if len(one.deployed) < 2:
        return None
    models = [*one.deployed, "new"]
    pairs = [
        (query, gallery) for at, query in enumerate(models) for gallery in models[:at] if (query, gallery) in cells
    ]
    own = [(model, model) for model in models]
    drift = {}
    for model in models[1:]:
        view = one.spaces.view(model, models[0])
        if view is not None and view[1] is not None:
            drift[model] = 1 - float(np.einsum("nd,nd->n", view[0], view[1]).mean())
    return {
        "pairs": len(pairs),
        "average_compatibility": {
            m: float(np.mean([cells[pair].value[m] > cells[pair[1], pair[1]].value[m] for pair in pairs]))
            for m in metrics
        },
        "average": {m: float(np.mean([cells[pair].value[m] for pair in [*pairs, *own]])) for m in metrics},
        "drift": drift,
    }


def _draws(one: NamedSet, options: Options) -> IntArray:
    return draw_identities(len(np.unique(one.labels)), options.replicates, options.seed)


def _deployments(one: NamedSet, cells: Cells, far: float, options: Options) -> list[Result]:
    found = deployments(one.spaces, cells, one.labels, options.fars, far, _draws(one, options), options.seed)
    today = cells["old", "old"]
    rows = [Deployment("old → old", "today", today, {"all": today.scores.threshold_at(far)}, judged=False), *found]
    return [plain(_deployment(one, row, today, far, options)) for row in rows]


def _deployment(one: NamedSet, row: Deployment, today: Cell, far: float, options: Options) -> Result:
    size = (len(np.unique(one.labels)), len(one.labels))
    judged = judge_set(one.name, today, row.cell, size, options.fars, options.rules) if row.judged else None
    return {
        "way": row.name,
        "meaning": row.meaning,
        "thresholds": row.thresholds,
        "far": far,
        "tar": row.cell.figure(tar_name(far)),
        "rank-1": row.cell.figure("rank-1"),
        "answer": judged.answer if judged else None,
        "reason": judged.reason if judged else "",
        "findings": judged.findings if judged else [],
    }


def _pooled(one: NamedSet, options: Options) -> list[Result]:
    """Galleries of one vector an identity: (query, gallery) of old and new, and the converted gallery."""
    pairs = []
    for query, gallery in (("old", "old"), ("new", "old"), ("new", "new")):
        view = one.spaces.view(query, gallery)
        if view is not None:
            pairs.append((one.spaces.title(query, gallery), view[0], view[0] if view[1] is None else view[1]))
    across, converted = one.spaces.view("new", "old"), one.spaces.mapped.get(("old", "new"))
    if across is not None and across[2] == "t21" and converted is not None:
        pairs.insert(2, ("new → T₁₂(old)", one.spaces.native["new"], converted))
    draws = _draws(one, options)
    return [plain(pooled_gallery(*pair, one.labels, options.fars, draws, options.rules)) for pair in pairs]


def measure_cells(one: NamedSet, options: Options, notify: Callable[[str], None]) -> Cells:
    """The compatibility matrix of a set: every comparable pair of its models."""
    for model, embeddings in one.spaces.native.items():
        check_unit(embeddings, f"{one.name}, {model} model")
    class_index(one.labels, one.name)
    draws = _draws(one, options)
    cells = {}
    for query, gallery in cell_pairs(one.spaces.native):
        if one.spaces.view(query, gallery) is None:
            continue
        notify(f"{one.name}: {query}→{gallery}")
        cell = compare(one.spaces, query, gallery, one.labels, options.fars, draws)
        if cell is not None:
            cells[query, gallery] = cell
    missing = next((gallery for gallery in one.deployed if ("new", gallery) not in cells), None)
    if missing is not None:
        dims = {model: embeddings.shape[1] for model, embeddings in one.spaces.native.items()}
        raise ModelError(
            f"{one.name}: the new model's embeddings cannot be compared with the {missing} gallery: dimensions {dims} "
            "and no transformation between them; train with compat.mode backward, forward or both"
        )
    return cells


def _point_to_set(one: NamedSet) -> PointToSet | None:
    view = one.spaces.view("new", "old")
    if view is None or view[1] is None or view[2] not in ("direct", "t21"):
        return None  # no new embedding ever enters the old space
    return point_to_set(view[0], view[1], one.labels)


def _describe(
    one: NamedSet,
    cells: Cells,
    far: float,
    point: OperatingPoint,
    share: PointToSet | None,
    options: Options,
) -> Result:
    old, new = cells["old", "old"], cells["new", "old"]
    metrics = [*(tar_name(f) for f in options.fars), "rank-1"]
    turned = flips(old.ranking, new.ranking, one.labels)
    shown = examples(new.scores, new.scores.threshold_at(far))
    return {
        "images": len(one.labels),
        "identities": len(np.unique(one.labels)),
        "far": far,
        "cells": {
            f"{q}->{g}": {"title": one.spaces.title(q, g), **_cell(cell, options)} for (q, g), cell in cells.items()
        },
        "gain": {metric: _gain(cells, metric) for metric in metrics},
        "chain": chain(one, cells, options),
        "chain_summary": chain_summary(one, cells, [tar_name(far), "rank-1"]),
        "point_to_set": share,
        "centre->old": None if share is None else centre_queries(one.spaces.native["old"], one.labels, options.fars),
        "operating_point": {
            "new->old": point,
            "new->new": operating_point(old.scores, cells["new", "new"].scores, far),
        },
        "flips": {
            "share_negative": turned.share_negative,
            "share_positive": turned.share_positive,
            "negative": [_flip(one, old, new, i) for i in turned.negative[:24]],
            "negative_count": len(turned.negative),
            "positive_count": len(turned.positive),
            "worse_identities_count": turned.worse,
            "worst_identities": [
                {"identity": one.identity(label), "lost": lost, "gained": gained, "images": images}
                for label, lost, gained, images in turned.worst
            ],
        },
        "examples": [
            {
                "kind": e.kind,
                "cosine": e.cosine,
                "query": one.records[e.query],
                "gallery": one.records[e.gallery],
                "query_label": one.labels[e.query],
                "gallery_label": one.labels[e.gallery],
            }
            for e in shown
        ],
        "example_threshold": new.scores.threshold_at(far),
    }


def _gain(cells: Cells, metric: str) -> Result | None:
    """Update gain and cost as plain values with ``no_gain``, why the gain says nothing (empty: it does)."""
    found = plain(gain(cells, metric))
    return None if found is None else {**found, "no_gain": no_gain(found)}


def _flip(one: NamedSet, old: Cell, new: Cell, image: int) -> Result:
    return {
        "query": one.records[image],
        "label": one.labels[image],
        "before": one.records[old.ranking.nearest[image]],
        "now": one.records[new.ranking.nearest[image]],
        "now_label": one.labels[new.ranking.nearest[image]],
        "cosine": new.ranking.score[image],
    }


def _cell(cell: Cell, options: Options) -> Result:
    far, tar = cell.scores.roc()
    edges, genuine, impostor = cell.scores.shares()
    return {
        "how": cell.how,
        "genuine_pairs": cell.scores.genuine_count,
        "impostor_pairs": cell.scores.impostor_count,
        "tar": [
            {
                "far": f,
                "threshold": cell.scores.threshold_at(f),
                "resolved": options.rules.resolves(f, cell.scores.impostor_count),
                **dataclasses.asdict(cell.figure(tar_name(f))),
            }
            for f in options.fars
        ],
        "rank": {"1": cell.figure("rank-1"), "5": cell.ranking.rate(5), "10": cell.ranking.rate(10)},
        "eer": cell.scores.eer(),
        "auc": cell.scores.auc(),
        "roc": {"far": far, "tar": tar},
        "histogram": {"edges": edges, "genuine": genuine, "impostor": impostor},
    }


def backfill(one: NamedSet, far: float, options: Options) -> list[Any]:
    """The backfill curves of a set in every order; of a random part of its identities where the set is large."""
    if not options.backfill_images:
        return []
    kept = _part_of(one.labels, options.backfill_images, options.seed)
    cross, own = one.spaces.view("new", "old"), one.spaces.view("new", "new")
    if cross is None or own is None or cross[1] is None:
        return []
    queries = cross[0][kept], own[0][kept]
    gallery = cross[1][kept], own[0][kept]
    labels, old = one.labels[kept], one.spaces.native["old"][kept]
    curves = []
    for name in ORDERS:
        if name != "distance":
            order = backfill_order(name, old, labels, options.seed)
        elif one.spaces.distance is not None:
            order = distance_order(one.spaces.distance[kept])
        else:
            continue
        curves.append(backfill_curve(queries, gallery, labels, order, far, name))
    return curves


def _part_of(labels: IntArray, images: int, seed: int) -> IntArray:
    if len(labels) <= images:
        return np.arange(len(labels))
    names, index, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    drawn = np.random.default_rng(seed).permutation(len(names))
    enough = int(np.searchsorted(np.cumsum(sizes[drawn]), images)) + 1
    return np.flatnonzero(np.isin(index, drawn[: max(2, enough)]))


def plain(value: Any) -> Any:
    """Dataclasses, arrays and NumPy scalars → what JSON can hold; NaN and infinities → None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
