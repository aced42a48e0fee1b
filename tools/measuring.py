"""What the benchmarks share: who measured (commit, machine), and where the figures go."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from tools.output import write_json

__all__ = ["origin", "write_json"]


def origin() -> dict[str, Any]:
    """The commit of the code (with "-dirty" where files differ from it) and the machine, for a benchmark's JSON."""
    import torch

    def git(*arguments: str) -> str:
        folder = Path(__file__).resolve().parent
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short=12", "HEAD") or "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "trainer", "tools")
    return {
        "commit": commit + ("-dirty" if changed else ""),
        "machine": f"{_processor()}, {len(os.sched_getaffinity(0))} cores",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
