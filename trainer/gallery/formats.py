"""Galleries as files: .npy, .safetensors (one file or a folder of shards) and FAISS indexes, read row by row and built
anew with other vectors."""

import importlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from trainer.errors import DataError
from trainer.evaluation.arrays import FloatArray, IntArray

Rows = slice | IntArray
"""Which rows: a slice with both ends, or row numbers (n,)."""


class Format(Protocol):
    """A gallery: its rows, their dimension and their ids (row numbers where the file knows none)."""

    rows: int
    dim: int

    def ids(self, rows: Rows) -> IntArray:
        """Ids of rows: (n,)."""

    def read(self, rows: Rows) -> FloatArray:
        """Vectors of rows: (n, D) float32."""

    def build(self, vectors: FloatArray, target: Path) -> None:
        """Write a file of the same kind with these vectors (rows, D2) in place of the old ones."""


def open_gallery(path: Path) -> Format:
    """Open a gallery: a folder holds .safetensors shards; a file tells by its first bytes what it is, else FAISS.

    Raises:
        DataError: missing, damaged, of another kind, empty, or with an id that occurs twice.
    """
    if path.is_dir():
        return ShardsGallery(path)
    if not path.is_file():
        raise DataError(f"{path}: no such gallery file")
    with path.open("rb") as file:
        first = file.read(9)
    if path.suffix == ".npy" or first.startswith(b"\x93NUMPY"):
        return NpyGallery(path)
    if path.suffix == ".safetensors" or first[8:] == b"{":  # behind the length of its JSON
        return SafetensorsGallery(path)
    return FaissGallery(path)


class NpyGallery:
    """A float array (n, D) in a .npy; ids are row numbers."""

    def __init__(self, path: Path) -> None:
        try:
            self._array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: is no .npy array: {error}") from None
        self.rows, self.dim = _shape(self._array, path)

    def ids(self, rows: Rows) -> IntArray:
        """See :class:`Format`."""
        return np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows

    def read(self, rows: Rows) -> FloatArray:
        """See :class:`Format`."""
        return np.array(self._array[rows], np.float32)

    def build(self, vectors: FloatArray, target: Path) -> None:
        """See :class:`Format`; the dtype of the old array is kept."""
        out = np.lib.format.open_memmap(target, "w+", self._array.dtype, vectors.shape)
        for start in range(0, len(vectors), 1 << 16):
            out[start : start + (1 << 16)] = vectors[start : start + (1 << 16)]
        out.flush()


_NUMPY_KINDS = ("F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")


class SafetensorsGallery:
    """A .safetensors with one float matrix (n, D) and, where there is one, an integer vector of ids (n,)."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                kinds = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 (not a dict)
                foreign = next((key for key, kind in kinds.items() if kind not in _NUMPY_KINDS), None)
                if foreign is not None:
                    raise DataError(
                        f"{path}: {foreign} is stored as {kinds[foreign]}; store the vectors as float16 or float32"
                    )
                self._tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
                self._metadata = file.metadata()
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: is no .safetensors file: {error}") from None
        matrices = [key for key, value in self._tensors.items() if value.ndim == 2 and value.dtype.kind == "f"]
        numbers = [key for key, value in self._tensors.items() if value.ndim == 1 and value.dtype.kind in "iu"]
        if len(matrices) != 1 or len(numbers) > 1:
            raise DataError(
                f"{path}: expected one float matrix and at most one integer vector, of ids; found {list(self._tensors)}"
            )
        self._name = matrices[0]
        self.rows, self.dim = _shape(self._tensors[self._name], path)
        self.has_ids = bool(numbers)
        ids = self._tensors[numbers[0]] if numbers else np.arange(self.rows)
        if ids.dtype == np.uint64 and len(ids) and ids.max() > np.iinfo(np.int64).max:
            raise DataError(f"{path}: id {ids.max()} is beyond 2⁶³ − 1")
        self._ids = ids.astype(np.int64)
        _check_ids(self._ids, self.rows, path)

    def ids(self, rows: Rows) -> IntArray:
        """See :class:`Format`."""
        return self._ids[rows]

    def read(self, rows: Rows) -> FloatArray:
        """See :class:`Format`."""
        return np.asarray(self._tensors[self._name][rows], np.float32)

    def build(self, vectors: FloatArray, target: Path) -> None:
        """See :class:`Format`."""
        from safetensors.numpy import save_file

        dtype = self._tensors[self._name].dtype
        save_file({**self._tensors, self._name: np.asarray(vectors, dtype)}, target, self._metadata)


class ShardsGallery:
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
        _check_ids(self._ids, self.rows, path)

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

    def build(self, vectors: FloatArray, target: Path) -> None:
        """See :class:`Format`; ``target`` is a folder, with the same names in it."""
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        files = sorted(self._path.glob("*.safetensors"))
        for file, shard, start in zip(files, self._shards, self._starts, strict=False):
            shard.build(vectors[start : start + shard.rows], target / file.name)
        for other in self._path.iterdir():
            if other.is_file() and other not in files:
                shutil.copy2(other, target)


class FaissGallery:
    """A FAISS index of kind Flat, IVF-Flat or HNSW-Flat, with or without an id map; ids and parameters are kept."""

    def __init__(self, path: Path) -> None:
        try:
            faiss: Any = importlib.import_module("faiss")
        except ImportError:
            raise DataError(f"{path}: needs FAISS; pip install 'lce-trainer[gallery]'") from None
        self._faiss = faiss
        try:
            self._owner = faiss.read_index(str(path))  # the casts below only refer to it
        except RuntimeError as error:
            raise DataError(f"{path}: is no FAISS index: {str(error).splitlines()[-1][:200]}") from None
        self._index = faiss.downcast_index(self._owner)
        self._mapped = isinstance(self._index, faiss.IndexIDMap)  # IDMap2 is one too
        self._inner = faiss.downcast_index(self._index.index) if self._mapped else self._index
        kinds = (faiss.IndexFlat, faiss.IndexIVFFlat, faiss.IndexHNSWFlat)
        if not isinstance(self._inner, kinds):
            raise DataError(
                f"{path}: a {type(self._inner).__name__} keeps compressed codes, from which the vectors cannot be had "
                "back; convert the original vectors or re-encode the images, and build this index anew"
            )
        self.rows, self.dim = self._index.ntotal, self._index.d
        if self.rows == 0:
            raise DataError(f"{path}: the index is empty; there is nothing to upgrade")
        self._ids, self._vectors = self._contents()
        _check_ids(self._ids, self.rows, path)

    def _contents(self) -> tuple[IntArray, FloatArray]:
        faiss = self._faiss
        if isinstance(self._inner, faiss.IndexIVFFlat):
            from faiss.contrib.inspect_tools import get_invlist

            lists = [get_invlist(self._inner.invlists, i) for i in range(self._inner.nlist)]
            inner = np.concatenate([ids for ids, _ in lists])
            vectors = np.concatenate([codes.view(np.float32).reshape(-1, self.dim) for _, codes in lists])
            order = np.argsort(inner, kind="stable")
            inner, vectors = inner[order], vectors[order]
        else:
            inner, vectors = np.arange(self.rows), self._inner.reconstruct_n(0, self.rows)
        ids = faiss.vector_to_array(self._index.id_map)[inner] if self._mapped else inner
        return np.asarray(ids, np.int64), vectors

    def ids(self, rows: Rows) -> IntArray:
        """See :class:`Format`."""
        return self._ids[rows]

    def read(self, rows: Rows) -> FloatArray:
        """See :class:`Format`."""
        return self._vectors[rows]

    def search(self, queries: FloatArray, k: int) -> IntArray:
        """Ids (n, k) of what the index itself finds, with the parameters it is stored with; −1 where it finds less."""
        return np.asarray(self._index.search(np.ascontiguousarray(queries, np.float32), k)[1], np.int64)

    def build(self, vectors: FloatArray, target: Path) -> None:
        """See :class:`Format`. IVF is trained anew on the new vectors, HNSW's graph built anew."""
        faiss, old, dim = self._faiss, self._inner, vectors.shape[1]
        vectors = np.ascontiguousarray(vectors, np.float32)
        if isinstance(old, faiss.IndexIVFFlat):
            quantizer = faiss.IndexFlat(dim, old.metric_type)
            new = faiss.IndexIVFFlat(quantizer, dim, old.nlist, old.metric_type)
            new.train(vectors)
            new.nprobe = old.nprobe
        elif isinstance(old, faiss.IndexHNSWFlat):
            new = faiss.IndexHNSWFlat(dim, old.hnsw.nb_neighbors(1), old.metric_type)
            new.hnsw.efConstruction, new.hnsw.efSearch = old.hnsw.efConstruction, old.hnsw.efSearch
        else:
            new = faiss.IndexFlat(dim, old.metric_type)
        if self._mapped:
            whole = faiss.IndexIDMap2(new) if isinstance(self._index, faiss.IndexIDMap2) else faiss.IndexIDMap(new)
            whole.add_with_ids(vectors, self._ids)
            faiss.write_index(whole, str(target))
            return
        if isinstance(old, faiss.IndexIVFFlat):
            new.add_with_ids(vectors, self._ids)
        else:
            new.add(vectors)
        faiss.write_index(new, str(target))


def batches(rows: int, start: int, size: int) -> Iterator[tuple[int, int]]:
    """[start, stop) ranges of at most ``size`` rows."""
    for at in range(start, rows, size):
        yield at, min(at + size, rows)


def _shape(array: Any, path: Path) -> tuple[int, int]:
    if array.ndim != 2 or array.dtype.kind != "f" or 0 in array.shape:
        raise DataError(f"{path}: expected float vectors (n, D), found {array.dtype} {array.shape}")
    return array.shape[0], array.shape[1]


def _check_ids(ids: IntArray, rows: int, path: Path) -> None:
    if len(ids) != rows:
        raise DataError(f"{path}: {len(ids)} ids for {rows} vectors")
    names, counts = np.unique(ids, return_counts=True)
    if counts.max() > 1:
        raise DataError(f"{path}: id {names[counts.argmax()]} occurs {counts.max()} times; ids must be unique")
