"""``lce bench million`` at 4,000 classes: every stage of the million-class story, as a user runs it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests import forked
from tools.results import million
from trainer.compat.bank.center_bank import CenterBank

CLASSES = 4_000


def test_every_stage_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "story"
    command = ["-m", "tools.cli", "bench", "million", "--classes", str(CLASSES), "--out", str(out), "--json", "-"]
    settings = ["train.steps=16", "checkpoint.every_steps=6", "log.every_steps=1", "run.threads=1"]
    settings += ["data.batch_size=32", "backbone.width=4"]
    root = Path(million.__file__).parents[2]
    done = forked.run([*command, *settings], env=os.environ | {"PYTHONPATH": str(root)}, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout)
    assert figures["whole"]
    assert figures["killed_at"] > figures["continued_from"] > 0
    assert [s["status"] for s in figures["stages"]] == [0, 0, -9, 0, 0, 0]
    lines = million._log(out / "run")
    assert [line["step"] for line in lines] == list(range(1, 17))  # the steps that the kill took were made again
    assert lines[-1]["alignment"] < lines[0]["alignment"]  # the rows are being pulled to the old centres
    assert figures["checkpoint_bytes"] > 2 * CLASSES * 512 * 4  # rows and momentum of all ranks, on one
    assert (out / "new.onnx").stat().st_size > 0


def test_the_old_head_is_read_as_it_was_written(tmp_path: Path) -> None:
    from tools.cli import main

    million.write_old_head(tmp_path / "old", 1003, 64, 4)
    assert main(["centers", "from-classifier", str(tmp_path / "old"), str(tmp_path / "bank")]) == 0
    parts = [torch.load(tmp_path / "old" / f"checkpoint_gpu_{r}.pt", weights_only=True) for r in range(4)]
    rows = torch.cat([part["state_dict_softmax_fc"]["weight"] for part in parts])
    assert [len(part["state_dict_softmax_fc"]["weight"]) for part in parts] == [251, 251, 251, 250]
    centers = CenterBank.open(tmp_path / "bank").rows(0, 1003).centers
    torch.testing.assert_close(centers, torch.nn.functional.normalize(rows))


def test_memory_of_a_family_of_processes_is_seen_and_it_is_killed() -> None:
    child = "x = bytearray(60_000_000); import time; time.sleep(60)"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        for _ in range(100):
            family = million.descendants(parent.pid)
            if len(family) == 2 and million.resident_bytes(family[1]) > 60_000_000:
                break
            time.sleep(0.1)
        assert len(family) == 2
        assert million.resident_bytes(family[1]) > 60_000_000 > million.resident_bytes(family[0])
    finally:
        million.kill(family)
        parent.wait()
    assert million.resident_bytes(family[0]) == 0


def test_a_folder_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tools.cli import main

    (tmp_path / "something").touch()
    assert main(["bench", "million", "--out", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
