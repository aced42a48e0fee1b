"""Commands in processes of their own that start at once, as copies of one that has torch and the trainer imported.

For tests that need a process (its memory, signals, exit status) and not the start of one: a Python of its own takes
seconds to import torch. A test of imports, or of what is read at the start, starts a Python itself.
"""

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.ranks import _context


def perform(words: Sequence[str]) -> None:
    """Do here what ``python WORDS`` would: ``-m MODULE …`` or ``-c CODE …``."""
    kind, what, *rest = words
    if kind == "-m":
        sys.argv = [what, *rest]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.argv = ["-c", *rest]
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


def _child(words: Sequence[str], environment: dict[str, str], folder: str, outputs: Sequence[str]) -> None:
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    perform(words)


def run(
    words: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | str = ".",
    output: Path | None = None,
    timeout: float = 300.0,
) -> "subprocess.CompletedProcess[str]":
    """``python WORDS``, waited for: its status and what it printed.

    Args:
        words: ``-m MODULE …`` or ``-c CODE …``. env, cwd: of the process. output: a file for all that it prints.

    Raises:
        subprocess.TimeoutExpired: it was killed after ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [str(output)] * 2 if output else [str(Path(folder, name)) for name in ("out", "err")]
        environment = dict(os.environ if env is None else env)
        process = _context.Process(target=_child, args=(tuple(words), environment, str(Path(cwd).absolute()), outputs))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(list(words), timeout)
        assert process.exitcode is not None
        out, err = (Path(path).read_text(errors="replace") for path in outputs)
    return subprocess.CompletedProcess(list(words), process.exitcode, out, err)


class Fork:
    """A stand-in for ``subprocess.Popen`` in a process without threads: ``python WORDS`` as a copy of this one."""

    def __init__(
        self, command: Sequence[str], start_new_session: bool = False, stdout: int | None = None, stderr: Any = None
    ) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid, self._status = os.fork(), None
        if self.pid == 0:
            self._perform(command, start_new_session, stdout)

    def _perform(self, command: Sequence[str], start_new_session: bool, stdout: int | None) -> None:
        status: Any = 0
        try:
            if start_new_session:
                os.setsid()
            if stdout is not None:
                os.dup2(os.open(os.devnull, os.O_WRONLY) if stdout == subprocess.DEVNULL else stdout, 1)
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            perform(command[1:])
        except SystemExit as end:
            status = end.code
        except KeyboardInterrupt:
            status = 130
        except BaseException:
            sys.excepthook(*sys.exc_info())
            status = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status if isinstance(status, int) else 0 if status is None else 1)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, negative where a signal ended it."""
        end = None if timeout is None else time.monotonic() + timeout
        while self._status is None:
            pid, status = os.waitpid(self.pid, 0 if end is None else os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
            elif end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            else:
                time.sleep(0.05)
        return self._status
