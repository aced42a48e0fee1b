"""AdvBCT (Pan et al., CVPR 2023): an adversarial discriminator and an elastic boundary."""

from torch import Tensor, nn

from trainer.compat.methods import losses
from trainer.compat.methods.config import AdvBctConfig
from trainer.compat.methods.inputs import Inputs, Sections
from trainer.compat.methods.lce import Known, gather_pairs
from trainer.compat.methods.with_old import WithOld
from trainer.distributed import Labels, Ranks
from trainer.head.partition import class_range


class AdvBct(WithOld):
    """In the manner of AdvBCT (Pan et al., CVPR 2023): a discriminator that must not tell new from old, and an elastic
    boundary.

    The loss is adversarial + ``compat.boundary_weight`` · boundary; ``compat.weight`` is that of the adversarial
    part's gradient into the embeddings. The discriminator is Linear, PReLU, Linear on unit embeddings, trained with the
    backbone's optimizer by its own, unweighted cross entropy. One more collective, the all-gather of the
    batch's centres and boundaries. Left out: the authors' radius from a pass over the training set each epoch, see
    :func:`trainer.compat.methods.losses.elastic_boundary`.
    """

    def __init__(self, config: AdvBctConfig, run: Sections, inputs: Inputs, ranks: Ranks) -> None:
        super().__init__(config, run, inputs, ranks)
        self.config = config
        assert inputs.bank is not None
        self.num_classes, dim = inputs.num_classes, inputs.bank.dim
        mine = class_range(inputs.num_classes, ranks.rank, ranks.world_size)
        self.bank = inputs.bank.rows(mine.start, mine.stop)
        self.discriminator = nn.Sequential(nn.Linear(dim, dim), nn.PReLU(dim), nn.Linear(dim, 1))

    def modules(self) -> dict[str, nn.Module]:
        """See :class:`CompatMethod`."""
        return {"discriminator": self.discriminator}

    def loss(self, embeddings: Tensor, labels: Labels, rows: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`CompatMethod`: ``adversarial`` is the discriminator's cross entropy, ``boundary`` in radians."""
        del rows, step
        adversarial = embeddings.new_zeros(())
        new, old = self.known(embeddings)
        if len(new):
            adversarial = losses.adversarial(new, old, self.discriminator, self.config.weight)
        pairs = gather_pairs(labels, None, self.bank, self.num_classes, self.ranks)
        known = Known.of(pairs)
        centers, limits = (t[known.places].to(embeddings.dtype) for t in (pairs.centers, pairs.boundaries))
        x = embeddings.index_select(0, known.samples)
        boundary = losses.elastic_boundary(x, centers, limits, slice(None))
        total = adversarial + self.config.boundary_weight * boundary
        return total, {"adversarial": adversarial.detach(), "boundary": boundary.detach()}
