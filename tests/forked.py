"""Commands in processes of their own that start at once, as copies of one that has torch and the trainer imported.

For tests that need a process (its memory, signals, exit status) and not the start of one: a Python of its own takes
seconds to import torch. A test of imports, or of what is read at the start, starts a Python itself.
"""

import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

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
