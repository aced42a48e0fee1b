"""The element-wise work of the fused pass on a chunk of rows, plain torch that torch.compile fuses where that pays."""

import atexit
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainer.distributed import all_threads


@dataclass
class Kernels:
    """The element-wise work on a chunk, compiled where that pays; plain torch otherwise."""

    chunk_rows: int
    compiled: bool
    observer: Callable[[Callable[..., Any], tuple[Any, ...]], Any] | None = None
    _cache: dict[Any, Callable[..., Any]] = field(default_factory=dict)

    def fuse(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` compiled: once for full chunks, and once more for any other length of a chunk.

        An ``observer`` is handed every call instead, to count it as the one kernel that it becomes.
        """
        if self.observer is not None:
            return partial(_observed, self.observer, function)
        if not self.compiled:
            return function
        if function not in self._cache:
            self._cache[function] = _with_fallback(function, self)
        return self._cache[function]


def _observed(observer: Callable[..., Any], function: Callable[..., Any], *arguments: Any) -> Any:
    return observer(function, arguments)


_problems: list[str] = []


def why_eager() -> str | None:
    """Why the heads of this process run uncompiled though they were to be compiled; None: they do not."""
    return _problems[0] if _problems else None


def _with_fallback(function: Callable[..., Any], kernels: Kernels) -> Callable[..., Any]:
    fast = torch.compile(function)

    def call(*arguments: Any) -> Any:
        nonlocal fast
        if not kernels.compiled:
            return function(*arguments)
        try:
            with all_threads():  # the number of threads is compiled in
                return fast(*arguments)
        except Exception as error:  # whatever the compiler of this machine raises: none, broken, unsupported
            problem = error
        try:  # a run that was killed while it compiled leaves a library without content in the cache, for good
            fast = _compiled_anew(function)
            with all_threads():
                return fast(*arguments)
        except Exception:
            kernels.compiled = False
            _problems.append(f"{' '.join(str(problem).split()):.200}")
            warnings.warn(f"torch.compile does not work here, the head runs uncompiled: {_problems[0]}", stacklevel=2)
            return function(*arguments)

    return call


def _compiled_anew(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` compiled with an empty cache, which is removed with this process."""
    folder = tempfile.mkdtemp(prefix="lce-inductor-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    torch.compiler.reset()
    return torch.compile(function)


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
