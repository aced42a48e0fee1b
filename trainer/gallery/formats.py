"""Galleries as files: .npy, .npz, .safetensors (one file or a folder of shards), .parquet and FAISS indexes, read row
by row and built anew with other vectors.

An id may stand for several rows: the pictures of one person."""

import os
import shutil
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import DataError
from trainer.evaluation.arrays import FloatArray, IntArray
from trainer.reading import regular, why_unreadable

Rows = slice | IntArray
"""Which rows: a slice with both ends, or row numbers (n,)."""

TAKEN = ".npy, .npz, .safetensors (a file or a folder of them), .parquet, and FAISS indexes that hold whole vectors"
NOTE = "lce_converted"
"""What the metadata of a file says after an upgrade: the conversions that its vectors went through, in order."""


class Format:
    """A gallery: its rows, their dimension and their ids (row numbers where the file knows none).

    Attributes:
        applied: the conversions that its vectors went through, as far as the file itself can say so.
    """

    rows: int
    dim: int
    applied: tuple[str, ...] = ()

    def ids(self, rows: Rows) -> IntArray:
        """Ids of rows: (n,)."""
        return np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows

    def read(self, rows: Rows) -> FloatArray:
        """Vectors of rows: (n, D) float32."""
        raise NotImplementedError

    def changes(self, dim: int) -> list[str]:
        """What a rebuild with vectors of ``dim`` cannot keep, a sentence each.

        Raises:
            DataError: it cannot be built with such vectors.
        """
        return []

    def build(self, vectors: FloatArray, target: Path, applied: Sequence[str] = ()) -> None:
        """Write a file of the same kind with these vectors (rows, D2) in place of the old ones; ``applied`` is noted
        in its metadata where the kind has any."""
        raise NotImplementedError


class NpyGallery(Format):
    """A float array (n, D) in a .npy; ids are row numbers. Read, not mapped: a file that is cut short meanwhile is an
    error, where a map would end the process."""

    def __init__(self, path: Path) -> None:
        try:
            array: Any = np.load(path, mmap_mode="r", allow_pickle=False)
            self._file = path.open("rb")
        except (OSError, ValueError, SyntaxError, EOFError, tokenize.TokenError) as error:
            raise DataError(f"{path}: {why_unreadable(path) or f'is no .npy array: {error}'}") from None
        self.rows, self.dim = _shape(array, path)
        self._path, self._dtype, self._offset = path, array.dtype, array.offset
        # Of an array in Fortran's order a row lies in D pieces: it is read whole.
        self._whole = None if array.flags.c_contiguous else self._pieces(0, self.rows).reshape(self.dim, self.rows).T

    def _pieces(self, start: int, stop: int) -> Any:
        """Values of rows [start, stop), flat, in the file's dtype."""
        size = self.dim * self._dtype.itemsize
        data, wanted, at = bytearray(), (stop - start) * size, self._offset + start * size
        while len(data) < wanted:
            part = os.pread(self._file.fileno(), min(wanted - len(data), 1 << 30), at + len(data))
            if not part:
                raise DataError(f"{self._path}: was cut short while it was read")
            data += part
        return np.frombuffer(data, self._dtype)

    def read(self, rows: Rows) -> FloatArray:
        """See :class:`Format`."""
        if self._whole is not None:
            return np.array(self._whole[rows], np.float32)
        if isinstance(rows, slice):
            return np.array(self._pieces(rows.start, rows.stop).reshape(-1, self.dim), np.float32)
        out = np.empty((len(rows), self.dim), np.float32)
        for at, row in enumerate(rows.tolist()):
            out[at] = self._pieces(row, row + 1)
        return out

    def build(self, vectors: FloatArray, target: Path, applied: Sequence[str] = ()) -> None:
        """See :class:`Format`; the dtype of the old array is kept."""
        out = np.lib.format.open_memmap(target, "w+", self._dtype, vectors.shape)
        for start in range(0, len(vectors), 1 << 16):
            out[start : start + (1 << 16)] = vectors[start : start + (1 << 16)]
        out.flush()


_NUMPY_KINDS = ("F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")


class _Named(Format):
    """Arrays by name: one float matrix (n, D) and, where there is one, an integer vector of ids (n,); further arrays
    are carried along. Of several integer vectors the one called ``ids`` or ``id`` counts."""

    def _choose(self, arrays: Mapping[str, Any], path: Path) -> None:
        matrices = [key for key, value in arrays.items() if value.ndim == 2 and value.dtype.kind == "f"]
        numbers = [key for key, value in arrays.items() if value.ndim == 1 and value.dtype.kind in "iu"]
        if len(numbers) > 1:
            numbers = [key for key in numbers if key in ("ids", "id")]
            if len(numbers) != 1:
                numbers = ["", ""]
        if len(matrices) != 1 or len(numbers) > 1:
            raise DataError(
                f"{path}: expected one float matrix and at most one integer vector, of ids (of several, one called "
                f"ids); found {list(arrays)}"
            )
        self._arrays, self._name = arrays, matrices[0]
        self.rows, self.dim = _shape(arrays[self._name], path)
        self.has_ids = bool(numbers)
        self._ids = whole_ids(arrays[numbers[0]], self.rows, path) if numbers else np.arange(self.rows)

    def ids(self, rows: Rows) -> IntArray:
        """See :class:`Format`."""
        return self._ids[rows]

    def read(self, rows: Rows) -> FloatArray:
        """See :class:`Format`."""
        return np.asarray(self._arrays[self._name][rows], np.float32)

    def _with(self, vectors: FloatArray) -> dict[str, Any]:
        return {**self._arrays, self._name: np.asarray(vectors, self._arrays[self._name].dtype)}


class SafetensorsGallery(_Named):
    """A .safetensors of named arrays (see :class:`_Named`)."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        regular(path, DataError)  # of a folder's shards, each
        try:
            with safe_open(path, framework="numpy") as file:
                kinds = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 (not a dict)
                foreign = next((key for key, kind in kinds.items() if kind not in _NUMPY_KINDS), None)
                if foreign is not None:
                    raise DataError(
                        f"{path}: {foreign} is stored as {kinds[foreign]}; store the vectors as float16 or float32"
                    )
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
                self._metadata: dict[str, str] = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: {why_unreadable(path) or f'is no .safetensors file: {error}'}") from None
        self._choose(tensors, path)
        self.applied = tuple(self._metadata.get(NOTE, "").split())

    def build(self, vectors: FloatArray, target: Path, applied: Sequence[str] = ()) -> None:
        """See :class:`Format`."""
        from safetensors.numpy import save_file

        metadata = {**self._metadata, NOTE: " ".join(applied)} if applied else self._metadata
        save_file(self._with(vectors), target, metadata or None)


class NpzGallery(_Named):
    """A .npz of named arrays (see :class:`_Named`); the note of its conversions is the archive's comment."""

    def __init__(self, path: Path) -> None:
        try:
            with zipfile.ZipFile(path) as archive:
                self._packed = any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist())
                word, _, applied = archive.comment.decode("utf-8", "replace").partition(": ")
                strangers = [name for name in archive.namelist() if not name.endswith(".npy")]
            if strangers:
                raise DataError(f"{path}: holds {strangers[0]}, which is no array; taken are {TAKEN}")
            with np.load(path, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
        except (
            OSError,
            ValueError,
            SyntaxError,
            EOFError,
            tokenize.TokenError,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            raise DataError(f"{path}: {why_unreadable(path) or f'is no .npz of plain arrays: {error}'}") from None
        self._choose(arrays, path)
        self.applied = tuple(applied.split()) if word == NOTE else ()

    def build(self, vectors: FloatArray, target: Path, applied: Sequence[str] = ()) -> None:
        """See :class:`Format`; compressed if the old one is."""
        with target.open("wb") as file:
            (np.savez_compressed if self._packed else np.savez)(file, **self._with(vectors))
        if applied:
            with zipfile.ZipFile(target, "a") as archive:
                archive.comment = f"{NOTE}: {' '.join(applied)}".encode()


class ShardsGallery(Format):
    """A folder of .safetensors files, one gallery in the order of their names; other files in it are carried along.

    Shards without ids number their rows through all of them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise DataError(f"{path}: a folder without .safetensors shards is no gallery")
        self._shards = [SafetensorsGallery(file) for file in files]
        self.dim = self._shards[0].dim
        for file, shard in zip(files, self._shards, strict=True):
            if shard.dim != self.dim or shard.has_ids != self._shards[0].has_ids:
                raise DataError(f"{file}: dimension {shard.dim} and ids {shard.has_ids}, unlike {files[0].name}")
        self._starts = np.cumsum([0, *(shard.rows for shard in self._shards)])
        self.rows = int(self._starts[-1])
        every = [shard.ids(slice(0, shard.rows)) for shard in self._shards]
        self._ids = np.concatenate(every) if self._shards[0].has_ids else np.arange(self.rows)
        self.applied = self._shards[0].applied

    def ids(self, rows: Rows) -> IntArray:
        """See :class:`Format`."""
        return self._ids[rows]

    def read(self, rows: Rows) -> FloatArray:
        """See :class:`Format`."""
        numbers = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        out = np.empty((len(numbers), self.dim), np.float32)
        owner = np.searchsorted(self._starts, numbers, side="right") - 1
        for at in np.unique(owner):
            mine = owner == at
            out[mine] = self._shards[at].read(numbers[mine] - self._starts[at])
        return out

    def build(self, vectors: FloatArray, target: Path, applied: Sequence[str] = ()) -> None:
        """See :class:`Format`; ``target`` is a folder, with the same names in it."""
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        files = sorted(self._path.glob("*.safetensors"))
        for file, shard, start in zip(files, self._shards, self._starts, strict=False):
            shard.build(vectors[start : start + shard.rows], target / file.name, applied)
        for other in self._path.iterdir():
            if other.is_file() and other not in files:
                shutil.copy2(other, target)


def batches(rows: int, start: int, size: int) -> Iterator[tuple[int, int]]:
    """[start, stop) ranges of at most ``size`` rows."""
    for at in range(start, rows, size):
        yield at, min(at + size, rows)


def _shape(array: Any, path: Path) -> tuple[int, int]:
    if array.ndim != 2 or array.dtype.kind != "f" or 0 in array.shape:
        raise DataError(f"{path}: expected float vectors (n, D), found {array.dtype} {array.shape}")
    return array.shape[0], array.shape[1]


def whole_ids(ids: Any, rows: int, path: Path) -> IntArray:
    """Integer ids (rows,) of any type as int64. Raises :class:`DataError`."""
    if len(ids) != rows:
        raise DataError(f"{path}: {len(ids)} ids for {rows} vectors")
    if ids.dtype == np.uint64 and len(ids) and ids.max() > np.iinfo(np.int64).max:
        raise DataError(f"{path}: id {ids.max()} is beyond 2⁶³ − 1")
    return np.asarray(ids, np.int64)
