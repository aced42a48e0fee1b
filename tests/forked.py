"""Commands in processes of their own that start at once, as copies of one that has torch and the trainer imported.

For tests that need a process (its memory, signals, exit status) and not the start of one: a Python of its own takes
seconds to import torch. A test of imports, or of what is read at the start, starts a Python itself.

Of the variables that Python and torch read when they start, only OMP_NUM_THREADS has its effect here; others
(PYTHONPATH, PYTHONHASHSEED, MKL_NUM_THREADS) reach only what the command starts in its turn.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tests.ranks import _context
from tools.results.million import descendants, kill


def perform(words: Sequence[str]) -> None:
    """Do here what ``python WORDS`` would: ``-m MODULE …`` or ``-c CODE …``."""
    kind, what, *rest = words
    if kind == "-m":
        sys.argv = [what, *rest]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.argv = ["-c", *rest]
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


def _end(pid: int) -> None:
    """SIGKILL to a process, all below it (ranks have sessions of their own) and what is left of its group."""
    kill(descendants(pid))
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _end_with_the_test() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    kill(descendants(os.getpid())[1:])
    os.killpg(os.getpid(), signal.SIGKILL)


def _child(words: Sequence[str], environment: dict[str, str], folder: str, outputs: Sequence[str]) -> None:
    os.setsid()
    threading.Thread(target=_end_with_the_test, daemon=True).start()
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS") or 1))
    perform(words)


def run(
    words: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | str = ".",
    output: Path | None = None,
    timeout: float = 300.0,
) -> "subprocess.CompletedProcess[str]":
    """``python WORDS``, waited for: its status and what it printed. Whatever ends the wait ends the process and all
    below it.

    Args:
        words: ``-m MODULE …`` or ``-c CODE …``. env, cwd: of the process. output: a file for all that it prints.
        timeout: in seconds.

    Raises:
        subprocess.TimeoutExpired: it was killed after ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [str(output)] * 2 if output else [str(Path(folder, name)) for name in ("out", "err")]
        environment = dict(os.environ if env is None else env)
        process = _context.Process(target=_child, args=(tuple(words), environment, str(Path(cwd).absolute()), outputs))
        process.start()
        assert process.pid is not None
        try:
            process.join(timeout)
            if process.is_alive():
                raise subprocess.TimeoutExpired(list(words), timeout)
        except BaseException:  # Ctrl-C and pytest's own timeout too: at its end Python would wait for the process
            _end(process.pid)
            process.join()
            raise
        assert process.exitcode is not None
        out, err = (Path(path).read_text(errors="replace") for path in outputs)
    return subprocess.CompletedProcess(list(words), process.exitcode, out, err)
