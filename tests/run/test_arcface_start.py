"""Starting from a run of arcface_torch: backbone, per-rank heads and momentum, on any number of ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from tests.run.test_engine import tensors_of
from tests.runs import Linear, config, losses_of, train_rank
from trainer.distributed import Ranks
from trainer.errors import CheckpointError, LceError
from trainer.run.engine import train

CLASSES, DIM, OLD_RANKS = 11, 6, 3


def arcface_run(folder: Path, momentum: bool = True) -> dict[str, Tensor]:
    """The files of a run on 3 ranks, and the tensors that a run of ours must begin with."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(4)
    backbone = Linear(DIM, (8, 8))
    rows, pull = (torch.randn(CLASSES, DIM, generator=generator) for _ in range(2))
    weights = {k: torch.randn(v.shape, generator=generator) * 0.1 for k, v in backbone.state_dict().items()}
    pulls = {k: torch.randn(v.shape, generator=generator) * 0.01 for k, v in weights.items()}
    start = 0
    for rank in range(OLD_RANKS):
        stop = start + CLASSES // OLD_RANKS + (rank < CLASSES % OLD_RANKS)
        buffers = [*pulls.values(), pull[start:stop].clone()]
        state = {n: {"momentum_buffer": b} for n, b in enumerate(buffers)} if momentum else {}
        checkpoint = {
            "epoch": 3,
            "global_step": 70,
            "state_dict_backbone": weights,
            "state_dict_softmax_fc": {"weight": rows[start:stop].clone()},
            "state_optimizer": {"state": state, "param_groups": [{"params": list(range(len(weights) + 1))}]},
            "state_lr_scheduler": {"last_epoch": 70, "base_lrs": [0.1]},
        }
        torch.save(checkpoint, folder / f"checkpoint_gpu_{rank}.pt")
        start = stop
    expected = {"task.rows": rows, "task.momentum": pull}
    expected |= {f"module.backbone.{k}": v for k, v in weights.items()}
    return expected | {f"optimizer.backbone.{k}/momentum_buffer": v for k, v in pulls.items()}


def _changes(source: Path, **more: Any) -> dict[str, Any]:
    base = {"backbone__weights": str(source / "checkpoint_gpu_0.pt"), "head__weights": str(source)}
    return base | {"optimizer__start_momentum": True} | more


@pytest.mark.parametrize(("world", "parallel"), [(2, "fsdp"), (4, "ddp")])
def test_every_rank_takes_its_part(tmp_path: Path, world: int, parallel: str) -> None:
    """Files of 3 ranks on 2 and 4: the losses, which follow from rows, weights and momentum, are those of 1."""
    arcface_run(tmp_path / "old")
    changes = _changes(tmp_path / "old", optimizer__lr=0.01)
    train(config(tmp_path / "one", **changes), Ranks())
    run_ranks(train_rank, world, tmp_path / "many", changes | {"train__parallel": parallel})
    assert losses_of(tmp_path / "many") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-9)


def test_momentum_matters_and_is_asked_for(tmp_path: Path) -> None:
    """The first step already moves by it; without it on file, or without asking, the run is another."""
    arcface_run(tmp_path / "with")
    arcface_run(tmp_path / "without", momentum=False)
    runs = {
        "with": _changes(tmp_path / "with"),
        "without": _changes(tmp_path / "without"),
        "unasked": _changes(tmp_path / "with", optimizer__start_momentum=False),
    }
    for name, changes in runs.items():
        train(config(tmp_path / f"run-{name}", **changes, optimizer__lr=0.05), Ranks())
    losses = {name: losses_of(tmp_path / f"run-{name}") for name in runs}
    assert losses["without"] == losses["unasked"]
    assert losses["with"][0] == losses["unasked"][0]
    assert losses["with"][1] != losses["unasked"][1]


def test_tensors_after_the_first_step(tmp_path: Path) -> None:
    """At a learning rate of nearly 0 weights and rows stay as on file, and v ← 0.9 v + g + λ w differs by 0.9 v."""
    expected = arcface_run(tmp_path / "old")
    arcface_run(tmp_path / "bare", momentum=False)
    still = {"train__steps": 1, "optimizer__lr": 1e-12, "schedule__warmup": 0.0}
    for name in ("old", "bare"):
        train(config(tmp_path / f"run-{name}", **_changes(tmp_path / name, **still)), Ranks())
    ours, bare = tensors_of(tmp_path / "run-old"), tensors_of(tmp_path / "run-bare")
    for name, value in expected.items():
        found = (ours[name] - bare[name]) / 0.9 if "momentum" in name else ours[name]
        torch.testing.assert_close(found, value.double(), atol=1e-9, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("missing rank", "rank 1 is missing"),
        ("classes", "classes"),
        ("dimension", "dimension 6, backbone.dim is 7"),
        ("code", "refused"),
        ("sub-centres", "sub_centers=1"),
    ],
)
def test_refusals(tmp_path: Path, case: str, words: str) -> None:
    arcface_run(tmp_path / "old")
    changes: dict[str, Any] = {"head__weights": str(tmp_path / "old")}
    if case == "missing rank":
        (tmp_path / "old/checkpoint_gpu_1.pt").unlink()
    elif case == "classes":
        changes["data__synthetic_classes"] = 12
    elif case == "dimension":
        changes["backbone__dim"] = 7
    elif case == "code":
        torch.save({"state_dict_softmax_fc": Linear(DIM, (8, 8))}, tmp_path / "old/checkpoint_gpu_1.pt")
    else:
        changes["head__sub_centers"] = 2
    with pytest.raises(LceError, match=words):
        train(config(tmp_path / "run", **changes), Ranks())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", ["state_dict_backbone", "state_dict_softmax_fc"])
def test_weights_exchanged_under_the_same_name_are_not_those_of_the_run(tmp_path: Path, part: str) -> None:
    """Neither is it "finished already", nor does it continue."""
    arcface_run(tmp_path / "old")
    changes = _changes(tmp_path / "old")
    for _ in range(2):
        assert train(config(tmp_path / "run", **changes), Ranks()).step == 8
    file = tmp_path / "old/checkpoint_gpu_0.pt"
    saved = torch.load(file, weights_only=True)
    for value in saved[part].values():
        value += 1e-3
    torch.save(saved, file)
    for steps in (8, 12):
        with pytest.raises(CheckpointError, match=r"with another set of start weights .*; choose another run\.dir"):
            train(config(tmp_path / "run", **changes, train__steps=steps), Ranks())
