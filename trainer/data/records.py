"""Record numbers and labels in the training order, without images: for what trains on embeddings by record."""

from collections.abc import Generator

import torch

from trainer.data.index import Dataset
from trainer.data.loader import Batch, PositionedLoader, labels_of
from trainer.data.order import Schedule, Slot


class RecordLoader(PositionedLoader):
    """The same batches as the other loaders', their ``images`` (b, 3, 0, 0): nothing is read but the labels.

    Records that are listed in ``bad_records.npy`` are not left out; they have no embedding (zero rows).
    """

    name = "records"

    def __init__(self, dataset: Dataset, schedule: Schedule, device: torch.device) -> None:
        super().__init__(schedule)
        self.dataset, self.device = dataset, device

    def _produce(self, epoch: int, samples: int) -> Generator[tuple[Slot, Batch], None, None]:
        for slot in self._announced(self.schedule.slots(epoch, samples)):
            records = slot.samples.records
            images = torch.empty((len(records), 3, 0, 0), device=self.device)
            yield slot, Batch(images, labels_of(self.dataset, records, self.device), torch.from_numpy(records))
