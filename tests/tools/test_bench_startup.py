"""`lce bench startup`: what it measures, and that a command that fails is no measurement."""

import json
from pathlib import Path

import pytest

from tools.benchmarks import startup
from tools.cli import main
from trainer.errors import ConfigError


def test_it_reports_references_and_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = startup.commands()
    monkeypatch.setattr(startup, "REFERENCES", {"python": "pass"})
    monkeypatch.setattr(startup, "commands", lambda: {row: every[row] for row in ("python", "lce --help")})
    monkeypatch.setattr(startup, "_prepare", lambda folder, records: None)
    assert main(["bench", "startup", "--repeats", "1", "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["bench"], found["repeats"], list(found["reference"]), list(found["ours"])) == (
        "startup",
        1,
        ["python"],
        ["lce --help"],
    )
    assert 0 < found["reference"]["python"] < found["ours"]["lce --help"]


def test_sources_are_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    (tmp_path / "part.py").write_text("")
    startup.user_seconds(["-c", "import sys; sys.path.insert(0, '.'); import part"], 0, tmp_path)
    assert list((tmp_path / "__pycache__").glob("part.*.pyc"))


def test_a_command_that_fails_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="status 3, expected 0: no luck"):
        startup.user_seconds(["-c", "print('no luck'); raise SystemExit(3)"], 0, tmp_path)
