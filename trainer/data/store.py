"""Where the encoded images of a data set lie: .rec parts or plain files, behind one small interface.

Images are read with ``pread`` and never mapped: a file that is cut short while training shows as a short read with a
clear error, not as a signal that kills the process. Descriptors are opened when first needed, in whichever process
needs them.
"""

import bisect
import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import stat
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from trainer.data import recordio
from trainer.data.pixels import image_suffixes
from trainer.errors import DataError
from trainer.files import advise, cache_folder, checksum, is_own, write_array, write_text
from trainer.reading import open_regular, read_array, read_bytes, read_json
from trainer.seals import sealed, unsealed, warn_once

_GATHER_ROWS = 1 << 18
_GAP_BYTES = 1 << 18  # a gap that a disk reads over in less time than it needs to go to another place
_KEPT = (".json", ".offsets.npy", ".labels.npy")
_FOUND_VERSION = 3  # of what is kept next to a .rec; 2 took the first record of the file for InsightFace's header


class Store(Protocol):
    """The encoded images of a data set, by record number."""

    def __len__(self) -> int: ...

    def read(self, record: int) -> bytes:
        """The encoded image. Raises :class:`DataError` naming file and record."""
        ...

    def where(self, record: int) -> str:
        """File and place of a record, for messages."""
        ...

    def sizes(self) -> list[int]:
        """The sizes of the files, for the data set's fingerprint."""
        ...

    def lengths(self, start: int, stop: int) -> NDArray[np.int64]:
        """Bytes that each of the records [start, stop) takes, (stop − start,)."""
        ...

    def will_need(self, records: NDArray[np.int64]) -> int:
        """Ask the system to read some records into its cache, in the files' order; how many reads that makes."""
        ...

    def forget(self) -> None:
        """Ask the system to drop the files from its cache, so that the next reads are cold."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...


@dataclass
class Part:
    """One .rec file with its table of offsets.

    ``offsets`` is (n + 1,) int64: where each image record begins, and where the last one ends; header records are not
    in it. ``first_id`` is the id in the first record's header where ids are consecutive (as `lce pack` writes them),
    else None. ``crcs`` (n,) uint32: the CRC-32 of each record's bytes, where known; what is read is compared with it.
    """

    path: Path
    offsets: NDArray[np.int64]
    first_id: int | None = None
    crcs: NDArray[np.uint32] | None = None
    _descriptor: int | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __post_init__(self) -> None:
        self.offsets = np.asarray(self.offsets)  # still mapped, but a plain array is much quicker to index

    def image(self, row: int) -> bytes:
        """The encoded image of record ``row``; as :meth:`record`, with a short way for sound records of one frame."""
        try:
            image = recordio.plain_image(self._frames(row), self.first_id, row)
        except (OSError, ValueError, DataError):
            image = None
        return self.record(row).image if image is None else image

    def record(self, row: int) -> recordio.Record:
        """Record ``row`` of this part. Raises :class:`DataError` naming file and record."""
        start = self.offsets.item(row)
        try:
            data, _ = recordio.unframe(self._frames(row))
            record = recordio.decode_record(data)
        except (ValueError, OSError, DataError) as error:
            raise DataError(f"{self.path}: record {row} at byte {start} is damaged: {error}") from None
        if self.first_id is not None and record.id != self.first_id + row:
            raise DataError(
                f"{self.path}: record {row} at byte {start} says it is number {record.id}, not {self.first_id + row}; "
                "the offsets do not belong to this file"
            )
        return record

    def crc(self, row: int) -> int:
        """The CRC-32 of the bytes of record ``row``. Raises :class:`OSError`."""
        start, stop = self.offsets.item(row), self.offsets.item(row + 1)
        return zlib.crc32(recordio.read_at(self._open(), start, stop - start))

    def _frames(self, row: int) -> bytes:
        start, stop = self.offsets.item(row), self.offsets.item(row + 1)
        data = recordio.read_at(self._open(), start, stop - start)
        if self.crcs is not None and zlib.crc32(data) != self.crcs.item(row):
            raise ValueError("its bytes changed since they were written (CRC-32 differs)")
        return data

    def length(self, row: int) -> int:
        """The bytes that record ``row`` takes by its own frames, whatever the table says of where the next one begins.

        Raises:
            DataError: no whole record is there.
        """
        start, stop = self.offsets.item(row), self.offsets.item(row + 1)
        at = start
        while True:
            head = recordio.read_at(self._open(), at, 8)
            word = int.from_bytes(head[4:], "little")
            if len(head) < 8 or int.from_bytes(head[:4], "little") != recordio.MAGIC:
                raise DataError(f"{self.path}: no record begins at byte {at}; the index or the file is damaged")
            length = word & recordio.MAX_FRAME_BYTES
            at += 8 + length + -length % 4
            if at > stop:
                raise DataError(f"{self.path}: the record at byte {start} ends behind byte {stop}; the file is damaged")
            if word >> 29 in (0, 3):
                return at - start

    def will_need(self, rows: NDArray[np.int64]) -> int:
        """Ask for some records, ascending; those with small gaps between them are read at once. The number of reads."""
        starts, stops = self.offsets[rows], self.offsets[rows + 1]
        apart = np.flatnonzero(starts[1:] > stops[:-1] + _GAP_BYTES)
        firsts, lasts = starts[np.append(0, apart + 1)], stops[np.append(apart, len(rows) - 1)]
        for start, stop in zip(firsts.tolist(), lasts.tolist(), strict=True):
            advise(self._open(), start, stop - start, "WILLNEED")
        return len(firsts)

    def forget(self) -> None:
        """See :class:`Store`."""
        os.fsync(self._open())
        advise(self._open(), 0, 0, "DONTNEED")

    def _open(self) -> int:
        if self._descriptor is None:
            with open_regular(self.path, DataError) as file:
                self._descriptor = os.dup(file.fileno())
        return self._descriptor

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class RecordStore:
    """Several .rec parts as one row of records."""

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts
        self._starts: list[int] = list(itertools.accumulate((len(part) for part in parts), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def _locate(self, record: int) -> tuple[Part, int]:
        if not 0 <= record < len(self):
            raise DataError(f"there is no record {record}; the data set has {len(self)}")
        index = bisect.bisect_right(self._starts, record) - 1
        return self.parts[index], record - self._starts[index]

    def read(self, record: int) -> bytes:
        """See :class:`Store`."""
        part, row = self._locate(record)
        return part.image(row)

    def record(self, record: int) -> recordio.Record:
        """The whole record: header and image. Raises :class:`DataError` naming file and record."""
        part, row = self._locate(record)
        return part.record(row)

    def where(self, record: int) -> str:
        """See :class:`Store`."""
        part, row = self._locate(record)
        return f"{part.path}: record {row}"

    def sizes(self) -> list[int]:
        """See :class:`Store`."""
        return [int(part.offsets[-1]) for part in self.parts]

    def lengths(self, start: int, stop: int) -> NDArray[np.int64]:
        """See :class:`Store`."""
        parts = [
            np.diff(part.offsets[max(start - first, 0) : max(stop - first, 0) + 1])
            for part, first in zip(self.parts, self._starts, strict=False)
        ]
        return np.concatenate(parts)

    def will_need(self, records: NDArray[np.int64]) -> int:
        """See :class:`Store`."""
        ordered = np.unique(records)
        cuts = np.searchsorted(ordered, self._starts)
        return sum(
            part.will_need(ordered[low:high] - first)
            for part, first, low, high in zip(self.parts, self._starts, cuts[:-1], cuts[1:], strict=False)
            if high > low
        )

    def forget(self) -> None:
        """See :class:`Store`."""
        for part in self.parts:
            part.forget()

    def close(self) -> None:
        """Close all files."""
        for part in self.parts:
            part.close()


class FileStore:
    """Images that lie as files in folders, for small sets."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.crcs: NDArray[np.uint32] | None = None  # (n,), where known; what is read is compared with it

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, record: int) -> bytes:
        """See :class:`Store`."""
        if not 0 <= record < len(self.paths):
            raise DataError(f"there is no record {record}; the data set has {len(self)}")
        data = read_bytes(self.paths[record], DataError)
        if self.crcs is not None and zlib.crc32(data) != self.crcs.item(record):
            raise DataError(f"{self.paths[record]}: changed since the data set was sealed (CRC-32 differs)")
        return data

    def crc(self, record: int) -> int:
        """The CRC-32 of a file. Raises :class:`DataError`."""
        return zlib.crc32(read_bytes(self.paths[record], DataError))

    def where(self, record: int) -> str:
        """See :class:`Store`."""
        return str(self.paths[record])

    def sizes(self) -> list[int]:
        """See :class:`Store`."""
        return [path.stat().st_size for path in self.paths]

    def lengths(self, start: int, stop: int) -> NDArray[np.int64]:
        """See :class:`Store`."""
        return np.array([path.stat().st_size for path in self.paths[start:stop]], np.int64)

    def will_need(self, records: NDArray[np.int64]) -> int:
        """See :class:`Store`."""
        ordered = np.unique(records).tolist()
        for record in ordered:
            self._advise(record, "WILLNEED")
        return len(ordered)

    def forget(self) -> None:
        """See :class:`Store`."""
        for record in range(len(self)):
            self._advise(record, "DONTNEED")

    def _advise(self, record: int, advice: Literal["WILLNEED", "DONTNEED"]) -> None:
        with contextlib.suppress(OSError, DataError), open_regular(self.paths[record], DataError) as file:
            if advice == "DONTNEED":
                os.fsync(file.fileno())
            advise(file.fileno(), 0, 0, advice)

    def close(self) -> None:
        """Nothing is held open."""


def offsets_path(rec: Path) -> Path:
    """The offset table next to a .rec."""
    return rec.with_suffix(".offsets.npy")


def open_part(
    rec: Path, records: int | None = None, size_bytes: int | None = None, first_id: int | None = None
) -> Part:
    """A part that `lce pack` wrote (or a folder's description names).

    The table of offsets comes from ``*.offsets.npy``, else from ``*.idx``, else from a scan of the file.

    Args:
        rec: the file.
        records, size_bytes: what the description of the data set says of it; checked.
        first_id: see :class:`Part`.

    Raises:
        DataError: a missing or empty file, a size or a number of records other than described, offsets that cannot be.
    """
    size = file_size(rec)
    if size_bytes is not None and size != size_bytes:
        change = "cut short" if size < size_bytes else "grown"
        raise DataError(
            f"{rec}: has {size} bytes but had {size_bytes} when it was packed; it was {change}: pack or copy it again"
        )
    table = offsets_path(rec)
    offsets = load_array(table, 1) if table.exists() else find_images(rec).offsets
    if len(offsets) == 0 or bool((np.diff(offsets) <= 0).any()) or int(offsets[0]) < 0 or int(offsets[-1]) > size:
        raise DataError(f"{table}: its offsets do not fit {rec.name} ({size} bytes); delete it and it is rebuilt")
    if records is not None and len(offsets) - 1 != records:
        raise DataError(f"{rec}: {len(offsets) - 1} records are indexed but dataset.yaml says {records}")
    return Part(rec, offsets, first_id)


def file_size(path: Path) -> int:
    """Bytes of a regular, non-empty file. Raises :class:`DataError`."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
        raise DataError(f"{path}: is {'empty' if stat.S_ISREG(status.st_mode) else 'not a file'}")
    return status.st_size


def load_array(path: Path, dimensions: int, dtype: type[np.generic] | None = np.int64) -> NDArray[Any]:
    """A .npy, memory-mapped read-only. Raises :class:`DataError` unless it has that dtype (None: any whole numbers) and
    number of dimensions."""
    array = read_array(path, DataError)
    fits = array.dtype.kind in "iu" if dtype is None else array.dtype == dtype
    if not fits or array.ndim != dimensions:
        found = f"{array.dtype} {array.shape}"
        wanted = "whole numbers" if dtype is None else str(np.dtype(dtype))
        raise DataError(f"{path}: expected {wanted} with {dimensions} dimension(s), found {found}")
    return array


@dataclass(frozen=True)
class Found:
    """The image records of a .rec: offsets (n + 1,), labels (n,), both int64; InsightFace's identity count."""

    offsets: NDArray[np.int64]
    labels: NDArray[np.int64]
    identities: int | None


def find_images(rec: Path) -> Found:
    """Find the image records of a .rec and their labels, by its .idx where there is one, else by one scan of the file.

    InsightFace's layout is recognised by its header record (two labels, no image), which has the key 0 and may stand
    anywhere in the file; without an .idx it is the one with the id 0. Its labels [n, m) are the keys of the identity
    records, which are left out, as is the header. Otherwise every record is an image.

    Raises:
        DataError: damage in either file, labels that are no whole numbers ≥ −1, identity records without a header.
    """
    size = file_size(rec)
    idx = rec.with_suffix(".idx")
    keys, offsets = _indexed(rec, idx, size) if idx.exists() else (None, np.fromiter(recordio.scan(rec), np.int64))
    ends = np.append(offsets[1:], size)
    heads = _heads(rec, offsets)
    at = _header_at(keys, heads)
    images, identities = np.ones(len(offsets), bool), None
    if at is not None:
        header = Part(rec, np.array([offsets[at], ends[at]]))
        low, high = (int(label) for label in header.record(0).labels)
        header.close()
        # Without an index the keys are those that InsightFace's writers give: 1, 2 … in the file's order.
        keys = np.arange(len(offsets)) + (np.arange(len(offsets)) < at) if keys is None else keys
        # From 2²⁴ on, the header's float32 may be a key too many or too few.
        images = (keys >= 1) & ((keys < low) if low < recordio.EXACT_FLOAT_LABELS else ~heads.empty)
        images[at] = False
        identities = high - low
        if not images.any():
            raise DataError(f"{rec}: its header record announces images 1…{low - 1}, but the index lists none of them")
    if (lost := images & heads.empty).any():
        what = "no header record (key 0) is there" if at is None else "its header record counts them as images"
        raise DataError(
            f"{rec}: {int(lost.sum())} record(s) hold two labels and no image, as InsightFace's identity records do, "
            f"but {what}; the file is cut short or put together from others: copy it again, or pack the images anew"
        )
    labels = _whole_labels(rec, heads.labels[images])
    return Found(np.append(offsets[images], ends[images][-1]), labels, identities)


def _header_at(keys: NDArray[np.int64] | None, heads: "_Heads") -> int | None:
    """Where InsightFace's header record stands among the records; None: there is none."""
    for found in ((keys == 0) if keys is not None else None, heads.ids == 0):
        if found is not None and (at := np.flatnonzero(found & heads.empty)).size:
            return int(at[0])
    return None


def _indexed(rec: Path, idx: Path, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Keys and offsets that an .idx lists, both (n,), by offset. Raises :class:`DataError`: they do not fit the .rec of
    ``size`` bytes."""
    keys, offsets = recordio.read_index(idx)
    if len(offsets) == 0:
        raise DataError(f"{idx}: is empty; delete it and it is rebuilt from {rec.name}")
    by_place = np.argsort(offsets, kind="stable")
    keys, offsets = keys[by_place], offsets[by_place]
    outside = (offsets < 0) | (offsets >= size) | (offsets % 4 != 0)
    if outside.any():
        bad = int(np.flatnonzero(outside)[0])
        raise DataError(
            f"{idx}: key {keys[bad]} points to byte {offsets[bad]}, but {rec.name} has {size} bytes; delete it"
        )
    if bool((np.diff(offsets) == 0).any()):
        bad = int(np.flatnonzero(np.diff(offsets) == 0)[0])
        raise DataError(
            f"{idx}: keys {keys[bad]} and {keys[bad + 1]} point to the same byte {offsets[bad]}; delete {idx.name}"
        )
    _check_listed(rec, idx, offsets, size)
    return keys, offsets


def _check_listed(rec: Path, idx: Path, offsets: NDArray[np.int64], size: int) -> None:
    """Refuse an index that was cut short, and log one that leaves records out in the middle.

    Args:
        offsets: (n,) what the index lists, ascending. size: of the .rec, in bytes.

    Raises:
        DataError: more records lie before the first or behind the last that is listed.
    """
    last = Part(rec, np.array([offsets[-1], size]))
    try:
        end = int(offsets[-1]) + last.length(0)
    finally:
        last.close()
    for where, missing in ((f"behind byte {end}", size - end), (f"before byte {offsets[0]}", int(offsets[0]))):
        if missing > 0:
            raise DataError(
                f"{idx}: lists {len(offsets)} records, and {missing} bytes of {rec.name} {where} hold more: the index "
                f"was cut short; delete {idx.name} and it is rebuilt"
            )
    heads = np.memmap(rec, np.uint8, "r")
    skipped = 0
    for start in range(0, len(offsets) - 1, _GATHER_ROWS):
        rows = offsets[start : start + _GATHER_ROWS + 1]
        fields = heads[rows[:-1, None] + np.arange(8)].view("<u4")
        whole = fields[:, 1] >> 29 == 0
        length = fields[:, 1].astype(np.int64) & recordio.MAX_FRAME_BYTES
        skipped += int((whole & (rows[:-1] + 8 + length + -length % 4 < rows[1:])).sum())
    if skipped:
        warn_once(
            f"{idx}: leaves out records of {rec.name} at {skipped} place(s), and they are not used; if that is not "
            f"meant, delete {idx.name} and it is rebuilt"
        )


@dataclass(frozen=True)
class _Heads:
    """Of each record: the first label (n,) float64, the id (n,) uint64, and whether it has two labels and no image."""

    labels: NDArray[np.float64]
    ids: NDArray[np.uint64]
    empty: NDArray[np.bool_]


def _heads(rec: Path, offsets: NDArray[np.int64]) -> _Heads:
    """What the records that begin at ``offsets`` say of themselves, gathered without a loop over records."""
    labels, ids = np.empty(len(offsets), np.float64), np.empty(len(offsets), np.uint64)
    empty = np.empty(len(offsets), bool)
    size = rec.stat().st_size
    mapped = np.memmap(rec, np.uint8, "r")
    for start in range(0, len(offsets), _GATHER_ROWS):
        rows = offsets[start : start + _GATHER_ROWS]
        heads = np.zeros((len(rows), 36), np.uint8)  # frame 8, header 24, first entry of a label vector 4
        heads[:-1] = mapped[rows[:-1, None] + np.arange(36)]
        last = mapped[int(rows[-1]) : int(rows[-1]) + 36]  # may end with the file
        heads[-1, : len(last)] = last
        fields = heads.view("<u4")
        wrong = np.flatnonzero((fields[:, 0] != recordio.MAGIC) | (fields[:, 1] >> 29 > 1))
        if len(wrong):
            row, at = start + int(wrong[0]), int(rows[wrong[0]])
            raise DataError(f"{rec}: record {row}: no record begins at byte {at}; the index or the file is damaged")
        floats = heads.view("<f4")
        values = np.where(fields[:, 2] == 0, floats[:, 3], floats[:, 8]).astype(np.float64)
        for cut in np.flatnonzero(fields[:, 1] >> 29 == 1):
            part = Part(rec, np.array([rows[cut], size]))
            values[cut] = part.record(0).label
            part.close()
        block = slice(start, start + len(rows))
        labels[block] = values
        ids[block] = fields[:, 4] | fields[:, 5].astype(np.uint64) << np.uint64(32)
        empty[block] = (fields[:, 1] == 24 + 8) & (fields[:, 2] == 2)
    return _Heads(labels, ids, empty)


def _whole_labels(rec: Path, values: NDArray[np.float64]) -> NDArray[np.int64]:
    bad = np.flatnonzero(~((values == np.floor(values)) & (values >= -1) & (values < 2.0**53)))
    if len(bad):
        raise DataError(f"{rec}: record {bad[0]} has the label {values[bad[0]]}, which is no class number")
    return values.astype(np.int64)


def load_or_find(rec: Path) -> Found:
    """:func:`find_images`, its result kept in the user's cache until the file changes: nothing is written next to a
    file of other tools. Ranks that ask at once wait for the one that finds."""
    idx = rec.with_suffix(".idx")
    status = [_stamp(rec), _stamp(idx)]
    name = hashlib.blake2b(str(rec.resolve()).encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()
    stem = cache_folder("indexes") / name
    with contextlib.ExitStack() as alone:
        try:
            lock = alone.enter_context(stem.with_suffix(".lock").open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # no cache, or no locks in it: found by each
        known = _kept(stem, status)
        return _keep(stem, rec, status, find_images(rec)) if known is None else known


def _kept(stem: Path, status: list[list[int] | None]) -> Found | None:
    stamp, offsets, labels = (stem.with_suffix(ending) for ending in _KEPT)
    if not all(map(is_own, (stamp, offsets, labels))):
        return None
    try:
        known = unsealed(read_json(stamp, DataError), stamp, DataError)
        sums = [list(checksum(offsets)), list(checksum(labels))]
        if known["files"] == status and known["version"] == _FOUND_VERSION and known["tables"] == sums:
            return Found(load_array(offsets, 1), load_array(labels, 1), known["identities"])
    except (OSError, KeyError, TypeError, DataError):
        pass
    return None


def _keep(stem: Path, rec: Path, status: list[list[int] | None], found: Found) -> Found:
    stamp, offsets, labels = (stem.with_suffix(ending) for ending in _KEPT)
    try:
        _forget_lost(stem.parent)
        stamp.unlink(missing_ok=True)
        write_array(offsets, found.offsets)
        write_array(labels, found.labels)
        about: dict[str, Any] = {"rec": str(rec.resolve()), "version": _FOUND_VERSION, "files": status}
        about |= {"tables": [checksum(offsets), checksum(labels)], "identities": found.identities}
        write_text(stamp, json.dumps(sealed(about)))
        for file in (stamp, offsets, labels):
            file.chmod(0o600)
    except OSError:
        pass  # no room, or not ours: found again each time
    return found


def _forget_lost(folder: Path) -> None:
    """Remove what is kept of files that are gone."""
    for stamp in folder.glob("*.json"):
        with contextlib.suppress(DataError, KeyError, TypeError, OSError):
            if not Path(read_json(stamp, DataError)["rec"]).exists():
                for ending in (*_KEPT, ".lock"):
                    stamp.with_suffix(ending).unlink(missing_ok=True)


def _stamp(path: Path) -> list[int] | None:
    return [path.stat().st_size, path.stat().st_mtime_ns] if path.exists() else None


def image_files(folder: Path, others: list[tuple[str, Path]] | None = None) -> Iterator[tuple[str, Path]]:
    """(identity, file) for every image in a folder of identity folders, sorted by name. Hidden files are left out.

    ``others`` gets what no suffix marks as an image; of an identity folder without files, an
    empty path.
    """
    for identity in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        found = sorted(p for p in identity.rglob("*") if not p.name.startswith("."))
        for file in found:
            if file.suffix.lower() in image_suffixes():
                yield identity.name, file
            elif others is not None and not file.is_dir():
                others.append((identity.name, file))
        if others is not None and not found:
            others.append((identity.name, Path()))


def left_out(others: list[tuple[str, Path]], taken: set[str]) -> tuple[dict[str, int], list[str]]:
    """Of what :func:`image_files` did not take: the count by suffix, and the identities of which nothing was
    ``taken``."""
    suffixes = Counter(path.suffix.lower() or "(no suffix)" for _, path in others if path.name)
    return dict(suffixes), sorted({name for name, _ in others} - taken - {""})


def left_out_text(suffixes: dict[str, int], identities: list[str]) -> list[str]:
    """:func:`left_out` as lines for people."""
    lines = []
    if suffixes:
        needs = " (.heic is read where pillow-heif is installed)" if {".heic", ".heif"} & set(suffixes) else ""
        counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(suffixes.items()))
        lines.append(f"not taken: {counts}{needs}")
    if identities:
        first = ", ".join(identities[:10]) + (", …" if len(identities) > 10 else "")
        lines.append(f"identities without an image that is taken: {len(identities)} ({first})")
    return lines
