"""The table at the end of ``make attack``."""

import os
from pathlib import Path

import pytest

from tests.attack import table


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what came of the attempts; with FULL=1 keep it."""
    text = table()
    if not text or "attack" not in config.getoption("markexpr"):
        return
    terminalreporter.section("attacks")
    terminalreporter.write_line(text)
    if os.environ.get("FULL") == "1":
        Path(__file__).with_name("table.md").write_text(text + "\n")
