"""The stored sizes of the package's networks are what is counted on the networks."""

import json
import re
from pathlib import Path

import pytest
import torch

from trainer.networks import BACKBONES, build_backbone
from trainer.networks.config import BackboneConfig
from trainer.planning.activations import count_network, saved_sizes, unit_shapes, write_table
from trainer.planning.backbones import network_sizes
from trainer.planning.stored import (
    STORED_DIM,
    STORED_PRECISIONS,
    STORED_SIZE,
    TABLE,
    NetworkSizes,
    as_json,
    from_json,
    read_table,
    release,
    write_lines,
)

WHOLE = json.loads(TABLE.read_text(encoding="utf-8"))
STORED = WHOLE["networks"]


def test_every_network_is_stored() -> None:
    assert list(STORED) == [name for name in BACKBONES if name != "test_linear"]  # the tests' own


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


def test_the_stored_sizes_are_those_of_the_tested_torch() -> None:
    pinned = re.search(r"^torch==(.+)$", Path("constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert release(WHOLE["torch"]) == release(pinned[1])
    assert read_table(f"{release(WHOLE['torch'])}.9+cu130") == STORED


def test_under_another_torch_networks_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []

    def count(config: BackboneConfig, *_: object) -> NetworkSizes:
        counted.append(config.name)
        return from_json(STORED["small"])

    monkeypatch.setattr("trainer.planning.activations.count_network", count)
    asked = BackboneConfig(name="iresnet18", dim=STORED_DIM)
    network_sizes(asked, "float32", STORED_SIZE)
    assert counted == []
    monkeypatch.setattr("trainer.planning.backbones.version", lambda name: "1.2.0+cu999")
    network_sizes(asked, "float32", STORED_SIZE)
    assert counted == ["iresnet18"]


def test_the_table_is_of_one_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written by another one it begins anew: lines of two would look alike."""
    monkeypatch.setattr("trainer.planning.stored.TABLE", tmp_path / "table.json")
    write_lines(WHOLE["torch"], STORED)
    assert (tmp_path / "table.json").read_bytes() == TABLE.read_bytes()
    write_lines("1.2.0", {"iresnet18": STORED["iresnet18"]})
    write_table(["small"])
    made = json.loads((tmp_path / "table.json").read_text())
    assert (release(made["torch"]), list(made["networks"])) == (release(torch.__version__), ["small"])
