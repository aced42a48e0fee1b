"""What a method of compatible training adds to the step of backbone and head: the seam that the task knows."""

from torch import Tensor, nn

from trainer.data import Batch
from trainer.distributed import Labels
from trainer.models.card import Direction


class CompatMethod:
    """Base: what a method does not override adds nothing.

    A method keeps no state beyond its modules' that a checkpoint would have to hold.
    """

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
