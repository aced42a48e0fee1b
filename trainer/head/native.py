"""The fused pass in C++ (native.cpp): built once per machine, for the plain case on a CPU, with torch's own BLAS.

Where there is no C++ compiler or the BLAS has no ``sgemm``, the torch path runs and says so once. The built library is
kept in ``$XDG_CACHE_HOME/lce-trainer`` (``~/.cache/lce-trainer``); ``LCE_NATIVE=0`` turns it off.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.config import HeadConfig
from trainer.head.row_optimizer import SgdRows
from trainer.machine import processor_features

if TYPE_CHECKING:
    from trainer.head.sharded_softmax import FusedStep

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")

_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class Step(ctypes.Structure):
    """What native.cpp calls ``Step``: the numbers and tensors of one step; there is what each means."""

    _fields_ = [
        *((name, _LONG) for name in ("count", "dim", "batch", "threads")),
        *((name, _POINTER) for name in ("rows", "momentum", "index", "missed", "kept", "scaled", "unit")),
        *((name, _POINTER) for name in ("products", "inverse", "log_weight")),
        *((name, _FLOAT) for name in ("shift", "scale")),
        ("targets", _LONG),
        *((name, _POINTER) for name in ("target_place", "target_sample", "sums")),
        *((name, _POINTER) for name in ("log_sum", "target_pull", "target_cosine")),
        *((name, _FLOAT) for name in ("coefficient", "mu", "decay", "lr")),
        ("dx", _POINTER),
        ("extras", _LONG),
        *((name, _POINTER) for name in ("extra_place", "extra", "centers", "mask", "center_cosine", "alignment")),
        ("drawn", _LONG),
        *((name, _FLOAT) for name in ("share", "attraction")),
    ]


@dataclass(frozen=True)
class Native:
    """The built library and the address of ``sgemm_``."""

    library: ctypes.CDLL
    gemm: int


class NativePass:
    """The two passes of one step; sets and fills what :class:`FusedStep`'s torch code would."""

    def __init__(self, native: Native) -> None:
        self.native, self.fields, self.alive = native, Step(threads=torch.get_num_threads()), dict[str, Tensor]()

    def first(self, step: "FusedStep") -> tuple[Tensor, Tensor]:
        """Σ exp over the negatives (B,) and LCE's alignment (0-dim), float64; gathers the rows of the step."""
        rows, drawn, batch, settings = step.rows, step.drawn, len(step.x), step.settings
        optimizer, threads = step.optimizer, self.fields.threads
        self._set(count=rows.count, dim=step.x.shape[1], batch=batch, rows=optimizer.rows, momentum=optimizer.tables[1])
        if rows.index is not None:
            assert isinstance(optimizer, SgdRows), "native_pass chose it"
            self._set(index=rows.index, missed=optimizer.missed_by(rows.index), kept=rows.kept)
        self._set(scaled=step.x * settings.scale, unit=step.x, shift=step.shift, scale=settings.scale)
        self._set(log_weight=step.log_weight, targets=len(step.sorted_places))
        self._set(target_place=step.sorted_places, target_sample=step.sorted_samples)
        self._set(drawn=drawn.negatives, share=1.0 if rows.index is None else 1 / drawn.probability)
        step.inverse = torch.empty(rows.count, 1)
        sums, alignment = torch.zeros(threads, batch, dtype=torch.float64), torch.zeros(threads, dtype=torch.float64)
        self._set(inverse=step.inverse, sums=sums, alignment=alignment)
        if settings.keep_products:
            self._set(products=torch.empty(rows.count, batch))
        if step.compat is not None:
            step.center_cosine = torch.empty(rows.count)
            self._set(centers=step.compat.centers, mask=step.compat.mask, center_cosine=step.center_cosine)
        step.kept = None
        self.native.library.lce_first_pass(ctypes.byref(self.fields), ctypes.c_void_p(self.native.gemm))
        return sums.sum(0), alignment.sum()

    def second(self, step: "FusedStep", grad: Tensor, own_places: Tensor, own_grad: Tensor) -> Tensor:
        """Σ_j P_ij w_j/‖w_j‖ (B, D); updates the rows.

        Args:
            grad: 0-dim, the gradient of the loss. own_places: (u,) ascending places of rows with a further gradient
                ``own_grad`` (u, D).
        """
        batch, dim = step.x.shape
        config = step.optimizer.config
        log_sum = torch.where(step.valid, step.log_sum, 1e30).float()
        self._set(log_sum=log_sum, target_pull=step.target_pull, target_cosine=step.sorted_cosine)
        self._set(coefficient=float(step.coefficient), mu=config.momentum, decay=config.weight_decay)
        self._set(lr=step.optimizer.lr, extras=len(own_grad), extra_place=own_places, extra=own_grad.contiguous())
        if step.compat is not None and step.compat_total is not None:
            weight = step.compat.alignment_weight * grad.double() / step.compat_total.clamp_min(1)
            self._set(attraction=float(weight))
        dx = torch.zeros(self.fields.threads, batch, dim)
        self._set(dx=dx)
        self.native.library.lce_second_pass(ctypes.byref(self.fields), ctypes.c_void_p(self.native.gemm))
        return dx.sum(0)

    def _set(self, **fields: Tensor | float | None) -> None:
        """Set fields: numbers, tensors (kept alive with the step), or None."""
        for name, value in fields.items():
            if isinstance(value, Tensor):
                assert value.is_contiguous(), name
                self.alive[name] = value
                setattr(self.fields, name, value.data_ptr())
            else:
                setattr(self.fields, name, value)


def covers(config: HeadConfig) -> bool:
    """Whether native.cpp knows this kind of head."""
    margin = config.margin
    return (
        (config.impl, config.rows, config.compute, config.optimizer.name) == ("fused", "float32", "float32", "sgd")
        and config.sub_centers == 1
        and margin.name != "curricular"
        and not margin.inter_class_filter
    )


def native_pass(step: "FusedStep") -> NativePass | None:
    """For a step that native.cpp can do; None: torch does it."""
    compat = step.compat
    fits = (
        step.kernels.native
        and step.collect is None
        and not step.always_gated
        and (compat is None or (compat.centers.dtype == torch.float32 and compat.centers.device.type == "cpu"))
    )
    native = load() if fits and len(step.x) and step.rows.count else None
    return None if native is None else NativePass(native)


@functools.cache
def load() -> Native | None:
    """The built library, or None where it cannot be had (said once)."""
    if os.environ.get("LCE_NATIVE") == "0":
        return None
    try:
        library, torch_library = ctypes.CDLL(str(_built())), _torch_library()
        if _address(library, "omp_get_num_threads") != _address(torch_library, "omp_get_num_threads"):
            raise OSError("torch has an OpenMP of its own; two pools of threads would work against each other")
        return Native(library, _address(torch_library, "sgemm_"))
    except (OSError, subprocess.CalledProcessError, AttributeError) as error:
        detail = getattr(error, "stderr", None) or error
        warnings.warn(
            f"the head's C++ kernels cannot be built here, torch's run instead: {detail!s:.300}", stacklevel=2
        )
        return None


def _torch_library() -> ctypes.CDLL:
    """The library that holds torch's BLAS."""
    folder = Path(torch.__file__).parent / "lib"
    return ctypes.CDLL(str(next(iter(folder.glob("libtorch_cpu.*")), "libtorch_cpu.so")))


def _address(library: ctypes.CDLL, name: str) -> int:
    """Where a function of a library, or of those that it is linked with, stands; raises AttributeError."""
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0


def _built() -> Path:
    """The library's file; compiles it when this compiler has not, for this kind of processor."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    if compiler is None:
        raise OSError("no C++ compiler (g++) found")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    made_from = [SOURCE.read_text(), *FLAGS, version, torch.__version__, processor_features()]
    key = hashlib.sha256("\n".join(made_from).encode())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lce-trainer"
    path = folder / f"head-{key.hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=folder
        ) as own:  # built beside and renamed: several ranks may do so at once
            partial = Path(own) / path.name
            subprocess.run(
                [compiler, *FLAGS, str(SOURCE), "-o", str(partial)], capture_output=True, text=True, check=True
            )
            partial.replace(path)
    return path
