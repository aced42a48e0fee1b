"""L2: regression to the old embedding of the same image."""

from torch import Tensor

from trainer.compat.methods import losses
from trainer.compat.methods.config import L2Config
from trainer.compat.methods.inputs import Inputs, Sections
from trainer.compat.methods.with_old import WithOld
from trainer.distributed import Labels, Ranks


class L2(WithOld):
    """Regression to the old embedding of the same image (the instance baseline of BCT, Shen et al., CVPR 2020)."""

    def __init__(self, config: L2Config, run: Sections, inputs: Inputs, ranks: Ranks) -> None:
        super().__init__(config, run, inputs, ranks)
        self.config = config

    def loss(self, embeddings: Tensor, labels: Labels, rows: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`CompatMethod`: ``l2`` is the mean of ½ ‖·‖² = 1 − cos."""
        del labels, rows, step
        value = losses.l2(*self.known(embeddings))
        return self.config.weight * value, {"l2": value.detach()}
