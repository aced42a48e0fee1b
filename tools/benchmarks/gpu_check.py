"""Check and measure everything that needs a GPU, in stages, the most valuable first.

Each stage is a command of its own with a time budget. Its figures go to OUT/STAGE.json (of tests: how many passed, and
which did not), its output to OUT/STAGE.log, and OUT/summary.json says how each ended. All budgets together are nine
minutes on one H200 (--seconds); a stage may take up to twice its own where earlier ones have left time, is ended then,
and the next begins. A stage that fails does not end the others either; the status is 1. Stages for which a package or a
function of torch is missing are skipped, by name: that is status 0, or 1 where --stages asks for them. DALI and a
package index are not needed; which packages are, a first line says.

  lce bench gpu_check --out benchmarks/gpu
  python -m tools.cli bench gpu_check --out OUT --stages equality,plan          # in a checkout that is not installed
  lce bench gpu_check --out OUT --device cpu --small                            # the same stages on a CPU, scaled down
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tools.arguments import whole_number

HELP = "everything that needs a GPU, in stages: equality, waits, speed, memory"
ROOT = Path(__file__).resolve().parents[2]


NEEDED = {
    "torch": "torch",
    "numpy": "numpy",
    "pydantic": "pydantic",
    "pydantic_core": "pydantic-core",
    "annotated_types": "annotated-types",
    "typing_inspection": "typing-inspection",
    "yaml": "pyyaml",
    "rich": "rich",
    "safetensors": "safetensors",
    "PIL": "pillow",
    "pytest": "pytest",
}
"""What the stages import, and the package that brings it."""


@dataclass(frozen=True)
class Stage:
    """One command of ours, or pytest's.

    Attributes:
        name: of its files. argv: behind ``python -m``. seconds: its budget. skipped: why it is not run; empty: it is.
        compute, flops: what a step's products take, and how many operations they are; 0: no such step.
    """

    name: str
    argv: tuple[str, ...]
    seconds: int
    skipped: str = ""
    compute: str = ""
    flops: float = 0.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``lce bench gpu_check``."""
    parser.add_argument("--out", type=Path, required=True, help="folder for figures and logs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that a CPU can do in a minute or two")
    parser.add_argument("--seconds", type=whole_number(1), default=540, help="for all stages together (540)")
    parser.add_argument("--stages", default="", help="only these, separated by commas")


def stages(device: str, small: bool, out: Path) -> list[Stage]:
    """What is run, in order."""
    million, more, most = (2000, 4000, 6000) if small else (1_000_000, 10_000_000, 100_000_000)
    batch, dim = (8, 16) if small else (1024, 512)
    sizes = ("--batch", str(batch), "--dim", str(dim), "--device", device)
    step, triton = (*sizes, "--classes", str(million)), _no_triton(device)

    def bench(name: str, seconds: int, what: str, *options: str, skipped: str = "") -> Stage:
        command = ("tools.cli", "bench", what, *options, "--json", str(out / f"{name}.json"))
        return Stage(name, command, seconds, skipped)

    def head(
        name: str, seconds: int, classes: int, rate: float, compute: str, options: str, skipped: str = ""
    ) -> Stage:
        steps = ("--steps", "1", "--warmup", "0") if small else ("--steps", "7", "--warmup", "1")
        command = ("--classes", str(classes), "--rate", str(rate), "--compute", compute, *options.split())
        stage = bench(name, seconds, "head", *sizes, *steps, *command, skipped=skipped)
        return replace(stage, compute=compute, flops=8.0 * batch * dim * round(rate * classes))

    def tests(name: str, seconds: int, chosen: str, skipped: str = "") -> Stage:
        report = f"--junitxml={out / name}.xml"
        command = ("pytest", str(ROOT / "tests/cuda"), "-vv", "-p", "no:cacheprovider", *_shared(device), "-k", chosen)
        return Stage(name, (*command, report), seconds, skipped)

    runs = "resumed or recipe or share"
    equal = f"not (triton or {runs})"
    if small:
        equal = f"({equal}) and (bfloat16-softmax or 1.0-float8 or (filter-bfloat16 and 0.1))"
        runs = "(recipe and adamw) or (share and 0.1)"
    bf16 = "--rows bfloat16"
    against = f"{bf16} --impl triton --against fused"
    ladder = "--ladder --only ours --compute bfloat16 --rungs " + (str(million) if small else "8e6 29e6 55e6")
    return [
        tests("equality", 65, equal),
        tests("triton-equality", 40, "triton", triton),
        bench("products", 15, "products", "--device", device, *(("--size", "64") if small else ())),
        head(f"head-{million}-1.0-bfloat16", 40, million, 1.0, "bfloat16", bf16),
        head(f"head-{million}-0.1-bfloat16", 30, million, 0.1, "bfloat16", bf16),
        head(f"triton-{million}-1.0", 30, million, 1.0, "bfloat16", against, triton),
        head(f"triton-{million}-0.1", 30, million, 0.1, "bfloat16", against, triton),
        tests("runs", 45, runs),
        head(f"head-{more}-0.1-bfloat16", 45, more, 0.1, "bfloat16", f"{bf16} --sequential"),
        head(f"head-{more}-1.0-bfloat16", 25, more, 1.0, "bfloat16", f"{bf16} --only ours"),
        bench("ladder", 35, "head", *sizes, "--steps", "1" if small else "3", *ladder.split(), "--rate", "0.1"),
        head("lce-direct", 25, million, 0.1, "bfloat16", f"{bf16} --lce direct --against-no-lce"),
        replace(head("trace", 20, million, 0.1, "bfloat16", f"{bf16} --trace"), flops=0.0),
        head(f"head-{million}-1.0-tf32", 20, million, 1.0, "tf32", "--only ours"),
        head(f"head-{most}-0.1-float8", 30, most, 0.1, "bfloat16", "--rows float8 --momentum 0 --only ours"),
        Stage("plan", _verify(device, small, out), 20),
        bench("linear-cross-entropy", 10, "products", "--linear-cross-entropy", *step, skipped=_no_function()),
        head(f"head-{million}-1.0-float32", 15, million, 1.0, "float32", "--only ours"),
    ]


def run(args: argparse.Namespace) -> int:
    """Run the stages; returns 0, or 1 when one failed, had no time left, or was asked for by name and skipped.

    Raises:
        ConfigError: no usable GPU, a package that the stages need is missing, or an unknown stage.
    """
    from tools.measuring import origin, write_json
    from trainer.errors import ConfigError

    _check(args)
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in args.stages.split(",") if name]
    every = stages(args.device, args.small, args.out.absolute())
    unknown = set(wanted) - {stage.name for stage in every}
    if unknown:
        raise ConfigError(
            f"`stages`: no stage {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in every)}"
        )
    chosen = [stage for stage in every if not wanted or stage.name in wanted]
    ended: list[dict[str, Any]] = []
    until = time.monotonic() + args.seconds
    for number, stage in enumerate(chosen):
        later = sum(other.seconds for other in chosen[number + 1 :] if not other.skipped)
        ended.append(_run_stage(stage, args.out.absolute(), args.device, until, later))
        state, seconds = ended[-1]["state"], ended[-1]["seconds"]
        print(f"{stage.name:32} {state:10} {seconds:7.1f} s", flush=True)
        write_json(
            {"bench": "gpu_check", "device": _device(args.device), **origin(), "stages": ended},
            args.out / "summary.json",
        )
    fine = ("done",) if wanted else ("done", "skipped")
    return int(any(not stage["state"].startswith(fine) for stage in ended))


def _verify(device: str, small: bool, out: Path) -> tuple[str, ...]:
    classes = "20000" if small else "1000000"
    command = ("tools.cli", "plan", "--verify", "--device", device, "--classes", classes, "--rate", "0.1")
    return (*command, "--json", str(out / "plan.json"))


def _shared(device: str) -> tuple[str, ...]:
    """pytest's options to share the tests among processes: most of their time is spent on the CPU."""
    processes = min(6, (os.cpu_count() or 1) // 2)
    return ("-n", str(processes)) if device == "cuda" and processes > 1 and importlib.util.find_spec("xdist") else ()


def _no_triton(device: str) -> str:
    """Why Triton's kernels cannot run; empty: they can."""
    if device != "cuda":
        return "only a GPU runs Triton's kernels"
    return "" if importlib.util.find_spec("triton") else "the package triton is not installed"


def _no_function() -> str:
    """Why torch's own step cannot be measured; empty: it can."""
    from tools.benchmarks.products import has_linear_cross_entropy

    return "" if has_linear_cross_entropy() else "this torch has no torch.nn.functional.linear_cross_entropy"


def _check(args: argparse.Namespace) -> None:
    from trainer.errors import ConfigError

    missing = [package for name, package in NEEDED.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"needs {', '.join(missing)}: install what is missing, or unpack the wheels in a folder and name it in "
            "PYTHONPATH"
        )
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("`device` cuda: torch sees no usable GPU; --device cpu --small tries the stages themselves")


def _device(kind: str) -> str:
    import torch

    return torch.cuda.get_device_name(0) if kind == "cuda" else "cpu"


def _run_stage(stage: Stage, out: Path, device: str, until: float, later: int) -> dict[str, Any]:
    """How it ended: at the latest at ``until`` of the monotonic clock, and where the ``later`` seconds of the stages
    after it leave it more than its own, after twice those.
    """
    if stage.skipped:
        return asdict(stage) | {"state": f"skipped: {stage.skipped}", "seconds": 0.0}
    began = time.monotonic()
    left = until - began
    if left <= 0:
        return asdict(stage) | {"state": "no time left", "seconds": 0.0}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "LCE_TEST_DEVICE": device}
    if stage.argv[0] == "pytest":
        environment["OMP_NUM_THREADS"] = "1"  # of each process that shares the tests
    limit = min(left, 2 * stage.seconds, max(stage.seconds, left - later))
    for suffix in ("json", "xml"):
        (out / f"{stage.name}.{suffix}").unlink(missing_ok=True)  # of an earlier run
    status = _perform(stage.argv, environment, out / f"{stage.name}.log", limit)
    state = "too long" if status is None else "done" if status == 0 else f"failed {status}"
    if status is not None:
        _complete(stage, out)
    return asdict(stage) | {"state": state, "seconds": round(time.monotonic() - began, 1)}


def _perform(argv: Sequence[str], environment: Mapping[str, str], log: Path, seconds: float) -> int | None:
    """``python -m ARGV`` and its status; None: it was ended, with all that it started, after ``seconds``."""
    with log.open("w") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", *argv],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            return None


def _complete(stage: Stage, out: Path) -> None:
    """Add to a stage's JSON the outcome of its tests, or its step's share of the quickest products."""
    from tools.measuring import origin, write_json

    figures_of, report = out / f"{stage.name}.json", out / f"{stage.name}.xml"
    if report.exists():
        write_json({"bench": "gpu_check", "stage": stage.name, **origin(), **_outcome(report)}, figures_of)
    elif stage.flops and figures_of.exists() and (out / "products.json").exists():
        figures = json.loads(figures_of.read_text())
        peak = json.loads((out / "products.json").read_text())["flops_per_second"][stage.compute]
        share = stage.flops / figures["ours"]["seconds"] / peak
        write_json(figures | {"flops": stage.flops, "share_of_products_peak": share}, figures_of)


def _outcome(report: Path) -> dict[str, Any]:
    """How many tests passed, and the names of the others with what was said of them, from pytest's report."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    others: dict[str, dict[str, str]] = {"failed": {}, "skipped": {}}
    for case in cases:
        for kind, tags in (("failed", ("failure", "error")), ("skipped", ("skipped",))):
            for found in (found for tag in tags for found in case.findall(tag)):
                others[kind][case.get("name", "")] = found.get("message", "")
    return {"passed": len(cases) - sum(map(len, others.values())), **others}
