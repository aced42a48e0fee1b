"""The ranks' classes are those that torch's own sharding gives them, divisible counts and empty ranks included."""

import pytest
import torch

from trainer.head.partition import class_range


@pytest.mark.parametrize("world", range(1, 9))
def test_ranges_are_those_of_torch_chunk(world: int) -> None:
    for total in range(200):
        chunks = [(int(part[0]), int(part[-1]) + 1) for part in torch.arange(total).chunk(world) if len(part)]
        chunks += [(total, total)] * (world - len(chunks))
        ranges = [class_range(total, rank, world) for rank in range(world)]
        assert [(mine.start, mine.stop) for mine in ranges] == chunks
        assert {mine.total for mine in ranges} == {total}


@pytest.mark.parametrize(("total", "rank", "world"), [(-1, 0, 1), (1, 0, 0), (1, 1, 1), (1, -1, 1)])
def test_what_is_no_partition_is_refused(total: int, rank: int, world: int) -> None:
    with pytest.raises(ValueError, match="no class range"):
        class_range(total, rank, world)
