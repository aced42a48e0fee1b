"""`lce launch --check`: opens what a run needs in one process, says what would be trained, and starts nothing."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.data.samples import packed
from tools.cli import main

pytestmark = pytest.mark.slow


@pytest.fixture
def configured(tmp_path: Path) -> Path:
    settings: dict[str, Any] = {
        "run": {"dir": str(tmp_path / "run"), "device": "cpu"},
        "data": {"path": str(packed(tmp_path / "faces", classes=4, images=5, size=(16, 16))), "batch_size": 4},
        "backbone": {"name": "small", "width": 4, "dim": 4},
        "train": {"epochs": 2},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "run.yaml"


def test_a_run_that_can_start_is_described(configured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", str(configured), "--nproc", "2", "--check"]) == 0
    out = capsys.readouterr().out
    assert "20 images of 4 classes" in out
    assert "ranks: 2, updates: 10" in out
    assert "memory of a rank" in out
    assert "free" in out
    assert not (configured.parent / "run").exists()


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("data.path=nowhere", "no such data set folder"),
        ("backbone.name=resnet50", "known"),
        ("backbone.weights=nowhere.pt", "nowhere.pt"),
        ("data.labels=nowhere.npy", "nowhere.npy"),
        ("compat.method=lce compat.bank=nowhere", "nowhere"),
        ("evaluate.every_steps=1 evaluate.sets.unseen=nowhere", "nowhere"),
        ("run.dir=/proc/x", "run.dir"),
    ],
)
def test_what_training_would_refuse_is_refused(
    configured: Path, word: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", str(configured), "--check", *word.split()]) == 2
    err = capsys.readouterr().err
    assert reason in err
    assert len(err.splitlines()) == 1
    assert not (configured.parent / "run").exists()


def test_a_bank_is_named(configured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    np.save(configured.parent / "old.npy", np.eye(4, dtype=np.float32)[np.arange(20) % 4])
    words = ["centers", "from-embeddings", str(configured.parent / "old.npy"), str(configured.parent / "bank")]
    data = yaml.safe_load(configured.read_text())["data"]["path"]
    assert main([*words, "--dataset", data, "--allow-collapsed"]) == 0
    bank = f"compat.bank={configured.parent / 'bank'}"
    assert main(["launch", str(configured), "--check", "compat.method=lce", bank]) == 0
    assert "centre bank: of the model" in capsys.readouterr().out
