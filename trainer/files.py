"""Files that appear whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from trainer.errors import LceError


@contextlib.contextmanager
def replaced(target: Path, error_type: type[LceError]) -> Iterator[Path]:
    """A path beside ``target`` (a file or a folder to be) that takes its place when the block ends well, else is
    removed.

    Raises:
        LceError: of ``error_type``, when something cannot be written.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    old = partial.with_suffix(".old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        if target.is_dir():
            target.rename(old)
        partial.rename(target)
    except OSError as error:
        raise error_type(f"{target}: cannot be written: {error.strerror or error}") from None
    finally:
        for path in (partial, old):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the permissions of any new file (the library alone makes it private to its
    owner)."""
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path)
    path.chmod(mode)
