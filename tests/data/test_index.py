"""Opening data sets: layouts, label tables, and what is refused."""

import hashlib
import json
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from tests.data.samples import MXNET, encoded, identity_folders, mxnet_copy, packed, unsealed
from trainer.data import Dataset, open_dataset, recordio, store
from trainer.data.checking import check
from trainer.data.index import DatasetInfo, PartInfo, renumbered, save_description, seal_table
from trainer.data.splitting import SplitOptions, save_tables, split
from trainer.errors import DataError

EXPECTED = json.loads((MXNET / "expected.json").read_text())


def test_insightface_layout_with_and_without_an_index(tmp_path: Path) -> None:
    folder = mxnet_copy("insightface", tmp_path)
    labels = [int(record["label"]) for record in EXPECTED["insightface"][1:241]]
    with_index = open_dataset(folder)
    assert with_index.labels.tolist() == labels
    assert (with_index.num_classes, with_index.info.image_size) == (24, (24, 24))
    images = [with_index.read(record) for record in range(len(with_index))]
    for made in folder.glob("train.*"):
        if made.suffix != ".rec":
            made.unlink()
    rebuilt = open_dataset(folder)
    assert rebuilt.labels.tolist() == labels
    assert [rebuilt.read(record) for record in range(len(rebuilt))] == images


def records_of(name: str, keep_index: bool, keep_property: bool, folder: Path) -> Dataset:
    """One of MXNet's files, perhaps without the files next to it, opened."""
    copy = mxnet_copy(name, folder)
    if not keep_index:
        (copy / "train.idx").unlink()
    if not keep_property:
        (copy / "property").unlink()
    return open_dataset(copy)


@pytest.mark.parametrize("keep_property", [True, False])
@pytest.mark.parametrize("keep_index", [True, False])
@pytest.mark.parametrize("name", ["recbuilder", "face2rec2"])
def test_insightfaces_own_writers(name: str, keep_index: bool, keep_property: bool, tmp_path: Path) -> None:
    """They write the header record behind the images: key 0 says which it is, not its position in the file."""
    dataset = records_of(name, keep_index, keep_property, tmp_path)
    expected = [record for record in EXPECTED[name] if 1 <= record["key"] <= 14]
    images = [hashlib.sha256(dataset.read(k)).hexdigest() for k in range(len(dataset))]
    assert images == [record["sha256"] for record in expected]
    assert dataset.labels.tolist() == np.repeat(np.arange(6), [2, 3, 1, 4, 2, 2]).tolist()
    assert (dataset.num_classes, dataset.info.image_size) == (6, (24, 24))
    report = check(dataset, deep=True)
    assert (report.damage, report.header_records, report.relabelled) == ([], 7, 0)


def edited(folder: Path, leave_out: int, relabel: dict[int, float] | None = None) -> Path:
    """RecBuilder's file without the record of one key, and with other labels under some keys."""
    rec = mxnet_copy("recbuilder", folder) / "train.rec"
    writer, raw, at = recordio.RecordWriter(folder / "edited" / "train.rec"), rec.read_bytes(), 0
    while at < len(raw):
        data, at = recordio.unframe(raw, at)
        record = recordio.decode_record(data)
        if record.id in (relabel or {}):
            data = recordio.encode_record(record.image, (relabel or {})[record.id], record.id)
        if record.id != leave_out:
            writer.write(record.id, data)
    writer.close()
    return folder / "edited"


def test_identity_records_are_never_taken_for_images(tmp_path: Path) -> None:
    """Without the header, 20 records seem to have 15 classes; with another count of identities, labels are wrong."""
    (tmp_path / "edited").mkdir()
    with pytest.raises(DataError, match=r"6 record\(s\) hold two labels and no image.*no header record"):
        open_dataset(edited(tmp_path, 0))
    shutil.rmtree(tmp_path / "recbuilder")
    with pytest.raises(DataError, match=r"header record counts 6 identities, but the images have 5 different labels"):
        open_dataset(edited(tmp_path, -1, {6: 1.0}))
    (tmp_path / "edited" / "property").write_text("5,24,24")
    with pytest.raises(DataError, match="counts 6 identities"):
        open_dataset(tmp_path / "edited")


def test_a_header_that_counts_no_identities_says_nothing_of_classes(tmp_path: Path) -> None:
    writer = recordio.RecordWriter(tmp_path / "train.rec")
    writer.write(0, recordio.encode_record(b"", (5.0, 5.0)))
    for k in range(4):
        writer.write(k + 1, recordio.encode_record(encoded(k), float(k // 2), k + 1))
    writer.close()
    dataset = open_dataset(tmp_path)
    assert (dataset.labels.tolist(), dataset.num_classes) == ([0, 0, 1, 1], 2)


def test_a_property_file_of_fewer_classes_is_named(tmp_path: Path) -> None:
    folder = mxnet_copy("recbuilder", tmp_path)
    (folder / "property").write_text("5,24,24")
    with pytest.raises(DataError, match=r"recbuilder/property: record 12 has the label 5; allowed are 0…4"):
        open_dataset(folder)


def test_label_vectors_give_their_first_entry(tmp_path: Path) -> None:
    dataset = open_dataset(mxnet_copy("vector", tmp_path))
    assert dataset.labels.tolist() == [k % 4 for k in range(12)]


def test_a_read_only_folder_opens_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = mxnet_copy("plain", tmp_path)

    def refuse(path: Path, array: object) -> None:
        raise PermissionError(str(path))

    monkeypatch.setattr(store, "write_array", refuse)
    assert len(open_dataset(folder)) == 60
    assert sorted(p.name for p in folder.iterdir()) == ["train.idx", "train.rec"]


def test_kept_tables_are_used_until_a_file_changes_or_they_are_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = mxnet_copy("plain", tmp_path)
    first = open_dataset(folder).labels.tolist()
    find, searched = store.find_images, []
    monkeypatch.setattr(store, "find_images", lambda rec: searched.append(rec) or find(rec))
    assert open_dataset(folder).labels.tolist() == first
    assert not searched
    (kept,) = (tmp_path / "cache/lce-trainer/indexes").glob("*.labels.npy")
    np.save(kept, np.load(kept) + 1)
    assert open_dataset(folder).labels.tolist() == first
    os.utime(folder / "train.rec", ns=(0, 0))
    assert open_dataset(folder).labels.tolist() == first
    assert len(searched) == 2


def test_several_parts_with_class_offsets_and_a_label_map(tmp_path: Path) -> None:
    one, two = mxnet_copy("plain", tmp_path), mxnet_copy("insightface", tmp_path)
    turned = np.append(np.arange(22, -1, -1), -1)  # class 23 is dropped
    np.save(tmp_path / "map.npy", turned)
    parts = (
        PartInfo(rec="plain/train.rec"),
        PartInfo(rec="insightface/train.rec", class_offset=12, label_map="map.npy"),
    )
    save_description(tmp_path, DatasetInfo(image_size=(24, 24), parts=parts))
    both, plain, faces = open_dataset(tmp_path), open_dataset(one), open_dataset(two)
    assert both.num_classes == 12 + 23
    assert both.labels[:60].tolist() == plain.labels.tolist()
    expected = [turned[label] + 12 if turned[label] >= 0 else -1 for label in faces.labels.tolist()]
    assert both.labels[60:].tolist() == expected
    assert both.read(59) == plain.read(59)
    assert both.read(60) == faces.read(0)
    assert len(both.kept) == 290
    np.save(tmp_path / "map.npy", turned[:5])
    with pytest.raises(DataError, match=r"map\.npy: has 5 entries; insightface/train\.rec has the label 23"):
        open_dataset(tmp_path)


def test_labels_beyond_float32(tmp_path: Path) -> None:
    """2²⁴ + 1 has no float32: the table keeps it."""
    source = tmp_path / "list.csv"
    rows = []
    for k in range(6):
        (tmp_path / f"{k}.jpg").write_bytes(encoded(k))
        rows.append(f"{k}.jpg,{2**24 + k}")
    source.write_text("path,label\n" + "\n".join(rows) + "\n")
    from trainer.data.listing import list_source
    from trainer.data.packing import PackOptions, pack

    pack(list_source(source, keep_labels=True), tmp_path / "out", PackOptions(seed=None))
    dataset = open_dataset(tmp_path / "out")
    assert dataset.labels.tolist() == [2**24 + k for k in range(6)]
    assert dataset.num_classes == 2**24 + 6
    assert isinstance(dataset.store, store.RecordStore)
    assert dataset.store.record(0).label == -1.0


def test_a_table_relabels_and_drops_without_rewriting(tmp_path: Path) -> None:
    folder = packed(tmp_path)
    table = np.array(open_dataset(folder).labels) * 10
    table[7] = -1
    np.save(tmp_path / "mine.npy", table)
    dataset = open_dataset(folder, tmp_path / "mine.npy")
    assert dataset.num_classes == 41
    assert 7 not in dataset.kept
    assert isinstance(dataset.labels, np.memmap)
    assert dataset.fingerprint != open_dataset(folder).fingerprint
    (tmp_path / "mine.yaml").write_text("num_classes: 50\nrecords: 45\n")
    assert open_dataset(folder, tmp_path / "mine.npy").num_classes == 50


@pytest.mark.parametrize("named", [True, False])
def test_the_numbering_is_that_of_identities(tmp_path: Path, named: bool) -> None:
    folder = unsealed(packed(tmp_path, 4, 4))
    description = folder / "dataset.yaml"
    if not named:
        description.write_text(description.read_text().replace("class_names: classes.txt\n", ""))
    dataset = open_dataset(folder)
    save_tables(split(dataset, SplitOptions("open-class", share=0.5)), tmp_path, dataset, "")
    save_tables(split(dataset, SplitOptions("extended-class", share=0.5)), tmp_path / "extended", dataset, "")
    old, new = (open_dataset(folder, tmp_path / f"{name}.npy") for name in ("old", "new"))
    assert renumbered(old.numbering, new.numbering)
    assert renumbered(old.numbering, dataset.numbering)
    assert not renumbered(open_dataset(folder, tmp_path / "extended" / "new.npy").numbering, dataset.numbering)
    before = dataset.fingerprint
    np.save(folder / "labels.npy", np.where(np.arange(16) == 5, -1, dataset.labels))
    assert open_dataset(folder).fingerprint != before
    assert open_dataset(folder).numbering == dataset.numbering
    (tmp_path / "new.yaml").unlink()
    assert open_dataset(folder, tmp_path / "new.npy").numbering is None
    assert not renumbered(None, dataset.numbering)
    np.save(tmp_path / "old.classes.npy", np.arange(3))
    seal_table(tmp_path / "old.npy", open_dataset(folder, tmp_path / "old.npy", verify=False))
    with pytest.raises(DataError, match=r"old\.classes\.npy: expected"):
        open_dataset(folder, tmp_path / "old.npy").numbering  # noqa: B018


def test_a_tables_classes_have_their_own_names(tmp_path: Path) -> None:
    folder = packed(tmp_path, 4, 4)
    dataset = open_dataset(folder)
    save_tables(split(dataset, SplitOptions("open-class", share=0.5)), tmp_path, dataset, "")
    for name in ("old", "new"):
        classes = np.load(tmp_path / f"{name}.classes.npy").tolist()
        assert open_dataset(folder, tmp_path / f"{name}.npy").class_names == [f"person{c:02d}" for c in classes]
    np.save(tmp_path / "new.classes.npy", np.array([1, 9]))
    seal_table(tmp_path / "new.npy", open_dataset(folder, tmp_path / "new.npy", verify=False))
    with pytest.raises(DataError, match="belongs to another data set"):
        open_dataset(folder, tmp_path / "new.npy").class_names  # noqa: B018


def test_class_names_are_one_line_for_each_class(tmp_path: Path) -> None:
    folder = unsealed(packed(tmp_path, 3, 2))
    (folder / "classes.txt").write_bytes("a\u2028b\r\nc\u0085\r\nd".encode())
    assert open_dataset(folder).class_names == ["a\u2028b", "c\u0085", "d"]
    for text in ("a\nb\n", "a\nb\nc\nd\n"):
        (folder / "classes.txt").write_text(text)
        with pytest.raises(DataError, match="classes of 3; it needs one line for each class"):
            open_dataset(folder).class_names  # noqa: B018


def test_folders_and_their_packed_copy_are_numbered_alike(tmp_path: Path) -> None:
    folder = packed(tmp_path, 3, 2)
    files = open_dataset(tmp_path / "source")
    assert files.class_names == ["person00", "person01", "person02"]
    assert files.numbering == open_dataset(folder).numbering


def test_labels_that_no_memory_holds_are_refused(tmp_path: Path) -> None:
    folder = packed(tmp_path, 2, 2)
    np.save(tmp_path / "far.npy", np.array([0, 1, 0, 999_999_999_999]))
    with pytest.raises(DataError, match=r"far\.npy: 1000000000000 classes"):
        open_dataset(folder, tmp_path / "far.npy")


def test_image_folders_open_as_they_are(tmp_path: Path) -> None:
    dataset = open_dataset(identity_folders(tmp_path / "people", 3, 4))
    assert dataset.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert dataset.decode(5).shape == (32, 32, 3)


def test_a_dataset_survives_pickling_and_closing(tmp_path: Path) -> None:
    dataset = open_dataset(packed(tmp_path))
    first = dataset.read(0)
    dataset.close()
    assert dataset.read(0) == first
    assert pickle.loads(pickle.dumps(dataset)).read(0) == first


def test_millions_of_records_open_in_a_second(tmp_path: Path) -> None:
    """50,000,000 take a few seconds on two cores; the tables are mapped, not loaded."""
    n = 2_000_000
    with (tmp_path / "train.rec").open("wb") as file:
        file.truncate(64 * n)
    np.save(tmp_path / "train.offsets.npy", np.arange(n + 1) * 64)
    np.save(tmp_path / "labels.npy", np.arange(n) % 1000)
    part = PartInfo(rec="train.rec", records=n, bytes=64 * n)
    save_description(tmp_path, DatasetInfo(num_classes=1000, labels="labels.npy", parts=(part,)))
    began = time.process_time()
    assert len(open_dataset(tmp_path)) == n
    assert time.process_time() - began < 2


def damaged(folder: Path, **change: object) -> None:
    info = DatasetInfo.model_validate({**_described(folder), **change})
    save_description(folder, info)


def _described(folder: Path) -> dict[str, object]:
    from trainer.data.index import load_description

    return load_description(folder).model_dump()


def test_what_cannot_be_opened_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such data set folder; make one with `lce pack"):
        open_dataset(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"neither dataset\.yaml, nor \.rec"):
        open_dataset(tmp_path / "empty")
    (tmp_path / "empty" / "train.rec").write_bytes(b"")
    with pytest.raises(DataError, match=r"train\.rec: is empty"):
        open_dataset(tmp_path / "empty")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is no readable YAML"),
        ("format: other", "format: Input should be 'lce-dataset-1'"),
        ("image_size: [1]", "image_size"),
        ("imagesize: [1, 1]", "imagesize: Extra inputs"),
        ("parts: []", "lists no parts"),
    ],
)
def test_a_wrong_description_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "dataset.yaml").write_text(text)
    with pytest.raises(DataError, match=r"dataset\.yaml: .*" + message):
        open_dataset(tmp_path)


def test_labels_that_cannot_be_are_named_with_their_record(tmp_path: Path) -> None:
    folder = unsealed(packed(tmp_path))
    labels = np.array(np.load(folder / "labels.npy"))
    for wrong in (5, -2):
        changed = labels.copy()
        changed[11] = wrong
        np.save(folder / "labels.npy", changed)
        with pytest.raises(DataError, match=rf"labels\.npy: record 11 has the label {wrong}; allowed are 0…4"):
            open_dataset(folder)
    np.save(folder / "labels.npy", labels[:-1])
    with pytest.raises(DataError, match="44 labels for the 45 records"):
        open_dataset(folder)
    np.save(folder / "labels.npy", labels.astype(np.int32))
    with pytest.raises(DataError, match=r"expected int64 .* found int32"):
        open_dataset(folder)
    np.save(folder / "labels.npy", np.full(45, -1))
    damaged(folder, num_classes=None)
    with pytest.raises(DataError, match="every label is −1"):
        open_dataset(folder)


def test_header_labels_that_are_no_classes_are_named(tmp_path: Path) -> None:
    for k, label in enumerate((0.5, -7.0, float("nan"), float("inf"))):
        folder = tmp_path / str(k)
        folder.mkdir()
        writer = recordio.RecordWriter(folder / "train.rec")
        writer.write(0, recordio.encode_record(encoded(0), 1.0))
        writer.write(1, recordio.encode_record(encoded(1), label, 1))
        writer.close()
        with pytest.raises(DataError, match=r"record 1 has the label .*, which is no class number"):
            open_dataset(folder)


def test_records_outside_the_set_are_refused(tmp_path: Path) -> None:
    for dataset in (open_dataset(packed(tmp_path)), open_dataset(tmp_path / "source")):
        for record in (-1, 45):
            with pytest.raises(DataError, match=f"there is no record {record}"):
                dataset.read(record)
