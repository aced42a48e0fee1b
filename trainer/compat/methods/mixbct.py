"""MixBCT (Liang et al., arXiv 2308.06948): old embeddings stand in for a share of the batch."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from trainer.compat.methods import losses
from trainer.compat.methods.config import MixBctConfig
from trainer.compat.methods.inputs import Inputs, Sections
from trainer.compat.methods.with_old import WithOld
from trainer.data import Batch
from trainer.data.draws import uniforms
from trainer.distributed import Labels, MarkedLabels, Ranks, all_reduce_sum, send, upload
from trainer.head.partition import class_range


class MixBct(WithOld):
    """MixBCT (Liang et al., arXiv 2308.06948): before the head, old embeddings stand in for ``compat.mix_share`` of
    the global batch.

    An old embedding is credible when its cosine with the bank's centre of its class is at least the class's boundary:
    make the bank with ``lce centers from-model … --quantile 0.1`` for the authors' nearest 90 %. Which credible images
    are replaced is drawn by (seed, step, record), the same at any world size. There is no loss of its own. One
    more collective, an all-reduce of B numbers, by which the owner of a class says what is credible.
    """

    def __init__(self, config: MixBctConfig, run: Sections, inputs: Inputs, ranks: Ranks) -> None:
        super().__init__(config, run, inputs, ranks)
        self.config = config
        assert inputs.bank is not None
        self.seed = run.seed
        self.classes = class_range(inputs.num_classes, ranks.rank, ranks.world_size)
        self.bank = inputs.bank.rows(self.classes.start, self.classes.stop)

    def prepare(self, embeddings: Tensor, batch: Batch, step: int) -> Tensor:
        """See :class:`CompatMethod`: unit vectors for the classifier, new or old; no gradient where an old one
        stands."""
        records = batch.records.numpy()
        draws = torch.from_numpy(uniforms(self.seed, step, records, np.zeros_like(records), 1))
        old = self.source.of(batch).to(embeddings)
        labels = self.gather(torch.cat([old, send(draws, old.device).to(old)], 1), batch.labels)
        labelled = np.flatnonzero(labels.host >= 0)
        replaced = self._choose(self.old[:, :-1], labels, labelled, self.old[:, -1])
        self.replaced = replaced.sum() / max(1, len(labelled))
        first = self.ranks.rank * self.capacity
        mine = replaced[first : first + len(old), None]
        return torch.where(mine, normalize(old), normalize(embeddings))

    def _choose(self, old: Tensor, labels: MarkedLabels, labelled: NDArray[np.int64], draws: Tensor) -> Tensor:
        """Which samples of the global batch are replaced, (B,) bool, equal on all ranks."""
        marked = labels.marked
        owned = labels.host[marked]
        mine = (owned >= self.classes.start) & (owned < self.classes.stop)
        local = send(torch.from_numpy(owned[mine] - self.classes.start), self.bank.centers.device)
        rows = (self.bank.centers[local], self.bank.boundaries[local], self.bank.mask[local])
        centers, boundaries, mask = (send(values, old.device) for values in rows)
        here, among = upload([marked[mine], labelled], old.device)
        near = torch.linalg.vecdot(normalize(old[here]), centers.to(old)) >= boundaries.to(old)
        credible = torch.zeros(len(old), dtype=torch.float64, device=old.device)
        credible[here] = (near & mask).double()
        sure = all_reduce_sum(credible) > 0
        replaced = torch.zeros_like(sure)
        replaced[among] = losses.mixbct_choice(sure[among], self.config.mix_share, draws[among])
        return replaced

    def loss(self, embeddings: Tensor, labels: Labels, rows: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`CompatMethod`: no loss; ``replaced`` is the share of the batch that was."""
        del labels, rows, step
        return embeddings.new_zeros(()), {"replaced": self.replaced}
