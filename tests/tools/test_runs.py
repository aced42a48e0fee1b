"""`lce runs`: what it says of run folders as the trainer leaves them."""

import io
import json
import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from tests.runs import config
from tools.cli import main
from trainer.distributed import Ranks
from trainer.run.engine import train


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("all")
    for name, lr in (("slow", 0.01), ("quick", 0.1)):
        train(config(folder / name, optimizer__lr=lr), Ranks())
    return folder


def listed(runs: Path, out: Path) -> dict[str, dict[str, object]]:
    assert main(["runs", str(runs), "--json", str(out)]) == 0
    return {Path(found["path"]).name: found for found in json.loads(out.read_text())}


def test_finished_running_and_stopped_are_told_apart(runs: Path, tmp_path: Path) -> None:
    found = listed(runs, tmp_path / "list.json")
    assert set(found) == {"quick", "slow"}
    assert (found["quick"]["state"], found["quick"]["step"], found["quick"]["steps"]) == ("finished", 8, 8)
    (runs / "slow/summary.json").unlink()
    rank = runs / "slow/ranks/rank-00000.json"
    rank.write_text("{}")
    assert listed(runs, tmp_path / "list.json")["slow"]["state"] == "running"
    os.utime(rank, (1.0, 1.0))
    assert listed(runs, tmp_path / "list.json")["slow"]["state"] == "stopped"
    assert listed(runs, tmp_path / "list.json")["slow"]["step"] == 8  # of the last logged line
    (runs / "slow/checkpoints/step-00000011").mkdir()
    assert listed(runs, tmp_path / "list.json")["slow"]["step"] == 11
    (runs / "slow/checkpoints/step-00000011").rmdir()
    (runs / "slow/ranks/failed").touch()
    assert listed(runs, tmp_path / "list.json")["slow"]["state"] == "failed"
    (runs / "slow/ranks/failed").unlink()


def test_settings_are_not_cut_in_a_narrow_terminal(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr("tools.runs.table_console", lambda target, width: Console(file=out, width=56))
    monkeypatch.chdir(runs.parent)
    assert main(["runs", runs.name]) == 0
    assert "…" not in out.getvalue()


def test_a_difference_names_the_changed_key_alone(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "diff", str(runs / "quick"), str(runs / "slow")]) == 0
    out = capsys.readouterr().out
    assert "optimizer.lr" in out
    assert "0.01" in out
    assert "optimizer.momentum" not in out
    assert "last loss" in out


def test_a_page_holds_a_plot_for_each_figure(runs: Path, tmp_path: Path) -> None:
    assert main(["runs", "plot", str(runs), str(tmp_path / "curves.html")]) == 0
    page = (tmp_path / "curves.html").read_text()
    assert page.count("<img") >= 8
    assert 'alt="loss over the steps"' in page
    assert "<script" not in page


@pytest.mark.parametrize("arguments", [["runs", "nowhere"], ["runs", "diff"], ["runs", "plot", "x"]])
def test_wrong_use_is_one_line(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_broken_configuration_is_named(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("a: [")
    assert main(["runs", str(tmp_path)]) == 2
    assert "config.yaml: is no readable YAML: line 1: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("config.yaml", "", "config.yaml: holds no configuration"),
        ("config.yaml", None, "config.yaml: is a folder, not a file"),
        ("summary.json", "[]", "summary.json: not a summary of a run; remove it"),
        ("summary.json", "[1", "summary.json: is no readable JSON"),
        ("log.jsonl", "\x00\x01\n\x02\n", "log.jsonl: holds no line of figures"),
    ],
)
def test_a_damaged_run_is_named_and_the_others_are_listed(
    runs: Path, tmp_path: Path, name: str, text: str | None, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    many = tmp_path / "many"
    shutil.copytree(runs, many)
    damaged = many / "slow" / name
    damaged.unlink(missing_ok=True)
    damaged.mkdir() if text is None else damaged.write_text(text)
    assert main(["runs", str(many), "--json", str(tmp_path / "found.json")]) == 1
    assert f"lce runs: left out: {many / 'slow'}/{reason}" in capsys.readouterr().err
    assert [Path(found["path"]).name for found in json.loads((tmp_path / "found.json").read_text())] == ["quick"]
    for words in (["runs", str(many / "slow")], ["runs", "diff", str(many / "slow"), str(many / "quick")]):
        assert main(words) == 2
        assert reason in capsys.readouterr().err


def test_a_line_that_is_being_written_does_not_count(runs: Path, tmp_path: Path) -> None:
    log = runs / "quick/log.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"step": 9, "lo')
    assert listed(runs, tmp_path / "list.json")["quick"]["last"]["step"] == 8  # type: ignore[index]
    log.write_text(whole)
