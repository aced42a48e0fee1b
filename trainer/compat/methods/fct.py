"""FCT (Ramanujan et al., CVPR 2022): a map from old to new embeddings, next to an independent model."""

from torch import Tensor, nn
from torch.nn.functional import normalize

from trainer.compat.methods import losses
from trainer.compat.methods.config import FctConfig
from trainer.compat.methods.inputs import Inputs, Sections
from trainer.compat.methods.lce import smallest_norm
from trainer.compat.methods.with_old import WithOld
from trainer.distributed import Labels, Ranks
from trainer.models.card import Direction
from trainer.networks.transform import build_transform


class Fct(WithOld):
    """Forward-compatible training's map (Ramanujan et al., CVPR 2022): T₁₂ from old embeddings to those of a new model
    that is trained independently, next to it; ``compat.transform`` says which kind of map.

    It is exported as ``t12``, so that old galleries are converted by it. Left out: see
    :func:`trainer.compat.methods.losses.fct`. The new embeddings are those of the step, of a model that still changes;
    the paper trains the map after the model.
    """

    mapped = True

    def __init__(self, config: FctConfig, run: Sections, inputs: Inputs, ranks: Ranks) -> None:
        super().__init__(config, run, inputs, ranks)
        self.config = config
        self.t12 = build_transform(config.transform, self.source.dim, run.backbone.dim)

    def transforms(self) -> dict[Direction, nn.Module]:
        """See :class:`CompatMethod`."""
        return {"t12": self.t12}

    def loss(self, embeddings: Tensor, labels: Labels, rows: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`CompatMethod`: ``map`` is 1 − cos(T₁₂(old), new), ``t12_norm`` the smallest norm that T₁₂ gave; 0
        and none with fewer than two images (batch statistics need two). The backbone gets no gradient of it."""
        del labels, rows, step
        new, old = self.known(embeddings)
        if len(new) < 2:
            zero = embeddings.new_zeros(())
            return zero, {"map": zero}
        mapped = self.t12(normalize(old))
        value = losses.fct(mapped, new)
        return self.config.weight * value, {"map": value.detach(), "t12_norm": smallest_norm(mapped)}
