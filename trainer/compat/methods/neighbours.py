"""The nearest centres of a bank to some of its own: exactly, or, for many on a CPU, in inverted lists.

Inverted lists (Sivic and Zisserman, ICCV 2003; as IVF in Johnson, Douze, Jégou, "Billion-scale similarity search with
GPUs", 2017): the bank's centres are listed under the nearest of some centroids, and a row is compared with those of its
nearest lists alone. How many lists that are is not set but found: for some centres the true neighbours are searched,
and so many lists are taken as hold :data:`RECALL` of them. All of it follows from the bank alone, so that any number of
ranks finds the same.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from trainer.compat.bank.center_bank import CenterBank

log = logging.getLogger(__name__)

ROWS, COLUMNS = 2048, 16384
"""Rows by the bank's classes that are compared at a time: 128 MiB of cosines in float32."""
EXACT = 1 << 34
"""So many cosines are taken on a CPU in about two minutes; above that many it searches in lists."""
LISTED = 1 << 20
"""Of the bank's classes at a time in lists: 2 GiB of centres of dimension 512 in float32."""
CHUNK = 1 << 17
"""Rows at a time that are searched in lists."""
RECALL = 0.97
"""The share of the true neighbours that the lists are to hold."""
HELPS = 0.2
"""Lists are searched up to this share of them: a cosine there takes a few times as long as one of all."""
SAMPLED = 1000
"""Centres whose true neighbours are searched to find how many lists that takes."""
ITERATIONS, SAMPLES_OF_A_LIST = 5, 32
"""Of k-means."""
SAID_EVERY = 30.0
"""Seconds between two lines about how far a long search is."""


@dataclass
class Nearest:
    """The nearest of what has come by: cosines ``near`` (k, n) and class numbers ``who`` (k, n) int64, −1 where there
    is none yet."""

    near: Tensor
    who: Tensor

    @staticmethod
    def none(rows: Tensor, count: int) -> "Nearest":
        """Of ``rows`` (k, D), before anything has come by."""
        shape, device = (len(rows), count), rows.device
        near = torch.full(shape, -torch.inf, dtype=rows.dtype, device=device)
        return Nearest(near, torch.full(shape, -1, dtype=torch.int64, device=device))

    def take(self, which: Tensor | slice, numbers: Tensor, cosines: Tensor, classes: Tensor) -> None:
        """Let the rows ``which``, of the classes ``numbers`` (k',), see ``classes`` (c,) int64, in ascending order, at
        ``cosines`` (k', c), which are changed."""
        at = torch.searchsorted(classes, numbers).clamp_max(len(classes) - 1)
        itself = classes[at] == numbers
        cosines[itself.nonzero()[:, 0], at[itself]] = -torch.inf
        count = self.near.shape[1]
        block = cosines.topk(min(count, len(classes)))  # few of many; then of few, so that little is moved
        best = torch.cat([self.near[which], block.values], 1).topk(count)
        known = torch.cat([self.who[which], classes[block.indices]], 1)
        self.near[which], self.who[which] = best.values, known.gather(1, best.indices)


def blocks(bank: CenterBank, like: Tensor, columns: int | None = None) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first class, unit centres (k, D) of those that have one, which these are (k,) from the first on), block by block
    of ``columns`` (:data:`COLUMNS`) classes, of the dtype and on the device of ``like``."""
    columns = columns or COLUMNS
    for first in range(0, bank.num_classes, columns):
        rows = bank.rows(first, min(first + columns, bank.num_classes))
        known = rows.mask.nonzero()[:, 0]
        if len(known):
            yield first, normalize(rows.centers[known].to(like)), known.to(like.device)


def nearest(rows: Tensor, numbers: Tensor, bank: CenterBank, count: int) -> Nearest:
    """The ``count`` nearest centres of a bank to some of its classes, a class being no neighbour of itself.

    Exact, unless more than :data:`EXACT` cosines would be taken on a CPU: then :data:`RECALL` of them, or about that.

    Args:
        rows: (k, D) unit centres of classes. numbers: (k,) int64, which those are.
        count: at most the bank's other centres.
    """
    centres = int(bank.per_class()["mask"].sum())
    if rows.device.type == "cpu" and centres * centres > EXACT:
        lists = [_listed(first, block, known) for first, block, known in blocks(bank, rows, LISTED)]
        probes = _probes(lists, bank, rows, count)
        if probes is not None:
            return _in_lists(rows, numbers, bank, count, lists, probes)
    return exact(rows, numbers, bank, count)


def exact(rows: Tensor, numbers: Tensor, bank: CenterBank, count: int) -> Nearest:
    """:func:`nearest` by comparing with every centre."""
    out, said = Nearest.none(rows, count), _Progress("comparing all centres", bank.num_classes)
    for first, block, known in blocks(bank, rows):
        for start in range(0, len(rows), ROWS):
            part = slice(start, start + ROWS)
            out.take(part, numbers[part], rows[part] @ block.T, first + known)
        said.at(first + COLUMNS)
    return out


@dataclass(frozen=True)
class _Lists:
    """Some classes of a bank, listed.

    ``centroids`` (L, D); ``members``: places in the block in the order of their lists; ``ends``: of the lists, (L,).
    """

    first: int
    centroids: Tensor
    members: Tensor
    ends: list[int]

    def part(self, number: int) -> Tensor:
        """Which places of the block are in a list."""
        return self.members[self.ends[number - 1] if number else 0 : self.ends[number]]


def _listed(first: int, block: Tensor, known: Tensor) -> _Lists:
    """List (n, D) centres under about 4 √n centroids, found by spherical k-means on some of them."""
    size = min(len(block), max(1, round(4 * len(block) ** 0.5)))
    generator = torch.Generator().manual_seed(first)
    drawn = block[torch.randperm(len(block), generator=generator)[: size * SAMPLES_OF_A_LIST]]
    centroids = drawn[:size].clone()
    for _ in range(ITERATIONS):
        own = _nearest_list(drawn, centroids)
        sums = torch.zeros_like(centroids).index_add_(0, own, drawn)
        empty = torch.bincount(own, minlength=size) == 0
        centroids = torch.where(empty[:, None], centroids, normalize(sums))
    where = _nearest_list(block, centroids)
    return _Lists(first, centroids, where.argsort(stable=True), where.bincount(minlength=size).cumsum(0).tolist())


def _nearest_list(rows: Tensor, centroids: Tensor) -> Tensor:
    return torch.cat([(part @ centroids.T).argmax(1) for part in rows.split(ROWS)])


def _probes(lists: list[_Lists], bank: CenterBank, like: Tensor, count: int) -> int | None:
    """How many lists hold :data:`RECALL` of the true neighbours of some centres; None: too many to help."""
    known = bank.per_class()["mask"].nonzero()[:, 0]
    sampled = known[torch.linspace(0, len(known) - 1, min(SAMPLED, len(known))).long()]
    rows = normalize(torch.cat([bank.rows(n, n + 1).centers for n in sampled.tolist()]).to(like))
    true = exact(rows, sampled, bank, count)
    places = torch.zeros_like(true.who)  # of the neighbour's list among the lists of its block, by nearness to the row
    for one, (first, block, those) in zip(lists, blocks(bank, like, LISTED), strict=True):
        of = torch.empty(len(block), dtype=torch.int64)
        sizes = torch.tensor(one.ends).diff(prepend=torch.zeros(1, dtype=torch.int64))
        of[one.members] = torch.arange(len(sizes)).repeat_interleave(sizes)
        at = torch.searchsorted(those, (true.who - first).clamp(0, LISTED)).clamp_max(len(those) - 1)
        inside = (true.who >= first) & (true.who < first + LISTED)
        order = (rows @ one.centroids.T).argsort(1, descending=True).argsort(1)
        places = torch.where(inside, order.gather(1, of[at]), places)
    probes = int(places.flatten().double().quantile(RECALL, interpolation="higher")) + 1
    total, found = max(len(one.ends) for one in lists), float((places < probes).double().mean())
    if probes > HELPS * total:
        log.warning("neighbours of %s centres: lists do not help; all are compared", f"{len(known):,}")
        return None
    log.warning(
        "neighbours of %s centres: searched in %s of %s lists, which hold %.1f%% of those of %s of them",
        *(f"{len(known):,}", f"{probes:,}", f"{total:,}", 100 * found, f"{len(sampled):,}"),
    )
    return probes


def _in_lists(rows: Tensor, numbers: Tensor, bank: CenterBank, count: int, lists: list[_Lists], probes: int) -> Nearest:
    out, done = Nearest.none(rows, count), 0
    said = _Progress("searching in lists", len(lists) * len(rows))
    for one, (first, block, known) in zip(lists, blocks(bank, rows, LISTED), strict=True):
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            wanted = torch.zeros(len(one.ends), len(part), dtype=torch.bool)
            for begin in range(0, len(part), ROWS):
                near = (part[begin : begin + ROWS] @ one.centroids.T).topk(min(probes, len(one.ends)), sorted=False)
                wanted[:, begin : begin + ROWS].scatter_(0, near.indices.T, True)
            for number in range(len(one.ends)):
                members, which = one.part(number), wanted[number].nonzero()[:, 0]
                if not len(members) or not len(which):
                    continue
                seen = start + which
                out.take(seen, numbers[seen], part[which] @ block[members].T, first + known[members])
                said.at(done + len(part) * number // len(one.ends))
            done += len(part)
    return out


class _Progress:
    """Lines about how far a search is, when it is long."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._said = what, total, time.monotonic()

    def at(self, done: int) -> None:
        """So many of the total are done."""
        now = time.monotonic()
        if now - self._said >= SAID_EVERY:
            self._said = now
            log.warning("neighbours: %s, %.0f%% done", self._what, 100 * min(1.0, done / self._total))
