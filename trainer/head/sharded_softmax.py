"""The fused pass: margin softmax over a rank's rows without ever holding logits of the size batch × classes.

Cosine logits are bounded by the scale s, so the softmax needs no running maximum: ``exp(s·cos − shift)`` with one
constant shift neither overflows nor loses a term in float32 (:func:`constant_shift`). Two passes over chunks of
rows:

1. forward: z = s·cos of a chunk, its Σ exp over the negatives; the target's cosine comes from the target's row
   alone. One all-reduce of 2·B numbers (and three of LCE) gives every rank the softmax's denominator and the loss.
2. backward: z again (or kept, where it is small), the softmax weights, ∂L/∂x, and the rows' gradient, which is
  applied to the chunk at once.

Notation: rows w_j (n, D) with ρ_j = 1/‖w_j‖, unit embeddings x_i (B, D), P_ij = ∂L/∂cos_ij. The gradient of row j is
``ρ_j Σ_i P_ij x_i − ρ_j² (Σ_i P_ij cos_ij) w_j``: one matrix product with Q = ρP and one number per row.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from trainer.distributed import all_reduce_sum
from trainer.errors import ConfigError
from trainer.head.kernels import Kernels, exp_sum, softmax_weights
from trainer.head.margin import Margin, Target
from trainer.head.native import NativePass, native_pass
from trainer.head.old_centers import DirectCompat
from trainer.head.row_optimizer import RowGradient, RowOptimizer
from trainer.head.sampling import Drawn

LARGEST_EXPONENT = 70.0
"""exp(70) times 29 million rows is still below the largest float32 (exp(88.7)), with a factor of 4 to spare."""
MASKED = -1e20
"""What a target's logit is replaced by among the negatives: exp of it is 0, and it stays finite when multiplied by
any 1/‖w‖.
"""
KEEP_SHARE = 0.05
"""The first pass's products are kept for the second where they take at most this share of the rows' and their
state's memory.
"""


def constant_shift(scale: float, dtype: torch.dtype, remedy: str = "use impl: reference") -> float:
    """The constant subtracted from every logit s·cos before exp: s − 70 in float32, 0 in float64.

    At cos = 1 for all of 29 million rows the sum is below float32's largest number; at cos = −1 a single term
    exp(−s − shift) is still a normal number while s ≤ 78.

    Raises:
        ConfigError: the scale is too large for float32.
    """
    if dtype == torch.float64:
        return 0.0
    if scale > 78:
        raise ConfigError(f"head.margin.scale = {scale}: the fused pass is exact in float32 up to 78; {remedy}")
    return scale - LARGEST_EXPONENT


@dataclass(frozen=True)
class PassSettings:
    """What does not change from step to step."""

    scale: float
    sub_centers: int
    correction: bool
    inter_class_filter: float
    compute: torch.dtype
    keep_products: bool


class FusedStep:
    """One step of one rank: :meth:`forward` (first pass and loss), then :meth:`backward` (second pass and update)."""

    always_gated = False
    """Take the path without a host sync on the CPU as well (for tests; on CUDA it is always taken)."""

    def __init__(
        self,
        settings: PassSettings,
        margin: Margin,
        optimizer: RowOptimizer,
        kernels: Kernels,
        num_classes: int,
        compat: DirectCompat | None,
        compat_total: Tensor | None,
        collect: Callable[[int, Tensor | None, Tensor], None] | None,
    ) -> None:
        self.num_classes = num_classes
        self.settings, self.margin, self.optimizer, self.kernels = settings, margin, optimizer, kernels
        self.compat, self.compat_total, self.collect = compat, compat_total, collect
        self.native: NativePass | None = None
        self.shift = constant_shift(settings.scale, optimizer.work)
        self.report: dict[str, Tensor] = {}

    # ---------------------------------------------------------------- first pass

    def forward(self, x: Tensor, labels: Tensor, drawn: Drawn, training: bool) -> tuple[Tensor, Tensor]:
        """The loss, a 0-dim tensor equal on all ranks, and the rows of the batch's own classes (u, D).

        Args:
            x: (B, D) gathered embeddings, as they come from the backbone.
            labels: (B,) global classes; −1: no class, no term.
            drawn: the rank's rows of this step.
            training: whether running statistics of the margin move.
        """
        work = self.optimizer.work
        self.drawn, self.valid = drawn, labels >= 0
        norm = torch.linalg.vector_norm(x.to(work), dim=1)
        # A step that is not finite goes through with zeros, so that nothing has to wait for the verdict, and ends
        # as NaN.
        self.usable = torch.isfinite(norm).all() & (labels < self.num_classes).all()
        self.norm = torch.where(self.usable, norm, 0.0).clamp_min(1e-12)
        self.x = torch.where(self.usable, x.to(work), 0.0) / self.norm[:, None]
        self.scaled = (self.x * self.settings.scale).to(self.settings.compute).t()
        self.rows = self.optimizer.select(self._drawn_rows())
        self.count = self.valid.sum().clamp_min(1)
        self.log_weight = self._log_weights() if self.settings.correction else None
        self._targets()
        self._target_bounds()
        cosine = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        cosine[drawn.samples] = self.target_cosine.double()
        if self.margin.reweights_negatives:
            all_reduce_sum(cosine)  # the negatives' weights depend on it: one more collective, of B numbers
            self._prepare_negatives(cosine, training)
            cosine = cosine / (dist.get_world_size() if dist.is_initialized() else 1)
        self.native = native_pass(self)
        sums, alignment = self._first_pass(len(x)) if self.native is None else self.native.first(self)
        hinge = self._boundary()
        packed = all_reduce_sum(torch.cat([sums, cosine, torch.stack([alignment, *hinge])]))
        own = drawn.own[:0] if self.settings.sub_centers > 1 else drawn.own
        return self._loss(packed, len(x), training), self.rows.take(own)

    def _drawn_rows(self) -> Tensor | None:
        """The rows of the drawn classes, K per class."""
        k, index = self.settings.sub_centers, self.drawn.index
        if index is None or k == 1:
            return index
        return (index[:, None] * k + torch.arange(k, device=index.device)).reshape(-1)

    def _targets(self) -> None:
        """The cosines of the samples whose class is here, from their rows alone; with sub-centres the nearest row's."""
        k, places = self.settings.sub_centers, self.drawn.places
        every = (places[:, None] * k + torch.arange(k, device=places.device)).reshape(-1)
        rows = self.rows.take(every).view(len(places), k, self.x.shape[1])
        rows = rows / torch.linalg.vector_norm(rows, dim=2, keepdim=True).clamp_min(1e-12)
        cosines = torch.einsum("pkd,pd->pk", rows, self.x[self.drawn.samples])
        self.target_cosine, nearest = cosines.max(1)
        self.target_rows = places * k + nearest

    def _target_bounds(self) -> None:
        """Sort the samples by the place of their class and note, for each chunk, which of them fall into it."""
        order = torch.argsort(self.drawn.places)
        self.sorted_samples, self.sorted_order = self.drawn.samples[order], order
        self.sorted_places = self.drawn.places[order]
        step, total = self._chunk_classes(), self._classes()
        self.edges = torch.arange(0, total + step, step, device=order.device)
        self.bounds: list[int] = torch.searchsorted(self.sorted_places, self.edges).tolist()

    def _classes(self) -> int:
        return self.rows.count // self.settings.sub_centers

    def _chunk_classes(self) -> int:
        return max(1, self.kernels.chunk_rows // self.settings.sub_centers)

    def _chunks(self) -> list[tuple[int, int, int]]:
        """(number, first class, one past the last) of every chunk."""
        step, total = self._chunk_classes(), self._classes()
        return [(n, first, min(first + step, total)) for n, first in enumerate(range(0, total, step))]

    def _first_pass(self, batch: int) -> tuple[Tensor, Tensor]:
        device = self.x.device
        sums = torch.zeros(batch, dtype=torch.float64, device=device)
        alignment = torch.zeros((), dtype=torch.float64, device=device)
        k, total = self.settings.sub_centers, self.rows.count
        self.kept: list[Tensor] | None = [] if self.settings.keep_products else None
        self.inverse = torch.empty(total, 1, dtype=self.optimizer.work, device=device)
        self.center_cosine = (
            None if self.compat is None else torch.empty(total, dtype=self.optimizer.work, device=device)
        )
        for number, first, last in self._chunks():
            w = self.rows.open(first * k, last * k)
            inverse = torch.linalg.vector_norm(w, dim=1, keepdim=True).clamp_min_(1e-12).reciprocal_()
            self.inverse[first * k : last * k] = inverse
            products = self._products(w, number, first)
            if self.kept is not None:
                self.kept.append(products)
            sums += self._sum_negatives(products, inverse, first, last)
            if self.compat is not None:
                alignment += self._alignment(w, inverse[:, 0], first, last)
        return sums, alignment

    def _products(self, w: Tensor, number: int, first: int) -> Tensor:
        """s·‖w‖·cos of a chunk (n·K, B) in working precision, the targets masked out."""
        out = torch.mm(w.to(self.settings.compute), self.scaled).to(self.optimizer.work)
        low, high = self.bounds[number], self.bounds[number + 1]
        if high > low:
            k = self.settings.sub_centers
            local = self.sorted_places[low:high] - first
            out.view(len(out) // k, k, out.shape[1])[local, :, self.sorted_samples[low:high]] = MASKED
        return out

    def _offset(self, first: int, last: int) -> Tensor:
        """shift − log(weight) per class (n, 1): weight C/S for a class that only the draw brought in, if correction
        is on.
        """
        offset = torch.full((last - first, 1), self.shift, dtype=self.optimizer.work, device=self.x.device)
        if self.log_weight is not None:
            offset = offset - self.log_weight[first:last]
        return offset

    def _log_weights(self) -> Tensor:
        """log C/S for the classes that only the draw brought in, 0 for the batch's own, (n, 1)."""
        weight = torch.zeros(self._classes(), 1, dtype=self.optimizer.work, device=self.x.device)
        weight[: self.drawn.negatives] = -math.log(self.drawn.probability)
        weight[self.drawn.places] = 0.0
        return weight

    def _plain(self) -> bool:
        s = self.settings
        return s.sub_centers == 1 and not s.inter_class_filter and not self.margin.reweights_negatives

    def _sum_negatives(self, products: Tensor, inverse: Tensor, first: int, last: int) -> Tensor:
        offset = self._offset(first, last)
        if self._plain():
            return self.kernels.fuse(exp_sum)(products, inverse, offset)
        z, _, _ = self._negative_logits(products, inverse)
        return torch.exp(z - offset).sum(0)

    def _negative_logits(self, products: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits of the negatives after sub-centres, filter and curriculum (n, B), their slope ∂logit/∂z, and the
        nearest-row mask.
        """
        k, scale = self.settings.sub_centers, self.settings.scale
        z, nearest = products * inverse, None
        if k > 1:
            by_class = z.view(len(z) // k, k, z.shape[1])
            z, which = by_class.max(1)
            nearest = torch.zeros_like(by_class).scatter_(1, which[:, None], 1.0)
        slope = torch.ones_like(z)
        noisy = z > (self.settings.inter_class_filter or 2.0) * scale
        if self.margin.reweights_negatives:
            cosine = z / scale
            hard = cosine > self.psi_first[None, :]
            slope = torch.where(hard, self.tau + 2 * cosine, slope)
            z = torch.where(hard, z * (self.tau + cosine), z)
        if self.settings.inter_class_filter:
            far = products.new_tensor(MASKED)
            z, slope = torch.where(noisy, far, z), slope.masked_fill(noisy, 0.0)
        return z, slope, nearest

    def _prepare_negatives(self, cosine: Tensor, training: bool) -> None:
        target = self.margin.target(cosine[self.valid], self.norm[self.valid].double(), training * self.usable)
        psi = torch.full_like(cosine, 2.0)
        psi[self.valid] = target.psi
        self.psi_first = psi.to(self.optimizer.work)
        self.tau = self.margin.state()["margin_tau"].to(self.psi_first)
        self._target_early: Target | None = target
        if self.shift:  # a hard negative's logit reaches s·(1 + τ)
            self.shift += self.settings.scale * max(0.0, float(self.margin.state()["margin_tau"]))

    # ---------------------------------------------------------------- LCE, direct

    def _local_classes(self, first: int, last: int) -> Tensor | slice:
        return slice(first, last) if self.drawn.index is None else self.drawn.index[first:last]

    def _alignment(self, w: Tensor, inverse: Tensor, first: int, last: int) -> Tensor:
        """Σ (1 − cos(w_j, o_j)) over the drawn classes of a chunk that have a centre, weighted by C/S."""
        assert self.compat is not None, "only called with a centre bank"
        assert self.center_cosine is not None, "allocated with the centre bank"
        centers, mask = self.compat.rows(self._local_classes(first, last), self.x)
        cosine = torch.linalg.vecdot(w, centers.to(w.dtype)) * inverse
        self.center_cosine[first:last] = cosine
        return ((1 - cosine).double() * mask * self._alignment_share(first, last)).sum()

    def _alignment_share(self, first: int, last: int) -> Tensor:
        """C/S for drawn classes, 0 for positives that were not drawn, (n,); 1 when all classes take part."""
        if self.drawn.index is None:
            return torch.ones((), dtype=self.optimizer.work, device=self.x.device)
        drawn = torch.arange(first, last, device=self.x.device) < self.drawn.negatives
        return drawn.to(self.optimizer.work) / self.drawn.probability

    def _boundary(self) -> list[Tensor]:
        """Σ max(0, b − cos(x, o)) over this rank's targets that have a centre, and how many those are."""
        zero = torch.zeros((), dtype=torch.float64, device=self.x.device)
        if self.compat is None:
            return [zero, zero]
        places, samples = self.drawn.places, self.drawn.samples
        local = places if self.drawn.index is None else self.drawn.index[places]
        self.target_centers, self.target_mask = self.compat.rows(local, self.x)
        self.target_centers = self.target_centers.to(self.x.dtype)
        boundary = self.compat.boundaries[local.to(self.compat.boundaries.device)].to(self.x)
        self.hinge = (boundary - torch.linalg.vecdot(self.x[samples], self.target_centers)).clamp_min(
            0
        ) * self.target_mask
        return [self.hinge.sum().double(), self.target_mask.sum().double()]

    # ---------------------------------------------------------------- loss

    def _loss(self, packed: Tensor, batch: int, training: bool) -> Tensor:
        sums, cosine = packed[:batch], packed[batch : 2 * batch]
        alignment, hinge, self.hinge_count = packed[2 * batch :].unbind()
        valid, scale = self.valid, self.settings.scale
        if self.margin.reweights_negatives and self._target_early is not None:
            self.target = self._target_early
        else:
            self.target = self.margin.target(cosine[valid], self.norm[valid].double(), training * self.usable)
        psi = torch.zeros_like(cosine)
        psi[valid] = self.target.psi
        self.log_sum = torch.logaddexp(sums.log() + self.shift, scale * psi)
        per_sample = (self.log_sum - scale * psi)[valid]
        loss = per_sample.sum() / self.count
        self.target_probability = torch.exp(-per_sample)
        self.report = {"classification": loss, "target_cosine": cosine[valid].sum() / self.count}
        if self.target.penalty is not None:
            penalty = self.target.penalty.sum() / self.count
            self.report["norm_penalty"] = penalty
            loss = loss + penalty
        if self.compat is not None and self.compat_total is not None:
            self.report["alignment"] = alignment / self.compat_total.clamp_min(1)
            self.report["boundary"] = hinge / self.hinge_count.clamp_min(1)
            loss = loss + self.compat.alignment_weight * self.report["alignment"]
            loss = loss + self.compat.boundary_weight * self.report["boundary"]
        self.finite = torch.isfinite(loss) & self.usable
        return torch.where(self.finite, loss, torch.nan)

    # ---------------------------------------------------------------- second pass

    def backward(self, grad: Tensor, own_grad: Tensor) -> Tensor:
        """∂L/∂x of the gathered embeddings (B, D), this rank's part of the sum; rows are updated (or their gradient
        collected).

        Args:
            grad: the 0-dim gradient of the total with respect to the loss.
            own_grad: its gradient with respect to the rows of the batch's own classes, (u, D).
        """
        work, device = self.optimizer.work, self.x.device
        gate: Tensor | None = None
        self.rows.check()
        if device.type == "cuda" or self.always_gated:
            gate = self.finite.to(work)  # no host sync: a step that is not finite is multiplied by zero
            grad = torch.where(self.finite, grad.double(), 0.0)
            own_grad = torch.where(self.finite, own_grad, 0.0)
        elif not bool(self.finite):
            return torch.zeros_like(self.x)
        share = grad.double() / self.count * self.settings.scale
        self.log_sum_row = (
            torch.where(self.valid, self.log_sum, torch.inf).nan_to_num(posinf=torch.inf).to(work)[None, :]
        )
        self.coefficient = share.to(work)
        self._target_gradient(share)
        own_places, order = torch.sort(self.drawn.own[: len(own_grad)])
        own_grad = own_grad[order]
        if self.native is not None and self.rows.undisturbed:
            dx = self.native.second(self, grad, own_places, own_grad)
        else:
            dx = self._second_pass(grad, gate, own_places, own_grad)
        if self.collect is None:
            self.optimizer.finish(self._row_index(0, self.rows.count), gate)
        elif self.rows.index is not None and self.rows.count == 0:
            self.collect(0, self.rows.index, self.x.new_empty(0, self.x.shape[1]))  # a step passes for this rank too
        self._boundary_gradient(dx, grad)
        dx -= self.x * torch.linalg.vecdot(dx, self.x)[:, None]
        dx /= self.norm[:, None]
        self._norm_gradient(dx, grad)
        return dx

    def _second_pass(self, grad: Tensor, gate: Tensor | None, own_places: Tensor, own_grad: Tensor) -> Tensor:
        """Σ_j P_ij w_j/‖w_j‖ (B, D); updates the rows, or collects their gradient."""
        own_bounds = torch.searchsorted(own_places, self.edges).tolist()
        transposed = torch.zeros_like(self.x.t(), memory_format=torch.contiguous_format)
        k = self.settings.sub_centers
        for number, first, last in self._chunks():
            w = self.rows.rows(first * k, last * k)
            q, radial = self._chunk_weights(w, number, first, last)
            q = q.to(self.settings.compute)
            if q.dtype == transposed.dtype:
                transposed.addmm_(w.t(), q)  # (D, B): this order of the product is the quicker one
            else:
                transposed += torch.mm(w.to(q.dtype).t(), q)
            pull, pull_scale, radial = self._alignment_gradient(first, last, radial, grad)
            gradient = RowGradient(q, self.x.to(self.settings.compute), radial, pull, pull_scale)
            low, high = own_bounds[number], own_bounds[number + 1]
            if high > low:
                gradient = replace(gradient, at=own_places[low:high] - first, extra=own_grad[low:high])
            if self.collect is None:
                self.optimizer.update(self.rows, first * k, last * k, gradient, gate)
            else:
                self.collect(first * k, self._row_index(first * k, last * k), gradient.dense(w))
        return transposed.t().contiguous()

    def _row_index(self, first: int, last: int) -> Tensor | None:
        return None if self.rows.index is None else self.rows.index[first:last]

    def _target_gradient(self, share: Tensor) -> None:
        """∂L/∂(target cosine) = (p − 1)·s·ψ' for the samples whose class is here, in the order of the chunks."""
        value = torch.zeros(len(self.valid), dtype=torch.float64, device=self.x.device)
        value[self.valid] = (self.target_probability - 1) * self.target.slope * share
        work = self.optimizer.work
        self.target_pull = value.to(work)[self.sorted_samples]
        self.sorted_rows = self.target_rows[self.sorted_order]
        self.sorted_cosine = self.target_cosine[self.sorted_order].to(work)

    def _chunk_weights(self, w: Tensor, number: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Q (n·K, B) and the radial part −ρ² Σ P cos (n·K,) of a chunk, targets included."""
        k, scale = self.settings.sub_centers, self.settings.scale
        inverse = self.inverse[first * k : last * k]
        products = self.kept[number] if self.kept is not None else self._products(w, number, first)
        log_sum = self.log_sum_row
        if self.log_weight is not None:
            log_sum = log_sum - self.log_weight[first:last]
        if self._plain():
            q, radial = self.kernels.fuse(softmax_weights)(products, inverse, log_sum, self.coefficient)
        else:
            z, slope, nearest = self._negative_logits(products, inverse)
            p = torch.exp(z - log_sum) * self.coefficient * slope
            p = p if nearest is None else (nearest * p[:, None]).view(len(p) * k, p.shape[1])
            q, radial = p * inverse, (p * products * inverse).sum(1)
        radial = radial / scale
        low, high = self.bounds[number], self.bounds[number + 1]
        if high > low:
            rows, value = self.sorted_rows[low:high] - first * k, self.target_pull[low:high]
            q[rows, self.sorted_samples[low:high]] = value * inverse[rows, 0]
            radial.index_add_(0, rows, value * self.sorted_cosine[low:high])
        return q, radial * -inverse[:, 0].square()

    def _alignment_gradient(
        self, first: int, last: int, radial: Tensor, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """The pull of the old centres, −λ_a/C·(o − cos·w/‖w‖)/‖w‖: the centres (n, D), their factors (n,), and the
        radial part with theirs.
        """
        if self.compat is None or self.center_cosine is None or self.compat_total is None:
            return None, None, radial
        centers, mask = self.compat.rows(self._local_classes(first, last), self.x)
        weight = self.compat.alignment_weight * grad.double() / self.compat_total.clamp_min(1)
        inverse = self.inverse[first:last, 0]
        factor = weight.to(inverse) * mask * self._alignment_share(first, last) * inverse
        return centers, -factor, radial + factor * self.center_cosine[first:last] * inverse

    def _boundary_gradient(self, dx: Tensor, grad: Tensor) -> None:
        if self.compat is None:
            return
        weight = self.compat.boundary_weight * grad.double() / self.hinge_count.clamp_min(1)
        active = (self.hinge > 0).to(dx) * weight.to(dx)
        dx.index_add_(0, self.drawn.samples, -active[:, None] * self.target_centers)

    def _norm_gradient(self, dx: Tensor, grad: Tensor) -> None:
        """MagFace's gradient through the norm, on the rank that owns the target."""
        if self.target.norm_slope is None:
            return
        value = torch.zeros(len(self.valid), dtype=torch.float64, device=dx.device)
        pull = (self.target_probability - 1) * self.settings.scale * self.target.norm_slope
        if self.target.penalty_slope is not None:
            pull = pull + self.target.penalty_slope
        value[self.valid] = pull * grad.double() / self.count
        own = self.drawn.samples
        dx.index_add_(0, own, value[own, None].to(dx) * self.x[own])


class FusedSoftmax(Function):
    """Autograd's view of a :class:`FusedStep`: gathered embeddings (B, D) → loss, and rows of the batch's classes.

    Collectives: one all-reduce in forward, none in backward (the caller gathers before and reduce-scatters after).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, labels: Tensor, step: FusedStep, drawn: Drawn, training: bool
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`FusedStep.forward`."""
        ctx.step, ctx.dtype = step, x.dtype
        loss, own = step.forward(x, labels, drawn, training)
        return loss.to(step.optimizer.work), own

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """See :meth:`FusedStep.backward`."""
        if ctx.step is None:
            raise RuntimeError("backward was called twice on one loss; its rows were updated by the first call")
        with torch.no_grad():
            dx = ctx.step.backward(*grads).to(ctx.dtype)
        ctx.step = None
        return dx, None, None, None, None
