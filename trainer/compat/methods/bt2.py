"""BT² (Zhou et al., ICCV 2023): dimensions that the old gallery ignores, and a learned change of basis."""

from typing import Any

from torch import Tensor, nn
from torch.autograd import Function

from trainer.compat.methods import losses
from trainer.compat.methods.bct import Bct
from trainer.compat.methods.config import Bt2Config
from trainer.compat.methods.inputs import Inputs, Sections
from trainer.compat.methods.with_old import WithOld
from trainer.distributed import Labels, Ranks, all_reduce_sum
from trainer.errors import ConfigError
from trainer.models.card import Direction
from trainer.networks.transform import build_transform, transform_vectors


class _Summed(Function):
    """``x`` unchanged; its gradient is added up over the ranks on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return all_reduce_sum(gradients[0].contiguous().clone())


class Bt2(WithOld):
    """After BT² (Zhou et al., "BT²: Backward-compatible Training with Basis Transformation", ICCV 2023).

    The new model has D2 > D1 dimensions. T₂₁ is the first D1 rows of an orthonormal basis that is trained along: T₂₁(x)
    is the old part, which is compared with old galleries; what it leaves out costs the new model nothing, because a
    change of basis keeps all cosines between new embeddings. It is exported as ``t21``. Losses and what was left out:
    :func:`trainer.compat.methods.losses.bt2`. Collectives of a step: those of :class:`WithOld` and of
    :class:`trainer.head.frozen.FrozenClassifier`, and backward one all-reduce of (B, D1).
    """

    mapped = True

    def __init__(self, config: Bt2Config, run: Sections, inputs: Inputs, ranks: Ranks) -> None:
        super().__init__(config, run, inputs, ranks)
        self.weight = config.weight
        self.classifier = Bct(config, run, inputs, ranks).classifier
        self.t21 = build_transform(config.transform, run.backbone.dim, self.source.dim)

    @classmethod
    def check(cls, config: Bt2Config, run: Sections, inputs: Inputs) -> None:
        """See :class:`CompatMethod`: the new model needs more dimensions than the old one."""
        dim, theirs = run.backbone.dim, inputs.old_dim
        if theirs is not None and dim <= theirs:
            raise ConfigError(
                f"compat.method = bt2: backbone.dim is {dim}, the old model's dimension is {theirs}; it adds "
                f"dimensions that the old gallery ignores: use backbone.dim={theirs + theirs // 2}, say"
            )

    def transforms(self) -> dict[Direction, nn.Module]:
        """See :class:`CompatMethod`."""
        return {"t21": self.t21}

    def loss(self, embeddings: Tensor, labels: Labels, rows: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`CompatMethod`: ``old_part`` is 1 − cos to the image's old embedding, ``influence`` the old
        classifier's loss."""
        del rows
        mapped = transform_vectors(self.t21, embeddings)
        part = losses.l2(*self.known(mapped))
        judged, _ = self.classifier.loss(_Summed.apply(mapped), labels.device, step)
        judged = judged.to(part.dtype)
        return self.weight * (part + judged), {"old_part": part.detach(), "influence": judged.detach()}
