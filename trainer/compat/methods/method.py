"""What a method of compatible training adds to the step of backbone and head: the seam that the task knows."""

from typing import Any, ClassVar

from torch import Tensor, nn

from trainer.compat.methods.inputs import Inputs, Sections
from trainer.data import Batch
from trainer.distributed import Labels, Ranks
from trainer.errors import ConfigError
from trainer.head.frozen import FrozenRows
from trainer.head.old_centers import DirectCompat
from trainer.models.card import Direction


class CompatMethod:
    """Base: what a method does not override adds nothing.

    A method keeps no state beyond its modules' that a checkpoint would have to hold.

    Args:
        config: the method's section. run: the other sections. inputs: opened, and found sound by :meth:`check`.

    Attributes:
        direct: what of the method the head computes in its own pass over the rows (LCE's direct mode).
        held: rows of the head that stay where they are put, after every update.
        adds_loss: whether :meth:`loss` has anything to add; else it is not called.
    """

    direct: DirectCompat | None = None
    held: FrozenRows | None = None
    adds_loss: bool = True
    mapped: ClassVar[bool] = False
    """Whether the old model may have another dimension than the new one."""

    def __init__(self, config: Any, run: Sections, inputs: Inputs, ranks: Ranks) -> None:
        raise NotImplementedError

    @classmethod
    def check(cls, config: Any, run: Sections, inputs: Inputs) -> None:
        """Refuse what the method cannot work on, before anything is built.

        Raises:
            LceError: here, an old model of another dimension.
        """
        dim, theirs = run.backbone.dim, inputs.old_dim
        if not cls.mapped and theirs not in (None, dim):
            raise ConfigError(
                f"compat.method = {config.method}: the old model's dimension is {theirs}, backbone.dim is {dim}; it "
                f"compares them as they are: use backbone.dim={theirs}, or a method with a map (fct; lce with "
                "compat.mode=backward)"
            )

    def modules(self) -> dict[str, nn.Module]:
        """What is trained with the backbone's optimizer, by name; equal on all ranks."""
        return {str(name): module for name, module in self.transforms().items()}

    def transforms(self) -> dict[Direction, nn.Module]:
        """Those of them that are exported with the model, as maps between the embedding spaces."""
        return {}

    def prepare(self, embeddings: Tensor, batch: Batch, step: int) -> Tensor:
        """Called before the head with this rank's part: what the head is to see in place of ``embeddings`` (b, D)."""
        del batch, step
        return embeddings

    def loss(self, embeddings: Tensor, labels: Labels, rows: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss besides the head's, weighted, and what to report; both equal on all ranks.

        Called within the head's step, see :class:`trainer.head.partial_fc.Companion`. The gradient with respect to
        ``embeddings`` has to be the whole one on every rank; the head takes the mean of the ranks'.

        Args:
            embeddings: (B, D) of all ranks. labels: (B,) of all ranks; −1: no class, or a place that is not filled.
            rows: (u, D), the classifier rows of the batch's classes that this rank owns.
        """
        del labels, rows, step
        return embeddings.new_zeros(()), {}

    def fused(self, embeddings: Tensor, labels: Labels, rows: Tensor) -> Tensor | None:
        """What :attr:`direct` adds to the head's loss, computed once more on its own, so that its gradients can be
        measured; see :meth:`loss`. None: nothing."""
        del embeddings, labels, rows
        return None
