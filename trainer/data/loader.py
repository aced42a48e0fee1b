"""What all loaders share: the batch, the position in the data, and the damaged records that are skipped."""

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.index import Dataset
from trainer.data.order import Samples, Schedule, Slot
from trainer.data.pixels import image_problem
from trainer.distributed import send
from trainer.errors import DataError

log = logging.getLogger(__name__)

READ_AHEAD = 4
"""Batches ahead of the one at hand whose records the followers of a loader are told."""


@dataclass(frozen=True)
class Batch:
    """A rank's part of a global batch.

    Attributes:
        images: (b, 3, H, W) float32 on the rank's device: (pixel/255 − mean)/std in the data set's colour order.
        labels: (b,) int64 on the same device.
        records: (b,) int64 on the CPU, the record numbers.
    """

    images: Tensor
    labels: Tensor
    records: Tensor


class Loader(Protocol):
    """An endless source of batches with a position that can be saved and restored at any world size."""

    name: str
    steps_per_epoch: int
    bad_records: dict[int, str]

    def batches(self) -> Iterator[Batch]:
        """This rank's slice of every global batch, across epochs, from the current position on. b may be 0."""
        ...

    def sizes(self, count: int) -> list[int]:
        """How many samples the next ``count`` global batches have."""
        ...

    def state_dict(self) -> dict[str, int]:
        """The position: ``epoch``, and how many ``samples`` of it all ranks together were handed (not prefetched)."""
        ...

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go to a position; running ``batches()`` iterators end. Raises :class:`DataError`: no such position."""
        ...

    def follow(self, reader: Callable[[NDArray[np.int64]], None]) -> None:
        """Have ``reader`` told the record numbers of this rank's part of each batch, :data:`READ_AHEAD` batches
        before it is made; a loader that makes batches in advance tells them earlier still."""
        ...

    def close(self) -> None:
        """Release processes, threads and files."""
        ...


class PositionedLoader(ABC):
    """A loader that walks a :class:`Schedule`; subclasses turn its slots into batches.

    Attributes:
        bad_records: the damaged records this rank has met, with the reason.
    """

    name = ""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.steps_per_epoch = schedule.steps_per_epoch
        self.bad_records: dict[int, str] = {}
        self._epoch, self._samples = 0, 0
        self._source: Generator[tuple[Slot, Batch], None, None] | None = None
        self._followers: list[Callable[[NDArray[np.int64]], None]] = []

    @abstractmethod
    def _produce(self, epoch: int, samples: int) -> Generator[tuple[Slot, Batch], None, None]:
        """Slots with their batches, from a position on, without end."""

    def batches(self) -> Iterator[Batch]:
        """See :class:`Loader`."""
        self.close()
        source = self._source = self._produce(self._epoch, self._samples)
        try:
            while source is self._source:
                slot, batch = next(source)
                self._epoch, self._samples = slot.next_epoch, slot.next_samples
                yield batch
        finally:
            source.close()

    def follow(self, reader: Callable[[NDArray[np.int64]], None]) -> None:
        """See :class:`Loader`."""
        self._followers.append(reader)

    def _announced(self, slots: Iterator[Slot]) -> Iterator[Slot]:
        """``slots``, held back so that the followers hear of each :data:`READ_AHEAD` before it goes on. One pass over
        the order serves both: it keeps one epoch's permutation, and a loader may walk it in a thread of its own.
        """
        held = deque[Slot]()
        for slot in slots:
            for reader in self._followers:
                reader(slot.samples.records)
            held.append(slot)
            if not self._followers or len(held) >= READ_AHEAD:
                yield held.popleft()

    def sizes(self, count: int) -> list[int]:
        """See :class:`Loader`."""
        return self.schedule.sizes(self._samples, count)

    def state_dict(self) -> dict[str, int]:
        """See :class:`Loader`."""
        return {"epoch": self._epoch, "samples": self._samples}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """See :class:`Loader`."""
        epoch, samples = int(state["epoch"]), int(state["samples"])
        self.schedule.check(epoch, samples)
        self.close()
        self._epoch, self._samples = epoch, samples

    def close(self) -> None:
        """See :class:`Loader`. A later ``batches()`` starts again from the position."""
        if self._source is not None:
            self._source.close()
            self._source = None


def slots_ahead(dataset: Dataset, schedule: Schedule, epoch: int, samples: int) -> Iterator[Slot]:
    """:meth:`Schedule.slots`; where the order has blocks, storage is asked to read what this rank needs of the buffer
    at hand and of the next one, sorted by file and byte."""
    if schedule.order.blocks is None:
        yield from schedule.slots(epoch, samples)
        return
    ahead, reached = schedule.slots(epoch, samples), (epoch, samples)
    for slot in schedule.slots(epoch, samples):
        stop = schedule.order.next_buffer(slot.samples.epoch, samples)
        coming: list[NDArray[np.int64]] = []
        while reached < (slot.samples.epoch, stop):
            later = next(ahead)
            coming.append(later.samples.records)
            reached = (later.next_epoch, later.next_samples)
        if coming:
            dataset.store.will_need(np.concatenate(coming))
        yield slot
        samples = slot.next_samples


class Reader:
    """Reads the images of samples and skips damaged records, the same ones in every run and at every world size.

    A damaged record is replaced, image and label together, by the next record (by number) that is in use and sound. So
    no label ever belongs to another image, batches keep their size, and which records are used depends on the files
    alone.

    Args:
        dataset: the data set.
        max_bad: how many damaged records may be skipped.
        convert: gets a record and its image, and gives the image as the decoder can read it; raises
            :class:`ValueError`: it cannot.

    Raises:
        DataError: more damaged records are already known (from ``bad_records.npy``) than may be skipped.
    """

    def __init__(self, dataset: Dataset, max_bad: int, convert: Callable[[int, bytes], bytes] | None = None) -> None:
        self.dataset, self.max_bad, self.convert = dataset, max_bad, convert
        self.bad: dict[int, str] = {}
        for record in np.intersect1d(dataset.known_bad, dataset.kept):
            self.skip(int(record), f"{dataset.where(int(record))} is listed in bad_records.npy")

    def skip(self, record: int, reason: str) -> None:
        """Count a damaged record. Raises :class:`DataError` when there are more than allowed."""
        if record in self.bad:
            return
        self.bad[record] = reason
        if len(self.bad) > self.max_bad:
            raise DataError(
                f"{reason}; {len(self.bad)} damaged record(s), data.max_bad_records allows {self.max_bad}: "
                f"run `lce check --deep --write-bad {self.dataset.path}`"
            )
        log.warning("skipped: %s", reason)

    def fetch(self, record: int) -> tuple[int, bytes]:
        """The record that stands for ``record`` (itself, unless damaged) and its encoded image."""
        for _ in range(self.max_bad + 1):
            if record not in self.bad:
                try:
                    image = self.dataset.store.read(record)
                    problem = image_problem(image)
                    reason = problem and f"{self.dataset.where(record)}: {problem}"
                    if self.convert is not None and reason is None:
                        image = self.convert(record, image)
                except DataError as error:
                    reason = str(error)
                except ValueError as error:
                    reason = f"{self.dataset.where(record)} does not decode: {error}"
                if reason is None:
                    return record, image
                self.skip(record, reason)
            kept = self.dataset.kept
            record = int(kept[np.searchsorted(kept, record, side="right") % len(kept)])
        raise DataError(f"{self.dataset.path}: no sound record was found in place of a damaged one")

    def fetch_all(self, samples: Samples) -> tuple[Samples, list[bytes]]:
        """The samples with damaged ones replaced, and their encoded images."""
        images: list[bytes] = []
        records = samples.records.tolist()
        for row, record in enumerate(records):
            found, image = self.fetch(record)
            records[row] = found
            images.append(image)
        return Samples(samples.epoch, np.array(records, np.int64), samples.copies), images


def labels_of(dataset: Dataset, records: NDArray[np.int64], device: torch.device) -> Tensor:
    """The labels of some records on the device, (b,) int64."""
    return send(torch.from_numpy(np.asarray(dataset.labels[records], dtype=np.int64)), device)


def empty_batch(size: tuple[int, int], device: torch.device) -> Batch:
    """The batch of a rank whose slice is empty."""
    none = torch.empty(0, dtype=torch.int64)
    return Batch(torch.empty((0, 3, *size), device=device), none.to(device), none)
