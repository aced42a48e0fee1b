"""The sizes of a backbone that a plan needs: from the table of stored networks, else counted on the network."""

import functools
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from trainer.networks.config import BackboneConfig
from trainer.planning.stored import (
    STORED_DIM,
    STORED_PRECISIONS,
    STORED_SIZE,
    NetworkSizes,
    Unit,
    from_json,
    read_table,
)
from trainer.run.config import Config


@dataclass(frozen=True)
class BackboneSizes:
    """Numbers of a backbone in a run.

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
    unit_parameters: tuple[Unit, ...]


def backbone_sizes(config: Config, image_size: tuple[int, int], local_batch: int) -> BackboneSizes:
    """Of a run's network and a batch (b, 3, H, W) on a rank, in the precision of the run.

    Raises:
        ConfigError: an unknown network, or one that has no width to choose.
    """
    train = config.train
    precision = "bfloat16" if train.precision == "float16" else train.precision
    network = network_sizes(config.backbone, precision, image_size)
    batch, (whole, recomputed) = max(2, local_batch), network.kept[precision]
    kept = recomputed if train.activation_checkpointing else whole
    more = whole.total_bytes(batch) - kept.total_bytes(batch)
    return BackboneSizes(
        network.parameters,
        network.fixed,
        network.buffers,
        kept.total_bytes(batch),
        kept.largest_bytes(batch),
        2 * more // max(1, network.units),  # early units keep more than the mean
        network.unit_parameters,
    )


def network_sizes(config: BackboneConfig, precision: str, image_size: tuple[int, int]) -> NetworkSizes:
    """Of a network: out of the table where it is there and this release of torch counted it, else counted (which
    imports torch)."""
    plain = config.width is None and config.dim == STORED_DIM and tuple(image_size) == STORED_SIZE
    if plain and precision in STORED_PRECISIONS and config.name in (table := _table(version("torch"))):
        return from_json(table[config.name])
    from trainer.planning.activations import count_network

    return count_network(config.model_copy(update={"weights": None}), (precision,), image_size)


@functools.cache
def _table(torch_version: str) -> dict[str, Any]:
    return read_table(torch_version)
