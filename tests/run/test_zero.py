"""DeepSpeed ZeRO 1 to 3: the same run as DDP, skipped steps, checkpoints for any number of ranks and any mode."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks
from tests.run.test_engine import _poisoned_rank, tensors_of
from tests.runs import config, log_of, losses_of, train_all, train_rank
from trainer.distributed import Ranks
from trainer.errors import ConfigError
from trainer.models.open import load_model
from trainer.run.engine import train

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="no DeepSpeed")
STAGES = ("zero1", "zero2", "zero3")
BASE = {
    "train__precision": "float32",
    "data__batch_size": 8,
    "data__synthetic_size": 40,  # the first layer is large enough for stage 3 to spread it
    "optimizer__clip_norm": 0.5,
    "checkpoint__every_steps": 4,
    "optimizer__lr": 0.02,
}
# Float32 sums in another order: the losses of 8 steps agree with DDP's to this.
RELATIVE_TOLERANCE = 1e-5
HALF_TOLERANCE = 2e-2
VARIANTS: dict[str, dict[str, Any]] = {
    "sgd": {"train__accumulate": 2},
    "adamw": {"optimizer__name": "adamw", "optimizer__lr": 0.002},
    "half": {"train__precision": "bfloat16", "train__compress_gradients": True},
    "norm": {
        "backbone__name": "iresnet18",
        "backbone__width": 8,
        "data__synthetic_size": 16,
        "train__steps": 3,
        "train__activation_checkpointing": True,
        "train__channels_last": True,
    },
}


CONTINUED = BASE | {
    "optimizer__name": "adamw",
    "optimizer__lr": 0.002,
    "schedule__name": "constant",
    "schedule__warmup": 0.0,
}


def _on_two_ranks(ranks: Ranks, folder: Path) -> None:
    """All that these tests need of two ranks, in the same processes: DeepSpeed takes seconds to import."""
    train_all(ranks, folder, RUNS)
    for mode in STAGES:
        changes = CONTINUED | {"train__parallel": mode}
        train_rank(ranks, folder / f"{mode}-cut", changes | {"train__steps": 4})
        train_rank(ranks, folder / f"{mode}-three", changes | {"train__steps": 3})
    for mode in STAGES:  # last: what poisons the batches stays
        changes = CONTINUED | {"train__parallel": mode, "train__steps": 5}
        _poisoned_rank(ranks, folder / f"{mode}-five", changes, {3, 4}, 1)


RUNS = {
    f"{mode}-{name}": BASE | changes | {"train__parallel": mode}
    for mode in ("ddp", *STAGES)
    for name, changes in VARIANTS.items()
    if not (name == "norm" and mode == "zero1")
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of :func:`_on_two_ranks`."""
    folder = tmp_path_factory.mktemp("zero")
    run_ranks(_on_two_ranks, 2, folder)
    return folder


@pytest.mark.parametrize("name", [name for name in RUNS if not name.startswith("ddp")])
def test_the_same_run_as_ddp(trained: Path, name: str) -> None:
    """Clipped SGD and AdamW, accumulated batches, bfloat16 and batch norm: losses, norms and the exported model."""
    plain = f"ddp-{name.partition('-')[2]}"
    tolerance = HALF_TOLERANCE if "half" in name else RELATIVE_TOLERANCE
    for key in ("loss", "grad_norm"):
        ours, theirs = ([line[key] for line in log_of(trained / run)] for run in (name, plain))
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, err_msg=key)
    if "norm" not in name:
        images = np.random.default_rng(0).integers(0, 256, (4, 40, 40, 3), np.uint8)
        embedded = [load_model(trained / run).embed(images) for run in (name, plain)]
        np.testing.assert_allclose(*embedded, atol=1e-4 if tolerance < 1e-3 else 1e-2)


def test_checkpoints_know_nothing_of_zero(trained: Path, tmp_path: Path) -> None:
    """Begun with one of them on two ranks, continued with another on three."""
    train(config(tmp_path / "whole", **CONTINUED), Ranks())
    ends = {"zero1": "zero3", "zero2": "ddp", "zero3": "zero2"}
    for mode in ends:
        shutil.copytree(trained / f"{mode}-cut", tmp_path / mode)
    runs = {first: CONTINUED | {"train__parallel": second} for first, second in ends.items()}
    run_ranks(train_all, 3, tmp_path, runs)
    for mode in ends:
        assert len(losses_of(tmp_path / mode)) == 8
        np.testing.assert_allclose(
            losses_of(tmp_path / mode), losses_of(tmp_path / "whole"), rtol=RELATIVE_TOLERANCE, err_msg=mode
        )


@pytest.mark.parametrize("mode", STAGES)
def test_a_step_that_is_not_finite_changes_nothing(trained: Path, mode: str) -> None:
    """Bad images on rank 1 in the last two of five steps."""
    three, five = tensors_of(trained / f"{mode}-three"), tensors_of(trained / f"{mode}-five")
    assert {n for n in three if not torch.equal(three[n], five[n])} == {"skipped", "streak"}
    assert int(five["skipped"]) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train__precision": "float64"}, "float32 at most"),
        ({"train__compile": True}, "not together with train.compile"),
        ({"train__parallel": "zero3", "train__ema": 0.9}, "no moving average"),
        ({}, "needs a process group"),
    ],
)
def test_what_zero_cannot_do_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        train(config(tmp_path / "run", **BASE | {"train__parallel": "zero2"} | changes), Ranks())
    assert not (tmp_path / "run").exists()


def test_without_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.run.zero.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="DeepSpeed is not installed"):
        train(config(tmp_path / "run", **BASE, train__parallel="zero1"), Ranks())
