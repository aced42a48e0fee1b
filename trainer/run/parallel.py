"""The backbone across ranks: DDP (replicated), FSDP2 or ZeRO (sharded), precision, recomputation and compilation.

The head gives each rank the gradient of the global mean with respect to its own embeddings, so the ranks' parameter
gradients have to be summed. DDP, FSDP and ZeRO take their mean; :func:`trainer.distributed.scale_gradient` multiplies
by W on the way from the head to the backbone (and by the loss scale of float16), so that neither the head nor the
wrapper needs to know.
"""

import inspect
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from trainer.distributed import Ranks
from trainer.errors import ConfigError
from trainer.networks.recompute import Recompute
from trainer.networks.sync_norm import synchronise_norms
from trainer.networks.transform import ResidualBottleneck
from trainer.run import zero
from trainer.run.config import OptimizerConfig, TrainConfig

log = logging.getLogger(__name__)

# Batch statistics are each rank's own. Newer releases of torch renamed the option.
_KNOWN = inspect.signature(DistributedDataParallel).parameters
_OWN_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _KNOWN else "broadcast_buffers": False
}


@contextmanager
def _frozen_statistics(network: nn.Module) -> Iterator[None]:
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    for norm in norms:
        norm.training = False
    try:
        yield
    finally:
        for norm in norms:
            norm.training = True


def embed(network: nn.Module, images: Tensor) -> Tensor:
    """``network(images)`` for a rank's slice (b, 3, H, W) of any size, also b = 0 and 1 → (b, D).

    Batch norm needs two samples: with fewer, this rank's norms use their running statistics for the step and leave them
    as they are. A rank with no sample runs one blank image, so that it takes part in the backbone's collectives, and
    drops its embedding.
    """
    if len(images) >= 2:
        return cast(Tensor, network(images))
    with _frozen_statistics(network):
        if len(images) == 1:
            return cast(Tensor, network(images))
        blank = images.new_zeros((1, *images.shape[1:]))
        return cast(Tensor, network(blank))[:0]


def wrap(backbone: nn.Module, config: TrainConfig, ranks: Ranks, optimizer: OptimizerConfig | None = None) -> nn.Module:
    """The module to call in training; ``backbone`` itself keeps the parameters and their plain names.

    ``optimizer``: how it is updated, which ZeRO has to know.

    Its dtype and device have been set before. Raises :class:`ConfigError` for activation checkpointing or FSDP without
    blocks.
    """
    if config.activation_checkpointing:
        if not isinstance(backbone, Recompute):
            raise ConfigError(f"train.activation_checkpointing: {type(backbone).__name__} has no units to recompute")
        backbone.recompute = True
    if config.sync_batchnorm:
        synchronise_norms(backbone, ranks.device)
    if config.parallel.startswith("zero"):
        assert optimizer is not None
        return zero.shard(backbone, config, optimizer, ranks)
    network = backbone
    if config.parallel == "fsdp":
        shard(backbone, ranks)
    if config.compile and _can_compile(ranks):
        network = torch.compile(backbone)  # type: ignore[assignment]
    if config.parallel == "ddp" and dist.is_initialized() and ranks.world_size > 1:
        device_ids = [ranks.device.index] if ranks.device.type == "cuda" else None
        wrapped = DistributedDataParallel(network, device_ids=device_ids, gradient_as_bucket_view=True, **_OWN_BUFFERS)
        if config.compress_gradients:
            wrapped.register_comm_hook(None, _mean_in_bfloat16)
        return wrapped
    return network


def compile_maps(maps: Iterable[nn.Module], config: TrainConfig, ranks: Ranks) -> None:
    """:func:`compile_blocks` where ``train.compile`` asks for it and it can work here."""
    if config.compile and _can_compile(ranks):
        compile_blocks(maps)


def compile_blocks(maps: Iterable[nn.Module]) -> None:
    """Compile the residual bottleneck blocks of maps in place, whose many small layers take more time than their
    products: one of a kind for all. Parameters keep their names."""
    # Each method's gradient is asked for apart (together.Pulls), so that a backward pass may be made twice.
    functorch_config.donated_buffer = False
    for block in (module for one in maps for module in one.modules()):
        if isinstance(block, ResidualBottleneck):
            block.compile(dynamic=True)  # a batch's classes vary in number


def _can_compile(ranks: Ranks) -> bool:
    """Whether torch.compile can work here: on the CPU it needs a C++ compiler; without one this is logged once."""
    compilers = (os.environ.get("CXX", "g++"), "clang++")
    if ranks.device.type != "cpu" or any(shutil.which(name) for name in compilers):
        return True
    if ranks.is_main:
        log.warning("train.compile: no C++ compiler (%s) here; training runs without it", " or ".join(compilers))
    return False


def _mean_in_bfloat16(
    state: None,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """DDP's reduction with half the bytes on the wire (torch's own hook of this kind refuses gloo)."""
    buffer = bucket.buffer()
    half = buffer.to(torch.bfloat16).div_(dist.get_world_size())
    future = dist.all_reduce(half, async_op=True).get_future()
    return cast("torch.futures.Future[Tensor]", future.then(lambda done: buffer.copy_(done.value()[0])))


def shard(backbone: nn.Module, ranks: Ranks) -> None:
    """Shard the parameters over all ranks in place (FSDP2), block by block where the network has blocks."""
    if not dist.is_initialized():
        raise ConfigError("train.parallel = fsdp needs a process group: start with lce launch or torchrun")
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,), mesh_dim_names=("shard",))
    if isinstance(backbone, Recompute):
        for block in backbone.units():
            fully_shard(block, mesh=mesh)
    fully_shard(backbone, mesh=mesh)


def gradient_sync(network: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Around forward and backward of one of several accumulated batches: only the last one reduces over ranks."""
    if isinstance(network, DistributedDataParallel):
        return nullcontext() if last else network.no_sync()
    plain = getattr(network, "_orig_mod", network)  # torch.compile wraps what FSDP has sharded
    if isinstance(plain, FSDPModule):
        plain.set_requires_gradient_sync(last)
    if zero.is_engine(network):
        network.set_gradient_accumulation_boundary(last)  # type: ignore[operator]
    return nullcontext()


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """The backbone's mixed precision: bfloat16 or float16 matrix products and convolutions, float32 parameters."""
    if config.precision in ("float32", "float64"):
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, config.precision))
