"""Rows of one byte a number: the code, its rounding, and a head on them against float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.head.cases import Case, batches, make_bank, own_slice
from tests.ranks import run_ranks
from tests.sections import variant
from trainer.config import parse_section
from trainer.distributed import Ranks
from trainer.errors import ConfigError
from trainer.head.config import AnyMargin, AnyRowOptimizer, HeadConfig
from trainer.head.float8 import HALF, Float8Rows, Float8Table, decode, encode
from trainer.head.old_centers import DirectCompat
from trainer.head.partial_fc import PartialFC
from trainer.head.partition import class_range
from trainer.head.row_optimizer import RowGradient

NEAREST = torch.full((), HALF)


def config(rows: str = "float8", **changes: Any) -> HeadConfig:
    margin = variant(AnyMargin, scale=16, m=0.3)
    base: dict[str, Any] = {"optimizer": variant(AnyRowOptimizer, momentum=0.0), "margin": margin, "chunk_rows": 20}
    return HeadConfig(**(base | {"rows": rows} | changes))


def spacing(value: Tensor, scale: Tensor) -> Tensor:
    """The distance between E4M3's neighbours at a row's values, the smaller one where it changes."""
    return scale * torch.exp2(torch.floor(torch.log2((value / scale).abs().clamp_min(2.0**-6))) - 3)


def test_codes_are_those_of_torch() -> None:
    codes = torch.tensor([[code for code in range(256) if code & 0x7F != 0x7F]], dtype=torch.uint8)
    known = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(decode(codes, torch.ones(1, 1)), known)
    again, scale = encode(known, NEAREST)
    assert scale.item() == 1
    assert torch.equal(decode(again, scale), known)


def test_the_nearest_is_torch_s_own_and_any_size_of_row_fits() -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(200, 64, generator=generator) * torch.logspace(-20, 20, 200)[:, None]
    value[7] = 0
    codes, scale = encode(value, NEAREST)
    theirs = (value / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    torch.testing.assert_close(decode(codes, scale), theirs, rtol=0, atol=0)
    assert ((decode(codes, scale) - value).abs() <= 0.51 * spacing(value, scale)).all()


def test_stochastic_rounding_is_unbiased_seeded_and_stays_within_a_step() -> None:
    generator = torch.Generator().manual_seed(0)
    row = torch.cat(
        [torch.tensor([1.0, -1.0, 0.0]), torch.randn(125, generator=generator) * torch.logspace(-6, -1, 125)]
    )
    optimizer = Float8Rows(
        variant(AnyRowOptimizer, momentum=0.0), Float8Table.empty(8192, 128, row.device, False), False, 1
    )

    def rounded(seed: int) -> Tensor:
        optimizer.put(0, torch.zeros(8192, 128))
        optimizer.reseed(seed)
        optimizer.set_lr(1.0)
        gradient = RowGradient(None, None, torch.zeros(8192), -row.expand(8192, 128), torch.ones(8192))
        optimizer.update(optimizer.select(None), 0, 8192, gradient, None)
        return decode(*optimizer.tables)

    found, scale = rounded(5), optimizer.table.scale[0]
    step = spacing(row, scale)
    assert ((found - row).abs() < step * 1.0001).all()
    assert (found[:, :3] == row[:3]).all()
    assert ((found - row).mean(0) / step).abs().max() < 5 * 0.5 / 8192**0.5
    assert torch.equal(found, rounded(5))
    assert not torch.equal(found, rounded(6))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_small_updates_do_not_vanish(residual: bool, rate: float) -> None:
    """400 updates of 2.5e-4 on numbers of 0.5, whose neighbours are 0.03 apart."""
    table = Float8Table.empty(512, 8, torch.device("cpu"), residual)
    table.put(0, torch.tensor([1.0, *[0.5] * 7]).expand(512, 8))
    optimizer = Float8Rows(variant(AnyRowOptimizer, momentum=0.0, weight_decay=0.0), table, rate < 1, 1)
    optimizer.set_lr(1.0)
    down = torch.tensor([0.0, *[1.0] * 7]).expand(512, 8)
    for step in range(400):
        optimizer.reseed(step)
        index = torch.arange(512) if rate < 1 else None
        selection = optimizer.select(index)
        selection.open(0, 512)
        gradient = RowGradient(None, None, torch.zeros(512), down, torch.full((512,), 2.5e-4))
        optimizer.update(selection, 0, 512, gradient, None)
        optimizer.finish(index, None)
    found = decode(table.codes, table.scale)
    assert found[:, 1:].mean().item() == pytest.approx(0.4, abs=0.016 if residual else 2e-3)  # half of their distance
    if table.residual is not None:
        assert (found + table.residual)[:, 1:].mean().item() == pytest.approx(0.4, abs=1e-3)


def one_step(ranks: Ranks, changes: dict[str, Any], case: Case, steps: int) -> dict[str, Any]:
    """Some steps in float8, and the last of them in float64 too, from the same rows."""
    deferred = changes.pop("deferred", False)
    mine = class_range(case.classes, ranks.rank, ranks.world_size)
    heads = []
    for rows in ("float8", "float64"):
        compat = None
        if case.compat:
            parts = (
                t[mine.start : mine.stop]
                for t in make_bank(case, torch.float64 if rows == "float64" else torch.float32)
            )
            compat = DirectCompat(*parts, 2.0, 1.0)
        more = changes if rows == "float8" else {k: v for k, v in changes.items() if k != "rows_residual"}
        heads.append(PartialFC(config(rows, **more), case.classes, case.dim, ranks, seed=3, compat=compat))
        heads[-1].set_lr(case.lr)
    short, exact = heads
    owner = short.softmax.optimizer  # type: ignore[attr-defined]
    assert isinstance(owner, Float8Rows)
    take, out = own_slice(case, ranks), {}
    for step, (x, y) in enumerate(batches(replace(case, steps=steps), torch.float64)):
        last = step == steps - 1
        if last:
            short.flush()
            exact.rows.copy_(decode(owner.table.codes, owner.table.scale))
            rest = 0 if owner.table.residual is None else owner.table.residual.double()
        for head in heads if last else heads[:1]:
            local = x[take].to(torch.float64 if head is exact else torch.float32).requires_grad_()
            if deferred:
                with head.deferred():
                    result = head(local, y[take], step)
                result.loss.backward()
                head.apply_update()
            else:
                result = head(local, y[take], step)
                result.loss.backward()
            if last:
                out["exact" if head is exact else "short"] = (result.loss.item(), local.grad)
    for head in heads:
        head.flush()
    left = 0 if owner.table.residual is None else owner.table.residual.double()
    return out | {
        "rows": (decode(owner.table.codes, owner.table.scale).double() + left, exact.rows + rest),
        "scale": owner.table.scale.double(),
    }


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_a_step_is_float64_s_up_to_the_rounding_of_the_rows(rate: float, world: int) -> None:
    case = Case(compat=True, empty_rank=1 if world == 3 else None)
    kinds: list[dict[str, Any]] = [{}]
    if world == 1:
        kinds += [{"rows_residual": True}, {"deferred": True}, {"sub_centers": 2}]
    for kind in kinds:
        one = replace(case, compat="sub_centers" not in kind)
        for part in run_ranks(one_step, world, {"sample_rate": rate, **kind}, one, 4):
            (loss, gradient), (exact, theirs) = part["short"], part["exact"]
            assert loss == pytest.approx(exact, rel=1e-5)
            torch.testing.assert_close(gradient.double(), theirs, rtol=1e-3, atol=1e-5)
            rows, expected = part["rows"]
            # a row's largest number, and with it the scale, is rounded by a few units of float32
            bound = 1.001 * spacing(expected, part["scale"]) if "rows_residual" not in kind else expected.abs() * 2e-3
            assert ((rows - expected).abs() <= bound + 1e-6).all()


def test_what_is_not_float8_is_refused() -> None:
    for tree, message in (
        ({"rows": "float8"}, "sgd without momentum"),
        ({"rows": "float8", "optimizer": {"name": "adamw"}}, "sgd without momentum"),
        ({"rows_residual": True}, "belongs to rows float8"),
        ({"rows": "float8", "optimizer": {"momentum": 0}, "impl": "reference"}, "needs stochastic rounding"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_section(HeadConfig, tree, "test")


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_a_step_that_is_not_finite_changes_nothing(rate: float) -> None:
    """By a gate on the device, as on CUDA, and by the host."""
    for gated in (True, False):
        head = PartialFC(config(sample_rate=rate), 103, 16, Ranks(), seed=0)
        head.softmax.gated = gated  # type: ignore[attr-defined]
        head.set_lr(0.1)
        head(torch.randn(8, 16).requires_grad_(), torch.arange(8), 0).loss.backward()
        head.flush()
        before = [table.clone() for table in head.softmax.tables().values()]
        x = torch.full((8, 16), torch.nan).requires_grad_()
        head(x, torch.arange(8), 1).loss.backward()
        head.flush()
        for old, new in zip(before, head.softmax.tables().values(), strict=True):
            assert torch.equal(old, new)
