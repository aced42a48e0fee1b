"""What a result was made with: versions, commit, machine, time."""

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path

from trainer import __version__

_PACKAGES = ("torch", "numpy", "scikit-learn", "onnxruntime", "faiss-cpu", "matplotlib")


def provenance() -> dict[str, str]:
    """Versions of what matters, the commit of this checkout (``unknown`` outside of one), machine and time (UTC)."""
    found = {"lce-trainer": __version__, "commit": commit(), "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["machine"] = f"{platform.system()} {platform.machine()}"
    found["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return found


def commit() -> str:
    """The short commit of the checkout that this package lies in, with ``+changes`` when it was modified."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20, check=True
        )
        return done.stdout.strip()

    try:
        tracked = git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "--short=12", "HEAD") + (
            "+changes" if tracked and git("status", "--porcelain", "-uno") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
