"""FAISS indexes that hold whole vectors, rebuilt with others: the same kind, the same parameters, the same ids."""

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import DataError
from trainer.evaluation.arrays import FloatArray, IntArray
from trainer.gallery.formats import TAKEN, Format, Rows
from trainer.reading import why_unreadable

_FLAT = ("IndexFlat", "IndexFlatIP", "IndexFlatL2")
_IVF = ("IndexIVFFlat", "IndexIVFScalarQuantizer")
_HALVES = ("IndexScalarQuantizer", "IndexHNSWSQ", "IndexIVFScalarQuantizer")  # which may hold 16-bit floats
_CODES = re.compile("PQ|ScalarQuantizer|SQ|LSH|Residual|LocalSearch|Additive|Product|RaBitQ|Lattice|2Layer|2Level")
_LEAST_FOR_A_GRAPH = 101  # rows that NSG's own building needs


class FaissGallery(Format):
    """A FAISS index of kind Flat, IVF-Flat, HNSW-Flat or NSG-Flat, or of 16-bit floats (SQfp16, SQbf16; under IVF or
    HNSW too), with or without an id map and L2 normalisation in front, or any index refined by whole vectors (RFlat).
    """

    def __init__(self, path: Path) -> None:
        try:
            faiss: Any = importlib.import_module("faiss")
        except ImportError:
            raise DataError(f"{path}: needs FAISS; pip install 'lce-trainer[gallery]'") from None
        self._faiss, self._path = faiss, path
        try:
            self._owner = faiss.read_index(str(path))  # the casts only refer to it
        except RuntimeError as error:
            raise DataError(f"{path}: {why_unreadable(path) or _plain(str(error))}") from None
        self._index = faiss.downcast_index(self._owner)
        self.rows, self.dim = self._index.ntotal, self._index.d
        if self.rows == 0:
            raise DataError(f"{path}: the index is empty; there is nothing to upgrade")
        ids, self._vectors = self._held(self._index)
        self._ids = np.asarray(ids, np.int64)
        if len(self._ids) != self.rows:
            raise DataError(f"{path}: says that it has {self.rows} vectors and holds {len(self._ids)}")

    def _held(self, index: Any) -> tuple[IntArray, FloatArray]:
        """Ids (n,) and vectors (n, D) of an index. Raises :class:`DataError`: it does not hold them."""
        faiss, kind = self._faiss, type(index).__name__
        if kind in ("IndexIDMap", "IndexIDMap2"):
            rows, vectors = self._held(faiss.downcast_index(index.index))
            return faiss.vector_to_array(index.id_map)[rows], vectors
        if kind == "IndexPreTransform":
            for transform in self._chain(index):
                if type(transform).__name__ != "NormalizationTransform":
                    raise DataError(
                        f"{self._path}: a {type(transform).__name__} changes the vectors before they are stored, and "
                        "the originals are not in the file; build this index anew from the converted originals"
                    )
            return self._held(faiss.downcast_index(index.index))
        if kind == "IndexRefineFlat":
            return np.arange(index.ntotal), faiss.downcast_index(index.refine_index).reconstruct_n(0, index.ntotal)
        if kind in _HALVES and self._quantizer(index).qtype not in (
            faiss.ScalarQuantizer.QT_fp16,
            faiss.ScalarQuantizer.QT_bf16,
        ):
            raise DataError(f"{self._path}: {_why_not(kind)}")
        if kind in _IVF:
            return self._lists(index)
        if kind in (*_FLAT, "IndexHNSWFlat", "IndexNSGFlat", *_HALVES):
            return np.arange(index.ntotal), index.reconstruct_n(0, index.ntotal)
        raise DataError(f"{self._path}: {_why_not(kind)}")

    def _quantizer(self, index: Any) -> Any:
        """The scalar quantizer of an index of :data:`_HALVES`."""
        return self._faiss.downcast_index(index.storage).sq if type(index).__name__ == "IndexHNSWSQ" else index.sq

    def _lists(self, index: Any) -> tuple[IntArray, FloatArray]:
        """What lies in the lists of an IVF index, in the order of its ids."""
        from faiss.contrib.inspect_tools import get_invlist

        lists = [get_invlist(index.invlists, number) for number in range(index.nlist)]
        ids = np.concatenate([found for found, _ in lists])
        vectors = np.concatenate([self._decoded(index, number, codes) for number, (_, codes) in enumerate(lists)])
        order = np.argsort(ids, kind="stable")
        return ids[order], vectors[order]

    def _decoded(self, index: Any, number: int, codes: Any) -> FloatArray:
        """The vectors (n, D) of a list's codes (n, bytes), which may be differences from the list's centroid."""
        if type(index).__name__ == "IndexIVFFlat":
            return np.asarray(codes.view(np.float32).reshape(-1, index.d))
        size = index.coarse_code_size()
        prefix = np.frombuffer(number.to_bytes(size, "little"), np.uint8)
        whole = np.concatenate([np.tile(prefix, (len(codes), 1)), codes.reshape(-1, index.code_size)], axis=1)
        return np.asarray(index.sa_decode(np.ascontiguousarray(whole)), np.float32).reshape(-1, index.d)

    def _chain(self, index: Any) -> list[Any]:
        faiss = self._faiss
        return [faiss.downcast_VectorTransform(index.chain.at(at)) for at in range(index.chain.size())]

    def ids(self, rows: Rows) -> IntArray:
        """See :class:`Format`."""
        return self._ids[rows]

    def read(self, rows: Rows) -> FloatArray:
        """See :class:`Format`."""
        return self._vectors[rows]

    def search(self, queries: FloatArray, k: int) -> IntArray:
        """Ids (n, k) of what the index itself finds, with the parameters it is stored with; −1 where it finds less."""
        return np.asarray(self._index.search(np.ascontiguousarray(queries, np.float32), k)[1], np.int64)

    def changes(self, dim: int) -> list[str]:
        """See :class:`Format`."""
        said: list[str] = []
        for index in self._nested(self._index):
            kind = type(index).__name__
            if kind in _IVF:
                if self.rows < index.nlist:
                    said.append(
                        f"its {index.nlist} lists become {self.rows}: there are no more vectors to train them on"
                    )
                quantizer = type(self._faiss.downcast_index(index.quantizer)).__name__
                if quantizer not in (*_FLAT, "IndexHNSWFlat"):
                    said.append(f"its coarse quantizer, a {quantizer}, becomes an exact one")
                if type(self._faiss.downcast_InvertedLists(index.invlists)).__name__ == "OnDiskInvertedLists":
                    said.append("its lists on disk move into the index file, which is read into memory")
            elif kind == "IndexNSGFlat" and self.rows < _LEAST_FOR_A_GRAPH:
                raise DataError(
                    f"{self._path}: FAISS builds no NSG graph of fewer than {_LEAST_FOR_A_GRAPH} vectors, and this one "
                    f"has {self.rows}; make it a Flat index first"
                )
            elif kind == "IndexRefineFlat":
                self._check_base(index, dim)
        return said

    def _nested(self, index: Any) -> list[Any]:
        """The index and what is in it, outermost first."""
        inside = type(index).__name__ in ("IndexIDMap", "IndexIDMap2", "IndexPreTransform")
        return [index, *(self._nested(self._faiss.downcast_index(index.index)) if inside else ())]

    def _check_base(self, index: Any, dim: int) -> None:
        """Whether the compressed index under a refinement can be built and trained with vectors of ``dim``."""
        text, base = self._factory(index), self._faiss.downcast_index(index.base_index)
        try:
            self._faiss.index_factory(dim, text, index.metric_type)
        except RuntimeError as error:
            raise DataError(
                f"{self._path}: its base {text} cannot be built for dimension {dim}: "
                f"{str(error).splitlines()[-1][-160:]}"
            ) from None
        least = max(getattr(base, "nlist", 1), base.pq.ksub if hasattr(base, "pq") else 1)
        if self.rows < least:
            raise DataError(
                f"{self._path}: its base {text} is trained on at least {least} vectors, and it has {self.rows}; make "
                "it a Flat index first"
            )

    def _factory(self, index: Any) -> str:
        """How FAISS's factory names the compressed index under a refinement."""
        from faiss.contrib.factory_tools import reverse_index_factory

        base = self._faiss.downcast_index(index.base_index)
        try:
            return str(reverse_index_factory(base))
        except NotImplementedError:
            raise DataError(
                f"{self._path}: a refined {type(base).__name__} cannot be built anew by itself; build it anew from the "
                "converted vectors"
            ) from None

    def _like(self, index: Any, vectors: FloatArray) -> Any:
        """An index as the given one, trained for vectors (n, D2) and empty."""
        faiss, kind, dim, metric = self._faiss, type(index).__name__, vectors.shape[1], index.metric_type
        if kind in ("IndexIDMap", "IndexIDMap2"):
            return getattr(faiss, kind)(self._like(faiss.downcast_index(index.index), vectors))
        if kind == "IndexPreTransform":
            new = self._like(faiss.downcast_index(index.index), vectors)
            for transform in reversed(self._chain(index)):
                new = faiss.IndexPreTransform(faiss.NormalizationTransform(dim, transform.norm), new)
            return new
        if kind == "IndexRefineFlat":
            base = faiss.index_factory(dim, self._factory(index), metric)
            base.train(vectors)
            if hasattr(base, "nprobe"):
                base.nprobe = faiss.downcast_index(index.base_index).nprobe
            new = faiss.IndexRefineFlat(base)
            new.k_factor = index.k_factor
        elif kind in _IVF:
            new = self._like_ivf(index, vectors)
        elif kind == "IndexHNSWSQ":
            new = self._like_graph(index, dim)
            new.train(vectors)
        elif kind == "IndexHNSWFlat":
            new = self._like_graph(index, dim)
        elif kind == "IndexNSGFlat":
            new = faiss.IndexNSGFlat(dim, index.nsg.R, metric)
            for name in ("GK", "build_type", "nndescent_S", "nndescent_R", "nndescent_L", "nndescent_iter"):
                setattr(new, name, getattr(index, name))
            new.nsg.L, new.nsg.C, new.nsg.search_L = index.nsg.L, index.nsg.C, index.nsg.search_L
        elif kind == "IndexScalarQuantizer":
            new = faiss.IndexScalarQuantizer(dim, index.sq.qtype, metric)
            new.train(vectors)
        else:
            new = faiss.IndexFlat(dim, metric)
        new.metric_arg = index.metric_arg
        return new

    def _like_graph(self, index: Any, dim: int) -> Any:
        links, metric = index.hnsw.nb_neighbors(1), index.metric_type
        if type(index).__name__ == "IndexHNSWSQ":
            new: Any = self._faiss.IndexHNSWSQ(dim, self._quantizer(index).qtype, links, metric)
        else:
            new = self._faiss.IndexHNSWFlat(dim, links, metric)
        new.hnsw.efConstruction, new.hnsw.efSearch = index.hnsw.efConstruction, index.hnsw.efSearch
        return new

    def _like_ivf(self, index: Any, vectors: FloatArray) -> Any:
        faiss, dim = self._faiss, vectors.shape[1]
        quantizer: Any = faiss.downcast_index(index.quantizer)
        graph = type(quantizer).__name__ == "IndexHNSWFlat"
        coarse = self._like_graph(quantizer, dim) if graph else faiss.IndexFlat(dim, quantizer.metric_type)
        lists, metric = min(index.nlist, len(vectors)), index.metric_type
        if type(index).__name__ == "IndexIVFFlat":
            new = faiss.IndexIVFFlat(coarse, dim, lists, metric)
        else:
            new = faiss.IndexIVFScalarQuantizer(coarse, dim, lists, index.sq.qtype, metric, index.by_residual)
        new.quantizer_trains_alone = 2 if graph else 0
        new.train(vectors)
        new.nprobe, new.parallel_mode = min(index.nprobe, new.nlist), index.parallel_mode
        return new

    def build(self, vectors: FloatArray, target: Path, applied: Sequence[str] = ()) -> None:
        """See :class:`Format`. IVF is trained anew on the new vectors, graphs are built anew."""
        faiss = self._faiss
        vectors = np.ascontiguousarray(vectors, np.float32)
        try:
            new = self._like(self._index, vectors)
            if type(self._index).__name__ in ("IndexIDMap", "IndexIDMap2", *_IVF):
                new.add_with_ids(vectors, self._ids)
            else:
                new.add(vectors)
            for old, now in zip(self._nested(self._index), self._nested(faiss.downcast_index(new)), strict=True):
                if type(old).__name__ in _IVF:
                    now.set_direct_map_type(old.direct_map.type)
            faiss.write_index(new, str(target))
        except RuntimeError as error:
            raise DataError(
                f"{self._path}: FAISS cannot build the index anew: {str(error).splitlines()[-1][-200:]}; the "
                "gallery is whole"
            ) from None


def _plain(text: str) -> str:
    """What FAISS's message about a file that it does not read comes to."""
    unknown = re.search(r"Index type 0x\w+ \(.*\) not recognized", text)
    if unknown:
        return f"is no FAISS index, or of a kind that this FAISS does not know; taken are {TAKEN}"
    if "read error in" in text:
        return "is cut short or damaged: FAISS finds less in it than it announces; copy it again"
    return f"is no FAISS index, or a damaged one ({text.rpartition('Error: ')[2][-120:]}); taken are {TAKEN}"


def _why_not(kind: str) -> str:
    if kind == "IndexIVFFlatDedup":
        return "an IndexIVFFlatDedup keeps equal vectors once and hides whose they are; make it an IVF-Flat index"
    if _CODES.search(kind):
        return (
            f"a {kind} keeps compressed codes, from which the vectors cannot be had back; convert the original vectors "
            "or re-encode the images, and build this index anew"
        )
    return (
        f"a {kind} is not taken; taken are Flat, IVF-Flat, HNSW-Flat, NSG-Flat, SQfp16, RFlat, with L2norm or id maps"
    )
