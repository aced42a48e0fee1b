"""The methods of a run as one, and how strongly each of them pulls.

The loss of several methods is the sum of theirs, each with its own weight. What pulls how strongly is seen by the norms
of the terms' gradients with respect to the global batch's embeddings, where all terms but LCE's alignment meet, and
with respect to the classifier rows of the batch's classes, where that acts.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trainer.compat.methods.method import CompatMethod
from trainer.data import Batch
from trainer.distributed import Labels, Ranks, all_reduce_sum
from trainer.head.frozen import FrozenRows
from trainer.head.old_centers import DirectCompat
from trainer.models.card import Direction

FUSED = ("alignment", "boundary")
"""What the head reports of LCE's direct mode."""


class Together:
    """All methods of a run, by name: to the task they are one :class:`CompatMethod`.

    A figure that two of them report carries, for the second, the method's name in front: ``advbct_boundary``.
    """

    def __init__(self, methods: Mapping[str, CompatMethod]) -> None:
        self.methods = dict(methods)
        self.adds_loss = any(method.adds_loss for method in self.methods.values())

    @property
    def direct(self) -> DirectCompat | None:
        """See :class:`CompatMethod`; one of them at most has it."""
        return next((one.direct for one in self.methods.values() if one.direct is not None), None)

    @property
    def held(self) -> FrozenRows | None:
        """See :class:`CompatMethod`; one of them at most has it."""
        return next((one.held for one in self.methods.values() if one.held is not None), None)

    def modules(self) -> dict[str, nn.Module]:
        """See :class:`CompatMethod`."""
        return {name: module for one in self.methods.values() for name, module in one.modules().items()}

    def transforms(self) -> dict[Direction, nn.Module]:
        """See :class:`CompatMethod`."""
        return {name: module for one in self.methods.values() for name, module in one.transforms().items()}

    def prepare(self, embeddings: Tensor, batch: Batch, step: int) -> Tensor:
        """See :class:`CompatMethod`; each sees what the one before it made."""
        for method in self.methods.values():
            embeddings = method.prepare(embeddings, batch, step)
        return embeddings

    def loss(
        self, embeddings: Tensor, labels: Labels, rows: Tensor, step: int, pulls: "Pulls | None" = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`CompatMethod`: the sum. ``pulls`` is given each term, in the same order on all ranks."""
        total, report = embeddings.new_zeros(()), dict[str, Tensor]()
        seen = set[str](() if self.direct is None else FUSED)
        for name, method in self.methods.items():
            if method.adds_loss:
                value, figures = method.loss(embeddings, labels, rows, step)
                total = total + value
                own = method.direct is not None  # the authors' boundary takes the place of the head's
                report |= {key if own or key not in seen else f"{name}_{key}": v for key, v in figures.items()}
                seen |= figures.keys()
            if pulls is not None:
                fused = method.fused(embeddings, labels, rows)
                terms = [*([value] if method.adds_loss else []), *([] if fused is None else [fused])]
                pulls.add(name, terms, embeddings, rows)
        return total, report


class Pulls:
    """The gradients of one batch's loss, term by term.

    Two collectives: an all-reduce of a (B, D) for each method, and one of a few numbers. Each method's backward pass is
    made once more; what is trained does not change by it.

    Args:
        ranks: who we are.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._terms: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._whole: Tensor | None = None

    def watch(self, embeddings: Tensor) -> None:
        """Take the whole loss's gradient from what the head is handed, this rank's (b, D)."""
        if embeddings.requires_grad:
            embeddings.register_hook(self._take)

    def _take(self, gradient: Tensor) -> None:
        self._whole = gradient.detach()

    def add(self, name: str, terms: list[Tensor], embeddings: Tensor, rows: Tensor) -> None:
        """A method's terms, weighted, with their graph to ``embeddings`` (B, D) and, where they act on them, ``rows``
        (u, D)."""
        leaves = [leaf for leaf in (embeddings, rows) if leaf.requires_grad]
        of = {id(leaf): torch.zeros_like(leaf) for leaf in (embeddings, rows)}
        acts = False
        for value in terms:
            if not value.requires_grad or not leaves:
                continue
            found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
            for leaf, gradient in zip(leaves, found, strict=True):
                if gradient is not None:
                    of[id(leaf)] += gradient
                    acts |= leaf is rows
        self._terms[name] = (of[id(embeddings)], of[id(rows)] if acts else None)

    def report(self, weight: float) -> dict[str, Tensor]:
        """``gradient_classification``, and for each method ``gradient_NAME`` and, where one acts on rows,
        ``row_gradient_NAME``: 2-norms over the global batch. Collective, after the backward pass.

        Args:
            weight: by which the backward pass was multiplied.
        """
        names, world = list(self._terms), self.ranks.world_size
        whole = all_reduce_sum(torch.stack([gradient for gradient, _ in self._terms.values()])) / world
        capacity = whole.shape[1] // world
        local = whole[:, self.ranks.rank * capacity :]
        acting = all_reduce_sum(torch.tensor([float(r is not None) for _, r in self._terms.values()]).to(whole.device))
        rest = whole.new_zeros(())
        if self._whole is not None:
            own = self._whole.to(whole) / weight
            rest = (own - local[:, : len(own)].sum(0)).square().sum()
        squares = [whole.new_zeros(()) if r is None else r.square().sum().to(whole) for _, r in self._terms.values()]
        norms = all_reduce_sum(torch.stack([rest, *squares])).sqrt()
        out = {"gradient_classification": norms[0]}
        for number, name in enumerate(names):
            out[f"gradient_{name}"] = whole[number].norm()
            if bool(acting[number] > 0):
                out[f"row_gradient_{name}"] = norms[1 + number]
        return out
