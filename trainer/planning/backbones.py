"""The sizes of a backbone that a plan needs: from the table of the package's own networks, else counted on the network.

The table (backbones.json) holds networks of the catalogue at dimension 512 and 112 × 112 pixels, so that a plan of one
of them needs no torch. ``python -m trainer.planning.activations`` writes it anew; a test counts again and compares.
"""

import functools
import json
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from trainer.networks.config import BackboneConfig
from trainer.run.config import Config

TABLE = Path(__file__).with_name("backbones.json")
STORED_DIM, STORED_SIZE = 512, (112, 112)
STORED_PRECISIONS = ("float32", "bfloat16")
"""What the table holds; float16 keeps what bfloat16 keeps."""

Unit = tuple[tuple[tuple[int, ...], bool], ...]


@dataclass(frozen=True)
class Kept:
    """What autograd keeps of a batch until the backward pass, each storage once, parameters left out.

    Attributes:
        fixed: bytes whatever the batch (copies of weights in another precision); image: bytes more for every image.
        largest: the tensors of which one is the largest, each as (fixed, image).
    """

    fixed: int
    image: int
    largest: tuple[tuple[int, int], ...]

    def total_bytes(self, batch: int) -> int:
        """Of all tensors."""
        return self.fixed + self.image * batch

    def largest_bytes(self, batch: int) -> int:
        """Of the largest tensor."""
        return max((fixed + image * batch for fixed, image in self.largest), default=0)


@dataclass(frozen=True)
class NetworkSizes:
    """Numbers of a network, whatever the batch.

    Attributes:
        parameters: numbers that are trained; fixed: parameters that are not.
        buffers: floating-point buffers (running statistics).
        units: the units in series that can be computed again; 0: none.
        unit_parameters: see :class:`BackboneSizes`.
        kept: precision → (with all activations, with recomputation).
    """

    parameters: int
    fixed: int
    buffers: int
    units: int
    unit_parameters: tuple[Unit, ...]
    kept: dict[str, tuple[Kept, Kept]]


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
    """Of a network: out of the table where it is there, else counted (which imports torch)."""
    plain = config.width is None and config.dim == STORED_DIM and tuple(image_size) == STORED_SIZE
    if plain and precision in STORED_PRECISIONS and config.name in (table := _table()):
        return from_json(table[config.name])
    from trainer.planning.activations import count_network

    return count_network(config.model_copy(update={"weights": None}), (precision,), image_size)


@functools.cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def as_json(sizes: NetworkSizes) -> dict[str, Any]:
    """A line of the table; units alike that follow each other stand once, with their number."""
    runs: list[list[Any]] = []
    for unit in sizes.unit_parameters:
        if runs and runs[-1][1] == unit:
            runs[-1][0] += 1
        else:
            runs.append([1, unit])
    kept = {name: [[one.fixed, one.image, one.largest] for one in both] for name, both in sizes.kept.items()}
    numbers = [sizes.parameters, sizes.fixed, sizes.buffers, sizes.units]
    return {"numbers": numbers, "unit_parameters": runs, "kept": kept}


def from_json(line: dict[str, Any]) -> NetworkSizes:
    """The inverse of :func:`as_json`."""
    units = chain.from_iterable(
        repeat(tuple((tuple(shape), learns) for shape, learns in unit), count)
        for count, unit in line["unit_parameters"]
    )

    def kept(fixed: int, image: int, largest: list[list[int]]) -> Kept:
        return Kept(fixed, image, tuple((f, i) for f, i in largest))

    both = {name: (kept(*whole), kept(*again)) for name, (whole, again) in line["kept"].items()}
    return NetworkSizes(*line["numbers"], unit_parameters=tuple(units), kept=both)
