"""What the benchmarks share: who measured (commit, machine), and where the figures go."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

from tools.output import write_json
from trainer.machine import commit, processor_name

__all__ = ["median_seconds", "origin", "seconds_of", "write_json"]


def origin() -> dict[str, Any]:
    """The commit of the code (with "+changes" where files differ from it) and the machine, for a benchmark's JSON."""
    import torch

    return {
        "commit": commit(),
        "machine": f"{processor_name()}, {len(os.sched_getaffinity(0))} cores",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def seconds_of(action: Callable[[], object]) -> float:
    """How long an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def median_seconds(action: Callable[[], object], device_type: str, steps: int, warmup: int = 3) -> float:
    """Seconds of an action on "cpu" or "cuda", the median of ``steps`` after ``warmup``."""
    import torch

    def waited() -> None:
        action()
        if device_type == "cuda":
            torch.cuda.synchronize()

    for _ in range(warmup):  # and for what was queued before
        waited()
    return statistics.median(seconds_of(waited) for _ in range(steps))
