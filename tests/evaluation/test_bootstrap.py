"""Resampling against a plain replicate that builds the drawn set; interval coverage on a known case."""

import numpy as np
import pytest

from tests.evaluation.samples import identities, unit
from trainer.evaluation.arrays import class_index
from trainer.evaluation.bootstrap import draw_identities, interval, resample_share, resample_tar
from trainer.evaluation.identification import leave_one_out
from trainer.evaluation.verification import score_pairs


def plain_replicate(cosine, index, drawn, far, ordered):
    """TAR at a FAR with every pair written out as often as its weight says."""
    genuine, impostor = [], []
    n = len(index)
    for i in range(n):
        for j in range(n):
            if i == j or (not ordered and j < i):
                continue
            if index[i] == index[j]:
                genuine += [cosine[i, j]] * drawn[index[i]]
            else:
                impostor += [cosine[i, j]] * (drawn[index[i]] * drawn[index[j]])
    impostor = np.sort(impostor)[::-1]
    allowed = int(far * len(impostor) + 1e-9)
    limit = impostor[allowed] if allowed < len(impostor) else -2
    return np.mean(np.array(genuine) > limit)


@pytest.mark.parametrize("cross", [False, True])
def test_replicates_agree_with_writing_out_the_drawn_set(cross):
    x, y = identities(8, 3, noise=1.5, seed=4)
    index = class_index(y, "test")
    z = unit(x + 0.1 * np.random.default_rng(1).normal(size=x.shape)) if cross else None
    draws = draw_identities(8, 25, seed=0)
    assert np.all(draws.sum(1) == 8)
    for far in (0.0, 0.02, 0.2):
        fast = resample_tar(score_pairs(x, y, z, keep_far=1.0), index, draws, far)
        cosine = x @ (x if z is None else z).T
        plain = [plain_replicate(cosine, index, drawn, far, cross) for drawn in draws]
        assert fast == pytest.approx(np.array(plain), abs=1e-9)


def test_drawing_everyone_once_gives_the_measured_figure():
    x, y = identities(40, 5, noise=1.5, seed=5)
    index, once = class_index(y, "test"), np.ones((1, 40), np.int64)
    scores = score_pairs(x, y)
    ranking = leave_one_out(x, y)
    assert resample_tar(scores, index, once, 1e-3)[0] == pytest.approx(scores.tar_at(1e-3), abs=2e-3)
    assert resample_share(ranking.hits(), ranking.counted, index, once)[0] == pytest.approx(ranking.rate())


def test_interval_covers_the_truth_about_as_often_as_it_says():
    inside = 0
    generator = np.random.default_rng(0)
    for trial in range(200):
        rate = np.clip(generator.normal(0.7, 0.2, 60), 0, 1)  # identities differ; 10 images each
        hits = generator.random((60, 10)) < rate[:, None]
        index = np.repeat(np.arange(60), 10)
        draws = draw_identities(60, 200, seed=trial)
        low_high = interval(hits.mean(), resample_share(hits.ravel(), np.ones(600, bool), index, draws))
        inside += low_high.low <= 0.694 <= low_high.high  # the mean of the clipped normal
    assert 0.88 <= inside / 200 <= 0.99


def test_interval_without_replicates_is_not_a_number():
    result = interval(0.5, np.array([np.nan, np.nan]))
    assert result.value == 0.5
    assert np.isnan(result.low)


def test_an_interval_leaves_out_half_of_what_is_over_at_each_end():
    replicates = np.arange(1001) / 1000
    for level, low in ((None, 0.025), (0.95, 0.025), (0.9, 0.05), (0.5, 0.25), (1.0, 0.0)):
        found = interval(0.3, replicates) if level is None else interval(0.3, replicates, level)
        assert (found.value, found.low, found.high) == (0.3, pytest.approx(low), pytest.approx(1 - low))
