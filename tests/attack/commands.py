"""Commands of ours as processes, for the attacks."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from tests.runs import tree

ROOT = Path(__file__).parents[2]


def start(words: Sequence[object], **environment: str) -> "subprocess.Popen[str]":
    """A command of ours in the background."""
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: "subprocess.Popen[str]", seconds: float = 300) -> tuple[int, str]:
    """Its exit status and what it printed."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, output


def launched(
    folder: Path, ranks: int = 2, slow: float = 0.05, environment: dict[str, str] | None = None, **changes: object
) -> "subprocess.Popen[str]":
    """A run in ``folder/run`` by the launcher of tests/faulty.py."""
    file = folder / f"{len(list(folder.glob('*.yaml')))}.yaml"
    file.write_text(yaml.safe_dump(tree(folder / "run", **changes)))
    return start(["-m", "tests.faulty", file, ranks, 0], SLOW=str(slow), **(environment or {}))


def wait_for_step(folder: Path, step: int, seconds: float = 300) -> None:
    """Until the run has logged ``step`` lines."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        log = folder / "run/log.jsonl"
        if log.exists() and len(log.read_text().splitlines()) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step} in {seconds} s")


def rank_pids(folder: Path) -> list[int]:
    """The processes of a run's ranks."""
    return [json.loads(note.read_text())["pid"] for note in sorted((folder / "run/ranks").glob("rank-*.json"))]


def data_processes(pid: int) -> list[int]:
    """The processes of torch's loader below a process, whatever started them for it."""
    found = []
    for folder in Path(f"/proc/{pid}/task").glob("*"):
        for child in map(int, (folder / "children").read_text().split()):
            own = [child] if Path(f"/proc/{child}/comm").read_text().strip() == "pt_data_worker" else []
            found += own + data_processes(child)
    return found


def alive(pid: int) -> bool:
    """Whether a process runs (not: waits to be reaped)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def parent(pid: int) -> int:
    """The process that started a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
