"""The table of the criterion: which cases it holds, and what its exit status says."""

import json
from pathlib import Path
from typing import Any

import pytest

from tools import cli
from tools.results import criterion
from tools.results.comparison import Comparison, source_of
from tools.steps import CROSS_MODEL
from trainer.run.config import load_config


def test_cases_end_with_the_control_and_direct_needs_equal_dimensions() -> None:
    cases = [(case.mode, case.old, case.new) for case in criterion._cases("direct,backward", "64:64,128:64")]
    assert cases == [("direct", 64, 64), ("backward", 64, 64), ("backward", 128, 64), ("independent", 64, 64)]


def test_every_case_is_a_run_that_can_be_configured(tmp_path: Path) -> None:
    """Also where all training runs are given a network of another size."""
    comparison = Comparison(tmp_path, source_of("characters"), 40, 20, 8, 8, ("backbone.width=4",))
    for case in criterion._cases("all", "64:64,128:64,64:128")[:-1]:
        recipe = "cross-model" if case.mode == "cross-model" else "paragon"
        config, overrides = comparison._recipe(0, recipe, tmp_path / case.name)
        run = load_config(config, [*overrides, *criterion._settings(comparison.folder(0), case, (12.5, 10.0))])
        assert run.methods[0].mode == case.mode
        assert case.mode == "cross-model" or run.backbone.dim == case.new
        assert run.train.steps == (load_config(CROSS_MODEL).train.steps if case.mode == "cross-model" else 8)


@pytest.mark.parametrize(("direct", "control", "status"), [(True, False, 0), (False, False, 1), (True, True, 1)])
def test_exit_status(direct: bool, control: bool, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(_lab: object, cases: list[criterion.Case], *_: object) -> list[dict[str, Any]]:
        met = {"direct": direct, "independent": control}
        return [{"mode": c.mode, "old_dim": 64, "new_dim": 64, "met": met[c.mode], "seeds": []} for c in cases]

    monkeypatch.setattr(criterion, "check", found)
    command = ["bench", "criterion", "--modes", "direct", "--dims", "64:64", "--out", str(tmp_path)]
    assert cli.main(command) == status


def test_the_length_of_the_maps_runs_is_known_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(criterion, "check", lambda *_: [])
    command = ["bench", "criterion", "--modes", "cross-model", "--dims", "64:64", "--out", str(tmp_path)]
    assert cli.main([*command, "--json", str(tmp_path / "found.json"), "train.steps=9"]) == 0
    assert json.loads((tmp_path / "found.json").read_text())["map_steps"] == 9
    monkeypatch.setattr(criterion, "check", None)  # not reached
    assert cli.main([*command, "optimizer.momentum=0.8"]) == 2
    assert "optimizer.momentum belongs to sgd; optimizer.name is adamw" in capsys.readouterr().err


def test_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, reason in ((["--modes", "sideways"], "unknown sideways"), (["--dims", "64"], "expected D1:D2")):
        assert cli.main(["bench", "criterion", "--out", str(tmp_path), *words]) == 2
        assert reason in capsys.readouterr().err
