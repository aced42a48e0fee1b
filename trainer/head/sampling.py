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

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from trainer.randomness import mix

Counter = TypeVar("Counter", int, Tensor)
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Drawn:
    """The rows of a step: ``index`` (n,) local classes or None for all; the first ``negatives`` of them were drawn
    as such.

    ``samples`` (P,) are the samples whose class is on this rank and ``places`` (P,) their classes' places among the
    drawn. ``probability`` is S/C. ``own`` (u,) are the places of the batch's classes that are on this rank, each once,
    in ascending order of the classes.
    """

    index: Tensor | None
    negatives: int
    samples: Tensor
    places: Tensor
    probability: float
    own: Tensor


def stratum_count(total: int, rate: float) -> int:
    """S, how many of C classes are drawn at a sample rate; at least one, if there is one."""
    return min(total, max(1, round(rate * total)))


def draw_negatives(
    seed: int, step: int, total: int, rate: float, start: int, stop: int, device: torch.device | None = None
) -> Tensor:
    """The drawn classes of a rank, as ascending local rows in [0, stop − start), int64 (S_local,).

    Args:
        seed: the run's seed.
        step: the update's number.
        total: C, all classes.
        rate: share of them to draw.
        start: first class of the rank.
        stop: one past its last class.
        device: where the result is wanted.
    """
    strata = stratum_count(total, rate)
    key = mix(mix(seed) ^ (step & _MASK))
    offset = mix(key ^ _MASK) % max(total, 1)
    parts = []
    for low, high in _rotated(start, stop, offset, total):
        first, last = ((low + 1) * strata - 1) // total, (high * strata - 1) // total
        k = torch.arange(first, last + 1, dtype=torch.int64, device=device)
        begin = k * total // strata
        size = (k + 1) * total // strata - begin
        drawn = begin + (_hash(k, key) >> 31) % size
        # Only the first and the last stratum may reach over the edge of [low, high); decide them on the host,
        # without a device sync.
        skip_first = not low <= _draw_one(first, key, total, strata) < high
        skip_last = last > first and not low <= _draw_one(last, key, total, strata) < high
        drawn = drawn[int(skip_first) : len(drawn) - int(skip_last)]
        parts.append((drawn + offset) % total - start)
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)


def join_positives(negatives: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """Add the positives that were not drawn to the drawn rows.

    Args:
        negatives: ascending local rows (S,), as :func:`draw_negatives` returns them.
        positives: local rows of the batch's labels (P,), with repetitions.

    Returns:
        The rows of the step (S + U,), negatives first, and the place of each positive among them (P,).
    """
    place = torch.searchsorted(negatives, positives)
    inside = place.clamp_max(max(len(negatives) - 1, 0))
    found = negatives[inside] == positives if len(negatives) else torch.zeros_like(positives, dtype=torch.bool)
    extra, inverse = torch.unique(positives[~found], return_inverse=True)
    place = place.clone()
    place[~found] = len(negatives) + inverse
    return torch.cat([negatives, extra]), place


def _rotated(start: int, stop: int, offset: int, total: int) -> list[tuple[int, int]]:
    """The classes [start, stop) in coordinates rotated by ``offset``: one interval, or two where they wrap around."""
    if stop <= start:
        return []
    low = (start - offset) % total
    high = low + stop - start
    return [(low, high)] if high <= total else [(low, total), (0, high - total)]


def _draw_one(k: int, key: int, total: int, strata: int) -> int:
    begin = k * total // strata
    return begin + (_hash(k, key) >> 31) % ((k + 1) * total // strata - begin)


# The strata's hash must be the same on tensors and on Python integers. Torch has no unsigned 64-bit product, so it
# works on 31-bit halves: two rounds of multiply-xorshift on values < 2**31 never leave int64, and the key enters
# each round.
_ROUNDS = ((0x45D9F3B, 15), (0x2C1B3C6D, 13))


def _hash(k: Counter, key: int) -> Counter:
    """62-bit hashes of counters (an int64 tensor or one Python integer) under a 64-bit key."""
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
