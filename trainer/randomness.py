"""Random numbers by counter: pure functions of a seed and of what is counted. No draw depends on the world size, on a
worker or on a resume.

The mixing is SplitMix64's (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

import numpy as np
from numpy.typing import NDArray

GOLDEN = 0x9E3779B97F4A7C15
"""SplitMix64's increment, 2⁶⁴ divided by the golden ratio."""
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def mix(value: int) -> int:
    """SplitMix64's next output from the state ``value``, taken modulo 2⁶⁴.

    >>> hex(mix(0)), hex(mix(GOLDEN))  # the first two outputs of the generator seeded with 0
    ('0xe220a8397b1dcdaf', '0x6e789e6aa1b965f4')
    """
    value = (value + GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


def finalise(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser of every element; :func:`mix` of an array is ``finalise(x + GOLDEN)``.

    >>> [hex(n) for n in finalise(np.arange(1, 3, dtype=np.uint64) * np.uint64(GOLDEN)).tolist()]
    ['0xe220a8397b1dcdaf', '0x6e789e6aa1b965f4']
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_SECOND)
    return x ^ (x >> np.uint64(31))


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed in [0, 2⁶³) for the generators of one batch on one rank.

    >>> step_seed(1, 2, 0) != step_seed(1, 2, 1) != step_seed(1, 3, 1)
    True
    """
    return (seed * GOLDEN + step * _FIRST + rank * _SECOND + 1) % (1 << 63)


def block_seed(seed: int, block: int) -> int:
    """A seed in [0, 2⁶³) for one block of a tensor that is drawn block by block."""
    return (seed * 0x9E3779B1 + block * 0x85EBCA6B + 1) % (1 << 63)
