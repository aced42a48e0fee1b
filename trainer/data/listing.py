"""What `lce pack` can read: folders of identities, lists of files, tar files; each becomes one listing of images."""

import csv
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from trainer.data.index import MOST_CLASSES
from trainer.data.pixels import image_suffixes
from trainer.data.store import image_files, left_out, left_out_text
from trainer.errors import DataError
from trainer.reading import open_regular, read_text


@dataclass(frozen=True)
class Listing:
    """N images and their identities.

    Attributes:
        files: (N,) where each image lies: a file, or the tar that holds it.
        spans: (N, 2) int64, first byte and length within the file; length −1: the whole file.
        labels: (N,) int64, class numbers.
        names: the classes' names, by number; None where the labels were given as numbers and kept.
        num_classes: C.
        lines: (N,) int64, of a list: the number of each image's line; None: the source is no list.
        source: the list, folder or tar.
        merged: of a list, classes whose number is written in several forms: the name that they got, and the forms.
        not_taken: files in identity folders or tars whose suffix is not that of an image that can be read here: their
            count by suffix.
        without_images: the identities that have a folder but no image.
    """

    files: list[str]
    spans: NDArray[np.int64]
    labels: NDArray[np.int64]
    names: list[str] | None
    num_classes: int
    not_taken: dict[str, int] = field(default_factory=dict)
    without_images: list[str] = field(default_factory=list)
    lines: NDArray[np.int64] | None = None
    source: Path = Path()
    merged: dict[str, list[str]] = field(default_factory=dict)

    def where(self, image: int) -> str:
        """The line of the list that names an image, for messages; empty: the source is no list."""
        return "" if self.lines is None else f"{self.source}: line {self.lines[image]}: "

    def __len__(self) -> int:
        return len(self.files)

    def digest(self) -> str:
        """A hash of the whole listing, to tell whether a second run packs the same."""
        hasher = hashlib.blake2b(digest_size=16)
        for file in self.files:
            hasher.update(file.encode("utf-8", "surrogateescape") + b"\0")
        hasher.update(self.spans.tobytes() + self.labels.tobytes() + json.dumps(self.names).encode())
        return hasher.hexdigest()


Entry = tuple[str, str, int, int]  # identity, file, first byte, length


def list_source(source: Path, keep_labels: bool = False, root: Path | None = None) -> Listing:
    """List a source: a folder of identity folders, a .csv/.tsv/.txt/.lst list, a .tar file, or a folder of .tar files.

    Args:
        source: what to list.
        keep_labels: the identities are numbers ≥ 0 and stay what they are; otherwise identities are numbered in order
            of their names (as numbers where all of them are).
        root: the folder that a list's relative paths start from; the list's own folder by default.

    Raises:
        DataError: nothing there, nothing in it, images that no identity or tar file holds, a line that cannot be read,
            an identity that is −1 or whose name does not fit a line of UTF-8, or that is no number (keep_labels).
    """
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    others: list[tuple[str, Path]] = []
    listed = None if source.is_dir() or source.suffix == ".tar" else _lines(source, root or source.parent)
    entries = list(_entries(source, others)) if listed is None else listed.entries
    if not entries:
        what = "holds no images; expected one folder of images per identity, a list of files, or tar files"
        raise DataError("; ".join([f"{source}: {what}", *left_out_text(*left_out(others, set()))[:1]]))
    identities = [entry[0] for entry in entries]
    names, labels = _number(identities, keep_labels, source)
    spans = np.array([entry[2:] for entry in entries], np.int64)
    classes = len(names) if names is not None else int(labels.max()) + 1
    not_taken, lost = left_out(others, set(identities))
    return Listing(
        [entry[1] for entry in entries],
        spans,
        labels,
        names,
        classes,
        not_taken,
        lost,
        None if listed is None else np.array(listed.numbers, np.int64),
        source,
        {} if listed is None else listed.merged,
    )


def _entries(source: Path, others: list[tuple[str, Path]]) -> Iterator[Entry]:
    if not source.is_dir():
        yield from _tar(source, others)
        return
    tars = sorted(source.glob("*.tar"))
    _refuse_strays(source, tars)
    if tars:
        for tar in tars:
            yield from _tar(tar, others)
    else:
        for identity, file in image_files(source, others):
            yield identity, str(file), 0, -1


def _refuse_strays(source: Path, tars: list[Path]) -> None:
    """Raise :class:`DataError` when a folder holds images that are left out: loose ones, or some next to tar files."""
    loose = (p for p in source.iterdir() if p.suffix.lower() in image_suffixes() and not p.name.startswith("."))
    stray = min((path for path in loose if path.is_file()), default=None)
    if not tars and stray is None:
        return
    foldered = next((file for _, file in image_files(source)), None)
    if tars and (stray or foldered):
        raise DataError(
            f"{source}: holds tar files ({tars[0].name}) and other images ({stray or foldered}); move one kind away"
        )
    if stray and foldered:
        raise DataError(f"{stray}: lies next to the identity folders; move it into the folder of its identity, or away")


def _number(identities: list[str], keep: bool, source: Path) -> tuple[list[str] | None, NDArray[np.int64]]:
    if keep:
        wrong = next((name for name in identities if not is_whole_number(name)), None)
        if wrong is not None:
            raise DataError(f"{source}: `keep_labels` needs whole numbers from 0 on, found the label {wrong!r}")
        large = next((name for name in identities if len(name) > 18 or int(name) >= MOST_CLASSES), None)
        if large is not None:
            raise DataError(f"{source}: the label {large[:20]} is no class number; they are below {MOST_CLASSES}")
        return None, np.array([int(name) for name in identities], np.int64)
    distinct = set(identities)
    names = (
        sorted(distinct, key=lambda name: (int(name), name))
        if all(map(is_whole_number, distinct))
        else sorted(distinct)
    )
    for name in names:
        _check_name(name, source)
    number = {name: index for index, name in enumerate(names)}
    return names, np.array([number[name] for name in identities], np.int64)


def _check_name(name: str, source: Path) -> None:
    """Raise :class:`DataError` unless an identity can stand on a line of classes.txt."""
    if name == "-1":
        raise DataError(f"{source}: an identity is called -1, which means not used; leave its images out or rename it")
    if name.splitlines() != [name]:
        raise DataError(f"{source}: the identity {name!r} has a line break in its name; rename it")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(f"{source}: the identity {name!r} has a name that is not UTF-8; rename it") from None


def is_whole_number(name: str) -> bool:
    """Whether a name is a number as class numbers are written: ASCII digits alone.

    >>> is_whole_number("07"), is_whole_number("-1"), is_whole_number("٣"), is_whole_number("")
    (True, False, False, False)
    """
    return name.isascii() and name.isdigit()


Line = tuple[int, str, str]  # line number, label, path


@dataclass(frozen=True)
class _List:
    """What a list says: its entries, the line of each, and the numbers that it writes in several forms."""

    entries: list[Entry]
    numbers: list[int]
    merged: dict[str, list[str]]


def _lines(source: Path, folder: Path) -> _List:
    """The lines of MXNet's .lst (index, label, path), InsightFace's (aligned, path, label); else path and label, by
    header or in order."""
    text = read_text(source, DataError, "utf-8-sig")
    delimiter = "\t" if source.suffix == ".lst" or "\t" in text else ("," if "," in text else " ")
    path_column, label_column = (2, 1) if source.suffix == ".lst" else (0, 1)
    found: list[Line] = []
    insightface = False
    for number, row in _rows(source, text, delimiter, folder):
        lower = [cell.strip().lower() for cell in row]
        if number == 1 and "path" in lower and "label" in lower:
            path_column, label_column = lower.index("path"), lower.index("label")
            continue
        if (
            not found
            and len(row) >= 3
            and row[0] in ("0", "1")
            and _is_image(row[1])
            and _number_of(row[2]) is not None
        ):
            path_column, label_column, insightface = 1, 2, True
        if len(row) <= max(path_column, label_column) or not row[path_column] or not row[label_column].strip():
            given = f"{delimiter.join(row)!r}{_hint(row, folder)}"
            raise DataError(f"{source}: line {number}: expected a path and a label, found {given}")
        _check_row(source, number, row, insightface)
        name, label = row[path_column], row[label_column].strip()
        suspect = not found or row[0].lstrip().startswith("#")
        if suspect and not (folder / name).is_file() and (hint := _hint(row, folder)):
            raise DataError(f"{source}: line {number}: no image is called {name!r}{hint}")
        if number == 1 and not _is_image(name) and not (folder / name).is_file():
            raise DataError(f"{source}: line 1: no image is called {name!r}; a header has the words path and label")
        found.append((number, label, name))
    labels, merged = _same_numbers(source, found)
    entries = [(label, str(folder / name), 0, -1) for label, (_, _, name) in zip(labels, found, strict=True)]
    return _List(entries, [number for number, _, _ in found], merged)


def _hint(row: list[str], folder: Path) -> str:
    """What is probably the matter with a line whose path names no image; empty: nothing that shows."""
    text = " ".join(row)
    if row and row[0].lstrip().startswith("#"):
        return "; a list has no comments: remove the line"
    if ";" in text:
        return "; cells are separated by a comma or a tab, not by `;`"
    if any("\\" in cell and (folder / cell.replace("\\", "/")).is_file() for cell in row):
        return "; it has the backslashes of Windows: write / instead"
    named = [number for number, cell in enumerate(row) if cell and (folder / cell).is_file()]
    if named and not _is_image(row[0]):
        return (
            f"; column {named[0] + 1} names one: the path stands first, then the label, or a header says which is which"
        )
    return ""


def _rows(source: Path, text: str, delimiter: str, folder: Path) -> Iterator[tuple[int, list[str]]]:
    """(number, cells) of each line that is not empty. Between spaces, the last cell is the label and a path may hold
    spaces itself."""
    try:
        for number, row in enumerate(csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True), 1):
            if delimiter == " " and len(row) > 2 and row[:2] != ["path", "label"]:
                path = " ".join(row[:-1])
                if not (folder / path).is_file():
                    raise DataError(
                        f"{source}: line {number}: no image is called {path!r}; it is read as a path with spaces and, "
                        "last, the label: separate them by a tab or a comma"
                    )
                row = [path, row[-1]]
            if row:
                yield number, row
    except csv.Error as error:
        raise DataError(f"{source}: cannot be read as a list: {error}") from None


def _check_row(source: Path, number: int, row: list[str], insightface: bool) -> None:
    """Raise :class:`DataError` for a line with several labels, or an image that has still to be aligned."""
    if source.suffix == ".lst" and not insightface and len(row) > 3:
        raise DataError(
            f"{source}: line {number}: has {len(row) - 2} labels between the index and the path {row[-1]!r}; one is "
            "taken: keep the index, the class and the path"
        )
    if insightface and row[0] != "1":
        raise DataError(
            f"{source}: line {number}: the image {row[1]!r} is marked as not aligned ({row[0]}); align the faces first "
            "and write 1"
        )


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in image_suffixes()


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")


def _number_of(label: str) -> Decimal | None:
    return Decimal(label) if label.isascii() and _NUMBER.fullmatch(label) else None


def _same_numbers(source: Path, lines: list[Line]) -> tuple[list[str], dict[str, list[str]]]:
    """The labels of a list, and those that are written in several forms. Where all are numbers, one number is one class
    however it is written: 0 and 0.0, 1e+03 and 1000.000000, 007 and 7. A number that all lines write alike keeps its
    form where that is digits alone: 007.

    Raises:
        DataError: a fraction, or an empty cell that became nan, among numbers.
    """
    values = {label: _number_of(label) for _, label, _ in lines}
    named = any(value is None and label.lower() != "nan" for label, value in values.items())
    if named or all(value is None for value in values.values()):
        return [label for _, label, _ in lines], {}
    for number, label, _ in lines:
        value = values[label]
        if value is None or value != value.to_integral_value() or (abs(value) >= 10**18 and not is_whole_number(label)):
            raise DataError(
                f"{source}: line {number}: the label {label!r} is no whole number, as others of the list are"
            )
    forms: dict[int, list[str]] = {}
    for label, value in values.items():
        forms.setdefault(int(value or 0), []).append(label)
    names = {
        number: written[0] if len(written) == 1 and is_whole_number(written[0]) else str(number)
        for number, written in forms.items()
    }
    merged = {names[number]: written for number, written in forms.items() if len(written) > 1}
    return [names[int(values[label] or 0)] for _, label, _ in lines], merged


def _tar(tar: Path, others: list[tuple[str, Path]]) -> Iterator[Entry]:
    """A WebDataset tar: files of one key are a sample; ``key.cls`` holds its class, else the image's folder is it."""
    images: dict[str, tuple[str, int, int]] = {}
    classes: dict[str, str] = {}
    rest: list[tuple[str, PurePosixPath]] = []
    try:
        with open_regular(tar, DataError) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                path = PurePosixPath(member.name)
                key = str(path.parent / path.name.split(".")[0])
                if path.suffix.lower() in image_suffixes():
                    if key in images:
                        raise DataError(f"{tar}: two images share the key {key}")
                    images[key] = (path.parent.name, member.offset_data, member.size)
                elif path.suffix == ".cls":
                    content = archive.extractfile(member)
                    classes[key] = content.read().decode().strip() if content else ""
                else:
                    rest.append((key, path))
    except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{tar}: cannot be read as an uncompressed tar file: {error}") from None
    others += [(classes.get(key, path.parent.name), Path(path)) for key, path in rest]
    for key, (folder, start, length) in images.items():
        identity = classes.get(key, folder)
        if not identity:
            raise DataError(f"{tar}: {key} has neither a .cls file nor a folder that names its class")
        yield identity, str(tar), start, length
