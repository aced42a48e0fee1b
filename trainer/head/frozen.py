"""A frozen classifier over all ranks: the fused pass without rows' gradients, optimizer state or updates.

BCT lets the old model's classifier judge the new embeddings. Its rows are sharded like the head's own, and the pass is
the head's (:mod:`trainer.head.fused`): chunks of rows, one constant shift, logits of size batch × rows never
held. Classes without an old row are left out of the stored rows, so that they are outside the softmax exactly and
cost nothing; their samples have no term. Memory beyond those rows: one int64 per local class, a byte per row in a
sampled step, and chunks.

Collectives: one all-reduce of 3·B float64 numbers in forward. The embeddings are the batch that the head has
gathered, and their gradient joins the head's on its way back: each rank adds what its own rows say.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from trainer.distributed import all_reduce_sum
from trainer.head.kernels import Kernels, exp_sum, softmax_weights
from trainer.head.partition import ClassRange
from trainer.head.products import matmul_precision, product
from trainer.head.sampling import Draw
from trainer.head.step import MASKED, constant_shift


@dataclass(frozen=True)
class FrozenRows:
    """The old rows of one rank's classes.

    Attributes:
        rows: (k, D) unit rows of the classes that have one, in the order of the classes.
        mask: (c,) bool, which of the rank's classes those are.
        classes: the rank's classes among all.
    """

    rows: Tensor
    mask: Tensor
    classes: ClassRange


class FrozenClassifier:
    """Cross entropy of ``scale · cos(x, o_j)``, the target's cosine less ``margin`` (CosFace), over fixed rows o_j.

    Args:
        known: this rank's rows, on its device.
        scale, margin: of the logits.
        kernels: chunk length and compilation of the element-wise work.
        compute: dtype that the matrix products take; sums are in float32, or float64 for float64 rows.
        tf32: whether CUDA may round float32 products' inputs.
        sample_rate: share of the classes that take part as negatives in a step, by the head's own draw (same seed,
            same step: the same classes), or that of a step; the batch's classes always do. The smaller sum is not
            corrected.
        seed: of the draw.

    Raises:
        ConfigError: the scale is too large for float32.
    """

    def __init__(
        self,
        known: FrozenRows,
        *,
        scale: float,
        margin: float = 0.0,
        kernels: Kernels,
        compute: torch.dtype,
        tf32: bool = False,
        sample_rate: float | Callable[[int], float] = 1.0,
        seed: int = 0,
    ) -> None:
        self.rows, self.mask, self.classes = known.rows, known.mask, known.classes
        self.work = torch.float64 if self.rows.dtype == torch.float64 else torch.float32
        self.compute = self.work if self.work == torch.float64 else compute
        self.scale, self.margin, self.kernels, self.tf32 = scale, margin, kernels, tf32
        self.sample_rate, self.seed = sample_rate, seed
        self.shift = constant_shift(scale, self.work, "use a lower scale: bct, unibct, ndpp and bt2 need it")
        self.row_of = torch.cumsum(self.mask, 0) - 1  # where a class's row stands, for those that have one

    def loss(self, embeddings: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The mean over the samples whose class has an old row, and how many those are; equal on all ranks.

        ``backward`` gives the gradient that *this rank's* rows cause: the ranks' gradients have to be added up.

        Args:
            embeddings: (B, D) of all ranks, not normalised. labels: (B,) of all ranks; −1: no class.
            step: number of the update, for the draw.
        """
        loss, count = _FrozenSoftmax.apply(embeddings, labels, self, step)
        return loss, count

    def forward(self, x: Tensor, labels: Tensor, step: int) -> "_Pass":
        """The first pass; see :class:`_Pass`."""
        norm = torch.linalg.vector_norm(x.to(self.work), dim=1).clamp_min(1e-12)
        unit = x.to(self.work) / norm[:, None]
        here = (labels >= self.classes.start) & (labels < self.classes.stop)
        local = torch.where(here, labels - self.classes.start, 0)
        if len(self.mask):
            here = here & self.mask[local]
        count = len(self.rows)
        places = self.row_of[local] if count else local
        packed = torch.zeros(3, len(x), dtype=torch.float64, device=x.device)
        if count:
            cosine = torch.linalg.vecdot(self.rows[places.clamp(0, count - 1)].to(self.work), unit)
            packed[1] = torch.where(here, cosine.double(), 0.0)
            packed[2] = here.double()
        drawn = self._draw(torch.where(here, places, count), step)
        if drawn is not None:
            places, count = torch.searchsorted(drawn, places), len(drawn)
        places, samples = torch.sort(torch.where(here, places, count), stable=True)
        done = _Pass(self, unit, norm, drawn, samples, places)
        with matmul_precision(self.tf32):
            for first, last in done.chunks():
                _, products, ones = done.products(first, last)
                packed[0] += self.kernels.fuse(exp_sum)(products, ones, ones * self.shift)
        done.finish(*all_reduce_sum(packed))
        return done

    def _draw(self, places: Tensor, step: int) -> Tensor | None:
        """The rows of a step, ascending: the drawn classes that have one, and the batch's own, at ``places`` (B,) (as
        many as there are rows: none); None: all.
        """
        rate = self.sample_rate(step) if callable(self.sample_rate) else self.sample_rate
        if rate >= 1:
            return None
        c, count = self.classes, len(self.rows)
        negatives = Draw.of(self.seed, step, c.total, rate).negatives(c.start, c.stop, places.device)
        marked = torch.zeros(count + 1, dtype=torch.bool, device=places.device)  # the last one for those without a row
        marked.index_fill_(0, torch.where(self.mask[negatives], self.row_of[negatives], count), True)
        marked.index_fill_(0, places, True)
        return marked[:count].nonzero()[:, 0]


class _Pass:
    """One step: what the second pass needs of the first.

    ``drawn`` (n,) are the rows that take part, None for all; ``samples`` (B,) are ordered by the ``places`` (B,) of
    their classes among those rows; the last ones, at place n, have no row on this rank.
    """

    def __init__(
        self,
        owner: FrozenClassifier,
        unit: Tensor,
        norm: Tensor,
        drawn: Tensor | None,
        samples: Tensor,
        places: Tensor,
    ) -> None:
        self.owner, self.unit, self.norm, self.drawn = owner, unit, norm, drawn
        self.scaled = (unit * owner.scale).to(owner.compute).t()
        self.samples, self.places = samples, places
        total, chunk = self._total(), owner.kernels.chunk_rows
        edges = torch.arange(0, total + chunk, chunk, device=places.device).clamp_max(total)
        self.bounds: list[int] = torch.searchsorted(self.places, edges).tolist()  # of each chunk's targets

    def _total(self) -> int:
        return len(self.owner.rows) if self.drawn is None else len(self.drawn)

    def chunks(self) -> list[tuple[int, int]]:
        """(first row, one past the last) of every chunk."""
        step, total = self.owner.kernels.chunk_rows, self._total()
        return [(first, min(first + step, total)) for first in range(0, total, step)]

    def products(self, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """A chunk's rows (n, D), s·cos (n, B) with the targets masked out, and ones (n, 1)."""
        rows = self.owner.rows[first:last] if self.drawn is None else self.owner.rows[self.drawn[first:last]]
        products = product(rows.to(self.owner.compute), self.scaled)
        at, samples = self._targets(first)
        products[at, samples] = MASKED
        return rows, products, products.new_ones(len(rows), 1)

    def _targets(self, first: int) -> tuple[Tensor, Tensor]:
        """The targets in the chunk that begins at ``first``: their places in it, and their samples."""
        number = first // self.owner.kernels.chunk_rows
        inside = slice(self.bounds[number], self.bounds[number + 1])
        return self.places[inside] - first, self.samples[inside]

    def finish(self, sums: Tensor, cosine: Tensor, known: Tensor) -> None:
        """The loss from the sums over all ranks: Σ exp over the negatives, the target's cosine, whether it has one."""
        scale, self.known = self.owner.scale, known > 0
        psi = scale * (cosine - self.owner.margin)
        self.log_sum = torch.logaddexp(sums.log() + self.owner.shift, psi)
        per_sample = torch.where(self.known, self.log_sum - psi, 0.0)
        self.target_probability = torch.exp(-per_sample)
        self.count = known.sum()
        self.loss = per_sample.sum() / self.count.clamp_min(1)

    def gradient(self, grad: Tensor) -> Tensor:
        """This rank's part of ∂L/∂x, (B, D): P_ij = ∂L/∂cos_ij, projected onto the sphere."""
        owner = self.owner
        share = (grad.double() * owner.scale / self.count.clamp_min(1)).to(owner.work)
        log_sum = torch.where(self.known, self.log_sum, torch.inf).to(owner.work)[None, :]
        pull = ((self.target_probability - 1).to(owner.work)) * share
        transposed = torch.zeros_like(self.unit.t(), memory_format=torch.contiguous_format)
        for first, last in self.chunks():
            rows, products, ones = self.products(first, last)
            q, _ = owner.kernels.fuse(softmax_weights)(products, ones, log_sum, share, owner.compute)
            at, samples = self._targets(first)
            q[at, samples] = pull[samples].to(q.dtype)
            transposed += product(rows.to(owner.compute).t(), q)
        dx = transposed.t().contiguous()
        dx -= self.unit * torch.linalg.vecdot(dx, self.unit)[:, None]
        return dx / self.norm[:, None]


class _FrozenSoftmax(Function):
    """Autograd's view: gathered embeddings (B, D) → loss and count."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Tensor, owner: FrozenClassifier, step: int) -> tuple[Tensor, Tensor]:
        done = owner.forward(x, labels, step)
        ctx.step, ctx.dtype = done, x.dtype
        ctx.mark_non_differentiable(done.count)
        return done.loss.to(x.dtype), done.count

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            with matmul_precision(ctx.step.owner.tf32):
                dx = ctx.step.gradient(grads[0])
            return dx.to(ctx.dtype), None, None, None
