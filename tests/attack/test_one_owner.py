"""Two commands on one target: one works, the other is refused with status 2 and the first one's name."""

import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.attack import amounts, tallied, tally
from tests.attack.commands import alive, ended, launched, parent, rank_pids, start, wait_for_step
from tests.data.samples import identity_folders
from tests.runs import log_of, tree
from trainer.checkpoint_folder import list_checkpoints
from trainer.data.index import open_dataset

pytestmark = pytest.mark.slow


@tallied("concurrent lce launch", "refused")
def test_a_second_run_is_refused_and_ranks_end_with_their_launcher(tmp_path: Path) -> None:
    """F1: a second run began next to the first one, and ranks whose launcher was killed trained on for ever. The same
    command, started at once, waits for them and continues; a closed terminal saves."""
    first = launched(tmp_path, train__steps=100000)
    try:
        wait_for_step(tmp_path, 2)
        pids = rank_pids(tmp_path)
        status, output = ended(launched(tmp_path, train__steps=100000, optimizer__lr=0.01))
        assert status == 2, output
        assert re.search(rf"run: in use by .*process {pids[0]} of ", output)
        assert output.count("in use by") == 1
        assert "Traceback" not in output
        assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["optimizer"]["lr"] == 0.1
    finally:
        first.kill()
        first.wait()
    again = launched(tmp_path, train__steps=100000)  # waits for the ranks that are saving
    wait_for_end(pids)
    before = last_saved(tmp_path)
    wait_for_step(tmp_path, before + 2)
    again.send_signal(signal.SIGHUP)
    status, output = ended(again)
    assert status == 75, output
    assert "continuing from" in output
    assert last_saved(tmp_path) > before
    assert not (tmp_path / "run/.owner").exists()
    steps = [line["step"] for line in log_of(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1))


def test_a_rank_that_ignores_the_launchers_death_ends_too(tmp_path: Path) -> None:
    """Where the kernel tells nobody (not Linux): the watch looks for its parent."""
    from trainer.run import watch

    code = """
import os, sys, time
os.environ["LCE_LAUNCHED"] = "1"
from pathlib import Path
from trainer.distributed import Ranks
from trainer.run import watch
watch.BEAT_SECONDS, watch.ORPHAN_SECONDS = 0.1, 0.5
if os.fork() == 0:
    os.setsid()
    with watch.Watch(Path(sys.argv[1]), Ranks(0, 1), 600) as mine:
        mine.at(0, "forward")
        print("up", os.getpid(), flush=True)
        time.sleep(60)
time.sleep(60)
"""
    assert watch.ORPHAN_SECONDS == 60
    process = start(["-c", code, tmp_path / "ranks"])
    assert process.stdout is not None
    pid = int(process.stdout.readline().split()[1])
    process.kill()
    end = time.monotonic() + 120
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(pid)
    assert "its launcher has died" in process.stdout.read()
    process.wait()


@amounts(1, 6, 20)
def test_two_packings_into_one_folder(tmp_path: Path, amount: int) -> None:
    """F5: broken data behind status 0, and tracebacks."""
    sources = [identity_folders(tmp_path / name, 4, 25) for name in ("a", "b")]
    for attempt in range(amount):
        out = tmp_path / f"out{attempt}"
        both = sources if attempt % 2 else sources[:1] * 2
        running = [
            start(["-m", "tools.cli", "pack", source, out, "--part-records", "7", "--processes", "1"])
            for source in both
        ]
        ends = [ended(process) for process in running]
        for status, output in ends:
            assert status in (0, 2), output
            assert "Traceback" not in output
            assert status == 0 or "in use by" in output or "another packing" in output, output
        assert any(status == 0 for status, _ in ends)
        dataset = open_dataset(out)
        assert len(dataset) == 100
        assert np.bincount(dataset.labels).tolist() == [25] * 4
        assert not list(out.glob(".owner*"))
        tally("concurrent lce pack", "refused" if any(status == 2 for status, _ in ends) else "handled")


@tallied("concurrent lce pack --part", "refused")
def test_the_jobs_of_one_packing_go_on_together_and_one_job_twice_does_not(tmp_path: Path) -> None:
    source, out = identity_folders(tmp_path / "a", 4, 25), tmp_path / "out"
    words = ["-m", "tools.cli", "pack", source, out, "--part-records", "7", "--processes", "1", "--part"]
    for status, output in [ended(process) for process in [start([*words, f"{i}/2"]) for i in (1, 2)]]:
        assert status == 0, output
    assert len(open_dataset(out)) == 100
    hold = [
        "-c",
        "import sys, time; from pathlib import Path; from trainer.errors import DataError; "
        "from trainer.owner import owned\nwith owned(Path(sys.argv[1]), DataError, lock=Path(sys.argv[2])):\n"
        "  print('held', flush=True); time.sleep(60)",
        out,
        out / ".owner-2-of-2",
    ]
    holder = start(hold)
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert ended(start([*words, "1/2"]))[0] == 0
        status, output = ended(start([*words, "2/2"]))
        assert status == 2, output
        assert f"process {holder.pid}" in output
    finally:
        holder.kill()
        holder.wait()


@amounts(1, 3, 10)
def test_two_banks_of_one_name(tmp_path: Path, amount: int) -> None:
    """F14: both said done, and the later replaced the other's."""
    rows = np.random.default_rng(0).normal(size=(20000, 64)).astype(np.float32)
    np.save(tmp_path / "labels.npy", np.arange(20000) % 500)
    for name, sign in (("a", 1), ("b", -1)):
        np.save(tmp_path / f"{name}.npy", sign * rows)
    for attempt in range(amount):
        bank = tmp_path / f"bank{attempt}"
        words = ["-m", "tools.cli", "centers", "from-embeddings"]
        running = [
            start([*words, tmp_path / f"{name}.npy", bank, "--labels", tmp_path / "labels.npy"]) for name in "ab"
        ]
        ends = [ended(process) for process in running]
        assert sorted(status for status, _ in ends) == [0, 2], ends
        assert all("Traceback" not in output for _, output in ends)
        refused = next(output for status, output in ends if status == 2)
        assert "in use by" in refused or "exists already" in refused
        status, output = ended(start(["-m", "tools.cli", "centers", "info", bank, "--verify", "--pairs", "0"]))
        assert status == 0, output
        assert not list(tmp_path.glob(".*.owner"))
        tally("concurrent lce centers", "refused")


@pytest.mark.attack
@pytest.mark.parametrize("launcher", ["mpirun", "deepspeed"])
@tallied("killed: lce launch before another launcher", "handled")
def test_ranks_of_other_launchers_end_with_lce_launch(tmp_path: Path, launcher: str) -> None:
    """``lce launch`` is killed, though another launcher stands between it and the ranks (DeepSpeed's own outlives it),
    and the same command is started at once; then that other launcher is killed."""
    if launcher == "mpirun":
        pytest.importorskip("mpi4py", reason="needs mpi4py (extra `mpi`)")
    else:
        pytest.importorskip("deepspeed", reason="needs DeepSpeed (extra `deepspeed`)")
    if shutil.which(launcher, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") is None:
        pytest.skip("the launcher's program is not installed")
    changes = {
        "train__steps": 100000,
        "backbone__name": "small",
        "head__rows": "float32",
        "train__precision": "float32",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree(tmp_path / "run", **changes)))
    words = ["-m", "tools.cli", "launch", tmp_path / "run.yaml", "--nproc", 2, "--with", launcher]
    run = start(words)
    wait_for_step(tmp_path, 3)
    pids = rank_pids(tmp_path)
    assert len(pids) == 2
    run.kill()
    run.wait()
    again = start(words)  # waits for the ranks that are saving
    try:
        wait_for_end(pids)
        before = last_saved(tmp_path)
        wait_for_step(tmp_path, before + 2)
        pids = rank_pids(tmp_path)
        os.kill(parent(pids[0]), signal.SIGKILL)
        wait_for_end(pids)
        status, output = ended(again)
    finally:
        again.kill()
    assert status == 75, output
    assert "continuing from" in output
    assert last_saved(tmp_path) > before, "the orphans saved before they ended"
    steps = [line["step"] for line in log_of(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1))


def wait_for_end(pids: list[int]) -> None:
    """Until these processes have ended; what still runs after 90 s is killed, and the test fails."""
    end = time.monotonic() + 90
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    left = [pid for pid in pids if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "ranks outlived their launcher"


def last_saved(folder: Path) -> int:
    """The step of the run's newest checkpoint."""
    return int(list_checkpoints(folder / "run/checkpoints")[-1].name.removeprefix("step-"))
