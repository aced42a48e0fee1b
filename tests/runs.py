"""Small runs on synthetic data for the engine's tests: configurations, and functions that the spawned ranks call."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.distributed import Ranks
from trainer.networks import BACKBONES
from trainer.run.config import Config, parse_config
from trainer.run.engine import train
from trainer.run.folder import SUMMARY


class Linear(nn.Module):
    """A backbone without batch norm, so that the split of a batch over ranks cannot matter."""

    def __init__(self, dim: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(3 * image_size[0] * image_size[1], 24), nn.Tanh(), nn.Linear(24, dim)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


BACKBONES["test_linear"] = Linear


def tree(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run of 8 updates on 41 records of 11 classes in batches of 7 (so one epoch ends with a batch of 6)."""
    base: dict[str, Any] = {
        "run": {"dir": str(folder), "device": "cpu", "threads": 1, "seed": 3},
        "data": {
            "loader": "synthetic",
            "batch_size": 7,
            "synthetic_classes": 11,
            "synthetic_size": 8,
            "synthetic_records": 41,
        },
        "backbone": {"name": "test_linear", "dim": 6},
        "head": {"margin": {"scale": 8, "m": 0.2}, "rows": "float64", "init_std": 0.3},
        "optimizer": {"lr": 0.1},
        "train": {"steps": 8, "precision": "float64"},
        "checkpoint": {"every_steps": 0},
        "log": {"every_steps": 1, "tensorboard": False, "progress": False},
    }
    if changes.get("data__loader", "synthetic") != "synthetic":
        base["data"] = {"batch_size": base["data"]["batch_size"]}
    if "train__epochs" in changes:
        del base["train"]["steps"]
    if "head__weights" in changes:
        del base["head"]["init_std"]
    for key, value in changes.items():
        section, _, name = key.partition("__")
        base.setdefault(section, {})[name] = value
    if changes.get("compat__mode") == "cross-model":  # trains maps alone: these sections belong to other runs
        del base["backbone"], base["head"]
    return base


def config(folder: Path, **changes: Any) -> Config:
    """The configuration of :func:`tree` with ``section__key=value`` changes."""
    return parse_config(tree(folder, **changes), "test")


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses_of(folder: Path) -> list[float]:
    """The losses of a finished run, step by step."""
    assert (folder / SUMMARY).exists(), f"{folder}: the run has not finished"
    return [line["loss"] for line in log_of(folder)]


def train_rank(ranks: Ranks, folder: Path, changes: dict[str, Any]) -> str:
    """One rank of a run that comes to its end; its status."""
    torch.set_num_threads(1)
    status = train(config(folder, **changes), ranks).status
    assert status == "finished", f"{folder}: {status}"
    return status


def train_all(ranks: Ranks, folder: Path, runs: dict[str, dict[str, Any]]) -> None:
    """One rank of several runs, one after the other: name (of the folder) → changes."""
    for name, changes in runs.items():
        train_rank(ranks, folder / name, changes)
