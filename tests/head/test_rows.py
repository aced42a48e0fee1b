"""What an update means for rows that were not drawn, in bfloat16, and across a checkpoint."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.head.cases import Case, batches, own_slice
from tests.ranks import run_ranks
from tests.sections import variant
from trainer.distributed import Ranks
from trainer.head import row_optimizer
from trainer.head.config import AnyMargin, AnyRowOptimizer, HeadConfig
from trainer.head.partial_fc import PartialFC
from trainer.head.row_optimizer import RowGradient, build_row_optimizer


def drive(
    name: str, steps: int, lr: list[float], dtype: torch.dtype = torch.float64, **more: float
) -> tuple[Any, list[Any]]:
    """Give random gradients to random rows; the optimizer after a flush, and what it was given."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20, 3, generator=generator, dtype=torch.float64).to(dtype)
    given: list[Any] = [rows.clone()]
    config = variant(AnyRowOptimizer, name=name, weight_decay=0.02, **more)
    optimizer = build_row_optimizer(config, rows, sampled=True, seed=0)
    for step in range(steps):
        index = torch.randperm(20, generator=generator)[:6]
        gradient = torch.randn(6, 3, generator=generator, dtype=torch.float64).to(dtype)
        optimizer.set_lr(lr[step])
        selection = optimizer.select(index)
        for start in (0, 4):
            stop = min(start + 4, 6)
            selection.open(start, stop)
        for start in (0, 4):
            stop = min(start + 4, 6)
            ones = torch.ones(stop - start, dtype=dtype)
            optimizer.update(
                selection, start, stop, RowGradient(None, None, ones * 0, gradient[start:stop], ones), None
            )
        optimizer.finish(index, None)
        given.append((index, gradient, lr[step]))
    optimizer.flush()
    return optimizer, given


@pytest.mark.parametrize("horizon", [1024, 7])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_undrawn_rows_of_sgd_move_as_with_a_dense_zero_gradient(
    momentum: float, horizon: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_optimizer, "HORIZON", horizon)
    rates = [0.3 / (1 + step) for step in range(60)]
    optimizer, given = drive("sgd", 60, rates, momentum=momentum)
    weight = torch.nn.Parameter(given[0])
    dense = torch.optim.SGD([weight], lr=1.0, momentum=momentum, weight_decay=0.02)
    for index, gradient, lr in given[1:]:
        weight.grad = torch.zeros_like(weight)
        weight.grad[index] = gradient
        dense.param_groups[0]["lr"] = lr
        dense.step()
    torch.testing.assert_close(optimizer.rows, weight.detach(), rtol=1e-10, atol=1e-12)
    if momentum:
        torch.testing.assert_close(optimizer.tables[1], dense.state[weight]["momentum_buffer"], rtol=1e-10, atol=1e-12)
    else:
        assert len(optimizer.tables) == 1


@pytest.mark.parametrize("rows", [1, 7, 20])
def test_the_sweep_over_all_rows_is_the_same_in_blocks_of_any_size(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = drive("sgd", 9, [0.3] * 9)
    monkeypatch.setattr(row_optimizer, "FLUSH_ROWS", {"cpu": rows})
    sizes: list[int] = []
    select = row_optimizer.SgdRows.select
    monkeypatch.setattr(
        row_optimizer.SgdRows, "select", lambda self, index: (sizes.append(len(index)), select(self, index))[1]
    )
    blocks, _ = drive("sgd", 9, [0.3] * 9)
    assert sum(sizes[9:]) == 20
    assert max(sizes[9:]) == rows
    for one, other in zip(whole.tables, blocks.tables, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_strong_decay_does_not_lose_rows() -> None:
    """Decay that shrinks a row to nothing within the horizon is swept in time."""
    optimizer, given = drive("sgd", 80, [1.0] * 80)
    weight = torch.nn.Parameter(given[0])
    dense = torch.optim.SGD([weight], lr=1.0, momentum=0.9, weight_decay=0.02)
    for index, gradient, _ in given[1:]:
        weight.grad = torch.zeros_like(weight)
        weight.grad[index] = gradient
        dense.step()
    torch.testing.assert_close(optimizer.rows, weight.detach(), rtol=1e-9, atol=1e-10)


def test_undrawn_rows_of_adamw_stand_still() -> None:
    """Each row is as if it had an AdamW of its own that saw only the steps in which it was drawn."""
    rates = [0.1 / (1 + step) for step in range(40)]
    optimizer, given = drive("adamw", 40, rates)
    for row in range(20):
        weight = torch.nn.Parameter(given[0][row].clone())
        own = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.02)
        for index, gradient, lr in given[1:]:
            place = (index == row).nonzero()
            if len(place):
                weight.grad = gradient[place[0, 0]]
                own.param_groups[0]["lr"] = lr
                own.step()
        torch.testing.assert_close(optimizer.rows[row], weight.detach(), rtol=1e-10, atol=1e-12)


def test_stochastic_rounding_is_unbiased_and_seeded() -> None:
    rows = torch.zeros(4096, 16, dtype=torch.bfloat16)
    optimizer = build_row_optimizer(variant(AnyRowOptimizer), rows, sampled=False, seed=1)
    value = torch.full((4096, 16), 1.0 + 0.3 * 2**-7)  # 30 % of the way from 1 to the next bfloat16
    optimizer.reseed(5)
    first = optimizer.round(value)
    assert set(first.flatten().tolist()) == {1.0, 1.0078125}
    up = (first > 1).double()
    assert up.mean().item() == pytest.approx(0.3, abs=0.01)
    assert up.mean(0).std().item() < 0.02  # alike in every column,
    assert up.mean(1).std().item() == pytest.approx((0.3 * 0.7 / 16) ** 0.5, rel=0.1)  # and independent along rows
    optimizer.reseed(5)
    assert torch.equal(first, optimizer.round(value))
    optimizer.reseed(6)
    assert not torch.equal(first, optimizer.round(value))


def test_small_updates_do_not_vanish_in_bfloat16() -> None:
    """1,000 steps of 1e-4 on rows of 1.0: round-to-nearest would leave them at 1 (a bfloat16 step there is 0.0078)."""
    rows = torch.ones(512, 8, dtype=torch.bfloat16)
    config = variant(AnyRowOptimizer, momentum=0.0, weight_decay=0.0)
    optimizer = build_row_optimizer(config, rows, sampled=False, seed=1)
    optimizer.set_lr(1.0)
    ones = torch.ones(512)
    for step in range(1000):
        optimizer.reseed(step)
        gradient = RowGradient(None, None, ones * 0, torch.ones(512, 8), ones * 1e-4)
        optimizer.update(optimizer.select(None), 0, 512, gradient, None)
        optimizer.finish(None, None)
    assert rows.float().mean().item() == pytest.approx(0.9, abs=2e-3)


@pytest.mark.parametrize(
    ("rows", "momentum", "residual", "allowed"),
    [
        ("bfloat16", 0.9, False, 2200),
        ("bfloat16", 0.0, False, 1050),
        ("float8", 0.0, False, 600),
        ("float8", 0.0, True, 1600),
    ],
)
@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_bytes_of_a_class(rate: float, rows: str, momentum: float, residual: bool, allowed: int) -> None:
    """All that a head holds, and what is planned for it."""
    optimizer = variant(AnyRowOptimizer, momentum=momentum)
    config = HeadConfig(rows=rows, sample_rate=rate, optimizer=optimizer, rows_residual=residual)
    head = PartialFC(config, 4096, 512, Ranks(), seed=0)
    owner = head.softmax.optimizer  # type: ignore[attr-defined]
    held = {t.untyped_storage().data_ptr(): t for t in vars(owner).values() if isinstance(t, torch.Tensor)}
    held |= {t.untyped_storage().data_ptr(): t for t in owner.tables}
    fixed = 40 * (row_optimizer.HORIZON + 2)  # of all rows together: what k missed steps come to
    assert sum(t.nbytes for t in held.values()) - fixed <= allowed * 4096


def config_for(optimizer: str, rows: str = "float64") -> HeadConfig:
    margin = variant(AnyMargin, name="adaface", scale=16, m=0.3)
    name, *more = optimizer.split()
    chosen = variant(AnyRowOptimizer, name=name, **({"momentum": 0.0} if more else {}))
    return HeadConfig(
        rows="float8" if "float8" in more else rows,
        rows_residual="residual" in more,
        margin=margin,
        sample_rate=0.3,
        chunk_rows=20,
        optimizer=chosen,
    )


def save_after_three(ranks: Ranks, optimizer: str, folder: str) -> list[float]:
    """Three steps, a checkpoint, two more steps: the losses of the last two."""
    return _steps(ranks, optimizer, folder, save=True)


def continue_from(ranks: Ranks, optimizer: str, folder: str) -> list[float]:
    """The same two steps from the checkpoint."""
    return _steps(ranks, optimizer, folder, save=False)


def _steps(ranks: Ranks, optimizer: str, folder: str, save: bool) -> list[float]:
    case = Case(steps=5)
    head = PartialFC(config_for(optimizer), case.classes, case.dim, ranks, seed=3)
    head.set_lr(0.01 if optimizer == "adamw" else 0.1)
    take, losses = own_slice(case, ranks), []
    if not save:
        dcp.load(head.shard_state(), checkpoint_id=folder)
        head.load_shard_state()
    for step, (x, y) in enumerate(batches(case, torch.float64)):
        if not save and step < 3:
            continue
        if step == 3 and save:
            dcp.save(head.shard_state(), checkpoint_id=folder)
        out = head(x[take].clone().requires_grad_(), y[take], step)
        out.loss.backward()
        losses.append(out.loss.item())
    return losses[-2:]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "sgd without", "sgd float8", "sgd float8 residual"])
def test_a_checkpoint_continues_at_any_world_size(optimizer: str, tmp_path: Any) -> None:
    """Rounding differs between world sizes: in float8 it shows from the second update on."""
    folder = str(tmp_path / "checkpoint")
    truth = run_ranks(save_after_three, 2, optimizer, folder)[0]
    assert run_ranks(continue_from, 2, optimizer, folder)[0] == truth  # to the last bit
    for world in (1, 3):
        found, exact = run_ranks(continue_from, world, optimizer, folder)[0], "float8" not in optimizer
        np.testing.assert_allclose(found[0], truth[0], rtol=1e-10 if exact else 1e-5)
        np.testing.assert_allclose(found, truth, rtol=1e-10 if exact else 0.02)


def counted(ranks: Ranks, classes: int) -> list[tuple[str, int]]:
    """The collectives of one step by name and bytes, as the process group is asked for them."""
    from torch.profiler import ProfilerActivity, profile

    head = PartialFC(config_for("sgd", "float32"), classes, 16, ranks, seed=3, local_batch=8)
    x, y = torch.randn(8, 16).requires_grad_(), torch.randint(0, classes, (8,))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        head(x, y, 0).loss.backward()
    found = []
    for event in trace.events():
        if event.name.startswith("gloo:"):
            found.append((event.name, int(np.prod(event.input_shapes[0] or [0]))))
    return found


def test_three_collectives_whatever_the_class_count() -> None:
    few, many = run_ranks(counted, 2, 100)[0], run_ranks(counted, 2, 3000)[0]
    names = [name for name, _ in few]
    assert len(names) == 3, names
    assert "gather" in names[0]
    assert "all_reduce" in names[1] or "allreduce" in names[1]
    assert "reduce_scatter" in names[2] or "reduce" in names[2]
    assert few == many
