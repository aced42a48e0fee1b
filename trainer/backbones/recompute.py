"""Activation checkpointing: keep a block's input only and compute the block again in the backward pass."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def _keep_statistics(block: nn.Module) -> Iterator[None]:
    """Let batch norms use the batch's statistics without counting the batch a second time in the running ones."""
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


class Recompute(nn.Module):
    """A network of units in series whose activations may be recomputed.

    Attributes:
        recompute: whether :meth:`run_unit` recomputes in the backward pass.
    """

    recompute: bool = False

    def units(self) -> list[nn.Module]:
        """The units in series; FSDP shards at these borders too."""
        raise NotImplementedError

    def run_unit(self, unit: nn.Module, x: Tensor) -> Tensor:
        """``unit(x)``, with the activations kept or recomputed. Running statistics count the batch once."""
        if not (self.recompute and self.training and x.requires_grad):
            return unit(x)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _keep_statistics(unit)

        return checkpoint(unit, x, use_reentrant=False, context_fn=contexts)
