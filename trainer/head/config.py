"""The section ``head``: the margin, the rows' optimizer, and how the class-sharded softmax is computed."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from trainer.config import Section, Variants, refuse_idle

_MARGIN = "the margin on the target's cosine; formulas and papers in trainer/head/margin.py"
_ROWS = "how the head's rows are updated; of rows that were not drawn see trainer/head/row_optimizer.py"

LARGEST_COSINE_MARGIN = 2.0
"""From here on a margin on the cosine takes every target below the worst negative."""
LARGEST_SCALE = 78.0
"""Up to which the fused pass is exact in float32 (:func:`trainer.head.step.constant_shift`)."""


class MarginConfig(Section):
    """The margin on the target's cosine; the base of its kinds. Formulas and papers in trainer/head/margin.py."""

    name: str
    scale: float = Field(64.0, gt=0, description="s: logits are s · cos")
    inter_class_filter: float = Field(
        0.0, ge=0, lt=1, description="negatives with a cosine above this are left out (noisy labels); 0 is off"
    )


class SoftmaxConfig(MarginConfig):
    """No margin."""

    name: Literal["softmax"] = Field("softmax", description=_MARGIN)


class CosFaceConfig(MarginConfig):
    """cos θ − m."""

    name: Literal["cosface"] = Field("cosface", description=_MARGIN)
    m: float = Field(0.4, ge=0, lt=LARGEST_COSINE_MARGIN, description="the margin")


class AngularConfig(MarginConfig):
    """Base of margins that are added to the angle."""

    gradient: Literal["exact", "straight_through"] = Field(
        "exact", description="straight_through replaces the margin's derivative by 1, as arcface_torch does"
    )


class ArcFaceConfig(AngularConfig):
    """cos(θ + m)."""

    name: Literal["arcface"] = Field("arcface", description=_MARGIN)
    m: float = Field(0.4, ge=0, lt=math.pi, description="the margin")


class CombinedConfig(AngularConfig):
    """cos(m1·θ + m2) − m3."""

    name: Literal["combined"] = Field("combined", description=_MARGIN)
    m1: float = Field(1.0, ge=1, description="factor of the angle in cos(m1·θ + m2) − m3")
    m2: float = Field(0.0, ge=0, lt=math.pi, description="margin on the angle in cos(m1·θ + m2) − m3")
    m3: float = Field(0.0, ge=0, lt=LARGEST_COSINE_MARGIN, description="margin on the cosine in cos(m1·θ + m2) − m3")

    @model_validator(mode="after")
    def _some(self) -> "CombinedConfig":
        if (self.m1, self.m2, self.m3) == (1, 0, 0):
            raise ValueError(
                "head.margin: combined with m1 = 1, m2 = 0 and m3 = 0 is no margin; set one of them, or "
                "head.margin.name=softmax"
            )
        return self


class AdaFaceConfig(MarginConfig):
    """A margin that grows with the embedding's norm relative to its running mean."""

    name: Literal["adaface"] = Field("adaface", description=_MARGIN)
    m: float = Field(0.4, ge=0, lt=math.pi, description="the margin")
    h: float = Field(0.333, gt=0, description="concentration of the norm statistic")
    norm_momentum: float = Field(0.01, gt=0, le=1, description="share of the batch in the running norm statistics")


class MagFaceConfig(MarginConfig):
    """A margin that grows with the embedding's norm, and a term that draws the norms up."""

    name: Literal["magface"] = Field("magface", description=_MARGIN)
    lower_norm: float = Field(
        10.0, gt=0, description="l_a, from which on the margin grows; below √D, where norms begin"
    )
    upper_norm: float = Field(110.0, gt=0, description="u_a, up to which the margin grows; above √D")
    lower_margin: float = Field(0.45, ge=0, lt=math.pi, description="l_m, the margin at l_a")
    upper_margin: float = Field(0.8, ge=0, lt=math.pi, description="u_m, the margin at u_a")
    norm_weight: float = Field(35.0, ge=0, description="λ_g, the weight of the norm term")

    @model_validator(mode="after")
    def _in_order(self) -> "MagFaceConfig":
        if self.lower_norm >= self.upper_norm or self.lower_margin > self.upper_margin:
            raise ValueError("head.margin: magface needs lower_norm < upper_norm and lower_margin <= upper_margin")
        return self


class CurricularConfig(MarginConfig):
    """ArcFace's margin, and negatives that count more the more the network has learnt."""

    name: Literal["curricular"] = Field("curricular", description=_MARGIN)
    m: float = Field(0.4, ge=0, lt=math.pi, description="the margin")


AnyMargin: TypeAlias = Annotated[
    SoftmaxConfig | CosFaceConfig | ArcFaceConfig | CombinedConfig | AdaFaceConfig | MagFaceConfig | CurricularConfig,
    Variants(name="cosface"),
]


class RowOptimizerConfig(Section):
    """How the head's rows are updated; the base of its kinds."""

    name: str
    lr_factor: float = Field(1.0, gt=0, description="the rows' learning rate is this times the schedule's")
    weight_decay: float = Field(5e-4, ge=0, description="weight decay, per update and unit of learning rate")


class SgdRowsConfig(RowOptimizerConfig):
    """SGD with momentum, as if every row were updated in every step."""

    name: Literal["sgd"] = Field("sgd", description=_ROWS)
    momentum: float = Field(0.9, ge=0, lt=1, description="share of the former step that is kept")


class AdamWRowsConfig(RowOptimizerConfig):
    """AdamW on a clock per row that runs while the row is drawn."""

    name: Literal["adamw"] = Field("adamw", description=_ROWS)
    beta1: float = Field(0.9, ge=0, lt=1, description="share of the first moment that is kept")
    beta2: float = Field(0.999, ge=0, lt=1, description="share of the second moment that is kept")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")


AnyRowOptimizer: TypeAlias = Annotated[SgdRowsConfig | AdamWRowsConfig, Variants(name="sgd")]


SampleRate: TypeAlias = Annotated[float, Field(gt=0, le=1)] | tuple[tuple[int, float], ...]
"""A share of the classes, or (update, share from it on) in ascending order, the first from update 0 on."""


class HeadConfig(Section):
    """The class-sharded margin softmax."""

    impl: Literal["auto", "fused", "native", "triton", "reference"] = Field(
        "auto",
        description="fused: torch; native: C++, on the CPU; triton: kernels that write no logits, on CUDA; auto: "
        "native where it pays and can, else fused; reference: logits materialised, dense gradient",
    )
    update: Literal["fused", "deferred"] = Field(
        "fused",
        description="deferred: rows wait until the backbone's gradient is known to be finite; costs their gradient's "
        "memory and a wait for the device (always so with accumulated batches and float16)",
    )
    margin: AnyMargin = Field(CosFaceConfig(), description="the margin on the target's cosine")
    sample_rate: SampleRate = Field(
        1.0,
        description="share of the classes drawn as negatives each step, above 0, at most 1; or pairs of an update and "
        "the share from it on, such as [[0, 0.1], [20000, 1.0]]",
    )
    sampling_correction: bool = Field(
        False, description="weight drawn negatives by 1 / sample_rate, so that their sum estimates the full one"
    )
    sub_centers: int = Field(
        1, ge=1, le=16, description="K rows per class, the nearest one counts (sub-center ArcFace)"
    )
    optimizer: AnyRowOptimizer = Field(SgdRowsConfig(), description="how the rows are updated")
    compute: Literal["float32", "tf32", "bfloat16"] = Field(
        "float32",
        description="what the products take, their results are float32; tf32: float32 rounded to 11 bits on CUDA, in "
        "the head's products alone (on the CPU float32)",
    )
    rows: Literal["float32", "bfloat16", "float8", "float64"] = Field(
        "float32",
        description="dtype of rows and their state; float8 (E4M3 with a scale a row) needs momentum 0: 0.5 KB a class "
        "at dimension 512",
    )
    rows_residual: bool = Field(
        False,
        description="rows float8: keep what rounding takes away, in bfloat16, and add it at the row's next update "
        "(Kahan); 1.5 KB a class",
    )
    chunk_rows: int = Field(0, ge=0, description="rows per chunk of the pass; 0: chosen for the device")
    init_std: float = Field(0.01, gt=0, description="standard deviation of the rows at the start")
    weights: Path | None = Field(
        None, description="start from these rows: arcface_torch's output folder, a classifier file, or a run folder"
    )

    @field_validator("sample_rate", mode="before")
    @classmethod
    def _shares(cls, value: Any) -> Any:
        return _checked_schedule(value) if isinstance(value, list | tuple) else _checked_share(value)

    @model_validator(mode="after")
    def _combinations(self) -> "HeadConfig":
        if self.sampling_correction and not self.draws:
            raise ValueError(
                "head.sampling_correction: weights drawn negatives, and head.sample_rate is 1: none are drawn; remove "
                "it, or set head.sample_rate below 1"
            )
        if self.weights is not None and self.sub_centers > 1:
            raise ValueError("head.weights: one row per class; use head.sub_centers=1")
        if self.weights is not None:
            refuse_idle(self, "head", ("init_std",), "with head.weights, which give all rows")
        if self.impl != "reference" and self.rows != "float64" and self.margin.scale > LARGEST_SCALE:
            raise ValueError(
                f"head.margin.scale = {self.margin.scale}: the fused pass is exact in float32 up to "
                f"{LARGEST_SCALE:g}; use head.impl=reference"
            )
        if self.compute == "tf32" and self.rows == "float64":
            raise ValueError("head.compute = tf32: rounds products of float32; head.rows is float64: remove it")
        if self.impl == "reference":
            self._check_reference()
        self._check_float8()
        return self

    @property
    def rates(self) -> tuple[tuple[int, float], ...]:
        """(update, sample rate from it on) in ascending order."""
        return self.sample_rate if isinstance(self.sample_rate, tuple) else ((0, self.sample_rate),)

    @property
    def highest_rate(self) -> float:
        """The highest sample rate of the run."""
        return max(rate for _, rate in self.rates)

    @property
    def draws(self) -> bool:
        """Whether some updates draw only some of the classes."""
        return any(rate < 1 for _, rate in self.rates)

    def rate_at(self, update: int) -> float:
        """The sample rate of an update, counted from 0."""
        return next(rate for first, rate in reversed(self.rates) if first <= max(update, 0))

    @property
    def frozen_rows(self) -> str:
        """The dtype of rows that are not trained: ``rows``, or bfloat16 for float8."""
        return "bfloat16" if self.rows == "float8" else self.rows

    def _check_float8(self) -> None:
        if self.rows != "float8":
            if self.rows_residual:
                raise ValueError(f"head.rows_residual belongs to rows float8; head.rows is {self.rows}")
        elif not isinstance(self.optimizer, SgdRowsConfig) or self.optimizer.momentum:
            raise ValueError(
                "head.rows = float8: rows of one byte are trained by sgd without momentum (its table would be larger "
                "than they are); use head.optimizer.momentum=0 (and head.optimizer.name=sgd)"
            )

    def _check_reference(self) -> None:
        if self.chunk_rows:
            raise ValueError("head.chunk_rows belongs to passes in chunks; head.impl is reference")
        refuse_idle(self, "head", ("update",), "with head.impl=reference")
        if self.sub_centers > 1 or self.margin.name == "curricular" or self.compute != "float32":
            raise ValueError("head.impl = reference: without sub-centres, curricular margin, tf32 and bfloat16 compute")
        if self.optimizer.name == "adamw" and self.draws:
            raise ValueError(
                "head.impl = reference: adamw at sample_rate 1 only (torch's AdamW also moves rows that were not drawn)"
            )
        if self.rows in ("bfloat16", "float8"):
            raise ValueError(
                f"head.rows={self.rows} needs stochastic rounding; head.impl=reference does not support it, use "
                "head.impl=auto"
            )


def _checked_share(value: Any) -> Any:
    """A share of the classes as it was given. Raises ValueError for what is none."""
    try:
        share = float(value)
    except (TypeError, ValueError):
        name = "head.sample_rate: " if isinstance(value, Mapping) else ""
        raise ValueError(f"{name}expected a number, or pairs such as [[0, 0.1], [20000, 1.0]]") from None
    if not 0 < share <= 1:
        raise ValueError("must be greater than 0 and less than or equal to 1")
    return value


def _checked_schedule(pairs: Sequence[Any]) -> Sequence[Any]:
    """Pairs of an update and a share, in ascending order. Raises ValueError for what is no sensible schedule."""
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or any(isinstance(one, bool) for one in pair):
            raise ValueError(f"{pair!r}: expected a pair of an update and a share, such as [20000, 1.0]")
        if not isinstance(pair[0], int):
            raise ValueError(f"{pair!r}: an update is a whole number")
        _checked_share(pair[1])
    if not pairs or pairs[0][0] != 0:
        raise ValueError("the first pair is for update 0")
    for (before, share), (update, later) in pairwise(pairs):
        if update <= before:
            raise ValueError(f"update {update} stands behind update {before}; give them in ascending order")
        if float(share) == float(later):
            raise ValueError(f"from update {update} on the share is {later}, as before; leave that pair out")
    return pairs
