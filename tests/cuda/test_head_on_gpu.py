"""The head on a real GPU against the CPU in float64, its waits, and runs that repeat to the last bit.

Skipped where there is no GPU. `LCE_TEST_DEVICE=cpu` runs what can run on a CPU as well, so that the tests themselves
are tested.
"""

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from trainer.distributed import Ranks
from trainer.head.config import HeadConfig
from trainer.head.old_centers import DirectCompat
from trainer.head.partial_fc import PartialFC
from trainer.run.config import load_config
from trainer.run.engine import train

ROOT = Path(__file__).resolve().parents[2]
DEVICE = os.environ.get("LCE_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no usable CUDA device"),
]
CLASSES, DIM, BATCH, STEPS = 5_003, 64, 96, 4
BOUNDS = {"float32": 1e-4, "tf32": 2e-2, "bfloat16": 6e-2}
"""Of the embeddings' gradient, relative to float64 on the CPU."""


def steps(device: str, head: dict[str, Any], compat: bool = False) -> list[tuple[float, Tensor]]:
    """Loss and ∂L/∂x of some steps of one head, on the CPU in float64."""
    generator = torch.Generator().manual_seed(5)
    where, dtype = torch.device(device), torch.float64 if head.get("rows") == "float64" else torch.float32
    bank = None
    if compat:
        centers = torch.nn.functional.normalize(torch.randn(CLASSES, DIM, generator=generator, dtype=torch.float64))
        boundaries = torch.full((CLASSES,), 0.5, dtype=torch.float64)
        mask = torch.rand(CLASSES, generator=generator) < 0.7
        bank = DirectCompat(centers.to(where, dtype), boundaries.to(where, dtype), mask.to(where), 2.0, 1.0)
    module = PartialFC(HeadConfig.model_validate(head), CLASSES, DIM, Ranks(device=where), seed=3, compat=bank)
    module.set_lr(0.1)
    out = []
    for number in range(STEPS):
        x = torch.randn(BATCH, DIM, generator=generator, dtype=torch.float64)
        labels = torch.randint(-1, CLASSES, (BATCH,), generator=generator)
        leaf = x.to(where, dtype).requires_grad_()
        loss = module(leaf, labels.to(where), number).loss
        loss.backward()
        assert leaf.grad is not None
        out.append((float(loss), leaf.grad.double().cpu()))
    return out


@pytest.mark.parametrize("margin", ["softmax", "cosface", "arcface", "adaface", "magface", "curricular"])
@pytest.mark.parametrize("compute", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_loss_and_gradient_are_those_of_float64(margin: str, compute: str, rate: float) -> None:
    head = {"margin": {"name": margin, "scale": 32.0}, "sample_rate": rate, "init_std": 0.3}
    exact = steps("cpu", head | {"rows": "float64"})
    ours = steps(DEVICE, head | {"compute": compute})
    for (loss, gradient), (expected, reference) in zip(ours, exact, strict=True):
        assert loss == pytest.approx(expected, rel=BOUNDS[compute])
        assert (gradient - reference).norm() <= BOUNDS[compute] * reference.norm()


@pytest.mark.parametrize("rows", ["float32", "bfloat16"])
def test_direct_lce(rows: str) -> None:
    head = {"margin": {"name": "cosface", "scale": 32.0}, "init_std": 0.3}
    exact = steps("cpu", head | {"rows": "float64"}, compat=True)
    ours = steps(DEVICE, head | {"rows": rows}, compat=True)
    bound = 1e-4 if rows == "float32" else 3e-2
    for (loss, gradient), (expected, reference) in zip(ours, exact, strict=True):
        assert loss == pytest.approx(expected, rel=bound)
        assert (gradient - reference).norm() <= bound * reference.norm()


@pytest.mark.parametrize("compute", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("rate", [1.0, 0.1])
@pytest.mark.parametrize(("margin", "rows"), [("cosface", "float32"), ("filter", "float32"), ("arcface", "bfloat16")])
def test_triton_kernels_with_direct_lce_are_those_of_float64(margin: str, rows: str, rate: float, compute: str) -> None:
    if DEVICE != "cuda" or importlib.util.find_spec("triton") is None:  # here: a mark would come before the module's
        pytest.skip("only a GPU with triton runs its kernels")
    of_margin: dict[str, Any] = {"name": margin, "scale": 32.0}
    if margin == "filter":
        of_margin |= {"name": "cosface", "inter_class_filter": 0.3}
    head = {"margin": of_margin, "sample_rate": rate, "init_std": 0.3}
    exact = steps("cpu", head | {"rows": "float64"}, compat=True)
    ours = steps(DEVICE, head | {"impl": "triton", "rows": rows, "compute": compute}, compat=True)
    bound = max(BOUNDS[compute], 1e-4 if rows == "float32" else 3e-2)
    for (loss, gradient), (expected, reference) in zip(ours, exact, strict=True):
        assert loss == pytest.approx(expected, rel=bound)
        assert (gradient - reference).norm() <= bound * reference.norm()


@pytest.mark.skipif(DEVICE != "cuda", reason="only a GPU is waited for")
@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_the_host_waits_as_seldom_as_agreed(rate: float) -> None:
    budgets = json.loads((ROOT / "tests/cuda_waits.json").read_text())
    head = PartialFC(
        HeadConfig.model_validate({"sample_rate": rate}), CLASSES, DIM, Ranks(device=torch.device("cuda")), seed=3
    )
    head.set_lr(0.1)
    x = torch.randn(BATCH, DIM, device="cuda", requires_grad=True)
    labels = torch.randint(0, CLASSES, (BATCH,), device="cuda")
    head(x, labels, 0).loss.backward()  # what is set up once
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            head(x, labels, 1).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [str(wait.message) for wait in waits if "synchronizing" in str(wait.message)]
    assert len(found) <= budgets["plain" if rate == 1 else "sampled"]["1"], found


def run(folder: Path, name: str, *words: str) -> list[dict[str, Any]]:
    """A run of one rank: under torchrun with NCCL on a GPU, in this process on a CPU; the lines of its log."""
    settings = {
        "run": {"dir": str(folder / name), "device": DEVICE, "deterministic": True},
        "data": {"loader": "synthetic", "batch_size": 32, "synthetic_classes": 503, "synthetic_size": 32},
        "backbone": {"name": "small_resnet", "width": 8, "dim": 32},
        "train": {"steps": 12, "precision": "bfloat16"},
        "checkpoint": {"every_steps": 6, "keep": 5},
        "log": {"every_steps": 1, "tensorboard": False, "progress": False},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    if DEVICE == "cpu":
        train(load_config(folder / f"{name}.yaml", words), Ranks())
    else:
        under_torchrun(folder / f"{name}.yaml", *words)
    return [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]


def under_torchrun(config: Path, *words: str) -> None:
    """`python -m trainer` as the only rank."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "trainer"]
    done = subprocess.run(
        [*start, str(config), *words],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_resumed_run_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    even = ("schedule.name=constant", "schedule.warmup=0")  # a rate that does not depend on the number of updates
    run(tmp_path, "parts", "train.steps=6", *even)
    whole, parts = run(tmp_path, "whole", *even), run(tmp_path, "parts", *even)
    assert [line["step"] for line in parts] == list(range(1, 13))
    assert [line["loss"] for line in parts] == [line["loss"] for line in whole]
