"""lce pack: every source, any number of processes and jobs, interruptions, and what is refused."""

import hashlib
import io
import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.samples import encoded, identity_folders, loader_of, take, unsealed
from tools import cli
from trainer.data import open_dataset, packing, pixels, recordio, store
from trainer.data.checking import check
from trainer.data.listing import Listing, list_source
from trainer.data.packing import PackOptions, pack
from trainer.data.pixels import decode_image
from trainer.errors import ConfigError, DataError


def contents(folder: Path) -> dict[str, str]:
    """Every visible file's hash."""
    files = (path for path in folder.iterdir() if not path.name.startswith("."))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def images_by_class(folder: Path) -> dict[str, set[bytes]]:
    dataset = open_dataset(folder)
    assert dataset.class_names is not None
    found: dict[str, set[bytes]] = {}
    for record, label in enumerate(dataset.labels.tolist()):
        found.setdefault(dataset.class_names[label], set()).add(dataset.read(record))
    return found


def images_in(folder: Path) -> dict[str, set[bytes]]:
    return {person.name: {file.read_bytes() for file in person.iterdir()} for person in folder.iterdir()}


@pytest.fixture
def people(tmp_path: Path) -> Path:
    return identity_folders(tmp_path / "people", 4, 7)


def test_folders_keep_their_bytes_under_their_names(people: Path, tmp_path: Path) -> None:
    assert cli.main(["pack", str(people), str(tmp_path / "out")]) == 0
    assert images_by_class(tmp_path / "out") == images_in(people)
    dataset = open_dataset(tmp_path / "out")
    assert dataset.info.uniform
    assert dataset.info.image_size == (32, 32)
    assert sorted(contents(tmp_path / "out")) == [
        "checksums.json",
        "classes.txt",
        "dataset.yaml",
        "labels.npy",
        "pack.json",
        "train.crc.npy",
        "train.idx",
        "train.offsets.npy",
        "train.rec",
    ]
    assert (np.diff(dataset.labels) < 0).any()  # shuffled
    assert not (tmp_path / "out" / ".pack").exists()


def test_the_result_does_not_depend_on_processes_or_jobs(people: Path, tmp_path: Path) -> None:
    listing, options = list_source(people), PackOptions(part_records=5)
    one = pack(listing, tmp_path / "one", options)
    assert (one.records, one.parts, one.written_parts, one.complete) == (28, 6, 6, True)
    counted: list[int] = []
    pack(listing, tmp_path / "two", options, processes=2, progress=lambda done, total: counted.append(done))
    assert counted[-1] == 28
    results = [pack(listing, tmp_path / "jobs", options, job=(job, 3)) for job in (2, 0, 1)]
    assert [result.complete for result in results] == [False, False, True]
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "jobs")
    other = pack(listing, tmp_path / "seed", PackOptions(part_records=5, seed=1))
    assert other.complete
    assert contents(tmp_path / "seed")["train-00000.rec"] != contents(tmp_path / "one")["train-00000.rec"]


def test_an_interrupted_run_is_continued(people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing, options, out = list_source(people), PackOptions(part_records=5), tmp_path / "out"
    calls = 0
    load = packing._load

    def interrupt(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 13:
            raise KeyboardInterrupt
        return load(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(packing, "_load", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pack(listing, out, options)
    assert sorted(path.name for path in out.glob("*.rec")) == ["train-00000.rec", "train-00001.rec"]
    assert not list(out.glob(".*.tmp"))
    with pytest.raises(DataError, match="its packing is not finished, images are missing"):
        open_dataset(out)
    monkeypatch.setattr(packing, "_load", load)
    assert pack(listing, out, options).written_parts == 4
    again = pack(listing, out, options)
    assert (again.written_parts, again.records, again.complete) == (0, 28, True)
    pack(listing, tmp_path / "straight", options)
    assert contents(out) == contents(tmp_path / "straight")


def test_parts_that_were_cut_or_lost_are_written_again(people: Path, tmp_path: Path) -> None:
    listing, options, out = list_source(people), PackOptions(part_records=5), tmp_path / "out"
    pack(listing, out, options)
    sound = contents(out)
    with (out / "train-00001.rec").open("r+b") as file:
        file.truncate(3000)
    for name in ("train-00003.rec", "train-00004.idx", "classes.txt"):
        (out / name).unlink()
    first = pack(listing, out, options, job=(0, 2))
    assert (first.written_parts, first.complete) == (1, False)
    again = pack(listing, out, options)
    assert (again.written_parts, again.records, again.complete) == (2, 28, True)
    assert contents(out) == sound
    assert not (out / ".pack").exists()
    (out / "train-00000.rec").unlink()
    for image in people.rglob("*.jpeg"):
        image.write_bytes(encoded(78, (40, 40)))
    with pytest.raises(DataError, match=r"not those that were packed; remove .*out and pack again"):
        pack(listing, out, options)
    (out / "labels.npy").unlink()
    with pytest.raises(DataError, match=r"labels\.npy: no such file; remove"):
        pack(listing, out, options)


def test_another_packing_or_a_used_folder_is_refused(people: Path, tmp_path: Path) -> None:
    pack(list_source(people), tmp_path / "out", PackOptions())
    with pytest.raises(DataError, match="holds another packing"):
        pack(list_source(people), tmp_path / "out", PackOptions(size=(16, 16)))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("")
    assert cli.main(["pack", str(people), str(tmp_path / "used")]) == 2
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.csv", "label,path\nanna,a.jpg\nbob,b.jpg\nanna,c.jpg\n"),
        ("list.csv", "a.jpg,anna\nb.jpg,bob\nc.jpg,anna\n"),
        ("list.tsv", "a.jpg\tanna\nb.jpg\tbob\nc.jpg\tanna\n"),
        ("list.txt", "a.jpg anna\nb.jpg bob\n\nc.jpg anna\n"),
    ],
)
def test_lists(name: str, text: str, tmp_path: Path) -> None:
    for k, letter in enumerate("abc"):
        (tmp_path / f"{letter}.jpg").write_bytes(encoded(k))
    (tmp_path / name).write_text(text)
    listing = list_source(tmp_path / name)
    assert (listing.names, listing.labels.tolist()) == (["anna", "bob"], [0, 1, 0])
    pack(listing, tmp_path / "out", PackOptions())
    assert images_by_class(tmp_path / "out") == {"anna": {encoded(0), encoded(2)}, "bob": {encoded(1)}}


def test_lists_of_other_programs(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(b"\xef\xbb\xbfpath,label\r\na.jpg,anna\r\n")
    assert list_source(tmp_path / "list.csv").files == [str(tmp_path / "a.jpg")]
    (tmp_path / "list.csv").write_text("file,identity\na.jpg,anna\n")
    with pytest.raises(DataError, match=r"line 1: no image is called 'file'; a header has the words path and label"):
        list_source(tmp_path / "list.csv")
    (tmp_path / "list.csv").write_text("a.jpg,0\nb.jpg,-1\n")
    with pytest.raises(DataError, match="called -1, which means not used"):
        list_source(tmp_path / "list.csv")
    for label in ("99999999999999999999", "999999999999"):
        (tmp_path / "list.csv").write_text(f"a.jpg,{label}\n")
        with pytest.raises(DataError, match=f"the label {label} is no class number"):
            list_source(tmp_path / "list.csv", keep_labels=True)


@pytest.mark.parametrize("name", [b"a\xe2\x80\xa8b", b"a\xc2\x85b", b"a\rb", b"a\nb", b"caf\xe9"])
def test_names_that_fit_no_line_of_text_are_refused(people: Path, name: bytes) -> None:
    (people / "person00").rename(people / os.fsdecode(name))
    with pytest.raises(DataError, match=r"people: the identity '.*(line break in its name|is not UTF-8); rename it"):
        list_source(people)


def test_images_that_would_be_left_out_are_refused(people: Path) -> None:
    (people / "loose.jpg").write_bytes(encoded(1))
    with pytest.raises(DataError, match=r"loose\.jpg: lies next to the identity folders"):
        list_source(people)
    (people / "loose.jpg").unlink()
    write_tar(people / "x.tar", {"k1.jpg": encoded(1), "k1.cls": b"7"})
    with pytest.raises(DataError, match=r"holds tar files \(x\.tar\) and other images .*person00"):
        list_source(people)


def test_mxnets_lists_and_numbered_classes(tmp_path: Path) -> None:
    (tmp_path / "a.lst").write_text("0\t10.000000\tx/a.jpg\n1\t9.000000\tb.jpg\n2\t10.000000\tc.jpg\n")
    listing = list_source(tmp_path / "a.lst", root=tmp_path / "images")
    assert listing.names == ["9", "10"]  # in order of the numbers, not of the letters
    assert listing.labels.tolist() == [1, 0, 1]
    assert listing.files[0] == str(tmp_path / "images" / "x" / "a.jpg")
    kept = list_source(tmp_path / "a.lst", keep_labels=True)
    assert (kept.labels.tolist(), kept.num_classes, kept.names) == ([10, 9, 10], 11, None)


SUFFIXES = {
    ".jfif": "JPEG",
    ".avif": "AVIF",
    ".gif": "GIF",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".bmp": "BMP",
    ".ppm": "PPM",
}


def test_all_suffixes_are_taken_or_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """39 identities, seven with one image of another suffix; and two whose only file is no image that can be read."""
    people = identity_folders(tmp_path / "people", 32, 1)
    for suffix, kind in SUFFIXES.items():
        (people / f"only{suffix[1:]}").mkdir()
        (people / f"only{suffix[1:]}" / f"x{suffix.upper()}").write_bytes(encoded(7, kind=kind))
    for name in ("x.cr2", "y.svg"):
        (people / f"lost{name[0]}").mkdir()
        (people / f"lost{name[0]}" / name).write_bytes(b"?")
    (people / "person00" / "about.txt").write_text("x")
    (people / "void").mkdir()
    assert cli.main(["pack", str(people), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "39 images of 39 classes" in said
    assert "1 .gif file(s): of an animation, the first frame" in said
    assert "not taken: 1 .cr2, 1 .svg, 1 .txt" in said
    assert "without an image that is taken: 3 (lostx, losty, void)" in said
    assert open_dataset(tmp_path / "out").num_classes == 39
    report = check(open_dataset(tmp_path / "out"), deep=True)
    assert not report.damage


def test_tars_say_what_they_leave_out(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"7/k.jpg": encoded(1), "7/k.json": b"{}", "8/j.svg": b"?"})
    listing = list_source(tmp_path / "x.tar")
    assert (listing.not_taken, listing.without_images) == ({".json": 1, ".svg": 1}, ["8"])


@pytest.mark.parametrize(
    ("name", "text", "labels"),
    [
        ("a.csv", "path,label\na.jpg,0.0\nb.jpg,0\nc.jpg,1.0\n", ["0", "0", "1"]),
        ("a.lst", "0\t1e+03\ta.jpg\n1\t1000.000000\tb.jpg\n2\t2.\tc.jpg\n", ["1000", "1000", "2"]),
        ("a.csv", "a.jpg,007\nb.jpg,7\nc.jpg,07.0\n", ["7", "7", "7"]),
        ("a.csv", "a.jpg,007\nb.jpg,010\nc.jpg,007\n", ["007", "010", "007"]),  # written alike: the name stays
        ("a.csv", "a.jpg,1e3\nb.jpg,1000\nc.jpg,anna\n", ["1e3", "1000", "anna"]),  # names
        ("a.csv", "a.jpg,007\nb.jpg,7\nc.jpg,nan\n", "line 3: the label 'nan' is no whole number"),
        ("a.csv", "a.jpg,Nan\nb.jpg,nan\n", ["Nan", "nan"]),
        ("a.csv", "a.jpg,1\nb.jpg,0.5\n", "line 2: the label '0.5' is no whole number"),
        ("a.csv", "a.jpg,1e999\n", "line 1: the label '1e999' is no whole number"),
        ("a.lst", "1\tp/a.jpg\t5\n1\tp/b.jpg\t5\t1\t2\t3\t4\n", ["5", "5"]),  # InsightFace: aligned, path, label
        ("a.txt", "1\tp/a.jpg\t5\n", ["5"]),
        ("a.lst", "1\tp/a.jpg\t5\n0\tp/b.jpg\t6\n", "line 2: the image 'p/b.jpg' is marked as not aligned"),
        ("a.lst", "0\t0.0\t5.0\ta.jpg\n", "line 1: has 2 labels between the index and the path 'a.jpg'"),
        ("a.txt", "here/my face.jpg 3\nb.jpg 4\n", ["3", "4"]),
        ("a.txt", "b.jpg 4\nmissing face.jpg 3\n", "line 2: no image is called 'missing face.jpg'"),
    ],
)
def test_lists_of_others(name: str, text: str, labels: list[str] | str, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "my face.jpg").write_bytes(encoded(1))
    (tmp_path / name).write_text(text)
    if isinstance(labels, str):
        with pytest.raises(DataError, match=re.escape(labels)):
            list_source(tmp_path / name)
        return
    listing = list_source(tmp_path / name)
    assert listing.names is not None
    assert [listing.names[label] for label in listing.labels] == labels
    assert all(Path(file).suffix == ".jpg" for file in listing.files)


@pytest.mark.parametrize(("text", "message"), [("a.jpg\n", "line 1: expected a path and a label"), ("", "no images")])
def test_lists_that_cannot_be_read(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        list_source(tmp_path / "list.csv")
    (tmp_path / "list.csv").write_text("a.jpg,anna\n")
    with pytest.raises(DataError, match="found the label 'anna'"):
        list_source(tmp_path / "list.csv", keep_labels=True)


HINTS = {
    "swapped": ("list.txt", "0 here/a.jpg\n0 here/b.jpg\n", "line 1: no image is called '0'; column 2 names one"),
    "semicolons": (
        "list.csv",
        "path;label\nhere/a.jpg;0\n",
        "line 1: expected a path and a label, found 'path;label'; cells",
    ),
    "semicolons, no header": ("list.csv", "here/a.jpg;0\n", "cells are separated by a comma or a tab, not by `;`"),
    "a comment": ("list.txt", "# faces\nhere/a.jpg 0\n", "line 1: no image is called '#'; a list has no comments"),
    "a later comment": (
        "list.csv",
        "here/a.jpg,0\n# here/b.jpg,1\n",
        "line 2: no image is called '# here/b.jpg'; a list",
    ),
    "backslashes": (
        "list.csv",
        "path,label\nhere\\a.jpg,0\n",
        "; it has the backslashes of Windows: write / instead",
    ),
    "an unknown header": ("list.csv", "file,identity\nhere/a.jpg,0\n", "a header has the words path and label"),
    "another root": ("list.csv", "path,label\nhere/a.jpg,0\nthere/b.jpg,1\n", "line 3: {}/there/b.jpg: no such file"),
    "absolute": ("list.txt", "/nonexistent/0.jpg\t0\n", "list.txt: line 1: /nonexistent/0.jpg: no such file"),
}


@pytest.mark.parametrize("kind", HINTS)
def test_a_list_that_names_no_image_says_which_line_and_what_is_probably_the_matter(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, text, words = HINTS[kind]
    (tmp_path / "here").mkdir()
    for letter in "ab":
        (tmp_path / "here" / f"{letter}.jpg").write_bytes(encoded(1))
    (tmp_path / name).write_text(text)
    assert cli.main(["pack", str(tmp_path / name), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert words.format(tmp_path) in said
    assert f"{name}: line " in said


def test_a_number_in_several_forms_is_said_to_be_one_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for letter in "abc":
        (tmp_path / f"{letter}.jpg").write_bytes(encoded(1))
    (tmp_path / "list.csv").write_text("a.jpg,007\nb.jpg,7\nc.jpg,08\n")
    assert cli.main(["pack", str(tmp_path / "list.csv"), str(tmp_path / "out")]) == 0
    assert "numbers written in several forms are one class each: 1 (007 and 7 as 7)" in capsys.readouterr().out
    assert (tmp_path / "out" / "classes.txt").read_text() == "7\n08\n"


def test_missing_images_of_a_list_can_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(1))
    (tmp_path / "list.csv").write_text("a.jpg,anna\nb.jpg,bob\n")
    pack(list_source(tmp_path / "list.csv"), tmp_path / "out", PackOptions(skip_damaged=True))
    assert f"list.csv: line 2: {tmp_path / 'b.jpg'}: no such file" in (tmp_path / "out" / "skipped.txt").read_text()


def test_a_raw_folder_says_what_it_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pixels, "image_suffixes", lambda: frozenset({".jpeg"}))
    monkeypatch.setattr(store, "image_suffixes", lambda: frozenset({".jpeg"}))
    people = identity_folders(tmp_path / "people", 2, 1)
    (people / "lost").mkdir()
    for name in ("person00/x.heic", "lost/y.heic", "lost/z.svg"):
        (people / name).write_bytes(b"?")
    assert open_dataset(people).num_classes == 2
    said = f"{people}: not taken: 2 .heic, 1 .svg (.heic is read where pillow-heif is installed); identities without"
    assert said in caplog.text
    assert "identities without an image that is taken: 1 (lost)" in caplog.text
    only = tmp_path / "only"
    (only / "lost").mkdir(parents=True)
    (only / "lost" / "y.heic").write_bytes(b"?")
    for read in (open_dataset, list_source):
        with pytest.raises(DataError, match=r"images?.*; not taken: 1 \.heic \(\.heic is read where pillow-heif"):
            read(only)


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif", reason="needs pillow-heif")
    assert ".heic" in pixels.image_suffixes()
    picture = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint16).astype(np.uint8).reshape(64, 64, 3))
    (tmp_path / "people" / "anna").mkdir(parents=True)
    (tmp_path / "people" / "anna" / "a.heic").write_bytes(b"cut")
    with pytest.raises(DataError, match=r"a\.heic: "):
        pack(list_source(tmp_path / "people"), tmp_path / "cut", PackOptions())
    heif.from_pillow(picture).save(tmp_path / "people" / "anna" / "a.heic", quality=100)
    pack(list_source(tmp_path / "people"), tmp_path / "out", PackOptions())
    for dataset in (open_dataset(tmp_path / "people"), open_dataset(tmp_path / "out")):
        assert (len(dataset), dataset.decode(0).shape) == (1, (64, 64, 3))
    assert check(open_dataset(tmp_path / "people"), deep=True).damage == []


def test_an_image_that_git_lfs_keeps_elsewhere_is_named_as_such(tmp_path: Path) -> None:
    people = identity_folders(tmp_path / "people", 2, 1)
    next(people.rglob("*.jpeg")).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n")
    report = check(open_dataset(people))
    assert "it is a Git LFS pointer, not the image itself; run `git lfs pull`" in report.damage[-1]


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_webdataset_tars(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    write_tar(
        tmp_path / "tars" / "0.tar", {"k1.jpg": encoded(1), "k1.cls": b"7", "k2.cls": b"12", "k2.jpg": encoded(2)}
    )
    write_tar(tmp_path / "tars" / "1.tar", {"7/k3.png": encoded(3, kind="PNG"), "7/k3.json": b"{}"})
    listing = list_source(tmp_path / "tars")
    assert listing.names == ["7", "12"]
    pack(listing, tmp_path / "out", PackOptions())
    expected = {"7": {encoded(1), encoded(3, kind="PNG")}, "12": {encoded(2)}}
    assert images_by_class(tmp_path / "out") == expected
    (tmp_path / "tars" / "1.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match=r"1\.tar: cannot be read"):
        list_source(tmp_path / "tars")


def test_resizing_and_encoding(tmp_path: Path) -> None:
    people = identity_folders(tmp_path / "people", 2, 3, (20, 30))
    (people / "person00" / "grey.pgm").write_bytes(b"P5 30 20 255\n" + bytes(600))
    kept, small, jpeg = (tmp_path / name for name in ("kept", "small", "jpeg"))
    pack(list_source(people), kept, PackOptions())
    starts = sorted({open_dataset(kept).read(record)[:2] for record in range(7)})
    assert starts == [b"\x89P", b"\xff\xd8"]  # the PGM became a PNG
    pack(list_source(people), small, PackOptions(size=(16, 16)))
    dataset = open_dataset(small)
    assert all(decode_image(dataset.read(record), None).shape == (16, 16, 3) for record in range(7))
    assert dataset.info.uniform
    pack(list_source(people), jpeg, PackOptions(encode="jpeg", quality=50))
    assert all(open_dataset(jpeg).read(record)[:2] == b"\xff\xd8" for record in range(7))


def test_16_bits_are_scaled_and_both_loaders_agree(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    folder = tmp_path / "people" / "one"
    folder.mkdir(parents=True)
    for name in ("a.png", "b.tif"):
        Image.fromarray(grey).save(folder / name)
    (folder / "c.pgm").write_bytes(b"P5 32 32 65535\n" + grey.astype(">u2").tobytes())
    expected = np.rint(grey / 257).astype(np.uint8)
    raw = (folder / "a.png").read_bytes()
    assert (decode_image(raw, None) == expected[:, :, None]).all()
    pack(list_source(tmp_path / "people"), tmp_path / "out", PackOptions())
    dataset = open_dataset(tmp_path / "out")
    for record in range(3):
        assert dataset.read(record)[24] == 8
        assert (dataset.decode(record) == expected[:, :, None]).all()
    (batch,) = take(loader_of(open_dataset(tmp_path / "people"), "dali", workers=0, batch_size=3), 1)
    at = batch.records.tolist().index(0)
    np.testing.assert_allclose((batch.images[at, 0].numpy() * 0.5 + 0.5) * 255, expected, atol=0.01)
    Image.fromarray(grey.astype(np.float32)).save(folder / "a.tif")
    listing = Listing([str(folder / "a.tif")], np.array([[0, -1]]), np.array([0]), ["one"], 1)
    with pytest.raises(DataError, match="32-bit numbers"):
        pack(listing, tmp_path / "bad", PackOptions())


@pytest.mark.parametrize(
    "words", [["--part-records", "-5"], ["--seed", "-1"], ["--processes", "-1"], ["--quality", "0"]]
)
def test_numbers_out_of_range_are_refused(people: Path, tmp_path: Path, words: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["pack", str(people), str(tmp_path / "out"), *words])


def test_a_deviation_of_zero_and_an_unknown_quality_are_refused(people: Path, tmp_path: Path) -> None:
    assert cli.main(["pack", str(people), str(tmp_path / "out"), "--std", "0", "0", "0"]) == 2
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="`quality` 1000: from 1 to 100"):
        PackOptions(quality=1000)
    for wrong in ({"std": (0.5, -1.0, 0.5)}, {"mean": (0.5, float("nan"), 0.5)}):
        with pytest.raises(ConfigError, match="deviations above 0"):
            PackOptions(**wrong)
    pack(list_source(people), tmp_path / "out", PackOptions())
    described = unsealed(tmp_path / "out") / "dataset.yaml"
    described.write_text(described.read_text().replace("std: [0.5,", "std: [0.0,"))
    with pytest.raises(DataError, match=r"dataset\.yaml: std\.0"):
        open_dataset(tmp_path / "out")


def test_mixed_sizes_are_described_as_such(tmp_path: Path) -> None:
    people = identity_folders(tmp_path / "people", 2, 3)
    (people / "person00" / "large.jpg").write_bytes(encoded(9, (48, 48)))
    pack(list_source(people), tmp_path / "out", PackOptions())
    assert not open_dataset(tmp_path / "out").info.uniform


def test_damaged_images_stop_or_are_listed(people: Path, tmp_path: Path) -> None:
    for name, data in (("cut.jpg", encoded(1)[:500]), ("no.png", b"no image")):
        (people / "person01" / name).write_bytes(data)
    with pytest.raises(DataError, match=r"person01/(cut\.jpg|no\.png): .*`skip_damaged`"):
        pack(list_source(people), tmp_path / "out", PackOptions())
    assert not list((tmp_path / "out").glob("*train*"))
    result = pack(list_source(people), tmp_path / "most", PackOptions(skip_damaged=True))
    assert (result.records, result.skipped) == (28, 2)
    skipped = (tmp_path / "most" / "skipped.txt").read_text()
    assert "cut.jpg" in skipped
    assert "no.png" in skipped
    dataset = open_dataset(tmp_path / "most")
    assert images_by_class(tmp_path / "most")["person01"] == {
        encoded(100 + k, kind="PNG" if k % 3 == 2 else "JPEG") for k in range(7)
    }
    assert [dataset.read(record) != b"" for record in range(28)] == [True] * 28


def test_bytes_after_the_end_marker_are_no_damage(people: Path, tmp_path: Path) -> None:
    odd = encoded(77) + b"camera maker's notes"
    (people / "person00" / "odd.jpg").write_bytes(odd)
    pack(list_source(people), tmp_path / "out", PackOptions())
    assert odd in images_by_class(tmp_path / "out")["person00"]


def test_insightface_layout_is_read_back(people: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli.main(["pack", str(people), str(out), "--layout", "insightface"]) == 0
    assert images_by_class(out) == images_in(people)
    raw = (out / "train.rec").read_bytes()
    records = []
    for offset in recordio.scan(out / "train.rec"):
        records.append(recordio.decode_record(recordio.unframe(raw, offset)[0]))
    assert records[0].labels == (29.0, 33.0)
    assert [record.labels for record in records[29:]] == [(1.0 + 7 * k, 8.0 + 7 * k) for k in range(4)]
    for made in ("dataset.yaml", "labels.npy", "train.offsets.npy", "pack.json", "classes.txt"):
        (out / made).unlink()
    bare = open_dataset(unsealed(out))  # as any other tool's file
    assert bare.labels.tolist() == [0] * 7 + [1] * 7 + [2] * 7 + [3] * 7
    assert bare.info.image_size == (32, 32)


def test_figures_as_json(people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pack", str(people), str(tmp_path / "out"), "--json", "-"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["records"], figures["classes"], figures["complete"]) == (28, 4, True)


def test_nothing_to_pack(tmp_path: Path) -> None:
    assert cli.main(["pack", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    (tmp_path / "empty").mkdir()
    assert cli.main(["pack", str(tmp_path / "empty"), str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_orientation_by_exif_is_the_same_everywhere(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    Image.fromarray(np.tile(np.arange(0, 240, 8, np.uint8)[None, :, None], (20, 1, 3))).save(out, "JPEG", exif=exif)
    assert decode_image(out.getvalue(), None).shape == (30, 20, 3)
    listing = Listing([str(tmp_path / "turned.jpg")], np.array([[0, -1]]), np.array([0]), ["one"], 1)
    (tmp_path / "turned.jpg").write_bytes(out.getvalue())
    pack(listing, tmp_path / "out", PackOptions())
    dataset = open_dataset(tmp_path / "out")
    assert dataset.info.image_size == (30, 20)
    for kind in ("dali", "torch"):
        (batch,) = take(loader_of(dataset, kind, workers=0), 1)
        pixels = dataset.decode(0).transpose(2, 0, 1).astype(np.float32)
        np.testing.assert_allclose(batch.images[0].numpy(), (pixels / 255 - 0.5) / 0.5, atol=1e-5)
