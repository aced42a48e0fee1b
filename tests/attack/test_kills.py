"""Ranks, launchers and data processes are killed or stopped at random moments; what the same command makes of it in the
end equals the uninterrupted run to the last bit."""

import itertools
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
from tests.attack.commands import alive, data_processes, ended, launched, rank_pids
from tests.data.samples import packed
from tests.ranks import run_ranks
from tests.runs import losses_of, train_rank

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


def strike(victim: str, launcher: int, ranks: list[int], draw: random.Random) -> bool:
    """Kill or stop one process of a run; False: there is none any more."""
    rank = draw.choice(ranks)
    try:
        pid = {"launcher": launcher, "data process": 0}.get(victim) or rank
        if victim == "data process":
            pid = draw.choice([one for one in data_processes(rank) if alive(one)] or [0])
        if not pid or not alive(pid):
            return False
        os.kill(pid, signal.SIGSTOP if victim == "stopped rank" else signal.SIGKILL)
        if victim == "stopped rank":
            os.kill(launcher, signal.SIGTERM)
    except (ProcessLookupError, FileNotFoundError):
        return False
    return True


def steps_made(folder: Path) -> int:
    """Lines of the log."""
    log = folder / "run/log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def struck(folder: Path, victim: str, slow: float, draw: random.Random, **changes: Any) -> bool:
    """Start the run, strike after some more updates, wait for its end: whether a living process was hit, so that the
    run did not come to its own end. ``slow``: seconds that an update takes longer."""
    begun, run = steps_made(folder), launched(folder, slow=slow, environment={"STUCK": "3"}, **changes)
    after, end = draw.randint(1, 8), time.monotonic() + 120
    while run.poll() is None and steps_made(folder) < begun + after and time.monotonic() < end:
        time.sleep(0.02)
    pids = rank_pids(folder)
    hit = run.poll() is None and len(pids) == 2 and strike(victim, run.pid, pids, draw)
    status, output = ended(run)
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(alive, pids)), f"{victim}: ranks outlived their launcher"
    assert "Traceback" not in output or victim in ("rank", "stopped rank"), f"{victim}: {output}"
    return hit and status != 0


@amounts(1, 30, 100)
def test_killed_runs_end_as_the_uninterrupted_one(tmp_path: Path, amount: int) -> None:
    changes = settings(packed(tmp_path, 11, 6, (8, 8)))
    whole = tmp_path / "whole"
    here = {**changes, "data__workers": 0}  # the ranks of run_ranks start no processes
    run_ranks(train_rank, 2, whole / "run", here, timeout=400)
    draw, made, slow = random.Random(16), 0, 0.05
    for number in itertools.count():
        if made == amount:
            break
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        kills: list[str] = []
        while len(kills) < min(5, amount - made):
            victim = VICTIMS[(made + len(kills)) % len(VICTIMS)]
            if not struck(folder, victim, slow, draw, **changes):  # too late: it counts as none
                slow *= 2
                break
            kills.append(victim)
        assert slow < 10, "no kill comes in time"
        if amount == 1:  # the share is in a hurry: without a launcher of its own
            run_ranks(train_rank, 2, folder / "run", here, timeout=400)
        else:
            status, output = ended(launched(folder, slow=0, **changes))
            assert status == 0, output
        assert losses_of(folder / "run") == losses_of(whole / "run"), kills
        one, other = (load_file(place / "run/model/backbone.safetensors") for place in (folder, whole))
        assert all(torch.equal(one[name], other[name]) for name in other), kills
        for victim in kills:
            tally(f"killed: {victim}" if victim != "stopped rank" else victim, "equal")
        made += len(kills)
