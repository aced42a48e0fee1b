"""Writers of other packages, Weights & Biases: given the figures, refused before training, dropped when failing."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ranks import run_ranks
from tests.runs import config, log_of, train_rank
from trainer.distributed import Ranks
from trainer.errors import ConfigError
from trainer.run.engine import train
from trainer.run.writers import MlflowWriter, WandbWriter

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
class Value:
    def __init__(self, *args, **named): self.made = [type(self).__name__, *map(len, (*args, *named.values()))]
class Histogram(Value): pass
class Image(Value): pass
class Table(Value): pass
class Run:
    def log(self, values, step):
        plain = {k: [i.made for i in v] if isinstance(v, list) else getattr(v, "made", v) for k, v in values.items()}
        OUT.write(json.dumps({"step": step, "loss": values.get("train/loss"), "values": plain}) + "\\n")
    def finish(self): OUT.close()
def init(**settings):
    global OUT
    OUT = (pathlib.Path(settings["dir"]) / "wandb.txt").open("a")
    OUT.write(json.dumps({k: v for k, v in settings.items() if k != "config"}) + "\\n")
    return Run()
"""

MLFLOW = """
import json, pathlib, types
class MlflowClient:
    def __init__(self, tracking_uri=None): self.file = pathlib.Path(tracking_uri)
    def _note(self, *what):
        with self.file.open("a") as out: out.write(json.dumps(what, default=len) + "\\n")
    def _known(self, kind):
        lines = map(json.loads, self.file.read_text().splitlines()) if self.file.exists() else ()
        return [line for line in lines if line[0] == kind]
    def get_experiment_by_name(self, name):
        return types.SimpleNamespace(experiment_id="7") if self._known("experiment") else None
    def create_experiment(self, name): self._note("experiment", name); return "7"
    def search_runs(self, experiment_ids, filter_string):
        run = types.SimpleNamespace(info=types.SimpleNamespace(run_id="r"))
        return [run for line in self._known("run") if f"'{line[2]['lce_run_folder']}'" in filter_string]
    def create_run(self, experiment_id, tags, run_name):
        self._note("run", run_name, tags); return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r"))
    def update_run(self, run_id, status): self._note("again", status)
    def log_param(self, run_id, key, value): self._note("param", key, value)
    def log_batch(self, run_id, metrics): self._note("metrics", {m.key: m.value for m in metrics}, metrics[0].step)
    def log_image(self, run_id, image, artifact_file): self._note("image", artifact_file, image)
    def log_text(self, run_id, text, artifact_file): self._note("text", artifact_file, text)
    def log_artifact(self, run_id, local_path): self._note("file", pathlib.Path(local_path).name)
    def set_terminated(self, run_id): self._note("end")
"""
MLFLOW_ENTITIES = """
class Metric:
    def __init__(self, key, value, timestamp, step): self.key, self.value, self.step = key, value, step
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path with an installed package that registers the writer ``notes``, and a stand-in for wandb."""
    site = tmp_path / "site"
    (site / "notes-1.0.dist-info").mkdir(parents=True)
    (site / "notes-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: notes\nVersion: 1.0\n")
    entry = "[lce_trainer.monitors]\nnotes = lce_test_notes:Notes\nbroken = lce_test_notes:Missing\n"
    (site / "notes-1.0.dist-info/entry_points.txt").write_text(entry)
    (site / "lce_test_notes.py").write_text(PLUGIN)
    (site / "wandb.py").write_text(WANDB)
    (site / "mlflow").mkdir()
    (site / "mlflow/__init__.py").write_text(MLFLOW)
    (site / "mlflow/entities.py").write_text(MLFLOW_ENTITIES)
    monkeypatch.syspath_prepend(str(site))
    stands_in = ("wandb", "lce_test_notes", "mlflow", "mlflow.entities")
    for name in stands_in:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield site
    for name in stands_in:
        sys.modules.pop(name, None)


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
    figures = [line for line in rest if line["loss"] is not None]
    assert [line["step"] for line in figures] == list(range(1, 9))
    assert "Histogram" in {kind for line in rest for kind in line["values"].get("train/target_cosines", [])}


def fill(writer: Any) -> None:
    """What a training gives a writer, once each."""
    writer.write(4, {"train/loss": 2.5, "evaluate/unseen.rank1": 0.5})
    writer.histogram("compat/boundary_slack", 4, np.linspace(-1, 1, 101, dtype=np.float32))
    writer.images("data/first_batch", 4, np.stack([np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 9, np.uint8)]))
    writer.embeddings(4, np.eye(3, dtype=np.float32), ["Ann", "Bo", "Cy"])
    writer.close()


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("optimizer: {lr: 0.1}\n")
    return tmp_path / "run"


def test_weights_and_biases_gets_pictures_and_embeddings(installed: Path, run_folder: Path) -> None:
    fill(WandbWriter(run_folder, 0, "faces"))
    _, _, histogram, images, table = map(json.loads, (run_folder / "wandb.txt").read_text().splitlines())
    assert histogram["values"] == {"compat/boundary_slack": ["Histogram", 101]}
    assert images["values"] == {"data/first_batch": [["Image", 8], ["Image", 8]]}
    assert table["values"] == {"embeddings": ["Table", 4, 3]}


def test_mlflow(installed: Path, run_folder: Path, tmp_path: Path) -> None:
    for _ in range(2):
        fill(MlflowWriter(run_folder, 0, "faces", str(tmp_path / "notes")))
    notes = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    kinds = [kind for kind, *_ in notes]
    assert kinds.count("experiment") == kinds.count("run") == kinds.count("again") == 1
    assert ["param", "optimizer.lr", 0.1] in notes
    quantiles = next(note for note in notes if note[0] == "metrics" and "compat/boundary_slack.q05" in note[1])
    assert quantiles[1]["compat/boundary_slack.q95"] == pytest.approx(0.9)
    assert ["text", "embeddings/step-00000004/names.tsv", "Ann\nBo\nCy\n"] in notes
    assert [note[1] for note in notes if note[0] == "image"][:1] == ["data/first_batch/step-00000004-00.png"]
    assert kinds[-1] == "end"


def test_a_real_wandb_offline(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed here")
    monkeypatch.setenv("WANDB_MODE", "offline")
    fill(WandbWriter(run_folder, 0, "faces"))
    (stored,) = (run_folder / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"boundary_slack" in stored.read_bytes()
    assert len(list((run_folder / "wandb").glob("offline-run-*/files/media/images/data/*.png"))) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"log__monitors": {"nots": {}}}, "known: broken, mlflow, notes"),
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
