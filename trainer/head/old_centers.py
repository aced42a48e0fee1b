"""LCE's direct mode as the class-sharded head needs it: old centres and boundaries on the rank that owns the new rows.

Alignment ``L_a = mean_j (1 − cos(w_j, o_j))`` over the classes that have a centre and boundary ``L_b = mean_i max(0,
b_y − cos(x_i, o_y))`` over the samples whose class has one (LCE, Meng et al., ICCV 2021, eq. 5 and 6, in (1 − cos)
units; the paper's λ_a is ``alignment_weight · D/2``). Both are computed in the head's own pass over its rows, see
trainer/head/fused.py.

With a sample rate below 1 the mean over all rows is estimated from the classes that were *drawn* as negatives, each
weighted by C/S (Horvitz–Thompson); a positive that was not drawn has no term. So the estimate is unbiased, whatever
the class sizes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.distributed import all_reduce_sum
from trainer.errors import CenterBankError


@dataclass(frozen=True)
class DirectCompat:
    """One rank's part of a centre bank and the weights of the two losses.

    Args:
        centers: (c, D1), unit vectors, float32 or bfloat16; may stay in host memory, then only the rows of a step are
        moved.
        boundaries: (c,) cosines.
        mask: (c,) bool, whether the class has an old centre; a masked class has no term at all.
        alignment_weight: λ_a in (1 − cos) units.
        boundary_weight: λ_b.
    """

    centers: Tensor
    boundaries: Tensor
    mask: Tensor
    alignment_weight: float
    boundary_weight: float

    def check(self, classes: int, dim: int) -> None:
        """Raise :class:`CenterBankError` unless the bank fits the rank's ``classes`` rows of dimension ``dim``."""
        if self.centers.shape != (classes, dim):
            raise CenterBankError(
                f"centre bank: {len(self.centers)} centres of dimension {self.centers.shape[1]} for {classes} classes "
                f"of dimension {dim}; direct mode needs D1 = D2 (choose backbone.dim, or a mode with a transformation)"
            )

    def total(self, device: torch.device) -> Tensor:
        """The number of classes with a centre over all ranks, 0-dim float64 (one all-reduce; called once)."""
        return all_reduce_sum(self.mask.sum().to(device=device, dtype=torch.float64))

    def rows(self, index: Tensor | slice, like: Tensor) -> tuple[Tensor, Tensor]:
        """Centres (n, D1) as they are stored, and the mask as numbers (n,) of the dtype of ``like``, both on its
        device.
        """
        if isinstance(index, Tensor):
            index = index.to(self.centers.device)
        return self.centers[index].to(like.device, non_blocking=True), self.mask[index].to(like)
