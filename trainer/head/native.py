"""The fused pass in C++ (native.cpp): built once per machine, for the plain case on a CPU, with torch's own BLAS.

Where there is no C++ compiler or the BLAS has no ``sgemm``, the torch path runs and says so once. The built library is
kept in the user's cache (:func:`trainer.files.cache_folder`); ``LCE_NATIVE=0`` turns it off.
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
from typing import Any

import torch
from torch import Tensor

from trainer.distributed import thread_count
from trainer.files import cache_folder, is_own
from trainer.head.config import SgdRowsConfig
from trainer.head.fused import FusedSoftmax, OldCenters
from trainer.head.products import address, bfloat16_gemm, torch_library
from trainer.head.row_optimizer import SgdRows
from trainer.head.step import FirstPass, LossGradient, PassInput, Step
from trainer.machine import processor_features

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")

_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class StepFields(ctypes.Structure):
    """What native.cpp calls ``Step``: the numbers and tensors of one step; native.cpp documents the fields."""

    _fields_ = [
        *((name, _LONG) for name in ("count", "dim", "batch", "threads")),
        *((name, _LONG) for name in ("short_rows", "short_products")),
        *((name, _POINTER) for name in ("rows", "momentum", "index", "missed", "kept", "scaled", "unit")),
        *((name, _POINTER) for name in ("products", "inverse", "log_weight")),
        *((name, _FLOAT) for name in ("shift", "scale")),
        ("targets", _LONG),
        *((name, _POINTER) for name in ("target_place", "target_sample", "sums")),
        *((name, _POINTER) for name in ("log_sum", "target_pull", "target_cosine")),
        *((name, _FLOAT) for name in ("coefficient", "mu", "decay", "lr")),
        ("dx", _POINTER),
        ("extras", _LONG),
        *(
            (name, _POINTER)
            for name in (
                "extra_place",
                "extra",
                "noise_row",
                "noise_column",
                "centers",
                "mask",
                "center_cosine",
                "alignment",
            )
        ),
        ("drawn", _LONG),
        *((name, _FLOAT) for name in ("share", "attraction")),
    ]


@dataclass(frozen=True)
class Native:
    """The built library and the addresses of the BLAS's ``sgemm_`` and, where there is one, ``gemm_bf16bf16f32_``."""

    library: ctypes.CDLL
    gemm: int
    bfloat16_gemm: int | None

    def first(self, fields: StepFields) -> None:
        """The first pass; fills the tensors that ``fields`` point to."""
        self.library.lce_first_pass(ctypes.byref(fields), self._gemm(fields))

    def second(self, fields: StepFields) -> None:
        """The second pass; updates the rows."""
        self.library.lce_second_pass(ctypes.byref(fields), self._gemm(fields))

    def _gemm(self, fields: StepFields) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.bfloat16_gemm if fields.short_products else self.gemm)


@dataclass(frozen=True)
class NativeFirstPass(FirstPass):
    """A first pass in C++: what its second one is handed again, and the tensors that this points to."""

    fields: StepFields
    alive: dict[str, Tensor]


class NativeSoftmax(FusedSoftmax):
    """The fused step with both passes in C++; what native.cpp cannot do (deferred or gated steps, no row or no sample)
    torch does.
    """

    def __init__(self, library: Native, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.library = library

    def first_pass(self, inputs: PassInput, deferred: bool) -> FirstPass:
        """See :meth:`FusedSoftmax.first_pass`; gathers the rows of the step."""
        rows, drawn, batch, x = inputs.rows, inputs.drawn, len(inputs.batch.x), inputs.batch.x
        if deferred or self.gated or not batch or not rows.count:
            return super().first_pass(inputs, deferred)
        optimizer, index, threads = self.optimizer, inputs.targets.index, thread_count()
        assert isinstance(optimizer, SgdRows), "covers() chose it"
        sums, alignment = torch.zeros(threads, batch, dtype=torch.float64), torch.zeros(threads, dtype=torch.float64)
        inverse = torch.empty(rows.count, 1)
        center_cosine = None if self.old is None else torch.empty(rows.count)
        values: dict[str, Tensor | float | None] = {
            "count": rows.count,
            "dim": x.shape[1],
            "batch": batch,
            "threads": threads,
            "rows": optimizer.rows,
            "momentum": optimizer.momentum,
            "short_rows": optimizer.rows.dtype == torch.bfloat16,
            "short_products": self.settings.compute == torch.bfloat16,
            "scaled": (x * self.settings.scale).to(self.settings.compute),
            "unit": x.to(self.settings.compute),
            "products": torch.empty(rows.count, batch) if inputs.keep_products else None,
            "inverse": inverse,
            "log_weight": inputs.log_weight,
            "shift": inputs.shift,
            "scale": self.settings.scale,
            "targets": len(index.places),
            "target_place": index.places,
            "target_sample": index.samples,
            "sums": sums,
            "alignment": alignment,
            "drawn": drawn.negatives,
            "share": 1.0 if rows.index is None else 1 / drawn.probability,
        }
        if rows.index is not None:
            values |= {"index": rows.index, "missed": optimizer.missed_by(rows.index), "kept": rows.kept}
        if self.old is not None:
            bank = self.old.bank
            values |= {"centers": bank.centers, "mask": bank.mask, "center_cosine": center_cosine}
        fields, alive = _filled(StepFields(), values)
        self.library.first(fields)
        return NativeFirstPass(sums.sum(0), alignment.sum(), inverse, center_cosine, None, fields, alive)

    def second_pass(self, step: Step, gradient: LossGradient, deferred: bool) -> Tensor:
        """See :meth:`FusedSoftmax.second_pass`."""
        first, inputs = step.first, step.inputs
        if not isinstance(first, NativeFirstPass) or not inputs.rows.undisturbed:
            return super().second_pass(step, gradient, deferred)
        optimizer, index = self.optimizer, inputs.targets.index
        config = optimizer.config
        assert isinstance(config, SgdRowsConfig)
        dx = torch.zeros(first.fields.threads, *inputs.batch.x.shape)
        values: dict[str, Tensor | float | None] = {
            "log_sum": gradient.log_sum[0].nan_to_num(posinf=1e30),
            "target_pull": gradient.target_pull,
            "target_cosine": inputs.targets.cosine,
            "coefficient": float(gradient.coefficient),
            "mu": config.momentum,
            "decay": config.weight_decay,
            "lr": optimizer.lr,
            "dx": dx,
            "extras": len(gradient.own),
            "extra_place": index.own,
            "extra": gradient.own.contiguous(),
        }
        if optimizer.rows.dtype == torch.bfloat16:
            values |= dict(zip(("noise_row", "noise_column"), optimizer.noise(inputs.rows.count, 2), strict=True))
        if self.old is not None:
            weight = self.old.bank.alignment_weight * gradient.grad / self.old.total.clamp_min(1)
            values["attraction"] = float(weight)
        fields, alive = _filled(StepFields.from_buffer_copy(first.fields), values)
        self.library.second(fields)
        del alive
        return dx.sum(0)


def _filled(fields: StepFields, values: dict[str, Tensor | float | None]) -> tuple[StepFields, dict[str, Tensor]]:
    """``fields`` with numbers and tensors set, and those tensors, which must live as long."""
    alive = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    for name, value in values.items():
        if isinstance(value, Tensor):
            assert value.is_contiguous(), name
            setattr(fields, name, value.data_ptr())
        else:
            setattr(fields, name, value)
    return fields, alive


def holds(old: OldCenters | None) -> bool:
    """Whether native.cpp can read these old centres."""
    return old is None or (old.bank.centers.dtype == torch.float32 and old.bank.centers.device.type == "cpu")


def load() -> Native | None:
    """The built library, or None where it cannot be had (logged once) or ``LCE_NATIVE=0`` turns it off."""
    return None if os.environ.get("LCE_NATIVE") == "0" else library_of_this_machine()


@functools.cache
def library_of_this_machine() -> Native | None:
    """The library, built at the first call; None where that is not possible."""
    try:
        library, blas = ctypes.CDLL(str(_built())), torch_library()
        _check_size(library)
        if address(library, "omp_get_num_threads") != address(blas, "omp_get_num_threads"):
            raise OSError("torch has an OpenMP of its own; two pools of threads would work against each other")
        return Native(library, address(blas, "sgemm_"), bfloat16_gemm())
    except (OSError, subprocess.CalledProcessError, AttributeError) as error:
        detail = getattr(error, "stderr", None) or error
        warnings.warn(
            f"the head's C++ kernels cannot be built here, torch's run instead: {detail!s:.300}", stacklevel=2
        )
        return None


def _check_size(library: ctypes.CDLL) -> None:
    """Refuse a library whose ``Step`` is not the one above: raises OSError."""
    library.lce_step_size.restype = ctypes.c_int64
    if (size := library.lce_step_size()) != ctypes.sizeof(StepFields):
        raise OSError(f"{SOURCE.name}: Step has {size} bytes, its mirror in native.py {ctypes.sizeof(StepFields)}")


def _built() -> Path:
    """The library's file; compiles it if this compiler did not yet, for this kind of processor."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    if compiler is None:
        raise OSError("no C++ compiler (g++) found")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    made_from = [SOURCE.read_text(), *FLAGS, version, torch.__version__, processor_features()]
    key = hashlib.sha256("\n".join(made_from).encode())
    folder = cache_folder()
    path = folder / f"head-{key.hexdigest()[:16]}.so"
    if not is_own(path):
        with tempfile.TemporaryDirectory(
            dir=folder
        ) as own:  # built under another name and renamed: several ranks may do so at once
            partial = Path(own) / path.name
            subprocess.run(
                [compiler, *FLAGS, str(SOURCE), "-o", str(partial)], capture_output=True, text=True, check=True
            )
            partial.chmod(0o700)
            partial.replace(path)
    return path
