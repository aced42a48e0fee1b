"""The comparison of methods on a handful of synthetic identities: chosen, measured, continued, failures named."""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tools import cli
from tools.results import comparison, compat
from tools.results.paired import REPLICATES
from tools.steps import CONFIGS
from trainer.compat.methods.config import BctConfig, LceDirectConfig
from trainer.data import open_dataset
from trainer.data.listing import list_source
from trainer.data.packing import PackOptions, pack
from trainer.data.splitting import SplitOptions, save_tables, split
from trainer.errors import ConfigError
from trainer.run.config import load_config

SMALL = [
    "backbone.width=4",
    "backbone.dim=16",
    "data.batch_size=16",
    "data.loader=torch",
    "data.workers=0",
    "head.sample_rate=1.0",
]


def patterns(folder: Path, seed: int, classes: int, old_classes: int) -> None:
    """Identities as coarse random patterns, four noisy pictures each; the old model's are the first of the others'."""
    sets = {"train": range(classes), "old": range(old_classes), "validation": range(50, 56), "unseen": range(60, 68)}
    for name, members in sets.items():
        for identity in members:
            coarse = Image.fromarray(np.random.default_rng(identity).integers(0, 255, (4, 4), dtype=np.uint8))
            place = folder / name / str(identity)
            place.mkdir(parents=True)
            for number in range(4):
                noise = np.random.default_rng([seed, identity, number]).normal(0, 20, (32, 32))
                noisy = (np.asarray(coarse.resize((32, 32)), float) + noise).clip(0, 255).astype(np.uint8)
                Image.fromarray(noisy).save(place / f"{number}.png")


SIZES = ("--classes", "12", "--old-classes", "6", "--steps", "6", "--old-steps", "6", "--trials", "2")


def bench(folder: Path, *words: str, sizes: Sequence[str] = SIZES) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON of a small `lce bench compat`."""
    out = folder / "figures.json"
    command = ["bench", "compat", "--data", "patterns", "--out", str(folder / "work"), "--json", str(out), *sizes]
    status = cli.main([*command, *words, *SMALL])
    return status, json.loads(out.read_text()) if out.exists() else {}


@pytest.fixture(autouse=True)
def _sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(comparison.SOURCES, "patterns", comparison.Source(patterns, "demo-characters"))
    broken = compat.Method("broken", ("compat.method=lce", "compat.bank=nowhere", "compat.alignment_weight={weight}"))
    monkeypatch.setitem(compat.METHODS, "broken", broken)


@pytest.mark.usefixtures("quick_starts")
def test_methods_are_chosen_measured_and_not_trained_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--methods", "independent,lce,broken", "--seeds", "1", "--markdown", str(tmp_path / "table.md")]
    status, figures = bench(tmp_path, *words)
    assert status == 1  # one method could not be trained
    methods = figures["methods"]
    assert methods["broken"]["spread"] == {}
    assert "nowhere" in methods["broken"]["problems"][0]
    trials = {one["weight"]: one["validation"]["new->old"]["TAR@FAR=1e-4"] for one in methods["lce"]["trials"]}
    assert list(trials) == [2.0, 60.0]
    assert trials[methods["lce"]["weight"]] == max(trials.values())
    cells = {cell: figures["base"][cell]["rank-1"]["mean"] for cell in ("old->old", "paragon->paragon")}
    for name in ("independent", "lce"):
        found = methods[name]["seeds"][0]
        assert found["cells"]["old->old"]["rank-1"] == cells["old->old"]
        expected = cells["paragon->paragon"] - found["cells"]["new->new"]["rank-1"]
        assert found["cost"]["rank-1"] == pytest.approx(expected)
    replicates = methods["lce"]["seeds"][0]["replicates"]["new->old"]
    assert {len(replicates[metric]) for metric in compat.METRICS} == {REPLICATES}
    assert set(figures["alone"][0]["replicates"]) == {"old->old", "paragon->paragon"}
    assert methods["independent"]["seeds"][0]["cost"] == {"TAR@FAR=1e-4": 0.0, "rank-1": 0.0}
    assert figures["base"]["centre->old"]["rank-1"]["mean"] >= cells["old->old"]
    assert "| old centre → old |" in (tmp_path / "table.md").read_text()
    assert "| LCE, direct |" in (tmp_path / "table.md").read_text()
    assert "| failed |" in (tmp_path / "table.md").read_text()
    assert "broken: broken-1, seed 0: " in (tmp_path / "table.md").read_text()

    run = comparison.Children.run

    def refuse(*_: object) -> int:
        raise AssertionError("trained again")

    kept = next((tmp_path / "work" / "seed-0" / "figures" / "unseen").glob("lce-*.json"))
    older = json.loads(kept.read_text())
    del older["figures"]["replicates"]  # as earlier versions wrote it
    kept.write_text(json.dumps(older))
    monkeypatch.setattr(comparison.Children, "run", refuse)
    status, again = bench(tmp_path, "--methods", "independent,lce", "--seeds", "1")
    assert status == 0
    assert again["methods"]["lce"] == methods["lce"]

    trained: list[str] = []

    def note(self: comparison.Children, command: Sequence[str], log: Path) -> int:
        trained.append(log.stem.split("-")[0])
        return run(self, command, log)

    monkeypatch.setattr(comparison.Children, "run", note)  # another old model: the paragon knows nothing of it
    weights = tmp_path / "weights.json"
    weights.write_text(json.dumps({"methods": {"lce": {"weight": 60.0}}}))
    words = ["--methods", "independent,lce", "--seeds", "1", "--weights", str(weights), "--time"]
    monkeypatch.setattr(comparison, "TIMED_ROUNDS", 1)
    monkeypatch.setattr(comparison, "TIMED_STEPS", 40)
    status, timed = bench(tmp_path, *words, sizes=(*SIZES, "--old-steps", "7"))
    assert status == 0
    assert trained == ["old", "lce", "timed", "timed", "timed"]
    assert timed["methods"]["lce"]["update_time"] > 0
    assert "update_time" not in methods["lce"]


@pytest.mark.usefixtures("quick_starts")
def test_a_folder_of_data_sets_with_weights_chosen_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patterns(tmp_path / "pictures", 0, 12, 6)
    for part in ("train", "validation", "unseen"):
        pack(list_source(tmp_path / "pictures" / part), tmp_path / "data" / part, PackOptions())
    words = ["--methods", "independent,lce", "--seeds", "1", "--data", str(tmp_path / "data")]
    earlier = tmp_path / "earlier.json"
    assert bench(tmp_path, *words, sizes=())[0] == 2
    assert "splits/extended-class/old.npy is missing" in capsys.readouterr().err
    train = open_dataset(tmp_path / "data" / "train")
    tables = split(train, SplitOptions("extended-class", 0.5))
    save_tables(tables, tmp_path / "data" / "splits" / "extended-class", train, "t")
    summary = tmp_path / "data" / "characters.json"
    summary.write_text("[]")
    assert bench(tmp_path, *words, sizes=())[0] == 2
    assert "characters.json: not what lce characters writes" in capsys.readouterr().err
    typefaces = [{"name": "seto", "held": False}, {"name": "uming", "held": True}, {"name": "droid", "held": False}]
    summary.write_text(json.dumps({"typefaces": typefaces}))
    assert bench(tmp_path, *words, "--old-classes", "6", sizes=())[0] == 2
    assert "says how many there are" in capsys.readouterr().err
    zero = '{"methods": {"lce": {"weight": 0}}}'
    for text, reason in (
        ("no", "not the JSON"),
        (zero, "without a weight"),
        ('{"methods": {}}', "nothing about lce"),
        (None, "cannot be read"),
    ):
        earlier.unlink(missing_ok=True) if text is None else earlier.write_text(text)
        assert bench(tmp_path, *words, "--weights", str(earlier), sizes=())[0] == 2
        assert reason in capsys.readouterr().err

    earlier.write_text(json.dumps({"methods": {"lce": {"weight": 7.5}}}))
    markdown = tmp_path / "table.md"
    status, figures = bench(
        tmp_path,
        *words,
        "--weights",
        str(earlier),
        "--markdown",
        str(markdown),
        sizes=("--steps", "6", "--old-steps", "6"),
    )
    assert status == 0
    assert figures["typefaces"] == ["seto", "droid"]
    assert "12 training identities in 2 typefaces, 6 of them the old model's" in markdown.read_text()
    assert (figures["classes"], figures["old_classes"]) == (12, 6)
    assert (figures["methods"]["lce"]["weight"], figures["methods"]["lce"]["trials"]) == (7.5, [])
    assert "as an earlier run chose them" in markdown.read_text()
    log = (tmp_path / "work" / "seed-0" / "lce-7.5" / "config.yaml").read_text()
    assert str(tmp_path / "data" / "train") in log


def test_wrong_use_is_refused_before_anything_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, reason in (
        (["--methods", "lce,magic"], "unknown magic"),
        (["--methods", "bct,lce+lce"], "--methods lce+lce: compat: method lce is given more than once"),
        (["--methods", "mixbct+l2"], "--methods mixbct+l2: compat: mixbct puts old embeddings in place of new ones"),
        (["--methods", "lce+fct"], "--methods lce+fct: compat: direct compares new with old embeddings as they are"),
        (["--methods", "independent+independent"], "independent is no method of training; give it by itself"),
        (["--seeds", "0"], "at least 1"),
        (["--old-classes", "13"], "more than the new model's 12"),
        (["--markdown", str(tmp_path / "no" / "table.md")], "does not exist"),
        (["backbone.widht=4"], "backbone.width"),
    ):
        assert bench(tmp_path, *words)[0] == 2
        assert reason in capsys.readouterr().err
    assert not list((tmp_path / "work").glob("*"))


def test_trials_span_the_weights_evenly() -> None:
    method = compat.Method("m", (), 1.0, 1000.0)
    assert method.weights(4) == [1.0, 10.0, 100.0, 1000.0]
    assert method.weights(1) == [32.0]


class Found:
    """A comparison whose training runs are names, and whose figures a table gives."""

    steps = 8
    out = Path("work")

    def __init__(self) -> None:
        self.trained: list[str] = []

    def folder(self, seed: int) -> Path:
        return self.out / f"seed-{seed}"

    def train(self, seed: int, name: str, recipe: str, overrides: Sequence[str], old: str) -> None:
        assert (seed, recipe, old) == (0, "paragon", "old")
        if name == "l2-17-2":
            raise comparison.TrainingFailed(f"{name} diverged")
        steps = [word for word in overrides if word.startswith("train.steps=")]
        assert steps == ([f"train.steps={name.split('-')[2]}"] if name.count("-") == 2 else [])
        self.trained.append(name)

    def measure(self, seed: int, part: str, old: str, new: str) -> dict[str, Any]:
        value = {"lce-2-2": 0.1, "lce-11-2": 0.4, "lce-60-2": 0.3, "lce-11-4": 0.5, "lce-60-4": 0.6}.get(new, 0.2)
        return {"cells": {"new->old": {compat.CRITERION: value, "rank-1": value}}}

    def each(self, action: Any, items: Sequence[Any]) -> dict[Any, Any]:
        problems: dict[Any, Any] = {}
        for item in items:
            try:
                problems[item] = action(item)
            except comparison.TrainingFailed as failed:
                problems[item] = failed
        return problems


def test_methods_together_have_weights_at_the_same_place_of_their_ranges() -> None:
    both = compat.METHODS["lce+bct"]
    assert (both.title, both.weights(4)) == ("LCE + BCT", compat.METHODS["lce"].weights(4))
    words = both.overrides(Path("of: all, banks"), Path("e.npy"), 20.0)
    made = load_config(CONFIGS / "demo-characters-paragon.yaml", words).methods
    assert isinstance(made[0], LceDirectConfig)
    assert isinstance(made[1], BctConfig)
    assert (made[0].alignment_weight, made[0].boundary_weight, made[1].weight) == (20.0, 20.0, 3.22)
    assert made[0].bank == made[1].bank == Path("of: all, banks")
    assert "lce+bct" not in compat.METHODS

    def weights(name: str) -> list[list[str]]:
        """What the trials of methods together give each one's own key."""
        trials = compat.METHODS[name].weights(4)
        settings = [compat.METHODS[name].overrides(Path("b"), Path("e"), weight)[0] for weight in trials]
        return [re.findall(r'(?:boundary_weight|mix_share|, weight): "(.*?)"', one) for one in settings]

    assert weights("lce+mixbct") == [["2.0", "0.2"], ["6.2", "0.33"], ["19.0", "0.541"], ["60.0", "0.9"]]
    assert weights("frozen+lce") == [["2.0"], ["6.2"], ["19.0"], ["60.0"]]
    assert weights("frozen+lce+bct") == [["2.0", "0.3"], ["6.2", "0.963"], ["19.0", "3.06"], ["60.0", "10"]]
    assert len(weights("frozen+frozen")) == 1
    with pytest.raises(ConfigError, match="unknown magic"):
        compat.names_of("lce+magic")


def test_short_trials_are_halved_until_one_is_left() -> None:
    rungs = compat.rungs_of(argparse.Namespace(trials=3, trial_steps=2, steps=8))
    assert [(rung.trials, rung.updates) for rung in rungs] == [(3, 2), (2, 4)]
    for first, lengths in ((1500, [1500, 3000]), (1400, [1400, 2800, 3000]), (3000, [3000])):
        capped = compat.rungs_of(argparse.Namespace(trials=8, trial_steps=first, steps=3000))
        assert [rung.updates for rung in capped] == lengths
        assert [rung.trials for rung in capped] == [8, 4, 2][: len(lengths)]
    whole = argparse.Namespace(trials=4, trial_steps=None, steps=8)
    assert [(rung.trials, rung.updates) for rung in compat.rungs_of(whole)] == [(4, 8)]
    found, done = Found(), list[int]()
    tried = {name: compat.METHODS[name].weights(3) for name in ("lce", "l2")}
    trials = compat._halve(found, tried, rungs, lambda: done.append(1))  # type: ignore[arg-type]
    assert [(one.weight, one.updates) for one in trials["lce"]] == [(2, 2), (11, 2), (60, 2), (11, 4), (60, 4)]
    assert [(one.weight, one.updates, one.problem) for one in trials["l2"]][1] == (17, 2, "l2-17-2 diverged")
    assert [(one.weight, one.updates) for one in trials["l2"][3:]] == [(3.1, 4), (97, 4)]
    assert len(done) == 9  # all but the one that failed
    chosen = compat._choose("lce", trials["lce"])
    assert (chosen["weight"], [one["updates"] for one in chosen["trials"]]) == (60, [2, 2, 2, 4, 4])
    assert compat._choose("l2", trials["l2"])["problems"] == ["l2-17-2 diverged"]
    assert compat._train(found, "lce", 0, 60.0) == "lce-60"  # type: ignore[arg-type]


def test_a_negative_gain_is_a_dash() -> None:
    figures = json.loads((Path(__file__).parents[2] / "benchmarks" / "compat.json").read_text())
    assert figures["methods"]["independent"]["spread"]["update_gain"][compat.CRITERION]["mean"] < 0
    line = next(line for line in compat.markdown(figures).splitlines() if line.startswith("| independent "))
    assert [cell.strip() for cell in line.split("|")][7] == "–"


def test_every_method_has_as_many_trials() -> None:
    assert {len(set(m.weights(4))) for name, m in compat.METHODS.items() if m.low < m.high and name != "broken"} == {4}
