"""One owner at a time for whatever is written to: run folders, data sets, banks, galleries.

The owner holds a lock (``flock``) on a small file for as long as it writes, and the file says who it is: host, process,
command. The lock ends with the process, however it ends, so that what a killed one leaves is taken over at once. The
owner also renews the file's time. That counts where a lock cannot: on a file system whose locks do not reach other
machines, and for a machine that is gone while its lock is still kept by the file server.

A lock belongs to the process that took it: a forked child closes its copy.
"""

import contextlib
import errno
import fcntl
import getpass
import json
import os
import shlex
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.errors import LceError

BEAT_SECONDS = 5.0
MISSED_BEATS = 3
ENDING_SECONDS = 120.0
"""How long to wait for an owner whose launcher has died: it is about to save and end."""
_POLL_SECONDS = 0.2
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_EXIT_LOST = 70


@dataclass(frozen=True)
class OwnerInfo:
    """Who owns something.

    Attributes:
        host, user, pid, command: of the owner. since: seconds of the epoch.
        started: the machine's boot and the process's start after it, which tell apart two processes of one number.
        launcher: the process that started it and whose end ends it; 0: none. first: see :class:`Launcher`.
        partners: what its partners declare too; empty: it has none.
    """

    host: str
    user: str
    pid: int
    started: str
    command: str
    since: float
    launcher: int = 0
    partners: str = ""
    first: str = ""

    @staticmethod
    def mine(partners: str = "", launcher: "Launcher | None" = None) -> "OwnerInfo":
        """who this process is."""
        try:
            user = getpass.getuser()
        except (KeyError, OSError):
            user = str(os.getuid())
        command = " ".join(shlex.join(sys.orig_argv).split())
        command = command if len(command) <= 300 else f"{command[:297]}…"
        pid = os.getpid()
        by = launcher or Launcher(0)
        begun = started(pid) or ""
        return OwnerInfo(socket.gethostname(), user, pid, begun, command, time.time(), by.parent, partners, by.first)

    @property
    def here(self) -> bool:
        """Whether it is of this machine."""
        return self.host == socket.gethostname()

    @property
    def lives(self) -> bool:
        """Whether that very process runs on this machine."""
        return self.here and started(self.pid) == self.started

    @property
    def ending(self) -> bool:
        """Whether it runs here and its launcher has died, so that it will end by itself."""
        return self.launcher > 0 and self.lives and not Launcher(self.launcher, self.first).lives(self.pid)

    def __str__(self) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"`{self.command}` (process {self.pid} of {self.user} on {self.host}, since {when})"


@dataclass(frozen=True)
class Launcher:
    """Whose end ends a rank.

    Attributes:
        parent: the process that started it.
        first: ``PID:START`` of the command on this machine that started the parent (``lce launch`` under DeepSpeed,
            whose own processes outlive it); empty: none.
    """

    parent: int
    first: str = ""

    def lives(self, rank: int) -> bool:
        """Whether both still run, for the process ``rank``."""
        pid, _, start = self.first.partition(":")
        return _parent(rank) == self.parent and (not self.first or started(int(pid)) == start)


_UNKNOWN = OwnerInfo("?", "?", 0, "", "a process that left no note", 0.0)


def started(pid: int) -> str | None:
    """The machine's boot and the start of process ``pid`` in ticks after it; None: there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return None if fields[0] in "ZX" else f"{boot}:{fields[19]}"


def _parent(pid: int) -> int:
    if pid == os.getpid():
        return os.getppid()
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


class Owner:
    """A lock that is held; made by :func:`owned`.

    Attributes:
        target: what is owned, for messages. lock: the lock's file. shared: partners may hold it too.
    """

    def __init__(self, target: Path, lock: Path, info: OwnerInfo, error_type: type[LceError]) -> None:
        self.target, self.lock, self.info, self.error_type = target, lock, info, error_type
        self.shared = bool(info.partners)
        self._descriptor = -1
        self._thread_id = threading.get_ident()
        self._end = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="owner", daemon=True)

    def take(self) -> None:
        """Take the lock and write who owns it. Raises the error: another owner, or the file cannot be written."""
        try:
            end = time.monotonic() + ENDING_SECONDS
            while (other := self._attempt()) is not None:
                self.close()
                if not other.ending or time.monotonic() > end:
                    raise self.error_type(f"{self.target}: in use by {other}; wait until it has ended, or end it")
                time.sleep(_POLL_SECONDS)
        except OSError as error:
            self.close()
            raise self.error_type(f"{self.target}: cannot be written: {self.lock}: {error.strerror or error}") from None
        _OPEN.add(self._descriptor)
        self._beats.start()

    def _attempt(self) -> OwnerInfo | None:
        """The owner that there is, or None when it is us now."""
        end = time.monotonic() + BEAT_SECONDS
        while True:
            self._open()
            held = self._try()
            other = self._remote() if held else self._other(locks=held is not None)
            if other is not None and held is False and self._is_partner(other) and time.monotonic() < end:
                self.close()  # a partner holds it alone for the moments in which it comes or goes
                time.sleep(_POLL_SECONDS / 10)
                continue
            if other is not None:
                return other
            if held is False and self._is_there():  # its machine is gone and the file server keeps the lock
                self.lock.unlink(missing_ok=True)
            if held is not False and self._is_there():
                break
            self.close()
        data = json.dumps(asdict(self.info)).encode()
        os.pwrite(self._descriptor, data, 0)
        os.ftruncate(self._descriptor, len(data))
        if held is None:  # two may have come at once
            time.sleep(_POLL_SECONDS)
            found = self._read()
            return None if found == self.info else found
        return None

    def _open(self) -> None:
        self.lock.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        self._descriptor = os.open(self.lock, flags, 0o666)
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file")

    def _try(self) -> bool | None:
        """Whether the lock is ours now; None: this file system has no locks, which is printed."""
        try:
            if self._lock(fcntl.LOCK_EX):
                return not self.shared or self._lock(fcntl.LOCK_SH)
            info = self._read()
            return info is not None and self._is_partner(info) and self._lock(fcntl.LOCK_SH)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(
                f"{self.lock}: this file system has no locks ({error.strerror}); another process is recognised by the "
                f"time of its note alone, within {MISSED_BEATS * BEAT_SECONDS:.0f} s",
                file=sys.stderr,
            )
            return None

    def _is_partner(self, info: OwnerInfo) -> bool:
        return self.shared and info.partners == self.info.partners

    def _lock(self, kind: int) -> bool:
        try:
            fcntl.flock(self._descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _is_there(self) -> bool:
        """Whether our descriptor is still of the file of that name: its last owner may have removed it."""
        try:
            there = self.lock.stat()
        except FileNotFoundError:
            return False
        mine = os.fstat(self._descriptor)
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)

    def _other(self, locks: bool) -> OwnerInfo | None:
        """The owner, where another holds the lock or there are no ``locks``; None: there is none, or it is gone."""
        info = self._read()
        if info is not None and info.lives:
            return info
        if not locks and (info is None or info.here):
            return None
        return None if self._silent() else self._read() or _UNKNOWN

    def _remote(self) -> OwnerInfo | None:
        """The owner on another machine, where the lock is ours all the same: this file system's locks are local."""
        info = self._read()
        if info is None or info.here or self._is_partner(info) or self._silent():
            return None
        return info

    def _silent(self) -> bool:
        """Whether the file's time stays as it is for three beats, by our own clock."""
        before, end = self._time(), time.monotonic() + MISSED_BEATS * BEAT_SECONDS
        while time.monotonic() < end:
            time.sleep(min(_POLL_SECONDS, BEAT_SECONDS))
            if self._time() != before:
                return False
        return True

    def _time(self) -> int:
        try:
            with self.lock.open("rb") as file:  # opening asks a file server anew
                return os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            return -1

    def _read(self) -> OwnerInfo | None:
        try:
            return OwnerInfo(**json.loads(os.pread(self._descriptor, 1 << 16, 0)))
        except (OSError, ValueError, TypeError, RecursionError):
            return None

    def _beat(self) -> None:
        while not self._end.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._descriptor)
            with contextlib.suppress(OSError):
                if not self._is_there():
                    print(
                        f"{self.target}: taken over while this process was silent; it ends", file=sys.stderr, flush=True
                    )
                    os._exit(_EXIT_LOST)

    def release(self) -> None:
        """Give it up; the file is removed unless partners hold it."""
        self._end.set()
        if self._beats.is_alive():
            self._beats.join()
        with contextlib.suppress(OSError):
            if self.shared:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._is_there():
                self.lock.unlink()
        self.close()

    def close(self) -> None:
        """Close the descriptor."""
        if self._descriptor >= 0:
            _OPEN.discard(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1


_OPEN: set[int] = set()
_HELD: dict[Path, Owner] = {}


def _forget_in_child() -> None:
    """A forked child must not keep its parent's locks alive."""
    for descriptor in _OPEN:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _OPEN.clear()
    _HELD.clear()


os.register_at_fork(after_in_child=_forget_in_child)


@contextlib.contextmanager
def owned(
    target: Path,
    error_type: type[LceError],
    *,
    lock: Path | None = None,
    partners: str = "",
    launcher: Launcher | None = None,
) -> Iterator[None]:
    """Own ``target`` inside the block; the owner of that target in this thread may enter again.

    Args:
        target: what is written to, for messages.
        lock: the lock's file; by default ``.NAME.owner`` next to the target. Give one inside a folder that is not
            replaced as a whole. Missing folders are made, and removed again where they stay empty.
        partners: who declares the same text may own it too; a lone owner and they exclude each other.
        launcher: whose end ends this process; None: nobody's.

    Raises:
        LceError: of ``error_type``: another process owns it (its host, number and command are named), or the lock
            cannot be written.
    """
    file = (target.with_name(f".{target.name}.owner") if lock is None else lock).absolute()
    known = _HELD.get(file)
    if known is not None and known._thread_id == threading.get_ident():
        yield
        return
    made = [folder for folder in file.parents if not folder.exists()]
    owner = Owner(target, file, OwnerInfo.mine(partners, launcher), error_type)
    owner.take()
    _HELD[file] = owner
    try:
        yield
    finally:
        _HELD.pop(file, None)
        owner.release()
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only where it is empty
