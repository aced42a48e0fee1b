"""The search for weights: what is tried, who is kept, what is chosen and written, and that nothing is trained twice."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.tools.test_bench_compat import patterns
from tools import cli, tune
from tools.steps import StepFailed
from tools.tuning import RANGES, Range, best_first, points, rung_sizes, survivors
from trainer.compat.bank.from_model import bank_from_model
from trainer.compat.methods.registry import METHODS
from trainer.data import open_dataset
from trainer.data.listing import list_source
from trainer.data.packing import PackOptions, pack
from trainer.distributed import Ranks
from trainer.errors import DIVERGED, ConfigError, ModelError
from trainer.models.model import EmbeddingModel
from trainer.models.open import load_model
from trainer.owner import owned
from trainer.run.config import load_config, parse_config
from trainer.run.engine import train

Made = tuple[Path, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets, an old model, its bank and embeddings, and configurations of new models."""
    root = tmp_path_factory.mktemp("tune")
    patterns(root / "pictures", 0, 12, 12)
    for name in ("train", "validation"):
        pack(list_source(root / "pictures" / name), root / name, PackOptions())
    base: dict[str, Any] = {
        "run": {"dir": str(root / "old"), "device": "cpu", "threads": 1},
        "data": {"path": str(root / "train"), "loader": "torch", "workers": 0, "batch_size": 16},
        "backbone": {"name": "small", "width": 4, "dim": 8},
        "checkpoint": {"every_steps": 0},
        "train": {"steps": 4},
        "log": {"tensorboard": False, "progress": False},
    }
    train(parse_config(base, "old"), Ranks())
    train(parse_config(base, "other", [f"run.dir={root / 'other'}", "run.seed=5"]), Ranks())
    bank_from_model(
        load_model(root / "old"), open_dataset(root / "train"), root / "bank", keep_embeddings=root / "o.npy"
    )
    lce = {"method": "lce", "bank": str(root / "bank")}
    l2 = {"method": "l2", "old_embeddings": str(root / "o.npy")}
    along = {"method": "l2", "old_model": str(root / "other")}
    mix = {"method": "mixbct", "bank": str(root / "bank"), "old_embeddings": str(root / "o.npy")}
    (root / "rows.npy").write_bytes((root / "o.npy").read_bytes())
    unnamed = {"method": "l2", "old_embeddings": str(root / "rows.npy")}
    configs = {"one": lce, "two": [lce, l2], "none": {"method": "none"}, "l2": l2, "along": along, "mix": mix}
    for name, compat in (configs | {"unnamed": unnamed}).items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump(base | {"compat": compat, "run": {"dir": str(root / name)}}))
    return root


class Trainer:
    """Trains in this process, which is quick, and remembers what.

    Args:
        diverges: begins of the names of runs that do. ends: others → their exit status.
        line: the last one that these print.
    """

    def __init__(self, diverges: Sequence[str] = (), ends: Mapping[str, int] | None = None, line: str = "no") -> None:
        self.diverges, self.ends, self.line, self.trained = diverges, ends or {}, line, list[str]()

    def __call__(self, words: Sequence[str], log: Path) -> None:
        config = load_config(Path(words[0]), words[1 : words.index("--nproc")])
        name = config.run.dir.name
        if any(name.startswith(one) for one in self.diverges):
            log.write_text(f"trainer: {DIVERGED}4 updates in a row\nlce launch: more\n")
            raise StepFailed("lce launch", 2)
        for one, status in self.ends.items():
            if name.startswith(one):
                log.write_text(f"first\n{self.line}\n")
                raise StepFailed("lce launch", status)
        self.trained.append(name)
        train(config, Ranks())


def search(made: Path, out: Path, config: str = "one", *more: str) -> tuple[int, dict[str, Any]]:
    words = ["tune", str(made / f"{config}.yaml"), "run.device=cpu", "run.threads=1", "--old", str(made / "old")]
    words += ["--validation", str(made / "validation"), "--out", str(out), "--far", "0.1"]
    status = cli.main([*words, "--candidates", "3", "--updates", "3", *more])
    file = out / "tune.json"
    return status, json.loads(file.read_text()) if file.exists() else {}


def test_half_is_kept_chosen_written_and_nothing_trained_twice(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Trainer(ends={"lce11-": 130})
    monkeypatch.setattr(tune, "train", first)
    assert search(made, tmp_path / "out")[0] == 130
    assert first.trained == ["lce2-3"]
    assert not (tmp_path / "out" / "chosen.yaml").exists()
    then = Trainer()
    monkeypatch.setattr(tune, "train", then)
    status, figures = search(made, tmp_path / "out")
    assert status == 0
    assert then.trained[:2] == ["lce11-3", "lce60-3"]  # what was finished is not trained again
    assert len(then.trained) == 4
    short, long = ([(one["weights"]["lce"], tune.score(one)) for one in r["runs"]] for r in figures["rungs"])
    assert [rung["updates"] for rung in figures["rungs"]] == [3, 6]
    assert figures["budget_updates"] == 3 * 3 + 2 * 6
    assert [weight for weight, _ in long] == survivors(dict(short))
    assert figures["chosen"] == {"lce": best_first(dict(long))[0]}
    printed = capsys.readouterr().out
    assert f"chosen: lce {figures['chosen']['lce']:g}, after 21 updates in all" in printed
    assert (tmp_path / "out" / "tune.png").stat().st_size > 10_000

    again = Trainer()
    monkeypatch.setattr(tune, "train", again)
    assert search(made, tmp_path / "out")[1] == figures
    assert again.trained == []
    chosen = load_config(made / "one.yaml", [str(tmp_path / "out" / "chosen.yaml")])
    assert chosen.methods[0].model_dump()["alignment_weight"] == figures["chosen"]["lce"]
    assert chosen.methods[0].bank == made / "bank"


def test_a_list_is_tuned_together_and_failures_are_left_out(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = points([RANGES["lce"], Range(("weight",), 1.0, 4.0)], 3)
    broken = f"lce{tried[0][0]:g}-l2{tried[0][1]:g}"
    monkeypatch.setattr(tune, "train", Trainer(diverges=[broken]))
    status, figures = search(made, tmp_path / "out", "two", "--range", "l2=1:4", "--rungs", "2")
    assert status == 0
    assert figures["rungs"][0]["runs"][0]["problem"] == "4 updates in a row"
    assert len(figures["rungs"][1]["runs"]) == 2
    chosen = load_config(made / "two.yaml", [str(tmp_path / "out" / "chosen.yaml")]).methods
    assert [one.method for one in chosen] == ["lce", "l2"]
    assert chosen[1].model_dump()["weight"] == figures["chosen"]["l2"]


def test_no_candidate_that_trains_is_a_no(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    for name in ("chosen.yaml", "tune.png"):
        (tmp_path / "out" / name).write_text("of a search before")
    monkeypatch.setattr(tune, "train", Trainer(diverges=["lce"]))
    assert search(made, tmp_path / "out")[0] == 1
    assert "lce tune: lce2-3: 4 updates in a row" in capsys.readouterr().err
    assert not (tmp_path / "out" / "chosen.yaml").exists()
    assert not (tmp_path / "out" / "tune.png").exists()


def test_a_second_rung_that_diverges_is_a_no(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "train", Trainer(diverges=["lce2-6", "lce11-6", "lce60-6"]))
    status, figures = search(made, tmp_path / "out")
    assert status == 1
    assert figures["chosen"] is None
    printed = capsys.readouterr().err
    assert [f"lce tune: {one['name']}: 4 updates" in printed for one in figures["rungs"][1]["runs"]] == [True, True]
    assert not (tmp_path / "out" / "chosen.yaml").exists()


@pytest.mark.parametrize("status", [2, 70, -9])
def test_a_run_that_ends_otherwise_ends_the_search(
    status: int, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Trainer(ends={"lce11-": status}, line="trainer: run: in use by another")
    monkeypatch.setattr(tune, "train", first)
    assert search(made, tmp_path / "out")[0] == (2 if status == 2 else 70)
    assert first.trained == ["lce2-3"]
    printed = capsys.readouterr().err
    assert f"exit status {status}; the same command continues from here" in printed
    assert "lce tune: lce11-3: trainer: run: in use by another (all of it: " in printed
    assert not (tmp_path / "out" / "tune.json").exists()


def test_a_model_without_embeddings_is_left_out(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embed = tune.Search.embed

    def overflowing(self: tune.Search, role: str, model: EmbeddingModel) -> None:
        embed(self, role, model)
        if "lce11-3" in str(model.path):
            raise ModelError("not finite")

    monkeypatch.setattr(tune, "train", Trainer())
    monkeypatch.setattr(tune.Search, "embed", overflowing)
    status, figures = search(made, tmp_path / "out")
    assert status == 0
    assert [one.get("problem") for one in figures["rungs"][0]["runs"]] == [None, "not finite", None]


def test_a_model_that_cannot_be_opened_ends_the_search(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer()

    def damaging(words: Sequence[str], log: Path) -> None:
        trainer(words, log)
        (tmp_path / "out" / "runs" / trainer.trained[-1] / "model" / "model.json").write_text("{")

    monkeypatch.setattr(tune, "train", damaging)
    assert search(made, tmp_path / "out")[0] == 2
    assert trainer.trained == ["lce2-3"]
    assert "model.json" in capsys.readouterr().err


def test_one_search_owns_its_folder(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    second = Trainer()
    monkeypatch.setattr(tune, "train", second)
    out = tmp_path / "out"
    with ThreadPoolExecutor(1) as elsewhere, ExitStack() as stack:
        first = owned(out, ConfigError, lock=out / ".owner")
        elsewhere.submit(stack.enter_context, first).result(30)
        assert search(made, out)[0] == 2
    assert re.search(r"lce tune: .*out: in use by .* \(process \d+ of ", capsys.readouterr().err)
    assert second.trained == []


def test_figures_are_made_anew_when_what_they_are_from_was_replaced(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--candidates", "1", "--rungs", "1", f"backbone.weights={tmp_path / 'start'}")
    start, trainer = tmp_path / "start", Trainer()
    monkeypatch.setattr(tune, "train", trainer)
    for model, runs in (("old", 1), ("old", 1), ("other", 2)):
        start.mkdir(exist_ok=True)
        for file in (made / model / "model").iterdir():
            (start / file.name).write_bytes(file.read_bytes())
        assert search(made, tmp_path / "out", "l2", *words)[0] == 0
        assert len(trainer.trained) == runs
    rows = np.load(made / "o.npy")
    for factor, runs in ((1, 3), (2, 4)):
        np.save(tmp_path / "rows.npy", rows * np.float32(factor))
        more = (*words, f"compat.old_embeddings={tmp_path / 'rows.npy'}")
        assert search(made, tmp_path / "out", "l2", *more)[0] == 0
        assert len(trainer.trained) == runs


def test_embeddings_that_do_not_say_whose_they_are_get_a_warning(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "train", Trainer())
    for config, warned in (("unnamed", True), ("l2", False)):
        assert search(made, tmp_path / config, config, "--candidates", "1", "--rungs", "1")[0] == 0
        assert ("rows.npy holds embeddings of the model --old" in capsys.readouterr().err) == warned


def test_a_missing_package_is_named_before_any_run(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert search(made, tmp_path / "out")[0] == 2
    assert "needs matplotlib, which is not installed: pip install 'lce-trainer[evaluate]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_real_run_that_diverges_is_left_out(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["optimizer.lr=1e30", "optimizer.weight_decay=0", "head.optimizer.weight_decay=0"]
    words += ["train.max_nonfinite_steps=0", "log.every_steps=1"]
    words += ["--candidates", "1", "--rungs", "1"]
    status, figures = search(made, tmp_path / "out", "one", *words)
    assert status == 1, capsys.readouterr().err
    assert "not finite" in figures["rungs"][0]["runs"][0]["problem"]


def test_runs_are_those_of_lce_launch(made: Path, tmp_path: Path) -> None:
    status, figures = search(made, tmp_path / "out", "one", "--candidates", "1", "--rungs", "1")
    assert status == 0, figures
    assert (tmp_path / "out" / "runs" / "lce11-3" / "model").is_dir()


@pytest.mark.parametrize(
    ("config", "words", "reason"),
    [
        ("none", (), "there are no weights to choose"),
        ("one", ("--range", "bct=1:2"), "the configuration's methods are lce"),
        ("one", ("--range", "lce=2"), "expected METHOD=LOW:HIGH"),
        ("one", ("--range", "lce=3:2"), "expected 0 < LOW"),
        ("one", ("--far", "1e-6"), "cannot resolve it"),
        ("one", ("--validation", "nowhere"), "nowhere"),
        ("one", ("backbone.dim=9",), "dimension"),
        ("one", ("--json", "nowhere/x.json"), "nowhere does not exist"),
        ("mix", ("--range", "mixbct=0.2:2"), "candidate mixbct2, 3 updates"),
        ("along", (), "other is another model"),
        ("l2", ("--old", "OTHER"), "o.npy holds embeddings of another model"),
        ("one", ("--old", "OTHER"), "the centre bank is of another model"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_made(
    config: str, words: Sequence[str], reason: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(made / "other") if word == "OTHER" else word for word in words]
    assert search(made, tmp_path / "out", config, *words)[0] == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_points_fill_the_ranges_evenly() -> None:
    assert points([Range(("w",), 1.0, 1000.0)], 4) == [(1.0,), (10.0,), (100.0,), (1000.0,)]
    assert points([Range(("w",), 1.0, 1000.0)], 1) == [(32.0,)]
    both = points([Range(("w",), 1.0, 100.0), Range(("w",), 1.0, 100.0)], 16)
    assert len(both) == 16
    for side in (0, 1):
        quarters = [sum(low <= one[side] < 10 * low for one in both) for low in (1, 10)]
        assert max(quarters) - min(quarters) <= 2
    cells = {(one[0] >= 10, one[1] >= 10) for one in both}
    assert len(cells) == 4


def test_a_weight_at_the_end_of_what_was_tried_is_named() -> None:
    """The points of several methods do not touch the ends of their ranges; those of one are rounded."""
    both = [RANGES["lce"], Range(("weight",), 1.0, 4.0)]
    for names, ranges, count in ((["lce", "l2"], both, 8), (["lce"], [Range(("w",), 2.04, 61.7)], 3)):
        tried = [dict(zip(names, weights, strict=True)) for weights in points(ranges, count)]
        cells = {cell: {"TAR": 0.5, "rank-1": 0.6} for cell in ("new->old", "old->old")}
        runs = [{"name": "one", "weights": weights, "cells": cells} for weights in tried]
        figures = {"rungs": [{"runs": runs}, {"runs": runs[:2]}], "cells": cells, "budget_updates": 9}
        areas = {name: {"low": area.low, "high": area.high} for name, area in zip(names, ranges, strict=True)}
        figures |= {"validation": {"shared_identities": None}, "ranges": areas}
        for weights in tried:
            printed = "\n".join(tune.summary(figures | {"chosen": weights}, Path("out")))
            for name in names:
                ends = [pick(one[name] for one in tried) for pick in (min, max)]
                line = f"{name} {weights[name]:g} is at the end of what was tried: widen it by --range {name}=LOW:HIGH"
                assert (line in printed) == (weights[name] in ends)
        alone = figures | {"rungs": [{"runs": runs[:1]}], "chosen": tried[0]}
        assert "is at the end" not in "\n".join(tune.summary(alone, Path("out")))


def test_the_better_half_survives() -> None:
    scores = {"a": (0.1, 0.9), "b": (0.3, 0.1), "c": None, "d": (0.3, 0.2), "e": (0.2, 0.0)}
    assert survivors(scores) == ["d", "b", "e"]
    assert survivors({"a": None, "b": None}) == []
    assert survivors({"a": (0.0,)}) == ["a"]
    assert rung_sizes(8, 4) == [8, 4, 2, 1]


def test_every_method_has_a_range() -> None:
    names = {kind.model_fields["method"].default for kind in METHODS}
    assert names - {"frozen"} == set(RANGES)  # which has no weight
    for kind in METHODS:
        if kind.model_fields["method"].default == "frozen":
            continue
        area = RANGES[kind.model_fields["method"].default]
        assert set(area.keys) <= set(kind.model_fields)
