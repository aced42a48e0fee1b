"""The fused head equals the reference, and W ranks equal one, after several steps including momentum."""

import contextlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.head.cases import Case, draw_negatives, largest_difference, run_head
from tests.ranks import run_ranks
from tests.sections import variant
from trainer.distributed import Ranks
from trainer.head.config import AnyMargin, AnyRowOptimizer, HeadConfig
from trainer.head.partial_fc import PartialFC

TIGHT = 1e-9  # float64, after several steps; the scale 16 multiplies rounding errors in every exponent


def config(impl: str = "auto", **changes: object) -> HeadConfig:
    margin = {
        "name": "cosface",
        "scale": 16,
        "m": 0.3,
        "lower_norm": 1,
        "upper_norm": 8,
        "m1": 1.2,
        "m2": 0.3,
        "m3": 0.1,
    }
    margin |= changes.pop("margin", {})  # type: ignore[arg-type]
    values = {"impl": impl, "rows": "float64", "chunk_rows": 20, "margin": variant(AnyMargin, **margin)} | changes
    if impl == "reference":
        del values["chunk_rows"]
    return HeadConfig(**values)  # type: ignore[arg-type]


def single(head: HeadConfig, case: Case) -> list[dict]:
    return [run_head(Ranks(), head, case)]


MARGINS = ["softmax", "cosface", "arcface", "combined", "adaface", "magface"]


@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize("name", MARGINS)
def test_fused_equals_reference(name: str, rate: float) -> None:
    for compat in (False, True):
        case = Case(compat=compat)
        changes = {"margin": {"name": name}, "sample_rate": rate}
        assert largest_difference(single(config(**changes), case), single(config("reference", **changes), case)) < TIGHT


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_without_momentum_fused_equals_reference(rate: float) -> None:
    changes = {"optimizer": variant(AnyRowOptimizer, momentum=0.0), "sample_rate": rate}
    for case in (Case(compat=True), Case(accumulate=2)):
        ours, theirs = single(config(**changes), case), single(config("reference", **changes), case)
        assert largest_difference(ours, theirs) < TIGHT
        assert "momentum" not in ours[0].keys() | theirs[0].keys()


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_filter_correction_and_straight_through_equal_reference(rate: float) -> None:
    margin = {"name": "arcface", "m": 0.5, "gradient": "straight_through", "inter_class_filter": 0.3}
    changes = {"margin": margin, "sample_rate": rate, "sampling_correction": rate < 1}
    case = Case()
    assert largest_difference(single(config(**changes), case), single(config("reference", **changes), case)) < TIGHT


def test_adamw_equals_torch_when_all_rows_are_drawn() -> None:
    # the last bits of tiny gradients reach the rows through Adam's division by their root
    changes = {"optimizer": variant(AnyRowOptimizer, name="adamw", weight_decay=0.05)}
    case = Case(lr=0.01, compat=True)
    assert largest_difference(single(config(**changes), case), single(config("reference", **changes), case)) < 1e-7


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_equal_one_process(world_size: int) -> None:
    for impl, changes in (
        ("fused", {"sample_rate": 0.3, "margin": {"name": "magface"}}),
        ("fused", {"margin": {"name": "curricular"}, "sub_centers": 2, "sample_rate": 0.5}),
        ("fused", {"optimizer": variant(AnyRowOptimizer, name="adamw"), "sample_rate": 0.3}),
        ("reference", {"sample_rate": 0.3, "margin": {"name": "magface"}}),
    ):
        head = config(impl, **changes)
        case = Case(compat="sub_centers" not in changes, empty_rank=1)
        parts = run_ranks(run_head, world_size, head, case)
        assert largest_difference(parts, single(head, case)) < TIGHT, (impl, changes)


def test_more_ranks_than_some_have_rows() -> None:
    case = Case(classes=5, batch=6)  # ranks own 2, 2, 1 and 0 classes
    head = config(sample_rate=0.5)
    assert largest_difference(run_ranks(run_head, 4, head, case), single(head, case)) < TIGHT


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_negative_control_another_draw_of_the_same_rows_differs(impl: str) -> None:
    """Where all rows take part the seed of the draw changes nothing; where some are drawn, seed and step do."""
    x = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y = torch.tensor([0, 3, 3, 29, 11, 7])

    def loss(rate: float, seed: int, step: int) -> float:
        head = PartialFC(config(impl, sample_rate=rate), 103, 8, Ranks(), seed=seed)
        head.rows.copy_(PartialFC(config(impl), 103, 8, Ranks(), seed=0).rows)
        return head(x, y, step).loss.item()

    assert loss(1.0, 3, 0) == loss(1.0, 4, 5)
    first = loss(0.3, 3, 0)
    assert first == loss(0.3, 3, 0)
    assert abs(first - loss(0.3, 4, 0)) > 1e-3
    assert abs(first - loss(0.3, 3, 1)) > 1e-3


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("correction", [False, True])
def test_sampling_correction_by_the_dense_formula(impl: str, correction: bool) -> None:
    """log C/S is added to the logits of the classes that only the draw brought in, and to no other."""
    changes = {"sample_rate": 0.25, "sampling_correction": correction}
    head = PartialFC(config(impl, **changes), 40, 8, Ranks(), seed=1)
    x = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    y = torch.tensor([0, 3, 3, 29, 11, 7])
    step = 5
    drawn = torch.zeros(40, dtype=torch.bool)
    drawn[draw_negatives(1, step, 40, 0.25, 0, 40)] = True
    own = torch.zeros(40, dtype=torch.bool)
    own[y] = True
    assert (drawn & own).any()
    weight = torch.where(drawn | own, 0.0, -torch.inf).double()
    if correction:
        weight[drawn & ~own] = math.log(40 / 10)
    z = x.detach().clone().requires_grad_()
    cosine = torch.nn.functional.normalize(z) @ torch.nn.functional.normalize(head.rows.clone()).T
    logits = 16 * (cosine - 0.3 * torch.nn.functional.one_hot(y, 40).double()) + weight
    truth = torch.nn.functional.cross_entropy(logits, y)
    truth.backward()
    loss = head(x, y, step).loss
    loss.backward()
    assert loss.item() == pytest.approx(truth.item(), abs=1e-10)
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_deferred_update_equals_fused(world_size: int, rate: float) -> None:
    """Two batches of one update, collected, equal the reference's dense accumulation."""
    changes = {"sample_rate": rate}
    case = Case(accumulate=2, compat=True)
    parts = (
        single(config(**changes), case) if world_size == 1 else run_ranks(run_head, world_size, config(**changes), case)
    )
    assert largest_difference(parts, single(config("reference", **changes), case)) < TIGHT


def error_of(changes: dict, case: Case) -> tuple[float, float]:
    """Errors against float64 of the fused pass and of the reference, both in float32."""
    exact = single(config("reference", **changes), case)
    short = {"rows": "float32"} | changes
    return (
        largest_difference(single(config("fused", **short), case), exact),
        largest_difference(single(config("reference", **short), case), exact),
    )


@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_float32_error_is_of_the_reference_s_own_size(rate: float) -> None:
    case = Case(classes=1003, dim=48, batch=37, steps=3)
    fused, reference = error_of({"margin": {"scale": 64, "m": 0.4}, "sample_rate": rate, "chunk_rows": 100}, case)
    assert fused < 3 * reference, (fused, reference)


@settings(max_examples=25, deadline=None)
@given(
    classes=st.integers(1, 70),
    dim=st.integers(2, 9),
    batch=st.integers(1, 12),
    chunk=st.integers(1, 40),
    rate=st.sampled_from([1.0, 0.7, 0.2, 0.01]),
)
def test_any_shape(classes: int, dim: int, batch: int, chunk: int, rate: float) -> None:
    case = Case(classes=classes, dim=dim, batch=batch, steps=2)
    changes = {"sample_rate": rate, "chunk_rows": chunk}
    assert largest_difference(single(config(**changes), case), single(config("reference", **changes), case)) < TIGHT


def test_one_class_and_equal_labels() -> None:
    for case in (Case(classes=1, ignored=False), Case(classes=2, batch=9, ignored=False)):
        ours, theirs = single(config(), case), single(config("reference"), case)
        assert largest_difference(ours, theirs) < TIGHT
    assert single(config(), Case(classes=1, ignored=False))[0]["loss"][0] == pytest.approx(0.0, abs=1e-12)


def test_bfloat16_compute_is_close() -> None:
    """The stated error of bfloat16 products, 0.3 % of the gradient's norm; a wrong term would give far more."""
    case = Case(classes=1003, dim=64, batch=32, steps=1)
    exact = single(config(sample_rate=0.5), case)[0]["gradient"][0]
    ours = single(config(sample_rate=0.5, rows="float32", compute="bfloat16"), case)[0]["gradient"][0]
    error = (ours.double() - exact).norm() / exact.norm()
    assert 1e-5 < error < 3e-3, error


def cosines_at_bound(sign: float) -> dict:
    """All rows equal ``sign`` · the embeddings' direction; scale 64."""
    from trainer.head.partial_fc import PartialFC

    head = PartialFC(config(rows="float32", margin={"scale": 64, "m": 0.5}), 5000, 8, Ranks(), seed=0)
    direction = torch.zeros(8)
    direction[0] = 1.0
    head.rows.copy_((sign * direction).expand_as(head.rows))
    x = (3 * direction).repeat(4, 1).requires_grad_()
    result = head(x, torch.arange(4), 0)
    result.loss.backward()
    return {"loss": result.loss.item(), "finite": bool(result.finite), "gradient": x.grad, "rows": head.rows}


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_no_overflow_or_underflow_at_the_bounds(sign: float) -> None:
    out = cosines_at_bound(sign)
    # all cosines equal: log(exp(-s m) + C - 1) + s m
    expected = 32 + torch.log(torch.exp(torch.tensor(-32.0, dtype=torch.float64)) + 4999).item()
    assert out["finite"]
    assert out["loss"] == pytest.approx(expected, rel=1e-6)
    assert torch.isfinite(out["gradient"]).all()
    assert torch.isfinite(out["rows"]).all()


def nonfinite(ranks: Ranks, rate: float, deferred: bool, impl: str = "fused") -> bool:
    """Whether a NaN on the last rank leaves every rank's rows and state as they were, and is reported on every rank."""
    from trainer.head.partial_fc import PartialFC

    torch.manual_seed(ranks.rank)
    head = PartialFC(config(impl, sample_rate=rate), 103, 16, ranks, seed=0)
    head.set_lr(0.1)
    x = torch.randn(4, 16, dtype=torch.float64)
    y = torch.randint(0, 103, (4,))
    head(x.clone().requires_grad_(), y, 0).loss.backward()
    head.flush()
    before = [t.clone() for t in head.softmax.tables().values()]
    if ranks.rank == ranks.world_size - 1:
        x[2, 3] = torch.nan
    bad = x.clone().requires_grad_()
    if deferred:
        with head.deferred():
            result = head(bad, y, 1)
            result.loss.backward()
        head.discard_update()
    else:
        result = head(bad, y, 1)
        result.loss.backward()
    head.flush()
    same = all(torch.equal(a, b) for a, b in zip(before, head.softmax.tables().values(), strict=True))
    assert bad.grad is not None
    return same and not bool(result.finite) and bool((bad.grad == 0).all())


@pytest.mark.parametrize(("rate", "deferred"), [(1.0, False), (0.3, False), (0.3, True)])
def test_a_non_finite_step_changes_nothing_on_any_rank(rate: float, deferred: bool) -> None:
    assert all(run_ranks(nonfinite, 2, rate, deferred))
    assert nonfinite(Ranks(), rate, deferred)
    assert nonfinite(Ranks(), rate, deferred, "reference")


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_a_step_is_judged_by_its_own_verdict(impl: str) -> None:
    """A second forward before the first one's backward, deferred and not finite, changes nothing in that."""
    rows = []
    for second in (False, True):
        head = PartialFC(config(impl), 103, 16, Ranks(), seed=0)
        head.set_lr(0.1)
        x = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        loss = head(x.clone().requires_grad_(), torch.arange(4), 0).loss
        before = head.rows.clone()
        if second:
            with head.deferred():
                head(x.clone().fill_(torch.nan).requires_grad_(), torch.arange(4), 1)
        loss.backward()
        assert not torch.equal(head.rows, before)
        rows.append(head.rows.clone())
    assert torch.equal(*rows)


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_a_deferred_batch_alone_equals_one_applied_at_once(rate: float) -> None:
    """Its rows are distinct, so that no gradients are merged; chunks of a few rows, whose parts are put together."""
    tables = []
    for deferred in (False, True):
        head = PartialFC(config(sample_rate=rate, chunk_rows=7), 103, 16, Ranks(), seed=0)
        head.set_lr(0.1)
        for step in range(3):
            x = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(step)).requires_grad_()
            with head.deferred() if deferred else contextlib.nullcontext():
                head(x, torch.tensor([3, 50, 50, 102]), step).loss.backward()
            head.apply_update()
        head.flush()
        tables.append(head.softmax.tables())
    for one, other in zip(*(each.values() for each in tables), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
