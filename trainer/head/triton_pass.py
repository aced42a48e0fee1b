"""The fused step with both passes as Triton kernels (:mod:`trainer.head.triton_kernels`): logits are never written, Q
once, in the products' dtype. The two products that use Q stay the BLAS's.
"""

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.errors import ConfigError
from trainer.head.config import HeadConfig
from trainer.head.fused import FusedSoftmax, OldCenters
from trainer.head.row_optimizer import SgdRows
from trainer.head.step import FirstPass, LossGradient, PassInput, Step

PROGRAMS_PER_PROCESSOR = 2
"""Programs of the first pass for each multiprocessor: the sums of each are added up in a fixed order."""


@dataclass(frozen=True)
class Tile:
    """Rows, samples and columns of D of a block, and Triton's options for it."""

    BM: int = 128
    BN: int = 64
    BK: int = 32
    num_warps: int = 8
    num_stages: int = 3

    @classmethod
    def of(cls, second: bool, compute: torch.dtype, batch: int, filtered: bool) -> "Tile":
        """That of the second or the first pass: the largest of which no register spills (`lce bench triton`).

        Args:
            filtered: with the inter-class filter, whose comparison takes registers.
        """
        wide = compute == torch.float32
        samples = min(32 if wide else 64, max(16, 1 << (batch - 1).bit_length()))
        if filtered and wide and not second:
            return cls(BM=64, BN=samples)
        return cls(BN=samples, BK=64 if second and not wide else 32)


@dataclass(frozen=True)
class TritonFirstPass(FirstPass):
    """A first pass by the kernel; ``order`` (B,) int32 says which of the targets is a sample's, −1: its class is
    elsewhere.
    """

    order: Tensor


class TritonSoftmax(FusedSoftmax):
    """The fused step with both passes as kernels; a step without rows or samples is torch's."""

    def first_pass(self, inputs: PassInput, deferred: bool) -> FirstPass:
        """See :meth:`FusedSoftmax.first_pass`; drawn rows are gathered by the kernel."""
        from trainer.head.triton_kernels import first

        x, rows, optimizer, targets = inputs.batch.x, inputs.rows, self.optimizer, inputs.targets.index
        n, (batch, dim) = rows.count, x.shape
        if not n or not batch:
            return super().first_pass(inputs, deferred)
        assert isinstance(optimizer, SgdRows), "check() chose it"
        drawn = rows.index is not None
        tile = self._tile(False, batch)
        columns = -(-batch // tile.BN)
        parts = max(1, min(-(-n // tile.BM), _programs(x.device) // columns))
        sums = x.new_empty(parts, batch)
        inverse = x.new_empty(n, 1)
        order = torch.full((batch,), -1, dtype=torch.int32, device=x.device)
        order[targets.samples] = torch.arange(len(targets.samples), dtype=torch.int32, device=x.device)
        cosine = None if self.old is None else x.new_empty(n)
        missed = optimizer.missed_by(rows.index) if rows.index is not None else None
        first[(columns * parts,)](
            optimizer.rows,
            optimizer.momentum,
            rows.index,
            missed,
            rows.kept if drawn else None,
            self._scaled(x).t(),
            inputs.log_weight,
            order,
            targets.places,
            None if self.old is None else self.old.bank.centers,
            inverse,
            cosine,
            sums,
            n,
            parts,
            float(inputs.shift),
            self._limit(),
            D=dim,
            BATCH=batch,
            SAMPLED=drawn,
            MOMENTUM=optimizer.momentum is not None,
            CORRECTED=inputs.log_weight is not None,
            ALIGN=self.old is not None,
            **self._options(tile),
        )
        return TritonFirstPass(sums.double().sum(0), self._alignment(inputs, cosine), inverse, cosine, None, order)

    def _alignment(self, inputs: PassInput, cosine: Tensor | None) -> Tensor:
        """LCE's sum over this rank's classes, float64."""
        if self.old is None or cosine is None:
            return torch.zeros((), dtype=torch.float64, device=inputs.batch.x.device)
        local = slice(None) if inputs.drawn.index is None else inputs.drawn.index
        share = self._alignment_share(inputs, 0, inputs.rows.count)
        return ((1 - cosine).double() * self.old.bank.mask[local].to(cosine) * share).sum()

    def _chunk_gradient(
        self, step: Step, gradient: LossGradient, scaled: Tensor, w: Tensor, number: int, first: int, last: int
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`FusedSoftmax._chunk_gradient`."""
        if not isinstance(step.first, TritonFirstPass):
            return super()._chunk_gradient(step, gradient, scaled, w, number, first, last)
        from trainer.head.triton_kernels import second

        inputs, targets, (n, dim) = step.inputs, step.inputs.targets, w.shape
        batch = scaled.shape[1]
        q, radial = w.new_empty(n, batch), step.first.inverse.new_empty(n)
        tile = self._tile(True, batch)
        second[(-(-n // tile.BM),)](
            w,
            scaled.t(),
            step.first.inverse[first:last],
            gradient.log_sum,
            None if inputs.log_weight is None else inputs.log_weight[first:last],
            gradient.coefficient,
            step.first.order,
            targets.index.places,
            gradient.target_pull,
            targets.cosine,
            q,
            radial,
            first,
            n,
            self.settings.scale,
            self._limit(),
            D=dim,
            BATCH=batch,
            CORRECTED=inputs.log_weight is not None,
            **self._options(tile),
        )
        return q, radial

    def _tile(self, second: bool, batch: int) -> Tile:
        return Tile.of(second, self.settings.compute, batch, self.settings.inter_class_filter > 0)

    def _limit(self) -> float:
        return self.settings.inter_class_filter * self.settings.scale

    def _options(self, tile: Tile) -> dict[str, Any]:
        precision = "tf32" if self.settings.tf32 else "ieee"
        return {"FILTER": self.settings.inter_class_filter > 0, "PRECISION": precision, **vars(tile)}


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # Triton's interpreter
    return PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check(config: HeadConfig, old: OldCenters | None, device: torch.device) -> None:
    """Raise :class:`ConfigError` where the kernels cannot run this head, naming what they do not have."""
    reason = _reason(config, old, device)
    if reason:
        raise ConfigError(f"head.impl = triton: {reason}; use head.impl=auto")


def _reason(config: HeadConfig, old: OldCenters | None, device: torch.device) -> str:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install 'lce-trainer[triton]')"
    if device.type != "cuda" and not interpreted():
        return f"its kernels run on CUDA, and the device is {device.type}"
    if config.rows not in ("float32", "bfloat16"):
        return f"rows in {config.rows} are not among what the kernels read"
    if config.optimizer.name != "sgd" or config.sub_centers > 1 or config.margin.name == "curricular":
        return "the kernels know sgd, one row a class, and margins on the target alone"
    if old is not None and old.bank.centers.device.type != device.type:
        return "the kernels read old centres on the device (compat.centers=device)"
    return ""
