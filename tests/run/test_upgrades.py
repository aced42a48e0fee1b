"""A model that begins as the old one, and the third of a chain: recipes put behind a run's file, and evaluated."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.data.samples import packed
from tests.runs import tree
from tools import cli
from trainer.compat.bank.from_model import bank_from_model
from trainer.data import open_dataset
from trainer.distributed import Ranks
from trainer.models.open import load_model
from trainer.run.config import Config, load_config
from trainer.run.engine import train
from trainer.run.startup import prepare
from trainer.run.task import TrainTask

UPGRADES = Path(__file__).parents[2] / "configs" / "upgrade"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set and ``first``, the model that is deployed, with its bank."""
    folder = tmp_path_factory.mktemp("upgrades")
    packed(folder, 11, 6, (8, 8))
    run(folder, "first", train__steps=60)
    return folder


def settings(folder: Path, name: str, layers: tuple[str, ...] = (), words: tuple[str, ...] = (), **more: Any) -> Config:
    """A small run's file with recipes of configs/upgrade behind it, then single settings."""
    changes = {"data__loader": "torch", "data__workers": 0, "data__path": str(folder / "packed")}
    changes |= {"train__precision": "float32", "head__rows": "float32"}
    file = folder / f"{name}.yaml"
    made = tree(folder / name, **changes | more)
    file.write_text(yaml.safe_dump({k: v for k, v in made.items() if k != "train"} | {"train": made["train"]}))
    return load_config(
        file, [*(str(UPGRADES / f"{layer}.yaml") for layer in layers), f"run.dir={folder / name}", *words]
    )


def run(folder: Path, name: str, *layers: str, words: tuple[str, ...] = (), **more: Any) -> None:
    """Train, and make the model's bank for who comes after it."""
    train(settings(folder, name, layers, words, **more), Ranks())
    bank_from_model(load_model(folder / name), open_dataset(folder / "packed"), folder / f"bank-{name}")


def agreement(folder: Path, one: str, other: str) -> float:
    """The mean cosine of two models' embeddings of the same images."""
    images = np.stack([open_dataset(folder / "packed").decode(i) for i in range(66)])
    return float((load_model(folder / one).embed(images) * load_model(folder / other).embed(images)).sum(1).mean())


def test_fine_tuning_begins_with_the_old_weights_and_stays_near(place: Path) -> None:
    words = (f"compat.bank={place / 'bank-first'}", f"backbone.weights={place / 'first'}", "train.steps=30")
    start = settings(place, "tuned", ("fine-tune",), words)
    task = TrainTask(start, prepare(start, Ranks()), Ranks())
    for ours, theirs in zip(task.backbone.parameters(), load_model(place / "first").backbone.parameters(), strict=True):  # type: ignore[attr-defined]
        assert torch.equal(ours, theirs)
    run(place, "tuned", "fine-tune", words=words)
    assert agreement(place, "tuned", "first") > 0.9
    run(place, "alone", run__seed=9)
    assert agreement(place, "alone", "first") < 0.5, "the control"


def test_a_chain_of_three_is_trained_and_evaluated(place: Path, tmp_path: Path) -> None:
    weights = ("compat.alignment_weight=5", "train.steps=60")
    run(place, "second", "lce", words=(f"compat.bank={place / 'bank-first'}", *weights), run__seed=4)
    run(place, "third", "chain", words=(f"compat.bank={place / 'bank-second'}", *weights), run__seed=5)
    card = load_model(place / "third").card
    assert card.compatible_with_hash == load_model(place / "second").hash
    run(place, "free", run__seed=5, train__steps=60)
    assert agreement(place, "third", "first") > agreement(place, "free", "first") + 0.1
    words = ["evaluate", "--old", str(place / "first"), "--between", f"second={place / 'second'}"]
    words += ["--new", str(place / "third"), "--data", f"all={place / 'packed'}", "--fars", "0.1", "--cache", "none"]
    assert cli.main([*words, "--replicates", "100", "--device", "cpu", "--json", str(tmp_path / "out.json")]) == 0
    cells = json.loads((tmp_path / "out.json").read_text())["sets"]["all"]["cells"]
    assert {"old->old", "second->old", "new->old", "new->second", "second->second"} <= set(cells)
