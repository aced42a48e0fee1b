"""The compatibility matrix and what is read off it, against hand-computed small cases and plain loops."""

import numpy as np
import pytest

from tests.evaluation.samples import identities, unit
from trainer.errors import ModelError
from trainer.evaluation.arrays import class_index
from trainer.evaluation.backfill import backfill_curve, backfill_order
from trainer.evaluation.bootstrap import draw_identities
from trainer.evaluation.compatibility import (
    Cell,
    Spaces,
    centre_queries,
    class_centres,
    compare,
    examples,
    flips,
    gain,
    operating_point,
    point_to_set,
)
from trainer.evaluation.identification import leave_one_out
from trainer.evaluation.verification import score_pairs, scores_of


def test_views_apply_the_transformation_where_it_belongs():
    old, new, new_as_old, old_as_new = (np.full((3, d), k, np.float32) for k, d in enumerate((4, 6, 4, 6)))
    native = {"old": old, "new": new}
    assert Spaces(native).view("new", "old") is None  # other dimensions, no T
    assert Spaces(native).view("paragon", "old") is None
    query, gallery, how = Spaces(native, {("new", "old"): new_as_old}).view("new", "old")
    assert (query is new_as_old, gallery is old, how) == (True, True, "t21")
    query, gallery, how = Spaces(native, {("old", "new"): old_as_new}).view("new", "old")
    assert (query is new, gallery is old_as_new, how) == (True, True, "t12")
    both = Spaces(native, {("old", "new"): old_as_new, ("new", "old"): new_as_old})
    query, gallery, how = both.view("old", "new")
    assert (query is old_as_new, gallery is new, how) == (True, True, "t12")  # by T₁₂, whoever asks
    assert both.title("old", "new") == "T₁₂(old) → new"
    assert both.title("new", "old") == "T₂₁(new) → old"
    assert Spaces(native, {("old", "new"): old_as_new}).title("new", "old") == "new → T₁₂(old)"
    assert Spaces(native, {("new", "old"): new_as_old}).title("old", "new") == "old → T₂₁(new)"
    assert both.title("new", "new") == "new → new"
    query, gallery, how = Spaces(native, {("old", "new"): old_as_new}).view("new", "new")
    assert (query is new, gallery, how) == (True, None, "own")
    query, gallery, how = Spaces({"old": old, "new": new_as_old}).view("new", "old")
    assert (query is new_as_old, gallery is old, how) == (True, True, "direct")


def test_point_to_set_by_hand():
    old = unit(np.array([[1, 0.2], [1, -0.2], [0.2, 1], [-0.2, 1]]))  # centres (1, 0) and (0, 1), boundaries cos 11.3°
    labels = np.array([4, 4, 9, 9])
    new = unit(np.array([[1, 0.1], [1, 0.9], [1, 0.1], [0, 1]]))  # within; outside but nearest; the wrong class; within
    share = point_to_set(new, old, labels)
    assert (share.within, share.nearest, share.both, share.old_nearest) == (0.5, 0.75, 0.5, 1.0)
    assert point_to_set(old, old, labels).within == 1.0  # the sample that sets the boundary is within it


def test_centre_queries_against_plain_loops():
    embeddings, labels = identities(9, 5, dim=6, noise=1.2)
    keep = np.ones(len(labels), bool)
    keep[np.flatnonzero(labels == labels[0])[1:]] = False  # one identity has a single image, another two
    keep[np.flatnonzero(labels == labels[-1])[2:]] = False
    x, y = embeddings[keep].astype(np.float64), labels[keep]
    own, other, hits = [], [], []
    for i in range(len(y)):
        row = []
        for j in range(len(y)):
            seen = [k for k in range(len(y)) if y[k] == y[i] and k != j]
            row.append(unit(x[seen].sum(0, keepdims=True))[0] @ x[j] if i != j else -2.0)
        row = np.array(row)
        same = (y == y[i]) & (np.arange(len(y)) != i)
        own += list(row[same])
        other += list(row[y != y[i]])
        if same.any():
            hits.append(row[same].max() > row[y != y[i]].max())
    other = np.sort(other)[::-1]
    got = centre_queries(embeddings[keep], y, (0.02, 0.1))
    assert list(got) == ["TAR@FAR=2e-2", "TAR@FAR=0.1", "rank-1"]
    for far, value in zip((0.02, 0.1), got.values(), strict=False):
        threshold = other[int(far * len(other))]  # as many as may pass are above it
        assert value == pytest.approx(np.mean(np.array(own) > threshold))
        assert 0 < value < 1
    assert got["rank-1"] == pytest.approx(np.mean(hits))
    assert 0 < got["rank-1"] < 1


def test_class_centres_that_cancel_are_an_error():
    with pytest.raises(ModelError, match="cancel"):
        class_centres(np.array([[1, 0], [-1, 0], [0, 1]], np.float32), np.array([0, 0, 1]))


def test_operating_point_by_hand():
    genuine = np.array([True] * 4 + [False] * 10)
    deployed = scores_of(np.array([0.9, 0.8, 0.4, 0.3, 0.5] + [0.0] * 9), genuine)
    upgraded = scores_of(np.array([0.95, 0.9, 0.8, 0.62, 0.7, 0.6, 0.55] + [0.1] * 7), genuine)
    point = operating_point(deployed, upgraded, 0.1)
    assert 0 < point.threshold <= 0.4  # the lowest threshold with one impostor in ten
    assert point.tar == 1.0
    point = operating_point(deployed, upgraded, 0.05)
    assert point.threshold == pytest.approx(0.5, abs=1e-5)
    assert (point.tar, point.far_kept, point.tar_kept) == (0.5, pytest.approx(0.3), 1.0)
    assert point.restored == pytest.approx(0.7, abs=1e-5)
    assert point.tar_restored == 0.75


def test_flips_by_hand():
    # Images 0, 1 of one identity, 2, 3 of another; under the old model all right, under the new one image 0 is lost.
    labels = np.array([1, 1, 2, 2])
    old = unit(np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1]]))
    new = unit(np.array([[0.1, 1], [1, 0.1], [0, 1], [0.1, 1]]))
    before, after = leave_one_out(old, labels), leave_one_out(new, labels, old)
    turned = flips(before, after, labels)
    assert list(turned.negative) == [0]
    assert len(turned.positive) == 0
    assert turned.share_negative == 0.25
    assert turned.worst == [(1, 1, 0, 2)]
    back = flips(after, before, labels)
    assert list(back.positive) == [0]
    assert back.worst == []


def test_update_gain_by_hand():
    x, y = identities(30, 4, noise=1.8, seed=1)
    better = unit(x + 3 * unit(class_centres(x, class_index(y, "t"))[class_index(y, "t")]))
    spaces = Spaces({"old": x, "new": better, "paragon": better})
    draws = draw_identities(30, 20, 0)
    pairs = (("old", "old"), ("new", "old"), ("new", "new"), ("paragon", "paragon"))
    cells = {pair: compare(spaces, *pair, y, [1e-2], draws) for pair in pairs}
    value = {pair: cell.value["rank-1"] for pair, cell in cells.items()}
    measured = gain(cells, "rank-1")
    expected = (value["new", "old"] - value["old", "old"]) / (value["paragon", "paragon"] - value["old", "old"])
    assert measured.update_gain.value == pytest.approx(expected)
    assert measured.update_gain.low <= expected <= measured.update_gain.high
    assert measured.cost.value == 0
    assert gain({k: v for k, v in cells.items() if k != ("paragon", "paragon")}, "rank-1") is None


def test_cost_is_what_the_new_model_lacks_of_the_paragon():
    def cell(query: str, gallery: str, value: float) -> Cell:
        return Cell(query, gallery, "direct", None, None, {"rank-1": value}, {"rank-1": np.full(3, value)})

    values = {("old", "old"): 0.5, ("new", "old"): 0.6, ("new", "new"): 0.8, ("paragon", "paragon"): 0.9}
    measured = gain({pair: cell(*pair, value) for pair, value in values.items()}, "rank-1")
    assert (measured.cost.value, measured.cost.low, measured.cost.high) == pytest.approx((0.1, 0.1, 0.1))
    assert measured.update_gain.value == pytest.approx(0.25)


def test_examples_are_what_they_say():
    x, y = identities(30, 4, noise=1.5, seed=2)
    scores = score_pairs(x, y)
    threshold = scores.threshold_at(2e-3)
    shown = examples(scores, threshold, each=5)
    assert {e.kind for e in shown} == {"accepted", "missed", "false", "near"}
    for e in shown:
        assert e.cosine == pytest.approx(float(x[e.query] @ x[e.gallery]), abs=1e-5)
        assert (y[e.query] == y[e.gallery]) == (e.kind in ("accepted", "missed"))
        assert (e.cosine >= threshold - 1e-6) == (e.kind in ("accepted", "false"))
    for kind in ("accepted", "missed", "false", "near"):
        images = [i for e in shown if e.kind == kind for i in (e.query, e.gallery)]
        assert len(images) == len(set(images)) == 10 or kind == "false"


def test_backfill_curve_agrees_with_mixing_the_gallery_by_hand():
    old, y = identities(20, 4, noise=1.8, seed=3)
    generator = np.random.default_rng(0)
    new = unit(
        old
        + 0.8 * class_centres(old, class_index(y, "t"))[class_index(y, "t")]
        + 0.05 * generator.normal(size=old.shape)
    )
    for name in ("random", "confidence", "class"):
        order = backfill_order(name, old, y, seed=1)
        assert sorted(order) == list(range(len(y)))
        curve = backfill_curve((new, new), (old, new), y, order, 0.01, name, steps=4)
        assert curve.shares == [0, 0.25, 0.5, 0.75, 1]
        for step, share in enumerate(curve.shares):
            gallery = old.copy()
            done = order[: round(share * len(y))]
            gallery[done] = new[done]
            assert curve.rank1[step] == pytest.approx(leave_one_out(new, y, gallery).rate())
            assert curve.tar[step] == pytest.approx(score_pairs(new, y, gallery).tar_at(0.01))
        assert curve.area["rank-1"] == pytest.approx(np.mean([curve.rank1[:-1], curve.rank1[1:]]))


def test_backfill_orders():
    old = unit(np.array([[1, 0.0], [1, 0.8], [0, 1], [0.0, 1]]))
    labels = np.array([1, 1, 2, 2])
    assert backfill_order("confidence", old, labels, 0)[0] == 1  # between the classes
    by_class = labels[backfill_order("class", old, labels, 0)]
    assert list(by_class) in ([1, 1, 2, 2], [2, 2, 1, 1])
