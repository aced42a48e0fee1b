"""The checksums of a data set: ``checksums.json`` for its tables and texts, and one CRC-32 for each record.

``lce pack`` writes them, and ``lce check --seal`` for data sets of other origin. The tables are compared when the data
set is opened, a record when it is read. The CRC-32 of a record (uint32) stands in ``*.crc.npy`` next to its
``.rec`` and is of all bytes from its offset to the next one; in a folder of images it stands in ``records.crc.npy`` and
is of the file.
"""

import json
import zlib
from pathlib import Path

import numpy as np

from trainer.data import store
from trainer.errors import DataError
from trainer.files import checksum, write_array, write_text
from trainer.reading import read_json
from trainer.seals import find_change, sealed, unsealed

CHECKSUMS = "checksums.json"
OF_FILES = "records.crc.npy"
_FORMAT = "lce-checksums-1"

Sums = dict[str, tuple[int, int]]
"""File, relative to the data set's folder → (bytes, CRC-32)."""


def crcs_path(rec: Path) -> Path:
    """The table of the records' checksums next to a .rec."""
    return rec.with_suffix(".crc.npy")


def read_sums(folder: Path) -> Sums | None:
    """What ``checksums.json`` says, or None. Raises :class:`DataError`: it is damaged."""
    file = folder / CHECKSUMS
    if not file.exists():
        return None
    try:
        tree = unsealed(read_json(file, DataError), file, DataError)
        if tree["format"] != _FORMAT:
            raise DataError(f"{file}: format {tree['format']}, this version reads {_FORMAT}")
        return {str(name): (int(size), int(crc)) for name, (size, crc) in tree["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: holds no checksums ({error}); `lce check {folder} --seal` writes them anew") from None


def write_sums(folder: Path, files: Sums) -> None:
    """Write ``checksums.json``. Raises :class:`OSError`."""
    write_text(folder / CHECKSUMS, json.dumps(sealed({"format": _FORMAT, "files": files}), indent=0) + "\n")


def change_sum(folder: Path, name: str) -> None:
    """Keep the checksum of a file that was written anew, in a data set that has checksums."""
    sums = read_sums(folder)
    if sums is not None:
        write_sums(folder, {**sums, name: checksum(folder / name)})


def sum_of_text(text: str) -> tuple[int, int]:
    """(bytes, CRC-32) of a text as :func:`trainer.files.write_text` writes it."""
    data = text.encode("utf-8", "surrogateescape")
    return len(data), zlib.crc32(data)


def verify(folder: Path, sums: Sums, optional: tuple[str, ...] = ()) -> None:
    """Compare every file of ``sums``; ``optional`` ones may be missing. Raises :class:`DataError` naming the first."""
    for name, known in sums.items():
        if name in optional and not (folder / name).exists():
            continue
        change = find_change(folder / name, *known)
        if change is not None:
            raise DataError(
                f"{change}; restore it, or, if the change is meant, `lce check {folder} --seal` takes it as it is"
            )


def attach(folder: Path, images: store.Store) -> None:
    """Let a store compare the records that it reads, where their checksums are known.

    Raises:
        DataError: a table that cannot be read, or of another number of records.
    """
    if isinstance(images, store.FileStore):
        images.crcs = _load(folder / OF_FILES, len(images))
    elif isinstance(images, store.RecordStore):
        for part in images.parts:
            part.crcs = _load(crcs_path(part.path), len(part))


def _load(path: Path, count: int) -> np.ndarray | None:
    if not path.exists():
        return None
    crcs = np.asarray(store.load_array(path, 1, np.uint32))
    if len(crcs) != count:
        raise DataError(
            f"{path}: has the checksums of {len(crcs)} records, there are {count}: records were added or lost since; "
            "`lce check DATASET --seal` takes them as they are"
        )
    return crcs


def seal(folder: Path, images: store.Store, names: list[str]) -> None:
    """Write the records' checksums and, last, those of the files ``names`` that are there.

    Raises:
        DataError: a record cannot be read, or the folder cannot be written.
    """
    tables: list[str] = []
    try:
        if isinstance(images, store.FileStore):
            write_array(folder / OF_FILES, np.array([images.crc(k) for k in range(len(images))], np.uint32))
            tables.append(OF_FILES)
        elif isinstance(images, store.RecordStore):
            for part in images.parts:
                write_array(crcs_path(part.path), np.array([part.crc(k) for k in range(len(part))], np.uint32))
                tables.append(crcs_path(part.path).relative_to(folder).as_posix())
        there = [name for name in dict.fromkeys([*names, *tables]) if (folder / name).is_file()]
        write_sums(folder, {name: checksum(folder / name) for name in there})
    except OSError as error:
        raise DataError(f"{folder}: cannot be sealed: {error.strerror or error}") from None
