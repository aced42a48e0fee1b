"""Label tables and embeddings by record know the records that they number; an index that was cut short is noticed."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.data.samples import identity_folders, mxnet_copy, packed, unsealed
from tools import cli
from trainer import seals
from trainer.compat.methods.old_embeddings import StoredEmbeddings
from trainer.data import open_dataset, open_named
from trainer.data.index import RowsInfo, check_rows, describe_rows, same_records
from trainer.data.listing import list_source
from trainer.data.packing import PackOptions, pack
from trainer.data.splitting import SplitOptions, save_tables, split
from trainer.errors import DataError, ForeignRecordsError


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """``packed`` with its table ``splits/old.npy``, and ``packed2``: the same images in another order."""
    folder = packed(tmp_path)
    pack(list_source(tmp_path / "source"), tmp_path / "packed2", PackOptions(seed=1))
    dataset = open_dataset(folder)
    save_tables(split(dataset, SplitOptions(share=0.5)), tmp_path / "splits", dataset, "")
    return tmp_path


def test_an_at_without_a_table_is_refused() -> None:
    with pytest.raises(DataError, match=r"packed@: no label table behind the @, such as packed@unseen\.npy"):
        open_named("packed@")


def test_a_table_of_the_same_images_in_another_order_is_refused(sets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, other = sets / "splits" / "old.npy", sets / "packed2"
    for call in (lambda: open_dataset(other, table), lambda: open_named(f"{other}@{table}")):
        with pytest.raises(
            ForeignRecordsError, match=r"numbers the records of .*packed \(45 .*, not those of .*packed2"
        ):
            call()
    with pytest.raises(ForeignRecordsError):
        open_dataset(sets / "source", table)
    assert cli.main(["check", str(other), "--labels", str(table)]) == 2
    assert "packed2" in capsys.readouterr().err


def test_a_copy_and_another_cut_into_parts_are_the_same_records(sets: Path) -> None:
    table = sets / "splits" / "old.npy"
    shutil.copytree(sets / "packed", sets / "elsewhere")
    pack(list_source(sets / "source"), sets / "parts", PackOptions(part_records=10))
    for name in ("elsewhere", "parts"):
        assert open_dataset(sets / name, table).num_classes == open_dataset(sets / "packed", table).num_classes
    cut = sets / "elsewhere" / "train.rec"
    data = bytearray(cut.read_bytes())
    data[100] ^= 255  # damage in a sampled image is damage, not another data set
    cut.write_bytes(data)
    assert open_dataset(sets / "elsewhere", table)


def test_same_sizes_are_told_apart_by_the_images(tmp_path: Path) -> None:
    """Bitmaps all have one length: only their content tells the order."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 8, 8, 3), np.uint8)
    for name, order in (("a", (0, 1, 2)), ("b", (2, 0, 1))):
        for number, person in enumerate(order):
            (tmp_path / name / str(number)).mkdir(parents=True)
            for k in range(4):
                file = tmp_path / name / str(number) / f"{k}.ppm"
                file.write_bytes(b"P6 8 8 255\n" + pixels[person, k].tobytes())
    a, b = (open_dataset(tmp_path / name).records_fingerprint for name in "ab")
    assert a.rpartition("-")[0] == b.rpartition("-")[0]
    assert not same_records(a, b)


def test_tables_without_a_fingerprint_are_taken_with_a_warning(sets: Path, caplog: pytest.LogCaptureFixture) -> None:
    mine = sets / "mine.npy"
    np.save(mine, np.zeros(45, np.int64))
    old = sets / "splits" / "old.npy"
    known = yaml.safe_load(old.with_suffix(".yaml").read_text())
    kept = {key: known[key] for key in ("num_classes", "records", "made_by", "classes")}
    old.with_suffix(".yaml").write_text(yaml.safe_dump(kept))  # as earlier versions wrote them
    seals._logged.clear()
    for table in (mine, old):
        with caplog.at_level(logging.WARNING):
            open_dataset(sets / "packed2", table)
            open_dataset(sets / "packed2", table)
        assert sum(f"{table} does not say whose records" in line for line in caplog.messages) == 1
    assert cli.main(["check", str(sets / "packed"), "--labels", str(mine), "--seal"]) == 0
    with pytest.raises(ForeignRecordsError):
        open_dataset(sets / "packed2", mine)


def test_a_changed_table_is_refused_until_it_is_sealed_again(sets: Path) -> None:
    table = sets / "splits" / "old.npy"
    labels = np.load(table)
    labels[np.flatnonzero(labels >= 0)[0]] = -1
    np.save(table, labels)
    with pytest.raises(DataError, match="content changed since it was written"):
        open_dataset(sets / "packed", table)
    assert cli.main(["check", str(sets / "packed"), "--labels", str(table), "--seal"]) == 0
    assert (open_dataset(sets / "packed", table).labels == labels).all()
    beside = table.with_suffix(".yaml")
    beside.write_text(beside.read_text().replace("num_classes: 2", "num_classes: 3"))
    with pytest.raises(DataError, match="its checksum differs"):
        open_dataset(sets / "packed", table)


def test_embeddings_by_record_know_their_records(sets: Path) -> None:
    rows, (first, second) = sets / "rows.npy", (open_dataset(sets / name) for name in ("packed", "packed2"))
    np.save(rows, np.ones((45, 4), np.float32))
    describe_rows(
        rows,
        RowsInfo(records=45, dim=4, model="m", model_hash="h", dataset="packed", fingerprint=first.records_fingerprint),
    )
    StoredEmbeddings(rows, 45, dataset=first)
    with pytest.raises(
        ForeignRecordsError, match=r"compat\.old_embeddings = .*rows\.npy numbers the records of packed"
    ):
        StoredEmbeddings(rows, 45, dataset=second)
    check_rows(rows, sets / "splits" / "old.npy")
    save_tables(split(second, SplitOptions(share=0.5)), sets / "others", second, "")
    for labels in (second, sets / "others" / "old.npy"):
        with pytest.raises(ForeignRecordsError, match="embeddings"):
            check_rows(rows, labels)


@pytest.mark.parametrize("layout", ["plain", "insightface"])
def test_an_index_cut_at_a_lines_end_is_refused(tmp_path: Path, layout: str) -> None:
    folder = tmp_path / "foreign"
    identity_folders(tmp_path / "source", 3, 6)
    pack(list_source(tmp_path / "source"), tmp_path / "ours", PackOptions(layout=layout))
    folder.mkdir()
    for name in ("train.rec", "train.idx"):
        shutil.copy(tmp_path / "ours" / name, folder / name)
    lines = (folder / "train.idx").read_text().splitlines(keepends=True)
    assert len(open_dataset(folder)) == 18
    for kept in (lines[: len(lines) // 2], lines[:1], lines[:-1], lines[3:]):
        (folder / "train.idx").write_text("".join(kept))
        with pytest.raises(DataError, match=r"was cut short; delete train\.idx"):
            open_dataset(folder)
    (folder / "train.idx").unlink()
    assert len(open_dataset(folder)) == 18


def test_an_index_with_a_gap_is_a_choice_that_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = unsealed(packed(tmp_path, 2, 5))
    for name in ("dataset.yaml", "pack.json", "train.offsets.npy"):
        (folder / name).unlink()
    lines = (folder / "train.idx").read_text().splitlines(keepends=True)
    (folder / "train.idx").write_text("".join(lines[:3] + lines[5:]))
    assert len(open_dataset(folder)) == 8
    assert "leaves out records of train.rec at 1 place(s)" in caplog.text


def test_mxnets_own_files_are_whole(tmp_path: Path) -> None:
    for name in ("plain", "insightface"):
        if (Path(__file__).parent / "mxnet" / name).is_dir():
            assert len(open_dataset(mxnet_copy(name, tmp_path))) > 0
