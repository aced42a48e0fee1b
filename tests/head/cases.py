"""What the head's tests share: small cases, and one run of a head on this rank's slice of a global batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.data import slice_of
from trainer.distributed import Ranks
from trainer.head.config import HeadConfig
from trainer.head.old_centers import DirectCompat
from trainer.head.partial_fc import PartialFC
from trainer.head.partition import class_range
from trainer.head.sampling import Draw


@dataclass(frozen=True)
class Case:
    """C classes, D dimensions, B samples a step; ``empty_rank`` hands in nothing, its samples go to rank 0."""

    classes: int = 103
    dim: int = 16
    batch: int = 13
    steps: int = 4
    compat: bool = False
    lr: float = 0.1
    seed: int = 3
    empty_rank: int | None = None
    ignored: bool = True
    accumulate: int = 1


def draw_negatives(seed: int, step: int, total: int, rate: float, start: int, stop: int) -> Tensor:
    """The classes drawn in [start, stop), counted from ``start``."""
    return Draw.of(seed, step, total, rate).negatives(start, stop)


def make_bank(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Random unit centres (C, D), boundaries (C,) and a mask (C,) that leaves out about a third of the classes."""
    generator = torch.Generator().manual_seed(17)
    centers = torch.randn(case.classes, case.dim, generator=generator, dtype=torch.float64)
    boundaries = torch.rand(case.classes, generator=generator, dtype=torch.float64)
    mask = torch.rand(case.classes, generator=generator) < 0.7
    return torch.nn.functional.normalize(centers).to(dtype), boundaries.to(dtype), mask


def batches(case: Case, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """The global batches: random embeddings, labels with repetitions and with −1 (no class)."""
    generator = torch.Generator().manual_seed(29)
    out = []
    for _ in range(case.steps * case.accumulate):
        x = torch.randn(case.batch, case.dim, generator=generator, dtype=torch.float64).to(dtype)
        y = torch.randint(-1 if case.ignored else 0, case.classes, (case.batch,), generator=generator)
        if case.batch > 2:
            y[-1] = y[0]
        out.append((x, y))
    return out


def own_slice(case: Case, ranks: Ranks) -> slice:
    """The samples that this rank hands in."""
    if case.empty_rank is None or ranks.world_size == 1:
        return slice_of(case.batch, ranks.rank, ranks.world_size)
    others = [r for r in range(ranks.world_size) if r != case.empty_rank]
    if ranks.rank == case.empty_rank:
        return slice(0, 0)
    return slice_of(case.batch, others.index(ranks.rank), len(others))


def run_head(ranks: Ranks, config: HeadConfig, case: Case) -> dict[str, Any]:
    """Train a head for some steps; this rank's losses, reports, embedding gradients by step, and its rows and state."""
    dtype = torch.float64 if config.rows == "float64" else torch.float32
    compat = None
    if case.compat:
        mine = class_range(case.classes, ranks.rank, ranks.world_size)
        centers, boundaries, mask = (t[mine.start : mine.stop] for t in make_bank(case, dtype))
        compat = DirectCompat(centers, boundaries, mask, 2.0, 1.0)
    head = PartialFC(config, case.classes, case.dim, ranks, seed=case.seed, compat=compat)
    head.set_lr(case.lr)
    take = own_slice(case, ranks)
    out: dict[str, Any] = {"loss": [], "report": [], "gradient": [], "start": head.classes.start}
    data = batches(case, dtype)
    for step in range(case.steps):
        for x, y in data[step * case.accumulate : (step + 1) * case.accumulate]:
            local = x[take].clone().requires_grad_()
            if case.accumulate == 1:
                result = head(local, y[take], step)
                result.loss.backward()
            else:
                with head.deferred():
                    result = head(local, y[take], step)
                (result.loss / case.accumulate).backward()
            assert local.grad is not None
            out["loss"].append(result.loss.item())
            out["report"].append({k: v.item() for k, v in result.report.items() if v.dim() == 0})
            out["gradient"].append(local.grad)
        if case.accumulate > 1:
            head.apply_update()
    state = head.shard_state()
    for name in state.keys() & {"rows", "momentum", "first_moment", "second_moment"}:
        value = state[name]
        out[name] = (value.to_local() if hasattr(value, "to_local") else value).detach().clone()
    return out


def joined(parts: Sequence[dict[str, Any]], name: str) -> list[Tensor]:
    """A quantity of all ranks as one process has it: gradients by step, or one table."""
    if name == "gradient":
        return [torch.cat(step) for step in zip(*(p["gradient"] for p in parts), strict=True)]
    return [torch.cat([p[name] for p in parts])]


def largest_difference(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]]) -> float:
    """The largest difference of losses, reports, gradients, rows and state between two runs, given by their ranks."""
    worst = max(abs(p - q) for p, q in zip(a[0]["loss"], b[0]["loss"], strict=True))
    for part in a:
        assert part["loss"] == a[0]["loss"], "the ranks of one run disagree on the loss"
    for p, q in zip(a[0]["report"], b[0]["report"], strict=True):
        assert p.keys() == q.keys()
        worst = max(worst, *(abs(p[k] - q[k]) for k in p))
    for name in ("gradient", "rows", "momentum", "first_moment", "second_moment"):
        if name in a[0]:
            for p, q in zip(joined(a, name), joined(b, name), strict=True):
                worst = max(worst, (p.double() - q.double()).abs().max().item())
    return worst
