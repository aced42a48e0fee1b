"""In CI a skipped test that nobody expects fails the run; elsewhere it does not."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.skips import expected_skips

TEXT = """
import pytest

def test_that_runs(): pass

def test_that_cannot(): pytest.skip("no moon here")
"""


CONFTEST = """
from collections.abc import Iterator
from pathlib import Path
from tests.skips import register

def pytest_configure(config):
    register(config, Path("skips.yaml"))
"""
ROOT = Path(__file__).resolve().parents[1]


def run(folder: Path, skips: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """pytest on a folder with a list of expected skips and one test that is skipped."""
    for name, text in (("conftest.py", CONFTEST), ("skips.yaml", skips), ("test_moon.py", TEXT)):
        (folder / name).write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("skips", "ci", "status"),
    [
        ("[]", "true", 1),
        ("[]", "false", 0),
        ("[{test: test_moon.py, reason: no moon, why: new moon}]", "true", 0),
        ("[{test: test_moon.py, reason: no sun, why: night}]", "true", 1),
    ],
)
def test_an_unexpected_skip_fails_in_ci(tmp_path: Path, skips: str, ci: str, status: int) -> None:
    done = run(tmp_path, skips, CI=ci)
    assert done.returncode == status, done.stdout + done.stderr
    assert ("skipped: " in done.stdout) == (ci == "true")
    assert ("NOT EXPECTED" in done.stdout) == (status == 1)


def test_every_expected_skip_names_tests_that_are_there() -> None:
    for test, reason in expected_skips():
        folder = ROOT / test  # a helper next to the test may hold the reason
        files = list(folder.parent.glob("*.py")) if test.endswith(".py") else list(folder.rglob("test_*.py"))
        assert any(reason in file.read_text(encoding="utf-8") for file in files), f"tests/skips.yaml: {test}: {reason}"


def skips(path: Path) -> Iterator[tuple[int, ast.expr | None]]:
    """(line, reason) of the ``skip``, ``skipif`` and ``importorskip`` of pytest in a file; None: it gives none."""
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(call, ast.Call) and ast.unparse(call.func).startswith("pytest."):
            kind = ast.unparse(call.func).rpartition(".")[2]
            if kind in ("skip", "skipif", "importorskip"):
                given = [word.value for word in call.keywords if word.arg == "reason"]
                yield call.lineno, next(iter(given or (call.args if kind == "skip" else [])), None)


def test_every_skip_says_why() -> None:
    """Pytest's own reason for a package that is missing says no more than its name."""
    silent = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for line, reason in skips(path)
        if reason is None
    ]
    assert silent == []


def skip_reasons(path: Path) -> Iterator[str]:
    """The literal reasons among them."""
    for _, reason in skips(path):
        if isinstance(reason, ast.Constant):
            yield str(reason.value)


def test_every_reason_to_skip_a_gpu_test_is_listed() -> None:
    """CI has no GPU, and a machine of one kind does not show them all."""
    listed = expected_skips()
    for path in sorted((ROOT / "tests/cuda").glob("test_*.py")):
        test = path.relative_to(ROOT).as_posix()
        for reason in skip_reasons(path):
            known = any(test.startswith(start) and reason.startswith(why) for start, why in listed)
            assert known, f"tests/skips.yaml lacks {test}: {reason}"
