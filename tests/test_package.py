"""What the package promises without its extras: every command's help, and the recipes next to the code."""

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench import ONLY_IN_A_CLONE
from tools.cli import COMMANDS, MODULES, main
from tools.steps import CONFIGS

ROOT = Path(__file__).resolve().parents[1]
BLOCKED = (
    "nvidia",
    "deepspeed",
    "mpi4py",
    "faiss",
    "psycopg",
    "pgvector",
    "hypothesis",
    "pytest",
    "pdoc",
    "playwright",
)
HELP = """
import sys
from importlib.abc import MetaPathFinder

class Blocked(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
from tools.cli import build_parser, COMMANDS
for command in COMMANDS:
    try:
        build_parser().parse_args([command, "--help"])
    except SystemExit as done:
        assert done.code == 0, command
print("heavy:", sorted({heavy!r} & set(sys.modules)))
"""


def helps(blocked: tuple[str, ...], heavy: set[str]) -> subprocess.CompletedProcess[str]:
    """Every command's help in one process that cannot import some packages; it names the heavy ones it imported."""
    code = HELP.format(blocked=blocked, heavy=heavy)
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_every_command_explains_itself_without_optional_packages() -> None:
    done = helps(BLOCKED, {"torch", "onnxruntime", "matplotlib", "sklearn"})
    assert done.returncode == 0, done.stderr
    assert "heavy: []" in done.stdout
    assert all(f"usage: lce {command}" in done.stdout.replace("-c ", "lce ") for command in COMMANDS)


def test_that_would_be_noticed() -> None:
    assert helps((*BLOCKED, "shlex"), set()).returncode != 0


def test_recipes_lie_beside_the_packages_as_in_the_wheel() -> None:
    assert (CONFIGS / "demo-faces-old.yaml").is_file()
    assert CONFIGS.parent == Path(sys.modules["tools"].__path__[0]).parent
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '"configs*"' in text
    assert '"*" = ["*.yaml"]' in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_documents_an_example(command: str) -> None:
    text = importlib.import_module(MODULES.get(command, f"tools.{command}"))
    assert text.__doc__ is not None
    assert f"lce {command}" in text.__doc__
    assert text.HELP
    assert "\n" not in text.HELP


def test_what_the_wheel_leaves_out_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left_out = {path.stem for path in (ROOT / "tools" / "results").glob("*.py")} - {"__init__", "comparison", "paired"}
    assert set(ONLY_IN_A_CLONE) == left_out
    assert 'exclude = ["tools.results*"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tools.results" else find(name))
    assert main(["bench", "compat", "--seeds", "1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "run it in a clone of the repository" in error
