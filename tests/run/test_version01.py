"""A run folder that commit ca532cf made (version01/) is continued and evaluated: its configuration holds keys that have
no effect, which are refused in a file that a person writes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.runs import losses_of
from tools import cli
from trainer.__main__ import main
from trainer.models.open import load_model
from trainer.run.config import parse_config
from trainer.run.idle import without_idle

FOLDER = Path(__file__).with_name("version01")


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies of the run and of its data set in the working folder, under the names that the run knows."""
    shutil.copytree(FOLDER / "run", tmp_path / "old-run")
    shutil.copytree(FOLDER / "data", tmp_path / "old-data")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "old-run"


@pytest.mark.slow
def test_it_is_continued(
    old: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """From its checkpoint at step 3 to the losses that version 0.1 went on to."""
    expected = losses_of(old)
    shutil.rmtree(old / "checkpoints" / "step-00000006")
    shutil.rmtree(old / "model")
    (old / "summary.json").unlink()
    ends: list[int] = []
    monkeypatch.setattr("os._exit", ends.append)
    assert main([str(old / "config.yaml")]) == 0
    assert not ends
    said = capfd.readouterr().err
    assert "keys without effect left out: compat.mode, " in caplog.text
    assert "continuing from old-run/checkpoints/step-00000003" in said
    assert "changed since the last start: head" not in said
    assert "None → " not in said
    assert losses_of(old)[-3:] == pytest.approx(expected[-3:], rel=1e-4)
    assert load_model(old).card.step == 6


def test_finished_it_stays_finished(old: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([str(old / "config.yaml")]) == 0
    said = capfd.readouterr().err
    assert "finished already, 6 steps" in said
    assert "another setting, head" not in said


def test_it_is_evaluated(old: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The finished model as the old one, and the checkpoint in the middle as the new one."""
    middle = old / "checkpoints" / "step-00000003"
    card = load_model(middle).card
    assert (card.step, card.dim, card.mode, card.backbone and card.backbone.name) == (3, 6, "", "small")
    words = ["evaluate", "--old", str(old), "--new", str(middle), "--data", f"all={tmp_path / 'old-data'}"]
    assert cli.main([*words, "--json", str(tmp_path / "out.json"), "--device", "cpu"]) in (0, 1), capfd.readouterr().err
    assert json.loads((tmp_path / "out.json").read_text())


def test_only_fused_is_called_otherwise_now() -> None:
    """``reference`` is a choice of the old run, and so is a continuation with another implementation a change."""
    tree = yaml.safe_load((FOLDER / "run" / "config.yaml").read_text())
    for every in (False, True):
        assert "head.impl" in without_idle(tree, every)[1]
    tree["head"] |= {"impl": "reference", "chunk_rows": 64}
    kept, dropped = without_idle(tree, every=True)
    assert kept["head"]["impl"] == "reference"
    assert "head.impl" not in dropped
    assert "head.chunk_rows" in dropped  # the reference ignored it


@pytest.mark.parametrize(
    ("changes", "ignored"),
    [
        ({"new_bank": "c", "bank": "b", "old_embeddings": "e"}, {"old_embeddings", "old_model"}),
        ({"old_embeddings": "e", "old_model": "m", "bank": "b"}, {"old_model"}),
        ({"old_model": "m", "boundary_weight": 5.0}, {"boundary_weight"}),
    ],
)
def test_what_cross_model_runs_ignored_is_left_out(changes: dict[str, Any], ignored: set[str]) -> None:
    tree = yaml.safe_load((FOLDER / "run" / "config.yaml").read_text())
    tree["compat"] |= {"method": "lce", "mode": "cross-model", "new_embeddings": "n"} | changes
    kept, dropped = without_idle(tree, every=True)
    assert ignored <= {key.removeprefix("compat.") for key in dropped}
    assert not ignored & kept["compat"].keys()
    parse_config(kept | {"data": {"path": "d"}}, "config.yaml")
