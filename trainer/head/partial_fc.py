"""The class-sharded head: a module that maps this rank's embeddings and labels to the loss of the global batch.

Per step it makes three collectives, whose bytes do not depend on the number of classes: an all-gather of embeddings
and labels (W·b·(4·D + 8) bytes in float32), an all-reduce of 2·B + 3 float64 numbers, and a reduce-scatter of the
embeddings' gradient (W·b·4·D bytes). (CurricularFace needs the target cosines before the negatives: one more
all-reduce of B numbers.)
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from trainer.distributed import (
    Labels,
    Ranks,
    as_sharded,
    class_mesh,
    gather_batch,
    gather_rows,
    one_thread,
    scale_gradient,
    send,
)
from trainer.errors import ConfigError, DataError
from trainer.head import native, triton_pass
from trainer.head.config import HeadConfig, SgdRowsConfig
from trainer.head.float8 import Float8Rows, Float8Table
from trainer.head.frozen import FrozenRows
from trainer.head.fused import FusedSoftmax, OldCenters
from trainer.head.kernels import Kernels
from trainer.head.margin import Margin, build_margin
from trainer.head.old_centers import DirectCompat
from trainer.head.partition import ClassRange, class_range
from trainer.head.reference import ReferenceSoftmax
from trainer.head.row_optimizer import RowOptimizer, build_row_optimizer
from trainer.head.sampling import Draw, draw_rows
from trainer.head.sizes import COMPILE_FROM_ROWS, chunk_rows, native_covers
from trainer.head.step import PassSettings, Softmax, Verdict
from trainer.randomness import block_seed

log = logging.getLogger(__name__)

INIT_BLOCK = 1024
"""Rows are initialised in blocks of so many classes, each seeded by its number, so that they do not depend on the
world size.
"""


@dataclass(frozen=True)
class HeadOutput:
    """What a step of the head gives.

    ``loss`` is the mean over the global batch, 0-dim, with gradient; ``finite`` is a 0-dim bool tensor, equal on all
    ranks: where it is False no row changes and the embeddings' gradient is zero. ``report`` holds detached tensors,
    0-dim and equal on all ranks, but for three distributions (``impl: reference`` has none of them):

    * ``target_cosines`` (B,): the global batch's cosines with their classes' rows, equal on all ranks; NaN: no class.
    * ``center_cosines`` and ``boundary_slack`` (P,), with LCE's direct mode: the cosines with the old centre, and how
      far above the boundary they lie, of the P samples whose class is this rank's; NaN: the class has no centre.
    """

    loss: Tensor
    report: dict[str, Tensor]
    finite: Tensor


class Companion(Protocol):
    """A loss besides the head's that every rank computes alike from the same gathered tensors (LCE through T).

    The factors that its gradient ∂L meets on the way back, with f the loss scale divided by the batches of an update
    and W the ranks (forward, each of them is 1)::

        L ── × f ──┬── the method's modules: f · ∂L
                   ├── × 1/f ── rows: ∂L, handed to the head of the rank that owns them
                   └── × 1/f ── × 1/W ── reduce-scatter, the sum of W equal gradients ── × f · W ── backbone

    f, 1/f and f · W stand in ``TrainTask`` (trainer/run/task.py), 1/W in :class:`PartialFC`. A wrapper such as DDP then
    divides by W, and the optimizer undoes f for the modules and the backbone alike.
    """

    def __call__(self, embeddings: Tensor, labels: Labels, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (0-dim, equal on all ranks) and what to report of it, detached.

        Args:
            embeddings: (B, D) of all ranks, as they come from the backbone.
            labels: (B,) of all ranks; −1: no class.
            rows: (u, D) classifier rows of the batch's classes that this rank owns, in ascending order of the classes
                (none with sub-centres).
        """


class PartialFC(nn.Module):
    """Margin softmax over C classes whose rows and optimizer state are sharded over all ranks (Partial FC, An et
    al., CVPR 2022).

    ``loss.backward()`` gives the gradient of the *global* mean with respect to this rank's embeddings: it is
    already summed over the ranks and must not be averaged again. It also updates the rows, chunk by chunk, with the
    gradient that arrives at ``loss``; so scale the embeddings' gradient, not the loss, where a wrapper (DDP)
    divides by W. Inside :meth:`deferred` rows' gradients are collected instead, for gradient accumulation and loss
    scaling, until :meth:`apply_update` or :meth:`discard_update`.

    Args:
        config: validated settings.
        num_classes: C.
        dim: D.
        ranks: this process among all.
        seed: seeds rows, drawing and stochastic rounding.
        compat: LCE's direct mode, fused into the pass; its centres are this rank's.
        local_batch: the largest number of samples that any rank hands in; None: the ranks agree on it each step, by
            one more (8-byte) collective.
        accumulate: steps of an update, which a schedule of the sample rate counts.

    Raises:
        ConfigError: settings that exclude each other, or a scale too large for float32.
        CenterBankError: the bank does not fit the rows.
    """

    def __init__(
        self,
        config: HeadConfig,
        num_classes: int,
        dim: int,
        ranks: Ranks,
        *,
        seed: int,
        compat: DirectCompat | None = None,
        local_batch: int | None = None,
        accumulate: int = 1,
    ) -> None:
        super().__init__()
        self.accumulate = accumulate
        self.config, self.dim, self.ranks, self.seed, self.local_batch = config, dim, ranks, seed, local_batch
        self.classes: ClassRange = class_range(num_classes, ranks.rank, ranks.world_size)
        _check(config, compat)
        if compat is not None:
            compat.check(self.classes.size, dim)
            if config.highest_rate == 1 and compat.centers.device.type != ranks.device.type:
                raise ConfigError(
                    "compat.centers = host with head.sample_rate = 1: every centre would be copied to the GPU in every "
                    "step; use compat.centers=device, or a sample rate below 1"
                )
        self.compat = compat
        old = None if compat is None else OldCenters(compat, compat.total(ranks.device))
        self.margin = build_margin(config.margin, ranks.device)
        rows = initial_rows(config, self.classes, dim, ranks.device, seed)
        batch = 1024 if local_batch is None else local_batch * ranks.world_size
        self.softmax = _build_softmax(config, rows, self.margin, num_classes, old, ranks, seed, batch)
        self._deferring = False
        self._mesh: DeviceMesh | None = None

    @property
    def rows(self) -> Tensor:
        """The classifier rows of this rank as they are stored, (c·K, D); not a parameter, the head updates it itself.
        With ``head.rows=float8`` these are E4M3's codes (uint8), see :mod:`trainer.head.float8`.
        """
        return self.softmax.rows

    def put_rows(self, first: int, rows: Tensor) -> None:
        """Start with these rows (n, D), of the rank's classes from ``first`` on (one row a class). Call
        :meth:`load_shard_state` at the end.
        """
        self.softmax.put(first, rows)

    def hold(self, known: FrozenRows) -> None:
        """Put these classes' rows (one row a class) where they are to stay, and forget what their optimizer remembers
        of gradients. Call it before the first update and after each. With ``mask`` on the host nothing waits.
        """
        self.softmax.put_at(send(known.mask.nonzero()[:, 0], self.rows.device), known.rows)

    def set_lr(self, lr: float) -> None:
        """The learning rate of the coming updates."""
        self.softmax.set_lr(lr)

    def gather_labels(self, labels: Tensor) -> Labels:
        """Gather the labels (b,) of a batch on their own, before its embeddings are known.

        Their copy on the host, of which the indexes of the step are made, is then there when :meth:`forward` asks.
        """
        return Labels.gather(labels, self.ranks.world_size, self._capacity(len(labels)))

    def forward(
        self, embeddings: Tensor, labels: Tensor | Labels, step: int, companion: Companion | None = None
    ) -> HeadOutput:
        """The loss of the global batch.

        Args:
            embeddings: (b, D) of this rank, not normalised; b may differ between ranks and be 0.
            labels: (b,) int64 in [−1, C); −1: no class, no term. Or what :meth:`gather_labels` made of them.
            step: number of the step, ``accumulate`` of which make an update; with the seed it decides which negatives
                are drawn.
            companion: a further loss of the gathered batch, added to the head's; see :class:`Companion`.
        """
        world = self.ranks.world_size
        if isinstance(labels, Labels):
            every = labels
            x = gather_rows(embeddings, world, len(every.device) // world)
        else:
            x, gathered = gather_batch(embeddings, labels, world, self._capacity(len(embeddings)))
            every = Labels(gathered)
        if (largest := every.host.max(initial=-1)) >= self.classes.total:
            raise DataError(f"label {largest} in a batch, but the head has {self.classes.total} classes")
        verdict = Verdict()  # settled below, read in backward
        x = _FiniteGradient.apply(x, verdict)
        with torch.no_grad(), one_thread():
            rate = self._rate(step)
            draw = Draw.of(self.seed, step, self.classes.total, rate) if rate < 1 else None
            drawn = draw_rows(every.host, self.classes, draw, x.device)
        rounding = hash((self.seed, step, self.classes.start)) & 0x7FFFFFFFFFFFFFFF
        done = self.softmax.step(
            x, every.device, drawn, verdict, training=self.training, deferred=self._deferring, seed=rounding
        )
        out = HeadOutput(done.loss, done.report, done.finite)
        out = self._with_companion(companion, x, every, done.own, out)
        verdict.finite = out.finite
        return out

    def _rate(self, step: int) -> float:
        """The sample rate of a step; a change is logged once."""
        update, part = divmod(step, self.accumulate)
        rate = self.config.rate_at(update)
        if part == 0 and (update, rate) in self.config.rates[1:] and self.ranks.rank == 0:
            log.info(
                "head.sample_rate is %g from update %d on: the loss sums over another number of classes", rate, update
            )
        return rate

    def _with_companion(
        self, companion: Companion | None, x: Tensor, labels: Labels, own: Tensor, out: HeadOutput
    ) -> HeadOutput:
        if companion is None:
            return out
        # Every rank computes the same loss of the same batch; the reduce-scatter adds up W equal gradients.
        loss, report = companion(scale_gradient(x, 1 / self.ranks.world_size), labels, own)
        finite = out.finite & torch.isfinite(loss.detach())
        return HeadOutput(out.loss + loss.to(out.loss.dtype), out.report | report, finite)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Collect the rows' gradients of the forward calls made inside, instead of updating; end with
        :meth:`apply_update`.
        """
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def apply_update(self, inverse_scale: float = 1.0) -> None:
        """Update the rows with the gradients collected since the last update, times ``inverse_scale``."""
        self.softmax.apply(inverse_scale)

    def discard_update(self) -> None:
        """Forget the collected gradients: the step is skipped."""
        self.softmax.discard()

    def flush(self) -> None:
        """Bring every row and its state up to date, also those that were not drawn for some time."""
        self.softmax.flush()

    def shard_state(self) -> dict[str, DTensor | Tensor]:
        """Everything a checkpoint must keep, for torch.distributed.checkpoint: (C·K, D) and (C·K,) tensors as
        DTensor ``Shard(0)`` over the live memory (loading writes in place), running statistics of the margin as
        plain tensors.
        """
        self.flush()
        tables = self.softmax.tables()
        state: dict[str, DTensor | Tensor] = {**self.margin.state(), **self.softmax.counters()}
        total = self.classes.total * self.config.sub_centers
        if not dist.is_initialized():
            return state | tables
        if self._mesh is None:
            self._mesh = class_mesh(self.ranks)  # once: each call may make a process group
        mesh = self._mesh
        return state | {name: as_sharded(table, total, mesh) for name, table in tables.items()}

    def load_shard_state(self) -> None:
        """Call after a checkpoint was loaded into the tensors of :meth:`shard_state`: what was collected is
        forgotten.
        """
        self.discard_update()
        self.softmax.loaded()

    def _capacity(self, local: int) -> int:
        if self.local_batch is not None:
            if local > self.local_batch:
                raise ValueError(f"{local} samples on a rank; the head was built for at most {self.local_batch}")
            return self.local_batch
        if self.ranks.world_size == 1:
            return local
        size = torch.tensor([local], device=self.ranks.device)
        dist.all_reduce(size, dist.ReduceOp.MAX)
        return int(size)


class _FiniteGradient(torch.autograd.Function):
    """Identity; zeroes the gradient if the step was not finite, which is known by the time backward runs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, verdict: Verdict) -> Tensor:
        ctx.verdict = verdict
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        with one_thread():
            return torch.where(ctx.verdict.finite, grads[0], 0.0), None


def initial_rows(
    config: HeadConfig, classes: ClassRange, dim: int, device: torch.device, seed: int
) -> Tensor | Float8Table:
    """Normal rows (c·K, D) with deviation ``init_std``; class j's do not depend on the world size (they do on the
    device's type).
    """
    k = config.sub_centers
    rows: Tensor | Float8Table
    if config.rows == "float8":
        rows = Float8Table.empty(classes.size * k, dim, device, config.rows_residual)
    else:
        rows = torch.empty(classes.size * k, dim, dtype=getattr(torch, config.rows), device=device)
    generator = torch.Generator(device)
    for block in range(classes.start // INIT_BLOCK, -(-classes.stop // INIT_BLOCK)):
        generator.manual_seed(block_seed(seed, block))
        values = torch.randn(INIT_BLOCK * k, dim, generator=generator, device=device)
        low, high = max(classes.start, block * INIT_BLOCK), min(classes.stop, (block + 1) * INIT_BLOCK)
        part = values[(low - block * INIT_BLOCK) * k : (high - block * INIT_BLOCK) * k] * config.init_std
        if isinstance(rows, Float8Table):
            rows.put((low - classes.start) * k, part)
        else:
            rows[(low - classes.start) * k : (high - classes.start) * k] = part
    return rows


def _build_softmax(
    config: HeadConfig,
    rows: Tensor | Float8Table,
    margin: Margin,
    num_classes: int,
    old: OldCenters | None,
    ranks: Ranks,
    seed: int,
    batch: int,
) -> Softmax:
    """The implementation of the step for these rows and about ``batch`` samples. Raises :class:`ConfigError` for one
    that does not run here.
    """
    sampled = config.rate_at(0) < 1
    optimizer: RowOptimizer
    if isinstance(rows, Float8Table):
        assert isinstance(config.optimizer, SgdRowsConfig), "HeadConfig refuses others"
        optimizer = Float8Rows(config.optimizer, rows, sampled, seed)
    elif config.impl == "reference":
        return ReferenceSoftmax(config, rows, margin, num_classes, old, ranks.world_size)
    else:
        optimizer = build_row_optimizer(config.optimizer, rows, sampled, seed)
    settings = PassSettings(
        scale=config.margin.scale,
        sub_centers=config.sub_centers,
        correction=config.sampling_correction,
        inter_class_filter=config.margin.inter_class_filter,
        compute=torch.bfloat16 if config.compute == "bfloat16" else optimizer.work,
        tf32=config.compute == "tf32",
    )
    cpu, large = ranks.device.type == "cpu", len(optimizer.rows) >= COMPILE_FROM_ROWS
    kernels = Kernels(chunk_rows(config.chunk_rows, ranks.device.type, batch), compiled=large)
    arguments = (settings, margin, optimizer, kernels, num_classes, old, not cpu)
    if config.impl == "triton":
        triton_pass.check(config, old, ranks.device)
        return triton_pass.TritonSoftmax(*arguments)
    wanted = config.impl == "native" or (large and cpu)
    if wanted and cpu and native_covers(config) and native.holds(old) and (library := native.load()):
        return native.NativeSoftmax(library, *arguments)
    if config.impl == "native":
        raise ConfigError(
            "head.impl = native: the C++ pass does not run here (it takes a CPU, a compiler, sgd on float32 or "
            "bfloat16 rows, one row a class, and a margin on the target alone); use head.impl=auto"
        )
    return FusedSoftmax(*arguments)


def _check(config: HeadConfig, compat: DirectCompat | None) -> None:
    if compat is not None and config.sub_centers > 1:
        raise ConfigError(
            "head.sub_centers > 1 with compat.mode direct: an old centre has no single new row to align with"
        )
