"""``impl: reference``: the plain implementation, with which the fused pass is compared.

``weight[index]`` is copied, the logits of the batch are materialised, autograd builds a dense gradient of the whole
shard, and torch's own optimizer touches every row.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from trainer.distributed import all_reduce_sum
from trainer.head.config import AdamWRowsConfig, HeadConfig, SgdRowsConfig
from trainer.head.fused import OldCenters
from trainer.head.margin import Margin, Target
from trainer.head.sampling import Drawn
from trainer.head.step import StepOutput, Verdict


class _SharedSum(torch.autograd.Function):
    """Sum over the ranks of what every rank then uses alike: the gradient of each part is the sum's own."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return all_reduce_sum(value.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


class _OfStep(torch.autograd.Function):
    """The rows as one step takes them: whether it is finite and deferred is known when their gradient arrives."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, arriving: list[tuple[Verdict, bool]], verdict: Verdict, deferred: bool
    ) -> Tensor:
        ctx.arriving, ctx.verdict = arriving, (verdict, deferred)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.arriving.append(ctx.verdict)
        return grads[0], None, None, None


class ReferenceSoftmax:
    """The plain step on a rank's rows; see :class:`trainer.head.step.Softmax`.

    Args:
        config: validated settings.
        rows: (c, D), this rank's; they are updated in place.
        margin: of the targets.
        num_classes: C.
        old: LCE's direct mode; None: without.
        world_size: W.
    """

    def __init__(
        self,
        config: HeadConfig,
        rows: Tensor,
        margin: Margin,
        num_classes: int,
        old: OldCenters | None,
        world_size: int,
    ) -> None:
        self.config, self.rows, self.margin = config, rows, margin
        self.num_classes, self.old, self.world_size = num_classes, old, world_size
        self.weight = torch.nn.Parameter(rows)
        self._arriving: list[tuple[Verdict, bool]] = []  # the steps whose gradient is on its way to the rows
        o = config.optimizer
        self.optimizer: torch.optim.Optimizer
        if isinstance(o, SgdRowsConfig):
            self.optimizer = torch.optim.SGD([self.weight], 0.0, momentum=o.momentum, weight_decay=o.weight_decay)
        elif isinstance(o, AdamWRowsConfig):
            betas = (o.beta1, o.beta2)
            self.optimizer = torch.optim.AdamW([self.weight], 0.0, betas, o.eps, o.weight_decay)
        self.weight.register_post_accumulate_grad_hook(self._after_backward)

    def set_lr(self, lr: float) -> None:
        """The learning rate of the coming updates."""
        self.optimizer.param_groups[0]["lr"] = lr * self.config.optimizer.lr_factor

    def step(
        self, x: Tensor, labels: Tensor, drawn: Drawn, verdict: Verdict, *, training: bool, deferred: bool, seed: int
    ) -> StepOutput:
        """See :meth:`trainer.head.step.Softmax.step`; nothing is rounded here."""
        del seed
        scale = self.config.margin.scale
        weight: Tensor = _OfStep.apply(self.weight, self._arriving, verdict, deferred)
        x = x.to(self.weight.dtype)
        valid, count = labels >= 0, (labels >= 0).sum().clamp_min(1)
        norm = x.norm(dim=1).clamp_min(1e-12)
        unit = x / norm[:, None]
        rows = functional.normalize(weight if drawn.index is None else weight[drawn.index])
        cosines = unit @ rows.t()
        own = torch.zeros_like(norm).index_put((drawn.samples,), cosines[drawn.samples, drawn.places])
        target_cosine = _SharedSum.apply(own)
        target, psi = self._psi(target_cosine, norm, valid, training)
        logits = scale * cosines
        if self.config.margin.inter_class_filter:
            logits = logits.masked_fill(cosines > self.config.margin.inter_class_filter, -torch.inf)
        if self.config.sampling_correction and drawn.index is not None:
            share = torch.zeros_like(logits[0])
            share[: drawn.negatives] = -torch.log(torch.tensor(drawn.probability, dtype=share.dtype))
            share[drawn.places] = 0
            logits = logits + share
        logits = logits.index_put((drawn.samples, drawn.places), logits.new_tensor(-torch.inf))
        largest = torch.maximum(
            logits.detach().amax(1) if logits.shape[1] else psi.new_full(psi.shape, -torch.inf), scale * psi.detach()
        )
        if self.world_size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        negatives = _SharedSum.apply(torch.exp(logits - largest[:, None]).sum(1))
        loss = -(scale * psi - largest - torch.log(negatives + torch.exp(scale * psi - largest)))[valid].sum() / count
        report = {"classification": loss.detach(), "target_cosine": target_cosine.detach()[valid].sum() / count}
        loss = self._penalty(target, loss, norm, valid, count, report)
        loss = self._compatibility(loss, unit, rows, drawn, report)
        finite = torch.isfinite(loss.detach()) & torch.isfinite(x.detach()).all() & (labels < self.num_classes).all()
        own = weight[drawn.own if drawn.index is None else drawn.index[drawn.own]]
        return StepOutput(loss, own, report, finite)

    def _psi(self, cosine: Tensor, norm: Tensor, valid: Tensor, training: bool) -> tuple[Target, Tensor]:
        """ψ with the margin's own derivatives, for autograd: the value is exact, the slopes are constants of a
        linear map.
        """
        usable = torch.isfinite(norm.detach()).all()
        target = self.margin.target(cosine[valid].detach(), norm[valid].detach(), training and usable)
        linear = cosine[valid] * target.slope
        if target.norm_slope is not None:
            # every rank sees every norm, but the sum over ranks must count it once
            linear = linear + (norm[valid] - norm[valid].detach()) * target.norm_slope / self.world_size
        return target, cosine.clone().index_put((valid,), linear + (target.psi - linear).detach())

    def _penalty(
        self, target: Target, loss: Tensor, norm: Tensor, valid: Tensor, count: Tensor, report: dict[str, Tensor]
    ) -> Tensor:
        if target.penalty is None or target.penalty_slope is None:
            return loss
        value = target.penalty.sum() / count
        report["norm_penalty"] = value
        slope = (norm[valid] - norm[valid].detach()) * target.penalty_slope / self.world_size
        return loss + value + slope.sum() / count

    def _compatibility(
        self, loss: Tensor, unit: Tensor, rows: Tensor, drawn: Drawn, report: dict[str, Tensor]
    ) -> Tensor:
        if self.old is None:
            return loss
        compat, total = self.old.bank, self.old.total
        index = slice(None) if drawn.index is None else drawn.index
        centers, mask = (t.to(rows.dtype) for t in compat.rows(index, rows))
        share = torch.ones(len(rows), dtype=rows.dtype, device=rows.device)
        if drawn.index is not None:
            share[drawn.negatives :] = 0
            share = share / drawn.probability
        gaps = (1 - (rows * centers).sum(1)) * mask * share
        report["alignment"] = alignment = _SharedSum.apply(gaps.sum()) / total.clamp_min(1).to(rows.dtype)
        target_centers, target_mask = centers[drawn.places], mask[drawn.places]
        local = drawn.places if drawn.index is None else drawn.index[drawn.places]
        boundary = compat.boundaries[local.to(compat.boundaries.device)].to(unit)
        hinge = (boundary - (unit[drawn.samples] * target_centers).sum(1)).clamp_min(0) * target_mask
        number = all_reduce_sum(target_mask.sum()).clamp_min(1)
        report["boundary"] = boundary_loss = _SharedSum.apply(hinge.sum()) / number
        loss = loss + compat.alignment_weight * alignment + compat.boundary_weight * boundary_loss
        report.update({k: v.detach() for k, v in report.items()})
        return loss

    def _after_backward(self, _: Tensor) -> None:
        steps = self._arriving[:]  # one, or all whose losses were added up
        self._arriving.clear()
        if not all(bool(verdict.finite) for verdict, _ in steps):
            self.discard()
        elif not all(deferred for _, deferred in steps):
            self.apply(1.0)

    def apply(self, inverse_scale: float) -> None:
        """One step of torch's optimizer on the dense gradient."""
        if self.weight.grad is None:
            return
        if inverse_scale != 1.0:
            self.weight.grad.mul_(inverse_scale)
        self.optimizer.step()
        self.discard()

    def discard(self) -> None:
        """Forget the gradient."""
        self._arriving.clear()
        self.weight.grad = None

    def put(self, first: int, rows: Tensor) -> None:
        """Start with these rows (n, D) from ``first`` on."""
        self.rows[first : first + len(rows)] = rows

    def put_at(self, index: Tensor, rows: Tensor) -> None:
        """See :class:`trainer.head.step.Softmax`."""
        tables = self.tables()
        for table in tables.values():
            table[index] = 0
        tables["rows"][index] = rows.to(self.rows.dtype)

    def flush(self) -> None:
        """Every row is up to date after each step."""

    def loaded(self) -> None:
        """Nothing is remembered besides the tables."""

    def tables(self) -> dict[str, Tensor]:
        """Rows and torch's optimizer state under the fused pass's names (c, D), created if no step was taken yet."""
        slots = self.optimizer.state[self.weight]
        names = {"momentum_buffer": "momentum", "exp_avg": "first_moment", "exp_avg_sq": "second_moment"}
        wanted: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
        if isinstance(self.optimizer, torch.optim.SGD):
            wanted = ("momentum_buffer",) if self.optimizer.defaults["momentum"] else ()
        for slot in wanted:
            if slots.get(slot) is None:
                slots[slot] = torch.zeros_like(self.weight)
        if isinstance(self.optimizer, torch.optim.AdamW) and "step" not in slots:
            slots["step"] = torch.tensor(0.0)
        return {"rows": self.rows} | {names[slot]: slots[slot].detach() for slot in wanted}

    def counters(self) -> dict[str, Tensor]:
        """AdamW's number of steps, as a checkpoint must keep it."""
        return (
            {"adam_step": self.optimizer.state[self.weight]["step"]}
            if "step" in self.optimizer.state[self.weight]
            else {}
        )
