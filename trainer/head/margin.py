"""Margins: what happens to the cosine of a sample with its own class, in closed form on B numbers.

A margin maps the target cosine ``t`` (and, for two of them, the norm of the embedding) to the modified cosine ψ
whose logit is s·ψ. Nothing here ever sees a B × C matrix; the only margin that touches the negatives (curricular)
says so by ``reweights_negatives``.

| name       | ψ(θ), t = cos θ                          | paper |
| ---------- | ---------------------------------------- | ----- |
| softmax    | t                                        | NormFace, Wang et al., ACM MM 2017, eq. 6 |
| cosface    | t − m                                    | CosFace, Wang et al., CVPR 2018, eq. 4 |
| arcface    | f(θ + m)                                 | ArcFace, Deng et al., CVPR 2019, eq. 3 |
| combined   | f(m1·θ + m2) − m3                        | ArcFace, eq. 4 |
| adaface    | f(clip(θ − m·ẑ)) − (m + m·ẑ)             | AdaFace, Kim et al., CVPR 2022, eq. 5–9, ẑ from the norm |
| magface    | f(θ + m(a)), plus λ_g·g(a)               | MagFace, Meng et al., CVPR 2021, eq. 4 and Appendix; a is
the norm |
| curricular | f(θ + m); hard negatives t_j·(τ + t_j)   | CurricularFace, Huang et al., CVPR 2020, eq. 9–12 |

``f(φ) = (−1)^k cos φ − 2k`` with ``k = ⌊φ/π⌋`` is SphereFace's monotone continuation of the cosine (Liu et al.,
CVPR 2017, eq. 7): it equals cos φ up to π, and beyond it keeps falling, without a jump, where cos φ would rise
again.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.head.config import (
    AdaFaceConfig,
    ArcFaceConfig,
    CombinedConfig,
    CosFaceConfig,
    CurricularConfig,
    MagFaceConfig,
    MarginConfig,
)

SMALLEST_SINE = 1e-3
"""sin θ is taken to be at least this in the derivative 1/sin θ of arccos, which has a pole where a sample lies on
its class.
"""


@dataclass(frozen=True)
class Target:
    """The modified target cosines of a batch and their derivatives; all (B,).

    ``slope`` is ∂ψ/∂t, ``norm_slope`` is ∂ψ/∂‖x‖ (None: the margin ignores the norm or treats it as a constant).
    ``penalty`` is a further loss per sample that depends on the norm alone and ``penalty_slope`` its derivative
    (None: there is none).
    """

    psi: Tensor
    slope: Tensor
    norm_slope: Tensor | None = None
    penalty: Tensor | None = None
    penalty_slope: Tensor | None = None


class Margin:
    """``combined`` (m1, m2, m3), of which softmax, CosFace and ArcFace are special cases; base of the others.

    Args:
        m1, m2, m3: ψ = f(m1·θ + m2) − m3, angles in radians.
        straight_through: the margin's derivative is replaced by 1.
    """

    reweights_negatives = False

    def __init__(self, m1: float = 1.0, m2: float = 0.0, m3: float = 0.0, straight_through: bool = False) -> None:
        self.m1, self.m2, self.m3, self.straight_through = m1, m2, m3, straight_through

    def target(self, cosine: Tensor, norm: Tensor, training: bool | Tensor, valid: Tensor | None = None) -> Target:
        """Modify target cosines (B,) in [−1, 1] of embeddings with norms (B,) > 0; the same on every rank.

        Args:
            training: whether running statistics move: a bool, or a 0-dim number 1 or 0 that the host need not know.
            valid: (B,) bool, the samples that have a class, of which statistics are made; None: all.
        """
        if self.m1 == 1.0 and self.m2 == 0.0:
            return Target(cosine - self.m3, torch.ones_like(cosine))
        psi, slope = _angular(cosine, self.m1, torch.full_like(cosine, self.m2))
        if self.straight_through:
            slope = torch.ones_like(cosine)
        return Target(psi - self.m3, slope)

    def state(self) -> dict[str, Tensor]:
        """Running statistics that a checkpoint must keep (tensors are updated in place)."""
        return {}


class AdaFace(Margin):
    """AdaFace: the margin grows with the embedding's norm relative to a running mean and deviation (eq. 5–9).

    ẑ = clip((‖x‖ − μ)/(σ + ε)·h, −1, 1), ψ = f(clip(θ − m·ẑ, 0, π)) − (m + m·ẑ). The norm is a constant for the
    gradient, as in the paper, and counts relative to those of other images only: a last batch norm without a learned
    scale, such as the authors' own network has, does not matter to it. μ and σ are running means over global batches
    with the share ``norm_momentum``, starting at 20 and 100.
    """

    def __init__(self, config: AdaFaceConfig, device: torch.device | None = None) -> None:
        super().__init__()
        self.config = config
        self.mean = torch.full((), 20.0, dtype=torch.float64, device=device)
        self.deviation = torch.full((), 100.0, dtype=torch.float64, device=device)

    def target(self, cosine: Tensor, norm: Tensor, training: bool | Tensor, valid: Tensor | None = None) -> Target:
        """See :meth:`Margin.target`; in training the running statistics move first."""
        norm = norm.detach().clamp(1e-3, 100.0)
        ones = _ones(norm, valid)
        count = ones.sum()
        mean = (norm * ones).sum().double() / count.clamp_min(1)
        deviation = (((norm - mean).square() * ones).sum() / (count - 1).clamp_min(1)).sqrt()
        share = (count > 1).double() * training * self.config.norm_momentum
        self.mean += share * (mean - self.mean)
        self.deviation += share * (deviation - self.deviation)
        z = ((norm - self.mean.to(norm)) / (self.deviation.to(norm) + 1e-3) * self.config.h).clamp(-1, 1)
        angle = torch.arccos(cosine.clamp(-1, 1))
        shift = (angle - self.config.m * z).clamp(0, math.pi) - angle
        psi, slope = _angular(cosine, 1.0, shift)
        clipped = ((angle + shift) <= 0) | ((angle + shift) >= math.pi)
        return Target(psi - self.config.m * (1 + z), slope.masked_fill(clipped, 0.0))

    def state(self) -> dict[str, Tensor]:
        """See :meth:`Margin.state`."""
        return {"margin_norm_mean": self.mean, "margin_norm_deviation": self.deviation}


class MagFace(Margin):
    """MagFace: m(a) = l_m + (u_m − l_m)/(u_a − l_a)·(a − l_a) with a = clip(‖x‖, l_a, u_a), and λ_g·(1/a + a/u_a²)
    (eq. 4).

    The gradient flows through the norm, in the margin and in the norm term; outside [l_a, u_a] it is zero. The network
    learns its embeddings' scale (:mod:`trainer.networks.scale`): with a batch norm of fixed scale at its end every norm
    would stay at about √D.
    """

    def __init__(self, config: MagFaceConfig) -> None:
        super().__init__()
        self.config = config

    def target(self, cosine: Tensor, norm: Tensor, training: bool | Tensor, valid: Tensor | None = None) -> Target:
        """See :meth:`Margin.target`."""
        c = self.config
        a = norm.clamp(c.lower_norm, c.upper_norm)
        inside = ((norm > c.lower_norm) & (norm < c.upper_norm)).to(norm)
        rate = (c.upper_margin - c.lower_margin) / (c.upper_norm - c.lower_norm)
        margin = c.lower_margin + rate * (a - c.lower_norm)
        psi, slope = _angular(cosine, 1.0, margin)
        falls = -torch.sin(torch.arccos(cosine.clamp(-1, 1)) + margin).abs()  # f'(φ) = −|sin φ|
        penalty = c.norm_weight * (1 / a + a / c.upper_norm**2)
        penalty_slope = c.norm_weight * (1 / c.upper_norm**2 - 1 / a**2) * inside
        return Target(psi, slope, falls * rate * inside, penalty, penalty_slope)


class Curricular(Margin):
    """CurricularFace: ArcFace's target; a negative with t_j > ψ counts as t_j·(τ + t_j), τ a running mean of the
    target cosine.

    τ starts at 0 and moves by 1 % of the global batch's mean target cosine each step (eq. 12, momentum 0.99).
    """

    reweights_negatives = True

    def __init__(self, config: CurricularConfig, device: torch.device | None = None) -> None:
        super().__init__(m2=config.m)
        self.tau = torch.zeros((), dtype=torch.float64, device=device)

    def target(self, cosine: Tensor, norm: Tensor, training: bool | Tensor, valid: Tensor | None = None) -> Target:
        """See :meth:`Margin.target`; in training τ moves first."""
        ones = _ones(cosine, valid)
        count = ones.sum()
        mean = (cosine * ones).sum().double() / count.clamp_min(1)
        self.tau += (count > 0).double() * training * 0.01 * (mean - self.tau)
        return super().target(cosine, norm, training)

    def state(self) -> dict[str, Tensor]:
        """See :meth:`Margin.state`."""
        return {"margin_tau": self.tau}


def build_margin(config: MarginConfig, device: torch.device | None = None) -> Margin:
    """The margin that a configuration names, its running statistics on ``device``."""
    match config:
        case CosFaceConfig():
            return Margin(m3=config.m)
        case ArcFaceConfig():
            return Margin(m2=config.m, straight_through=config.gradient == "straight_through")
        case CombinedConfig():
            return Margin(config.m1, config.m2, config.m3, config.gradient == "straight_through")
        case AdaFaceConfig():
            return AdaFace(config, device)
        case MagFaceConfig():
            return MagFace(config)
        case CurricularConfig():
            return Curricular(config, device)
        case _:  # softmax
            return Margin()


def _ones(like: Tensor, valid: Tensor | None) -> Tensor:
    """1 for the samples that count, 0 for the others, (B,)."""
    return torch.ones_like(like) if valid is None else valid.to(like)


def _angular(cosine: Tensor, m1: float, m2: Tensor) -> tuple[Tensor, Tensor]:
    """f(m1·θ + m2) and its derivative m1·|sin φ| / sin θ with respect to t = cos θ; all (B,)."""
    t = cosine.clamp(-1, 1)
    phi = m1 * torch.arccos(t) + m2
    k = torch.floor(phi / math.pi)
    psi = torch.where(k % 2 == 0, 1.0, -1.0) * torch.cos(phi) - 2 * k
    sine = torch.sqrt((1 - t) * (1 + t)).clamp_min(SMALLEST_SINE)
    return psi, m1 * torch.sin(phi).abs() / sine
