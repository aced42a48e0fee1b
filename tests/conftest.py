"""Three speeds: whole files that start processes or train are marked ``slow``, besides tests that say so themselves;
those marked ``attack`` take minutes each and run where ``-m`` asks for them (``make attack``)."""

import os
import signal
from pathlib import Path

import pytest

from tests.attack import Table
from tests.skips import register

TESTS = Path(__file__).parent
SLOW = (
    "compat/test_authors_formula.py",
    "compat/test_rivals.py",
    "compat/test_transformed.py",
    "data/test_damage.py",
    "data/test_loaders.py",
    "evaluation/test_evaluate.py",
    "evaluation/test_report_browser.py",
    "gallery/test_postgres.py",
    "gallery/test_postgres_tables.py",
    "head/test_equality.py",
    "head/test_frozen.py",
    "head/test_misuse.py",
    "head/test_native.py",
    "head/test_rows.py",
    "launch/test_hosts.py",
    "launch/test_launch.py",
    "planning/test_traffic.py",
    "run/test_arcface_start.py",
    "test_checkpoint.py",
    "run/test_cross_model.py",
    "run/test_engine.py",
    "models/test_export.py",
    "models/test_export_backbones.py",
    "run/test_failures.py",
    "test_golden.py",
    "run/test_modes.py",
    "run/test_parallel.py",
    "evaluation/test_periodic.py",
    "run/test_startup.py",
    "run/test_upgrades.py",
    "run/test_zero.py",
    "tools/test_bench_compat.py",
    "tools/test_centers.py",
    "tools/test_demo.py",
    "tools/test_demo_steps.py",
    "tools/test_ladder.py",
    "tools/test_million.py",
    "tools/test_tune.py",
    "test_skips.py",
)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A command that runs in this process sets these for its children (tools/cli.py, launch/torchrun.py); they must not
    reach other tests."""
    for name in ("PYTHONSAFEPATH", "LCE_LAUNCHED", "RANK"):
        os.environ.pop(name, None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests of the slow files; leave out those of ``attack`` unless they are asked for."""
    for item in items:
        if item.path.relative_to(TESTS).as_posix() in SLOW:
            item.add_marker(pytest.mark.slow)
    if hasattr(config, "workerinput"):  # processes share the files: slow ones first, so that quick ones fill the end
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)
    if "attack" not in config.getoption("markexpr"):
        left_out = [item for item in items if item.get_closest_marker("attack")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_sessionstart() -> None:
    """A file that was renamed must not become fast by that. Under nohup the commands that tests start would inherit an
    ignored SIGHUP.
    """
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    missing = [name for name in SLOW if not (TESTS / name).is_file()]
    if missing:
        raise pytest.UsageError(f"tests/conftest.py lists files that do not exist: {', '.join(missing)}")


def pytest_configure(config: pytest.Config) -> None:
    """In CI, judge what is skipped; print the table of ``make attack``."""
    register(config)
    config.pluginmanager.register(Table(), "attacks")
