"""The sbatch file under a real SLURM of two nodes: it trains, is pre-empted, loses a node, a rank fails."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launch.test_names import TRAP, trapped
from tests.launch.virtual_slurm import VirtualSlurm, missing
from tools.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]
STEPS = 300
WAIT_SECONDS = 200


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualSlurm]:
    with VirtualSlurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where jobs are submitted: with a configuration, and with files named like our packages."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "trainer.py").write_text(TRAP)
    (folder / "tools").mkdir()
    (folder / "tools/__init__.py").write_text(TRAP)
    settings = {
        "run": {"dir": "run", "device": "cpu", "threads": 1, "seed": 3},
        "data": {"loader": "synthetic", "batch_size": 8, "synthetic_classes": 11, "synthetic_size": 8},
        "backbone": {"name": "small", "width": 4, "dim": 6},
        "head": {"margin": {"scale": 8.0}},
        "train": {"steps": STEPS},
        "checkpoint": {"every_steps": 20},
        "log": {"every_steps": 1, "tensorboard": False, "progress": False},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture
def submitted(slurm: VirtualSlurm, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator["Jobs"]:
    """Jobs of the run folders that are asked for, on two nodes of one rank."""
    monkeypatch.chdir(folder)
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    for name in ("OMP_NUM_THREADS", "PYTHONPATH", "PYTHONSAFEPATH"):
        monkeypatch.delenv(name, raising=False)
    jobs = Jobs(slurm, folder)
    yield jobs
    jobs.end()


class Jobs:
    """The jobs of a test, which end with it."""

    def __init__(self, slurm: VirtualSlurm, folder: Path) -> None:
        self.slurm, self.folder, self.numbers = slurm, folder, list[str]()

    def submit(self, run: str, capsys: pytest.CaptureFixture[str]) -> str:
        """Hand a run to the queue, by our own command; its number."""
        words = ["launch", "run.yaml", f"run.dir={run}", "--with", "slurm", "--nnodes", "2", "--interface", "lo"]
        assert main([*words, "--job-id", run, "--sbatch", "comment=two words", "--cpus", "2"]) == 0
        self.numbers.append(capsys.readouterr().out.split()[-1])
        return self.numbers[-1]

    def lines(self, run: str) -> list[dict[str, Any]]:
        """What a run has logged of its updates."""
        log = self.folder / run / "log.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()[:-1]] if log.exists() else []

    def output(self, run: str) -> str:
        """What a run's job has printed."""
        return "".join(file.read_text() for file in self.folder.glob(f"{run}-*.out"))

    def wait_for(self, job: str, *states: str) -> None:
        self.slurm.until(lambda: self.slurm.state(job) in states, WAIT_SECONDS)

    def wait_for_steps(self, run: str, count: int) -> None:
        self.slurm.until(lambda: len(self.lines(run)) >= count, WAIT_SECONDS)

    def end(self) -> None:
        for job in self.numbers:
            if self.slurm.state(job) not in ("COMPLETED", "FAILED", "CANCELLED"):
                self.slurm.command("scancel", job)
                self.wait_for(job, "COMPLETED", "FAILED", "CANCELLED")


def losses(lines: list[dict[str, Any]]) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_two_nodes_train_stop_continue_and_lose_a_node(submitted: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    """One run in peace; another is pre-empted, and then loses a node: it comes to the same losses."""
    slurm, folder = submitted.slurm, submitted.folder
    whole = submitted.submit("whole", capsys)
    submitted.wait_for(whole, "COMPLETED", "FAILED")
    assert slurm.state(whole) == "COMPLETED", submitted.output("whole")
    assert "2 ranks" in submitted.output("whole")
    assert "Comment=two words" in slurm.command("scontrol", "show", "job", whole)
    assert not trapped(folder)

    job = submitted.submit("again", capsys)
    submitted.wait_for_steps("again", 5)
    slurm.command("scancel", "--signal=TERM", "--batch", job)
    slurm.until(lambda: slurm.restarts(job) == 1, WAIT_SECONDS)
    printed = submitted.output("again").splitlines()
    assert printed[-1].endswith(f"ended with status 75; job {job} goes back into the queue")
    assert any("again: stopped by SIGTERM at step" in line for line in printed)
    assert not any("Traceback" in line or "SignalException" in line for line in printed)
    stopped = max(losses(submitted.lines("again")))
    assert stopped < STEPS

    slurm.hurry(job)
    submitted.wait_for_steps("again", stopped + 45)  # a checkpoint is written every 20
    slurm.command("scontrol", "update", f"NodeName={slurm.nodes[1]}", "State=DOWN", "Reason=test")
    slurm.until(lambda: slurm.restarts(job) == 2, WAIT_SECONDS)
    assert max(losses(submitted.lines("again"))) < STEPS
    slurm.hurry(job)
    submitted.wait_for(job, "COMPLETED", "FAILED")
    assert slurm.state(job) == "COMPLETED", submitted.output("again")
    assert "DUE TO NODE FAILURE" in submitted.output("again")
    assert submitted.output("again").count("again: continuing from") == 2
    assert losses(submitted.lines("again")) == losses(submitted.lines("whole"))


def test_a_rank_that_fails_ends_the_job(submitted: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    """It is named, and the job is not queued again."""
    job = submitted.submit("failing", capsys)
    submitted.wait_for_steps("failing", 5)
    note = json.loads((submitted.folder / "failing/ranks/rank-00001.json").read_text())
    with suppress(ProcessLookupError):
        os.kill(note["pid"], signal.SIGKILL)
    submitted.wait_for(job, "COMPLETED", "FAILED")
    assert submitted.slurm.state(job) == "FAILED"
    assert submitted.slurm.exit_status(job) == 70
    assert submitted.slurm.restarts(job) == 0
    assert "lce launch: killed: rank 1 by SIGKILL" in submitted.output("failing")
