"""The order: independent of the world size, every sample once, and resumed exactly anywhere."""

import itertools

import numpy as np
import pytest

from trainer.data.draws import normals, uniforms
from trainer.data.order import Blocks, Order, Schedule, mixing, slice_of
from trainer.errors import DataError

RECORDS = np.arange(100, 137)
GOLDEN_ORDER = [2, 4, 3, 0, 8, 6, 5, 10, 9, 11, 1, 7]
GOLDEN_BLOCKS = [0, 1, 6, 5, 7, 11, 8, 9, 10, 2, 3, 4]
GOLDEN_DRAWS = [[0.6768882746600114, 0.9398458737278207], [0.2562510007596326, 0.7181115443181715]]


def schedules(world: int, batch: int = 10, *, seed: int = 1, drop_last: bool = False) -> list[Schedule]:
    order = Order(RECORDS, seed=seed)
    return [Schedule(order, batch, rank, world, drop_last) for rank in range(world)]


def batches(parts: list[Schedule], count: int, epoch: int = 0, samples: int = 0) -> list[list[int]]:
    """Global batches, put together from the ranks' slices in rank order."""
    walks = [part.slots(epoch, samples) for part in parts]
    return [[r for walk in walks for r in next(walk).samples.records.tolist()] for _ in range(count)]


def flat(lists: list[list[int]]) -> list[int]:
    return [value for values in lists for value in values]


@pytest.mark.parametrize("world", [2, 3, 16])
def test_global_batches_do_not_depend_on_the_world_size(world: int) -> None:
    assert batches(schedules(world), 9) == batches(schedules(1), 9)


def test_another_seed_and_another_epoch_give_another_order() -> None:
    first = batches(schedules(1), 8)
    assert batches(schedules(1, seed=2), 8) != first
    assert first[:4] != first[4:]


def test_the_order_of_this_release_does_not_change() -> None:
    """Checkpoints hold a position in this order: a change of it would silently repeat and lose samples."""
    assert Order(np.arange(12), seed=7).take(3, 0, 12).records.tolist() == GOLDEN_ORDER
    drawn = uniforms(7, 3, np.array([0, 5]), np.array([0, 1]), 2)
    np.testing.assert_allclose(drawn, GOLDEN_DRAWS, rtol=1e-12)


def test_every_sample_once_and_the_tail_is_kept() -> None:
    epoch = batches(schedules(3), 4)
    assert [len(batch) for batch in epoch] == [10, 10, 10, 7]
    assert sorted(flat(epoch)) == RECORDS.tolist()


def test_drop_last_drops_the_tail() -> None:
    parts = schedules(2, drop_last=True)
    assert parts[0].steps_per_epoch == 3
    assert [len(batch) for batch in batches(parts, 4)] == [10, 10, 10, 10]
    epoch = flat(batches(parts, 3))
    assert len(set(epoch)) == 30


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("done", range(10))
def test_resume_anywhere_at_any_world_size(world: int, done: int) -> None:
    whole = batches(schedules(2), 12)
    walk = schedules(2)[0].slots(0, 0)
    epoch, samples = 0, 0
    for _ in range(done):
        slot = next(walk)
        epoch, samples = slot.next_epoch, slot.next_samples
    assert batches(schedules(world), 12 - done, epoch, samples) == whole[done:]


def test_resume_with_another_batch_size_gives_the_remaining_samples() -> None:
    seen = flat(batches(schedules(1), 2))
    rest = flat(batches(schedules(3, batch=6), 3, 0, 20))
    assert sorted(seen + rest) == RECORDS.tolist()


def test_slices_cover_a_batch_and_differ_by_at_most_one() -> None:
    for n in range(12):
        for world in range(1, 6):
            parts = [slice_of(n, rank, world) for rank in range(world)]
            assert [i for part in parts for i in range(n)[part]] == list(range(n))
            sizes = [part.stop - part.start for part in parts]
            assert max(sizes) - min(sizes) <= 1


def test_class_balanced_sampling_takes_turns() -> None:
    labels = np.array([0] * 30 + [1] * 6 + [4])
    order = Order(RECORDS, labels, seed=0, sampling="class_balanced")
    taken = order.take(0, 0, 37)
    counts = np.bincount(labels[taken.records - 100])[[0, 1, 4]]
    assert sorted(counts.tolist()) == [12, 12, 13]
    for label in (0, 1):
        _, uses = np.unique(taken.records[labels[taken.records - 100] == label], return_counts=True)
        assert uses.max() - uses.min() <= 1 or label == 0
        assert uses.max() <= -(-13 // (labels == label).sum())
    used = list(zip(taken.records.tolist(), taken.copies.tolist(), strict=True))
    assert len(set(used)) == 37  # every use of a record has its own augmentation


def test_repeated_augmentation_repeats_in_a_row_with_own_copies() -> None:
    taken = Order(RECORDS, seed=0, repeat=3).take(0, 0, 37)
    assert len(taken) == 37
    assert (taken.records[:36].reshape(12, 3) == taken.records[:36:3, None]).all()
    assert (taken.copies[:36].reshape(12, 3) == [0, 1, 2]).all()
    assert len(set(taken.records.tolist())) == 13


@pytest.mark.parametrize("repeat", [2, 3, 4, 5])
def test_balanced_classes_stay_balanced_when_records_are_repeated(repeat: int) -> None:
    labels = np.array([0] * 30 + [1] * 6 + [4])
    order = Order(RECORDS, labels, seed=0, sampling="class_balanced", repeat=repeat)
    for epoch in range(3):
        taken = order.take(epoch, 0, 37)
        assert len(taken) == 37
        drawn = labels[taken.records - 100]
        assert sorted(np.bincount(drawn)[[0, 1, 4]].tolist()) == [12, 12, 13]
        used = list(zip(taken.records.tolist(), taken.copies.tolist(), strict=True))
        assert len(set(used)) == 37  # every use of a record has its own augmentation
        runs = np.diff(np.flatnonzero(np.append(True, np.diff(taken.records) != 0)), append=37)
        assert (runs >= repeat).sum() >= 37 // repeat - 3  # in a row, but for the last of each class


POSITIONS = np.cumsum(np.random.default_rng(0).integers(800, 1200, 2000)) - 800


def blockwise(buffer_bytes: int = 200_000, seed: int = 1, **options: int) -> Order:
    """2,000 records of about 1,000 bytes in blocks of 20,000."""
    return Order(np.arange(2000), seed=seed, blocks=Blocks(POSITIONS, 20_000, buffer_bytes), **options)


def test_blocks_hold_every_record_once_and_are_permuted_anew() -> None:
    order = blockwise()
    epochs = [order.take(epoch, 0, 2000).records for epoch in range(2)]
    for records in epochs:
        assert np.array_equal(np.sort(records), np.arange(2000))
    assert not np.array_equal(*epochs)
    assert not np.array_equal(blockwise(seed=2).take(0, 0, 2000).records, epochs[0])
    assert np.array_equal(blockwise().take(1, 0, 2000).records, epochs[1])  # of seed and epoch alone
    # The first buffer holds ten whole blocks: runs of neighbours, not records from everywhere.
    buffer = np.sort(epochs[0][: order.next_buffer(0, 0) // 2])
    assert (np.diff(buffer) > 1).sum() <= 10
    assert abs(np.diff(np.argsort(epochs[0][: len(buffer)]))).mean() > len(buffer) / 4  # mixed within it


def test_blocks_do_not_depend_on_the_world_size_and_resume_exactly() -> None:
    def parts(world: int) -> list[Schedule]:
        return [Schedule(blockwise(repeat=2), 64, rank, world) for rank in range(world)]

    whole = batches(parts(1), 40)
    assert batches(parts(3), 40) == whole
    assert batches(parts(2), 40 - 7, 0, 7 * 64) == whole[7:]


def test_how_well_blocks_mix() -> None:
    """In a file sorted by class, pairs of one class are about as many times more frequent as the file is larger than
    the buffer; a file that was shuffled once, and a buffer as large as the file, give what a permutation of
    all gives."""
    sorted_classes = np.repeat(np.arange(500), 4)
    shuffled = np.random.default_rng(1).permutation(sorted_classes)

    def of(order: Order, groups: np.ndarray) -> float:
        return float(np.mean([mixing(order, groups, 50, epoch) for epoch in range(5)]))

    assert of(Order(np.arange(2000), seed=1), sorted_classes) == pytest.approx(1, abs=0.1)
    assert of(blockwise(), sorted_classes) == pytest.approx(10, rel=0.2)
    assert of(blockwise(20_000), sorted_classes) > 20
    assert of(blockwise(4_000_000), sorted_classes) == pytest.approx(1, abs=0.1)
    assert of(blockwise(), shuffled) == pytest.approx(1, abs=0.15)


def test_the_order_of_blocks_does_not_change() -> None:
    """Checkpoints hold a position in it."""
    order = Order(np.arange(12), seed=7, blocks=Blocks(np.arange(12) * 10, 30, 60))
    assert order.take(3, 0, 12).records.tolist() == GOLDEN_BLOCKS


@pytest.mark.parametrize("drop_last", [False, True])
def test_sizes_of_the_coming_batches(drop_last: bool) -> None:
    schedule = Schedule(Order(RECORDS, seed=0), 5, drop_last=drop_last)
    for position in range(38):
        slots = itertools.islice(schedule.slots(0, position), 9)
        assert schedule.sizes(position, 9) == [len(slot.samples) for slot in slots]


def test_impossible_positions_and_empty_sets_are_refused() -> None:
    with pytest.raises(DataError, match="epoch of this data set has 37 samples"):
        schedules(1)[0].check(0, 38)
    with pytest.raises(DataError, match="no record to train on"):
        Schedule(Order(np.empty(0, np.int64), seed=0), 4)
    with pytest.raises(DataError, match="leaves no batch of 37 records"):
        Schedule(Order(RECORDS, seed=0), 64, drop_last=True)


def test_draws_belong_to_the_sample_alone() -> None:
    records, copies = np.arange(1000), np.arange(1000) % 3
    whole = uniforms(5, 2, records, copies, 4)
    some = np.array([900, 3, 77])
    assert np.array_equal(uniforms(5, 2, records[some], copies[some], 4), whole[some])
    for other in (uniforms(6, 2, records, copies, 4), uniforms(5, 3, records, copies, 4)):
        assert not np.isin(other, whole).any()
    assert not np.isin(uniforms(5, 2, records, copies + 3, 4), whole).any()


def test_draws_are_uniform_and_independent() -> None:
    drawn = uniforms(1, 0, np.arange(200_000), np.zeros(200_000, np.int64), 4)
    assert abs(drawn.mean(0) - 0.5).max() < 0.003
    assert abs(drawn.std(0) - 12**-0.5).max() < 0.003
    assert abs(np.corrcoef(drawn.T) - np.eye(4)).max() < 0.01
    assert abs(np.corrcoef(drawn[1:, 0], drawn[:-1, 0])[0, 1]) < 0.01
    z = normals(drawn[:, 0], drawn[:, 1])
    assert abs(z.mean()) < 0.01
    assert abs(z.std() - 1) < 0.01
