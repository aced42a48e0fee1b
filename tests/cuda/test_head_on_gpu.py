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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from tests.ranks import run_ranks
from trainer.data import slice_of
from trainer.distributed import Ranks
from trainer.head.config import HeadConfig
from trainer.head.float8 import HALF, decode, encode
from trainer.head.kernels import why_eager
from trainer.head.old_centers import DirectCompat
from trainer.head.partial_fc import PartialFC
from trainer.head.partition import class_range
from trainer.head.sizes import COMPILE_FROM_ROWS
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
ROUNDED = {"float32": 0.0, "bfloat16": 1e-2, "float8": 4e-2}
"""The same for rows that each update rounds at random, by their dtype; the first step has them as they were put."""
FILTERED, OTHER_ROW = 6e-2, 3e-1
"""The same where a negative is on the other side of the filter's threshold, and where another row of a class is the
nearest, because its cosine was rounded."""
SGD = {"name": "sgd", "momentum": 0.0}


def rows_for(head: dict[str, Any], classes: int) -> Tensor:
    """The rows to start with (C·K, D) in float64, as the head's dtype holds them; a head's own depend on the device."""
    generator = torch.Generator().manual_seed(11)
    rows = 0.3 * torch.randn(classes * head.get("sub_centers", 1), DIM, generator=generator)
    if head.get("rows") == "float8":
        return decode(*encode(rows, torch.tensor(HALF))).double()
    return rows.to(torch.bfloat16 if head.get("rows") == "bfloat16" else torch.float32).double()


def steps(
    device: str,
    head: dict[str, Any],
    start: Tensor,
    compat: bool = False,
    ranks: Ranks = Ranks(),  # noqa: B008
) -> list[tuple[float, Tensor]]:
    """Loss and ∂L/∂x (b, D) of some steps of one rank's head, whose rows (C·K, D) of all ranks begin as ``start``."""
    generator = torch.Generator().manual_seed(5)
    where, dtype = torch.device(device), torch.float64 if head.get("rows") == "float64" else torch.float32
    config = HeadConfig.model_validate(head)
    classes = len(start) // config.sub_centers
    mine = class_range(classes, ranks.rank, ranks.world_size)
    own = slice(mine.start, mine.stop)
    bank = None
    if compat:
        centers = torch.nn.functional.normalize(torch.randn(classes, DIM, generator=generator, dtype=torch.float64))
        boundaries = torch.full((classes,), 0.5, dtype=torch.float64)
        mask = torch.rand(classes, generator=generator) < 0.7
        known = (centers[own].to(where, dtype), boundaries[own].to(where, dtype), mask[own].to(where))
        bank = DirectCompat(*known, 2.0, 1.0)
    module = PartialFC(config, classes, DIM, replace(ranks, device=where), seed=3, compat=bank)
    k = config.sub_centers
    module.put_rows(0, start[mine.start * k : mine.stop * k].to(where, dtype))
    module.load_shard_state()
    module.set_lr(0.1)
    out = []
    samples = slice_of(BATCH, ranks.rank, ranks.world_size)
    for number in range(STEPS):
        x = torch.randn(BATCH, DIM, generator=generator, dtype=torch.float64)
        labels = torch.randint(-1, classes, (BATCH,), generator=generator)
        leaf = x[samples].to(where, dtype).requires_grad_()
        loss = module(leaf, labels[samples].to(where), number).loss
        loss.backward()
        assert leaf.grad is not None
        out.append((float(loss.detach()), leaf.grad.double().cpu()))
    return out


def compare(head: dict[str, Any], compat: bool = False, classes: int = CLASSES) -> None:
    """The head on the device next to float64 on the CPU."""
    start = rows_for(head, classes)
    plain = {name: value for name, value in head.items() if name not in ("compute", "impl", "rows_residual")}
    check(head, steps(DEVICE, head, start, compat), steps("cpu", plain | {"rows": "float64"}, start, compat))


def check(head: dict[str, Any], ours: list[tuple[float, Tensor]], exact: list[tuple[float, Tensor]]) -> None:
    """Every step is as near to the exact one as the head's products and rows allow; where rounding decides what counts,
    one step is, and the others not much farther away.
    """
    products, rows = BOUNDS[head.get("compute", "float32")], ROUNDED[head.get("rows", "float32")]
    errors = []
    for (loss, gradient), (expected, reference) in zip(ours, exact, strict=True):
        assert loss == pytest.approx(expected, rel=max(products, rows))
        errors.append(float((gradient - reference).norm() / reference.norm()))
    bounds = [products, *[max(products, rows)] * (STEPS - 1)]
    near = [error <= bound for error, bound in zip(errors, bounds, strict=True)]
    filtered, several = head.get("margin", {}).get("inter_class_filter"), head.get("sub_centers", 1) > 1
    if filtered or several:
        assert any(near), errors
        assert max(errors) <= (OTHER_ROW if several else FILTERED), errors
    else:
        assert all(near), errors


@pytest.mark.parametrize("margin", ["softmax", "cosface", "arcface", "combined", "adaface", "magface", "curricular"])
@pytest.mark.parametrize("compute", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_loss_and_gradient_are_those_of_float64(margin: str, compute: str, rate: float) -> None:
    of_margin = {"name": margin, "scale": 32.0} | ({"m2": 0.3, "m3": 0.1} if margin == "combined" else {})
    compare({"margin": of_margin, "sample_rate": rate, "compute": compute})


@pytest.mark.parametrize("rate", [1.0, 0.1])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("margin", ["cosface", "arcface", "adaface", "magface", "curricular"])
@pytest.mark.parametrize("rows", ["bfloat16", "float8"])
def test_rows_of_two_bytes_and_of_one(rows: str, margin: str, compute: str, rate: float) -> None:
    head = {"margin": {"name": margin, "scale": 32.0}, "sample_rate": rate, "compute": compute, "rows": rows}
    compare(head | {"chunk_rows": 1024} | ({"optimizer": SGD} if rows == "float8" else {}))


@pytest.mark.parametrize("rate", [1.0, 0.1])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "more",
    [
        {"sub_centers": 3},
        {"sub_centers": 3, "rows": "bfloat16"},
        {"margin": {"name": "cosface", "scale": 32.0, "inter_class_filter": 0.3}},
        {"margin": {"name": "arcface", "scale": 32.0, "inter_class_filter": 0.3}, "rows": "bfloat16"},
        {"optimizer": {"name": "adamw"}},
        {"optimizer": SGD},
        {"rows": "float8", "optimizer": SGD, "rows_residual": True},
    ],
    ids=["sub-centres", "sub-centres, bf16", "filter", "filter, bf16", "adamw", "no momentum", "float8 with residual"],
)
def test_kinds_of_heads(more: dict[str, Any], compute: str, rate: float) -> None:
    head = {"margin": {"name": "cosface", "scale": 32.0}, "sample_rate": rate, "compute": compute}
    compare(head | {"chunk_rows": 1024} | more)


@pytest.mark.parametrize("rows", ["float32", "bfloat16", "float8"])
@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_direct_lce(rows: str, rate: float) -> None:
    head = {"margin": {"name": "cosface", "scale": 32.0}, "sample_rate": rate, "rows": rows}
    compare(head | ({"optimizer": SGD} if rows == "float8" else {}), compat=True)


@pytest.mark.parametrize(
    ("rows", "compute", "rate"),
    [("float32", "float32", 1.0), ("bfloat16", "bfloat16", 0.5), ("float8", "bfloat16", 0.5)],
)
def test_compiled_kernels(rows: str, compute: str, rate: float) -> None:
    head = {"margin": {"name": "cosface", "scale": 32.0}, "sample_rate": rate, "rows": rows, "compute": compute}
    compare(head | ({"optimizer": SGD} if rows == "float8" else {}), classes=COMPILE_FROM_ROWS + 3)
    assert why_eager() is None


def one_rank(ranks: Ranks, device: str, head: dict[str, Any], compat: bool) -> list[tuple[float, Tensor]]:
    """:func:`steps` in a process of its own."""
    return steps(device, head, rows_for(head, CLASSES), compat, ranks)


@pytest.mark.parametrize("compat", [False, True], ids=["plain", "lce"])
@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_two_ranks_that_share_a_device_over_gloo(rate: float, compat: bool) -> None:
    """NCCL refuses that, and so does :func:`trainer.distributed.choose_device`."""
    head = {"margin": {"name": "cosface", "scale": 32.0}, "sample_rate": rate}
    parts = run_ranks(one_rank, 2, "cuda:0" if DEVICE == "cuda" else DEVICE, head, compat)
    assert [loss for loss, _ in parts[0]] == [loss for loss, _ in parts[1]]
    ours = [(first[0], torch.cat([first[1], second[1]])) for first, second in zip(*parts, strict=True)]
    check(head, ours, steps("cpu", head | {"rows": "float64"}, rows_for(head, CLASSES), compat))


@pytest.mark.parametrize("compute", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("rate", [1.0, 0.1])
@pytest.mark.parametrize(("margin", "rows"), [("cosface", "float32"), ("filter", "float32"), ("arcface", "bfloat16")])
def test_triton_kernels_with_direct_lce_are_those_of_float64(margin: str, rows: str, rate: float, compute: str) -> None:
    if DEVICE != "cuda" or importlib.util.find_spec("triton") is None:  # here: a mark would come before the module's
        pytest.skip("only a GPU with triton runs its kernels")
    of_margin: dict[str, Any] = {"name": margin, "scale": 32.0}
    if margin == "filter":
        of_margin |= {"name": "cosface", "inter_class_filter": 0.3}
    head = {"margin": of_margin, "sample_rate": rate, "impl": "triton", "rows": rows, "compute": compute}
    compare(head, compat=True)


SAMPLED = {"sample_rate": 0.1}
WAITS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sampled": SAMPLED,
    "bfloat16": SAMPLED | {"rows": "bfloat16", "compute": "bfloat16"},
    "float8": {"rows": "float8", "optimizer": SGD},
    "sub-centres": SAMPLED | {"sub_centers": 3},
    "margin adaface": {"margin": {"name": "adaface", "scale": 32.0}},
    "margin curricular": {"margin": {"name": "curricular", "scale": 32.0}},
    "inter-class filter": {"margin": {"name": "cosface", "scale": 32.0, "inter_class_filter": 0.3}},
    "lce direct": SAMPLED,
}
"""Some of the cases of tests/cuda_waits.json, where they are counted without a GPU."""


@pytest.mark.skipif(DEVICE != "cuda", reason="only a GPU is waited for")
@pytest.mark.parametrize("case", WAITS)
def test_the_host_waits_as_seldom_as_agreed(case: str) -> None:
    budgets = json.loads((ROOT / "tests/cuda_waits.json").read_text())
    device, bank = torch.device("cuda"), None
    if case.startswith("lce"):
        centers = torch.nn.functional.normalize(torch.randn(CLASSES, DIM, device=device))
        boundaries = torch.full((CLASSES,), 0.5, device=device)
        bank = DirectCompat(centers, boundaries, torch.ones(CLASSES, dtype=torch.bool, device=device), 2.0, 1.0)
    config = HeadConfig.model_validate(WAITS[case])
    head = PartialFC(config, CLASSES, DIM, Ranks(device=device), seed=3, compat=bank)
    head.set_lr(0.1)
    x = torch.randn(BATCH, DIM, device="cuda", requires_grad=True)
    labels = torch.randint(0, CLASSES, (BATCH,), device="cuda")
    head(x, labels, 0).loss.backward()  # what is set up once
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            head(x, labels, 1).loss.backward()
            assert x.sum().item() < BATCH * DIM  # a wait, so that it is known that waits are seen
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waited = [f"{one.filename}:{one.lineno}" for one in waits if "synchronizing" in str(one.message)]
    assert len(waited) >= 1
    # torch reports no wait for an event, and the labels' is one: it stands for the wait above
    assert len(waited) <= budgets[case]["1"], waited


def run(folder: Path, name: str, *words: str) -> list[dict[str, Any]]:
    """A run of one rank: under torchrun with NCCL on a GPU, in this process on a CPU; the lines of its log."""
    settings = {
        "run": {"dir": str(folder / name), "device": DEVICE, "deterministic": True},
        "data": {"loader": "synthetic", "batch_size": 32, "synthetic_classes": 503, "synthetic_size": 32},
        "backbone": {"name": "small_resnet", "width": 8, "dim": 32},
        "train": {"steps": 12, "precision": "bfloat16" if DEVICE == "cuda" else "float32"},
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
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # packages may be carried there
    done = subprocess.run(
        [*start, str(config), *words],
        env=os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_resumed_run_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    even = ("schedule.name=constant", "schedule.warmup=0")  # a rate that does not depend on the number of updates
    beginning = partial(run, tmp_path, "parts", "train.steps=6", *even)
    if DEVICE == "cpu":
        beginning()
        whole = run(tmp_path, "whole", *even)
    else:  # processes of their own, both at once
        with ThreadPoolExecutor(2) as pool:
            begun = pool.submit(beginning)
            whole = run(tmp_path, "whole", *even)
            begun.result()
    parts = run(tmp_path, "parts", *even)
    assert [line["step"] for line in parts] == list(range(1, 13))
    assert [line["loss"] for line in parts] == [line["loss"] for line in whole]
