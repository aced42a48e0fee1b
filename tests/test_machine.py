"""How many threads a rank takes: what the user asks for, else its share of the cores among all ranks there are."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from launch.job import Job
from trainer import machine
from trainer.distributed import process_group

WAITING = "import sys, time; sys.stdout.write('h'); sys.stdout.flush(); time.sleep(60)"


@pytest.fixture
def others(tmp_path: Path) -> Iterator[int]:
    """Two processes that look like ranks of another run: their launcher is a shell."""
    package = tmp_path / "trainer"
    package.mkdir()
    (package / "__main__.py").write_text(WAITING)
    command = f"{sys.executable} -m trainer & {sys.executable} -m trainer & wait"
    with subprocess.Popen(
        ["sh", "-c", command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONSAFEPATH": ""},
        stdout=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
    ) as shell:
        assert shell.stdout is not None
        for _ in range(2):
            assert shell.stdout.read(1) == b"h"
        yield 2
        os.killpg(shell.pid, 9)


def test_the_cores_are_shared_with_other_runs(others: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "usable_cores", lambda: 64)
    there = machine.other_ranks(1)
    assert there >= others
    assert machine.threads_of_a_rank(2) <= 64 // (2 + others)
    monkeypatch.setattr(machine, "usable_cores", lambda: 1)
    assert machine.threads_of_a_rank(2) == 1


def test_a_runs_own_ranks_are_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen from a rank: what the same launcher started counts up to the number that it was to start."""
    command = [sys.executable, "-c", "from trainer import machine; print(machine._ranks_besides_this()[0])"]
    ranks = [subprocess.Popen([sys.executable, "-c", WAITING, "-m", "trainer"], stdout=subprocess.PIPE) for _ in "ab"]
    try:
        for rank in ranks:
            assert rank.stdout is not None
            assert rank.stdout.read(1) == b"h"
        assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) == len(ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    monkeypatch.setattr(machine, "_ranks_besides_this", lambda: (2, 5))
    assert [machine.other_ranks(on_node) for on_node in (1, 2, 3, 4)] == [7, 6, 5, 5]


def test_what_the_user_set_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 64)
    before = torch.get_num_threads()
    try:
        for said, threads in (("3", 3), ("2,1", 2)):
            monkeypatch.setenv("OMP_NUM_THREADS", said)
            with process_group("cpu"):
                assert torch.get_num_threads() == threads
        with process_group("cpu", threads=4):
            assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    for said in ("", "many", "0"):
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        assert machine.threads_of_a_rank(64) == 1


def test_the_launcher_hands_the_share_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 64)
    monkeypatch.setattr(machine, "other_ranks", lambda on_node: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert Job(Path("c.yaml"), [], nproc=4).environment["OMP_NUM_THREADS"] == "8"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert "OMP_NUM_THREADS" not in Job(Path("c.yaml"), [], nproc=4).environment
