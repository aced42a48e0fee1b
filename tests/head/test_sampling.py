"""The draw: independent of the world size, uniform, different from step to step; positives always included."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.head.cases import draw_negatives
from trainer.head.partition import class_range
from trainer.head.sampling import Draw, draw_rows
from trainer.head.sizes import stratum_count


@settings(max_examples=100, deadline=None)
@given(
    total=st.integers(1, 400),
    rate=st.sampled_from([0.001, 0.02, 0.1, 1 / 3, 0.7, 0.999]),
    world=st.integers(1, 9),
    seed=st.integers(0, 2**63),
    step=st.integers(0, 2**40),
)
def test_ranks_draw_what_one_process_draws(total: int, rate: float, world: int, seed: int, step: int) -> None:
    whole = draw_negatives(seed, step, total, rate, 0, total)
    assert len(whole) == stratum_count(total, rate)
    assert (whole.diff() > 0).all()
    assert whole.min() >= 0
    assert whole.max() < total
    parts = []
    for rank in range(world):
        own = class_range(total, rank, world)
        parts.append(draw_negatives(seed, step, total, rate, own.start, own.stop) + own.start)
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.7])
def test_every_class_is_drawn_equally_often(rate: float) -> None:
    total, steps = 1003, 3000
    count = torch.zeros(total)
    for step in range(steps):
        count[draw_negatives(5, step, total, rate, 0, total)] += 1
    share = stratum_count(total, rate) / total
    spread = (share * (1 - share) / steps) ** 0.5
    frequency = (count / steps).numpy()
    assert frequency.mean() == pytest.approx(share)
    assert np.abs(frequency - share).max() < 5 * spread
    assert 0.8 * spread < frequency.std() < 1.2 * spread  # as scattered as independent steps are, not less


def test_steps_and_seeds_draw_differently() -> None:
    def drawn(seed: int, step: int) -> set[int]:
        return set(draw_negatives(seed, step, 10000, 0.1, 0, 10000).tolist())

    first = drawn(1, 0)
    for other in (drawn(1, 1), drawn(2, 0), drawn(2, 1)):
        assert 40 < len(first & other) < 170  # 100 expected by chance


@settings(max_examples=60, deadline=None)
@given(
    total=st.integers(1, 300),
    world_size=st.integers(1, 9),
    rate=st.sampled_from([1.0, 0.5, 0.1, 0.01]),
    step=st.integers(0, 1000),
)
def test_the_host_s_indexes_are_those_of_the_drawn_rows(total: int, world_size: int, rate: float, step: int) -> None:
    """Every rank, class counts that divide and that do not: places, positives that were not drawn, own classes."""
    labels = np.random.default_rng(step).integers(-1, total, 40)
    seen = []
    for rank in range(world_size):
        own = class_range(total, rank, world_size)
        draw = None if rate == 1 else Draw.of(3, step, total, rate)
        drawn = draw_rows(labels, own, draw, torch.device("cpu"))
        rows = np.arange(own.size) if drawn.index is None else drawn.index.numpy()
        here = np.flatnonzero((labels >= own.start) & (labels < own.stop))
        distinct = np.unique(labels[here]) - own.start
        assert sorted(drawn.samples.tolist()) == here.tolist()
        np.testing.assert_array_equal(rows[drawn.places] + own.start, labels[drawn.samples])
        np.testing.assert_array_equal(drawn.place_list, np.sort(drawn.places))
        np.testing.assert_array_equal(rows[drawn.own], distinct)
        np.testing.assert_array_equal(drawn.own[drawn.own_order], drawn.own_list)
        np.testing.assert_array_equal(drawn.own_list, np.sort(drawn.own))
        assert len(np.unique(rows)) == len(rows)
        negatives = draw_negatives(3, step, total, rate, own.start, own.stop).numpy()
        if draw is not None:
            assert drawn.negatives == len(negatives)
            np.testing.assert_array_equal(rows[: drawn.negatives], negatives)
            assert set(rows[drawn.negatives :]) == set(distinct) - set(negatives)
            seen += (negatives + own.start).tolist()
    assert rate == 1 or len(seen) == len(set(seen)) == stratum_count(total, rate)


def test_correction_makes_the_denominator_unbiased() -> None:
    """Over many draws the weighted sum over drawn negatives averages to the sum over all of them."""
    generator = torch.Generator().manual_seed(0)
    value = torch.exp(torch.randn(1000, generator=generator, dtype=torch.float64))
    share = stratum_count(1000, 0.1) / 1000
    estimates = [value[draw_negatives(3, step, 1000, 0.1, 0, 1000)].sum().item() / share for step in range(4000)]
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - value.sum().item()) < 4 * error
