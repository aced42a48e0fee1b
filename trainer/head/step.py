"""The values of a step of the head by life time, and what every implementation of the step offers.

A step makes, one after the other: :class:`Batch` (the embeddings on the sphere), :class:`Targets` (whose class is
here), :class:`PassInput` (all that the two passes over the rows need), :class:`FirstPass`, :class:`Boundary` (LCE's
part of the samples), :class:`Loss`. None changes after it was made. Forward returns them as one :class:`Step`;
backward takes it with the :class:`LossGradient` that arrives.

Notation: rows w_j (n, D) with ρ_j = 1/‖w_j‖, unit embeddings x_i (B, D), B the global batch, K rows (sub-centres) per
class, P samples whose class is on this rank, u distinct classes among them.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from trainer.errors import ConfigError
from trainer.head.config import LARGEST_SCALE
from trainer.head.margin import Target
from trainer.head.old_centers import StepCenters
from trainer.head.row_optimizer import Selection
from trainer.head.sampling import Drawn

LARGEST_EXPONENT = 70.0
"""exp(70) times 29 million rows is still below the largest float32 (exp(88.7)), with a factor of 4 to spare."""
MASKED = -1e20
"""What a target's logit is replaced by among the negatives: exp of it is 0, and it stays finite when multiplied by
any 1/‖w‖.
"""


def constant_shift(scale: float, dtype: torch.dtype, remedy: str = "use head.impl=reference") -> float:
    """The constant subtracted from every logit s·cos before exp: s − 70 in float32, 0 in float64.

    At cos = 1 for all of 29 million rows the sum is below float32's largest number; at cos = −1 a single term
    exp(−s − shift) is still a normal number while s ≤ 78.

    Raises:
        ConfigError: the scale is too large for float32.
    """
    if dtype == torch.float64:
        return 0.0
    if scale > LARGEST_SCALE:
        raise ConfigError(
            f"head.margin.scale = {scale}: the fused pass is exact in float32 up to {LARGEST_SCALE:g}; {remedy}"
        )
    return scale - LARGEST_EXPONENT


@dataclass(frozen=True)
class PassSettings:
    """What does not change from step to step."""

    scale: float
    sub_centers: int
    correction: bool
    inter_class_filter: float
    compute: torch.dtype
    tf32: bool


@dataclass(frozen=True)
class Batch:
    """The global batch: unit embeddings ``x`` (B, D) and norms (B,) in working precision; ``valid`` (B,) bool: it has
    a class. ``count`` (0-dim) is the number of those, at least 1; ``usable`` (0-dim bool) says that all embeddings
    are finite and all labels below C. Where it is not, x is zero.
    """

    x: Tensor
    norm: Tensor
    valid: Tensor
    count: Tensor
    usable: Tensor

    @classmethod
    def of(cls, embeddings: Tensor, labels: Tensor, num_classes: int, work: torch.dtype) -> "Batch":
        """From embeddings (B, D) as the backbone gives them and labels (B,).

        Inputs that are not finite are replaced by zeros, so that the host does not wait for the device; the loss is
        set to NaN at the end.
        """
        norm = torch.linalg.vector_norm(embeddings.to(work), dim=1)
        usable = torch.isfinite(norm).all() & (labels < num_classes).all()
        norm = torch.where(usable, norm, 0.0).clamp_min(1e-12)
        valid = labels >= 0
        x = torch.where(usable, embeddings.to(work), 0.0) / norm[:, None]
        return cls(x, norm, valid, valid.sum().clamp_min(1), usable)


@dataclass(frozen=True)
class TargetIndex:
    """Where the batch's classes stand among the rows of a step, and in which chunk.

    ``samples`` (P,) by ascending ``places`` (P,), places in classes; chunk k holds those from ``bounds[k]`` to
    ``bounds[k + 1]``. ``own`` (u,) are the distinct places in ascending order, ``own_order`` (u,) takes rows from the
    order of the classes to that one, and ``own_bounds`` are their chunks' bounds.
    """

    samples: Tensor
    places: Tensor
    bounds: list[int]
    own: Tensor
    own_order: Tensor
    own_bounds: list[int]

    @classmethod
    def of(cls, drawn: Drawn, classes: int, chunk: int) -> "TargetIndex":
        """For ``classes`` classes in chunks of ``chunk``."""
        edges = np.arange(0, classes + chunk, chunk)
        bounds, own_bounds = (np.searchsorted(at, edges).tolist() for at in (drawn.place_list, drawn.own_list))
        own = drawn.own[drawn.own_order]
        return cls(drawn.samples, drawn.places, bounds, own, drawn.own_order, own_bounds)


@dataclass(frozen=True)
class Targets:
    """The samples whose class is here, in the order of ``index``: their ``cosine`` (P,) with their class, and which
    row that is, ``rows`` (P,) places in rows (with sub-centres the nearest).
    """

    index: TargetIndex
    cosine: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Curriculum:
    """What CurricularFace's negatives depend on: the targets' modified cosine ψ (B,), τ (0-dim), and the margin's
    whole answer.
    """

    psi: Tensor
    tau: Tensor
    target: Target


@dataclass(frozen=True)
class PassInput:
    """What both passes over the rows need.

    ``rows`` are the rows of the step, ``shift`` the constant taken off every logit (0-dim where it depends on τ),
    ``log_weight`` (n, 1) is log C/S for classes that only the draw brought in (None: no correction), ``keep_products``
    whether the first pass's products are kept for the second. ``centers`` are those that come from host memory.
    """

    batch: Batch
    drawn: Drawn
    rows: Selection
    targets: Targets
    shift: float | Tensor
    log_weight: Tensor | None
    curriculum: Curriculum | None
    keep_products: bool
    centers: StepCenters | None


@dataclass(frozen=True)
class FirstPass:
    """What the first pass found: ``sums`` (B,) Σ exp over the negatives and ``alignment`` (0-dim), LCE's sum over
    classes, both float64 and this rank's; ρ of every row (n·K, 1); cos(w_j, o_j) (n,) where there are old centres;
    the products by chunk where they are kept.
    """

    sums: Tensor
    alignment: Tensor
    inverse: Tensor
    center_cosine: Tensor | None
    products: list[Tensor] | None


@dataclass(frozen=True)
class Boundary:
    """LCE's boundary loss of the samples whose class is here: their old centres (P, D), max(0, b − cos) (P,), its sum
    and how many samples have a centre (0-dim float64). ``cosine`` (P,) with the centre and ``slack`` (P,), cos − b,
    are NaN where there is none.
    """

    centers: Tensor
    hinge: Tensor
    cosine: Tensor
    slack: Tensor
    total: Tensor
    count: Tensor


@dataclass(frozen=True)
class Loss:
    """The loss of the global batch, equal on all ranks.

    ``value`` (0-dim; NaN where the step is not finite), ``report`` (0-dim tensors), log of the softmax's denominator,
    the target's probability and the margin's answer for every sample (B,) (of no meaning where it has no class), and
    the number of samples in the boundary loss.
    """

    value: Tensor
    report: dict[str, Tensor]
    log_sum: Tensor
    probability: Tensor
    target: Target
    hinge_count: Tensor


@dataclass(frozen=True)
class Step:
    """A forward step, all that backward needs of it."""

    inputs: PassInput
    first: FirstPass
    boundary: Boundary | None
    loss: Loss


@dataclass(frozen=True)
class LossGradient:
    """What arrives in backward, made ready for the rows.

    ``grad`` (0-dim float64) is the total's gradient with respect to the loss, ``coefficient`` (0-dim) that times
    s / count; ``log_sum`` (1, B) is +inf where a sample has no class; ``target_pull`` (P,) is ∂L/∂(target cosine) in
    the order of the index; ``own`` (u, D) the gradient of the batch's own rows in that of ``TargetIndex.own`` (none
    with sub-centres). ``gate`` (0-dim, None: 1) is 0 where no row may change.
    """

    grad: Tensor
    coefficient: Tensor
    log_sum: Tensor
    target_pull: Tensor
    own: Tensor
    gate: Tensor | None


class Verdict:
    """Whether a step is finite on all ranks: known at the end of the head's forward, read in backward."""

    finite: Tensor


@dataclass(frozen=True)
class StepOutput:
    """The loss (0-dim) and the rows of the batch's own classes (u, D), both with gradient; detached 0-dim tensors to
    report; whether the step is finite (0-dim bool), equal on all ranks.
    """

    loss: Tensor
    own: Tensor
    report: dict[str, Tensor]
    finite: Tensor


class Softmax(Protocol):
    """An implementation of the head's step, with the rows and their optimizer: fused (torch), native (C++), reference.

    The loss's backward gives this rank's part of ∂L/∂x and updates the rows, unless the step was ``deferred``.
    """

    rows: Tensor

    def step(
        self, x: Tensor, labels: Tensor, drawn: Drawn, verdict: Verdict, *, training: bool, deferred: bool, seed: int
    ) -> StepOutput:
        """The loss of a gathered batch.

        Args:
            x: (B, D) embeddings of all ranks, as they come from the backbone.
            labels: (B,) global classes; −1: no class, no term.
            drawn: the rank's rows of this step.
            verdict: is set before backward runs.
            training: whether running statistics of the margin move.
            deferred: keep the rows' gradient for :meth:`apply`.
            seed: of this step's rounding.
        """

    def put(self, first: int, rows: Tensor) -> None:
        """Start with these rows (n, D) from ``first`` on."""

    def put_at(self, index: Tensor, rows: Tensor) -> None:
        """Put rows (n, D) at ``index`` (n,) as of now, and forget what their optimizer remembers of gradients."""

    def set_lr(self, lr: float) -> None:
        """The learning rate of the coming updates."""

    def apply(self, inverse_scale: float) -> None:
        """Update the rows with the gradients of deferred steps, times ``inverse_scale``."""

    def discard(self) -> None:
        """Forget those gradients."""

    def flush(self) -> None:
        """Bring every row up to date."""

    def tables(self) -> dict[str, Tensor]:
        """Rows and their state, tensors of one entry per row, by name: the live memory."""

    def counters(self) -> dict[str, Tensor]:
        """What else a checkpoint must keep."""

    def loaded(self) -> None:
        """The tables were loaded from a checkpoint."""
