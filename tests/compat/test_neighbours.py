"""The nearest centres: exact ones whatever the blocks, and those found along some axes, as many as is said."""

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
from trainer.compat.methods.neighbours import Nearest, by_axes, nearest

CLASSES, DIM, COUNT = 3001, 24, 10


@pytest.fixture
def seed() -> int:
    """Another one in each run; a failure shows it."""
    return random.SystemRandom().randrange(1 << 31)


def bank_of(folder: Path, families: int | None, seed: int, dim: int = DIM, axes: int | None = None) -> CenterBank:
    """Centres in families (or without), along all axes or mostly along some, some classes without one."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(CLASSES, dim, generator=generator)
    if families is not None:
        centers += 2 * torch.randn(families, dim, generator=generator)[torch.arange(CLASSES) % families]
    if axes is not None:
        turned = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
        centers = torch.cat([centers[:, :axes], 0.1 * centers[:, axes:]], 1) @ turned
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


@pytest.mark.parametrize(("block", "rows", "tile"), [(1 << 20, 4096, 1 << 14), (700, 100, 128), (650, 2048, 320)])
@pytest.mark.parametrize("instructions", [None, "amx_bf16"])
def test_all_axes_are_the_plain_search(
    block: int,
    rows: int,
    tile: int,
    instructions: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    """Whatever the blocks and tiles; in bfloat16 but for what its rounding hides."""
    for name, value in {"BLOCK": block, "TILE_ROWS": rows, "TILE": tile, "SOME": 32, "ROWS": 64, "COLUMNS": 90}.items():
        monkeypatch.setattr(neighbours, name, value)
    monkeypatch.setattr(neighbours, "bfloat16_instructions", lambda: instructions)
    bank = bank_of(tmp_path, 150, seed)
    x, numbers = own(bank)
    turned = torch.linalg.qr(torch.randn(DIM, DIM, dtype=x.dtype)).Q
    true, found = plain(bank, COUNT), by_axes(x, numbers, bank, COUNT, turned)
    torch.testing.assert_close(nearest(x, numbers, bank, COUNT).near, true.near, rtol=1e-12, atol=1e-13)
    if instructions is None:
        torch.testing.assert_close(found.near, true.near, rtol=1e-12, atol=1e-13)
    assert shared(found, true) > (0.9999 if instructions is None else 0.99)
    among = normalize(bank.rows(0, CLASSES).centers.double())
    cosines = (among[found.who] @ x[:, :, None])[:, :, 0]
    torch.testing.assert_close(found.near, cosines, rtol=1e-12, atol=1e-13)  # of those that are named


def test_few_axes_find_the_share_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    """At any number of ranks the same."""
    monkeypatch.setattr(neighbours, "EXACT", 0)
    monkeypatch.setattr(neighbours, "BLOCK", 2000)
    bank = bank_of(tmp_path, 150, seed, axes=10)
    found = nearest(*own(bank), bank, COUNT)
    said = re.search(r"searched along (\d+) of 24 axes, which find (\S+)% of those of 1,000", caplog.text)
    assert said is not None
    assert int(said[1]) < 24
    assert float(said[2]) >= 97
    assert shared(found, plain(bank, COUNT)) >= 0.95
    parts = [nearest(*own(bank, *ends), bank, COUNT) for ends in ((0, 1001), (1001, 2001), (2001, CLASSES))]
    assert torch.equal(torch.cat([part.who for part in parts]), found.who)


def test_where_all_axes_count_all_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    monkeypatch.setattr(neighbours, "EXACT", 0)
    bank = bank_of(tmp_path, None, seed, dim=16)
    with caplog.at_level(logging.WARNING):
        found = nearest(*own(bank), bank, COUNT)
    said = re.search(r"searched along (\d+) of 16 axes", caplog.text)
    assert said is not None
    assert int(said[1]) >= 14
    assert shared(found, plain(bank, COUNT)) >= 0.95


def test_few_centres_with_negative_cosines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No class twice, none its own neighbour; those at a negative cosine may be missing, and are −1 then."""
    monkeypatch.setattr(neighbours, "EXACT", 0)
    centers = torch.eye(3)[[0, 0, 1, 2]] * torch.tensor([1.0, 1, 1, 1])[:, None] - 0.1
    every = torch.ones(4, dtype=torch.bool)
    bank = write_bank(
        tmp_path / "bank",
        centers=normalize(centers),
        boundaries=torch.zeros(4),
        counts=every.long(),
        mask=every,
        info=BankInfo(),
    )
    x = normalize(centers).double()
    found = nearest(x, torch.arange(4), bank, 3)
    assert found.who[:2, 0].tolist() == [1, 0]
    for number, row in enumerate(found.who.tolist()):
        named = [one for one in row if one >= 0]
        assert len(set(named)) == len(named)
        assert number not in named


def test_the_benchmark_finds_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "EXACT", 0)
    words = ["--classes", "3000", "--dim", "24", "--latent", "16", "--queries", "500", "--folder", str(tmp_path)]
    assert main(["bench", "neighbours", *words, "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["centres"], found["queries"]) == (3000, 500)
    assert found["recall"] > 0.9
