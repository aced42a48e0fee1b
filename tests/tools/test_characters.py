"""`lce characters`: which pictures are left out, who is in which set, archives, and a stop in between; small fonts."""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tools.fonts import FIRST, debian_package, typeface
from tools import cli
from tools.pictures import building, rendering
from tools.pictures.building import Recipe, choose
from tools.pictures.drawing import Pen, digest, telling
from tools.pictures.rendering import Sheet, coverage
from tools.pictures.typefaces import CATALOGUE, find
from trainer.data import open_dataset
from trainer.errors import DataError

COUNT = 60
SMALL = (
    "--script",
    "hangul",
    "--classes",
    "20",
    "--validation",
    "5",
    "--unseen",
    "10",
    "--seen",
    "4",
    "--processes",
    "1",
)
FONTS = ("unifont.otf", "UnBatang.ttf", "UnDotum.ttf", "UnGraphic.ttf", "UnPilgi.ttf")
LIMITS = ("--min-typefaces", "3", "--max-typefaces", "3", "--held-typefaces", "2")


@pytest.fixture(scope="module")
def fonts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five typefaces: a file, a Debian package with two, a wheel with two."""
    folder = tmp_path_factory.mktemp("fonts")
    data = {name: typeface(COUNT, lift=20 * k) for k, name in enumerate(FONTS)}
    (folder / FONTS[0]).write_bytes(data[FONTS[0]])
    debian_package(folder / "un.deb", {f"./usr/share/fonts/{name}": data[name] for name in FONTS[1:3]})
    with zipfile.ZipFile(folder / "more.whl", "w") as wheel:
        for name in FONTS[3:]:
            wheel.writestr(f"package/{name}", data[name])
    return folder


def make(out: Path, fonts: Path, *more: str) -> int:
    """Run the command."""
    return cli.main(["characters", str(out), "--fonts", str(fonts), *SMALL, *LIMITS, *more])


NAMING = {"pack.json", "old.yaml", "new.yaml"}
"""Files that name temporary files or the data set by its path."""


def names_of(folder: Path) -> set[str]:
    """The characters of a data set."""
    return set((folder / "classes.txt").read_text().split())


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_sets_are_disjoint_and_hold_what_the_figures_say(tmp_path: Path, fonts: Path) -> None:
    out = tmp_path / "out"
    assert make(out, fonts, "--json", str(tmp_path / "counts.json")) == 0
    figures = json.loads((tmp_path / "counts.json").read_text())
    assert figures["characters"] == COUNT
    sets = {path.parent.name: open_dataset(path.parent) for path in out.glob("*/dataset.yaml")}
    assert {name: (s.num_classes, len(s)) for name, s in sets.items()} == {
        name: (count["classes"], count["images"]) for name, count in figures["sets"].items()
    }
    assert figures["sets"]["train"] == {"classes": 20, "images": 60}
    assert figures["sets"]["unseen-typefaces"] == {"classes": 10, "images": 20}
    people = {name: names_of(out / name) for name in sets}
    assert people["unseen"] == people["unseen-typefaces"]
    assert people["seen"] < people["train"]
    assert not people["train"] & (people["unseen"] | people["validation"])
    assert not people["unseen"] & people["validation"]
    held = {face["name"] for face in figures["typefaces"] if face["held"]}
    shown = {name: faces_of(out / name) for name in sets}
    assert shown["unseen-typefaces"] == held
    assert all(not shown[name] & held for name in sets if name != "unseen-typefaces")
    assert not (out / ".work").exists()


def faces_of(folder: Path) -> set[str]:
    """The typefaces of a data set."""
    names = (folder / "typefaces.txt").read_text().split()
    return {names[k] for k in np.unique(np.load(folder / "typefaces.npy"))}


def test_pictures_belong_to_their_class_and_typeface(tmp_path: Path, fonts: Path) -> None:
    out = tmp_path / "out"
    assert make(out, fonts) == 0
    train = open_dataset(out / "train")
    names = (out / "train" / "classes.txt").read_text().split()
    faces = (out / "train" / "typefaces.txt").read_text().split()
    pens = {one.typeface.name: Pen(one.read(), 32, one.index) for one in find([fonts], "hangul")}
    for record, k in enumerate(np.load(out / "train" / "typefaces.npy")):
        expected = pens[faces[k]].draw(int(names[train.labels[record]][2:], 16))
        assert np.array_equal(train.decode(record)[..., 0], expected), record
    unseen = open_dataset(out / "unseen")  # varied: noise everywhere
    assert len(np.unique(unseen.decode(0))) > len(np.unique(train.decode(0)))


def test_split_tables_share_out_classes_and_typefaces(tmp_path: Path, fonts: Path) -> None:
    out = tmp_path / "out"
    assert make(out, fonts, "--old-share", "0.4") == 0
    typefaces = np.load(out / "train" / "typefaces.npy")
    for kind in ("extended-class", "open-class", "extended-typeface", "open-typeface"):
        old, new = (np.load(out / "splits" / kind / f"{name}.npy") for name in ("old", "new"))
        assert (old >= 0).any()
        assert (((old >= 0) & (new >= 0)) == ((old >= 0) if kind.startswith("extended") else False)).all()
        if kind.endswith("typeface"):
            old_faces, new_faces = (set(typefaces[table >= 0]) for table in (old, new))
            assert len(old_faces) == 1
            assert bool(old_faces & new_faces) == kind.startswith("extended")
        table = open_dataset(out / "train", out / "splits" / kind / "new.npy")
        assert table.num_classes == new.max() + 1


def test_the_same_seed_gives_the_same_bytes_and_held_out_ones_do_not_depend_on_it(tmp_path: Path, fonts: Path) -> None:
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert make(tmp_path / name, fonts, "--seed", seed) == 0
    same, again, other = (content(tmp_path / name) for name in "abc")
    differing = {file for file in same if same[file] != again[file]}
    assert {Path(file).name for file in differing} <= NAMING
    assert same["unseen/train.rec"] == other["unseen/train.rec"]
    assert same["validation/train.rec"] == other["validation/train.rec"]
    assert same["train/train.rec"] != other["train/train.rec"]


def test_a_stopped_making_continues_and_gives_the_same(
    tmp_path: Path, fonts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make(tmp_path / "whole", fonts) == 0
    drawn: list[str] = []
    real_pack, real_draw = building.pack, rendering._render_one

    def stopped(listing: Any, out: Path, options: Any, **more: Any) -> Any:
        if out.name == "unseen":
            raise KeyboardInterrupt
        return real_pack(listing, out, options, **more)

    def noted(found: Any, script: str, size: int, folder: Path) -> None:
        drawn.append(found.typeface.name)
        real_draw(found, script, size, folder)

    monkeypatch.setattr(building, "pack", stopped)
    assert make(tmp_path / "twice", fonts) == cli.EXIT_INTERRUPTED
    assert not (tmp_path / "twice" / "characters.json").exists()
    monkeypatch.setattr(building, "pack", real_pack)
    stamp = (tmp_path / "twice" / "train" / "train.rec").stat().st_mtime_ns
    assert make(tmp_path / "twice", fonts) == 0
    assert (tmp_path / "twice" / "train" / "train.rec").stat().st_mtime_ns == stamp
    whole, twice = content(tmp_path / "whole"), content(tmp_path / "twice")
    assert {f for f in whole if not f.endswith("pack.json")} == {f for f in twice if not f.endswith("pack.json")}
    assert all(twice[file] == whole[file] for file in whole if Path(file).name not in NAMING)


def test_a_finished_making_is_left_alone_and_another_one_is_refused(
    tmp_path: Path, fonts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make(tmp_path / "out", fonts) == 0
    before = content(tmp_path / "out")
    assert make(tmp_path / "out", fonts, "--json", "-") == 0
    assert json.loads(capsys.readouterr().out.partition("\n{")[2].join(["{", ""]))["characters"] == COUNT
    assert content(tmp_path / "out") == before
    assert make(tmp_path / "out", fonts, "--size", "40") == cli.EXIT_USAGE
    assert "holds other characters" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("")
    assert make(tmp_path / "mine", fonts) == cli.EXIT_USAGE
    assert "is not empty" in capsys.readouterr().err


def test_a_blank_a_box_and_a_shared_picture_tell_nothing() -> None:
    pen = Pen(typeface(20, twins=2, blanks=1, shared=2), 32)
    codes = sorted(pen.known())
    assert [code - FIRST for code in codes] == list(range(1, 20))  # 0, 20 and 21 share a glyph
    pictures = [pen.draw(code) for code in codes]
    box = digest(pen.draw("\U0010fffe"))
    assert box in pen.meaningless()
    kept = telling([digest(picture) for picture in pictures] + [box], pen.meaningless())
    assert np.flatnonzero(kept).tolist() == list(range(16))  # not the two twins, the blank, the box


def test_the_same_picture_in_a_second_typeface_counts_once() -> None:
    def sheet(codes: list[int], marks: list[int]) -> Sheet:
        digests = np.repeat(np.array(marks, np.uint8)[:, None], 16, 1)
        return Sheet(Path("x"), np.array(codes), np.zeros((len(codes), 2), np.int64), digests)

    codes, rows = coverage([sheet([5, 7], [1, 2]), sheet([5, 6, 7], [1, 9, 3]), sheet([7], [2])])
    assert codes.tolist() == [5, 6, 7]
    assert rows.tolist() == [[0, -1, -1], [-1, 1, -1], [1, 2, -1]]


def test_choice_keeps_to_the_numbers_of_typefaces() -> None:
    rng = np.random.default_rng(1)
    rows = np.where(rng.random((400, 9)) < 0.7, 0, -1)
    recipe = Recipe(least=5, most=4, held_typefaces=2, validation=20, unseen=50, seen=10)
    choice = choose(np.arange(400), rows, recipe)
    assert len(choice.codepoints) == ((rows >= 0).sum(1) >= 5).sum()
    train = choice.sets["train"].sum(1)
    assert train[train > 0].min() >= 2
    assert train.max() == 4
    assert choice.held.sum() == 2
    assert not choice.sets["train"][:, choice.held].any()
    assert not choice.sets["unseen-typefaces"][:, ~choice.held].any()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(least=10), "no character is drawn by 10 of the 9 typefaces"),
        (Recipe(least=3, held_typefaces=8), "--held-typefaces 8"),
        (Recipe(least=3, validation=100, unseen=301), "400 characters can be used"),
        (Recipe(least=3, classes=10, validation=5, unseen=5, seen=11), "--seen 11"),
    ],
)
def test_too_few_typefaces_or_characters_are_refused(recipe: Recipe, message: str) -> None:
    with pytest.raises(DataError, match=message):
        choose(np.arange(400), np.zeros((400, 9), np.int64), recipe)


def test_typefaces_are_found_by_script_and_the_first_place_wins(tmp_path: Path, fonts: Path) -> None:
    assert [one.typeface.name for one in find([fonts], "hangul")] == [
        "unifont", "un-batang", "un-dotum", "un-graphic", "un-pilgi",
    ]  # fmt: skip
    assert [one.typeface.name for one in find([fonts], "han")] == ["unifont"]
    shutil.copy(fonts / "unifont.otf", tmp_path)
    assert find([tmp_path, fonts], "both")[0].path == tmp_path / "unifont.otf"
    assert len({face.name for face in CATALOGUE}) == len(CATALOGUE)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: p.write_bytes(b"!<arch>\n" + b" " * 100), "cannot be read"),
        (lambda p: p.write_bytes(b"PK"), "is no Debian package"),
        (lambda p: debian_package(p, {}, kind="zst"), "a compression that Python lacks"),
    ],
)
def test_a_package_that_cannot_be_read_is_named(tmp_path: Path, write: Any, message: str) -> None:
    write(tmp_path / "a.deb")
    with pytest.raises(DataError, match=rf"a\.deb: .*{message}.*dpkg-deb -x"):
        find([tmp_path], "both")


def test_wrong_use_is_refused(tmp_path: Path, fonts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        ([], "say where"),
        ([str(tmp_path / "o"), "--fonts", str(tmp_path)], "apt-get install fonts-unifont"),
        ([str(tmp_path / "o"), "--fonts", str(tmp_path / "none")], "no such folder"),
        ([str(tmp_path / "o"), "--min-typefaces", "5", "--max-typefaces", "4"], "in order"),
        ([str(tmp_path / "o"), "--old-share", "1"], "between 0 and 1"),
        ([str(tmp_path / "o"), "--size", "2"], "from 8 to 512"),
    ):
        assert cli.main(["characters", *words]) == cli.EXIT_USAGE, words
        assert message in capsys.readouterr().err
    assert cli.main(["characters", "--list", "--fonts", str(fonts), "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert sum(row["found"] is not None for row in rows) == 5
    assert {row["licence"] for row in rows} > {"OFL-1.1"}


def test_a_damaged_font_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "unifont.otf").write_bytes(b"no font")
    assert make(tmp_path / "out", tmp_path / "unifont.otf") == cli.EXIT_USAGE
    assert "cannot be read as a font" in capsys.readouterr().err
