"""The stored sizes of the package's networks are what is counted on the networks."""

import json

import pytest
import torch

from trainer.networks import BACKBONES, build_backbone
from trainer.networks.config import BackboneConfig
from trainer.planning.activations import count_network, saved_sizes, unit_shapes
from trainer.planning.backbones import network_sizes
from trainer.planning.stored import (
    STORED_DIM,
    STORED_PRECISIONS,
    STORED_SIZE,
    TABLE,
    as_json,
    from_json,
)

STORED = json.loads(TABLE.read_text(encoding="utf-8"))


def test_the_recipes_networks_are_stored() -> None:
    assert {"iresnet18", "iresnet50", "iresnet100", "mobilefacenet"} <= set(STORED) <= set(BACKBONES)


@pytest.mark.parametrize("name", STORED)
def test_parameters_of_every_stored_network(name: str) -> None:
    with torch.device("meta"):
        network = build_backbone(BackboneConfig(name=name, dim=STORED_DIM), STORED_SIZE)
    stored = from_json(STORED[name])
    assert stored.unit_parameters == unit_shapes(network)
    assert stored.parameters == sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert stored.buffers == sum(b.numel() for b in network.buffers() if b.is_floating_point())


def test_a_network_counted_again() -> None:
    counted = count_network(BackboneConfig(name="iresnet18", dim=STORED_DIM), STORED_PRECISIONS, STORED_SIZE)
    assert as_json(counted) == as_json(from_json(STORED["iresnet18"]))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_is_kept_grows_with_the_batch_as_it_is_counted(precision: str) -> None:
    """A network of another width than the stored, on batches themselves."""
    config = BackboneConfig(name="small_resnet", dim=48)
    whole, recomputed = network_sizes(config, precision, (32, 32)).kept[precision]
    network = build_backbone(config, (32, 32))
    for batch in (2, 5):
        for kept, recompute in ((whole, False), (recomputed, True)):
            sizes = saved_sizes(network, precision, (32, 32), batch, recompute)
            assert (kept.total_bytes(batch), kept.largest_bytes(batch)) == (sum(sizes), max(sizes))
