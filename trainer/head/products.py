"""Matrix products whose inputs are bfloat16 and whose results are float32.

``torch.mm`` of two bfloat16 matrices rounds its result: at s = 64 logits then come in steps of 0.25, and ∂L/∂x errs by
2.6 %. With float32 results the rounding of the inputs alone remains, 0.25 %. CUDA has such a product; on the CPU it is
that of the BLAS that torch came with (MKL), where the processor multiplies bfloat16 itself (AVX512-BF16 or AMX);
elsewhere the rounded inputs are multiplied in float32, which gives the same numbers and saves no time.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from trainer.machine import processor_features

INSTRUCTIONS = ("amx_bf16", "avx512_bf16")
"""What a processor must have for bfloat16 products of its own, the quicker first."""


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (m, k) times b (k, n): (m, n) in float32 for bfloat16 matrices, else in their own dtype."""
    if a.dtype != torch.bfloat16:
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    gemm = bfloat16_gemm()
    if gemm is None or not min(a.shape[0], *b.shape):
        return torch.mm(a.float(), b.float())
    out = torch.empty(a.shape[0], b.shape[1])
    _multiply(gemm, a, b, out)
    return out


def bfloat16_instructions() -> str | None:
    """The instruction set by which this processor multiplies bfloat16, None: it has none."""
    features = processor_features().split()
    return next((name for name in INSTRUCTIONS if name in features), None)


@functools.cache
def bfloat16_gemm() -> int | None:
    """The address of the BLAS's product of bfloat16 matrices with a float32 result; None: not here."""
    if bfloat16_instructions() is None:
        return None
    try:
        return address(torch_library(), "gemm_bf16bf16f32_")
    except (OSError, AttributeError):
        return None


def torch_library() -> ctypes.CDLL:
    """The library that holds torch's BLAS; raises OSError."""
    folder = Path(torch.__file__).parent / "lib"
    return ctypes.CDLL(str(next(iter(folder.glob("libtorch_cpu.*")), "libtorch_cpu.so")))


def address(library: ctypes.CDLL, name: str) -> int:
    """Where a function of a library, or of those that it is linked with, stands; raises AttributeError."""
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0


def _multiply(gemm: int, a: Tensor, b: Tensor, out: Tensor) -> None:
    """The BLAS counts by columns: out' = b' a' of the transposed matrices."""
    (m, k), n = a.shape, b.shape[1]
    flags, leading, tensors = zip(*(_layout(t) for t in (b, a)), strict=True)
    sizes = [ctypes.byref(ctypes.c_int(size)) for size in (n, m, k, *leading, n)]
    one, zero = ctypes.byref(ctypes.c_float(1)), ctypes.byref(ctypes.c_float(0))
    left, right, to = (ctypes.c_void_p(t.data_ptr()) for t in (*tensors, out))
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 13)(gemm)
    function(*flags, *sizes[:3], one, left, sizes[3], right, sizes[4], zero, to, sizes[5])


def _layout(matrix: Tensor) -> tuple[bytes, int, Tensor]:
    """Whether the BLAS has to transpose a matrix, the distance of its rows (columns), and the matrix, copied where
    neither its rows nor its columns are contiguous.
    """
    if matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]:
        return b"N", matrix.stride(0), matrix
    if matrix.stride(0) == 1 and matrix.stride(1) >= matrix.shape[0]:
        return b"T", matrix.stride(1), matrix
    copy = matrix.contiguous()
    return b"N", copy.shape[1], copy
