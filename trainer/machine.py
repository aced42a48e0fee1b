"""What a result was made on: the processor's name and features, the commit of the code."""

import platform
import subprocess
from pathlib import Path


def processor_name() -> str:
    """The processor's model name, or the architecture where the system does not tell."""
    return _cpuinfo("model name") or platform.machine()


def processor_features() -> str:
    """What distinguishes processors for ``-march=native``."""
    return _cpuinfo("flags", "Features") or platform.processor() or platform.machine()


def _cpuinfo(*keys: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(keys)), "")


def commit() -> str:
    """The short commit of the checkout that this package lies in, with ``+changes`` where tracked files of the packages
    differ from it; ``unknown`` outside of a checkout."""
    folder = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", f"{Path(__file__).parent.name}/{Path(__file__).name}")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "trainer", "launch", "tools")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
