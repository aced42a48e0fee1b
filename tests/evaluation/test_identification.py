"""Nearest neighbours, leave-one-out ranks and open-set search against plain loops and hand-computed cases."""

import numpy as np
import pytest

from tests.evaluation.samples import identities, unit
from trainer.errors import DataError
from trainer.evaluation import identification
from trainer.evaluation.identification import leave_one_out, open_set, search, search_blocks


def test_search_agrees_with_sorting(monkeypatch):
    x, _ = identities(30, 4, seed=1)
    monkeypatch.setattr(identification, "_BLOCK", 700)
    cosines = x[:50] @ x.T
    expected = np.sort(cosines, axis=1)[:, ::-1][:, :7]
    for method in (search, search_blocks):
        scores, found = method(x[:50], x, 7)
        assert scores == pytest.approx(expected, abs=1e-6)
        assert np.take_along_axis(cosines, found, 1) == pytest.approx(scores, abs=1e-6)


@pytest.mark.parametrize("cross", [False, True])
def test_leave_one_out_agrees_with_a_loop(cross):
    x, y = identities(25, 3, noise=1.6, seed=2)
    z = unit(x + 0.1 * np.random.default_rng(0).normal(size=x.shape)) if cross else None
    ranking = leave_one_out(x, y, z, ranks=5)
    for i in range(len(y)):
        cosines = (x if z is None else z) @ x[i]
        cosines[i] = -9
        order = np.argsort(-cosines)[:5]
        own = np.flatnonzero(y[order] == y[i])
        assert ranking.nearest[i] == order[0]
        assert ranking.score[i] == pytest.approx(cosines[order[0]], abs=1e-6)
        assert ranking.own_rank[i] == (own[0] if len(own) else 5)
    assert 0 < ranking.rate(1) < ranking.rate(5) < 1


def test_an_image_is_not_found_by_itself_even_when_it_is_not_its_own_nearest():
    # Cross-model: image 0's own gallery embedding is far away; its nearest is image 1, then 2.
    x = unit(np.array([[1, 0.0], [1, 0.1], [0, 1], [0.1, 1]]))
    z = unit(np.array([[-1, 0.0], [1, 0.1], [0, 1], [0.1, 1]]))
    ranking = leave_one_out(x, np.array([5, 5, 6, 6]), z, ranks=2)
    assert list(ranking.nearest) == [1, 3, 3, 2]
    assert list(ranking.own_rank) == [
        0,
        2,
        0,
        0,
    ]  # the only other image of 1's identity is 0, whose gallery embedding points away


def test_single_images_are_distractors_only():
    x = unit(np.array([[1, 0.0], [0.9, 0.3], [1, 0.05]]))
    ranking = leave_one_out(x, np.array([0, 0, 1]))
    assert list(ranking.counted) == [True, True, False]
    assert list(ranking.nearest[:2]) == [2, 2]
    assert ranking.rate(1) == 0.0
    assert ranking.rate(2) == 1.0


def test_open_set_by_hand():
    gallery = np.eye(4, dtype=np.float32)[:3]
    probes = unit(
        np.array(
            [[9, 1, 0, 0], [2, 3, 0, 0], [0, 9, 0, 0], [0, 0, 1, 3], [0, 1, 0, 3], [3, 0, 0, 1.5]], dtype=np.float64
        )
    )
    subjects = np.array([10, 10, 11, 77, 78, 79])  # three mated: right, wrong (11 is nearer), right; three strangers
    result = open_set(probes, subjects, gallery, np.array([10, 11, 12]), ranks=(1, 2), fpirs=(0.0, 0.34))
    assert (result.mated, result.non_mated) == (3, 3)
    assert result.rank == {1: pytest.approx(2 / 3), 2: 1.0}
    # Strangers' best scores: 0.316, 0.316, 0.894. With no false answer only what is above 0.894 counts: both right
    # ones do.
    assert result.tpir == {0.0: pytest.approx(2 / 3), 0.34: pytest.approx(2 / 3)}
    assert result.threshold[0.0] == pytest.approx(0.8944, abs=1e-3)
    assert result.threshold[0.34] == pytest.approx(0.3162, abs=1e-3)


def test_a_mated_probe_at_a_strangers_score_is_not_accepted():
    """Accepting it would answer one stranger more than the rate allows."""
    gallery = np.eye(3, dtype=np.float32)
    steps = np.array([[0.6, 0.0, 0.0, 0.8], [0.8, 0.0, 0.0, 0.6], [1.0, 0.0, 0.0, 0.0]])
    probes = np.concatenate([steps, steps[[0, 1]]]).astype(np.float32)  # mated 0.6, 0.8, 1.0; strangers 0.6, 0.8
    gallery = np.concatenate([gallery, np.zeros((3, 1), np.float32)], 1)
    subjects = np.array([10, 10, 10, 77, 78])
    result = open_set(probes, subjects, gallery, np.array([10, 11, 12]), ranks=(1,), fpirs=(0.0, 0.5, 0.99))
    assert result.tpir == {0.0: pytest.approx(1 / 3), 0.5: pytest.approx(2 / 3), 0.99: pytest.approx(2 / 3)}
    for fpir, answered in ((0.0, 0), (0.5, 1), (0.99, 1)):
        assert int((np.array([0.6, 0.8], np.float32) >= result.threshold[fpir]).sum()) == answered


@pytest.mark.parametrize(
    ("probes", "enrolled", "message"),
    [([1], [1, 1], "enrolled 2 times"), ([9], [1, 2], "of one protocol"), ([], [1, 2], "0 probes")],
)
def test_unusable_protocols_are_refused(probes, enrolled, message):
    with pytest.raises(DataError, match=message):
        open_set(unit(np.ones((len(probes), 3))), np.array(probes), unit(np.ones((2, 3))), np.array(enrolled))
