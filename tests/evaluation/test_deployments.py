"""Ways of deploying against plain loops: mixed stores, expanded queries, maps fitted afterwards, pooled galleries."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tests.evaluation.samples import identities, unit
from tests.evaluation.test_verdict import OPTIONS, upgrade
from tools import evaluate_tables
from trainer.evaluation.bootstrap import draw_identities
from trainer.evaluation.compatibility import Spaces
from trainer.evaluation.deployments import affine_map, expanded, pooled_gallery, rotation
from trainer.evaluation.next_steps import next_steps
from trainer.evaluation.report_sections import pooled
from trainer.evaluation.results import NamedSet, _pooled, measure_sets
from trainer.evaluation.verdict import Rules

GENERATOR = np.random.default_rng(5)
TURN = np.linalg.qr(GENERATOR.normal(size=(32, 32)))[0].astype(np.float32)


def converted(loss):
    """A new model in a turned space, with an exact T₂₁ and a T₁₂ that loses ``loss`` of the old vectors."""
    case = upgrade(1.0)
    old, new = case.spaces.native["old"], case.spaces.native["new"]
    noise = unit(GENERATOR.normal(size=old.shape))
    mapped = {("new", "old"): new, ("old", "new"): unit(old + loss * noise) @ TURN}
    return NamedSet("unseen", Spaces({"old": old, "new": new @ TURN}, mapped), case.labels, case.records)


def test_a_conversion_that_loses_is_not_safe_where_the_upgrade_is():
    result = measure_sets([converted(2.0)], OPTIONS)
    rows = {row["way"]: row for row in result["sets"]["unseen"]["deployments"]}
    assert result["verdict"]["answer"] == rows["T₂₁(new) → old"]["answer"] == "SAFE"
    assert rows["new → T₁₂(old)"]["answer"] == "NOT SAFE"
    assert result["verdict"]["next"][-1].startswith(
        "Do not convert the gallery by T₁₂ (`lce gallery upgrade`): on unseen"
    )
    kept = measure_sets([converted(0.0)], OPTIONS)
    rows = {row["way"]: row for row in kept["sets"]["unseen"]["deployments"]}
    assert rows["new → T₁₂(old)"]["answer"] == "SAFE"
    assert rows["new → T₁₂(old)"]["tar"] == pytest.approx(rows["T₂₁(new) → old"]["tar"], abs=0.005)
    threshold = rows["new → T₁₂(old)"]["thresholds"]["all"]
    assert f"with the threshold {threshold:.4f} from then on" in kept["verdict"]["next"][-1]


def test_a_mixed_gallery_against_plain_loops():
    case = converted(0.0)
    result = measure_sets([case], dataclasses.replace(OPTIONS, seed=4))
    rows = {row["way"]: row for row in result["sets"]["unseen"]["deployments"]}
    n, labels = len(case.labels), case.labels
    renewed = np.zeros(n, bool)
    renewed[np.random.default_rng(4).permutation(n)[: n // 2]] = True
    native = case.spaces.native
    scores = np.where(
        renewed[None], native["new"] @ native["new"].T, case.spaces.mapped["new", "old"] @ native["old"].T
    )
    own, itself = labels[:, None] == labels[None], np.eye(n, dtype=bool)

    def figures(scores):
        impostors = np.sort(scores[~own])[::-1]
        limit = impostors[int(1e-3 * len(impostors))]  # the first too many
        best = np.where(itself, -9, scores).argmax(1)
        return (scores[own & ~itself] > limit).mean(), (labels[best] == labels).mean()

    one = rows["new → mixed, one threshold"]
    assert (one["tar"]["value"], one["rank-1"]["value"]) == pytest.approx(figures(scores), abs=0.004)
    two = rows["new → mixed, two thresholds"]
    limits = two["thresholds"]
    assert set(limits) == {"old", "re-encoded"}
    apart = scores - np.where(renewed, limits["re-encoded"], limits["old"])[None]
    assert (two["tar"]["value"], two["rank-1"]["value"]) == pytest.approx(figures(apart), abs=0.004)
    accepted = (apart >= 0)[~own].mean()
    assert accepted == pytest.approx(1e-3, rel=0.1)
    assert one["answer"] in ("SAFE", "NOT ENOUGH DATA")


def test_expanded_queries_never_use_their_own_image():
    x, _ = identities(6, 4, dim=8, seed=2)
    gallery = unit(x + 0.1)
    scores = np.where(np.eye(len(x), dtype=bool), -9, x @ gallery.T)
    near = np.argsort(-scores, axis=1)[:, :2]
    assert expanded(x, gallery) == pytest.approx(unit((x + gallery[near].sum(1)) / 3), abs=1e-6)


def test_maps_fitted_afterwards_find_what_there_is_to_find():
    x = GENERATOR.normal(size=(200, 12)).astype(np.float32)
    turn = np.linalg.qr(GENERATOR.normal(size=(12, 12)))[0][:, :8].astype(np.float32)
    assert rotation(x @ turn @ turn.T, x @ turn)(x) == pytest.approx(x @ turn, abs=1e-3)
    weights, shift = GENERATOR.normal(size=(12, 5)), GENERATOR.normal(size=5)
    assert affine_map(x, x @ weights + shift)(x) == pytest.approx(x @ weights + shift, abs=1e-3)


def test_a_paragon_is_compared_by_maps_that_saw_other_identities_only():
    case = upgrade(0.5)
    old = case.spaces.native["old"]
    spaces = dataclasses.replace(case.spaces, native=case.spaces.native | {"paragon": old @ TURN})
    result = measure_sets([dataclasses.replace(case, spaces=spaces)], OPTIONS)
    rows = {row["way"]: row for row in result["sets"]["unseen"]["deployments"]}
    today = rows["old → old"]["rank-1"]["value"]
    for name in ("rotation(paragon) → old", "affine(paragon) → old", "old + affine(paragon) → old"):
        assert rows[name]["rank-1"]["value"] == pytest.approx(today, abs=0.02)  # a turned copy, turned back
        assert rows[name]["answer"] is None
        assert rows[name]["rank-1"]["low"] is None
    assert rows["new → new"]["tar"]["value"] == result["sets"]["unseen"]["cells"]["new->new"]["tar"][0]["value"]
    strange = unit(GENERATOR.normal(size=old.shape))  # nothing to learn: a map that saw these images would find them
    spaces = dataclasses.replace(case.spaces, native=case.spaces.native | {"paragon": strange})
    result = measure_sets([dataclasses.replace(case, spaces=spaces)], OPTIONS)
    rows = {row["way"]: row for row in result["sets"]["unseen"]["deployments"]}
    assert rows["affine(paragon) → old"]["rank-1"]["value"] < 0.1


def test_queries_fused_with_the_old_model_and_expanded_ones_against_plain_loops():
    case = upgrade(0.5)
    old, new, labels = case.spaces.native["old"], case.spaces.native["new"], case.labels
    free = unit(upgrade(0.8, noise=0.4).spaces.native["new"] @ TURN)
    spaces = dataclasses.replace(case.spaces, native=case.spaces.native | {"paragon": free})
    result = measure_sets(
        [dataclasses.replace(case, spaces=spaces)], dataclasses.replace(OPTIONS, replicates=20, seed=3)
    )
    rows = {row["way"]: row for row in result["sets"]["unseen"]["deployments"]}
    own, itself = labels[:, None] == labels[None], np.eye(len(labels), dtype=bool)

    def figures(queries):
        scores = queries @ old.T
        limit = np.sort(scores[~own])[::-1][int(1e-3 * (~own).sum())]
        return (scores[own & ~itself] > limit).mean(), (labels[np.where(itself, -9, scores).argmax(1)] == labels).mean()

    names = np.unique(labels)
    fold = dict(zip(names, np.random.default_rng(3).permutation(len(names)) % 5, strict=True))
    part = np.array([fold[label] for label in labels])
    mapped = np.zeros_like(old)
    for one in range(5):
        given = np.hstack([free, np.ones((len(free), 1), np.float32)])
        weights = np.linalg.lstsq(given[part != one], old[part != one], rcond=None)[0]
        mapped[part == one] = unit(given[part == one] @ weights)
    angle = np.arccos(np.clip(np.einsum("nd,nd->n", old, mapped), -1, 1))[:, None]
    fused = (np.sin(angle / 2) * (old + mapped)) / np.sin(angle)  # SLERP at one half
    near = np.argsort(-np.where(itself, -9, new @ old.T), axis=1)[:, :2]
    for name, queries in (
        ("affine(paragon) → old", mapped),
        ("old + affine(paragon) → old", fused),
        ("new → old, expanded", unit(new + old[near].sum(1))),
    ):
        assert (rows[name]["tar"]["value"], rows[name]["rank-1"]["value"]) == pytest.approx(figures(queries), abs=0.004)
    assert rows["new → old, expanded"]["answer"] is not None


def test_a_pooled_gallery_against_plain_loops():
    x, labels = identities(9, 4, dim=8, noise=1.5, seed=3)
    keep = np.ones(len(labels), bool)
    keep[np.flatnonzero(labels == labels[0])[1:]] = False  # an identity with a single image is no query
    x, labels = x[keep], labels[keep]
    queries = unit(x + 0.2 * GENERATOR.normal(size=x.shape))
    own, other, hits = [], [], []
    for i, label in enumerate(labels):
        rest = (labels == label) & (np.arange(len(labels)) != i)
        strangers = [queries[i] @ unit(x[labels == c].sum(0)[None])[0] for c in np.unique(labels) if c != label]
        other += strangers
        if rest.any():
            own.append(queries[i] @ unit(x[rest].sum(0)[None])[0])
            hits.append(own[-1] > max(strangers))
    found = pooled_gallery("test", queries, x, labels, (0.1,), draw_identities(9, 50, 0), Rules())
    limit = np.sort(other)[::-1][int(0.1 * len(other))]
    assert found.impostor_pairs == len(other)
    assert found.resolved == [len(other) >= 100]
    assert found.tar == [pytest.approx(np.mean(np.array(own) > limit), abs=1e-6)]
    assert found.rank1.value == pytest.approx(np.mean(hits))
    assert found.rank1.low <= found.rank1.value <= found.rank1.high


def test_the_recipe_of_the_documentation_makes_the_pooled_gallery_that_is_measured():
    """For each query from the vectors of all other images, of any length; ``person`` are numbers from 0."""
    page = (Path(__file__).parents[2] / "docs" / "gallery-upgrade.md").read_text(encoding="utf-8")
    recipe = page.partition("| arrays | `")[2].partition("`")[0]
    x, labels = identities(9, 4, dim=8, noise=1.5, seed=3)
    person = np.unique(labels, return_inverse=True)[1]
    vectors = x * GENERATOR.uniform(0.1, 10, (len(x), 1))
    scores = np.empty((len(x), 9))
    for i, query in enumerate(x):
        rest = np.arange(len(x)) != i
        known = {"np": np, "people": 9, "d": 8, "person": person[rest], "vectors": vectors[rest]}
        exec(recipe, known)
        scores[i] = known["pooled"] @ query
    own = person[:, None] == np.arange(9)
    found = pooled_gallery("test", x, x, labels, (0.1,), draw_identities(9, 50, 0), Rules())
    assert found.rank1.value == (scores.argmax(1) == person).mean() < 1
    limit = np.sort(scores[~own])[::-1][int(0.1 * (~own).sum())]
    assert found.tar == [pytest.approx((scores[own] > limit).mean(), abs=1e-6)]


def test_pooled_galleries_are_those_that_can_be_deployed():
    """The converted gallery is a row where there is a T₁₂, and is not made of vectors that nothing converted."""
    case = converted(0.0)
    old, new = case.spaces.native["old"], case.spaces.native["new"]
    up = {("old", "new"): case.spaces.mapped["old", "new"]}
    for mapped, galleries in (
        (case.spaces.mapped, ["T₂₁(new) → old", "new → T₁₂(old)"]),
        (up, ["new → T₁₂(old)"]),
        ({("new", "old"): new, ("old", "new"): old}, ["new → old"]),  # what carried() gives a model without maps
    ):
        rows = _pooled(dataclasses.replace(case, spaces=Spaces({"old": old, "new": new}, mapped)), OPTIONS)
        assert [row["name"] for row in rows] == ["old → old", *galleries, "new → new"]


def test_rates_that_a_pooled_gallery_cannot_resolve_are_starred():
    """40 images against 9 strangers each: 360 impostor pairs, of which 1e-3 is less than ten and 3e-2 is more."""
    rows = _pooled(upgrade(1.0, classes=10, images=4), dataclasses.replace(OPTIONS, fars=(1e-3, 3e-2)))
    assert [row["resolved"] for row in rows] == [[False, True]] * 3
    shown = pooled({"pooled": rows})
    assert shown.starred
    assert [[cell.mark for cell in row] for row in shown.rows] == [["", " *", "", ""]] * 3
    printed = evaluate_tables._pooled("unseen", {"pooled": rows})
    assert printed.caption == "* too few impostor pairs to resolve this FAR"
    assert [[text.endswith(" *") for text in column.cells] for column in printed.columns[1:3]] == [
        [True] * 3,
        [False] * 3,
    ]


def test_next_steps_ask_for_a_set_where_there_is_none():
    verdict = {"answer": "NOT ENOUGH DATA", "sets": [{"seen": "declared", "answer": "SAFE", "name": "x"}]}
    assert "--data" in next_steps(verdict, {}, {"min_identities": 20})[1]
