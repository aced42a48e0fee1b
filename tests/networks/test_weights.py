"""Starting from saved weights: every kind of file, and refusals that name the reason."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.runs import config
from trainer.distributed import Ranks
from trainer.errors import ModelError
from trainer.networks.weights import load_backbone_weights, read_weights
from trainer.run.engine import train


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


@pytest.mark.parametrize(
    "kind", ["safetensors", "pt", "data parallel", "arcface_torch", "compiled", "nested", "no counters"]
)
def test_files(tmp_path: Path, kind: str) -> None:
    state = _net().state_dict()
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "data parallel":
        torch.save({f"module.{k}": v for k, v in state.items()}, path)
    elif kind == "compiled":
        torch.save({f"module._orig_mod.{k}": v for k, v in state.items()}, path)
    elif kind == "nested":
        torch.save({"state_dict": {f"model.{k}": v for k, v in state.items()}, "head.weight": torch.ones(5, 2)}, path)
    elif kind == "no counters":
        torch.save({k: v for k, v in state.items() if "num_batches" not in k}, path)
    elif kind == "arcface_torch":  # its checkpoint_gpu_N.pt
        torch.save({"epoch": 3, "global_step": 9, "state_dict_backbone": state}, path)
    else:
        torch.save(state, path)
    net = _net()
    load_backbone_weights(net, path)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_a_run_starts_from_a_run(tmp_path: Path) -> None:
    train(config(tmp_path / "old"), Ranks())
    train(config(tmp_path / "new", backbone__weights=str(tmp_path / "old"), optimizer__lr=1e-12), Ranks())
    old, new = read_weights(tmp_path / "old"), read_weights(tmp_path / "new")
    assert all(torch.allclose(old[k], new[k]) for k in old)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"0.weight": torch.zeros(2, 3)}, r"lacks 0.bias, 1.weight, 1.bias and 2 more"),
        (_net().state_dict() | {"x": torch.zeros(1)}, "it has x, which the network does not"),
        (_net().state_dict() | {"0.bias": torch.zeros(3)}, r"0.bias is \(3,\), not \(2,\)"),
        ({"epoch": 3}, "not a state dict"),
        (nn.Linear(1, 1), "not a state dict .*holds a Linear"),
    ],
)
def test_refusals(tmp_path: Path, content: object, words: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=words):
        load_backbone_weights(_net(), tmp_path / "w.pt")


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no .safetensors"):
        read_weights(tmp_path)
