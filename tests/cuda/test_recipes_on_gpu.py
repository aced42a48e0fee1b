"""Twenty updates in the precision of each recipe: on a GPU with the recipe's own network, where there is none in small.

Skipped where there is no GPU; `LCE_TEST_DEVICE=cpu` tries them without one.
"""

import json
import math
import os
from pathlib import Path
from statistics import mean

import pytest
import torch

from trainer.distributed import Ranks
from trainer.run.config import Config, dump_tree, load_config, parse_config
from trainer.run.engine import train

ROOT = Path(__file__).resolve().parents[2]
DEVICE = os.environ.get("LCE_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no usable CUDA device"),
]
UPDATES = 20
GPU = ("run.dir=unused", "data.path=unused")
TF32 = ("train.precision=float32", "train.matmul=tf32", "head.compute=tf32")
RECIPES = {
    "bfloat16": ("data/glint360k", "network/r50", "gpus/1", *GPU),
    "bfloat16 with adamw": ("data/wf42m", "network/vit-b", "gpus/vit-1", *GPU),
    "tf32, as gpus/1.yaml recommends": ("data/ms1mv3", "network/r50", "gpus/1", *GPU, *TF32),
    "float32": ("base", "network/r50", *GPU),
}
"""The layers and settings of a run by the arithmetic that recipes use; test_gpu_check.py finds one that is missing."""
SMALL = {"name": "small_resnet", "width": 8, "dim": 32}


def recipe_config(recipe: str) -> Config:
    """The configuration of a recipe, of which no file of data is read."""
    first, *more = (word if "=" in word else str(ROOT / f"configs/{word}.yaml") for word in RECIPES[recipe])
    return load_config(first, more)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_learns(recipe: str, tmp_path: Path) -> None:
    config = recipe_config(recipe)
    whole = dump_tree(config)
    tree = {name: whole[name] for name in ("backbone", "head")}
    small = DEVICE == "cpu"
    batch, size = (32, 32) if small else (128, 112)
    tree["run"] = {"dir": str(tmp_path / "run"), "device": DEVICE}
    tree["data"] = {"loader": "synthetic", "batch_size": batch, "synthetic_classes": 1000, "synthetic_size": size}
    tree["data"]["synthetic_records"] = batch  # every batch has the same images
    names = ("precision", "matmul", *(() if small else ("channels_last", "activation_checkpointing")))
    tree["train"] = {name: whole["train"][name] for name in names} | {"steps": UPDATES}
    tree["backbone"] = SMALL if small else tree["backbone"]
    tree["optimizer"] = {"name": config.optimizer.name, "clip_norm": 5.0}
    tree["optimizer"]["lr"] = 0.001 if config.optimizer.name == "adamw" else 0.005
    tree["checkpoint"] = {"every_steps": 0}
    tree["log"] = {"every_steps": 1, "tensorboard": False, "progress": False}
    train(parse_config(tree, recipe), Ranks(device=torch.device(DEVICE, 0)))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert len(losses) == UPDATES
    assert all(map(math.isfinite, losses))
    assert mean(losses[-5:]) < 0.9 * mean(losses[:5]), losses
