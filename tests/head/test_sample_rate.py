"""A sample rate that changes while a head trains: what it draws, that nothing is lost, and that a resumed run is the
same."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.head.cases import Case, batches, joined, make_bank, own_slice, run_head
from tests.ranks import run_ranks
from tests.sections import variant
from trainer.config import parse_section
from trainer.distributed import Ranks
from trainer.errors import ConfigError
from trainer.head.config import AnyMargin, AnyRowOptimizer, HeadConfig
from trainer.head.old_centers import DirectCompat
from trainer.head.partial_fc import PartialFC
from trainer.head.partition import class_range
from trainer.planning.memory import peak_bytes, rank_memory
from trainer.planning.plan import make_plan
from trainer.planning.setting import Setting
from trainer.run.config import Config, parse_config

UP = ((0, 0.2), (2, 0.5), (4, 1.0), (6, 0.3))
SAVED = (1, 3, 4, 5, 7)
"""Updates that begin with a checkpoint: before, at and behind every change."""
KINDS: dict[str, dict[str, Any]] = {
    "float64": {"rows": "float64"},
    "bfloat16": {"rows": "bfloat16"},
    "float8": {"rows": "float8", "optimizer": variant(AnyRowOptimizer, momentum=0.0)},
    "adamw": {"rows": "float64", "optimizer": variant(AnyRowOptimizer, name="adamw")},
}


def config(kind: str, rate: Any = UP) -> HeadConfig:
    margin = variant(AnyMargin, scale=16, m=0.3)
    base = {"margin": margin, "chunk_rows": 20, "optimizer": variant(AnyRowOptimizer, weight_decay=0.05)}
    return HeadConfig(**(base | KINDS[kind] | {"sample_rate": rate}))


def head_of(ranks: Ranks, kind: str, case: Case) -> PartialFC:
    mine = class_range(case.classes, ranks.rank, ranks.world_size)
    dtype = torch.float64 if "float64" in str(KINDS[kind]) else torch.float32
    centers, boundaries, mask = (t[mine.start : mine.stop] for t in make_bank(case, dtype))
    compat = DirectCompat(centers, boundaries, mask, 2.0, 1.0)
    head = PartialFC(config(kind), case.classes, case.dim, ranks, seed=3, compat=compat)
    head.set_lr(0.01 if kind == "adamw" else 0.1)
    return head


def losses(ranks: Ranks, kind: str, case: Case, folder: str, resume: int | None) -> dict[int, float]:
    """By update, with checkpoints before :data:`SAVED`, or continued from the one before ``resume``."""
    head, found, take = head_of(ranks, kind, case), {}, own_slice(case, ranks)
    if resume is not None:
        dcp.load(head.shard_state(), checkpoint_id=f"{folder}/{resume}")
        head.load_shard_state()
    for step, (x, y) in enumerate(batches(case, torch.float64)):
        if resume is not None and step < resume:
            continue
        if step in SAVED and step != resume:  # all rows are brought up to date, rounding included
            state = head.shard_state()
            if resume is None:
                dcp.save(state, checkpoint_id=f"{folder}/{step}")
        out = head(x[take].clone().requires_grad_(), y[take], step)
        out.loss.backward()
        found[step] = out.loss.item()
    return found


def resumed(ranks: Ranks, case: Case, folder: str) -> None:
    """Continued before, at and behind every change, on the same number of ranks: the losses to the last bit."""
    for kind in KINDS:
        truth = losses(ranks, kind, case, f"{folder}/{kind}", None)
        for step in SAVED:
            found = losses(ranks, kind, case, f"{folder}/{kind}", step)
            assert found == {at: loss for at, loss in truth.items() if at >= step}, (kind, step)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [102, 103])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_run_resumed_across_the_change_has_the_same_losses(world: int, classes: int, tmp_path: Path) -> None:
    case = Case(classes=classes, steps=9, empty_rank=1 if world == 3 else None)
    run_ranks(resumed, world, case, str(tmp_path))


def exact(ranks: Ranks, case: Case, impl: str) -> dict[str, Any]:
    changes = {} if impl == "reference" else {"chunk_rows": 20}
    margin = variant(AnyMargin, scale=16, m=0.3)
    optimizer = variant(AnyRowOptimizer, weight_decay=0.05)
    return run_head(
        ranks,
        HeadConfig(rows="float64", impl=impl, sample_rate=UP, margin=margin, optimizer=optimizer, **changes),
        case,
    )


@pytest.mark.parametrize("world", [1, 2])
def test_it_is_the_dense_formula_and_what_undrawn_rows_missed_is_not_lost(world: int) -> None:
    """The reference decays every row in every step."""
    case = Case(steps=8, compat=True)
    fused, plain = (run_ranks(exact, world, case, impl) for impl in ("fused", "reference"))
    for a, b in zip(fused, plain, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-12)
    for name in ("rows", "momentum", "gradient"):
        for p, q in zip(joined(fused, name), joined(plain, name), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_the_number_of_rows_follows_the_schedule() -> None:
    case = Case(steps=8, compat=True)
    head = head_of(Ranks(), "float64", case)
    owner = head.softmax.optimizer  # type: ignore[attr-defined]
    found = []
    for step, (x, y) in enumerate(batches(case, torch.float64)):
        seen: list[int] = []
        select = owner.select
        owner.select = lambda index, seen=seen, select=select: (
            seen.append(case.classes if index is None else len(index)) or select(index)
        )
        head(x.requires_grad_(), y, step).loss.backward()
        owner.select = select
        found.append(seen[0])
    assert all(21 <= n < 21 + 13 for n in found[:2])
    assert all(52 <= n < 52 + 13 for n in found[2:4])
    assert found[4:6] == [103, 103]
    assert all(31 <= n < 31 + 13 for n in found[6:])


def test_accumulated_batches_count_as_one_update(caplog: pytest.LogCaptureFixture) -> None:
    case = Case(accumulate=3)
    head = PartialFC(config("float64", ((0, 0.2), (2, 1.0))), case.classes, case.dim, Ranks(), seed=3, accumulate=3)
    with caplog.at_level("INFO"):
        assert [head._rate(step) for step in range(9)] == [0.2] * 6 + [1.0] * 3
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "head.sample_rate is 1 from update 2 on"  # once
    ]


@pytest.mark.parametrize(
    ("rate", "reason"),
    [
        ([[0, 0.1], [10, 0.5], [10, 1.0]], "update 10 stands behind update 10; give them in ascending order"),
        ([[0, 0.1], [-5, 0.5]], "update -5 stands behind update 0"),
        ([[5, 0.1]], "the first pair is for update 0"),
        ([], "the first pair is for update 0"),
        ([[0, 0.0], [10, 1.0]], "must be greater than 0 and less than or equal to 1"),
        ([[0, 0.1], [10, 1.5]], "must be greater than 0 and less than or equal to 1"),
        ([[0, 0.1], [10, 0.1]], "from update 10 on the share is 0.1, as before"),
        ([[0, 0.1], [1.5, 1.0]], "an update is a whole number"),
        ([[0, 0.1], [True, 1.0]], "expected a pair"),
        ([0, 0.1], "expected a pair of an update and a share"),
        ([[0, "much"]], "expected a number, or pairs"),
        ({"0": 0.1}, "expected a number, or pairs"),
        (0, "must be greater than 0"),
        (float("nan"), "must be greater than 0"),
        (True, "expected a number, not yes or no"),
        (None, "expected a number, or pairs"),
    ],
)
def test_what_is_no_sensible_schedule_is_refused(rate: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"sample_rate.*{re.escape(reason)}") as error:
        parse_section(HeadConfig, {"sample_rate": rate}, "test")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def run_config(rate: Any, **sections: dict[str, Any]) -> Config:
    tree: dict[str, Any] = {
        "run": {"dir": "unused"},
        "data": {"loader": "synthetic", "batch_size": 1024},
        "backbone": {"name": "small", "dim": 512},
        "head": {"sample_rate": rate},
    }
    for name, values in sections.items():
        tree.setdefault(name, {}).update(values)
    return parse_config(tree, "test")


def test_a_change_behind_the_end_is_refused_before_the_run() -> None:
    run_config([[0, 0.1], [99, 1.0]], train={"steps": 100})
    with pytest.raises(ConfigError, match="= 1 from update 100 on: the run ends after 100 updates"):
        run_config([[0, 0.1], [100, 1.0]], train={"steps": 100})


def test_the_plan_takes_the_rate_that_needs_most() -> None:
    def needed(rate: Any) -> int:
        return make_plan(setting(rate)).device_bytes

    def setting(rate: Any) -> Setting:
        return Setting(run_config(rate), 10_000_000, (112, 112), 8, "cuda", records=1_000_000)

    low, high, whole = (needed(rate) for rate in (0.1, 0.9, 1.0))
    assert low < high
    assert needed([[0, 0.1], [100, 0.9]]) == needed([[0, 0.9], [100, 0.1]]) == high
    assert needed([[0, 0.1], [100, 1.0]]) == max(low, whole)
    assert needed([[0, 0.9], [100, 1.0]]) == max(high, whole)
    one = setting([[0, 0.1], [100, 1.0]])
    assert peak_bytes(rank_memory(one, make_plan(one).backbone)) == needed([[0, 0.1], [100, 1.0]])
    assert not replace(one).sampled
