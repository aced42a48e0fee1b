"""Commands in processes of their own: they end with the test, however that ends."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests import forked
from tools.results.million import resident_bytes

FAMILY = """
import os, pathlib, signal, subprocess, sys, time
below = subprocess.Popen(["sleep", "600"], start_new_session=True)
pathlib.Path(sys.argv[1]).write_text(f"{os.getpid()} {below.pid}")
os.kill(int(sys.argv[2]), int(sys.argv[3]))
time.sleep(600)
"""
NESTED = """
import os, sys
from tests import forked
forked.run(["-c", sys.argv[1], sys.argv[2], str(os.getpid()), "9"])
"""


def wait_for_the_end(pids: Path) -> None:
    """Until no process of the family is there; a zombie has no memory."""
    family = list(map(int, pids.read_text().split()))
    assert len(family) == 2
    until = time.monotonic() + 60
    while any(map(resident_bytes, family)):
        assert time.monotonic() < until, f"{family} are still there"
        time.sleep(0.02)


def test_an_interrupted_test_ends_its_process_and_all_below_it(tmp_path: Path) -> None:
    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            forked.run(["-c", FAMILY, str(tmp_path / "pids"), str(os.getpid()), str(int(signal.SIGUSR1))])
    finally:
        signal.signal(signal.SIGUSR1, before)
    wait_for_the_end(tmp_path / "pids")


def test_a_killed_test_ends_its_process_and_all_below_it(tmp_path: Path) -> None:
    assert forked.run(["-c", NESTED, FAMILY, str(tmp_path / "pids")]).returncode == -signal.SIGKILL
    wait_for_the_end(tmp_path / "pids")


def test_what_takes_too_long_is_ended() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        forked.run(["-c", "import time; time.sleep(600)"], timeout=0.5)


def test_a_process_computes_with_the_threads_that_its_environment_names() -> None:
    program = ["-c", "import torch; print(torch.get_num_threads())"]
    without = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    assert [forked.run(program, env=without | more).stdout for more in ({}, {"OMP_NUM_THREADS": "2"})] == ["1\n", "2\n"]
