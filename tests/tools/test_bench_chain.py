"""A chain of three small models: trained one after another, measured against each other, continued."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.tools.test_bench_compat import SMALL, patterns
from tools import cli
from tools.results import chain, comparison

SIZES = ("--classes", "12", "--old-classes", "4", "--steps", "4", "--old-steps", "4", "--models", "3")


def bench(folder: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON of a small `lce bench chain`."""
    out = folder / "chain.json"
    command = ["bench", "chain", "--data", "patterns", "--out", str(folder / "work"), "--json", str(out), *SIZES]
    return cli.main([*command, *words, *SMALL]), json.loads(out.read_text()) if out.exists() else {}


@pytest.fixture(autouse=True)
def _sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(comparison.SOURCES, "patterns", comparison.Source(patterns, "demo-characters"))


@pytest.mark.slow
def test_each_model_follows_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, found = bench(tmp_path, "--methods", "lce")
    assert status == 0
    assert found["identities"] == [4, 8, 12]
    lce, seed = found["methods"]["lce"], tmp_path / "work" / "seed-0"
    assert len(lce["cells"]) == 9
    assert lce["summary"]["pairs"] == 3
    assert list(lce["summary"]["drift"]) == ["2", "3"]
    tables = [np.load(seed / "chain-tables" / f"labels-{at}.npy") for at in (1, 2, 3)]
    assert [len(np.unique(table[table >= 0])) for table in tables] == [4, 8, 12]
    assert all((later[earlier >= 0] >= 0).all() for earlier, later in itertools.pairwise(tables))
    runs = [seed / name for name in (chain.FIRST, "chain-lce-11-2", "chain-lce-11-3")]
    assert [yaml.safe_load((run / "config.yaml").read_text())["data"]["labels"] for run in runs] == [
        str(seed / "chain-tables" / f"labels-{at}.npy") for at in (1, 2, 3)
    ]
    text = chain.markdown(found)
    assert "| LCE, direct | 11 | " in text
    assert text.count("\n| 3 | ") == 1

    def refuse(self: comparison.Children, command: Sequence[str], log: Path) -> int:
        raise AssertionError("trained again")

    monkeypatch.setattr(comparison.Children, "run", refuse)
    status, again = bench(tmp_path, "--methods", "lce")
    assert (status, again["methods"]) == (0, found["methods"])


def test_the_identities_grow_in_equal_steps() -> None:
    assert chain.identities(500, 4000, 5) == [500, 1375, 2250, 3125, 4000]


def test_what_is_no_chain_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, reason in (
        (["--methods", "lce,independent"], "independent models are no chain"),
        (["--methods", "lce", "--models", "2"], "a chain has at least 3"),
        (["--methods", "magic"], "unknown magic"),
    ):
        assert bench(tmp_path, *words)[0] == 2
        assert reason in capsys.readouterr().err
