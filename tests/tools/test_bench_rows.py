"""The table of the rows' dtypes: what is tried, what is trained, and the verdict."""

from pathlib import Path
from typing import Any

import pytest

from tools import cli
from tools.results import comparison, rows
from tools.results.compat import CRITERION


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str, list[str]]]:
    """The training runs that are asked for, none of which takes place; figures follow from the name and the seed."""
    done: list[tuple[int, str, list[str]]] = []
    quality = {"float32": 0.5, "float32-0-1": 0.1, "float32-0-10": 0.45, "float8-10": 0.505, "float8-residual-10": 0.3}

    def train(self: Any, seed: int, name: str, recipe: str, overrides: list[str], old: str | None = None) -> None:
        done.append((seed, name, overrides))

    def measure(self: Any, seed: int, part: str, old: str, new: str) -> dict[str, Any]:
        value = quality.get(new, 0.2) + 0.01 * seed
        return {"cells": {"new->new": {CRITERION: value, "rank-1": value}}}

    monkeypatch.setattr(comparison.Comparison, "pictures", lambda self, seed: None)
    monkeypatch.setattr(comparison.Comparison, "train", train)
    monkeypatch.setattr(comparison.Comparison, "measure", measure)
    return done


def test_the_learning_rate_is_chosen_once_and_float32_is_reached_or_not(
    trained: list[tuple[int, str, list[str]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.md"
    command = ["bench", "rows", "--kinds", "float32,float8,float8-residual", "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--markdown", str(out)]) == 0
    tried = {name for _, name, _ in trained if name.startswith("float32-0")}
    assert tried == {f"float32-0-{factor:g}" for factor in rows.FACTORS}
    words = next(words for _, name, words in trained if name == "float8-10")
    assert words == ["head.optimizer.momentum=0", "head.rows=float8", "head.optimizer.lr_factor=10"]
    lines = {line.split(" | ")[0]: line for line in out.read_text().splitlines()}
    assert lines["| float8"].endswith("| yes |")
    assert lines["| float8-residual"].endswith("| no |")
    assert lines["| float8"].split(" | ")[3] == "+0.0050"


def test_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "rows", "--kinds", "float9", "--out", str(tmp_path)]) == 2
    assert "unknown float9" in capsys.readouterr().err


def test_every_kind_is_a_head_that_can_be_trained() -> None:
    from tools.steps import CONFIGS
    from trainer.run.config import load_config

    for words in rows.KINDS.values():
        load_config(CONFIGS / "demo-characters-paragon.yaml", ["run.dir=unused", "data.path=unused", *words])
