"""Writers of other packages, Weights & Biases: given the figures, refused before training, dropped when failing."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.runs import config, log_of, train_rank
from trainer.distributed import Ranks
from trainer.errors import ConfigError
from trainer.run.engine import train

PLUGIN = """
import json
class Notes:
    def __init__(self, folder, start, name, fail=0):
        self.file, self.fail = (folder / name).open("a"), fail
        seeds = (folder / "config.yaml").read_text().count("seed: 3")
        self.file.write(json.dumps({"start": start, "seed": seeds}) + "\\n")
    def write(self, step, values):
        if step == self.fail:
            raise OSError("connection lost")
        self.file.write(json.dumps({"step": step, "loss": values["train/loss"]}) + "\\n")
    def close(self):
        self.file.write("closed\\n")
        self.file.close()
"""

WANDB = """
import json, pathlib
class Run:
    def log(self, values, step): OUT.write(json.dumps({"step": step, "loss": values["train/loss"]}) + "\\n")
    def finish(self): OUT.close()
def init(**settings):
    global OUT
    OUT = (pathlib.Path(settings["dir"]) / "wandb.txt").open("a")
    OUT.write(json.dumps({k: v for k, v in settings.items() if k != "config"}) + "\\n")
    return Run()
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path with an installed package that registers the writer ``notes``, and a stand-in for wandb."""
    site = tmp_path / "site"
    (site / "notes-1.0.dist-info").mkdir(parents=True)
    (site / "notes-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: notes\nVersion: 1.0\n")
    entry = "[lce_trainer.monitors]\nnotes = lce_test_notes:Notes\nbroken = lce_test_notes:Missing\n"
    (site / "notes-1.0.dist-info/entry_points.txt").write_text(entry)
    (site / "lce_test_notes.py").write_text(PLUGIN)
    (site / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(str(site))
    for name in ("wandb", "lce_test_notes"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return site


def test_a_writer_of_another_package(installed: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"log__monitors": {"notes": {"name": "notes.txt"}}, "log__tensorboard": True}
    train(config(tmp_path / "run", **changes), Ranks())
    train(config(tmp_path / "run", **changes, train__steps=9), Ranks())
    lines = (tmp_path / "run/notes.txt").read_text().splitlines()
    assert [json.loads(lines[0]), json.loads(lines[10])] == [{"start": 0, "seed": 1}, {"start": 8, "seed": 1}]
    assert lines[9] == lines[12] == "closed"
    logged = {line["step"]: line["loss"] for line in log_of(tmp_path / "run")}
    assert {r["step"]: r["loss"] for r in map(json.loads, [*lines[1:9], lines[11]])} == logged
    assert list((tmp_path / "run/tensorboard").iterdir())


def test_a_writer_that_fails_does_not_end_the_run(
    installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes: dict[str, Any] = {"log__monitors": {"notes": {"name": "notes.txt", "fail": 4}}}
    assert train(config(tmp_path / "run", **changes), Ranks()).step == 8
    assert "notes failed and gets no further figures: connection lost" in capsys.readouterr().err
    assert len((tmp_path / "run/notes.txt").read_text().splitlines()) <= 4


def test_weights_and_biases(installed: Path, tmp_path: Path) -> None:
    train(config(tmp_path / "run", log__wandb="faces"), Ranks())
    first, *rest = map(json.loads, (tmp_path / "run/wandb.txt").read_text().splitlines())
    assert (first["project"], first["name"], first["resume"]) == ("faces", "run", "allow")
    assert [line["step"] for line in rest] == list(range(1, 9))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"log__monitors": {"nots": {}}}, "installed: broken, notes"),
        ({"log__monitors": {"broken": {}}}, "cannot be imported"),
        ({"train__sync_batchnorm": True}, "every rank must have two samples in every batch"),
    ],
)
def test_refused_before_training(installed: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        train(config(tmp_path / "run", **changes), Ranks())
    assert not (tmp_path / "run").exists()


def test_without_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.run.writers.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="wandb is not installed"):
        train(config(tmp_path / "run", log__wandb="faces"), Ranks())
    assert not (tmp_path / "run").exists()


def test_share_of_communication(tmp_path: Path) -> None:
    """None on one rank; on two, some and not all of the time."""
    train(config(tmp_path / "one"), Ranks())
    assert all(line["communication_share"] == 0 for line in log_of(tmp_path / "one"))
    run_ranks(train_rank, 2, tmp_path / "two", {})
    assert all(0 < line["communication_share"] < 1 for line in log_of(tmp_path / "two"))
