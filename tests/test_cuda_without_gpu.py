"""On CUDA: no operation mixes devices, the loss is the CPU's, and the host waits for the device as seldom as agreed.

The budgets are in cuda_waits.json, waits of an update by case and world size; they do not depend on the chunks. A case
that waits less often than its budget fails as well: write the smaller number there, never a larger one.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUDGETS: dict[str, dict[str, int]] = json.loads((ROOT / "tests/cuda_waits.json").read_text())

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="pretended CUDA tensors need g++"),
]


@pytest.mark.parametrize("world", [1, 8])
def test_the_host_waits_for_the_device_as_seldom_as_agreed(world: int) -> None:
    command = [sys.executable, "-m", "tests.fake_cuda", str(world)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, dict[str, Any]]] = json.loads(done.stdout)
    assert found.keys() == BUDGETS.keys()
    for name, chunks in found.items():
        for label, one in chunks.items():
            said = f"{name}, {world} rank(s), {label}:\n" + "\n".join(one["places"])
            assert one["errors"] == 0, said
            assert one["waits"] == BUDGETS[name][str(world)], said
            if "loss on the CPU" in one:
                assert one["loss"] == pytest.approx(one["loss on the CPU"], rel=1e-3, abs=1e-5), said


def test_goals() -> None:
    """One wait an update, for the labels; LCE through maps two more at most."""
    for name, waits in BUDGETS.items():
        if not name.startswith(("rival", "lce cross-model, images")):
            assert max(waits.values()) <= (3 if name.startswith("lce") else 1), name
