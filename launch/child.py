"""Launchers that are programs of their own (mpirun, deepspeed): started, and stopped without losing a step.

mpirun and deepspeed kill their ranks on SIGTERM. Signals are therefore kept from them: the ranks are asked through the
run folder (:func:`trainer.run.watch.ask_to_stop`), save, and end, and the launcher with them.
"""

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType

from trainer.distributed import LAUNCHER, end_with_parent
from trainer.errors import EXIT_CRASH, EXIT_INTERRUPTED, EXIT_TERMINATED, ConfigError
from trainer.files import write_text
from trainer.owner import started
from trainer.run.folder import has_saved, is_finished
from trainer.run.watch import (
    Silence,
    ask_to_stop,
    ranks_left,
    ranks_lost,
)

STUCK_SECONDS = 30.0
_STOPS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}


def find_program(name: str, remedy: str) -> str:
    """A launcher on the PATH or next to this interpreter. Raises :class:`ConfigError` with the ``remedy``: neither."""
    program = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if program is None:
        raise ConfigError(remedy)
    return program


@contextmanager
def stuck_ranks_ended(run_dir: Path | None, began: float) -> Iterator[None]:
    """From the first signal on that asks this process to stop, end the ranks of this machine that say nothing for
    :data:`STUCK_SECONDS`: stopped ones (SIGSTOP), or ones that hang in the kernel, would be waited for without end.
    """
    if run_dir is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    heard, tell = os.pipe()
    os.set_blocking(tell, False)
    before = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    watching = threading.Thread(target=_end_stuck, args=(heard, run_dir, began), name="stuck ranks", daemon=True)
    watching.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(tell)
        watching.join()
        os.close(heard)


def _end_stuck(heard: int, run_dir: Path, began: float) -> None:
    while numbers := os.read(heard, 64):  # nothing: the end of the pipe
        if not _STOPS.isdisjoint(numbers):
            break
    silence, looked, here = Silence(), time.monotonic(), socket.gethostname()
    while not select.select([heard], [], [], STUCK_SECONDS / 30)[0] or os.read(heard, 64):
        now = time.monotonic()
        if now - looked > STUCK_SECONDS / 3:  # the file system, or this process, stood still itself
            silence.forget()
        looked = now
        for status in ranks_left(run_dir, began):
            if status["host"] != here or silence.silent_seconds(status) < STUCK_SECONDS:
                continue
            with suppress(OSError):
                os.kill(status["pid"], signal.SIGKILL)
                print(
                    f"lce launch: rank {status['rank']} (process {status['pid']}) gave no sign of life for "
                    f"{STUCK_SECONDS:.0f} s and was ended",
                    flush=True,
                )
            silence.forget()


def run_launcher(
    argv: Sequence[str],
    environment: Mapping[str, str],
    run_dir: Path | None,
    orphaned: signal.Signals = signal.SIGTERM,
) -> int:
    """Run a launcher and wait for it.

    Ctrl-C and SIGTERM (or a closed terminal) make the ranks save and end; a second one ends them at once, and so does
    the first while no rank is training yet.

    Args:
        environment: in addition to this process's own.
        run_dir: the run folder; None: the launcher is ended at the first signal.
        orphaned: what the kernel sends the launcher when this process is killed.

    Returns:
        The launcher's exit status, 70 where that tells of a rank that was killed; after a signal, and where the run has
        not come to its end in spite of a status of 0, that of :func:`stopped_status` (70 if nothing was saved).
    """
    began, asked = time.time(), 0
    me = f"{socket.gethostname()}:{os.getpid()}:{started(os.getpid())}"
    child = subprocess.Popen(
        argv,
        env=os.environ | dict(environment) | ({LAUNCHER: me} if started(os.getpid()) else {}),
        start_new_session=True,
        preexec_fn=partial(end_with_parent, orphaned),
    )

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        first, asked = not asked, asked or (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
        if first and run_dir is not None and ranks_left(run_dir, began):
            try:
                ask_to_stop(run_dir, asked)
                return
            except OSError as error:
                print(f"lce launch: the ranks cannot be asked to save ({error}); they are ended", flush=True)
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGTERM)

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    heeded = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores the last
    kept = {number: signal.signal(number, stop) for number in heeded}
    try:
        with stuck_ranks_ended(run_dir, began):
            status = child.wait()
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    if asked:
        return stopped_status(asked, run_dir, began)
    # The launcher itself was killed, or (0) a part of DeepSpeed's: its ranks save and end.
    if status <= 0 and run_dir is not None and not is_finished(run_dir, began):
        how = f"was killed by {signal.Signals(-status).name}" if status else "ended"
        print(
            f"lce launch: {Path(argv[0]).name} {how} before the run had ended; the same command continues", flush=True
        )
        status = stopped_status(signal.SIGTERM, run_dir, began)
        return status if has_saved(run_dir, began) else EXIT_CRASH
    return _launchers_status(status)


def _launchers_status(status: int) -> int:
    """The launcher's own exit status, or 70 where it was killed, or says as a shell does (128 + signal) that a rank
    was."""
    number, who = (-status, "the launcher") if status < 0 else (status - 128, "a rank")
    if status == EXIT_INTERRUPTED or number not in set(signal.Signals):
        return status
    print(f"lce launch: killed: {who} by {signal.Signals(number).name}", flush=True)
    return EXIT_CRASH


def stopped_status(asked: int, run_dir: Path | None, began: float) -> int:
    """The exit status of a job that the signal ``asked`` to stop: 130 or 75; 70, and why, where ranks ended before they
    saved."""
    left = ranks_lost(run_dir, began) if run_dir is not None else []
    if left:
        print(
            f"lce launch: rank {', '.join(map(str, left))} ended before the checkpoint was complete; the same command "
            "continues from the one before",
            flush=True,
        )
        return EXIT_CRASH
    return EXIT_INTERRUPTED if asked == signal.SIGINT else EXIT_TERMINATED


_WRITTEN = "# written by lce launch"


def submit(text: str, path: Path, command: Sequence[str]) -> str:
    """Write a job's file and hand it to its queue, as the last word of ``command``; returns what the queue answers.

    Raises:
        ConfigError: something else stands at the path, it cannot be written, or the command is not here or refuses it.
    """
    first, newline, rest = text.partition("\n") if text.startswith("#!") else ("", "", text)
    try:
        if path.exists() and _WRITTEN not in path.read_text(encoding="utf-8", errors="replace").splitlines()[:2]:
            raise ConfigError(f"{path}: exists and is no job file of lce launch; name another with --script")
        write_text(path, f"{first}{newline}{_WRITTEN}\n{rest}")
    except OSError as error:
        raise ConfigError(f"--script {path}: cannot be written: {error.strerror}") from None
    if shutil.which(command[0]) is None:
        raise ConfigError(f"{command[0]} is not on the PATH: this machine reaches no such queue; the job is in {path}")
    done = subprocess.run([*command, str(path)], check=False, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"{command[0]} refused {path}: {done.stderr.strip()}")
    return done.stdout.strip()
