"""Where the head does things in another way, by sizes and settings alone: what a plan asks, without torch."""

from trainer.head.config import HeadConfig

CHUNK_NUMBERS = 1 << 26
"""Logits of a chunk on CUDA: 268 MB in float32, whatever the batch."""
COMPILE_FROM_ROWS = 32768
"""Compile the element-wise kernels from this many local rows on; below, compilation costs more than it saves."""
KEEP_SHARE = 0.05
"""The first pass's products are kept for the second where they take at most this share of the rows' and their
state's memory.
"""


def chunk_rows(given: int, device_type: str, batch: int) -> int:
    """Rows of a chunk: ``head.chunk_rows`` where it is given, else what fits the CPU's caches or keeps a GPU busy.

    Args:
        batch: B, the global batch.
    """
    if given:
        return given
    return 4096 if device_type == "cpu" else max(1, CHUNK_NUMBERS // max(1, batch) // 4096) * 4096


def stratum_count(total: int, rate: float) -> int:
    """S, how many of C classes are drawn at a sample rate; at least one, if there is one."""
    return min(total, max(1, round(rate * total)))


def native_covers(config: HeadConfig) -> bool:
    """Whether native.cpp knows this kind of head."""
    margin = config.margin
    return (
        config.impl in ("auto", "native")
        and config.optimizer.name == "sgd"
        and config.rows in ("float32", "bfloat16")
        and config.sub_centers == 1
        and margin.name != "curricular"
        and not margin.inter_class_filter
        and (config.compute != "bfloat16" or _has_bfloat16_gemm())
    )


def _has_bfloat16_gemm() -> bool:
    from trainer.head.products import bfloat16_gemm  # asks torch's own library

    return bfloat16_gemm() is not None
