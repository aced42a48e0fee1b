"""Base of the methods that compare images with their old embeddings."""

import torch
from torch import Tensor

from trainer.compat.methods.config import WithOldConfig
from trainer.compat.methods.inputs import Inputs, Sections
from trainer.compat.methods.method import CompatMethod
from trainer.data import Batch
from trainer.distributed import MarkedLabels, Ranks, gather_batch, upload
from trainer.machine import largest_share


class WithOld(CompatMethod):
    """Base of the methods that compare images: the old embeddings of the global batch, on every rank.

    One collective more than the head makes: an all-gather of W·b·(4·D1 + 8) bytes in float32.
    """

    def __init__(self, config: WithOldConfig, run: Sections, inputs: Inputs, ranks: Ranks) -> None:
        del config
        assert inputs.old is not None
        self.source, self.ranks = inputs.old, ranks
        # As the head pads its own gathered batch.
        self.capacity = largest_share(run.data.batch_size, ranks.world_size)

    def prepare(self, embeddings: Tensor, batch: Batch, step: int) -> Tensor:
        """See :class:`CompatMethod`: gathers ``old`` (B, D1), in the order of the head's gathered batch, and which
        labelled samples have one."""
        del step
        self.gather(self.source.of(batch).to(embeddings), batch.labels)
        return embeddings

    def gather(self, old: Tensor, labels: Tensor) -> MarkedLabels:
        """Gather this rank's old embeddings (b, D1 or more columns); returns all ranks' labels, marked where there is
        one."""
        with torch.no_grad():
            codes = MarkedLabels.code(labels, (old[:, : self.source.dim] != 0).any(1))
            self.old, every = gather_batch(old, codes, self.ranks.world_size, self.capacity)
        self._labels = MarkedLabels(every)
        return self._labels

    def known(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """(n, D), (n, D1): of the samples that have an old embedding the new one, with its gradient, and that."""
        (places,) = upload([self._labels.marked], embeddings.device)
        return embeddings.index_select(0, places), self.old.index_select(0, places)
