"""The maps T between two embedding spaces: T₂₁ from new to old, T₁₂ from old to new.

Every map takes vectors (n, D_in) and gives vectors (n, D_out); who uses it normalises before and after. ``rbt`` is the
paper's (LCE, Meng et al., ICCV 2021, section 3.2; its blocks from "Unified Representation Learning for Cross Model
Compatibility", Wang et al., BMVC 2020); the others are this project's additions. D_in ≠ D_out works for each.
"""

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from trainer.networks.config import LinearConfig, MlpConfig, RbtConfig, TransformConfig

# MXNet's momentum 0.9 is the share of the running value that is kept, PyTorch's is the share that is replaced.
_BN_EPS, _BN_MOMENTUM = 2e-5, 0.1


class ResidualBottleneck(nn.Module):
    """One RBT block: ``skip(x) + Σ_k path_k(x)``, a path being three times Linear (no bias), BN, PReLU through a
    narrow width.

    The skip is the identity; where the dimension changes, a linear projection without bias. The last BN of each path
    starts with weight 0, so that the block starts as its skip (this project's choice; the paper says nothing of it).
    """

    def __init__(self, dim_in: int, dim_out: int, paths: int, bottleneck: int) -> None:
        super().__init__()
        self.skip = nn.Identity() if dim_in == dim_out else nn.Linear(dim_in, dim_out, bias=False)
        widths = (dim_in, bottleneck, bottleneck, dim_out)
        self.paths = nn.ModuleList(
            nn.Sequential(*(layer for a, b in pairwise(widths) for layer in _layer(a, b))) for _ in range(paths)
        )
        for path in self.paths:
            nn.init.zeros_(path.get_parameter("7.weight"))

    def forward(self, x: Tensor) -> Tensor:
        """(n, D_in) → (n, D_out)."""
        out = self.skip(x)
        for path in self.paths:
            out = out + path(x)
        return out


def _layer(dim_in: int, dim_out: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    norm = nn.BatchNorm1d(dim_out, eps=_BN_EPS, momentum=_BN_MOMENTUM)
    return nn.Linear(dim_in, dim_out, bias=False), norm, nn.PReLU(dim_out)


class Orthogonal(nn.Module):
    """``Q x`` with orthonormal columns (D_out ≥ D_in: lengths and angles are kept) or rows (D_out < D_in: a
    projection)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        linear = nn.Linear(dim_in, dim_out, bias=False)
        nn.init.eye_(linear.weight)
        if linear.weight.is_meta:  # built to be counted: the parametrisation would read its numbers
            self.linear = linear
            return
        self.linear = cast(nn.Linear, parametrizations.orthogonal(linear, orthogonal_map="householder"))

    def forward(self, x: Tensor) -> Tensor:
        """(n, D_in) → (n, D_out)."""
        return self.linear(x)

    def plain(self) -> nn.Linear:
        """The same map as an ordinary linear layer, for export."""
        out = nn.Linear(self.linear.in_features, self.linear.out_features, bias=False)
        out.weight.data.copy_(self.linear.weight)
        return out


def build_transform(config: TransformConfig, dim_in: int, dim_out: int) -> nn.Module:
    """The map ``config.name`` from dimension ``dim_in`` to ``dim_out``, freshly initialised.

    ``rbt``: ``blocks`` residual bottleneck blocks in series, the first of which changes the dimension. ``linear``: a
    matrix and a bias, started at the (rectangular) identity. ``orthogonal``: a semi-orthogonal matrix by
    parametrisation, started there too.
    ``mlp``: Linear, BN, PReLU, Linear.
    """
    if isinstance(config, RbtConfig):
        dims = [dim_in] + [dim_out] * config.blocks
        return nn.Sequential(*(ResidualBottleneck(a, b, config.paths, config.bottleneck) for a, b in pairwise(dims)))
    if isinstance(config, LinearConfig):
        linear = nn.Linear(dim_in, dim_out)
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
        return linear
    if not isinstance(config, MlpConfig):
        return Orthogonal(dim_in, dim_out)
    hidden = config.hidden or 2 * max(dim_in, dim_out)
    first, norm, act = _layer(dim_in, hidden)
    return nn.Sequential(first, norm, act, nn.Linear(hidden, dim_out))


def build_distance_head(dim: int) -> nn.Module:
    """From unit vectors (n, ``dim``) to the logarithm (n, 1) of how far their map is expected to be from its target:
    Linear, BN, PReLU, Linear."""
    return build_transform(MlpConfig(name="mlp"), dim, 1)


def expected_distances(head: nn.Module, vectors: Tensor) -> Tensor:
    """exp(head(n(v))) for (n, D) → (n,), in (1 − cos) units."""
    return head(torch.nn.functional.normalize(vectors))[:, 0].exp()


def transform_vectors(transform: nn.Module, vectors: Tensor) -> Tensor:
    """n(T(n(v))) for (n, D_in) → (n, D_out): what search compares."""
    return torch.nn.functional.normalize(transform(torch.nn.functional.normalize(vectors)))
