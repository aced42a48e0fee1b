"""Which rank owns which classes: the one place that knows."""

from dataclasses import dataclass

from trainer.machine import largest_share


@dataclass(frozen=True)
class ClassRange:
    """The contiguous classes [start, stop) that a rank owns, of ``total`` classes; c = stop − start may be 0."""

    start: int
    stop: int
    total: int

    @property
    def size(self) -> int:
        """c, the number of local classes."""
        return self.stop - self.start


def class_range(total: int, rank: int, world_size: int) -> ClassRange:
    """The classes of one rank: ⌈C/W⌉ a rank, the last ranks fewer or none, as DTensor's ``Shard(0)`` splits.

    >>> [class_range(10, r, 4).size for r in range(4)], [class_range(5, r, 4).size for r in range(4)]
    ([3, 3, 3, 1], [2, 2, 1, 0])

    Raises:
        ValueError: ``total`` < 0, ``world_size`` < 1 or ``rank`` outside [0, world_size).
    """
    if total < 0 or world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"no class range for {total} classes, rank {rank} of {world_size}")
    width = largest_share(total, world_size)
    start = min(rank * width, total)
    return ClassRange(start, min(start + width, total), total)
