"""What `lce pack` can read: folders of identities, lists of files, tar files; each becomes one listing of images."""

import csv
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from trainer.data.index import MOST_CLASSES
from trainer.data.store import IMAGE_SUFFIXES, image_files
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
    """

    files: list[str]
    spans: NDArray[np.int64]
    labels: NDArray[np.int64]
    names: list[str] | None
    num_classes: int

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
    entries = list(_entries(source, root))
    if not entries:
        raise DataError(
            f"{source}: holds no images; expected one folder of images per identity, a list of files, or tar files"
        )
    identities = [entry[0] for entry in entries]
    names, labels = _number(identities, keep_labels, source)
    spans = np.array([entry[2:] for entry in entries], np.int64)
    classes = len(names) if names is not None else int(labels.max()) + 1
    return Listing([entry[1] for entry in entries], spans, labels, names, classes)


def _entries(source: Path, root: Path | None) -> Iterator[Entry]:
    if source.is_dir():
        tars = sorted(source.glob("*.tar"))
        _refuse_strays(source, tars)
        if tars:
            for tar in tars:
                yield from _tar(tar)
        else:
            for identity, file in image_files(source):
                yield identity, str(file), 0, -1
    elif source.suffix == ".tar":
        yield from _tar(source)
    else:
        folder = root or source.parent
        for identity, name in _lines(source, folder):
            yield identity, str(folder / name), 0, -1


def _refuse_strays(source: Path, tars: list[Path]) -> None:
    """Raise :class:`DataError` when a folder holds images that are left out: loose ones, or some next to tar files."""
    loose = (p for p in source.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
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
        wrong = next((name for name in identities if not _is_number(name)), None)
        if wrong is not None:
            raise DataError(f"{source}: `keep_labels` needs whole numbers from 0 on, found the label {wrong!r}")
        large = next((name for name in identities if len(name) > 18 or int(name) >= MOST_CLASSES), None)
        if large is not None:
            raise DataError(f"{source}: the label {large[:20]} is no class number; they are below {MOST_CLASSES}")
        return None, np.array([int(name) for name in identities], np.int64)
    distinct = set(identities)
    names = sorted(distinct, key=lambda name: (int(name), name)) if all(map(_is_number, distinct)) else sorted(distinct)
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


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _lines(source: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """(identity, path) of each line: MXNet's .lst (index, label, path); else path and label, by header or in order."""
    text = read_text(source, DataError, "utf-8-sig")
    delimiter = "\t" if source.suffix == ".lst" or "\t" in text else ("," if "," in text else " ")
    rows = enumerate(csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True), 1)
    path_column, label_column = (2, 1) if source.suffix == ".lst" else (0, 1)
    try:
        for number, row in rows:
            if not row:
                continue
            lower = [cell.strip().lower() for cell in row]
            if number == 1 and "path" in lower and "label" in lower:
                path_column, label_column = lower.index("path"), lower.index("label")
                continue
            if len(row) <= max(path_column, label_column) or not row[path_column] or not row[label_column].strip():
                raise DataError(f"{source}: line {number}: expected a path and a label, found {delimiter.join(row)!r}")
            name, label = row[path_column], row[label_column].strip()
            if number == 1 and Path(name).suffix.lower() not in IMAGE_SUFFIXES and not (folder / name).is_file():
                raise DataError(f"{source}: line 1: no image is called {name!r}; a header has the words path and label")
            yield _whole(label) if source.suffix == ".lst" else label, name
    except csv.Error as error:
        raise DataError(f"{source}: cannot be read as a list: {error}") from None


def _whole(label: str) -> str:
    """MXNet's lists hold labels as 3.000000."""
    whole, point, zeros = label.partition(".")
    return whole if point and not zeros.strip("0") else label


def _tar(tar: Path) -> Iterator[Entry]:
    """A WebDataset tar: files of one key are a sample; ``key.cls`` holds its class, else the image's folder is it."""
    images: dict[str, tuple[str, int, int]] = {}
    classes: dict[str, str] = {}
    try:
        with open_regular(tar, DataError) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                path = PurePosixPath(member.name)
                key = str(path.parent / path.name.split(".")[0])
                if path.suffix.lower() in IMAGE_SUFFIXES:
                    if key in images:
                        raise DataError(f"{tar}: two images share the key {key}")
                    images[key] = (path.parent.name, member.offset_data, member.size)
                elif path.suffix == ".cls":
                    content = archive.extractfile(member)
                    classes[key] = content.read().decode().strip() if content else ""
    except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{tar}: cannot be read as an uncompressed tar file: {error}") from None
    for key, (folder, start, length) in images.items():
        identity = classes.get(key, folder)
        if not identity:
            raise DataError(f"{tar}: {key} has neither a .cls file nor a folder that names its class")
        yield identity, str(tar), start, length
