"""The order of the samples: a pure function of (seed, epoch), known to every rank and the same at every world size.

One epoch is a sequence of samples; a global batch is the next B of them; a rank takes its slice of each batch. Nothing
else decides what is trained on when, so a run resumed at (epoch, samples) on any number of ranks continues with exactly
the remaining samples.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainer.errors import DataError
from trainer.machine import largest_share

Bounds = NDArray[np.int64]
Sampling = Literal["shuffle", "class_balanced"]

_PERMUTATION, _CLASSES, _MEMBERS, _BLOCKS = 0, 1, 2, 3  # what a stream of random numbers is for


def slice_of(n: int, rank: int, world: int) -> slice:
    """A rank's slice of a global batch of n samples; sizes differ by at most one and may be 0.

    >>> [slice_of(5, rank, 3) for rank in range(3)]
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    small, extra = divmod(n, world)
    start = rank * small + min(rank, extra)
    return slice(start, start + small + (rank < extra))


@dataclass(frozen=True)
class Samples:
    """Some samples of an epoch, in order: record numbers and which repetition of its record each is (0, 1, …); (n,)."""

    epoch: int
    records: NDArray[np.int64]
    copies: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.records)


@dataclass(frozen=True)
class Blocks:
    """How neighbours are kept together for storage that is slow at random reads.

    Attributes:
        positions: (N,) int64, ascending: the first byte of each record to train on, counted through all files.
        block_bytes: records that begin within as many bytes are a block.
        buffer_bytes: the records of as many bytes of permuted blocks are permuted among themselves.
    """

    positions: NDArray[np.int64]
    block_bytes: int
    buffer_bytes: int

    def permutation(
        self, random: np.random.Generator, dtype: type[np.signedinteger[Any]]
    ) -> tuple[NDArray[Any], Bounds]:
        """A permutation of the N records, and (g,) where each buffer of it ends.

        Where blocks begin is drawn too, so that the records at their borders have other neighbours in each epoch.
        """
        shift = int(random.integers(self.block_bytes))
        number = (self.positions + shift) // self.block_bytes
        edges = np.concatenate([[0], np.flatnonzero(np.diff(number)) + 1, [len(number)]]).astype(np.int64)
        del number
        chosen = random.permutation(len(edges) - 1)
        out = np.empty(len(self.positions), dtype)
        at, ends, width = 0, [], max(1, self.buffer_bytes // self.block_bytes)
        for start in range(0, len(chosen), width):
            buffer = chosen[start : start + width]
            members = np.concatenate([np.arange(edges[b], edges[b + 1], dtype=dtype) for b in buffer])
            out[at : at + len(members)] = random.permutation(members)
            at += len(members)
            ends.append(at)
        return out, np.array(ends, np.int64)


class Order:
    """The samples of every epoch.

    Args:
        records: (N,) int64, the record numbers to train on.
        labels: (N,) int64, their labels; only class-balanced sampling looks at them.
        seed: the run's seed.
        sampling: ``shuffle``: a permutation, every record once. ``class_balanced``: N samples in which the counts of
            any two classes differ by at most one, whatever ``repeat`` is; the records of a class take turns.
        repeat: repeated augmentation (Hoffer et al., "Augment your batch", 2020): N/repeat records of a permutation
            (⌈·⌉), each ``repeat`` times in a row with its own augmentation. Where classes are balanced, the last record
            of a class is repeated as often as its count allows.
        blocks: with ``shuffle``: permute blocks and the records of a buffer instead of all records.
    """

    def __init__(
        self,
        records: NDArray[np.int64],
        labels: NDArray[np.int64] | None = None,
        *,
        seed: int,
        sampling: Sampling = "shuffle",
        repeat: int = 1,
        blocks: Blocks | None = None,
    ) -> None:
        self.records, self.seed, self.sampling, self.repeat = records, seed, sampling, repeat
        self.blocks = blocks
        self._ends: Bounds = np.array([len(records)])
        self._epoch: tuple[int, NDArray[np.int64], NDArray[np.int64] | None] | None = None
        if sampling == "class_balanced":
            if labels is None:
                raise ValueError("class-balanced sampling needs the labels")
            self._by_class = np.argsort(labels, kind="stable")
            _, self._first, self._count = np.unique(labels[self._by_class], return_index=True, return_counts=True)

    def __len__(self) -> int:
        """Samples per epoch."""
        return len(self.records)

    def take(self, epoch: int, start: int, stop: int) -> Samples:
        """Samples [start, stop) of an epoch. The epoch's permutation is kept until another epoch is asked for."""
        positions, copies = self._kept(epoch)
        chosen = positions[start:stop]
        times = np.zeros(len(chosen), np.int64) if copies is None else copies[start:stop].astype(np.int64)
        return Samples(epoch, self.records[chosen], times)

    def next_buffer(self, epoch: int, sample: int) -> int:
        """Where in an epoch the buffer after the one of ``sample`` ends: up to there, storage may read ahead."""
        self._kept(epoch)
        at = int(np.searchsorted(self._ends, sample, side="right")) + 1
        return min(int(self._ends[min(at, len(self._ends) - 1)]) * self.repeat, len(self))

    def _kept(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = None  # frees the old permutation before the new one is made
            self._epoch = (epoch, *self._draw(epoch))
        return self._epoch[1:]

    def _random(self, epoch: int, purpose: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch << 8 | purpose]))

    def _draw(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        n = len(self.records)
        dtype = np.int32 if n < 2**31 else np.int64
        if self.sampling == "class_balanced":
            if self.repeat > 1:
                return self._balanced_repeats(epoch)
            positions, copies = self._balanced(epoch)
        elif self.blocks is not None:
            positions, self._ends = self.blocks.permutation(self._random(epoch, _BLOCKS), dtype)
            copies = None
        else:
            positions, copies = self._random(epoch, _PERMUTATION).permutation(np.arange(n, dtype=dtype)), None
        if self.repeat == 1:
            return positions, copies
        few = positions[: -(-n // self.repeat)]
        again = np.tile(np.arange(self.repeat), len(few))
        return np.repeat(few, self.repeat)[:n], again[:n]

    def _balanced(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        n, classes = len(self.records), len(self._count)
        rounds = -(-n // classes)
        random = self._random(epoch, _CLASSES)
        drawn = np.concatenate([random.permutation(classes) for _ in range(rounds)])[:n]
        turn = np.repeat(np.arange(rounds), classes)[:n]
        first_turn = self._random(epoch, _MEMBERS).integers(0, self._count)
        member = (first_turn[drawn] + turn) % self._count[drawn]
        return self._by_class[self._first[drawn] + member], turn // self._count[drawn]

    def _balanced_repeats(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """As :meth:`_balanced`, with each drawn record ``repeat`` times in a row, but for the last of a class."""
        n, classes, repeat = len(self.records), len(self._count), self.repeat
        random = self._random(epoch, _CLASSES)
        wanted = np.full(classes, n // classes)
        wanted[random.permutation(classes)[: n % classes]] += 1
        rounds = -(-int(wanted.max()) // repeat)
        drawn = np.concatenate([random.permutation(classes) for _ in range(rounds)])
        turn = np.repeat(np.arange(rounds), classes)
        times = np.clip(wanted[drawn] - turn * repeat, 0, repeat)
        first_turn = self._random(epoch, _MEMBERS).integers(0, self._count)
        member = (first_turn[drawn] + turn) % self._count[drawn]
        within = np.arange(n) - np.repeat(np.cumsum(times) - times, times)
        positions = np.repeat(self._by_class[self._first[drawn] + member], times)
        return positions, np.repeat(turn // self._count[drawn] * repeat, times) + within


def mixing(order: Order, groups: NDArray[np.int64], batch_size: int, epoch: int = 0) -> float:
    """How far an order is from a uniform one: the pairs of samples in one batch that are of the same group, divided by
    as many as a permutation of all samples has on average. 1: as mixed as at random; 10: ten times as many.

    Args:
        order: the order. groups: (N,) int64 ≥ 0, the group of each sample's record by its rank in ``order.records``:
            its class, or the part of the file that it lies in. batch_size: B. epoch: which.

    With blocks, a class-sorted file comes to up to (bytes of the file) / (bytes of the buffer), and a file that was
    shuffled once to 1.
    """
    n = len(order) // batch_size * batch_size
    taken = np.searchsorted(order.records, order.take(epoch, 0, n).records)
    batches = np.sort(groups[taken].reshape(-1, batch_size), axis=1)
    counts = np.bincount(groups[taken])
    expected = float((counts * (counts - 1.0)).sum()) / (n * (n - 1.0)) * batch_size * (batch_size - 1) * len(batches)
    keys = (batches + np.arange(len(batches))[:, None] * (int(groups.max()) + 1)).ravel()
    _, same = np.unique(keys, return_counts=True)
    return float((same * (same - 1.0)).sum()) / expected if expected else 1.0


@dataclass(frozen=True)
class Slot:
    """One global batch as a rank sees it: its own samples, and the position (epoch, samples) after the batch."""

    samples: Samples
    next_epoch: int
    next_samples: int


class Schedule:
    """Cuts the epochs of an :class:`Order` into global batches and gives a rank its slice of each.

    Args:
        order: the samples.
        batch_size: B, the global batch.
        rank, world: who we are among how many.
        drop_last: drop an epoch's incomplete last batch; otherwise it is kept, smaller, and no sample is seen twice.
    """

    def __init__(self, order: Order, batch_size: int, rank: int = 0, world: int = 1, drop_last: bool = False) -> None:
        self.order, self.batch_size, self.rank, self.world, self.drop_last = order, batch_size, rank, world, drop_last
        self.samples_per_epoch = len(order) // batch_size * batch_size if drop_last else len(order)
        if self.samples_per_epoch == 0:
            raise DataError(
                f"data.batch_size = {batch_size} with data.drop_last leaves no batch of {len(order)} records; lower it"
                if len(order)
                else "the data set has no record to train on (every label is −1 or the set is empty)"
            )
        self.steps_per_epoch = -(-self.samples_per_epoch // batch_size)

    @property
    def largest_slice(self) -> int:
        """The most samples this rank ever gets in one batch."""
        return largest_share(self.batch_size, self.world)

    def check(self, epoch: int, samples: int) -> None:
        """Raise :class:`DataError` unless (epoch, samples) is a position of this schedule."""
        if epoch < 0 or not 0 <= samples <= len(self.order):
            raise DataError(
                f"cannot continue at epoch {epoch}, sample {samples}: an epoch of this data set has {len(self.order)} "
                "samples; was the data set changed since the checkpoint?"
            )

    def sizes(self, samples: int, count: int) -> list[int]:
        """How many samples each of the next ``count`` global batches has, from a position in an epoch on."""
        out: list[int] = []
        while len(out) < count:
            stop = min(samples + self.batch_size, self.samples_per_epoch)
            if stop > samples and not (self.drop_last and stop - samples < self.batch_size):
                out.append(stop - samples)
            samples = stop if samples < stop < self.samples_per_epoch else 0
        return out

    def slots(self, epoch: int, samples: int) -> Iterator[Slot]:
        """This rank's part of every batch from a position on, without end."""
        while True:
            stop = min(samples + self.batch_size, self.samples_per_epoch)
            if stop <= samples or (self.drop_last and stop - samples < self.batch_size):
                epoch, samples = epoch + 1, 0
                continue
            mine = slice_of(stop - samples, self.rank, self.world)
            taken = self.order.take(epoch, samples + mine.start, samples + mine.stop)
            last = stop >= self.samples_per_epoch
            yield Slot(taken, epoch + last, 0 if last else stop)
            epoch, samples = (epoch + 1, 0) if last else (epoch, stop)
