"""The bank on disk: what is written comes back, by any ranges, and damage is refused with the file and the reason."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from tests.banks import write_bank
from trainer.compat.bank.center_bank import BankInfo, BankWriter, CenterBank
from trainer.errors import CenterBankError
from trainer.head.partition import class_range

CLASSES, DIM = 37, 12


def values() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(CLASSES, generator=generator) > 0.2
    return {
        "centers": normalize(torch.randn(CLASSES, DIM, generator=generator)),
        "boundaries": torch.rand(CLASSES, generator=generator),
        "counts": torch.randint(1, 9, (CLASSES,), generator=generator),
        "mask": mask,
    }


def written(path: Path, **options: Any) -> tuple[CenterBank, dict[str, Tensor]]:
    given = values()
    bank = write_bank(path, **given, info=BankInfo(made_from="test"), shard_bytes=5 * DIM * 4, **options)
    return bank, given


@pytest.mark.parametrize("world", [1, 2, 3, 7, 40])
def test_float32_comes_back_bit_for_bit_at_any_world_size(tmp_path: Path, world: int) -> None:
    bank, given = written(tmp_path / "bank")
    parts = [bank.rows(r.start, r.stop) for r in (class_range(CLASSES, rank, world) for rank in range(world))]
    expected = torch.where(given["mask"][:, None], given["centers"], 0.0)
    assert torch.equal(torch.cat([part.centers for part in parts]), expected)
    for name in ("boundaries", "counts", "mask"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), given[name])
    ids = torch.cat([part.class_ids for part in parts])
    assert torch.equal(ids, torch.where(given["mask"], torch.arange(CLASSES), -1))
    assert len(list((tmp_path / "bank").glob("centers-*.safetensors"))) == 8


@pytest.mark.parametrize(("storage", "bound"), [("bfloat16", 2e-5), ("int8", 1e-4)])
def test_lossy_storage_reports_its_error(tmp_path: Path, storage: str, bound: float) -> None:
    bank, given = written(tmp_path / "bank", storage=storage)
    rows = bank.rows(0, CLASSES)
    error = 1 - (rows.centers.double() * given["centers"].double()).sum(1)[given["mask"]]
    assert 0 < bank.largest_error < bound
    assert bank.largest_error == pytest.approx(float(error.max()), rel=0.05)
    norms = rows.centers.norm(dim=1)
    assert torch.allclose(norms, given["mask"].float(), atol=1e-6)
    assert not rows.centers[~given["mask"]].any()


def test_description_and_range_errors(tmp_path: Path) -> None:
    bank, _ = written(tmp_path / "bank")
    assert (bank.num_classes, bank.dim, bank.info.made_from) == (CLASSES, DIM, "test")
    assert len(bank.rows(5, 5).centers) == 0
    for wrong in ((-1, 3), (4, 3), (0, CLASSES + 1)):
        with pytest.raises(ValueError, match="rows"):
            bank.rows(*wrong)


def damage(path: Path, change: str) -> str:
    """Damage a bank in one way; the word that the refusal must contain."""
    shard = path / "centers-00002.safetensors"
    if change == "flip":
        content = bytearray(shard.read_bytes())
        content[-3] ^= 1
        shard.write_bytes(content)
        return "checksum"
    if change == "truncate":
        shard.write_bytes(shard.read_bytes()[:-40])
        return "truncated"
    if change == "missing":
        shard.unlink()
        return "missing"
    if change == "no-safetensors":
        shard.write_bytes(b"x" * shard.stat().st_size)
        return "safetensors"
    if change == "other-shape":
        size = shard.stat().st_size
        save_file({"centers": torch.zeros(5, DIM - 1)}, shard)
        pad = size - shard.stat().st_size
        save_file({"centers": torch.zeros(5, DIM - 1)}, shard, {"pad": "x" * (pad - 26)})
        tree = json.loads((path / "bank.json").read_text())
        tree["centers"][2]["size_bytes"] = shard.stat().st_size
        del tree["seal"]
        (path / "bank.json").write_text(json.dumps(tree))
        return "holds"
    tree = json.loads((path / "bank.json").read_text())
    del tree["seal"]  # as somebody who writes banks would leave it
    if change == "gap":
        del tree["centers"][1]
    if change == "outside":
        tree["centers"][1]["file"] = "../elsewhere.safetensors"
    if change == "unknown-key":
        tree["surprise"] = 1
    (path / "bank.json").write_text(json.dumps(tree) if change != "no-json" else "{")
    return {"gap": "cover", "outside": "outside", "unknown-key": "surprise", "no-json": "description"}[change]


@pytest.mark.parametrize(
    "change",
    ["flip", "truncate", "missing", "no-safetensors", "other-shape", "gap", "outside", "unknown-key", "no-json"],
)
def test_damage_is_refused_with_file_and_reason(tmp_path: Path, change: str) -> None:
    written(tmp_path / "bank")
    reason = damage(tmp_path / "bank", change)
    with pytest.raises(CenterBankError, match=reason) as error:
        CenterBank.open(tmp_path / "bank").rows(0, CLASSES)
    named = "bank.json" if change in ("gap", "outside", "unknown-key", "no-json") else "centers-00002"
    assert named in str(error.value)


def test_a_shard_that_is_not_read_is_not_verified_but_verify_finds_it(tmp_path: Path) -> None:
    written(tmp_path / "bank")
    damage(tmp_path / "bank", "flip")
    bank = CenterBank.open(tmp_path / "bank")
    assert len(bank.rows(0, 10).centers) == 10
    with pytest.raises(CenterBankError, match="centers-00002"):
        bank.verify()


def test_the_writer_refuses_and_leaves_nothing(tmp_path: Path) -> None:
    unit = normalize(torch.randn(4, DIM))
    ones = torch.ones(4, dtype=torch.int64)
    info = BankInfo()
    with BankWriter(tmp_path / "b", 4, DIM, info) as writer:
        for factor in (1.1, np.nan):
            with pytest.raises(CenterBankError, match="class 2 is not unit"):
                writer.append(unit * torch.tensor([1, 1, factor, 1])[:, None])
        with pytest.raises(CenterBankError, match="do not fit"):
            writer.append(unit[:, 1:])
        writer.append(unit[:3])
        with pytest.raises(CenterBankError, match="3 centres were given"):
            writer.finish(ones.float(), ones, ones.bool())
        writer.append(unit[3:])
        with pytest.raises(CenterBankError, match="outside"):
            writer.finish(ones * 2.0, ones, ones.bool())
    assert not list(tmp_path.iterdir())


def test_existing_banks_are_kept_unless_told_and_other_folders_always(tmp_path: Path) -> None:
    first, _ = written(tmp_path / "bank")
    with pytest.raises(CenterBankError, match="exists already"):
        written(tmp_path / "bank")
    second, _ = written(tmp_path / "bank", overwrite=True, storage="int8")
    assert first.fingerprint != second.fingerprint
    assert CenterBank.open(tmp_path / "bank").storage == "int8"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(CenterBankError, match="no centre bank"):
        written(tmp_path / "photos", overwrite=True)
    (tmp_path / "letter").touch()
    with pytest.raises(CenterBankError, match="no centre bank"):
        written(tmp_path / "letter", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bank", "letter", "photos"]


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    host = socket.gethostname()
    gone, alive = tmp_path / f".bank.{host}-4194305.partial", tmp_path / f".bank.{host}-{os.getppid()}.partial"
    kept = [alive, tmp_path / f".bank2.{host}-4194305.partial", tmp_path / ".bank.elsewhere-4194305.partial"]
    for folder in (gone, *kept):
        folder.mkdir()
        (folder / "centers-00000.safetensors").touch()
    written(tmp_path / "bank")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*(p.name for p in kept), "bank"])


def test_a_bank_of_a_file_whose_name_is_no_utf8(tmp_path: Path) -> None:
    """Its description keeps the bytes, and it can be told from others."""
    prints = []
    for name in ("a\udcff", "a\udcfe", "a\udcff"):
        info = BankInfo(made_from="embeddings", source=name)
        write_bank(tmp_path / "bank", **values(), info=info, overwrite=True)
        bank = CenterBank.open(tmp_path / "bank")
        assert bank.info.source == name
        prints.append(bank.fingerprint)
    assert prints[0] == prints[2] != prints[1]
