"""The element-wise work of the fused pass on a chunk of rows, plain torch that torch.compile fuses where that pays."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def chunk_rows(given: int, device_type: str) -> int:
    """Rows of a chunk: ``head.chunk_rows`` where it is given, else what fits the device's caches and keeps it busy."""
    return given or (4096 if device_type == "cpu" else 65536)


@dataclass
class Kernels:
    """The element-wise work on a chunk, compiled where that pays; plain torch otherwise."""

    chunk_rows: int
    compiled: bool
    _cache: dict[Any, Callable[..., Any]] = field(default_factory=dict)

    def fuse(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` compiled: once for full chunks, and once more for any other length of a chunk."""
        if not self.compiled:
            return function
        if function not in self._cache:
            self._cache[function] = _with_fallback(function, self)
        return self._cache[function]


def _with_fallback(function: Callable[..., Any], kernels: Kernels) -> Callable[..., Any]:
    fast = torch.compile(function)

    def call(*arguments: Any) -> Any:
        if not kernels.compiled:
            return function(*arguments)
        try:
            return fast(*arguments)
        except Exception as error:  # whatever the compiler of this machine raises: none, broken, unsupported
            kernels.compiled = False
            warnings.warn(f"torch.compile does not work here, the head runs uncompiled: {error!s:.200}", stacklevel=2)
            return function(*arguments)

    return call


def exp_sum(products: Tensor, inverse: Tensor, offset: Tensor) -> Tensor:
    """Σ_j exp(ρ_j·products_ji − offset_j) over a chunk: (n, B), (n, 1), (n, 1) → (B,)."""
    return torch.exp(products * inverse - offset).sum(0)


def softmax_weights(
    products: Tensor, inverse: Tensor, log_sum: Tensor, coefficient: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Q (n, B) in ``dtype`` and Σ_i P_ij z_ij (n,): P = coefficient·exp(z − log_sum), z = ρ·products, Q = ρP; log_sum
    is (1, B) or (n, B).
    """
    z = products * inverse
    p = torch.exp(z - log_sum) * coefficient
    return (p * inverse).to(dtype), (p * z).sum(1)
