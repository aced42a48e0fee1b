"""Activation checkpointing: keep a block's input only and compute the block again in the backward pass."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def _norms(block: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@contextmanager
def _as_before(block: nn.Module, training: list[bool]) -> Iterator[None]:
    """Let each batch norm do what it did in the forward pass (``training``: whether by the batch's statistics) without
    counting the batch a second time in the running ones."""
    norms = _norms(block)
    now = [(norm.momentum, norm.training) for norm in norms]
    for norm, mode in zip(norms, training, strict=True):
        norm.momentum, norm.training = 0.0, mode
    try:
        yield
    finally:
        for norm, (momentum, mode) in zip(norms, now, strict=True):
            norm.momentum, norm.training = momentum, mode


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

        training = [norm.training for norm in _norms(unit)]

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _as_before(unit, training)

        return checkpoint(unit, x, use_reentrant=False, context_fn=contexts)
