"""The frozen classifier: any number of ranks is the plain formula, whatever is masked, with one collective."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.ranks import run_ranks
from trainer.compat.methods import losses
from trainer.distributed import Ranks
from trainer.errors import ConfigError
from trainer.head.frozen import FrozenClassifier, FrozenRows
from trainer.head.kernels import Kernels
from trainer.head.partition import class_range

BATCH, DIM = 9, 5
MASKS = {"none": (), "some": (0, 5), "first rank's": (0, 1, 2, 3), "all": tuple(range(8))}
CASES: list[tuple[int, str, dict[str, Any]]] = [
    (8, "none", {}),
    (8, "some", {}),
    (8, "first rank's", {}),
    (8, "all", {}),
    (4, "none", {}),
    (8, "some", {"margin": 0.2, "sample_rate": 0.4}),
]


def problem(classes: int, masked: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (B, D), labels (B,), unit rows (C, D), mask (C,)."""
    generator = torch.Generator().manual_seed(classes)
    x = torch.randn(BATCH, DIM, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, classes, (BATCH,), generator=generator)
    rows = torch.nn.functional.normalize(torch.randn(classes, DIM, generator=generator, dtype=torch.float64))
    mask = torch.ones(classes, dtype=torch.bool)
    mask[list(MASKS[masked])] = False
    return x, labels, rows, mask


def classifier(ranks: Ranks, classes: int, masked: str, dtype: torch.dtype, **more: Any) -> FrozenClassifier:
    _, _, rows, mask = problem(classes, masked)
    own = class_range(classes, ranks.rank, ranks.world_size)
    part = slice(own.start, own.stop)
    known = FrozenRows(rows[part][mask[part]].to(dtype), mask[part], own)
    settings: dict[str, Any] = {"scale": 16.0, "kernels": Kernels(2, compiled=False), "compute": torch.float32}
    return FrozenClassifier(known, **(settings | more))


def one_case(ranks: Ranks, classes: int, masked: str, more: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    x, labels, _, _ = problem(classes, masked)
    x = x.to(torch.float32 if dtype != torch.float64 else dtype).requires_grad_()
    reduced = []
    real = dist.all_reduce
    dist.all_reduce = lambda *given, **named: reduced.append(given[0].numel()) or real(*given, **named)
    try:
        loss, count = classifier(ranks, classes, masked, dtype, **more).loss(x, labels, 3)
        (2 * loss).backward()
    finally:
        dist.all_reduce = real
    assert x.grad is not None
    return {"loss": loss.item(), "count": int(count), "x": x.grad.double(), "reduced": reduced}


def all_cases(ranks: Ranks) -> list[dict[str, Any]]:
    return [one_case(ranks, *case, torch.float64) for case in CASES]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_number_of_ranks(world: int) -> None:
    """With 4 classes on 3 ranks the last one owns none."""
    results = [all_cases(Ranks())] if world == 1 else run_ranks(all_cases, world)
    alone = all_cases(Ranks())
    for number, (classes, masked, more) in enumerate(CASES):
        x, labels, rows, mask = problem(classes, masked)
        x.requires_grad_()
        valid = labels >= 0
        each = [result[number] for result in results]
        got = sum(one["x"] for one in each)
        assert {one["loss"] for one in each} == {each[0]["loss"]}
        assert [one["reduced"] for one in each] == ([[3 * BATCH]] * world if world > 1 else [[]])
        assert each[0]["count"] == int(mask[labels[valid]].sum())
        if "sample_rate" in more:  # which classes are drawn does not depend on the ranks
            assert each[0]["loss"] == pytest.approx(alone[number]["loss"], rel=1e-12)
            torch.testing.assert_close(got, alone[number]["x"], rtol=1e-10, atol=1e-13)
            continue
        if masked == "all":
            assert each[0]["loss"] == 0
            assert not got.any()
            continue
        loss = losses.bct(x[valid], labels[valid], rows, mask, 16.0)
        (2 * loss).backward()
        assert each[0]["loss"] == pytest.approx(loss.item(), rel=1e-12)
        torch.testing.assert_close(got, x.grad, rtol=1e-10, atol=1e-13)


def test_sampling_leaves_classes_out() -> None:
    whole, drawn = (one_case(Ranks(), 8, "some", {"sample_rate": rate}, torch.float64) for rate in (1.0, 0.2))
    assert drawn["loss"] < whole["loss"]
    assert drawn["count"] == whole["count"]


@pytest.mark.parametrize(("dtype", "compute", "allowed"), [("float32", "float32", 1e-5), ("bfloat16", "bfloat16", 0.1)])
def test_lower_precision(dtype: str, compute: str, allowed: float) -> None:
    exact = one_case(Ranks(), 8, "some", {}, torch.float64)
    found = one_case(Ranks(), 8, "some", {"compute": getattr(torch, compute)}, getattr(torch, dtype))
    assert abs(found["loss"] - exact["loss"]) < allowed
    assert (found["x"] - exact["x"]).abs().max() < allowed


def test_a_scale_too_large_for_float32_is_refused() -> None:
    with pytest.raises(ConfigError, match="78"):
        classifier(Ranks(), 8, "none", torch.float32, scale=100.0)
