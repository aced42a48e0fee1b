"""Ranks, launchers and data processes are killed or stopped at random moments; what the same command makes of it in the
end equals the uninterrupted run to the last bit."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.attack import amounts, tally
from tests.attack.commands import alive, ended, launched, rank_pids
from tests.data.samples import packed
from tests.runs import losses_of

pytestmark = pytest.mark.slow
STEPS = 40
VICTIMS = ("rank", "launcher", "data process", "stopped rank")


def settings(data: Path) -> dict[str, Any]:
    """A run of some seconds that saves every few updates and reads its data in processes of its own."""
    return {
        "data__loader": "torch",
        "data__path": str(data),
        "data__workers": 1,
        "data__batch_size": 8,
        "train__steps": STEPS,
        "checkpoint__every_steps": 3,
        "run__timeout_seconds": 20,
    }


def strike(victim: str, launcher: int, ranks: list[int], draw: random.Random) -> None:
    """Kill or stop one process of a run."""
    rank = draw.choice(ranks)
    if victim == "launcher":
        os.kill(launcher, signal.SIGKILL)
    elif victim == "data process":
        workers = Path(f"/proc/{rank}/task/{rank}/children").read_text().split()
        os.kill(int(draw.choice(workers)) if workers else rank, signal.SIGKILL)
    elif victim == "stopped rank":
        os.kill(rank, signal.SIGSTOP)
        os.kill(launcher, signal.SIGTERM)
    else:
        os.kill(rank, signal.SIGKILL)


def steps_made(folder: Path) -> int:
    """Lines of the log."""
    log = folder / "run/log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def struck(folder: Path, victim: str, after: int, draw: random.Random, **changes: Any) -> str:
    """Start the run, strike after ``after`` more updates, wait for its end: what it printed."""
    begun, run = steps_made(folder), launched(folder, slow=0.02, environment={"STUCK": "3"}, **changes)
    end, pids = time.monotonic() + 120, [0]
    while run.poll() is None and steps_made(folder) < begun + after and time.monotonic() < end:
        time.sleep(0.02)
    pids = rank_pids(folder)
    if run.poll() is None and len(pids) == 2:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it has ended by itself
            strike(victim, run.pid, pids, draw)
    _, output = ended(run)
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(alive, pids)), f"{victim}: ranks outlived their launcher"
    return output


@amounts(1, 30, 100)
def test_killed_runs_end_as_the_uninterrupted_one(tmp_path: Path, amount: int) -> None:
    changes = settings(packed(tmp_path, 11, 6, (8, 8)))
    whole = tmp_path / "whole"
    whole.mkdir()
    assert ended(launched(whole, slow=0, **changes))[0] == 0
    draw, made, number = random.Random(16), 0, 0
    while made < amount:
        folder, number = tmp_path / f"run{number}", number + 1
        folder.mkdir()
        kills: list[str] = []
        for _ in range(min(5, amount - made)):
            victim = VICTIMS[(made + len(kills)) % len(VICTIMS)]
            output = struck(folder, victim, draw.randint(1, 8), draw, **changes)
            assert "Traceback" not in output or victim in ("rank", "stopped rank"), f"{victim}: {output}"
            kills.append(victim)
        status, output = ended(launched(folder, slow=0, **changes))
        assert status == 0, output
        assert losses_of(folder / "run") == losses_of(whole / "run"), kills
        one, other = (load_file(place / "run/model/backbone.safetensors") for place in (folder, whole))
        assert all(torch.equal(one[name], other[name]) for name in other), kills
        for victim in kills:
            tally(f"killed: {victim}" if victim != "stopped rank" else victim, "equal")
        made += len(kills)
