"""Synthetic images of any number of classes, without a file: for benchmarks, trials and tests of everything behind the
loader.

The image of a class is a sum of three smooth patterns chosen by the class number in base 64; a sample adds its own
noise. Classes are told apart by a network, so a run on them can be seen to learn.
"""

from collections.abc import Generator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.data import augment
from trainer.data.draws import uniforms
from trainer.data.loader import Batch, PositionedLoader
from trainer.data.order import Schedule, Slot
from trainer.distributed import send

_PATTERNS = 64
_NOISE = 0.3


class SyntheticLoader(PositionedLoader):
    """Record r shows class r mod C, in float32 of about zero mean and unit variance."""

    name = "synthetic"

    def __init__(self, schedule: Schedule, classes: int, size: int, *, seed: int, device: torch.device) -> None:
        super().__init__(schedule)
        self.classes, self.size, self.seed, self.device = classes, size, seed, device
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.randn((3 * _PATTERNS, 3, 8, 8), generator=generator)
        self._patterns = F.interpolate(coarse, (size, size), mode="bicubic").to(device) / 3**0.5
        ring = torch.from_numpy(augment.noise_ring(seed)).to(device) * _NOISE
        self._noise = ring.as_strided((len(ring) - 3 * size * size, 3, size, size), (1, size * size, size, 1))

    def _produce(self, epoch: int, samples: int) -> Generator[tuple[Slot, Batch], None, None]:
        for slot in self._announced(self.schedule.slots(epoch, samples)):
            records = torch.from_numpy(slot.samples.records)
            labels = send(records % self.classes, self.device)
            yield slot, Batch(self._images(slot, labels), labels, records)

    def _images(self, slot: Slot, labels: Tensor) -> Tensor:
        digits = [labels // _PATTERNS**k % _PATTERNS + k * _PATTERNS for k in range(3)]
        drawn = uniforms(self.seed, slot.samples.epoch, slot.samples.records, slot.samples.copies, 1)[:, 0]
        start = send(torch.from_numpy(np.floor(drawn * len(self._noise)).astype(np.int64)), self.device)
        return self._patterns[digits[0]] + self._patterns[digits[1]] + self._patterns[digits[2]] + self._noise[start]
