"""Identification (1:N): exact nearest neighbours without an N × N matrix, rank-k leaving one out, open-set search."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.errors import DataError
from trainer.evaluation.arrays import BoolArray, FloatArray, IntArray

_BLOCK = 1 << 22  # scores held at a time (16 MiB of float32)


def search(queries: FloatArray, gallery: FloatArray, k: int) -> tuple[FloatArray, IntArray]:
    """The ``k`` gallery entries nearest to each query, best first: cosines (n, k) float32, numbers (n, k) int64.

    FAISS does it when it is installed (extra ``gallery``), blocks of matrix products otherwise; both are exact.
    """
    k = min(k, len(gallery))
    try:
        import faiss
    except ImportError:
        return search_blocks(queries, gallery, k)
    flat = faiss.IndexFlatIP(gallery.shape[1])
    flat.add(np.ascontiguousarray(gallery, np.float32))
    scores, found = flat.search(np.ascontiguousarray(queries, np.float32), k)
    return scores, found


def search_blocks(queries: FloatArray, gallery: FloatArray, k: int) -> tuple[FloatArray, IntArray]:
    """:func:`search` with NumPy alone."""
    scores = np.empty((len(queries), k), np.float32)
    found = np.empty((len(queries), k), np.int64)
    rows = max(1, _BLOCK // len(gallery))
    for a in range(0, len(queries), rows):
        block = queries[a : a + rows] @ gallery.T
        top = np.argpartition(-block, k - 1, axis=1)[:, :k]
        value = np.take_along_axis(block, top, 1)
        order = np.argsort(-value, axis=1, kind="stable")
        scores[a : a + rows] = np.take_along_axis(value, order, 1)
        found[a : a + rows] = np.take_along_axis(top, order, 1)
    return scores, found


@dataclass(frozen=True)
class Ranking:
    """Each image searched among all the others.

    counted (n,): the identity has another image, so a hit is possible. own_rank (n,): 0 when the best match is of the
    own identity, 1 for the second, …; the number looked at when it is not among them. nearest (n,): the best match;
    score (n,): its cosine.
    """

    counted: BoolArray
    own_rank: IntArray
    nearest: IntArray
    score: FloatArray

    def hits(self, rank: int = 1) -> BoolArray:
        """(n,) whether the own identity is among the ``rank`` best matches."""
        return self.counted & (self.own_rank < rank)

    def rate(self, rank: int = 1) -> float:
        """The share of counted images found at ``rank``."""
        return float(self.hits(rank).sum() / self.counted.sum())


def leave_one_out(queries: FloatArray, labels: IntArray, gallery: FloatArray | None = None, ranks: int = 10) -> Ranking:
    """Search each image among all others of the set.

    Args:
        queries: (n, D) unit embeddings of the query model. labels: (n,) identities.
        gallery: (n, D) unit embeddings of the same images by the gallery model; None: the query model's own.
        ranks: how many matches are looked at.

    An image is never found by itself, not by its embedding under the other model either. Images whose identity has no
    other image are distractors: they are searched among, but do not count as queries.
    """
    n = len(labels)
    k = min(ranks, n - 1)
    scores, found = search(queries, queries if gallery is None else gallery, k + 1)
    others = found != np.arange(n)[:, None]
    # The image itself, where it was found, goes last and is cut off: k others remain.
    order = np.argsort(~others, axis=1, kind="stable")[:, :k]
    found, scores = np.take_along_axis(found, order, 1), np.take_along_axis(scores, order, 1)
    own = labels[found] == labels[:, None]
    _, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    rank = np.where(own.any(1), own.argmax(1), k)
    return Ranking(sizes[inverse] > 1, rank, found[:, 0], scores[:, 0])


@dataclass(frozen=True)
class OpenSet:
    """Search of probes in a gallery of enrolled subjects, one entry each.

    rank: {k: share of mated probes whose subject is among the k best}. tpir: {FPIR: share of mated probes whose
    subject is the best match at or above the threshold}; threshold: {FPIR: the lowest score at which at most that
    share of non-mated probes is answered}.
    """

    mated: int
    non_mated: int
    rank: dict[int, float]
    tpir: dict[float, float]
    threshold: dict[float, float]


def open_set(
    probes: FloatArray,
    probe_subjects: IntArray,
    gallery: FloatArray,
    gallery_subjects: IntArray,
    *,
    ranks: Sequence[int] = (1, 5, 10),
    fpirs: Sequence[float] = (1e-2, 1e-1),
) -> OpenSet:
    """1:N, closed set (rank-k over mated probes) and open set (TPIR at FPIR; none without non-mated probes).

    Args:
        probes: (p, D) unit. probe_subjects: (p,). gallery: (g, D) unit. gallery_subjects: (g,), each subject once.

    Raises:
        DataError: an empty side, a subject enrolled twice, or no mated probe.
    """
    if len(probes) == 0 or len(gallery) == 0:
        raise DataError(f"1:N search: {len(probes)} probes in a gallery of {len(gallery)}; neither may be empty")
    names, counts = np.unique(gallery_subjects, return_counts=True)
    if counts.max() > 1:
        raise DataError(
            f"1:N gallery: subject {names[counts.argmax()]} is enrolled {counts.max()} times; merge its templates"
        )
    mated = np.isin(probe_subjects, names)
    if not mated.any():
        raise DataError(
            "1:N search: no probe's subject is enrolled in the gallery; are probe and gallery files of one protocol?"
        )
    scores, found = search(probes, gallery, max(ranks))
    own = gallery_subjects[found] == probe_subjects[:, None]
    rank = {k: float(own[mated, :k].any(1).mean()) for k in ranks}
    strangers = np.sort(scores[~mated, 0])[::-1]
    tpir, threshold = {}, {}
    for fpir in fpirs if len(strangers) else ():
        allowed = int(fpir * len(strangers) + 1e-9)
        limit = np.nextafter(strangers[allowed], np.float32(2)) if allowed < len(strangers) else strangers[-1]
        threshold[fpir] = float(limit)
        tpir[fpir] = float((own[mated, 0] & (scores[mated, 0] >= limit)).mean())
    return OpenSet(int(mated.sum()), int((~mated).sum()), rank, tpir, threshold)
