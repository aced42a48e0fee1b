"""The nearest centres: exact ones whatever the blocks, and those found in lists, which hold the share that is said."""

import json
import logging
import random
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.banks import write_bank
from tools.cli import main
from trainer.compat.bank.center_bank import BankInfo, CenterBank
from trainer.compat.methods import neighbours
from trainer.compat.methods.neighbours import Nearest, nearest

CLASSES, DIM, COUNT = 3001, 24, 10


@pytest.fixture
def seed() -> int:
    """Another one in each run; a failure shows it."""
    return random.SystemRandom().randrange(1 << 31)


def bank_of(folder: Path, families: int | None, seed: int, dim: int = DIM) -> CenterBank:
    """Centres in families (or without), some classes without one."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(CLASSES, dim, generator=generator)
    if families is not None:
        centers += 2 * torch.randn(families, dim, generator=generator)[torch.arange(CLASSES) % families]
    mask = torch.rand(CLASSES, generator=generator) < 0.97
    return write_bank(
        folder / "bank",
        centers=normalize(centers),
        boundaries=torch.zeros(CLASSES),
        counts=mask.long(),
        mask=mask,
        info=BankInfo(),
    )


def own(bank: CenterBank, start: int = 0, stop: int = CLASSES) -> tuple[Tensor, Tensor]:
    rows = bank.rows(start, stop)
    known = rows.mask.nonzero()[:, 0]
    return normalize(rows.centers[known].double()), start + known


def plain(bank: CenterBank, count: int) -> Nearest:
    rows, numbers = own(bank)
    best = (rows @ rows.T).fill_diagonal_(-torch.inf).topk(count)
    return Nearest(best.values, numbers[best.indices])


def shared(found: Nearest, true: Nearest) -> float:
    return float((found.who[:, :, None] == true.who[:, None]).any(1).double().mean())


@pytest.mark.parametrize(("listed", "chunk", "rows", "columns"), [(1 << 20, 1 << 17, 2048, 16384), (700, 350, 64, 90)])
def test_all_lists_and_all_blocks_are_the_plain_search(
    listed: int, chunk: int, rows: int, columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    for name, value in {"LISTED": listed, "CHUNK": chunk, "ROWS": rows, "COLUMNS": columns}.items():
        monkeypatch.setattr(neighbours, name, value)
    bank = bank_of(tmp_path, 150, seed)
    x, numbers = own(bank)
    lists = [neighbours._listed(*block) for block in neighbours.blocks(bank, x, listed)]
    assert len(lists) == -(-CLASSES // listed)
    every = neighbours._in_lists(x, numbers, bank, COUNT, lists, max(len(one.ends) for one in lists))
    for found in (nearest(x, numbers, bank, COUNT), every):
        torch.testing.assert_close(found.near, plain(bank, COUNT).near, rtol=1e-12, atol=1e-13)
        assert shared(found, plain(bank, COUNT)) > 0.9999


def test_few_lists_hold_the_share_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    """At any number of ranks the same."""
    monkeypatch.setattr(neighbours, "EXACT", 0)
    monkeypatch.setattr(neighbours, "LISTED", 2000)
    bank = bank_of(tmp_path, 150, seed)
    found = nearest(*own(bank), bank, COUNT)
    said = re.search(r"searched in (\d+) of (\d+) lists, which hold (\S+)%", caplog.text)
    assert said is not None
    assert int(said[1]) <= neighbours.HELPS * int(said[2])
    assert 97 <= float(said[3]) < 100
    assert 0.95 <= shared(found, plain(bank, COUNT)) < 1
    parts = [nearest(*own(bank, *ends), bank, COUNT) for ends in ((0, 1001), (1001, 2001), (2001, CLASSES))]
    assert torch.equal(torch.cat([part.who for part in parts]), found.who)


def test_where_lists_do_not_help_all_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    monkeypatch.setattr(neighbours, "EXACT", 0)
    bank = bank_of(tmp_path, None, seed, dim=400)
    with caplog.at_level(logging.WARNING):
        found = nearest(*own(bank), bank, COUNT)
    assert "lists do not help; all are compared" in caplog.text
    torch.testing.assert_close(found.near, plain(bank, COUNT).near, rtol=1e-12, atol=1e-13)


def test_the_benchmark_finds_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "EXACT", 0)
    words = ["--classes", "3000", "--dim", "24", "--latent", "16", "--queries", "500", "--folder", str(tmp_path)]
    assert main(["bench", "neighbours", *words, "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["centres"], found["queries"]) == (3000, 500)
    assert found["recall"] > 0.9
