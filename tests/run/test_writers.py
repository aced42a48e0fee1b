"""Writers of other packages, Weights & Biases: given the figures, refused before training, dropped when failing."""

import json
import shutil
import signal
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
    def ended(self, how):
        self.how = how
    def close(self):
        self.file.write(f"closed {self.how}\\n")
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
    def __init__(self, last): self.resumed, self.step = last is not None, 0 if last is None else last + 1
    def log(self, values, step):
        plain = {k: [i.made for i in v] if isinstance(v, list) else getattr(v, "made", v) for k, v in values.items()}
        OUT.write(json.dumps({"step": step, "loss": values.get("train/loss"), "values": plain}) + "\\n")
    def finish(self, exit_code):
        OUT.write(json.dumps({"exit": exit_code}) + "\\n")
        OUT.close()
def init(**settings):
    global OUT
    out = pathlib.Path(settings["dir"]) / "wandb.txt"
    lines, last = map(json.loads, out.read_text().splitlines()) if out.exists() else (), None
    for line in lines:
        if "id" in line: last = None if line["id"] != settings["id"] else last or -1
        elif "step" in line and last is not None: last = line["step"]
    OUT = out.open("a")
    OUT.write(json.dumps({k: v for k, v in settings.items() if k != "config"}) + "\\n")
    return Run(last)
"""

MLFLOW = """
import json, pathlib, re, types
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
        return [run for line in self._known("tag")[-1:] if filter_string == f"tags.{line[1]} = '{line[2]}'"]
    def create_run(self, experiment_id, run_name):
        self._note("run", run_name); return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r"))
    def set_tag(self, run_id, key, value): self._note("tag", key, value)
    def update_run(self, run_id, status): self._note("again", status)
    def get_metric_history(self, run_id, key):
        return [types.SimpleNamespace(step=line[2]) for line in self._known("metrics") if key in line[1]]
    def log_batch(self, run_id, metrics=(), params=()):
        assert len(params) <= 100 and all(len(one.value) <= 500 for one in params)
        assert all(re.fullmatch(r"[\\w\\-. /]+", one.key, re.ASCII) for one in (*metrics, *params))
        if params: self._note("params", {p.key: p.value for p in params})
        if metrics: self._note("metrics", {m.key: m.value for m in metrics}, metrics[0].step)
    def log_image(self, run_id, image, artifact_file): self._note("image", artifact_file, image)
    def log_text(self, run_id, text, artifact_file): self._note("text", artifact_file, text)
    def log_artifact(self, run_id, local_path): self._note("file", pathlib.Path(local_path).name)
    def set_terminated(self, run_id, status): self._note("end", status)
"""
MLFLOW_ENTITIES = """
class Metric:
    def __init__(self, key, value, timestamp, step): self.key, self.value, self.step = key, value, step
class Param:
    def __init__(self, key, value): self.key, self.value = key, value
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
    assert lines[9] == lines[12] == "closed finished"
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
    assert rest.pop() == {"exit": 0}
    figures = [line for line in rest if line["loss"] is not None]
    assert [line["step"] for line in figures] == list(range(1, 9))
    assert "Histogram" in {kind for line in rest for kind in line["values"].get("train/target_cosines", [])}


def fill(writer: Any) -> None:
    """What a training gives a writer, once each."""
    writer.write(4, {"train/loss": 2.5, "evaluate/unseen.rank1": 0.5})
    writer.histogram("compat/boundary_slack", 4, np.linspace(-1, 1, 101, dtype=np.float32))
    writer.images("data/first_batch", 4, np.stack([np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 9, np.uint8)]))
    writer.embeddings(4, np.eye(3, dtype=np.float32), ["Ann", "Bo", "Cy"])
    writer.ended("finished")
    writer.close()


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("optimizer: {lr: 0.1}\n")
    return tmp_path / "run"


def test_weights_and_biases_gets_pictures_and_embeddings(installed: Path, run_folder: Path) -> None:
    fill(WandbWriter(run_folder, 0, "faces"))
    _, _, histogram, images, table, _ = map(json.loads, (run_folder / "wandb.txt").read_text().splitlines())
    assert histogram["values"] == {"compat/boundary_slack": ["Histogram", 101]}
    assert images["values"] == {"data/first_batch": [["Image", 8], ["Image", 8]]}
    assert table["values"] == {"embeddings": ["Table", 4, 3]}


def test_mlflow(installed: Path, run_folder: Path, tmp_path: Path) -> None:
    for _ in range(2):
        fill(MlflowWriter(run_folder, 0, "faces", str(tmp_path / "notes")))
    notes = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    kinds = [kind for kind, *_ in notes]
    assert kinds.count("experiment") == kinds.count("run") == kinds.count("tag") == kinds.count("again") == 1
    assert ["params", {"optimizer.lr": "0.1"}] in notes
    assert kinds.count("metrics") == 2  # the second time they are there already
    quantiles = next(note for note in notes if note[0] == "metrics" and "compat/boundary_slack.q05" in note[1])
    assert quantiles[1]["compat/boundary_slack.q95"] == pytest.approx(0.9)
    assert ["text", "embeddings/step-00000004/names.tsv", "Ann\nBo\nCy\n"] in notes
    assert [note[1] for note in notes if note[0] == "image"][:1] == ["data/first_batch/step-00000004-00.png"]
    assert notes[-1] == ["end", "FINISHED"]


def test_mlflow_gets_what_it_can_take(installed: Path, run_folder: Path, tmp_path: Path) -> None:
    many = "".join(f"k{number}: {number}\n" for number in range(120))
    (run_folder / "config.yaml").write_text(f"{many}long: {'x' * 9000}\n'a@b': 1\n")
    writer = MlflowWriter(run_folder, 0, "faces", str(tmp_path / "notes"))
    writer.write(1, {"train/loss": 1.0, "evaluate/léa@1=2.rank1": 0.5})
    writer.close()
    notes = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    params = {key: value for kind, *rest in notes if kind == "params" for key, value in rest[0].items()}
    assert (len(params), params["a_b"], len(params["long"])) == (122, "1", 500)
    assert [kind for kind, *_ in notes if kind in ("params", "tag")] == ["params", "params", "tag"]
    assert ["metrics", {"train/loss": 1.0, "evaluate/l_a_1_2.rank1": 0.5}, 1] in notes
    assert notes[-1] == ["end", "FAILED"]


def followed(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """A run's settings with both trackers, which a test reads by :func:`notes_of`."""
    both = {"log__wandb": "faces", "log__monitors": {"mlflow": {"experiment": "faces", "uri": str(tmp_path / "notes")}}}
    return {"checkpoint__every_steps": 4, "checkpoint__keep": 5, **both, **changes}


def notes_of(tmp_path: Path) -> tuple[list[Any], list[Any]]:
    """What MLflow and wandb were given, in order: a run that is begun or gone on with, the steps of losses, the end."""
    mlflow: list[Any] = []
    for kind, *rest in map(json.loads, (tmp_path / "notes").read_text().splitlines()):
        if kind in ("run", "again"):
            mlflow.append(kind)
        elif kind == "end":
            mlflow += rest
        elif kind == "metrics" and "train/loss" in rest[0]:
            mlflow.append(rest[1])
    lines = list(map(json.loads, (tmp_path / "run/wandb.txt").read_text().splitlines()))
    wandb = [line.get("exit", line.get("step")) for line in lines if "exit" in line or line.get("loss") is not None]
    return mlflow, wandb


def test_a_continued_run_goes_on_in_the_same_one_and_a_new_one_does_not(
    installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps that were logged after the checkpoint are not logged twice."""
    train(config(tmp_path / "run", **followed(tmp_path)), Ranks())
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000008")
    (tmp_path / "run/summary.json").unlink()
    train(config(tmp_path / "run", **followed(tmp_path, train__steps=9)), Ranks())
    assert capsys.readouterr().err.count("has the steps 5 to 8 already; they are not logged again") == 2
    assert notes_of(tmp_path) == (
        ["run", *range(1, 9), "FINISHED", "again", 9, "FINISHED"],
        [*range(1, 9), 0, 9, 0],
    )
    shutil.rmtree(tmp_path / "run/checkpoints")
    (tmp_path / "run/summary.json").unlink()
    train(config(tmp_path / "run", **followed(tmp_path, optimizer__lr=0.05)), Ranks())
    mlflow, wandb = notes_of(tmp_path)
    assert (mlflow[-10:], wandb[-9:]) == (["run", *range(1, 9), "FINISHED"], [*range(1, 9), 0])


@pytest.mark.parametrize(
    ("error", "mlflow", "wandb"), [(KeyboardInterrupt, "KILLED", 75), (RuntimeError, "FAILED", 70)]
)
def test_a_run_that_ends_otherwise_is_not_finished(
    installed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    mlflow: str,
    wandb: int,
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("trainer.run.engine._finish", fail)
    with pytest.raises(error):
        train(config(tmp_path / "run", **followed(tmp_path)), Ranks())
    found, exits = notes_of(tmp_path)
    assert (found[-1], exits[-1]) == (mlflow, wandb)


def test_a_run_that_a_signal_stops_is_not_finished(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.run.engine.Vote.cast", lambda *_: [signal.SIGTERM, 0])
    assert train(config(tmp_path / "run", **followed(tmp_path)), Ranks()).status == "interrupted"
    found, exits = notes_of(tmp_path)
    assert (found[-1], exits[-1]) == ("KILLED", 75)


def test_an_identity_that_is_none_is_refused(installed: Path, run_folder: Path) -> None:
    (run_folder / "monitors.id").write_text("' or 1 = 1")
    with pytest.raises(ConfigError, match="is no number of a run"):
        WandbWriter(run_folder, 4, "faces")


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
