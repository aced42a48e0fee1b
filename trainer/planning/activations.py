"""The backbone's parameters and what autograd keeps of a batch, counted on tensors without memory."""

import contextlib
import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from trainer.networks import build_backbone
from trainer.networks.config import BackboneConfig
from trainer.networks.recompute import Recompute
from trainer.run.config import Config


@dataclass(frozen=True)
class BackboneSizes:
    """Numbers of a backbone.

    Attributes:
        parameters: numbers that are trained; fixed: parameters that are not.
        buffers: floating-point buffers (running statistics).
        saved_bytes: what autograd keeps of a batch until the backward pass, each storage once, parameters left out.
        largest_bytes: the largest single tensor of it.
        unit_bytes: with recomputation, what the largest unit keeps while it is computed again; else 0.
        unit_parameters: trained and fixed parameters' shapes of each unit, as FSDP shards them; the last is the rest.
    """

    parameters: int
    fixed: int
    buffers: int
    saved_bytes: int
    largest_bytes: int
    unit_bytes: int
    unit_parameters: tuple[tuple[tuple[torch.Size, bool], ...], ...]


def backbone_sizes(config: Config, image_size: tuple[int, int], local_batch: int) -> BackboneSizes:
    """Build the network without memory and send a batch (b, 3, H, W) through it, in the precision of the run.

    Raises:
        ConfigError: an unknown network, or one that has no width to choose.
    """
    train = config.train
    return _sizes(config.backbone, train.precision, train.activation_checkpointing, image_size, local_batch)


@functools.cache
def _sizes(
    config: BackboneConfig, precision: str, recompute: bool, image_size: tuple[int, int], batch: int
) -> BackboneSizes:
    with torch.device("meta"):
        network = build_backbone(config, image_size)
    saved, largest = _saved(network, precision, image_size, batch, recompute)
    unit = 0
    if recompute and isinstance(network, Recompute):
        whole, _ = _saved(network, precision, image_size, batch, False)
        unit = 2 * (whole - saved) // max(1, len(network.units()))  # early units keep more than the mean
    parameters = list(network.parameters())
    return BackboneSizes(
        sum(p.numel() for p in parameters if p.requires_grad),
        sum(p.numel() for p in parameters if not p.requires_grad),
        sum(b.numel() for b in network.buffers() if b.is_floating_point()),
        saved,
        largest,
        unit,
        _units(network),
    )


def _units(network: nn.Module) -> tuple[tuple[tuple[torch.Size, bool], ...], ...]:
    groups = [list(unit.parameters()) for unit in network.units()] if isinstance(network, Recompute) else []
    inside = {id(p) for group in groups for p in group}
    groups.append([p for p in network.parameters() if id(p) not in inside])
    return tuple(tuple((p.shape, p.requires_grad) for p in group) for group in groups)


def _saved(
    network: nn.Module, precision: str, image_size: tuple[int, int], batch: int, recompute: bool
) -> tuple[int, int]:
    """Bytes that autograd keeps of a batch, and the largest tensor among them."""
    dtype = torch.float64 if precision == "float64" else torch.float32
    half = precision in ("bfloat16", "float16")
    with FakeTensorMode():
        for module in network.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    empty = torch.empty(parameter.shape, dtype=dtype)
                    module._parameters[name] = nn.Parameter(empty, parameter.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    kind = dtype if buffer.is_floating_point() else buffer.dtype
                    module._buffers[name] = torch.empty(buffer.shape, dtype=kind)
        if isinstance(network, Recompute):
            network.recompute = recompute
        own = {t.untyped_storage()._cdata for t in (*network.parameters(), *network.buffers())}
        kept: dict[int, tuple[int, Tensor]] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = (storage.nbytes(), tensor)  # the tensor too, so that no address is used twice
            return tensor

        # Fake tensors stand for the CPU's, whose autocast makes the same products half as large as CUDA's does.
        context = torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext()
        images = torch.empty((max(2, batch), 3, *image_size), dtype=dtype).requires_grad_()
        own.add(images.untyped_storage()._cdata)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), context:
            network.train()
            network(images)
    sizes = [size for size, _ in kept.values()]
    return sum(sizes), max(sizes, default=0)
