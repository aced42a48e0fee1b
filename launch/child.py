"""Launchers that are programs of their own (mpirun, deepspeed): started, and stopped without losing a step.

They end their ranks when they are told to stop themselves. So they do not hear of it: the ranks are asked through the
run folder (:func:`trainer.run.watch.ask_to_stop`), save, and end, and the launcher with them.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from trainer.distributed import end_with_parent
from trainer.errors import ConfigError
from trainer.run.watch import EXIT_CRASH, EXIT_INTERRUPTED, EXIT_TERMINATED, ask_to_stop, ranks_left, ranks_lost


def find_program(name: str, remedy: str) -> str:
    """A launcher on the PATH or beside this interpreter. Raises :class:`ConfigError` with the ``remedy``: neither."""
    program = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if program is None:
        raise ConfigError(remedy)
    return program


def run_launcher(words: Sequence[str], environment: Mapping[str, str], run_dir: Path | None) -> int:
    """Run a launcher and wait for it.

    Ctrl-C and SIGTERM (or a closed terminal) make the ranks save and end; a second one ends them at once, and so does
    the first while no rank is training yet.

    Args:
        environment: beside this process's own.
        run_dir: the run folder; None: the launcher is ended at the first signal.

    Returns:
        The launcher's exit status, 70 where that tells of a rank that was killed; after a signal that of
        :func:`stopped_status`.
    """
    began, asked = time.time(), 0
    child = subprocess.Popen(
        words,
        env=os.environ | dict(environment),
        start_new_session=True,
        preexec_fn=end_with_parent,
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
        status = child.wait()
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    return stopped_status(asked, run_dir, began) if asked else _told(status)


def _told(status: int) -> int:
    """The launcher's own exit status, or 70 where it is a shell's way (128 + signal) to say that a rank was killed."""
    number = -status if status < 0 else status - 128
    if status == EXIT_INTERRUPTED or number not in set(signal.Signals):
        return status
    print(f"lce launch: killed: a rank by {signal.Signals(number).name}", flush=True)
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
