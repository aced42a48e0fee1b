"""The fused pass: margin softmax over a rank's rows without ever holding logits of the size batch × classes.

Cosine logits are bounded by the scale s, so the softmax needs no running maximum: ``exp(s·cos − shift)`` with one
constant shift neither overflows nor loses a term in float32 (:func:`trainer.head.step.constant_shift`). Two passes
over chunks of rows:

1. forward: z = s·cos of a chunk, its Σ exp over the negatives; the target's cosine comes from the target's row
   alone. One all-reduce of 2·B numbers (and three of LCE) gives every rank the softmax's denominator and the loss.
2. backward: z again (or kept, where it is small), the softmax weights, ∂L/∂x, and the rows' gradient, which is
   applied to the chunk at once.

Notation as in :mod:`trainer.head.step`; P_ij = ∂L/∂cos_ij. The gradient of row j is
``ρ_j Σ_i P_ij x_i − ρ_j² (Σ_i P_ij cos_ij) w_j``: one matrix product with Q = ρP and one number per row.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from trainer.distributed import all_reduce_sum, all_threads, one_thread
from trainer.head.kernels import Kernels, exp_sum, softmax_weights
from trainer.head.margin import Margin
from trainer.head.old_centers import DirectCompat
from trainer.head.products import matmul_precision, product
from trainer.head.row_optimizer import CollectedGradients, RowGradient, RowOptimizer, Selection
from trainer.head.sampling import Drawn
from trainer.head.sizes import KEEP_SHARE
from trainer.head.step import (
    MASKED,
    Batch,
    Boundary,
    Curriculum,
    FirstPass,
    Loss,
    LossGradient,
    PassInput,
    PassSettings,
    Step,
    StepOutput,
    TargetIndex,
    Targets,
    Verdict,
    constant_shift,
)


@dataclass(frozen=True)
class OldCenters:
    """LCE's direct mode in the pass: this rank's centres, and how many classes of all have one (0-dim float64)."""

    bank: DirectCompat
    total: Tensor


class FusedSoftmax:
    """The step in torch, chunk by chunk: :meth:`forward` (first pass and loss), :meth:`backward` (second pass and
    update).

    Args:
        settings: of every step.
        margin: of the targets.
        optimizer: the rows, their state and what an update is.
        kernels: chunk length and compilation of the element-wise work.
        num_classes: C.
        old: LCE's direct mode; None: without.
        gated: never ask on the host whether a step is finite but multiply by zero where it is not. For CUDA, where
            asking waits for the device.
    """

    def __init__(
        self,
        settings: PassSettings,
        margin: Margin,
        optimizer: RowOptimizer,
        kernels: Kernels,
        num_classes: int,
        old: OldCenters | None,
        gated: bool,
    ) -> None:
        self.settings, self.margin, self.optimizer, self.kernels = settings, margin, optimizer, kernels
        self.num_classes, self.old, self.gated = num_classes, old, gated
        self.rows = optimizer.rows
        self.optimizer.fuse = kernels.fuse
        self.collected = CollectedGradients(optimizer)
        self._shift = constant_shift(settings.scale, optimizer.work)

    # ---------------------------------------------------------------- the protocol

    def step(
        self, x: Tensor, labels: Tensor, drawn: Drawn, verdict: Verdict, *, training: bool, deferred: bool, seed: int
    ) -> StepOutput:
        """See :class:`trainer.head.step.Softmax`."""
        # Before the seed is set: a resumed run that begins behind the change has nothing to bring up to date.
        self.optimizer.set_sampled(drawn.index is not None)
        self.optimizer.reseed(seed)
        with torch.no_grad():
            step = self.forward(x.detach(), labels, drawn, training, deferred)
        loss, own = _StepFunction.apply(x, self, step, verdict, deferred)
        finite = torch.isfinite(step.loss.value)
        report = dict(step.loss.report)
        if step.boundary is not None:  # distributions, of this rank's classes
            report |= {"center_cosines": step.boundary.cosine, "boundary_slack": step.boundary.slack}
        return StepOutput(loss, own, report, finite)

    def put(self, first: int, rows: Tensor) -> None:
        """See :class:`trainer.head.step.Softmax`."""
        self.optimizer.put(first, rows)

    def put_at(self, index: Tensor, rows: Tensor) -> None:
        """See :class:`trainer.head.step.Softmax`."""
        self.optimizer.put_at(index, rows)

    def set_lr(self, lr: float) -> None:
        """See :class:`trainer.head.step.Softmax`."""
        self.optimizer.set_lr(lr)

    def apply(self, inverse_scale: float) -> None:
        """See :class:`trainer.head.step.Softmax`."""
        self.collected.apply(inverse_scale, self.kernels.chunk_rows)

    def discard(self) -> None:
        """See :class:`trainer.head.step.Softmax`."""
        self.collected.clear()

    def flush(self) -> None:
        """See :class:`trainer.head.step.Softmax`."""
        self.optimizer.flush()

    def tables(self) -> dict[str, Tensor]:
        """See :class:`trainer.head.step.Softmax`."""
        named = zip(self.optimizer.table_names, self.optimizer.tables, strict=True)
        return dict(named) | self.optimizer.extra_state()

    def counters(self) -> dict[str, Tensor]:
        """See :class:`trainer.head.step.Softmax`."""
        return {}

    def loaded(self) -> None:
        """See :class:`trainer.head.step.Softmax`."""
        self.optimizer.loaded()

    # ---------------------------------------------------------------- forward

    @one_thread()
    def forward(self, x: Tensor, labels: Tensor, drawn: Drawn, training: bool, deferred: bool) -> Step:
        """The first pass and the loss of gathered embeddings x (B, D)."""
        batch = Batch.of(x, labels, self.num_classes, self.optimizer.work)
        centers = None if self.old is None else self.old.bank.start(drawn, x.device, self._chunk_classes())
        rows = self.optimizer.select(self._drawn_rows(drawn))
        targets = self._targets(batch, drawn, rows)
        cosine = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        cosine[targets.index.samples] = targets.cosine.double()
        shift: float | Tensor = self._shift
        curriculum = None
        if self.margin.reweights_negatives:
            all_reduce_sum(cosine)  # the negatives' weights depend on it: one more collective, of B numbers
            curriculum = self._curriculum(batch, cosine, training)
            cosine = cosine / (dist.get_world_size() if dist.is_initialized() else 1)
            if self._shift:  # a hard negative's logit reaches s·(1 + τ)
                shift = self._shift + self.settings.scale * curriculum.tau.clamp_min(0)
        log_weight = self._log_weights(drawn, rows) if self.settings.correction else None
        keep = rows.count * len(x) * 4 <= KEEP_SHARE * sum(t.nbytes for t in self.optimizer.tables)
        inputs = PassInput(batch, drawn, rows, targets, shift, log_weight, curriculum, keep, centers)
        with matmul_precision(self.settings.tf32):
            first = self.first_pass(inputs, deferred)
        boundary = self._boundary(inputs)
        zero = first.alignment.new_zeros(())
        scalars = [first.alignment, *((zero, zero) if boundary is None else (boundary.total, boundary.count))]
        packed = all_reduce_sum(torch.cat([first.sums, cosine, torch.stack(scalars)]))
        return Step(inputs, first, boundary, self._loss(inputs, packed, training))

    @one_thread()
    def own_rows(self, step: Step) -> Tensor:
        """The rows of the batch's own classes (u, D), in the order of the classes; none with sub-centres."""
        own = step.inputs.drawn.own
        return step.inputs.rows.take(own[:0] if self.settings.sub_centers > 1 else own)

    def _drawn_rows(self, drawn: Drawn) -> Tensor | None:
        """The rows of the drawn classes, K per class."""
        k, index = self.settings.sub_centers, drawn.index
        if index is None or k == 1:
            return index
        return (index[:, None] * k + torch.arange(k, device=index.device)).reshape(-1)

    def _targets(self, batch: Batch, drawn: Drawn, rows: Selection) -> Targets:
        """The cosines of the samples whose class is here, from their rows alone; with sub-centres the nearest row's."""
        k = self.settings.sub_centers
        index = TargetIndex.of(drawn, rows.count // k, self._chunk_classes())
        places = index.places
        every = (places[:, None] * k + torch.arange(k, device=places.device)).reshape(-1)
        taken = rows.take(every).view(len(places), k, batch.x.shape[1])
        taken = taken / torch.linalg.vector_norm(taken, dim=2, keepdim=True).clamp_min(1e-12)
        cosine, nearest = torch.einsum("pkd,pd->pk", taken, batch.x[index.samples]).max(1)
        return Targets(index, cosine, places * k + nearest)

    def _curriculum(self, batch: Batch, cosine: Tensor, training: bool) -> Curriculum:
        target = self.margin.target(cosine, batch.norm.double(), training * batch.usable, batch.valid)
        psi = torch.where(batch.valid, target.psi, 2.0).to(self.optimizer.work)
        return Curriculum(psi, self.margin.state()["margin_tau"].to(psi), target)

    def _log_weights(self, drawn: Drawn, rows: Selection) -> Tensor:
        """log C/S for the classes that only the draw brought in, 0 for the batch's own, (n, 1)."""
        classes, device = rows.count // self.settings.sub_centers, drawn.places.device
        weight = torch.zeros(classes, 1, dtype=self.optimizer.work, device=device)
        weight[: drawn.negatives] = -math.log(drawn.probability)
        weight[drawn.places] = 0.0
        return weight

    def _boundary(self, inputs: PassInput) -> Boundary | None:
        """LCE's boundary loss of this rank's targets that have a centre."""
        if self.old is None:
            return None
        index, x, drawn, bank = inputs.targets.index, inputs.batch.x, inputs.drawn, self.old.bank
        local = index.places if drawn.index is None else drawn.index[index.places]
        if inputs.centers is None:
            centers = bank.centers[local].to(x.dtype)
        else:
            inputs.centers.rows(0, inputs.rows.count)  # all have arrived: it comes after the first pass
            centers = inputs.centers.out[index.places].to(x.dtype)
        mask, limit = bank.mask[local].to(x), bank.boundaries[local].to(x)
        cosine = torch.linalg.vecdot(x[index.samples], centers)
        hinge = (limit - cosine).clamp_min(0) * mask
        cosine = torch.where(mask > 0, cosine, torch.nan)
        return Boundary(centers, hinge, cosine, cosine - limit, hinge.sum().double(), mask.sum().double())

    def _loss(self, inputs: PassInput, packed: Tensor, training: bool) -> Loss:
        """From what the ranks have added up: Σ exp and target cosines (B,) each, alignment, hinge and its count."""
        batch, curriculum, scale = inputs.batch, inputs.curriculum, self.settings.scale
        size, valid = len(batch.valid), batch.valid
        sums, cosine = packed[:size], packed[size : 2 * size]
        alignment, hinge, hinge_count = packed[2 * size :].unbind()
        target = (
            self.margin.target(cosine, batch.norm.double(), training * batch.usable, valid)
            if curriculum is None
            else curriculum.target
        )
        psi = torch.where(valid, target.psi, 0.0)
        log_sum = torch.logaddexp(sums.log() + inputs.shift, scale * psi)
        per_sample = torch.where(valid, log_sum - scale * psi, 0.0)
        loss = per_sample.sum() / batch.count
        report = {"classification": loss, "target_cosine": torch.where(valid, cosine, 0.0).sum() / batch.count}
        report["target_cosines"] = torch.where(valid, cosine, torch.nan)
        if target.penalty is not None:
            report["norm_penalty"] = torch.where(valid, target.penalty, 0.0).sum() / batch.count
            loss = loss + report["norm_penalty"]
        if self.old is not None:
            report["alignment"] = alignment / self.old.total.clamp_min(1)
            report["boundary"] = hinge / hinge_count.clamp_min(1)
            loss = loss + self.old.bank.alignment_weight * report["alignment"]
            loss = loss + self.old.bank.boundary_weight * report["boundary"]
        value = torch.where(torch.isfinite(loss) & batch.usable, loss, torch.nan)
        return Loss(value, report, log_sum, torch.exp(-per_sample), target, hinge_count)

    # ---------------------------------------------------------------- backward

    @one_thread()
    def backward(self, step: Step, grad: Tensor, own_grad: Tensor, finite: Tensor, deferred: bool) -> Tensor:
        """∂L/∂x of the gathered embeddings (B, D), this rank's part of the sum; rows are updated (or their gradient
        collected).

        Args:
            step: of :meth:`forward`.
            grad: the 0-dim gradient of the total with respect to the loss.
            own_grad: its gradient with respect to :meth:`own_rows`.
            finite: 0-dim bool; where it is False nothing changes.
            deferred: collect the rows' gradient.
        """
        inputs = step.inputs
        batch, rows, index = inputs.batch, inputs.rows, inputs.targets.index
        rows.check()
        gate: Tensor | None = None
        if self.gated:
            gate = finite.to(self.optimizer.work)  # no host sync: a step that is not finite is multiplied by zero
            grad = torch.where(finite, grad.double(), 0.0)
            own_grad = torch.where(finite, own_grad, 0.0)
        elif not bool(finite):
            return torch.zeros_like(batch.x)
        gradient = self._loss_gradient(step, grad.double(), own_grad, gate)
        with matmul_precision(self.settings.tf32):
            dx = self.second_pass(step, gradient, deferred)
        if not deferred:
            self.optimizer.finish(rows.index, gate)
        elif rows.index is not None and rows.count == 0:
            # a step passes for this rank too
            self.collected.add(0, rows.index, batch.x.new_empty(0, batch.x.shape[1]))
        if step.boundary is not None and self.old is not None:
            weight = self.old.bank.boundary_weight * gradient.grad / step.loss.hinge_count.clamp_min(1)
            active = (step.boundary.hinge > 0).to(dx) * weight.to(dx)
            dx.index_add_(0, index.samples, -active[:, None] * step.boundary.centers)
        dx -= batch.x * torch.linalg.vecdot(dx, batch.x)[:, None]
        dx /= batch.norm[:, None]
        self._norm_gradient(dx, step, gradient)
        return dx

    def _loss_gradient(self, step: Step, grad: Tensor, own_grad: Tensor, gate: Tensor | None) -> LossGradient:
        work, loss, batch, index = self.optimizer.work, step.loss, step.inputs.batch, step.inputs.targets.index
        share = grad / batch.count * self.settings.scale
        log_sum = torch.where(batch.valid, loss.log_sum, torch.inf).nan_to_num(posinf=torch.inf).to(work)
        value = (loss.probability - 1) * loss.target.slope * share  # (p − 1)·s·ψ', used where there is a class
        own = own_grad[index.own_order] if len(own_grad) else own_grad
        return LossGradient(grad, share.to(work), log_sum[None, :], value.to(work)[index.samples], own, gate)

    def _norm_gradient(self, dx: Tensor, step: Step, gradient: LossGradient) -> None:
        """MagFace's gradient through the norm, on the rank that owns the target."""
        loss, batch = step.loss, step.inputs.batch
        if loss.target.norm_slope is None:
            return
        pull = (loss.probability - 1) * self.settings.scale * loss.target.norm_slope
        if loss.target.penalty_slope is not None:
            pull = pull + loss.target.penalty_slope
        value = pull * gradient.grad / batch.count
        own = step.inputs.targets.index.samples
        dx.index_add_(0, own, value[own, None].to(dx) * batch.x[own])

    # ---------------------------------------------------------------- the two passes

    @all_threads()
    def first_pass(self, inputs: PassInput, deferred: bool) -> FirstPass:
        """Walk the rows for Σ exp over the negatives and LCE's alignment; ``deferred`` steps do not update."""
        del deferred
        x, k, total, work = inputs.batch.x, self.settings.sub_centers, inputs.rows.count, self.optimizer.work
        scaled, compute = self._scaled(x), self.settings.compute
        direct = inputs.rows.direct(compute)
        sums = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        alignment = torch.zeros((), dtype=torch.float64, device=x.device)
        kept: list[Tensor] | None = [] if inputs.keep_products else None
        inverse = torch.empty(total, 1, dtype=work, device=x.device)
        center_cosine = None if self.old is None else torch.empty(total, dtype=work, device=x.device)
        for number, first, last in self._chunks(inputs):
            known = self.optimizer.inverse(inputs.rows, first * k, last * k)
            if known is not None and direct and self.old is None:  # no need of them in working precision
                w = inputs.rows.stored(first * k, last * k)
            else:
                w = inputs.rows.open(first * k, last * k)
            part = (
                torch.linalg.vector_norm(w, dim=1, keepdim=True).clamp_min_(1e-12).reciprocal_()
                if known is None
                else known
            )
            inverse[first * k : last * k] = part
            narrow = inputs.rows.stored(first * k, last * k) if direct else w.to(compute)
            products = self._products(inputs, scaled, narrow, number, first)
            if kept is not None:
                kept.append(products)
            sums += self._sum_negatives(inputs, products, part, first, last)
            if self.old is not None and center_cosine is not None:
                centers, mask = self._old_centers(self.old.bank, inputs, first, last)
                cosine = torch.linalg.vecdot(w, centers.to(w.dtype)) * part[:, 0]
                center_cosine[first:last] = cosine
                alignment += ((1 - cosine).double() * mask * self._alignment_share(inputs, first, last)).sum()
        return FirstPass(sums, alignment, inverse, center_cosine, kept)

    @all_threads()
    def second_pass(self, step: Step, gradient: LossGradient, deferred: bool) -> Tensor:
        """Σ_j P_ij w_j/‖w_j‖ (B, D); updates the rows, or collects their gradient."""
        inputs, index = step.inputs, step.inputs.targets.index
        x, rows, k = inputs.batch.x, inputs.rows, self.settings.sub_centers
        compute, direct = self.settings.compute, rows.direct(self.settings.compute)
        scaled, narrow = self._scaled(x), x.to(compute)
        transposed = torch.zeros_like(x.t(), memory_format=torch.contiguous_format)
        for number, first, last in self._chunks(inputs):
            w = rows.stored(first * k, last * k) if direct and not deferred else rows.rows(first * k, last * k)
            of_products = rows.stored(first * k, last * k) if direct else w.to(compute)
            q, radial = self._chunk_gradient(step, gradient, scaled, of_products, number, first, last)
            if q.dtype == transposed.dtype:
                transposed.addmm_(of_products.t(), q)  # (D, B): this order of the product is the quicker one
            else:
                transposed += product(of_products.t(), q)
            pull, pull_scale, radial = self._alignment_gradient(step, gradient, first, last, radial)
            change = RowGradient(q, narrow, radial, pull, pull_scale)
            low, high = index.own_bounds[number], index.own_bounds[number + 1]
            if high > low and len(gradient.own):
                change = replace(change, at=index.own[low:high] - first, extra=gradient.own[low:high])
            if deferred:
                at = None if rows.index is None else rows.index[first * k : last * k]
                self.collected.add(first * k, at, change.dense(w))
            else:
                self.optimizer.update(rows, first * k, last * k, change, gradient.gate)
        return transposed.t().contiguous()

    def _chunk_gradient(
        self, step: Step, gradient: LossGradient, scaled: Tensor, w: Tensor, number: int, first: int, last: int
    ) -> tuple[Tensor, Tensor]:
        """Q (n·K, B) and the radial part (n·K,) of the rows w of a chunk, in the products' dtype."""
        kept = step.first.products
        products = self._products(step.inputs, scaled, w, number, first) if kept is None else kept[number]
        return self._chunk_weights(step, gradient, products, number, first, last)

    def _scaled(self, x: Tensor) -> Tensor:
        return (x * self.settings.scale).to(self.settings.compute).t()

    def _chunk_classes(self) -> int:
        return max(1, self.kernels.chunk_rows // self.settings.sub_centers)

    def _chunks(self, inputs: PassInput) -> list[tuple[int, int, int]]:
        """(number, first class, one past the last) of every chunk."""
        step, total = self._chunk_classes(), inputs.rows.count // self.settings.sub_centers
        return [(n, first, min(first + step, total)) for n, first in enumerate(range(0, total, step))]

    def _products(self, inputs: PassInput, scaled: Tensor, w: Tensor, number: int, first: int) -> Tensor:
        """s·‖w‖·cos of a chunk (n·K, B) in working precision, the targets masked out; w in the products' dtype."""
        out = product(w, scaled)
        index, k = inputs.targets.index, self.settings.sub_centers
        low, high = index.bounds[number], index.bounds[number + 1]
        if high > low:
            local = index.places[low:high] - first
            out.view(len(out) // k, k, out.shape[1])[local, :, index.samples[low:high]] = MASKED
        return out

    def _plain(self) -> bool:
        s = self.settings
        return s.sub_centers == 1 and not s.inter_class_filter and not self.margin.reweights_negatives

    def _sum_negatives(self, inputs: PassInput, products: Tensor, inverse: Tensor, first: int, last: int) -> Tensor:
        # shift − log(weight) per class (n, 1): weight C/S for a class that only the draw brought in
        offset = torch.zeros(last - first, 1, dtype=self.optimizer.work, device=products.device) + inputs.shift
        if inputs.log_weight is not None:
            offset = offset - inputs.log_weight[first:last]
        if self._plain():
            return self.kernels.fuse(exp_sum)(products, inverse, offset)
        z, _, _ = self._negative_logits(inputs.curriculum, products, inverse)
        return torch.exp(z - offset).sum(0)

    def _negative_logits(
        self, curriculum: Curriculum | None, products: Tensor, inverse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
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
        if curriculum is not None:
            cosine = z / scale
            hard = cosine > curriculum.psi[None, :]
            slope = torch.where(hard, curriculum.tau + 2 * cosine, slope)
            z = torch.where(hard, z * (curriculum.tau + cosine), z)
        if self.settings.inter_class_filter:
            z, slope = z.masked_fill(noisy, MASKED), slope.masked_fill(noisy, 0.0)
        return z, slope, nearest

    def _chunk_weights(
        self, step: Step, gradient: LossGradient, products: Tensor, number: int, first: int, last: int
    ) -> tuple[Tensor, Tensor]:
        """Q (n·K, B) and the radial part −ρ² Σ P cos (n·K,) of a chunk, targets included."""
        inputs, targets, k = step.inputs, step.inputs.targets, self.settings.sub_centers
        inverse = step.first.inverse[first * k : last * k]
        log_sum = gradient.log_sum
        if inputs.log_weight is not None:
            log_sum = log_sum - inputs.log_weight[first:last]
        if self._plain():
            weights = self.kernels.fuse(softmax_weights)
            q, radial = weights(products, inverse, log_sum, gradient.coefficient, self.settings.compute)
        else:
            z, slope, nearest = self._negative_logits(inputs.curriculum, products, inverse)
            p = torch.exp(z - log_sum) * gradient.coefficient * slope
            p = p if nearest is None else (nearest * p[:, None]).view(len(p) * k, p.shape[1])
            q, radial = (p * inverse).to(self.settings.compute), (p * products * inverse).sum(1)
        radial = radial / self.settings.scale
        low, high = targets.index.bounds[number], targets.index.bounds[number + 1]
        if high > low:
            rows, value = targets.rows[low:high] - first * k, gradient.target_pull[low:high]
            q[rows, targets.index.samples[low:high]] = (value * inverse[rows, 0]).to(q.dtype)
            radial.index_add_(0, rows, value * targets.cosine[low:high].to(value))
        return q, radial * -inverse[:, 0].square()

    # ---------------------------------------------------------------- LCE's alignment

    def _old_centers(self, bank: DirectCompat, inputs: PassInput, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Centres (n, D) and mask (n,) of a chunk."""
        local = slice(first, last) if inputs.drawn.index is None else inputs.drawn.index[first:last]
        if inputs.centers is None:
            return bank.rows(local, inputs.batch.x)
        return inputs.centers.rows(first, last), bank.mask[local].to(inputs.batch.x)

    def _alignment_share(self, inputs: PassInput, first: int, last: int) -> Tensor:
        """C/S for drawn classes, 0 for positives that were not drawn, (n,); 1 when all classes take part."""
        device, work = inputs.batch.x.device, self.optimizer.work
        if inputs.drawn.index is None:
            return torch.ones((), dtype=work, device=device)
        drawn = torch.arange(first, last, device=device) < inputs.drawn.negatives
        return drawn.to(work) / inputs.drawn.probability

    def _alignment_gradient(
        self, step: Step, gradient: LossGradient, first: int, last: int, radial: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """The pull of the old centres, −λ_a/C·(o − cos·w/‖w‖)/‖w‖: the centres (n, D), their factors (n,), and the
        radial part with theirs.
        """
        if self.old is None or step.first.center_cosine is None:
            return None, None, radial
        centers, mask = self._old_centers(self.old.bank, step.inputs, first, last)
        weight = self.old.bank.alignment_weight * gradient.grad / self.old.total.clamp_min(1)
        inverse = step.first.inverse[first:last, 0]
        factor = weight.to(inverse) * mask * self._alignment_share(step.inputs, first, last) * inverse
        return centers, -factor, radial + factor * step.first.center_cosine[first:last] * inverse


class _StepFunction(Function):
    """Autograd's view of a :class:`Step`: gathered embeddings (B, D) → loss, and rows of the batch's classes.

    Collectives: one all-reduce in the forward pass, none in backward (the caller gathers before and reduce-scatters
    after).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, softmax: FusedSoftmax, step: Step, verdict: Verdict, deferred: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.step, ctx.softmax, ctx.verdict, ctx.deferred, ctx.dtype = step, softmax, verdict, deferred, x.dtype
        return step.loss.value.to(softmax.optimizer.work), softmax.own_rows(step)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.step is None:
            raise RuntimeError("backward was called twice on one loss; its rows were updated by the first call")
        with torch.no_grad():
            dx = ctx.softmax.backward(ctx.step, *grads, ctx.verdict.finite, ctx.deferred).to(ctx.dtype)
        ctx.step = None
        return dx, None, None, None, None
