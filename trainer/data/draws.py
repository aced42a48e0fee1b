"""The numbers that augmentation draws: a pure, vectorised function of (seed, epoch, record, copy, stream).

A sample's augmentation must not depend on the rank, the batch or the thread that handles it, so nothing here has a
state.
"""

import numpy as np
from numpy.typing import NDArray

from trainer.randomness import GOLDEN, finalise

_GOLDEN = np.uint64(GOLDEN)


def uniforms(
    seed: int, epoch: int, records: NDArray[np.int64], copies: NDArray[np.int64], streams: int
) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), shape (n, streams): row i belongs to sample i, whatever the other samples are."""
    with np.errstate(over="ignore"):
        state = np.full(len(records), np.uint64(seed % 2**64))
        for counter in (np.full(len(records), epoch), records, copies):
            state = finalise(state + _GOLDEN) ^ finalise(counter.astype(np.uint64) + _GOLDEN)
        stream = np.arange(1, streams + 1, dtype=np.uint64) * _GOLDEN
        bits = finalise(finalise(state)[:, None] + stream[None, :])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normals(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard normal numbers from two equally shaped arrays of uniform ones (Box and Muller, 1958)."""
    return np.asarray(np.sqrt(-2.0 * np.log1p(-first)) * np.cos(2.0 * np.pi * second))
