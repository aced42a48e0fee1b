"""What a search for weights tries, and whom it keeps: the same for ``lce tune`` and for the comparison of methods, so
that no method is tuned less than another.

Successive halving (Jamieson and Talwalkar, AISTATS 2016): many weights get short training runs; the better half of them
gets runs of twice as many updates, and so on. Each run has a whole learning rate schedule of its own, because figures
from before the end of a schedule say little about those after it. Each rung costs about as many updates as the first.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """The weights of a method that are tried.

    Attributes:
        keys: of its section; all of them get the same value.
        low, high: the ends, both above 0.
    """

    keys: tuple[str, ...]
    low: float
    high: float


RANGES = {
    "lce": Range(("alignment_weight", "boundary_weight"), 2.0, 60.0),
    "l2": Range(("weight",), 3.1, 97.0),
    "bct": Range(("weight",), 0.3, 10.0),
    "unibct": Range(("weight",), 0.3, 10.0),
    "ndpp": Range(("weight",), 0.3, 10.0),
    "bt2": Range(("weight",), 0.3, 10.0),
    "advbct": Range(("weight", "boundary_weight"), 3.0, 100.0),
    "mixbct": Range(("mix_share",), 0.2, 0.9),
    "fct": Range(("weight",), 3.0, 100.0),
}
"""``compat.method`` → what is tried unless it is said otherwise: a factor of 30 where the weight has no upper end."""


def points(ranges: Sequence[Range], count: int) -> list[tuple[float, ...]]:
    """``count`` different choices, one weight for each range, evenly spread in the logarithms, with two digits.

    One range: from end to end (the middle for a single one). Several: the first points of a Kronecker sequence
    (the R_d of Roberts, 2018), which fills the box evenly however many are taken.
    """
    shares: list[tuple[float, ...]]
    if len(ranges) == 1:
        shares = [(i / (count - 1) if count > 1 else 0.5,) for i in range(count)]
    else:
        root = _root(len(ranges))
        shares = [tuple((0.5 + (i + 1) / root ** (d + 1)) % 1 for d in range(len(ranges))) for i in range(count)]
    made = [tuple(_between(one, s) for one, s in zip(ranges, share, strict=True)) for share in shares]
    return list(dict.fromkeys(made))


def _between(one: Range, share: float) -> float:
    return float(f"{one.low * (one.high / one.low) ** share:.2g}")


def _root(dimensions: int) -> float:
    """The positive root of x^(d+1) = x + 1."""
    x = 2.0
    for _ in range(60):
        x = (1 + x) ** (1 / (dimensions + 1))
    return x


def best_first(scores: Mapping[T, tuple[float, ...] | None]) -> list[T]:
    """Those that have a score, the highest first; of equal ones the earlier."""
    known = {one: score for one, score in scores.items() if score is not None}
    return sorted(known, key=lambda one: known[one], reverse=True)


def survivors(scores: Mapping[T, tuple[float, ...] | None]) -> list[T]:
    """Who gets a longer run: the better half of all that were tried, the best first. None: could not be trained."""
    return best_first(scores)[: math.ceil(len(scores) / 2)]


def rung_sizes(candidates: int, rungs: int) -> list[int]:
    """How many runs each rung has at most."""
    sizes = [candidates]
    while len(sizes) < rungs:
        sizes.append(math.ceil(sizes[-1] / 2))
    return sizes
