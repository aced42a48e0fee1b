"""Gallery files: .npy, .safetensors and FAISS indexes, read in slices and built anew with other vectors."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from trainer.errors import DataError
from trainer.evaluation.arrays import FloatArray, IntArray


class Format(Protocol):
    """A gallery file: its rows, their dimension and their ids (row numbers where the file knows none)."""

    rows: int
    dim: int

    def ids(self, start: int, stop: int) -> IntArray:
        """Ids of rows [start, stop): (n,)."""

    def read(self, start: int, stop: int) -> FloatArray:
        """Vectors of rows [start, stop): (n, D) float32."""

    def build(self, vectors: FloatArray, target: Path) -> None:
        """Write a file of the same kind with these vectors (rows, D2) in place of the old ones."""


def open_gallery(path: Path) -> Format:
    """Open a gallery file by its ending: .npy, .safetensors, otherwise FAISS. Raises :class:`DataError`."""
    if not path.is_file():
        raise DataError(f"{path}: no such gallery file")
    if path.suffix == ".npy":
        return NpyGallery(path)
    if path.suffix == ".safetensors":
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

    def ids(self, start: int, stop: int) -> IntArray:
        """See :class:`Format`."""
        return np.arange(start, stop)

    def read(self, start: int, stop: int) -> FloatArray:
        """See :class:`Format`."""
        return np.array(self._array[start:stop], np.float32)

    def build(self, vectors: FloatArray, target: Path) -> None:
        """See :class:`Format`; the dtype of the old array is kept."""
        out = np.lib.format.open_memmap(target, "w+", self._array.dtype, vectors.shape)
        for start in range(0, len(vectors), 1 << 16):
            out[start : start + (1 << 16)] = vectors[start : start + (1 << 16)]
        out.flush()


class SafetensorsGallery:
    """A .safetensors with one float matrix (n, D) and, where there is one, an int64 vector of ids (n,)."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                self._tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
                self._metadata = file.metadata()
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: is no .safetensors file: {error}") from None
        matrices = [key for key, value in self._tensors.items() if value.ndim == 2 and value.dtype.kind == "f"]
        numbers = [key for key, value in self._tensors.items() if value.ndim == 1 and value.dtype == np.int64]
        if len(matrices) != 1 or len(numbers) > 1:
            raise DataError(
                f"{path}: expected one float matrix and at most one int64 vector, found {list(self._tensors)}"
            )
        self._name = matrices[0]
        self.rows, self.dim = _shape(self._tensors[self._name], path)
        self._ids = self._tensors[numbers[0]] if numbers else np.arange(self.rows)
        _check_ids(self._ids, self.rows, path)

    def ids(self, start: int, stop: int) -> IntArray:
        """See :class:`Format`."""
        return self._ids[start:stop]

    def read(self, start: int, stop: int) -> FloatArray:
        """See :class:`Format`."""
        return np.asarray(self._tensors[self._name][start:stop], np.float32)

    def build(self, vectors: FloatArray, target: Path) -> None:
        """See :class:`Format`."""
        from safetensors.numpy import save_file

        dtype = self._tensors[self._name].dtype
        save_file({**self._tensors, self._name: np.asarray(vectors, dtype)}, target, self._metadata)


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

    def ids(self, start: int, stop: int) -> IntArray:
        """See :class:`Format`."""
        return self._ids[start:stop]

    def read(self, start: int, stop: int) -> FloatArray:
        """See :class:`Format`."""
        return self._vectors[start:stop]

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
