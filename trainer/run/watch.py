"""How a run stops: by a signal, by another rank's failure, by a hang; and how every rank learns why.

Each rank keeps a small file ``<run>/ranks/rank-XXXXX.json`` that says where it is (step and phase), written by a
background thread every two seconds, and at a failure the reason. They can be read from outside while a run goes on, and
they are how the surviving ranks learn who stopped first: a collective only says that the connection is gone.

Exit status of a rank: 0 finished; 2 wrong use; 70 crash; 71 another rank failed or hangs; 75 stopped by SIGTERM and 130
by Ctrl-C, both with a checkpoint, so that the same command continues.

A file ``<run>/ranks/stop`` that holds a signal's number asks the ranks to stop as that signal does, from any machine
that sees the run folder (:func:`ask_to_stop`).
"""

import json
import math
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from trainer.distributed import Ranks, launched_by
from trainer.errors import EXIT_INTERRUPTED, EXIT_PEER, EXIT_TERMINATED, LceError
from trainer.reading import read_json

PHASES = ("data", "forward", "update", "evaluate", "log", "save")
BEAT_SECONDS = 2.0
GRACE_SECONDS = 8.0  # after Ctrl-C: a rank whose step takes longer (and thrice as long as any before) is ended
AGAIN_SECONDS = 3.0  # a later signal is a second Ctrl-C; an earlier one is the first, forwarded by the launcher
STUCK_SECONDS = 10.0  # in one phase: look whether another rank has failed
ORPHAN_SECONDS = 60.0  # after the launcher's death
SILENT_SECONDS = 15.0  # without a message while we are asked to stop: that rank is lost
_UPDATE = ("data", "forward", "update")
_STOP, _FAILED = "stop", "failed"


def ask_to_stop(run_dir: Path, number: int) -> None:
    """Ask the ranks of a run to save and end, as the signal ``number`` would; they look every two seconds."""
    (run_dir / "ranks" / _STOP).write_text(str(int(number)))


def read_notes(folder: Path) -> list[dict[str, Any]]:
    """The notes of all ranks in ``<run>/ranks`` that can be read, in the order of the ranks."""
    notes = []
    for path in sorted(folder.glob("rank-*.json")):
        with suppress(LceError):
            notes.append(read_json(path, LceError))
    return notes


class Silence:
    """For how long each rank's note has been the same, by our own clock."""

    def __init__(self) -> None:
        self._heard: dict[int, tuple[float, float]] = {}  # rank → (the time in its note, when we first read that)

    def silent_seconds(self, status: dict[str, Any]) -> float:
        """For how long a rank's note has been this one; 0 at its first reading."""
        now = time.monotonic()
        said, since = self._heard.get(status["rank"], (math.nan, now))
        if said != status["time"]:
            self._heard[status["rank"]] = status["time"], now
            return 0.0
        return now - since

    def forget(self) -> None:
        """Begin again."""
        self._heard.clear()


def ranks_left(run_dir: Path, since: float) -> list[dict[str, Any]]:
    """The notes of ranks that have been in the loop after ``since`` (seconds of the epoch) and have not come to its
    end."""
    return [status for status in read_notes(run_dir / "ranks") if status["time"] >= since]


def ranks_lost(run_dir: Path, since: float) -> list[int]:
    """The ranks among :func:`ranks_left` that will not come to the end: waits for those that still live, here by their
    process, elsewhere by notes that are renewed."""
    heard, here = Silence(), socket.gethostname()

    def lives(status: dict[str, Any]) -> bool:
        return _is_running(status["pid"]) if status["host"] == here else heard.silent_seconds(status) < SILENT_SECONDS

    while left := ranks_left(run_dir, since):
        living = [status for status in left if lives(status)]
        if not living:
            break
        time.sleep(0.2)
    return [status["rank"] for status in left]


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True


class Vote:
    """Agree on a few small numbers every step without waiting for it: the answer comes one step later.

    The maximum over the ranks, reduced over gloo in host memory, so that the device is never waited for.
    """

    def __init__(self) -> None:
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        self._group = None if alone else dist.new_group(backend="gloo")
        self._cast: torch.Tensor | None = None
        self._work: Any = None

    def cast(self, *values: int) -> list[int] | None:
        """Give this step's numbers; returns the maxima of the step before, equal on all ranks (None at the first)."""
        answer: list[int] | None = None
        if self._cast is not None:
            if self._work is not None:
                self._work.wait()
            answer = [int(v) for v in self._cast.tolist()]
        self._cast = torch.tensor(values, dtype=torch.int64)
        if self._group is not None:
            self._work = dist.all_reduce(self._cast, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return answer


class Watch:
    """Keeps an eye on this rank and, when something fails, on the others.

    Use as a context manager around the loop, on the main thread. While it is open, SIGINT, SIGTERM and SIGHUP (as
    SIGTERM) only set :attr:`stop_signal`; a second Ctrl-C (which torchrun turns into SIGTERM) ends the process at once.
    The death of the launcher counts as a SIGTERM.

    Args:
        folder: ``<run>/ranks``.
        ranks: who we are.
        timeout_seconds: a step phase that lasts longer ends this process.
    """

    def __init__(self, folder: Path, ranks: Ranks, timeout_seconds: float) -> None:
        self.folder, self.ranks, self.timeout_seconds = folder, ranks, timeout_seconds
        self.stop_signal = 0
        self._step, self._phase, self._since = -1, "start", time.time()
        self._stopped_at = 0.0
        self._twice = False
        self._updating, self._update_seconds, self._longest_update = -1, 0.0, 0.0
        self._heard = Silence()
        self._looked, self._mute = 0.0, False
        self._reason: str | None = None
        self._echo = False
        self._handlers: dict[int, Any] = {}
        self._end = threading.Event()
        self._launcher, self._orphaned = launched_by(), 0.0
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):  # the last: launch/mpirun.py
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                self._handlers[number] = signal.signal(number, self._on_signal)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if error is None:
            self._path(self.ranks.rank).unlink(missing_ok=True)

    def at(self, step: int, phase: str) -> None:
        """Say where the main thread is."""
        now = time.time()
        if self._phase in _UPDATE:
            self._update_seconds += now - self._since
        if phase == "data" and step != self._updating:
            self._longest_update = max(self._longest_update, self._update_seconds)
            self._updating, self._update_seconds = step, 0.0
        self._step, self._phase, self._since = step, phase, now

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.stop_signal:
            self._stopped_at = time.time()
        elif signal.SIGINT in (number, self.stop_signal) and time.time() - self._stopped_at > AGAIN_SECONDS:
            self._twice = True
        self.stop_signal = max(self.stop_signal, signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    def _run(self) -> None:
        while not self._end.wait(BEAT_SECONDS if not self.stop_signal else 0.25):
            self._write()
            if not self.stop_signal:
                self._look_for_request()
            self._look_for_launcher()
            now = time.time()
            if now - self._since > self.timeout_seconds:
                self._leave(f"no progress for {now - self._since:.0f} s", EXIT_PEER, hanging=True)
            if now - self._since > STUCK_SECONDS and (gone := self._gone()):
                self._leave(gone, EXIT_PEER)
            if self._twice:
                self._leave("interrupted twice", EXIT_INTERRUPTED)
            grace = max(GRACE_SECONDS, 3 * self._longest_update)
            late = self.stop_signal == signal.SIGINT and now - self._stopped_at > grace
            if late and self._phase not in ("evaluate", "save"):
                self._leave(f"interrupted; the step did not end within {grace:.0f} s", EXIT_INTERRUPTED)

    def _look_for_launcher(self) -> None:
        """Stop when the launcher has died; who does not come to the next step within a minute ends."""
        if self._launcher is None or self._launcher.lives(os.getpid()):
            return
        if not self._orphaned:
            self._orphaned = time.monotonic()
            if not self.stop_signal:
                self._on_signal(signal.SIGTERM, None)
        elif time.monotonic() - self._orphaned > ORPHAN_SECONDS and self._phase not in ("evaluate", "save"):
            self._leave("its launcher has died", EXIT_TERMINATED)

    def _look_for_request(self) -> None:
        try:
            number = int((self.folder / _STOP).read_text())
        except (OSError, ValueError):
            return
        self._on_signal(number, None)

    def _gone(self) -> str | None:
        """Why waiting is in vain: a rank has failed, or, where we are told to stop, says nothing any more.

        On CUDA a broken collective raises nothing: the main thread waits for the device.
        """
        if (self.folder / _FAILED).exists():
            first = self._first_failure()
            return None if first is None or first["rank"] == self.ranks.rank else _stopped_because(first)
        if not self.stop_signal:
            return None
        now, before = time.monotonic(), self._looked
        self._looked = now
        if self._mute or now - before > 2 * BEAT_SECONDS:  # the file system stalls: old notes say nothing of the others
            self._heard.forget()
        for status in self._notes():  # of ranks that came to the end there is none
            if status["rank"] != self.ranks.rank and self._heard.silent_seconds(status) > SILENT_SECONDS:
                return f"{_went_away(status['rank'])}; stopped"
        return None

    def _leave(self, reason: str, status: int, hanging: bool = False) -> None:
        """End the process from the background thread: the main one is stuck in a call that cannot be interrupted."""
        self._reason = f"{reason} in step {self._step}, {self._phase}"
        self._echo = status == EXIT_PEER and not hanging
        self._write()
        blame = None
        if hanging:
            time.sleep(2 * BEAT_SECONDS)
            blame = self._missing()
        print(f"rank {self.ranks.rank}: {self._reason}" + (f"; {blame}" if blame else ""), file=sys.stderr, flush=True)
        os._exit(status)

    def explain(self, error: BaseException) -> str:
        """Note this rank's failure, wait for the others' notes, and say who failed first and why.

        Returns:
            One line; it names another rank when this rank's failure is only the echo of that one's.
        """
        text = str(error).strip().splitlines()
        self._reason = f"{type(error).__name__}: {text[0] if text else ''}"
        self._echo = is_echo(error)
        self._write()
        here = f"rank {self.ranks.rank}, step {self._step}, {self._phase}"
        if not self._echo:
            with suppress(OSError):  # so that the others need not read all notes to learn that there is a failure
                (self.folder / _FAILED).touch()
            return f"{here}: {self._reason}"
        for _ in range(int(2 * BEAT_SECONDS / 0.25)):
            first = self._first_failure()
            if first is not None:
                return f"{here}: {_stopped_because(first)}"
            time.sleep(0.25)
        return f"{here}: {self._missing() or self._reason}"

    def _first_failure(self) -> dict[str, Any] | None:
        notes = [n for n in self._notes() if n["reason"] and not n["echo"]]
        return min(notes, key=lambda n: float(n["time"]), default=None)

    def _missing(self) -> str | None:
        """Which rank the others wait for: one that left no word, or that is behind all others."""
        notes = {int(n["rank"]): n for n in self._notes()}
        silent = [r for r in range(self.ranks.world_size) if r not in notes or not notes[r]["reason"]]
        if silent:
            last = notes.get(silent[0])
            seen = f", last seen in step {last['step']}, {last['phase']} on {last['host']}" if last else ""
            return _went_away(silent[0]) + seen
        progress = {r: (int(n["step"]), _order(n["phase"])) for r, n in notes.items()}
        behind = min(progress, key=lambda r: progress[r])
        if progress[behind] == max(progress.values()):
            return None
        n = notes[behind]
        return f"rank {behind} did not arrive: it is in step {n['step']}, {n['phase']} on {n['host']}"

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.json"

    def _write(self) -> None:
        status = {
            "rank": self.ranks.rank,
            "step": self._step,
            "phase": self._phase,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": time.time(),
            "reason": self._reason,
            "echo": self._echo,
        }
        path = self._path(self.ranks.rank)
        try:
            # Every second, from two threads, of value for seconds: without the locks of :mod:`trainer.files`.
            partial = path.with_suffix(f".{threading.get_ident()}")
            partial.write_text(json.dumps(status))
            partial.replace(path)
            self._mute = False
        except OSError:
            self._mute = True  # a full disk must not end training; the note is only an aid

    def _notes(self) -> list[dict[str, Any]]:
        return [status for status in read_notes(self.folder) if status["rank"] < self.ranks.world_size]


def _went_away(rank: int) -> str:
    return f"rank {rank} ended without a message (killed, or its machine is gone)"


def _stopped_because(first: dict[str, Any]) -> str:
    return f"stopped because rank {first['rank']} failed in step {first['step']}, {first['phase']}: {first['reason']}"


def is_echo(error: BaseException) -> bool:
    """Whether an exception only says that a collective broke, as it does on every rank but the one that failed."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "NCCL", "Connection closed", "Socket")
    )


def _order(phase: str) -> int:
    return PHASES.index(phase) if phase in PHASES else -1
