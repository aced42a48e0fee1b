"""A chain of three small models: trained one after another, measured against each other, continued."""

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.tools.test_bench_compat import SMALL, patterns
from tools import cli
from tools.results import chain, comparison
from trainer.compat.bank.center_bank import BankInfo, BankWriter

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
@pytest.mark.usefixtures("quick_starts")
def test_each_model_follows_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, found = bench(tmp_path, "--methods", "lce+bct")
    assert status == 0
    assert found["identities"] == [4, 8, 12]
    lce, seed = found["methods"]["lce+bct"], tmp_path / "work" / "seed-0"
    assert len(lce["cells"]) == 9
    assert lce["summary"]["pairs"] == 3
    assert list(lce["summary"]["drift"]) == ["2", "3"]
    tables = [np.load(seed / "chain-tables" / f"labels-{at}.npy") for at in (1, 2, 3)]
    assert [len(np.unique(table[table >= 0])) for table in tables] == [4, 8, 12]
    assert all((later[earlier >= 0] >= 0).all() for earlier, later in itertools.pairwise(tables))
    runs = [seed / name for name in (chain.FIRST, "chain-lce+bct-11-2", "chain-lce+bct-11-3")]
    assert [yaml.safe_load((run / "config.yaml").read_text())["data"]["labels"] for run in runs] == [
        str(seed / "chain-tables" / f"labels-{at}.npy") for at in (1, 2, 3)
    ]
    text = chain.markdown(found)
    assert "| LCE + BCT | 11 | " in text
    assert text.count("\n| 3 | ") == 1

    def refuse(self: comparison.Children, command: Sequence[str], log: Path) -> int:
        raise AssertionError("trained again")

    monkeypatch.setattr(comparison.Children, "run", refuse)
    status, again = bench(tmp_path, "--methods", "lce+bct")
    assert (status, again["methods"]) == (0, found["methods"])


def test_a_training_run_knows_what_its_label_table_and_bank_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = comparison.Comparison(tmp_path, comparison.SOURCES["patterns"], 12, 4, 4, 4)
    started: list[str] = []

    def run(seed: int, name: str, config: Path, words: Sequence[str]) -> None:
        started.append(name)
        (one.folder(seed) / name).mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(one, "_run", run)
    table, bank = tmp_path / "labels.npy", tmp_path / "bank"
    words = [f"data.labels={table}", "compat.method=bct", f"compat.bank={bank}"]

    def train() -> int:
        one.train(0, "model", "paragon", words)
        return len(started)

    np.save(table, np.zeros(3, np.int64))
    made_bank(bank, 0)
    assert [train(), train()] == [1, 1]
    np.save(table, np.ones(3, np.int64))
    assert [train(), train()] == [2, 2]
    shutil.rmtree(bank)
    made_bank(bank, 1)
    assert [train(), train()] == [3, 3]
    table.unlink()
    assert train() == 4  # the trainer says that it is missing


def made_bank(folder: Path, seed: int) -> None:
    """A bank of two centres."""
    with BankWriter(folder, 2, 4, BankInfo()) as writer:
        writer.append(torch.nn.functional.normalize(torch.randn(2, 4, generator=torch.manual_seed(seed))))
        writer.finish(torch.zeros(2), torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool))


def test_the_identities_grow_in_equal_steps() -> None:
    assert chain.identities(500, 4000, 5) == [500, 1375, 2250, 3125, 4000]


def test_what_is_no_chain_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, reason in (
        (["--methods", "lce,independent"], "independent models are no chain"),
        (["--methods", "lce", "--models", "2"], "a chain has at least 3"),
        (["--methods", "magic"], "unknown magic"),
        (["--methods", "bt2"], "--methods bt2: it sets backbone.dim=96 itself"),
    ):
        assert bench(tmp_path, *words)[0] == 2
        assert reason in capsys.readouterr().err
