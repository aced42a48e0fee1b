"""Steps of ``lce demo`` and ``lce tune``: done once, continued when interrupted, done anew when what they are made from
changed.

Every step has a stamp ``folder/steps/NAME.json`` with a key, the hash of all that went into it and into the steps
before it. A finished step with the same key is skipped. An unfinished one is run again: on what it left where it can
continue (a training run resumes from its checkpoint), else from nothing, as is a step whose key has changed.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trainer import __version__

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
"""The recipes: a folder next to the packages, in a clone and where the wheel is installed."""

CROSS_MODEL = CONFIGS / "cross-model.yaml"
"""The recipe of maps alone."""
STOP_SECONDS = (8.5, 0.7)  # how long children may take to end after SIGINT, and then after SIGTERM


class StepFailed(Exception):
    """A command that a step runs ended with an error, which it has printed itself; ``status`` is its exit status."""

    def __init__(self, command: str, status: int) -> None:
        super().__init__(f"`{command}` ended with exit status {status}; the same command continues from here")
        self.status = status


def without_network(settings: Iterable[str]) -> list[str]:
    """Those of a network's overrides that :data:`CROSS_MODEL` takes, which trains none."""
    return [setting for setting in settings if not setting.startswith(("backbone.", "head."))]


class Steps:
    """Runs named steps in one folder, in order.

    Args:
        folder: the story's folder; everything a step makes lies in it.
        say: prints one line about a step.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.seconds: dict[str, float] = {}
        self._say = say
        self._key = __version__

    def run(
        self,
        name: str,
        title: str,
        made_from: Sequence[str],
        products: Sequence[Path],
        action: Callable[[], None],
        continues: bool = False,
    ) -> None:
        """Do one step, unless it is done.

        Args:
            name: names the stamp.
            title: what is printed.
            made_from: everything that determines the result besides the earlier steps: command line, configuration.
            products: files and folders that the step makes, all inside :attr:`folder`.
            action: does it.
            continues: ``action`` can go on from what an interrupted run of itself left; else that is deleted first.
        """
        self._key = hashlib.sha256(json.dumps([self._key, *made_from]).encode()).hexdigest()
        path = self.folder / "steps" / f"{name}.json"
        stamp = _read(path)
        if stamp.get("key") == self._key and stamp.get("done") and all(p.exists() for p in products):
            self.seconds[name] = stamp["seconds"]
            self._say(f"{title}: done before ({stamp['seconds']:.0f} s)")
            return
        begun = stamp.get("key") == self._key
        if not (begun and continues):
            for product in products:
                _delete(product)
        stamp = {"key": self._key, "done": False, "seconds": stamp["seconds"] if begun else 0.0}
        _write(path, stamp)
        self._say(title)
        start = time.monotonic()
        try:
            action()
            stamp["done"] = True
        finally:
            stamp["seconds"] += time.monotonic() - start
            _write(path, stamp)
        self.seconds[name] = stamp["seconds"]


def run_lce(arguments: Sequence[str], stdout: int | None = None, stderr: int | None = None) -> None:
    """Run ``lce ARGUMENTS`` as a child of its own process group, and end that group when this process is interrupted.

    Args:
        arguments: subcommand and its arguments.
        stdout, stderr: file descriptors for its output, or ``subprocess.DEVNULL``; None: ours.

    Raises:
        StepFailed: the command's exit status is not 0.
    """
    command = [sys.executable, "-m", "tools.cli", *arguments]
    process = subprocess.Popen(command, start_new_session=True, stdout=stdout, stderr=stderr)
    try:
        status = process.wait()
    except BaseException:
        end_group(process)
        raise
    if status != 0:
        raise StepFailed(f"lce {' '.join(arguments)}", status)


def end_group(process: "subprocess.Popen[Any]") -> None:
    """Ask a child's process group to stop as Ctrl-C does, then firmly, then kill it."""
    for how, patience in ((signal.SIGINT, STOP_SECONDS[0]), (signal.SIGTERM, STOP_SECONDS[1]), (signal.SIGKILL, 2.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Make SIGTERM and SIGHUP end this process as Ctrl-C does, so that its children end too."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _read(path: Path) -> dict[str, Any]:
    try:
        stamp = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def _write(path: Path, stamp: dict[str, Any]) -> None:
    from trainer.files import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(stamp))


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
