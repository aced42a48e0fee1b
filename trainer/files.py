"""Files that appear whole or not at all."""

import atexit
import contextlib
import errno
import functools
import glob
import os
import shutil
import socket
import stat
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainer.errors import LceError


def partial_of(target: Path) -> Path:
    """Where ``target`` is written until it is complete.

    Leftovers of killed processes on this machine are deleted; an orphaned ``.old`` folder is restored if ``target`` is
    missing (see :func:`replace_folder`).
    """
    stem = f".{target.name}.{socket.gethostname()}-"
    name = glob.escape(stem)
    for left in [*target.parent.glob(f"{name}*"), *target.parent.glob(f".{name}*")]:  # the latter: of a partial one
        owner, ending = left.name.partition(stem)[2].partition(".")[::2]
        if owner.isdigit() and int(owner) != os.getpid() and Path(f"/proc/{owner}").exists():
            continue
        if ending == "old" and not target.exists():
            left.rename(target)
        elif ending == "old" or ending.endswith("partial"):
            remove(left)
    return target.with_name(f"{stem}{os.getpid()}.partial")


def replace_folder(partial: Path, target: Path) -> None:
    """Rename ``partial`` to ``target``, replacing an existing folder; that is deleted only after the rename."""
    old = partial.with_suffix(".old")
    there = target.is_dir()  # no folder takes a file's place: rename refuses
    if there:
        target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        if there:
            old.rename(target)
        raise
    if there:
        remove(old)


def remove(path: Path) -> None:
    """Delete a file or a folder with all that is in it; it need not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def cache_folder(kind: str = "") -> Path:
    """The user's own cache folder for ``kind`` of files, made if missing: ``lce-trainer`` in ``$XDG_CACHE_HOME``, else
    in ``~/.cache``.

    What lies in it is loaded, and partly run: a folder that belongs to somebody else, or that others could exchange, is
    not used, but ``lce-trainer-UID`` in the folder for temporary files, or else a new one for this process alone.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for base in (home / "lce-trainer", Path(tempfile.gettempdir()) / f"lce-trainer-{os.geteuid()}"):
        if _is_private(base) and _is_private(base / kind):
            return base / kind
    return _fresh_folder() / kind


@functools.cache
def _fresh_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="lce-trainer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _is_private(folder: Path) -> bool:
    """Whether a folder is there (it is made) that belongs to this user, and nobody else may write to or exchange."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        here, above = folder.lstat(), folder.parent.stat()
        if not stat.S_ISDIR(here.st_mode) or here.st_uid != os.geteuid():
            return False
        if here.st_mode & 0o022:
            folder.chmod(here.st_mode & 0o755)
    except OSError:
        return False
    guarded = above.st_uid in (0, os.geteuid()) and (not above.st_mode & 0o022 or bool(above.st_mode & stat.S_ISVTX))
    return guarded and os.access(folder, os.W_OK)


def is_own(file: Path) -> bool:
    """Whether a file belongs to this user and nobody else may write to it."""
    try:
        status = file.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022


def why_unwritable(folder: Path) -> str | None:
    """Why no file can be made in ``folder`` (which need not exist yet), or None; leaves nothing behind."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        return f"{existing} is a file, not a folder"
    probe = existing / f".writable-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        return f"cannot be written ({error.strerror})"
    return None


@contextlib.contextmanager
def atomically(target: Path) -> Iterator[Path]:
    """A path next to ``target`` (a file or a folder to be) that takes its place when the block ends well, else is
    removed. A file is on the disk before it gets its name.

    Raises:
        OSError: something cannot be written, or ``target`` is a folder and a file would take its place.
    """
    partial = partial_of(target)
    try:
        yield partial
        if partial.is_dir():
            replace_folder(partial, target)
        elif target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder; nothing was replaced", str(target))
        else:
            sync(partial)
            partial.rename(target)
    finally:
        remove(partial)


@contextlib.contextmanager
def replaced(target: Path, error_type: type[LceError]) -> Iterator[Path]:
    """:func:`atomically` for what a user asked for: makes the folder around ``target`` too.

    Raises:
        LceError: of ``error_type``, when something cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomically(target) as partial:
            yield partial
    except OSError as error:
        raise error_type(f"{target}: cannot be written: {error.strerror or error}") from None


def write_text(target: Path, text: str) -> None:
    """Write a text file that appears whole: UTF-8, and the bytes of file names that are not. Raises OSError."""
    with atomically(target) as partial:
        partial.write_text(text, encoding="utf-8", errors="surrogateescape")


def advise(descriptor: int, start: int, size: int, advice: Literal["WILLNEED", "DONTNEED", "RANDOM"]) -> None:
    """``posix_fadvise`` of a part of a file (size 0: to its end) where the system has it; macOS does not."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, size, getattr(os, f"POSIX_FADV_{advice}"))


def write_array(target: Path, array: NDArray[Any]) -> None:
    """Write a .npy file that appears whole. Raises OSError."""
    with atomically(target) as partial, partial.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def sync(path: Path) -> None:
    """Have a file, or a folder's list of names, written to the storage itself. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> tuple[int, int]:
    """(size in bytes, CRC-32) of a file."""
    crc, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return size, crc
