"""The nearest centres of a bank to some of its own: exactly, or, for many on a CPU, by products of fewer dimensions.

All centres are turned to the axes along which they differ most, and the first of these axes alone say which of them may
be near: in bfloat16 where the processor multiplies it. Those are then compared in full. How many axes that takes is not
set but found: for some centres the true neighbours are searched, and so many axes are taken as find :data:`RECALL` of
them. All of it follows from the bank alone, so that any number of ranks finds the same.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from trainer.compat.bank.center_bank import CenterBank
from trainer.head.products import bfloat16_instructions

log = logging.getLogger(__name__)

ROWS, COLUMNS = 2048, 16384
"""Rows by the bank's classes that are compared at a time: 128 MiB of cosines in float32."""
EXACT = 1 << 34
"""So many cosines are taken on a CPU in about two minutes; above that many it looks at fewer dimensions first."""
BLOCK = 1 << 20
"""Of the bank's classes at a time in the search by fewer dimensions: 2 GiB of centres of dimension 512 in float32."""
TILE_ROWS, TILE, GROUP = 4096, 1 << 14, 32
"""Rows by classes of one of its products, and how many of these classes are asked for their largest at a time."""
OCTET = 8
"""So many groups are asked for their largest at a time."""
SOME = 128
"""Rows whose candidates are looked at one by one at a time, so that few are in memory."""
CANDIDATES = 3
"""So many centres are compared in full for each neighbour that is wanted."""
RECALL = 0.97
"""The share of the true neighbours that is to be found."""
SAMPLED = 1000
"""Centres whose true neighbours are searched to find how many axes that takes."""
AXES = 16
"""Into so many parts are all axes divided when it is tried how many of them suffice."""
SAID_EVERY = 30.0
"""Seconds between two lines about how far a long search is."""
INTEGER = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


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

    def take(self, which: slice, numbers: Tensor, cosines: Tensor, classes: Tensor) -> None:
        """Let the rows ``which``, of the classes ``numbers`` (k',), see ``classes`` (c,) int64, in ascending order, at
        ``cosines`` (k', c), which are changed."""
        at = torch.searchsorted(classes, numbers).clamp_max(len(classes) - 1)
        itself = classes[at] == numbers
        cosines[itself.nonzero()[:, 0], at[itself]] = -torch.inf
        best = cosines.topk(min(self.near.shape[1], len(classes)))
        self._merge(which, best.values, classes[best.indices])

    def take_some(self, which: slice, numbers: Tensor, cosines: Tensor, classes: Tensor) -> None:
        """The same where every row sees other classes: ``classes`` (k', c) int64, each at most once, −1 for none."""
        none = (classes == numbers[:, None]) | (classes < 0)
        self._merge(which, cosines.masked_fill(none, -torch.inf), classes.masked_fill(none, -1))

    def _merge(self, which: slice, cosines: Tensor, classes: Tensor) -> None:
        best = torch.cat([self.near[which], cosines], 1).topk(self.near.shape[1])
        self.near[which] = best.values
        self.who[which] = torch.cat([self.who[which], classes], 1).gather(1, best.indices)


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

    Exact, unless more than :data:`EXACT` cosines would be taken on a CPU: then :data:`RECALL` of them or more are found
    among those with a positive cosine, and the cosines of those that are found are exact.

    Args:
        rows: (k, D) unit centres of classes. numbers: (k,) int64, which those are.
        count: at most the bank's other centres.
    """
    centres = int(bank.per_class()["mask"].sum())
    if rows.device.type != "cpu" or centres * centres <= EXACT:
        return exact(rows, numbers, bank, count)
    return by_axes(rows, numbers, bank, count, enough_axes(bank, rows, count))


def exact(rows: Tensor, numbers: Tensor, bank: CenterBank, count: int) -> Nearest:
    """:func:`nearest` by comparing with every centre."""
    out, said = Nearest.none(rows, count), _Progress("comparing all centres", bank.num_classes)
    for first, block, known in blocks(bank, rows):
        for start in range(0, len(rows), ROWS):
            part = slice(start, start + ROWS)
            out.take(part, numbers[part], rows[part] @ block.T, first + known)
        said.at(first + COLUMNS)
    return out


def enough_axes(bank: CenterBank, like: Tensor, count: int) -> Tensor:
    """The axes (D, d) along which a bank's centres differ most, as few as find :data:`RECALL` of the ``count`` nearest
    of some centres."""
    known = bank.per_class()["mask"].nonzero()[:, 0]
    moments = torch.zeros(bank.dim, bank.dim, dtype=like.dtype)
    for _, block, _ in blocks(bank, like):
        moments += block.T @ block
    axes = torch.linalg.eigh(moments.double()).eigenvectors.flip(1).to(like.dtype)
    sampled = known[torch.linspace(0, len(known) - 1, min(SAMPLED, len(known))).long()]
    rows = normalize(torch.cat([bank.rows(n, n + 1).centers for n in sampled.tolist()]).to(like))
    true = exact(rows, sampled, bank, count)

    def share(some: Tensor) -> float:
        found = by_axes(rows, sampled, bank, count, some).who
        hits = (true.who[:, :, None] == found[:, None]).any(2)[true.near > 0]
        return float(hits.double().mean()) if len(hits) else 1.0

    def first(parts: int) -> Tensor:
        return axes[:, : -(-bank.dim * parts // AXES)]

    few, many = 0, AXES  # parts: few are too few, many suffice, since all of them miss only what rounding hides
    shares = dict[int, float]()
    while many - few > 1:
        middle = (few + many) // 2
        shares[middle] = share(first(middle))
        few, many = (few, middle) if shares[middle] >= RECALL else (middle, many)
    enough = first(many)
    holds = shares[many] if many in shares else share(enough)
    log.warning(
        "neighbours of %s centres: searched along %d of %d axes, which find %.1f%% of those of %s of them",
        *(f"{len(known):,}", enough.shape[1], bank.dim, 100 * holds, f"{len(sampled):,}"),
    )
    return enough


def by_axes(rows: Tensor, numbers: Tensor, bank: CenterBank, count: int, axes: Tensor) -> Nearest:
    """:func:`nearest` by comparing along ``axes`` (D, d), and in full what seems nearest there."""
    out, said = Nearest.none(rows, count), _Progress("comparing along some axes", bank.num_classes * len(rows))
    dtype = torch.bfloat16 if bfloat16_instructions() else torch.float32
    turned = (rows @ axes).to(dtype)
    for first, block, known in blocks(bank, rows, BLOCK):
        groups = _Groups((block @ axes).to(dtype))
        memory = block.new_empty(0)
        for start in range(0, len(rows), TILE_ROWS):
            part = slice(start, start + TILE_ROWS)
            candidates = groups.candidates(turned[part], CANDIDATES * count + 1)  # the class itself is one
            for begin, places in zip(range(start, len(rows), SOME), candidates.split(SOME), strict=False):
                some = slice(begin, begin + len(places))
                real, places = places < len(block), places.clamp_max(len(block) - 1)
                among = _rows(block, places, memory)  # (k', c, D)
                cosines = (among @ rows[some, :, None])[:, :, 0]
                out.take_some(some, numbers[some], cosines, (first + known[places]).masked_fill(~real, -1))
            said.at(first * len(rows) + len(block) * start)
    return out


class _Groups:
    """Some centres (n, d), :data:`GROUP` in a row being a group."""

    def __init__(self, block: Tensor) -> None:
        self._centres = pad(block, (0, 0, 0, -len(block) % (GROUP * OCTET)))
        self._products, self._members = block.new_empty(TILE * TILE_ROWS), block.new_empty(0)

    def candidates(self, rows: Tensor, count: int) -> Tensor:
        """The places of about the ``count`` largest positive products with ``rows`` (k, d), of the same dtype: (k, ≤
        count) int64, those from n on being of no centre.

        The largest product of each group is found first: as an integer, whose order is that of positive numbers of
        floating point, since processors are quick at that. The ``count`` largest lie in the ``count`` best groups.
        """
        size = len(self._centres) // GROUP
        best = torch.empty(size, len(rows), dtype=INTEGER[rows.dtype])
        for start in range(0, len(self._centres), TILE):
            tile = self._centres[start : start + TILE]
            products = self._products[: len(tile) * len(rows)].view(len(tile), len(rows))
            torch.mm(tile, rows.T, out=products)
            grouped = products.view(best.dtype).view(-1, GROUP, len(rows))
            torch.amax(grouped, 1, out=best[start // GROUP :][: len(grouped)])
        groups = _top(best.T.contiguous(), count)
        found = []
        for some, which in zip(rows.split(SOME), groups.split(SOME), strict=True):
            members = _rows(self._centres.view(size, -1), which, self._members)
            values = (members.view(len(some), -1, rows.shape[1]) @ some[:, :, None])[:, :, 0]
            inside = values.topk(min(count, values.shape[1]), sorted=False).indices
            found.append(which.gather(1, inside // GROUP) * GROUP + inside % GROUP)
        return torch.cat(found)


def _top(values: Tensor, count: int) -> Tensor:
    """The places (k, ≤ count) of the largest of ``values`` (k, n × :data:`OCTET`), in any order: by the largest of
    :data:`OCTET` at a time, since finding the largest of few is quicker."""
    width = values.shape[1] // OCTET
    best = values.view(len(values), OCTET, width).amax(1).topk(min(count, width), sorted=False).indices
    places = (best[:, :, None] + width * torch.arange(OCTET)).flatten(1)
    inside = values.gather(1, places).topk(min(count, places.shape[1]), sorted=False).indices
    return places.gather(1, inside)


def _rows(table: Tensor, places: Tensor, memory: Tensor) -> Tensor:
    """The rows of a table (n, d) at ``places`` (k, c), as (k, c, d), in ``memory``, which is made as large as it must
    be: new memory for each would take longer than the copies."""
    wanted = places.numel() * table.shape[1]
    if memory.numel() < wanted:
        memory.resize_(wanted)
    found = memory[:wanted].view(-1, table.shape[1])
    return torch.index_select(table, 0, places.flatten(), out=found).view(*places.shape, -1)


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
