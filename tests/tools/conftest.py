"""Training runs of benchmarks in processes that need not import torch."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests import forked
from tools.results import comparison


@pytest.fixture
def quick_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children of a comparison start as copies of a process that has torch."""

    def run(self: comparison.Children, command: Sequence[str], log: Path) -> int:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        return forked.run(command[1:], output=log).returncode

    monkeypatch.setattr(comparison.Children, "run", run)
