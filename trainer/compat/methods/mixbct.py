"""MixBCT (Liang et al., arXiv 2308.06948): old embeddings stand in for a share of the batch."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from trainer.compat.methods import losses
from trainer.compat.methods.config import MixBctConfig
from trainer.compat.methods.inputs import Inputs, Sections
from trainer.compat.methods.with_old import WithOld
from trainer.data import Batch
from trainer.data.draws import uniforms
from trainer.distributed import Labels, Ranks, all_reduce_sum
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
        draws = torch.from_numpy(uniforms(self.seed, step, records, np.zeros_like(records), 1)).to(embeddings)
        old = self.source.of(batch).to(embeddings)
        labels = self.gather(torch.cat([old, draws], 1), batch.labels)
        replaced = self._choose(self.old[:, :-1], labels, self.old[:, -1])
        self.replaced = replaced.sum() / (labels >= 0).sum().clamp_min(1)
        first = self.ranks.rank * self.capacity
        mine = replaced[first : first + len(old), None]
        return torch.where(mine, normalize(old), normalize(embeddings))

    def _choose(self, old: Tensor, labels: Tensor, draws: Tensor) -> Tensor:
        """Which samples of the global batch are replaced, (B,) bool, equal on all ranks."""
        c = self.classes
        here = (self.known & (labels >= c.start) & (labels < c.stop)).nonzero()[:, 0]
        local = (labels[here] - c.start).to(self.bank.centers.device)
        centers, boundaries = self.bank.centers[local].to(old), self.bank.boundaries[local].to(old)
        near = torch.linalg.vecdot(normalize(old[here]), centers) >= boundaries
        credible = torch.zeros(len(labels), dtype=torch.float64, device=old.device)
        credible[here] = (near & self.bank.mask[local].to(near.device)).double()
        sure = all_reduce_sum(credible) > 0
        labelled = labels >= 0
        replaced = torch.zeros_like(sure)
        replaced[labelled] = losses.mixbct_choice(sure[labelled], self.config.mix_share, draws[labelled])
        return replaced

    def loss(self, embeddings: Tensor, labels: Labels, rows: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`CompatMethod`: no loss; ``replaced`` is the share of the batch that was."""
        del labels, rows, step
        return embeddings.new_zeros(()), {"replaced": self.replaced}
