"""The torch loader: Pillow decodes and torch augments, in worker processes; same order, same parameters, same interface
as DALI's.

A worker makes whole batches, one at a time, in turn. Workers return what went wrong as a value, so that the reason
arrives in one line.
"""

import shutil
import signal
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from trainer.data import augment, index
from trainer.data.config import AugmentConfig
from trainer.data.loader import Batch, PositionedLoader, Reader, empty_batch, labels_of, slots_ahead
from trainer.data.order import Samples, Schedule, Slot
from trainer.data.pixels import decode_image
from trainer.data.processes import worker_context
from trainer.errors import BrokenRunError, DataError


@dataclass(frozen=True)
class _Made:
    """What a worker made of a slot: images and their records, or the error; and the damaged records it knows of."""

    slot: Slot
    images: Tensor | None
    records: Tensor
    bad: dict[int, str]
    error: str | None = None


class _Maker(Dataset[_Made]):
    """Runs in the workers: slot → images."""

    def __init__(self, dataset: index.Dataset, config: AugmentConfig, seed: int, max_bad: int) -> None:
        self.dataset, self.config, self.seed = dataset, config, seed
        self.reader = Reader(dataset, max_bad)
        self.ring = augment.noise_ring(seed) if config.noise else None

    def __getitem__(self, slot: Slot) -> _Made:
        try:
            samples, pixels = self._decode(slot.samples)
        except DataError as error:
            return _failed(slot, self.reader.bad, str(error))
        info = self.dataset.info
        if not len(samples):
            return _Made(
                slot, torch.empty((0, 3, *info.image_size)), torch.from_numpy(samples.records), self.reader.bad
            )
        draw = augment.draw(self.config, self.seed, samples, info.image_size, info.color)
        images = augment.apply(torch.from_numpy(pixels), draw, info.mean, info.std, self.ring, self.config.noise)
        records = torch.from_numpy(samples.records)
        if get_worker_info() is not None:
            try:  # here, where it can be told: torch's own thread would only print it, and the rank wait
                images.share_memory_()
                records.share_memory_()
            except RuntimeError as error:
                return _failed(slot, self.reader.bad, _shared_memory_problem(images, error))
        return _Made(slot, images, records, self.reader.bad)

    def _decode(self, samples: Samples) -> tuple[Samples, np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
        info = self.dataset.info
        pixels = np.empty((len(samples), *info.image_size, 3), np.uint8)
        records = samples.records.copy()
        for row in range(len(records)):
            while True:
                record, image = self.reader.fetch(int(records[row]))
                try:
                    pixels[row] = decode_image(image, info.image_size, info.color, exact=info.uniform)
                except ValueError as error:
                    self.reader.skip(record, f"{self.dataset.where(record)} does not decode: {error}")
                    continue
                records[row] = record
                break
        return Samples(samples.epoch, records, samples.copies), pixels


def _failed(slot: Slot, bad: dict[int, str], reason: str) -> _Made:
    return _Made(slot, None, torch.empty(0, dtype=torch.int64), bad, reason)


def _shared_memory_problem(images: Tensor, error: RuntimeError) -> str:
    free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    return (
        f"/dev/shm: no room for a batch of {images.nbytes:,} bytes ({free:,} are free); give the container more shared "
        f"memory (docker run --shm-size=8g), or use data.workers=0 or a smaller data.batch_size "
        f"({str(error).splitlines()[0]:.100})"
    )


class _Slots(Sampler[Slot]):
    """Hands the schedule's slots to the workers."""

    def __init__(self, slots: Iterator[Slot]) -> None:
        self._slots = slots

    def __iter__(self) -> Iterator[Slot]:
        return self._slots


class TorchLoader(PositionedLoader):
    """See the module. Raises :class:`DataError` from ``batches()``: too many damaged records, or no room in
    /dev/shm; :class:`BrokenRunError`: a worker that died."""

    name = "torch"

    def __init__(
        self,
        dataset: index.Dataset,
        schedule: Schedule,
        config: AugmentConfig,
        *,
        seed: int,
        workers: int,
        device: torch.device,
        max_bad: int = 0,
    ) -> None:
        super().__init__(schedule)
        self.dataset, self.workers, self.device = dataset, workers, device
        self._maker = _Maker(dataset, config, seed, max_bad)
        self._bound = self._maker.reader
        self.bad_records = self._bound.bad

    def _produce(self, epoch: int, samples: int) -> Generator[tuple[Slot, Batch], None, None]:
        loader = DataLoader(
            self._maker,
            batch_size=None,
            sampler=_Slots(self._announced(slots_ahead(self.dataset, self.schedule, epoch, samples))),
            num_workers=self.workers,
            multiprocessing_context=worker_context() if self.workers else None,
            pin_memory=self.device.type == "cuda",
        )
        handler = signal.getsignal(signal.SIGCHLD)
        made_ones = iter(loader)
        if threading.current_thread() is threading.main_thread():  # torch's would raise in the midst of anything
            signal.signal(signal.SIGCHLD, handler)
        while True:
            try:
                made = next(made_ones)
            except (RuntimeError, OSError, EOFError) as error:  # its batch, or its shared memory, is gone with it
                reason = " ".join(str(error).split())
                raise BrokenRunError(
                    f"{self.dataset.path}: a data worker died (killed, perhaps for want of memory): {reason:.200}; the "
                    "same command continues from the newest checkpoint"
                ) from None
            if made.error is not None:
                raise DataError(made.error)
            for record, reason in made.bad.items():
                self._bound.skip(record, reason)
            if made.images is None or not len(made.records):
                yield made.slot, empty_batch(self.dataset.info.image_size, self.device)
                continue
            images = made.images.to(self.device, non_blocking=True)
            yield made.slot, Batch(images, labels_of(self.dataset, made.records.numpy(), self.device), made.records)
