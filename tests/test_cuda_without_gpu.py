"""On CUDA: no operation mixes devices, the loss is the CPU's, and the host waits for the device as seldom as agreed.

The budgets are in cuda_waits.json, waits of an update by case and world size; they do not depend on the chunks. A case
that waits less often than its budget fails as well: write the smaller number there, never a larger one.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUDGETS: dict[str, dict[str, int]] = json.loads((ROOT / "tests/cuda_waits.json").read_text())
CARELESS = "careless backward"
"""The case whose second pass has a wait and a mix of devices added, which the log has to find."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="pretended CUDA tensors need g++"),
]


WORLDS = (1, 8)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, tuple["subprocess.Popen[str]", Path]]]:
    """Both processes at once, as each has one thread: by world size, with the file of their output."""
    folder, processes = tmp_path_factory.mktemp("waits"), {}
    for world in WORLDS:
        command = [sys.executable, "-m", "tests.fake_cuda", str(world)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        output = folder / f"{world}.json"
        with output.open("w") as out, output.with_suffix(".err").open("w") as err:
            processes[world] = (
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err, text=True),
                output,
            )
    yield processes
    for process, _ in processes.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("world", WORLDS)
def test_the_host_waits_for_the_device_as_seldom_as_agreed(
    world: int, started: dict[int, tuple["subprocess.Popen[str]", Path]]
) -> None:
    process, output = started[world]
    assert process.wait(800) == 0, output.with_suffix(".err").read_text()[-3000:]
    found: dict[str, dict[str, dict[str, Any]]] = json.loads(output.read_text())
    assert found.keys() == BUDGETS.keys()
    for name, chunks in found.items():
        for label, one in chunks.items():
            said = f"{name}, {world} rank(s), {label}:\n" + "\n".join(one["places"])
            assert one["errors"] == (2 if name == CARELESS else 0), said  # of both updates
            assert one["waits"] == BUDGETS[name][str(world)], said
            if "loss on the CPU" in one:
                assert one["loss"] == pytest.approx(one["loss on the CPU"], rel=1e-3, abs=1e-5), said


def test_goals() -> None:
    """One wait a batch, for the labels; LCE and the other methods two more at most, whatever the world size. Deferred
    updates ask whether they are finite, accumulated ones also how many rows their two batches have together.
    """
    apart = {"deferred": 2, "accumulated": 4, CARELESS: 2}
    for name, waits in BUDGETS.items():
        assert max(waits.values()) <= apart.get(name, 3 if name.startswith(("lce", "rival")) else 1), name
        assert len(set(waits.values())) == 1, name
