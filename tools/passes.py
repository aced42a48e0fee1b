"""What is in a step of the head: every pass with its bytes, operations, launches and waits, counted by operators.

Counted on the CPU, on the path that CUDA takes: what is compiled to one kernel counts as one, each tensor read or
written once. On CUDA the profiler's kernels stand next to it.
"""

import collections
import inspect
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.head import fused, row_optimizer
from trainer.head.products import product

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten._unique2.default,
    aten.masked_select.default,
    aten.equal.default,
}
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.addmm_.default, aten.mm.dtype}
GATHERS = {aten.index_select.default, aten.index.Tensor}
SCATTERS = {aten.index_put_.default, aten.index_fill_.int_Scalar, aten.index_add_.default, aten.index_copy_.default}
FREE = ("empty", "new_empty", "detach", "_unsafe_view", "_reshape_alias")


@dataclass
class Pass:
    """What the calls of one place add up to; ``row_bytes`` are those of whole blocks of rows."""

    launches: int = 0
    bytes: int = 0
    row_bytes: int = 0
    flops: int = 0
    waits: int = 0


class Passes(TorchDispatchMode):
    """Counts while it is active.

    Args:
        dim: D; tensors of at least ``block`` rows of it count as rows.
    """

    def __init__(self, dim: int, block: int) -> None:
        super().__init__()
        self.dim, self.block = dim, block
        self.found: dict[str, Pass] = collections.defaultdict(Pass)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if view or func._schema.name.removeprefix("aten::").startswith(FREE):
            return out
        one = self.found[_innermost()]
        one.launches += 1
        one.waits += func in WAITS
        read = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        written = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
        writes_only = func._schema.name in ("aten::copy_", "aten::fill_", "aten::zero_")
        if func in GATHERS:
            read = [*read[1:], *written]
        elif func in SCATTERS:
            read, written = read[1:], read[-1:]
        elif writes_only:
            read = read[1:]
        if func in PRODUCTS:
            a, b = read[-2:]
            one.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        self._add(one, [*read, *written])
        return out

    def observe(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """One compiled kernel; tables that an index picks rows of count with those rows alone, written."""
        one = self.found[f"{function.__module__.rpartition('.')[2]}.{function.__name__}"]
        one.launches += 1
        names = list(inspect.signature(function).parameters)
        tensors = [t for t in pytree.tree_leaves(arguments) if isinstance(t, Tensor)]
        only_written = [a for name, a in zip(names, arguments, strict=False) if name == "out"]
        before = [t._version for t in tensors]
        out = _untraced(function, arguments)
        changed = [t for t, version in zip(tensors, before, strict=True) if t._version != version]
        first = arguments[0]
        index = first if isinstance(first, Tensor) and first.ndim == 1 and first.dtype == torch.int64 else None
        if index is not None:
            picked = [t for t in tensors if t.ndim == 2 and len(t) > len(index)]
            read = [t for t in tensors if not any(t is p for p in picked)]
            tables = [p[: len(index)] for p in picked]
            scattered = any(p is c for p in picked for c in changed)
            changed = [c for c in changed if not any(c is p for p in picked)]
            read = [t for t in read if not any(t is w for w in only_written)]
            self._add(one, [*read, *tables, *changed, *(tables if scattered else ())])
            return out
        written = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
        self._add(one, [*tensors, *changed, *written])
        return out

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """:func:`trainer.head.products.product` as CUDA has it, one operator, however this processor computes it."""
        with torch.utils._python_dispatch._disable_current_modes():
            out = product(a, b)
        one = self.found["products.product"]
        one.launches += 1
        one.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        self._add(one, [a, b, out])
        return out

    def _add(self, one: Pass, tensors: list[Tensor]) -> None:
        for t in tensors:
            size = min(t.nbytes, t.untyped_storage().nbytes())
            one.bytes += size
            one.row_bytes += size if t.ndim == 2 and self.dim in t.shape and t.numel() >= self.block * self.dim else 0

    def row_passes(self, rows: int) -> float:
        """How often all rows (float32) are read or written in what was counted."""
        return sum(one.row_bytes for one in self.found.values()) / (rows * self.dim * 4)


def _untraced(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    with torch.utils._python_dispatch._disable_current_modes():
        return function(*arguments)


def _innermost() -> str:
    """The innermost function of the head that is being executed."""
    for frame in reversed(traceback.extract_stack(limit=40)):
        path = Path(frame.filename)
        if path.parent.name in ("head", "trainer") and path.parent.parent.name in ("trainer", ""):
            return f"{path.stem}.{frame.name}"
        if path.parent.name == "trainer":
            return f"{path.stem}.{frame.name}"
    return "autograd"


@contextmanager
def counting(head: Any, dim: int, block: int) -> Iterator[Passes]:
    """Count the steps of a head made inside, on the path that CUDA takes."""
    softmax = head.softmax
    passes, gated = Passes(dim, block), softmax.gated
    softmax.gated, softmax.kernels.observer = True, passes.observe
    try:
        with (
            passes,
            patch.object(fused, "product", passes.product),
            patch.object(row_optimizer, "product", passes.product),
        ):
            yield passes
    finally:
        softmax.gated, softmax.kernels.observer = gated, None


def table(passes: Passes, rows: int) -> str:
    """The passes, the largest first."""
    lines = [f"{'pass':44} {'launches':>8} {'MB':>10} {'rows read or written':>20} {'GFLOP':>9} {'waits':>5}"]
    total = Pass()
    for name, one in sorted(passes.found.items(), key=lambda item: -item[1].bytes):
        lines.append(_line(name, one, rows, passes.dim))
        for key in vars(one):
            setattr(total, key, getattr(total, key) + getattr(one, key))
    return "\n".join([*lines, _line("all", total, rows, passes.dim)])


def _line(name: str, one: Pass, rows: int, dim: int) -> str:
    times = one.row_bytes / (rows * dim * 4)
    return f"{name:44} {one.launches:8} {one.bytes / 1e6:10.2f} {times:20.2f} {one.flops / 1e9:9.3f} {one.waits:5}"
