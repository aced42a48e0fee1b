"""Data sets of characters as identities: training, validation, unseen and seen characters, and unseen typefaces.

A character is an identity, its pictures in several typefaces are its images. Training pictures are clean (variation is
added while training); the others are :func:`tools.pictures.drawing.vary`-ed.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tools.pictures.drawing import vary
from tools.pictures.rendering import Sheet, coverage, encode, render
from tools.pictures.typefaces import Found
from trainer import __version__
from trainer.data import Dataset, open_dataset
from trainer.data.listing import Listing
from trainer.data.packing import PackOptions, pack
from trainer.data.splitting import SplitOptions, save_tables, split
from trainer.errors import DataError
from trainer.files import remove, replaced, write_array, write_text

SUMMARY = "characters.json"
HELD_SETS = ("validation", "unseen", "seen", "unseen-typefaces")
_WORK = ".work"
Bars = Callable[[str], AbstractContextManager[Callable[[int, int], None] | None]]
Cells = NDArray[np.bool_]  # (characters, typefaces): which pictures


@dataclass(frozen=True)
class Recipe:
    """What is made.

    Attributes:
        script: ``han``, ``hangul`` or ``both``.
        size: side of the pictures in pixels.
        classes: characters to train on; 0: all that are left.
        least, most: a character is used if so many typefaces draw it, in at most so many of them.
        held_typefaces: typefaces that nothing is trained on.
        validation, unseen, seen: characters of the sets besides ``train``; those of ``seen`` are trained on.
        old_share: the old model's share of classes, or of typefaces.
        seed: of the training characters and the old model's share. The characters of ``validation`` and ``unseen`` and
            the typefaces that are held out do not depend on it.
    """

    script: str = "both"
    size: int = 32
    classes: int = 0
    least: int = 6
    most: int = 12
    held_typefaces: int = 2
    validation: int = 400
    unseen: int = 1000
    seen: int = 400
    old_share: float = 0.3
    seed: int = 0


@dataclass(frozen=True)
class Choice:
    """Which pictures the sets consist of; rows are characters, columns are typefaces."""

    codepoints: NDArray[np.int64]
    rows: NDArray[np.int64]  # (characters, typefaces): row in the typeface's sheet; −1: it does not draw it
    held: NDArray[np.bool_]  # (typefaces,)
    sets: dict[str, Cells]


def build(found: Sequence[Found], out: Path, recipe: Recipe, processes: int, bars: Bars) -> dict[str, Any]:
    """Make the data sets, or finish what an interrupted call of the same making left.

    ``out`` gets a data set for each of ``train`` and :data:`HELD_SETS`, ``splits/KIND/`` with label tables over
    ``train``, and last ``characters.json`` with the figures that are returned.

    Args:
        found: the typefaces.
        out: made if missing.
        recipe: see there.
        processes: how many draw and write.
        bars: a progress bar of this title, as a callback (done, total).

    Returns:
        ``recipe``, ``characters`` (that enough typefaces draw), ``typefaces``, ``sets`` and ``splits`` with counts.

    Raises:
        DataError: ``out`` holds something else, too few typefaces or characters, a font that cannot be read.
    """
    summary = out / SUMMARY
    key = _claim(out, found, recipe)
    if summary.exists():
        figures: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))
        return figures
    work = out / _WORK
    with bars("drawing typefaces") as report:
        sheets = render(found, recipe.script, recipe.size, work / "sheets", processes, report or _silent)
    choice = choose(*coverage(sheets), recipe)
    listings = {"train": _clean(choice, choice.sets["train"], sheets)}
    listings |= _photographs(choice, sheets, found, work / "held.png.bin", bars)
    names = [one.typeface.name for one in found]
    counts: dict[str, dict[str, int]] = {}
    for name, (listing, typefaces) in listings.items():
        options = PackOptions(size=None, encode="keep", seed=None)
        with bars(f"packing {name}") as report:
            result = pack(listing, out / name, options, processes=processes, progress=report or _silent)
        write_array(out / name / "typefaces.npy", typefaces)
        write_text(out / name / "typefaces.txt", "".join(f"{one}\n" for one in names))
        counts[name] = {"classes": result.classes, "images": result.records}
    splits = _split(open_dataset(out / "train"), listings["train"][1], out / "splits", recipe)
    figures = {
        "key": key,
        "recipe": asdict(recipe),
        "characters": len(choice.codepoints),
        "typefaces": _about(found, choice),
        "sets": counts,
        "splits": splits,
    }
    write_text(summary, json.dumps(figures, indent=1) + "\n")
    remove(work)
    return figures


def _silent(done: int, total: int) -> None:
    """No progress bar."""


def _claim(out: Path, found: Sequence[Found], recipe: Recipe) -> str:
    """The hash of all that goes in; the folder must be new, or hold the same making."""
    hasher = hashlib.blake2b(json.dumps([__version__, asdict(recipe)]).encode(), digest_size=16)
    for one in found:
        hasher.update(f"{one.typeface.name} {one.index} {zlib.crc32(one.read())}\n".encode())
    key = hasher.hexdigest()
    try:
        for stamp in (out / SUMMARY, out / _WORK / "key"):
            if stamp.exists():
                text = stamp.read_text(encoding="utf-8")
                if (json.loads(text)["key"] if stamp.name == SUMMARY else text) != key:
                    raise DataError(f"{out}: holds other characters (other options or typefaces); remove it first")
                return key
        if out.exists() and any(out.iterdir()):
            raise DataError(f"{out}: is not empty; choose another folder")
        (out / _WORK).mkdir(parents=True)
        write_text(out / _WORK / "key", key)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{out}: cannot be used: {error}") from None
    return key


def choose(codes: NDArray[np.int64], rows: NDArray[np.int64], recipe: Recipe) -> Choice:
    """Share characters and typefaces out.

    Args:
        codes, rows: see :func:`tools.pictures.rendering.coverage`.
        recipe: see there.

    Raises:
        DataError: fewer typefaces or characters than the recipe asks for.
    """
    usable = (rows >= 0).sum(1) >= recipe.least
    codes, rows = codes[usable], rows[usable]
    drawn = rows >= 0
    if not len(codes):
        raise DataError(
            f"no character is drawn by {recipe.least} of the {rows.shape[1]} typefaces found; "
            "install more of them (lce characters --list) or lower --min-typefaces"
        )
    fixed = np.random.default_rng(0)
    wide = fixed.permutation(np.flatnonzero(drawn.mean(0) >= 0.5))
    held = np.zeros(drawn.shape[1], dtype=bool)
    held[wide[: recipe.held_typefaces]] = True
    if held.sum() < recipe.held_typefaces or drawn.shape[1] - held.sum() < 2:
        raise DataError(
            f"--held-typefaces {recipe.held_typefaces}: {len(wide)} of {drawn.shape[1]} typefaces draw half of the "
            "characters, and two must be left to train on; install more (lce characters --list) or hold fewer out"
        )
    order = fixed.permutation(len(codes))
    trained = _at_most(drawn & ~held, recipe.most, fixed)
    order = order[trained[order].sum(1) >= 2]  # one picture alone makes no pair
    aside = recipe.validation + recipe.unseen
    wanted = recipe.classes or max(1, len(order) - aside)
    if len(order) < aside + wanted or recipe.seen > wanted:
        raise DataError(
            f"{len(order)} characters can be used, but {wanted} to train on and {aside} held out are asked for "
            f"(--seen {recipe.seen}); install more typefaces (lce characters --list) or ask for fewer"
        )
    training = np.random.default_rng([recipe.seed, 1]).permutation(order[aside:])[:wanted]
    unseen = order[recipe.validation : aside]
    twice = unseen[(drawn & held)[unseen].sum(1) >= 2]
    sets = {
        "train": _cells(trained, training),
        "validation": _cells(trained, order[: recipe.validation]),
        "unseen": _cells(trained, unseen),
        "seen": _cells(trained, training[: recipe.seen]),
        "unseen-typefaces": _cells(drawn & held, twice),
    }
    return Choice(codes, rows, held, {name: cells for name, cells in sets.items() if cells.any()})


def _at_most(drawn: Cells, most: int, rng: np.random.Generator) -> Cells:
    """At most so many typefaces of each character, drawn at random."""
    lot = np.where(drawn, rng.random(drawn.shape), 2.0)
    rank = lot.argsort(1).argsort(1)
    return drawn & (rank < most)


def _cells(drawn: Cells, rows: NDArray[np.int64]) -> Cells:
    chosen = np.zeros_like(drawn)
    chosen[rows] = drawn[rows]
    return chosen


def _shuffled(cells: Cells) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Character and typeface of each cell, in one random order."""
    character, typeface = np.nonzero(cells)
    order = np.random.default_rng(0).permutation(len(character))
    return character[order], typeface[order]


def _clean(choice: Choice, cells: Cells, sheets: Sequence[Sheet]) -> tuple[Listing, NDArray[np.int64]]:
    """The clean pictures of these cells, and the typeface of each."""
    character, typeface = _shuffled(cells)
    places = list(zip(typeface.tolist(), choice.rows[character, typeface].tolist(), strict=True))
    spans = np.array([sheets[k].spans[row] for k, row in places], np.int64)
    return _numbered(choice, [str(sheets[k].path) for k, _ in places], spans, character), typeface


def _photographs(
    choice: Choice, sheets: Sequence[Sheet], found: Sequence[Found], file: Path, bars: Bars
) -> dict[str, tuple[Listing, NDArray[np.int64]]]:
    """The varied pictures of the held sets, written to ``file``; the same whatever the recipe's seed is."""
    sets = {name: choice.sets[name] for name in HELD_SETS if name in choice.sets}
    total, done = sum(int(cells.sum()) for cells in sets.values()), 0
    listings = {}
    readers = [sheet.path.open("rb") for sheet in sheets]
    try:
        with replaced(file, DataError) as partial, partial.open("wb") as out, bars("varying pictures") as report:
            for number, (name, cells) in enumerate(sets.items()):
                character, typeface = _shuffled(cells)
                spans = np.zeros((len(character), 2), np.int64)
                for i, (row, k) in enumerate(zip(character.tolist(), typeface.tolist(), strict=True)):
                    start, length = sheets[k].spans[choice.rows[row, k]].tolist()
                    readers[k].seek(start)
                    picture = np.asarray(Image.open(BytesIO(readers[k].read(length))))
                    seed = [number, int(choice.codepoints[row]), zlib.crc32(found[k].typeface.name.encode())]
                    varied = encode(vary(picture, np.random.default_rng(seed)))
                    spans[i] = out.tell(), len(varied)
                    out.write(varied)
                    done += 1
                    if report and done % 256 == 0:
                        report(done, total)
                listings[name] = _numbered(choice, [str(file)] * len(spans), spans, character), typeface
    finally:
        for reader in readers:
            reader.close()
    return listings


def _numbered(choice: Choice, files: list[str], spans: NDArray[np.int64], character: NDArray[np.int64]) -> Listing:
    classes, labels = np.unique(character, return_inverse=True)
    names = [f"U+{code:04X}" for code in choice.codepoints[classes].tolist()]
    return Listing(files, spans, labels.reshape(-1).astype(np.int64), names, len(classes))


def _split(dataset: Dataset, typefaces: NDArray[np.int64], folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Label tables for an old and a new model, by class and by typeface; their counts."""
    counts: dict[str, Any] = {}
    for kind in ("extended-class", "open-class", "extended-group", "open-group"):
        options = SplitOptions(kind, recipe.old_share, seed=recipe.seed)
        tables = split(dataset, options, typefaces)
        name = kind.replace("group", "typeface")
        made_by = f"lce characters --old-share {recipe.old_share} --seed {recipe.seed}"
        save_tables(tables, folder / name, dataset, made_by)
        counts[name] = {which: {"classes": len(t.classes), "images": t.images} for which, t in tables.items()}
    return counts


def _about(found: Sequence[Found], choice: Choice) -> list[dict[str, Any]]:
    drawn = choice.rows >= 0
    return [
        {
            "name": one.typeface.name,
            "package": one.typeface.package,
            "licence": one.typeface.licence,
            "characters": int(drawn[:, k].sum()),
            "train": int(choice.sets["train"][:, k].sum()),
            "held": bool(choice.held[k]),
        }
        for k, one in enumerate(found)
    ]
