"""Data sets carry checksums of their tables and of every record: no damage that still decodes goes unnoticed."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.samples import identity_folders, packed, unsealed
from tools import cli
from trainer import seals
from trainer.data import open_dataset
from trainer.data.checking import check
from trainer.data.listing import list_source
from trainer.data.packing import PackOptions, pack
from trainer.errors import DataError


def turn(file: Path, at: int, mask: int = 1) -> None:
    """Turn bits of one byte."""
    data = bytearray(file.read_bytes())
    data[at] ^= mask
    file.write_bytes(data)


def everything(folder: Path) -> tuple[Any, ...]:
    """All that a data set says and holds."""
    dataset = open_dataset(folder)
    images = [dataset.read(record) for record in range(len(dataset))]
    return dataset.info, dataset.labels.tolist(), dataset.class_names, images


@pytest.mark.parametrize("name", ["dataset.yaml", "labels.npy", "classes.txt", "train.offsets.npy", "train.crc.npy"])
def test_damage_of_a_table_is_refused(tmp_path: Path, name: str) -> None:
    folder = packed(tmp_path, part_records=0)
    size = (folder / name).stat().st_size
    for at in (0, size // 2, size - 1):
        turn(folder / name, at)
        with pytest.raises(DataError, match=rf"{name}: content changed since it was written .*lce check .* --seal"):
            open_dataset(folder)
        turn(folder / name, at)
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"{name}: No such file"):
        open_dataset(folder)


def test_damage_of_checksums_json_is_refused_or_harmless(tmp_path: Path) -> None:
    folder = packed(tmp_path, 2, 3)
    right, file = everything(folder), folder / "checksums.json"
    refused = 0
    for at in range(0, file.stat().st_size, 3):
        turn(file, at, 1 << at % 8)
        try:
            assert everything(folder) == right
        except DataError:
            refused += 1
        turn(file, at, 1 << at % 8)
    assert refused > 50


@pytest.mark.parametrize("layout", ["plain", "insightface"])
def test_every_flipped_byte_of_a_record_is_found(tmp_path: Path, layout: str) -> None:
    folder = packed(tmp_path, 2, 3, layout=layout)
    rec, dataset = folder / "train.rec", open_dataset(folder)
    offsets = np.load(folder / "train.offsets.npy")
    random = np.random.default_rng(0)
    for record, at in enumerate(random.integers(offsets[:-1], offsets[1:]).tolist()):
        turn(rec, at, 16)
        with pytest.raises(DataError, match=rf"record {record} at byte .* is damaged: its bytes changed"):
            dataset.read(record)
        assert list(check(open_dataset(folder)).bad) == [record]
        turn(rec, at, 16)
    assert not check(open_dataset(folder), processes=2).damage


def test_labels_that_are_not_those_of_the_records_are_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = unsealed(packed(tmp_path))  # as packed before there were checksums
    labels = np.load(folder / "labels.npy")
    labels[10:18] = np.roll(labels[10:18], 1)
    np.save(folder / "labels.npy", labels)
    for deep in ([], ["--deep"], ["--seal"]):
        assert cli.main(["check", str(folder), *deep]) == 1
        assert "label(s) are not those of the packed records" in capsys.readouterr().out
    assert not (folder / "checksums.json").exists()
    kept = np.load(folder / "labels.npy")
    np.save(tmp_path / "table.npy", kept)
    assert cli.main(["check", str(folder), "--labels", str(tmp_path / "table.npy")]) == 0  # a table may relabel


def test_a_data_set_without_checksums_opens_with_a_word_and_gets_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = packed(tmp_path)
    right, sums = everything(folder), json.loads((folder / "checksums.json").read_text())
    unsealed(folder)
    seals._logged.clear()
    with caplog.at_level(logging.WARNING):
        assert everything(folder) == everything(folder) == right
    assert sum("was packed without checksums" in line for line in caplog.messages) == 1
    assert cli.main(["check", str(folder), "--seal"]) == 0
    assert json.loads((folder / "checksums.json").read_text())["files"] == sums["files"]  # as lce pack writes them


def test_a_change_that_is_meant_is_sealed(tmp_path: Path) -> None:
    folder = packed(tmp_path)
    file = folder / "dataset.yaml"
    file.write_text(file.read_text().replace("color: RGB", "color: BGR"))
    assert cli.main(["check", str(folder)]) == 1
    assert cli.main(["check", str(folder), "--seal"]) == 0
    assert open_dataset(folder).info.color == "BGR"


def test_foreign_data_sets_get_checksums(tmp_path: Path) -> None:
    people = identity_folders(tmp_path / "people", 3, 4)
    pack(list_source(people), tmp_path / "ours", PackOptions())
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("train.rec", "train.idx"):
        shutil.copy(tmp_path / "ours" / name, foreign / name)
    for folder in (people, foreign):
        right = everything(folder)
        assert cli.main(["check", str(folder), "--seal"]) == 0
        assert everything(folder) == right
    turn(people / "person01" / "1.jpeg", 300)
    with pytest.raises(DataError, match=r"person01/1\.jpeg: changed since the data set was sealed"):
        everything(people)
    (people / "person01" / "2.png").unlink()
    with pytest.raises(DataError, match=r"records\.crc\.npy: has the checksums of 12 records, there are 11"):
        open_dataset(people)
    turn(foreign / "train.rec", 500)
    with pytest.raises(DataError, match="its bytes changed"):
        everything(foreign)
    turn(foreign / "train.rec", 500)
    turn(foreign / "train.idx", 2)
    with pytest.raises(DataError, match=r"train\.idx: content changed"):
        open_dataset(foreign)


def test_known_bad_records_are_sealed_too(tmp_path: Path) -> None:
    folder = packed(tmp_path)
    turn(folder / "train.rec", 2000)
    assert cli.main(["check", str(folder), "--write-bad"]) == 1
    assert len(open_dataset(folder).known_bad) == 1
    np.save(folder / "bad_records.npy", np.arange(2))
    with pytest.raises(DataError, match=r"bad_records\.npy: 144 bytes|bad_records\.npy: content|bad_records\.npy: \d+"):
        open_dataset(folder)
    (folder / "bad_records.npy").unlink()
    assert len(open_dataset(folder).known_bad) == 0


def test_a_damaged_table_is_written_again_by_lce_pack(tmp_path: Path) -> None:
    folder = packed(tmp_path)
    right = everything(folder)
    for name in ("train.offsets.npy", "train.crc.npy"):
        turn(folder / name, 150)
        assert cli.main(["pack", str(tmp_path / "source"), str(folder)]) == 0
        assert everything(folder) == right
    turn(folder / "labels.npy", 140)
    assert cli.main(["pack", str(tmp_path / "source"), str(folder)]) == 2
