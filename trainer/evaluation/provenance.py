"""What a result was made with: versions, commit, machine, time."""

import datetime
import importlib.metadata
import platform

from trainer import __version__
from trainer.machine import commit

_PACKAGES = ("torch", "numpy", "onnxruntime", "faiss-cpu", "matplotlib")


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
