"""Attempts to break what docs/reliability.md promises, and the one table of what came of them.

Every test takes the number of its attempts from :func:`amounts`: a small seeded share runs in ``make test``, more in
``make attack``, most with ``FULL=1``. It reports each attempt's outcome to :func:`tally`; :func:`tallied` does so for a
test that is one attempt, which runs in both. ``make attack`` ends by printing the table, and with ``FULL=1`` writes it
to ``tests/attack/table.md``.
"""

import functools
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

OUTCOMES = ("equal", "refused", "handled", "silent", "traceback", "hang")
"""The last three are failures."""
_TALLY: dict[str, Counter[str]] = {}


def amounts(share: int, attack: int, full: int) -> pytest.MarkDecorator:
    """Parametrise a test by ``amount``: the share of ``make test``, and, marked ``attack``, that of ``make attack``."""
    many = full if os.environ.get("FULL") == "1" else attack
    return pytest.mark.parametrize(
        "amount", [share, pytest.param(many, marks=pytest.mark.attack)], ids=["share", "attack"]
    )


def tally(kind: str, outcome: str, count: int = 1) -> None:
    """Count an attempt's outcome, one of :data:`OUTCOMES`, in the row of its ``kind``."""
    assert outcome in OUTCOMES
    _TALLY.setdefault(kind, Counter())[outcome] += count


def tallied(kind: str, outcome: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Count a test as one attempt: ``outcome`` where it passes, ``silent`` where it fails; a skipped one is none."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @pytest.mark.tallied
        @functools.wraps(test)
        def counted(*args: Any, **kwargs: Any) -> None:
            try:
                test(*args, **kwargs)
            except pytest.skip.Exception:
                raise
            except BaseException:  # that nothing was raised, too
                tally(kind, "silent")
                raise
            tally(kind, outcome)

        return counted

    return decorate


def table() -> str:
    """What was counted, as Markdown; empty: nothing."""
    if not _TALLY:
        return ""
    head = ("attack", "attempts", *OUTCOMES)
    rows = [(kind, str(sum(counts.values())), *(str(counts[o]) for o in OUTCOMES)) for kind, counts in _TALLY.items()]
    total: Counter[str] = sum(_TALLY.values(), Counter())
    rows.append(("all", str(sum(total.values())), *(str(total[o]) for o in OUTCOMES)))
    lines = [head, ("---",) + ("---:",) * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Table:
    """A plugin of pytest that prints the table at the end of ``make attack``, of all processes that share the tests."""

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Of a process of pytest-xdist: hand over what it counted."""
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["attacks"] = {kind: dict(counts) for kind, counts in _TALLY.items()}

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Add what a process of pytest-xdist counted."""
        for kind, counts in getattr(node, "workeroutput", {}).get("attacks", {}).items():
            for outcome, count in counts.items():
                tally(kind, outcome, count)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
        """Print what came of the attempts; with FULL=1 keep it."""
        text = table()
        if not text or "attack" not in config.getoption("markexpr"):
            return
        terminalreporter.section("attacks")
        terminalreporter.write_line(text)
        if os.environ.get("FULL") == "1":
            Path(__file__).with_name("table.md").write_text(text + "\n")
