"""In CI (``CI=true``) skipped tests are listed, and one that tests/skips.yaml does not expect fails the run."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

LIST = Path(__file__).with_suffix(".yaml")


class Skips:
    """A plugin of pytest that judges what is skipped.

    Args:
        expected: (beginning of a test's id, beginning of the reason) of what may be skipped.
    """

    def __init__(self, expected: Sequence[tuple[str, str]]) -> None:
        self.expected = expected
        self.found: list[tuple[str, str]] = []

    def note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        """Take note of a report; only one of something skipped counts."""
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.found.append((report.nodeid, reason.removeprefix("Skipped: ")))

    pytest_runtest_logreport = pytest_collectreport = note

    def unexpected(self) -> list[tuple[str, str]]:
        """What was skipped and is not on the list."""
        return [
            (test, reason)
            for test, reason in self.found
            if not any(test.startswith(known) and reason.startswith(why) for known, why in self.expected)
        ]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """An unexpected skip is a failure."""
        if self.unexpected() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """List what was skipped."""
        unexpected = self.unexpected()
        for test, reason in self.found:
            mark = "NOT EXPECTED (tests/skips.yaml): " if (test, reason) in unexpected else ""
            terminalreporter.line(f"skipped: {mark}{test}: {reason}")


def expected_skips(path: Path = LIST) -> list[tuple[str, str]]:
    """What the list allows: beginnings of a test's id and of the reason."""
    return [(entry["test"], entry["reason"]) for entry in yaml.safe_load(path.read_text(encoding="utf-8"))]


def register(config: pytest.Config, path: Path = LIST) -> None:
    """Watch what is skipped, in CI."""
    if os.environ.get("CI") == "true":
        config.pluginmanager.register(Skips(expected_skips(path)), "skips")
