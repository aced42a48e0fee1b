"""The table of changes on a handful of synthetic identities: trained, measured, continued, and what its cells say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tools.test_bench_compat import SMALL, patterns
from tools import cli
from tools.results import changes, comparison
from tools.steps import CONFIGS
from trainer.run.config import load_config

OLD = changes.Model(data="typefaces", dim=16)
TINY = (
    changes.Change("data", "typefaces", "half → all typefaces", OLD, changes.Model(dim=16)),
    changes.Change("two", "all", "small → ViT of 24", OLD, changes.Model(network="vit_xs", margin="arcface", dim=24)),
)


def bench(folder: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON of a small `lce bench changes`."""
    out = folder / "figures.json"
    sizes = ["--classes", "12", "--steps", "6", "--old-steps", "6", "--out", str(folder / "work"), "--json", str(out)]
    status = cli.main(["bench", "changes", "--data", "patterns", *sizes, *words, *SMALL])
    return status, json.loads(out.read_text()) if out.exists() else {}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(comparison.SOURCES, "patterns", comparison.Source(patterns, "demo-characters"))


@pytest.mark.slow
@pytest.mark.usefixtures("quick_starts")
def test_each_change_is_trained_once_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "CHANGES", TINY)
    status, figures = bench(tmp_path, "--methods", "lce,bct")
    first, second = figures["lines"]
    assert (status == 0) == (first["cells"]["lce"]["met"] and second["cells"]["lce"]["met"]) == figures["fine"]
    assert figures["old_classes"] == 6
    assert [first["cells"][name]["method"] for name in ("lce", "bct")] == ["lce", "bct"]
    assert second["cells"]["lce"]["method"] == "lce-backward"
    assert second["cells"]["bct"] == {"met": False, "reason": "not possible"}
    one = first["cells"]["bct"]["seeds"][0]
    above = {metric: one["new->old"][metric] > one["old->old"][metric] for metric in changes.METRICS}
    assert first["cells"]["bct"]["by"] == above
    seed = tmp_path / "work" / "seed-0"
    typefaces, labels = np.load(seed / "typefaces.npy"), np.load(seed / "labels" / "typefaces.npy")
    assert np.bincount(typefaces).tolist() == [12] * 4  # every identity in each of them
    assert len(np.unique(typefaces[labels >= 0])) == 2
    assert np.bincount(labels[labels >= 0]).tolist() == [2] * 12
    text = changes.markdown(figures)
    assert "| two | small → ViT of 24 | " in text
    assert ", backward | not possible |" in text

    def refuse(*_: object) -> int:
        raise AssertionError("trained again")

    monkeypatch.setattr(comparison.Children, "run", refuse)
    assert bench(tmp_path, "--methods", "lce,bct")[1]["lines"] == figures["lines"]


def test_every_side_of_a_change_is_a_configuration_and_only_that_differs() -> None:
    assert {change.kind for change in changes.CHANGES} == set(changes.KINDS)
    assert len({change.name for change in changes.CHANGES}) == len(changes.CHANGES)
    for change in changes.CHANGES:
        sides = [load_config(CONFIGS / "demo-characters-paragon.yaml", m.settings(Path("s"))) for m in _sides(change)]
        margins, networks, dims, labels = (
            len(set(found))
            for found in (
                [one.head.margin.name for one in sides],
                [one.backbone.name for one in sides],
                [one.backbone.dim for one in sides],
                [one.data.labels for one in sides],
            )
        )
        assert margins + networks + dims + labels - 4 == (2 if change.kind == "two" else 1)


def _sides(change: changes.Change) -> tuple[changes.Model, changes.Model]:
    return change.old, change.new


def test_a_cell_names_the_metric_that_misses_and_a_failed_run_its_problem() -> None:
    found = {"old->old": dict.fromkeys(changes.METRICS, 0.5), "new->old": {"TAR@FAR=1e-4": 0.6, "rank-1": 0.4}}
    cell = {"met": False, "by": {"TAR@FAR=1e-4": True, "rank-1": False}, "method": "lce", "seeds": [found]}
    broken = {"met": False, "reason": "failed", "problem": "it diverged"}
    line = {"kind": "loss", "change": "a → b", "dims": [64, 64], "cells": {"lce": cell, "bct": broken}}
    sizes = {"data": "characters", "seeds": 1, "classes": 4000, "old_classes": 2000, "steps": 8, "old_steps": 8}
    methods = {"methods": {"lce": "LCE", "bct": "BCT"}, "weights": {"lce": 19.0, "bct": 3.1}}
    text = changes.markdown({**sizes, **methods, "lines": [line], "machine": "m", "commit": "c"})
    assert "| loss | a → b | 0.500 / 0.500 | 0.600 / 0.400 not by rank-1 | failed |" in text
    assert "it diverged" in text


def test_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, reason in (
        (["--kinds", "weather"], "unknown weather"),
        (["--methods", "independent,lce"], "independent is not trained for compatibility"),
        (["--methods", "lce,fct+bt2"], "--methods fct+bt2: it sets backbone.dim=96 itself"),
        (["--seeds", "0"], "at least 1"),
        (["--weights", str(tmp_path / "none.json")], "cannot be read"),
    ):
        assert bench(tmp_path, *words)[0] == 2
        assert reason in capsys.readouterr().err
