"""The old model's embedding of every image in a batch: from an array by record, or from the old model run along.

An array holds the old embedding of the stored image; the model run along sees the image as it was augmented for this
step (at the cost of its forward pass).
"""

import os
import weakref
import zlib
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.data import Batch, Dataset, DatasetInfo
from trainer.data.index import rows_info
from trainer.data.store import load_array
from trainer.distributed import send
from trainer.errors import ConfigError, DataError
from trainer.files import advise
from trainer.models.model import EmbeddingModel, TorchModel
from trainer.models.open import load_model
from trainer.reading import open_regular

SAMPLED_ROWS = 1024


class OldEmbeddings(Protocol):
    """Where old embeddings come from.

    Attributes:
        dim: D1. fingerprint: the same on all ranks when they read the same. model: the path and the hash of an old
            model that runs along. model_hash: of the model that made them, where it is known.
    """

    dim: int
    fingerprint: str
    model: tuple[str, str] | None
    model_hash: str | None

    def of(self, batch: Batch) -> Tensor:
        """(b, D1) float32 on the device of the batch, not necessarily unit; zero rows: not known."""


class StoredEmbeddings:
    """A ``.npy`` float32 (N, D1) by record number, memory-mapped.

    Args:
        path: the file (`lce centers from-model … --embeddings FILE` writes one).
        records: N of the data set.
        key: the setting that names the file, for errors.
        dataset: whose records the rows must be, where there is one.

    Raises:
        DataError: no such array, or one of other records. ConfigError: another length, or values that are not finite or
        all zero.
    """

    model: tuple[str, str] | None = None

    def __init__(
        self, path: Path, records: int, key: str = "compat.old_embeddings", dataset: Dataset | None = None
    ) -> None:
        self.rows: NDArray[np.float32] = load_array(path, 2, np.float32)
        self.path, self.dim = path, int(self.rows.shape[1])
        if len(self.rows) != records:
            raise ConfigError(
                f"{key} = {path}: {len(self.rows)} rows, the data set has {records} records; make it "
                "from this data set (`lce centers from-model … --embeddings FILE`)"
            )
        self.model_hash: str | None = None
        if dataset is not None:
            described = rows_info(path)
            self.model_hash = None if described is None else described.model_hash
            known = (None, None) if described is None else (described.fingerprint, described.dataset)
            dataset.check_numbering(f"{key} = {path}", *known)
        if not self.rows.flags.c_contiguous:
            raise ConfigError(f"{key} = {path}: is stored column by column; save numpy.ascontiguousarray of it")
        self._offset, self._row_bytes = cast(np.memmap[Any, Any], self.rows).offset, self.dim * self.rows.itemsize
        with open_regular(path, DataError) as file:
            self._file = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._file)
        # Rows are read here and there: what lies around them would be read in vain.
        advise(self._file, 0, 0, "RANDOM")
        numbers = np.unique(np.linspace(0, records - 1, min(records, SAMPLED_ROWS)).astype(np.int64))
        sample = self.read(numbers)
        wrong = ~np.isfinite(sample).all(1)
        if wrong.any():
            raise ConfigError(f"{key} = {path}: row {numbers[wrong.argmax()]} is not finite; make it again")
        if not sample.any():
            raise ConfigError(f"{key} = {path}: every row looked at is zero; make it again")
        self.fingerprint = f"{records} × {self.dim}, {zlib.crc32(sample.tobytes()):08x}"

    def will_need(self, records: NDArray[np.int64]) -> None:
        """Ask the system to read the rows of some records into its cache; nothing waits for it."""
        for record in records.tolist():
            start = self._offset + record * self._row_bytes
            advise(self._file, start, self._row_bytes, "WILLNEED")

    def read(self, records: NDArray[np.int64]) -> NDArray[np.float32]:
        """The rows of some records, (n, D1). Raises :class:`DataError`: the file has become shorter."""
        out = np.empty((len(records), self.dim), np.float32)
        for row, record in zip(out, records.tolist(), strict=True):
            if os.preadv(self._file, [row.data], self._offset + record * self._row_bytes) != self._row_bytes:
                raise DataError(f"{self.path}: row {record} is not there any more; the file was cut while training")
        return out

    def of(self, batch: Batch) -> Tensor:
        """See :class:`OldEmbeddings`."""
        out = torch.empty(len(batch.records), self.dim)  # made by torch: an empty array of numpy's has other strides
        out.numpy()[:] = self.read(batch.records.numpy())
        return send(out, batch.labels.device)


class ModelEmbeddings:
    """The old model on the batch's own images, without gradient; every rank embeds its slice. Images of another size
    than the model's are resized.

    Args:
        path: model folder, run folder or .onnx file.
        info: how the data set's images are normalised, which is undone before the old model's own normalisation.
        device: where the model runs.

    Raises:
        ModelError: no model there.
    """

    def __init__(self, path: Path, info: DatasetInfo, device: torch.device) -> None:
        self.old: EmbeddingModel = load_model(path, device)
        self.card, self.dim, self.info = self.old.card, self.old.dim, info
        self.model: tuple[str, str] | None = (str(path), self.old.hash)
        self.fingerprint = self.old.hash
        self.model_hash: str | None = self.old.hash

    @torch.no_grad()
    def of(self, batch: Batch) -> Tensor:
        """See :class:`OldEmbeddings`; an ONNX model gets pixels rounded to 0 … 255, as it does in use."""
        if not len(batch.labels):
            return torch.zeros(0, self.dim, device=batch.labels.device)
        mean, std = (batch.images.new_tensor(v).view(3, 1, 1) for v in (self.info.mean, self.info.std))
        pixels = batch.images * std + mean
        if pixels.shape[2:] != self.card.image_size:
            pixels = nn.functional.interpolate(pixels, self.card.image_size, mode="bilinear", antialias=True)
        if isinstance(self.old, TorchModel):
            if self.info.color != self.card.color:
                pixels = pixels.flip(1)
            mean, std = (pixels.new_tensor(v).view(3, 1, 1) for v in (self.card.mean, self.card.std))
            return self.old.backbone(((pixels - mean) / std).float()).float()
        images = (pixels * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        found = self.old.embed(images.cpu().numpy(), self.info.color)
        return send(torch.from_numpy(found), batch.labels.device)
