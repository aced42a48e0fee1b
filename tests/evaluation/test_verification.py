"""Pair counting against brute force and scikit-learn; hand-computed operating points."""

import itertools
import tracemalloc

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from tests.evaluation.samples import identities, unit
from trainer.errors import DataError
from trainer.evaluation import verification
from trainer.evaluation.verification import BINS, fold_accuracy, score_pairs, scores_of


def brute(x, y, z=None):
    """Every counted pair by two plain loops: cosines and whether genuine."""
    n = len(y)
    pairs = itertools.combinations(range(n), 2) if z is None else itertools.permutations(range(n), 2)
    listed = [(float(x[i].astype(np.float64) @ (x if z is None else z)[j]), y[i] == y[j], i, j) for i, j in pairs]
    return np.array([p[0] for p in listed]), np.array([p[1] for p in listed]), listed


@pytest.fixture(params=["one model", "two models"])
def case(request):
    x, y = identities(12, 4, seed=1)
    extra, _ = identities(1, 3, seed=9)  # uneven classes: one of 3, one of a single image
    x, y = np.concatenate([x, extra, unit(np.ones((1, 32)))]), np.concatenate([y, [1000] * 3, [2000]])
    z = None if request.param == "one model" else unit(x + 0.05 * np.random.default_rng(2).normal(size=x.shape))
    return x, y, z


def test_all_pairs_are_counted_once_and_no_image_meets_itself(case, monkeypatch):
    x, y, z = case
    cosines, genuine, _ = brute(x, y, z)
    whole = score_pairs(x, y, z)
    monkeypatch.setattr(verification, "_BLOCK", 3 * len(y) + 1)  # odd blocks that cut through identities
    blocks = score_pairs(x, y, z)
    for scores in (whole, blocks):
        assert (scores.genuine_count, scores.impostor_count) == (genuine.sum(), (~genuine).sum())
        for threshold in (-0.2, 0.0, 0.3, 0.6):
            assert scores.tar(threshold) == pytest.approx((cosines[genuine] >= threshold).mean(), abs=1e-9)
            assert scores.far(threshold) == pytest.approx((cosines[~genuine] >= threshold).mean(), abs=1e-9)


def test_curves_agree_with_scikit_learn(case):
    x, y, z = case
    cosines, genuine, _ = brute(x, y, z)
    scores = score_pairs(x, y, z)
    far, tar, _ = roc_curve(genuine, cosines, drop_intermediate=False)
    for wanted in (1e-3, 1e-2, 0.1, 0.5, 1.0):
        assert scores.tar_at(wanted) == pytest.approx(tar[far <= wanted + 1e-12].max(), abs=1e-9)
    assert scores.auc() == pytest.approx(roc_auc_score(genuine, cosines), abs=1e-6)
    crossing = np.argmin(np.abs(far - (1 - tar)))
    assert scores.eer() == pytest.approx((far[crossing] + 1 - tar[crossing]) / 2, abs=0.01)
    points = scores.roc(50)
    assert all(tar[far <= f + 1e-12].max() == pytest.approx(t, abs=1e-9) for f, t in zip(*points, strict=True))


def test_kept_pairs_are_the_right_ones(case):
    x, y, z = case
    _, _, listed = brute(x, y, z)
    scores = score_pairs(x, y, z)
    named = {frozenset((i, j)) if z is None else (i, j): s for s, _, i, j in listed}
    assert len(scores.genuine_pairs) == sum(g for _, g, _, _ in listed)
    for pairs, kind in ((scores.genuine_pairs, True), (scores.impostor_pairs, False)):
        assert np.all(np.diff(pairs.score) <= 0)
        for i, j, s in zip(pairs.query[:50], pairs.gallery[:50], pairs.score[:50], strict=True):
            assert (y[i] == y[j]) == kind
            assert named[frozenset((i, j)) if z is None else (i, j)] == pytest.approx(s, abs=1e-6)
    best = sorted((s for s, g, _, _ in listed if not g), reverse=True)[:20]
    assert scores.impostor_pairs.score[:20] == pytest.approx(best, abs=1e-6)


def test_highest_impostors_survive_trimming_and_thinning_keeps_the_share(monkeypatch):
    x, y = identities(60, 5, seed=3)
    monkeypatch.setattr(verification, "_BLOCK", 4000)
    everything = score_pairs(x, y, keep_far=1.0)
    trimmed = score_pairs(x, y, keep_far=1e-3, keep=5000)
    assert trimmed.impostor_pairs.stride == 1
    assert 1000 < len(trimmed.impostor_pairs) < 2000
    assert trimmed.impostor_pairs.score == pytest.approx(everything.impostor_pairs.score[: len(trimmed.impostor_pairs)])
    thinned = score_pairs(x, y, keep_far=1.0, keep=5000)
    stride = thinned.impostor_pairs.stride
    assert stride > 1
    whole = everything.impostor_pairs.score
    for position in (0.1, 0.3):
        at = thinned.impostor_pairs.score[int(position * len(whole) / stride)]
        assert np.mean(whole >= at) == pytest.approx(position, abs=0.02)


def test_operating_points_by_hand():
    cosines = np.array([0.9, 0.8, 0.5, 0.1, 0.7, 0.6, 0.2, 0.1, 0.0, -0.5])
    genuine = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0], bool)
    scores = scores_of(cosines, genuine)
    assert scores.tar_at(0.0) == 0.5  # nothing of the impostors: above 0.7
    assert scores.tar_at(1 / 6) == 0.5  # above 0.6 there is no further genuine pair
    assert scores.tar_at(2 / 6) == 0.75
    assert scores.tar_at(1.0) == 1.0
    assert 0.7 < scores.threshold_at(0.0) < 0.7 + 2e-5
    assert scores.far(scores.threshold_at(0.34)) == pytest.approx(2 / 6)
    edges, own, other = scores.shares(4)
    assert list(edges) == [-1, -0.5, 0, 0.5, 1]
    assert own == pytest.approx([0, 0, 0.25, 0.75])
    assert other == pytest.approx([0, 1 / 6, 0.5, 2 / 6])


def test_threshold_is_above_one_when_identical_impostors_cannot_be_told():
    scores = scores_of(np.array([1.0, 1.0, 0.2]), np.array([True, False, False]))
    assert scores.threshold_at(0.1) > 1
    assert scores.tar_at(0.1) == 0.0
    assert scores.tar(scores.threshold_at(0.5)) == 1.0


def test_fold_accuracy_by_hand_and_with_ties():
    genuine = np.tile([True, False], 20)
    assert fold_accuracy(np.where(genuine, 0.9, 0.1), genuine) == (1.0, 0.0)
    flipped = np.where(genuine, 0.9, 0.1)
    flipped[:4] = [0.1, 0.9, 0.1, 0.9]  # the first fold is all wrong, the others set the threshold between 0.1 and 0.9
    mean, spread = fold_accuracy(flipped, genuine)
    assert mean == pytest.approx(0.9)
    assert spread == pytest.approx(0.3)
    assert fold_accuracy(np.full(40, 0.5), genuine)[0] == 0.5


def test_fifty_million_pairs_in_bounded_memory():
    x, y = identities(2000, 5, dim=32, seed=5)
    tracemalloc.start()
    scores = score_pairs(x, y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert scores.impostor_count == 10_000 * 9_999 // 2 - 2000 * 10
    assert peak < 300e6  # all scores at once would be 200 MB in float32 and their places 800 MB
    assert 0 < scores.tar_at(1e-6) < scores.tar_at(1e-3) < 1


@pytest.mark.parametrize(
    ("labels", "message"), [([], "no images"), ([1, 1, 1], "one identity"), ([1, 2, 3], "single image")]
)
def test_sets_without_pairs_are_refused(labels, message):
    with pytest.raises(DataError, match=message):
        score_pairs(unit(np.ones((len(labels), 4))), np.array(labels, np.int64))


def test_grid_is_finer_than_float32_needs():
    assert 2 / BINS < 2e-6
