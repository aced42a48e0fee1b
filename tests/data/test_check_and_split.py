"""lce check and lce split."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.data.samples import MXNET, encoded, identity_folders, loader_of, mxnet_copy, packed, take, unsealed
from tests.data.test_damage import overwrite, spoil
from tools import check as check_tool
from tools import cli
from tools import split as split_tool
from trainer.data import open_dataset
from trainer.data.checking import check, storage_of, wanted_order
from trainer.data.listing import list_source
from trainer.data.packing import PackOptions, pack
from trainer.data.splitting import KINDS, SplitOptions, identity_list, save_tables, split
from trainer.errors import DataError
from trainer.owner import owned
from trainer.reading import read_json


def test_a_sound_set_is_counted(tmp_path: Path) -> None:
    people = identity_folders(tmp_path / "people", 3, 4)
    (people / "person02" / "again.jpg").write_bytes(encoded(200))  # twice in its class
    (people / "person01" / "stolen.jpg").write_bytes(encoded(200))  # and once in another
    pack(list_source(people), tmp_path / "out", PackOptions(part_records=5))
    for deep in (False, True):
        report = check(open_dataset(tmp_path / "out"), deep=deep)
        assert (report.records, report.used, report.classes, report.parts) == (14, 14, 3, 3)
        assert report.images_per_class == {"min": 4.0, "median": 5.0, "mean": 14 / 3, "max": 5.0}
        assert (report.duplicates, report.duplicates_across_classes >= 1) == (2, True)
        assert report.sizes == {"32x32": 14}
        assert not report.damage
    assert cli.main(["check", str(tmp_path / "out"), "--deep"]) == 0


def test_processes_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(packed(tmp_path))
    overwrite(dataset, 17, spoil)
    monkeypatch.setattr("trainer.data.checking._BLOCK", 20)
    one = check(dataset, deep=True)
    monkeypatch.undo()
    assert check(dataset, deep=True, processes=2) == one


def test_header_records_and_relabelled_records_are_counted(tmp_path: Path) -> None:
    folder = mxnet_copy("insightface", tmp_path)
    report = check(open_dataset(folder))
    assert (report.header_records, report.relabelled, report.damage) == (25, 0, [])
    table = np.array(open_dataset(folder).labels)
    table[:30] = -1
    table[30:40] += 1
    np.save(tmp_path / "table.npy", table)
    report = check(open_dataset(folder, tmp_path / "table.npy"))
    assert (report.relabelled, report.used, report.empty_classes) == (40, 210, 4)
    assert report.first_empty == [0, 1, 2, 3]
    assert not report.damage


def test_an_identity_with_several_labels_is_damage(tmp_path: Path) -> None:
    folder = mxnet_copy("insightface", tmp_path)
    table = np.array(open_dataset(folder).labels)
    table[33] = 5
    np.save(tmp_path / "table.npy", table)
    report = check(open_dataset(folder, tmp_path / "table.npy"))
    assert len(report.damage) == 1
    assert "records 30…39 are one identity but have several labels" in report.damage[0]


def test_damage_is_found_listed_and_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = open_dataset(packed(tmp_path))
    overwrite(dataset, 17, spoil)
    scan = next(r for r in range(20, 45) if dataset.read(r)[:2] == b"\xff\xd8")
    overwrite(dataset, scan, lambda image: image[:300] + bytes(len(image) - 310) + image[-10:])
    folder = str(dataset.path)
    assert cli.main(["check", folder, "--deep", "--write-bad", "--json", "-"]) == 1
    findings = json.loads(capsys.readouterr().out)
    assert sorted(map(int, findings["bad"])) == [17, scan]
    assert np.load(dataset.path / "bad_records.npy").tolist() == [17, scan]
    with pytest.raises(DataError, match="allows 0"):
        loader_of(open_dataset(folder), "torch")
    loader = loader_of(open_dataset(folder), "torch", workers=0, max_bad_records=2)
    assert not {17, scan} & {r for b in take(loader, 6) for r in b.records.tolist()}


def test_cut_files_and_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = packed(tmp_path)
    with (folder / "train.rec").open("r+b") as file:
        file.truncate(3000)
    assert cli.main(["check", str(folder)]) == 1
    assert "it was cut short" in capsys.readouterr().out
    assert cli.main(["check", str(tmp_path / "none")]) == 2
    (tmp_path / "empty").mkdir()
    assert cli.main(["check", str(tmp_path / "empty")]) == 2
    assert cli.main(["check", str(folder), "--labels", str(tmp_path / "none.npy")]) == 2
    assert not list(MXNET.rglob("*.npy"))  # looking at the fixture leaves no table next to it


@pytest.mark.parametrize(
    ("text", "reason"),
    [(None, "is missing; MXNet"), ("", "leaves out 45 of 45 records"), ("0\t0\n", "leaves out 44 of 45 records")],
)
def test_the_index_that_other_readers_need_is_checked(
    tmp_path: Path, text: str | None, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = packed(tmp_path)
    idx = folder / "train.idx"
    assert cli.main(["check", str(folder)]) == 0
    idx.unlink() if text is None else idx.write_text(text)
    assert cli.main(["check", str(folder)]) == 1
    assert f"{idx}: {reason}" in capsys.readouterr().out


def test_uniform_sets_with_an_odd_image_are_damage(tmp_path: Path) -> None:
    people = identity_folders(tmp_path / "people", 2, 3)
    (people / "person00" / "large.jpg").write_bytes(encoded(9, (48, 48)))
    pack(list_source(people), tmp_path / "out", PackOptions())
    report = check(open_dataset(tmp_path / "out"))
    assert (report.sizes, report.damage) == ({"32x32": 6, "48x48": 1}, [])
    described = unsealed(tmp_path / "out") / "dataset.yaml"
    described.write_text(described.read_text().replace("uniform: false", "uniform: true"))
    assert check(open_dataset(tmp_path / "out")).damage == ["1 image(s) are not 32x32, as dataset.yaml says"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.endswith("group")])
def test_splits_are_what_they_are_called(tmp_path: Path, kind: str) -> None:
    dataset = open_dataset(packed(tmp_path, 10, 6))
    options = SplitOptions(kind, share=0.5, unseen=0.2, tune=0.1, seen=1)  # type: ignore[arg-type]
    tables = split(dataset, options)
    labels = np.asarray(dataset.labels)
    used = {name: set(np.flatnonzero(table.labels >= 0).tolist()) for name, table in tables.items()}
    for name, table in tables.items():
        rows = table.labels >= 0
        assert (table.classes[table.labels[rows]] == labels[rows]).all()  # no record changes its person
        assert table.labels.max() < len(table.classes), name
    classes = {name: set(labels[sorted(rows)].tolist()) for name, rows in used.items()}
    assert (len(classes["unseen"]), len(classes["tune"]), len(classes["seen"])) == (2, 1, 7)
    assert not classes["unseen"] & (classes["tune"] | classes["old"] | classes["new"])
    assert not used["seen"] & (used["old"] | used["new"])
    if kind.startswith("extended"):
        assert used["old"] < used["new"]
    else:
        assert not used["old"] & used["new"]
    if kind.endswith("class"):
        assert len(classes["old"]) == 4
        assert len(classes["new"]) == (7 if kind.startswith("extended") else 3)
    else:
        assert classes["old"] == classes["new"] == classes["seen"]
        counts = np.bincount(labels[sorted(used["old"])])
        assert set(counts[counts > 0].tolist()) == {2}  # half of five images, rounded to even
    again = split(dataset, options)
    assert all((again[name].labels == table.labels).all() for name, table in tables.items())


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_open_data_of_uneven_classes_names_no_class_without_an_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], share: float
) -> None:
    people = tmp_path / "people"
    for label, images in enumerate([1, 1, 2, 3, 7, 1, 4]):
        (people / f"p{label}").mkdir(parents=True)
        for k in range(images):
            (people / f"p{label}" / f"{k}.jpg").write_bytes(encoded(10 * label + k))
    pack(list_source(people), tmp_path / "packed", PackOptions())
    command = ["split", str(tmp_path / "packed"), str(tmp_path / "splits"), "--kind", "open-data", "--seen", "1"]
    assert cli.main([*command, "--share", str(share)]) == 0
    said = capsys.readouterr().out
    assert "4 classes of old.npy are not in new.npy: all of their images are the old model's" in said
    for name, classes in (("old", 7), ("new", 3), ("seen", 4)):  # of the class of two one image is held out
        labels = np.load(tmp_path / "splits" / f"{name}.npy")
        assert sorted(set(labels[labels >= 0].tolist())) == list(range(classes)), name
        assert len(np.load(tmp_path / "splits" / f"{name}.classes.npy")) == classes


def test_tables_open_as_label_tables(tmp_path: Path) -> None:
    folder = packed(tmp_path, 6, 3)
    out = tmp_path / "splits"
    assert (
        cli.main(["split", str(folder), str(out), "--share", "0.5", "--unseen", "0.34", "--json", str(out) + ".json"])
        == 0
    )
    counts = json.loads((tmp_path / "splits.json").read_text())
    for name in ("old", "new", "unseen"):
        dataset = open_dataset(folder, out / f"{name}.npy")
        assert (dataset.num_classes, len(dataset.kept)) == (counts[name]["classes"], counts[name]["images"])
        assert np.load(out / f"{name}.classes.npy").shape == (dataset.num_classes,)


def test_splits_that_leave_nothing_are_refused(tmp_path: Path) -> None:
    folder = packed(tmp_path, 3, 3)
    with pytest.raises(DataError, match="leaves no image for `old`"):
        split(open_dataset(folder), SplitOptions(share=0.0))
    assert cli.main(["split", str(folder), str(tmp_path / "out"), "--kind", "open-class", "--share", "1"]) == 2
    assert not (tmp_path / "out").exists()
    tables = split(open_dataset(folder), SplitOptions(share=0.5))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        save_tables(tables, tmp_path / "file" / "out", open_dataset(folder), "")


@contextmanager
def held(lock: Path) -> Iterator[None]:
    """Another owner."""
    inside, end = threading.Event(), threading.Event()

    def hold() -> None:
        with owned(lock.parent, DataError, lock=lock):
            inside.set()
            end.wait()

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    try:
        assert inside.wait(60), f"{lock} cannot be held"
        yield
    finally:
        end.set()
        thread.join()


def test_tables_and_seals_have_one_owner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The labels of one split next to the classes of another would be read as one table."""
    data, out = packed(tmp_path, 8, 4), tmp_path / "splits"
    np.save(tmp_path / "table.npy", np.array(open_dataset(data).labels))
    table = ["--labels", str(tmp_path / "table.npy")]
    both = [*table, "--write-bad"]  # changes the data set's checksums too
    seals = [([], data / ".owner"), (table, tmp_path / ".owner"), (both, tmp_path / ".owner"), (both, data / ".owner")]
    commands = [(["split", str(data), str(out), "--kind", "open-class"], out / ".owner")]
    commands += [(["check", str(data), "--seal", *more], lock) for more, lock in seals]
    for words, lock in commands:
        with held(lock):
            assert cli.main(words) == 2
            assert "in use by" in capsys.readouterr().err
        assert cli.main(words) == 0
        assert not lock.exists()
    with held(data / ".owner"):  # of that table alone nothing of the data set is written
        assert cli.main(["check", str(data), "--seal", *table]) == 0
    assert cli.main(["check", str(tmp_path / "none"), "--seal"]) == 2
    assert not (tmp_path / "none").exists()


def test_tables_of_another_split_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = packed(tmp_path, 6, 4, (8, 8)), tmp_path / "tables"
    assert cli.main(["split", str(data), str(out), "--unseen", "0.3"]) == 0
    assert "of another split" not in capsys.readouterr().err
    assert cli.main(["split", str(data), str(out)]) == 0
    assert f"{out / 'unseen'}.npy: is of another split" in capsys.readouterr().err


def test_a_configuration_next_to_the_tables_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = packed(tmp_path, 6, 4, (8, 8))
    (tmp_path / "old.yaml").write_text("run: {dir: runs/old}\n")
    assert cli.main(["split", str(data), str(tmp_path)]) == 2
    assert "old.yaml: exists and describes no array" in capsys.readouterr().err
    assert (tmp_path / "old.yaml").read_text() == "run: {dir: runs/old}\n"
    assert not (tmp_path / "old.npy").exists()


def test_a_data_set_whose_name_is_no_utf8_is_checked_and_split(tmp_path: Path) -> None:
    data = packed(tmp_path / "a\udcff\nb", 6, 4, (8, 8))
    assert cli.main(["check", str(data), "--json", str(tmp_path / "report.json")]) == 0
    assert read_json(tmp_path / "report.json", DataError)["dataset"] == str(data)
    assert cli.main(["split", str(data), str(data.parent / "tables")]) == 0
    assert cli.main(["check", str(data), "--labels", str(data.parent / "tables/old.npy")]) == 0


def test_the_tools_agree_with_the_library() -> None:
    assert split_tool.KINDS == KINDS
    assert check_tool.HELP


def test_the_order_that_a_folder_wants(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = open_dataset(packed(tmp_path, classes=10))
    size = sum(dataset.store.sizes())
    assert wanted_order(dataset, "fast storage", 1)[0] == "global"
    order, reason = wanted_order(dataset, "network storage (nfs4)", 2 * size + 2)
    assert (order, "fit into half the memory" in reason) == ("global", True)
    order, reason = wanted_order(dataset, "a disk", size)
    assert (order, "sorted by class" in reason) == ("blocks", False)  # lce pack has shuffled it
    order, reason = wanted_order(open_dataset(tmp_path / "source"), "a disk", size)
    assert (order, "sorted by class" in reason) == ("blocks", True)
    assert storage_of(tmp_path)
    assert cli.main(["check", str(dataset.path)]) == 0
    assert "data.order: " in capsys.readouterr().out


def test_counts_and_lists_of_identities(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = packed(tmp_path, classes=12)
    names = open_dataset(folder).class_names
    assert names is not None
    (tmp_path / "benchmark.txt").write_text(f"{names[3]}\n\n{names[7]}\n{names[3]}\n")
    (tmp_path / "old.txt").write_text(f"{names[0]}\n{names[11]}\n")
    words = ["split", str(folder), str(tmp_path / "out"), "--unseen", str(tmp_path / "benchmark.txt"), "--tune", "2"]
    assert cli.main([*words, "--share", "4", "--kind", "open-class"]) == 0

    def classes(name: str) -> list[int]:
        return np.load(tmp_path / "out" / f"{name}.classes.npy").tolist()

    assert classes("unseen") == [3, 7]
    assert [len(classes(name)) for name in ("tune", "old", "new")] == [2, 4, 4]
    assert sorted(k for name in ("unseen", "tune", "old", "new") for k in classes(name)) == list(range(12))
    assert cli.main([*words, "--share", str(tmp_path / "old.txt"), "--kind", "open-class"]) == 0
    assert classes("old") == [0, 11]
    assert len(classes("new")) == 6
    assert cli.main([*words, "--share", str(tmp_path / "old.txt")]) == 0
    assert (classes("old"), len(classes("new"))) == ([0, 11], 8)
    capsys.readouterr()
    for more, reason in (
        (["--share", "9"], "--share 9: 9 identities are wanted and 8 are left"),
        (["--share", str(tmp_path / "benchmark.txt")], f"the identity {names[3]} is in two lists"),
        (["--share", "5", "--kind", "open-data"], "takes a share of each class's images"),
    ):
        assert cli.main([*words, *more]) == 2
        assert reason in capsys.readouterr().err
    (tmp_path / "benchmark.txt").write_text("nobody\n")
    assert cli.main(words) == 2
    assert "benchmark.txt: line 1:" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*words, "--share", "1.5"])


def test_a_list_by_number_where_classes_have_no_names(tmp_path: Path) -> None:
    folder = mxnet_copy("recbuilder", tmp_path)
    (tmp_path / "list.txt").write_text("5\n0\n")
    dataset = open_dataset(folder)
    tables = split(dataset, SplitOptions(unseen=identity_list(dataset, tmp_path / "list.txt"), share=1))
    assert tables["unseen"].classes.tolist() == [0, 5]
    assert (len(tables["old"].classes), len(tables["new"].classes)) == (1, 4)
    (tmp_path / "list.txt").write_text("6\n")
    with pytest.raises(DataError, match="has no identity '6'"):
        identity_list(dataset, tmp_path / "list.txt")
