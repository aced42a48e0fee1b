"""MXNet's RecordIO, read and written in numpy and the standard library.

A file is a sequence of frames, each ``magic (uint32) · cflag << 29 | length (uint32) · data · padding to 4 bytes``,
little endian. A record is one frame (cflag 0) or, where the data itself contains the magic at a multiple of 4 bytes,
several (cflag 1, 2 … 3): the data is cut there and the reader puts the magic back. The data of an image record is a
header ``flag (uint32) · label (float32) · id (uint64) · id2 (uint64)``, then ``flag`` float32 labels where flag > 0,
then the encoded image.

All functions take bytes or a file's path and name the place in their errors; nothing here knows what a data set is.
"""

import contextlib
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.errors import DataError
from trainer.reading import open_regular

MAGIC = 0xCED7230A
MAX_FRAME_BYTES = (1 << 29) - 1
EXACT_FLOAT_LABELS = 1 << 24
"""Labels from here on are not exact in the header's float32; they need a label table."""

_MAGIC_BYTES = struct.pack("<I", MAGIC)
_FRAME = struct.Struct("<II")
_HEADER = struct.Struct("<IfQQ")
_PLAIN = struct.Struct("<IIIfQQ")  # frame and header together
_SCAN_BYTES = 1 << 24
_INDEX_BYTES = 1 << 26


@dataclass(frozen=True)
class Record:
    """One image record: its labels (one, or a vector), its ids and the encoded image."""

    labels: tuple[float, ...]
    id: int
    id2: int
    flag: int
    image: bytes

    @property
    def label(self) -> float:
        """The first label, which is the class."""
        return self.labels[0]


def encode_record(image: bytes, label: float | tuple[float, ...], id: int = 0, id2: int = 0) -> bytes:
    """The data of a record: header and image; a tuple of labels is written as a label vector (flag = its length)."""
    if isinstance(label, tuple):
        return _HEADER.pack(len(label), 0.0, id, id2) + struct.pack(f"<{len(label)}f", *label) + image
    return _HEADER.pack(0, label, id, id2) + image


def decode_record(data: bytes) -> Record:
    """The parts of a record's data. Raises :class:`ValueError` when it is shorter than its own header says."""
    if len(data) < _HEADER.size:
        raise ValueError(f"{len(data)} bytes are too few for a record header of {_HEADER.size}")
    flag, label, id, id2 = _HEADER.unpack_from(data)
    if flag == 0:
        return Record((label,), id, id2, 0, data[_HEADER.size :])
    end = _HEADER.size + 4 * flag
    if len(data) < end:
        raise ValueError(f"the header promises {flag} labels, but only {len(data)} bytes are there")
    return Record(struct.unpack_from(f"<{flag}f", data, _HEADER.size), id, id2, flag, data[end:])


def plain_image(frame: bytes, first_id: int | None, row: int) -> bytes | None:
    """The image of a record of one frame and one label, where ``frame`` begins with one whose id is ``first_id + row``.

    None: the record is damaged, or of another form; :func:`unframe` and :func:`decode_record` tell.
    """
    if len(frame) < _PLAIN.size:
        return None
    magic, word, flag, _, id, _ = _PLAIN.unpack_from(frame)
    if magic != MAGIC or flag or not _HEADER.size <= word <= len(frame) - _FRAME.size:
        return None
    if first_id is not None and id != first_id + row:
        return None
    return frame[_PLAIN.size : _FRAME.size + word]


def frame(data: bytes) -> bytes:
    """A record's data as it stands in the file: framed, cut at every aligned magic, padded to 4 bytes."""
    if len(data) > MAX_FRAME_BYTES:
        raise ValueError(f"a record of {len(data)} bytes is larger than the format allows ({MAX_FRAME_BYTES})")
    cuts = _aligned_magics(data)
    if not cuts:
        return _FRAME.pack(MAGIC, len(data)) + data + bytes(-len(data) % 4)
    out = bytearray()
    start = 0
    for cut in cuts:
        out += _FRAME.pack(MAGIC, (1 if start == 0 else 2) << 29 | (cut - start)) + data[start:cut]
        start = cut + 4
    tail = data[start:]
    return bytes(out + _FRAME.pack(MAGIC, 3 << 29 | len(tail)) + tail + bytes(-len(tail) % 4))


def unframe(buffer: bytes, start: int = 0) -> tuple[bytes, int]:
    """The record that begins at ``start`` of ``buffer``: its data, and where the next one begins.

    Raises:
        ValueError: no magic there, parts out of order, or the data ends inside the record.
    """
    parts: list[bytes] = []
    while True:
        if start + _FRAME.size > len(buffer):
            raise ValueError("the data ends inside the record")
        magic, word = _FRAME.unpack_from(buffer, start)
        if magic != MAGIC:
            raise ValueError(f"found {magic:#010x} where a record's magic {MAGIC:#010x} should be")
        cflag, length = word >> 29, word & MAX_FRAME_BYTES
        first, last = cflag in (0, 1), cflag in (0, 3)
        if cflag > 3 or first != (not parts):
            raise ValueError(
                f"part of kind {cflag} where the {'first' if not parts else 'next'} part of a record should be"
            )
        start += _FRAME.size
        if start + length > len(buffer):
            raise ValueError("the data ends inside the record")
        parts.append(buffer[start : start + length])
        start += length + (-length % 4)
        if last:
            return (parts[0] if len(parts) == 1 else _MAGIC_BYTES.join(parts)), start


def _aligned_magics(data: bytes) -> list[int]:
    found: list[int] = []
    at = data.find(_MAGIC_BYTES)
    while at >= 0 and at + 4 <= len(data) // 4 * 4:
        if at % 4 == 0:
            found.append(at)
            at = data.find(_MAGIC_BYTES, at + 4)
        else:
            at = data.find(_MAGIC_BYTES, at + 1)
    return found


def scan(path: Path) -> Iterator[int]:
    """The offset of every record of a .rec file, in file order, found by walking from frame to frame.

    Raises:
        DataError: a frame without the magic, or a file that ends inside a record (the offset is named).
    """
    with open_regular(path, DataError) as file:
        size = os.fstat(file.fileno()).st_size
        base, buffer, at, inside = 0, b"", 0, False
        while at < size:
            if at - base + _FRAME.size > len(buffer):
                file.seek(at)
                base, buffer = at, file.read(_SCAN_BYTES)
                if len(buffer) < _FRAME.size:
                    raise DataError(f"{path}: ends inside the record header at byte {at}; the file is cut short")
            magic, word = _FRAME.unpack_from(buffer, at - base)
            cflag, length = word >> 29, word & MAX_FRAME_BYTES
            if magic != MAGIC or cflag > 3 or (cflag in (0, 1)) == inside:
                raise DataError(f"{path}: no record begins at byte {at}; the file is damaged from there on")
            if not inside:
                yield at
            inside = cflag in (1, 2)
            at += _FRAME.size + length + (-length % 4)
        if at > size or inside:
            raise DataError(f"{path}: ends inside its last record (byte {at} of {size}); the file is cut short")


def read_index(path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A text .idx (``key<TAB>offset`` a line) as two int64 arrays (N,): keys and offsets, in the file's order.

    Raises:
        DataError: a line that is not two whole numbers.
    """
    blocks: list[NDArray[np.int64]] = []
    with open_regular(path, DataError) as file:
        while text := file.read(_INDEX_BYTES):
            text += file.readline()
            if text.translate(None, b"0123456789 \t\r\n"):
                raise DataError(
                    f"{path}: holds something else than whole numbers; delete it and it is rebuilt from the .rec"
                )
            lines = text.count(b"\n") + (not text.endswith(b"\n"))
            numbers = np.fromstring(text.decode("ascii"), dtype=np.int64, sep=" ")
            if len(numbers) != 2 * lines:
                raise DataError(f"{path}: {lines} lines hold {len(numbers)} numbers; a line is `key<TAB>offset`")
            blocks.append(numbers.reshape(-1, 2))
    table = np.concatenate(blocks) if blocks else np.empty((0, 2), np.int64)
    return np.ascontiguousarray(table[:, 0]), np.ascontiguousarray(table[:, 1])


def read_at(descriptor: int, start: int, length: int) -> bytes:
    """``length`` bytes of an open file from ``start`` on (fewer only at its end). Raises :class:`OSError`."""
    data = os.pread(descriptor, length, start)
    while len(data) < length:
        more = os.pread(descriptor, length - len(data), start + len(data))
        if not more:
            break
        data += more
    return data


class RecordWriter:
    """Writes one .rec with its .idx, under temporary names until :meth:`close` has both complete and on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index_path = path.with_suffix(".idx")
        self._rec_temporary, self._idx_temporary = _temporary_of(path), _temporary_of(self.index_path)
        self._rec = self._rec_temporary.open("wb")
        self._idx = self._idx_temporary.open("w")
        self.offsets: list[int] = []
        self.crcs: list[int] = []
        self.position = 0

    def write(self, key: int, data: bytes) -> None:
        """Append a record's data (header and image) under ``key``."""
        framed = frame(data)
        self._rec.write(framed)
        self._idx.write(f"{key}\t{self.position}\n")
        self.offsets.append(self.position)
        self.crcs.append(zlib.crc32(framed))
        self.position += len(framed)

    def close(self) -> None:
        """Make both files durable, then give them their names."""
        for file in (self._rec, self._idx):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self._idx_temporary.replace(self.index_path)
        self._rec_temporary.replace(self.path)

    def abort(self) -> None:
        """Leave nothing behind."""
        for file, temporary in ((self._rec, self._rec_temporary), (self._idx, self._idx_temporary)):
            with contextlib.suppress(OSError):  # a full disk refuses what is still in the buffer
                file.close()
            temporary.unlink(missing_ok=True)


def _temporary_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
