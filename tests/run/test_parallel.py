"""FSDP2, compilation, recomputation: the same run as DDP; gradients that are scaled; slices of any size."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.banks import write_bank
from tests.ranks import run_ranks
from tests.runs import config, log_of, losses_of, train_rank
from trainer.compat.bank.center_bank import BankInfo
from trainer.distributed import Ranks, scale_gradient
from trainer.errors import ConfigError
from trainer.models.open import load_model
from trainer.run.engine import train
from trainer.run.parallel import embed

CLIPPED = {"optimizer__clip_norm": 0.5, "train__ema": 0.9, "checkpoint__every_steps": 4, "data__batch_size": 8}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_fsdp_is_the_same_run(tmp_path: Path, optimizer: str) -> None:
    """Sharded parameters, optimizer state and moving average on two ranks; clipped by the norm over all shards."""
    changes = CLIPPED | {"optimizer__name": optimizer, "optimizer__lr": 0.02}
    train(config(tmp_path / "one", **changes), Ranks())
    run_ranks(train_rank, 2, tmp_path / "two", changes | {"train__parallel": "fsdp"})
    np.testing.assert_allclose(losses_of(tmp_path / "two"), losses_of(tmp_path / "one"), rtol=1e-9)
    norms = [[line["grad_norm"] for line in log_of(tmp_path / name)] for name in ("one", "two")]
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-6)
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    np.testing.assert_allclose(*(load_model(tmp_path / n).embed(images) for n in ("one", "two")), atol=1e-6)


def test_begun_with_fsdp_on_two_continued_with_ddp_on_three(tmp_path: Path) -> None:
    """A checkpoint does not know how its parameters were spread."""
    changes = CLIPPED | {"schedule__name": "constant"}
    train(config(tmp_path / "whole", **changes), Ranks())
    run_ranks(train_rank, 2, tmp_path / "run", changes | {"train__parallel": "fsdp", "train__steps": 4})
    run_ranks(train_rank, 3, tmp_path / "run", changes | {"train__parallel": "ddp"})
    assert len(losses_of(tmp_path / "run")) == 8
    np.testing.assert_allclose(losses_of(tmp_path / "run")[4:], losses_of(tmp_path / "whole")[4:], rtol=1e-9)


@pytest.mark.parametrize("setting", [{"train__activation_checkpointing": True}, {"train__channels_last": True}])
def test_ways_to_compute_do_not_change_the_run(tmp_path: Path, setting: dict[str, Any]) -> None:
    """The sixth batch, an epoch's last, is of one image."""
    changes = {"backbone__name": "iresnet18", "backbone__width": 8, "data__synthetic_size": 16, "train__steps": 7}
    changes["data__batch_size"] = 8
    train(config(tmp_path / "plain", **changes), Ranks())
    train(config(tmp_path / "other", **changes | setting), Ranks())
    np.testing.assert_allclose(losses_of(tmp_path / "other"), losses_of(tmp_path / "plain"), rtol=1e-9)


def test_channels_last_under_fsdp(tmp_path: Path) -> None:
    changes = {"backbone__name": "iresnet18", "backbone__width": 8, "data__synthetic_size": 16, "train__steps": 2}
    changes["train__channels_last"] = True
    for mode in ("ddp", "fsdp"):
        run_ranks(train_rank, 2, tmp_path / mode, changes | {"train__parallel": mode})
    np.testing.assert_allclose(losses_of(tmp_path / "fsdp"), losses_of(tmp_path / "ddp"), rtol=1e-6)


def test_compressed_gradients_change_little(tmp_path: Path) -> None:
    run_ranks(train_rank, 2, tmp_path / "plain", {})
    run_ranks(train_rank, 2, tmp_path / "compressed", {"train__compress_gradients": True})
    plain, compressed = losses_of(tmp_path / "plain"), losses_of(tmp_path / "compressed")
    np.testing.assert_allclose(compressed, plain, rtol=0.05)
    assert compressed[1:] != plain[1:]


def test_settings_that_cannot_be_met(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a process group"):
        train(config(tmp_path / "run", train__parallel="fsdp"), Ranks())
    with pytest.raises(ConfigError, match="no units to recompute"):
        train(config(tmp_path / "run", train__activation_checkpointing=True), Ranks())
    assert not (tmp_path / "run").exists()


def test_without_a_compiler_it_trains_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    train(config(tmp_path / "plain"), Ranks())
    monkeypatch.setattr("trainer.run.parallel.shutil.which", lambda name: None)
    train(config(tmp_path / "compile", train__compile=True), Ranks())
    assert losses_of(tmp_path / "compile") == losses_of(tmp_path / "plain")
    assert "no C++ compiler" in caplog.text


def test_compiled_maps_next_to_a_network(tmp_path: Path) -> None:
    known = {"boundaries": torch.full((11,), 0.5), "counts": torch.full((11,), 4), "mask": torch.ones(11).bool()}
    centers = torch.nn.functional.normalize(torch.randn(11, 6))
    write_bank(tmp_path / "bank", centers=centers, info=BankInfo(model="old"), **known)
    maps = {"compat__transform": {"blocks": 1, "paths": 1, "bottleneck": 2}, "compat__mode": "both"}
    lce = {"compat__method": "lce", "compat__bank": str(tmp_path / "bank"), "train__steps": 3, **maps}
    train(config(tmp_path / "plain", **lce), Ranks())
    train(config(tmp_path / "compiled", **lce, train__compile=True), Ranks())
    np.testing.assert_allclose(losses_of(tmp_path / "compiled"), losses_of(tmp_path / "plain"), rtol=1e-9)


def test_scale_gradient() -> None:
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    y = scale_gradient(x, torch.tensor(3.0))
    assert torch.equal(y, x)
    y.square().sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [6.0, 12.0]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_slices_of_any_size(count: int) -> None:
    """b = 0 and 1 give finite embeddings, gradients for every parameter, and leave running statistics alone."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5), nn.BatchNorm1d(5))
    before = [b.clone() for b in net.buffers()]
    out = embed(net, torch.randn(count, 3, 8, 8))
    assert out.shape == (count, 5)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True)) == (count < 2)
    assert all(m.training for m in net.modules())
