"""Steps that are not finite, on the path without a host sync too; calls in the wrong order; what must not be lost."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.head.test_equality import config
from tests.ranks import run_ranks
from tests.sections import variant
from trainer.distributed import Ranks
from trainer.errors import ConfigError, DataError
from trainer.head.config import AnyMargin, AnyRowOptimizer, HeadConfig
from trainer.head.fused import FusedSoftmax
from trainer.head.old_centers import DirectCompat
from trainer.head.partial_fc import PartialFC

CLASSES, DIM = 31, 6
LABELS = torch.tensor([0, 3, 3, 30, 11])


def build(classes: int = CLASSES, lr: float = 0.1, gated: bool = False, **changes: Any) -> PartialFC:
    """A head; ``gated``: on the path that never asks the device, as on CUDA."""
    head = PartialFC(config(**changes), classes, DIM, Ranks(), seed=3)
    if gated:
        assert isinstance(head.softmax, FusedSoftmax)
        head.softmax.gated = True
    head.set_lr(lr)
    return head


def batch(seed: int = 0, size: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, DIM, generator=generator, dtype=torch.float64).requires_grad_()


def snapshot(head: PartialFC) -> list[Tensor]:
    return [t.detach().clone() for t in head.shard_state().values()]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["cosface", "arcface", "adaface", "magface", "curricular"])
def test_a_non_finite_step_leaves_no_trace(name: str, value: float, gated: bool) -> None:
    """Rows, their state and the margin's statistics stay, and the next step is as if the bad one had not been."""
    for rate in (1.0, 0.3):
        for optimizer in ("sgd", "adamw"):
            changes = {"margin": {"name": name}, "sample_rate": rate, "optimizer": {"name": optimizer}}
            bad, good = build(gated=gated, **changes), build(gated=gated, **changes)
            for head in (bad, good):
                head(batch(), LABELS, 0).loss.backward()
            before = snapshot(bad)
            spoilt = batch(1).detach().clone()
            spoilt[2, 3] = value
            spoilt.requires_grad_()
            out = bad(spoilt, LABELS, 1)
            out.loss.backward()
            assert not bool(out.finite)
            assert torch.isnan(out.loss)
            assert spoilt.grad is not None
            assert (spoilt.grad == 0).all()
            assert all(torch.equal(a, b) for a, b in zip(before, snapshot(bad), strict=True))
            snapshot(good)  # brings its rows up to date at the same moment
            for head in (bad, good):
                head(batch(2), LABELS, 2).loss.backward()
            for a, b in zip(snapshot(bad), snapshot(good), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_the_gated_path_gives_the_same_numbers(rate: float) -> None:
    results = []
    for gated in (False, True):
        head = build(gated=gated, sample_rate=rate)
        x = batch()
        for step in range(3):
            head(x, LABELS, step).loss.backward()
        assert x.grad is not None
        results.append([x.grad, *snapshot(head)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_a_non_finite_companion_stops_the_step(impl: str) -> None:
    head = build(impl=impl)
    before = head.rows.clone()
    x = batch()
    out = head(x, LABELS, 0, lambda e, _, w: ((e.sum() + w.sum()) * torch.nan, {}))
    out.loss.backward()
    assert not bool(out.finite)
    assert torch.equal(before, head.rows)
    assert x.grad is not None
    assert (x.grad == 0).all()


def test_curricular_hard_negatives_do_not_overflow() -> None:
    """A hard negative's logit reaches s·t(τ + t), beyond s; float32 against float64."""
    losses = []
    for rows in ("float32", "float64"):
        margin = variant(AnyMargin, name="curricular", scale=64, m=0.5)
        head = PartialFC(HeadConfig(margin=margin, rows=rows), 4, 8, Ranks(), seed=0)
        head.margin.state()["margin_tau"].fill_(0.7)
        head.rows.copy_(torch.eye(8)[:4])
        x = torch.zeros(1, 8)
        x[0, 0], x[0, 1] = 0.43, 0.9
        losses.append(head(x.to(head.rows.dtype).requires_grad_(), torch.tensor([0]), 0).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[1] == pytest.approx(95.846, abs=0.01)


def test_filter_looks_at_the_cosine_not_at_the_reweighted_logit() -> None:
    losses = []
    for threshold in (0.0, 0.85):
        margin = {"name": "curricular", "m": 0.3, "inter_class_filter": threshold}
        head = PartialFC(config(margin=margin), 3, 3, Ranks(), seed=0)
        head.rows.copy_(torch.eye(3))
        x = torch.tensor([[0.43, 0.9, 0.0]], dtype=torch.float64).requires_grad_()
        losses.append(head(x, torch.tensor([0]), 0).loss.item())
    assert losses[1] < losses[0] - 1.0


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_another_forward_in_between_does_not_disturb(rate: float) -> None:
    plain, disturbed = build(sample_rate=rate), build(sample_rate=rate)
    a, b = batch(), batch()
    plain(a, LABELS, 0).loss.backward()
    loss = disturbed(b, LABELS, 0).loss
    with torch.no_grad():
        disturbed(batch(4, 1), torch.tensor([5]), 9)
    loss.backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(plain.rows, disturbed.rows, rtol=1e-12, atol=0.0)


def test_backward_after_the_rows_moved_is_refused() -> None:
    head = build()
    first, second = head(batch(), LABELS, 0).loss, head(batch(1), LABELS, 1).loss
    first.backward()
    with pytest.raises(RuntimeError, match="rows were updated between"):
        second.backward()
    with pytest.raises(RuntimeError, match="called twice"):
        first.backward()


def _few_draws(ranks: Ranks, impl: str) -> list[Tensor]:
    """Deferred steps in which a rank may draw nothing; all rows together."""
    settings = {"momentum": 0.9, "weight_decay": 0.1}
    head = PartialFC(config(impl, sample_rate=0.01, optimizer=settings), 103, DIM, ranks, seed=3)
    head.set_lr(0.5)
    for step in range(4):
        with head.deferred():
            x = batch(step, 4) if ranks.rank == 0 else batch(step, 4).detach()[:0].requires_grad_()
            labels = torch.tensor([1, 5, 5, 20]) if ranks.rank == 0 else torch.empty(0, dtype=torch.int64)
            head(x, labels, step).loss.backward()
        head.apply_update()
    rows = head.shard_state()["rows"]
    return [getattr(rows, "full_tensor", lambda: rows)().detach()]


def test_a_rank_that_draws_nothing_still_counts_the_step() -> None:
    truth = _few_draws(Ranks(), "reference")[0]
    torch.testing.assert_close(run_ranks(_few_draws, 2, "fused")[0][0], truth, rtol=1e-10, atol=1e-12)


def test_small_things() -> None:
    with pytest.raises(DataError, match=r"label 500 .* 31 classes"):
        build()(batch(), torch.tensor([31, 500, -1, 2, 2]), 0)
    with pytest.raises(ValueError, match="exact in float32 up to 78"):
        build(rows="float32", margin={"scale": 100})
    with pytest.raises(ConfigError, match="weight_decay"):
        build(lr=1.0, sample_rate=0.3, optimizer=variant(AnyRowOptimizer, weight_decay=1.0))
    empty = torch.randn(0, DIM, dtype=torch.float64).requires_grad_()
    for k in (1, 2):
        for rate in (1.0, 0.3):
            head = build(sub_centers=k, sample_rate=rate)
            head(empty, torch.empty(0, dtype=torch.int64), 0).loss.backward()
            assert torch.isfinite(head.rows).all()


def test_centres_in_host_memory_need_a_sample_rate() -> None:
    """A device of another kind than the rank's stands for the host; with all rows every centre would travel."""
    centers = torch.empty(CLASSES, DIM, device="meta")
    bank = DirectCompat(centers, torch.zeros(CLASSES), torch.ones(CLASSES, dtype=torch.bool), 1.0, 1.0)
    with pytest.raises(ConfigError, match=r"compat.centers = host with head.sample_rate = 1"):
        PartialFC(config(), CLASSES, DIM, Ranks(), seed=0, compat=bank)
    PartialFC(config(sample_rate=0.5), CLASSES, DIM, Ranks(), seed=0, compat=bank)


def test_the_reference_with_adamw_can_be_saved_before_its_first_step() -> None:
    head = build(impl="reference", optimizer=variant(AnyRowOptimizer, name="adamw"))
    saved = copy.deepcopy(head.shard_state())
    head(batch(), LABELS, 0).loss.backward()
    assert saved["adam_step"] == 0
    assert head.shard_state()["adam_step"] == 1


def test_loading_into_a_head_that_trained_on() -> None:
    head = build(sample_rate=0.3)
    head(batch(), LABELS, 0).loss.backward()
    state = head.shard_state()
    kept = copy.deepcopy(state)
    for step in range(1, 4):
        head(batch(step), LABELS, step).loss.backward()
    for name, tensor in state.items():
        tensor.copy_(kept[name])
    head.load_shard_state()
    assert torch.equal(head.shard_state()["rows"], kept["rows"])
