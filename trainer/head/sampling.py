"""Which classes take part in a step: every positive of the global batch, and negatives drawn by a counter-based
generator.

The C classes are cut into S = round(rate · C) strata of nearly equal size, rotated by an offset of the step, and
one class is drawn from each stratum. Offset and draws are hashes of (seed, step, stratum): whether a class is drawn
depends on the seed, the step and the class alone, never on the world size, on the rank or on how often the run was
resumed, and a rank finds its own draws in O(S/W) without looking at the classes that were not drawn.

*Estimator.* Each class is drawn with the same probability S/C (the rotation makes it exact); two neighbours in one
stratum are never drawn together, so sums over the drawn classes vary less than under independent draws. Like
Partial FC (An et al., ICCVW 2021) the default takes the softmax over positives and drawn negatives as it is, which
underestimates the full denominator. ``sampling_correction`` weights each drawn class that is not a positive of the
batch by C/S (Horvitz–Thompson), which makes the sum over the negatives unbiased.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.distributed import upload
from trainer.head.partition import ClassRange
from trainer.head.sizes import stratum_count
from trainer.randomness import mix

Counter = TypeVar("Counter", int, Tensor, NDArray[np.int64])
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Drawn:
    """The rows of a step: ``index`` (n,) local classes or None for all; the first ``negatives`` of them were drawn
    as such.

    ``samples`` (P,) are the samples whose class is on this rank, by ascending ``places`` (P,) of their classes among
    the drawn; ``place_list`` are the same on the host. ``probability`` is S/C. ``own`` (u,) are the places of the
    batch's classes that are on this rank, each once, in ascending order of the classes; ``own_order`` (u,) sorts them,
    to ``own_list`` on the host. ``host_index`` makes ``index`` once more, on the host.
    """

    index: Tensor | None
    negatives: int
    samples: Tensor
    places: Tensor
    probability: float
    own: Tensor
    own_order: Tensor
    place_list: NDArray[np.int64]
    own_list: NDArray[np.int64]
    host_index: Callable[[], Tensor]


@dataclass(frozen=True)
class Draw:
    """The draw of one step: arithmetic on the numbers of strata and classes, alike on the host and on the device."""

    total: int
    strata: int
    key: int
    offset: int

    @classmethod
    def of(cls, seed: int, step: int, total: int, rate: float) -> "Draw":
        """For the run's seed, the update's number, C classes and the share of them to draw."""
        key = mix(mix(seed) ^ (step & _MASK))
        return cls(total, stratum_count(total, rate), key, mix(key ^ _MASK) % max(total, 1))

    def chosen(self, stratum: Counter) -> Counter:
        """The class that a stratum gives, in coordinates rotated by the offset."""
        begin = stratum * self.total // self.strata
        size = (stratum + 1) * self.total // self.strata - begin
        return begin + (_hash(stratum, self.key) >> 31) % size

    def parts(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The strata [first, last) whose draws lie among the classes [start, stop): one range, or two where the
        rotation wraps around.
        """
        found = []
        for low, high in _rotated(start, stop, self.offset, self.total):
            first, last = ((low + 1) * self.strata - 1) // self.total, (high * self.strata - 1) // self.total
            # Only the first and the last stratum may reach over the edge of [low, high).
            skip = last > first and not low <= self.chosen(last) < high
            found.append((first + (not low <= self.chosen(first) < high), last + 1 - skip))
        return found

    def negatives(self, start: int, stop: int, device: torch.device | None = None) -> Tensor:
        """The drawn classes of a rank, as ascending rows in [0, stop − start), int64 (S_local,)."""
        parts = [torch.arange(*part, dtype=torch.int64, device=device) for part in self.parts(start, stop)]
        none = torch.empty(0, dtype=torch.int64, device=device)
        return torch.cat([none, *((self.chosen(k) + self.offset) % self.total - start for k in parts)])

    def places(self, classes: NDArray[np.int64], start: int, stop: int) -> NDArray[np.int64]:
        """Where classes in [start, stop) stand among :meth:`negatives`; −1: not drawn."""
        rotated = (classes - self.offset) % max(self.total, 1)
        stratum = ((rotated + 1) * self.strata - 1) // max(self.total, 1)
        found, before = np.full_like(classes, -1), 0
        drawn = self.chosen(stratum) == rotated
        for first, last in self.parts(start, stop):
            here = drawn & (stratum >= first) & (stratum < last)
            found[here] = before + stratum[here] - first
            before += last - first
        return found


def draw_rows(labels: NDArray[np.int64], classes: ClassRange, draw: Draw | None, device: torch.device) -> Drawn:
    """The rows of a step of the rank that owns ``classes``: all, or the drawn ones and the batch's own.

    Everything is decided on the host, and goes to the device in one copy that nothing waits for.

    Args:
        labels: (B,) of all ranks; −1: no class.
        draw: of this step; None: all rows take part.
    """
    samples = np.flatnonzero((labels >= classes.start) & (labels < classes.stop))
    distinct, among = np.unique(labels[samples], return_inverse=True)
    own, extra, negatives = distinct - classes.start, np.empty(0, np.int64), classes.size
    if draw is not None:
        negatives = sum(last - first for first, last in draw.parts(classes.start, classes.stop))
        own = draw.places(distinct, classes.start, classes.stop)
        extra = distinct[own < 0] - classes.start
        own[own < 0] = negatives + np.arange(len(extra))
    order, own_order = np.argsort(own[among], kind="stable"), np.argsort(own)
    places = own[among][order]

    def index_on(where: torch.device, undrawn: Tensor) -> Tensor:
        assert draw is not None
        return torch.cat([draw.negatives(classes.start, classes.stop, where), undrawn])

    to: list[Tensor] = upload([samples[order], places, own, own_order, extra], device)
    share = 1.0 if draw is None else draw.strata / draw.total
    host = partial(index_on, torch.device("cpu"), torch.from_numpy(extra))
    index = None if draw is None else index_on(device, to[4])
    return Drawn(index, negatives, to[0], to[1], share, to[2], to[3], places, own[own_order], host)


def _rotated(start: int, stop: int, offset: int, total: int) -> list[tuple[int, int]]:
    """The classes [start, stop) in coordinates rotated by ``offset``: one interval, or two where they wrap around."""
    if stop <= start:
        return []
    low = (start - offset) % total
    high = low + stop - start
    return [(low, high)] if high <= total else [(low, total), (0, high - total)]


# The strata's hash must be the same on tensors, arrays and Python integers. Torch has no unsigned 64-bit product, so it
# works on 31-bit halves: two rounds of multiply-xorshift on values < 2**31 never leave int64, and the key enters
# each round.
_ROUNDS = ((0x45D9F3B, 15), (0x2C1B3C6D, 13))


def _hash(k: Counter, key: int) -> Counter:
    """62-bit hashes of counters (an int64 tensor or array, or one Python integer) under a 64-bit key."""
    keys = _round_keys(key)
    low, high = (k ^ keys[0]) & 0x7FFFFFFF, ((k >> 31) ^ keys[1]) & 0x7FFFFFFF
    for factor, shift in _ROUNDS:
        low = (((low ^ (low >> shift)) * factor) ^ high ^ keys[2]) & 0x7FFFFFFF
        high = (((high ^ (high >> shift)) * factor) ^ low ^ keys[3]) & 0x7FFFFFFF
    high = ((high ^ (high >> 16)) * 0x297A2D39) & 0x7FFFFFFF
    return (high << 31) | low


def _round_keys(key: int) -> tuple[int, int, int, int]:
    other = mix(key)
    return key & 0x7FFFFFFF, (key >> 31) & 0x7FFFFFFF, other & 0x7FFFFFFF, (other >> 31) & 0x7FFFFFFF
