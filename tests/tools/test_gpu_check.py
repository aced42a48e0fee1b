"""`make gpu-check` on a CPU: every stage runs to its end, scaled down."""

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import forked
from tests.cuda.test_recipes_on_gpu import RECIPES, recipe_config
from tools.benchmarks import gpu_check, products
from tools.benchmarks.gpu_check import ROOT, Stage, stages
from tools.cli import main
from trainer.errors import ConfigError
from trainer.run.config import Config, load_config

WORDS = ("bench", "gpu_check", "--device", "cpu", "--small", "--out")
START = """
import multiprocessing, runpy, sys
from tests.ranks import _context
context = multiprocessing.get_context
multiprocessing.get_context = lambda kind=None: _context if kind == "spawn" else context(kind)
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def quick_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages, and what they start, as copies of a process that has torch."""

    def perform(argv: Sequence[str], environment: Mapping[str, str], log: Path, seconds: float) -> int | None:
        try:
            return forked.run(["-c", START, *argv], env=environment, cwd=ROOT, output=log, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            return None

    monkeypatch.setattr(gpu_check, "_perform", perform)


def summary_of(out: Path) -> dict[str, str]:
    """How each stage ended."""
    return {stage["name"]: stage["state"] for stage in json.loads((out / "summary.json").read_text())["stages"]}


@pytest.mark.slow
def test_all_stages_run_to_their_end_on_a_cpu(tmp_path: Path, quick_starts: None) -> None:
    assert main([*WORDS, str(tmp_path)]) == 0, summary_of(tmp_path)
    every = stages("cpu", True, tmp_path)
    skipped = [stage.name for stage in every if stage.skipped]
    assert {"triton-equality", "triton-2000-1.0", "triton-2000-0.1"} <= set(skipped)
    assert summary_of(tmp_path) == {
        stage.name: f"skipped: {stage.skipped}" if stage.skipped else "done" for stage in every
    }
    figures = {
        stage.name: json.loads((tmp_path / f"{stage.name}.json").read_text()) for stage in every if not stage.skipped
    }
    for name in ("equality", "runs"):
        assert figures[name]["passed"] > 2
        assert figures[name]["failed"] == {}
    step = figures["head-2000-1.0-bfloat16"]
    rate = step["flops"] / step["ours"]["seconds"] / figures["products"]["flops_per_second"]["bfloat16"]
    assert step["share_of_products_peak"] == pytest.approx(rate)
    assert step["flops"] == 8 * 8 * 16 * 2000  # four products of B × D with D × C
    assert {"ratio", "reference"} <= figures["head-4000-0.1-bfloat16"].keys()
    assert sum(one["flops"] for one in figures["trace"]["passes"].values()) > 0
    assert figures["plan"]["cases"][0]["measured_bytes"] > 0


def test_one_process_starts_as_it_does_for_a_user(tmp_path: Path) -> None:
    assert main([*WORDS, str(tmp_path), "--stages", "products"]) == 0, (tmp_path / "products.log").read_text()
    assert json.loads((tmp_path / "products.json").read_text())["size"] == 64


def test_budgets_fit_together(tmp_path: Path) -> None:
    every = stages("cuda", False, tmp_path)
    assert sum(stage.seconds for stage in every) <= 540
    assert len({stage.name for stage in every}) == len(every)
    assert "not (triton or" in " ".join(every[0].argv)  # which have a stage of their own


def test_every_arithmetic_of_the_recipes_is_tried(tmp_path: Path) -> None:
    """train.precision, head.compute and head.rows."""

    def arithmetic(config: Config) -> tuple[str, str, str]:
        return config.train.precision, config.head.compute, config.head.rows

    tried = {arithmetic(recipe_config(recipe)) for recipe in RECIPES}
    found = set()
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        more = [] if "loader: synthetic" in path.read_text() else ["data.path=unused"]
        if "bank" in path.read_text():
            more.append("run.dir=unused")
        with contextlib.suppress(ConfigError):  # a layer that is no run by itself
            found.add(arithmetic(load_config(path, [*more, "run.dir=unused"])))
    assert len(found) > 1
    assert found <= tried


def test_triton_comes_after_equality_next_to_the_fused_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    every = stages("cuda", False, tmp_path)
    kernels = [stage for stage in every if "triton" in stage.name]
    assert [stage.name for stage in kernels] == ["triton-equality", "triton-1000000-1.0", "triton-1000000-0.1"]
    assert every[1] is kernels[0]
    assert {stage.skipped for stage in kernels} == {"the package triton is not installed"}
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: object())
    kernels = [stage for stage in stages("cuda", False, tmp_path) if "triton" in stage.name]
    assert not any(stage.skipped for stage in kernels)
    assert " ".join(kernels[1].argv).endswith(
        f"--impl triton --against fused --json {tmp_path / 'triton-1000000-1.0.json'}"
    )


WAITS = Stage("waits", ("http.server", "--bind", "127.0.0.1", "0"), 1)


def test_a_stage_over_its_budget_is_ended_and_the_next_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after = [Stage("after", ("this",), 1), Stage("broken", ("no_such_module",), 1)]
    monkeypatch.setattr(gpu_check, "stages", lambda *arguments: [WAITS, *after])
    began = time.monotonic()
    assert main([*WORDS, str(tmp_path)]) == 1
    assert 2 <= time.monotonic() - began < 60  # twice its budget, as others have left time
    assert summary_of(tmp_path) == {"waits": "too long", "after": "done", "broken": "failed 1"}


def test_a_stage_leaves_the_others_their_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def perform(argv: Sequence[str], environment: Mapping[str, str], log: Path, seconds: float) -> int:
        given.append(seconds)
        return 0

    every = [replace(WAITS, seconds=seconds) for seconds in (100, 100, 100)]
    monkeypatch.setattr(gpu_check, "stages", lambda *arguments: every)
    monkeypatch.setattr(gpu_check, "_perform", perform)
    assert main([*WORDS, str(tmp_path), "--seconds", "350"]) == 0
    assert given == pytest.approx([150, 200, 200], abs=5)


def test_all_stages_together_end_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would take longer is ended, and what comes after is not started: the status says that it was not all."""
    monkeypatch.setattr(
        gpu_check, "stages", lambda *arguments: [replace(WAITS, seconds=60), replace(WAITS, name="more")]
    )
    clock = map(float, count())
    monkeypatch.setattr(gpu_check, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert main([*WORDS, str(tmp_path), "--seconds", "2"]) == 1
    assert summary_of(tmp_path) == {"waits": "too long", "more": "no time left"}


def test_a_stage_that_was_asked_for_and_skipped_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = ["triton-equality", "triton-2000-1.0", "triton-2000-0.1"]
    every = [stage for stage in stages("cpu", True, tmp_path) if stage.skipped]
    assert [stage.name for stage in every] == triton
    monkeypatch.setattr(gpu_check, "stages", lambda *arguments: every)
    words = ["bench", "gpu_check", "--device", "cpu", "--small", "--out", str(tmp_path)]
    for more, status in (([], 0), (["--stages", ",".join(triton)], 1)):
        assert main([*words, *more]) == status
        ended = json.loads((tmp_path / "summary.json").read_text())["stages"]
        assert {stage["state"] for stage in ended} == {"skipped: only a GPU runs Triton's kernels"}


def test_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    words = ["bench", "gpu_check", "--out", str(tmp_path / "out")]
    assert main([*words, "--device", "cpu", "--stages", "nothing"]) == 2
    assert "--stages: no stage nothing; there are equality" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(words) == 2
        assert "no usable GPU" in capsys.readouterr().err

    monkeypatch.setattr(gpu_check, "NEEDED", {"torch": "torch", "no_such_package": "no-such-package"})
    assert main([*words, "--device", "cpu"]) == 2
    assert "needs no-such-package: install what is missing" in capsys.readouterr().err


def test_a_torch_without_linear_cross_entropy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "has_linear_cross_entropy", lambda: False)
    (stage,) = [stage for stage in stages("cuda", False, tmp_path) if stage.name == "linear-cross-entropy"]
    assert stage.skipped == "this torch has no torch.nn.functional.linear_cross_entropy"
    assert main(["bench", "products", "--linear-cross-entropy"]) == 2
    assert "has no torch.nn.functional.linear_cross_entropy; 2.13 has it" in capsys.readouterr().err


MISSING = """
import importlib.machinery, runpy, sys
finder, found = importlib.machinery.PathFinder, importlib.machinery.PathFinder.find_spec
finder.find_spec = lambda name, *more: None if name in ("pydantic", "pydantic_core", "nvidia") else found(name, *more)
sys.argv = ["lce", *sys.argv[1:]]
runpy.run_module("tools.cli", run_name="__main__", alter_sys=True)
"""


def test_a_machine_without_pydantic_says_so(tmp_path: Path) -> None:
    words = ["bench", "gpu_check", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", MISSING, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("lce bench: needs pydantic, pydantic-core: install what is missing, or unpack")


@pytest.mark.parametrize("venv", [False, True])
def test_make_takes_a_python_with_torch_where_there_is_no_environment(tmp_path: Path, venv: bool) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "constraints.txt").touch()
    (tmp_path / "pyproject.toml").touch()
    python, lce = tmp_path / "python", tmp_path / ".venv/bin/lce"
    lce.parent.mkdir(parents=True)
    for file in (python, lce):
        file.write_text(f'#!/bin/sh\necho "{file.name} $*"\n')
        file.chmod(0o755)
    if venv:
        for name in ("created", "torch", "installed"):
            (tmp_path / ".venv" / name).touch()
    command = ["make", "--silent", "--no-print-directory", "gpu-check", f"PYTHON={python}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    last = done.stdout.splitlines()[-1]
    starts = "lce " if venv else "python -m tools.cli "
    assert last == f"{starts}bench gpu_check --out benchmarks/gpu", done.stdout
