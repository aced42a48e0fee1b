"""Check and measure everything that needs a GPU, in stages, the most valuable first.

Each stage is a command of its own with a time budget; its figures go to OUT/STAGE.json (tests: OUT/STAGE.xml), its
output to OUT/STAGE.log, and OUT/summary.json says how each ended. A stage that fails or takes too long does not end the
others; those of Triton's kernels are skipped, by name, without a GPU or without the package triton: that is status 0,
or 1 where --stages asks for them. All of them together take at most --seconds, nine minutes on one H200: what does not
fit any more is not started, and the status is 1. DALI and a package index are not needed.

  lce bench gpu_check --out benchmarks/gpu
  python -m tools.cli bench gpu_check --out OUT --stages equality,plan          # in a checkout that is not installed
  lce bench gpu_check --out OUT --device cpu --small                            # the same stages on a CPU, scaled down
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tools.arguments import whole_number

HELP = "everything that needs a GPU, in stages: equality, waits, speed, memory"
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Stage:
    """One command of ours, or pytest's.

    Attributes:
        name: of its files. argv: behind ``python -m``. seconds: its budget. skipped: why it is not run; empty: it is.
    """

    name: str
    argv: tuple[str, ...]
    seconds: int
    skipped: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``lce bench gpu_check``."""
    parser.add_argument("--out", type=Path, required=True, help="folder for figures and logs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that a CPU can do in a minute or two")
    parser.add_argument("--seconds", type=whole_number(1), default=540, help="for all stages together (540)")
    parser.add_argument("--stages", default="", help="only these, separated by commas")


def stages(device: str, small: bool, out: Path) -> list[Stage]:
    """What is run, in order."""
    steps, batch = ("2", "16") if small else ("15", "1024")
    million, more = ("4000", "8000") if small else ("1000000", "10000000")
    dim = ("--dim", "32") if small else ()
    common = (
        "tools.cli",
        "bench",
        "head",
        "--device",
        device,
        "--steps",
        steps,
        "--warmup",
        "1",
        "--batch",
        batch,
        *dim,
    )

    def head(name: str, seconds: int, classes: str, *options: str) -> Stage:
        return Stage(name, (*common, "--classes", classes, *options, "--json", str(out / f"{name}.json")), seconds)

    tests = ("pytest", str(ROOT / "tests/cuda"), "-q", "-p", "no:cacheprovider")
    quick = ("-k", "cosface-1.0 or resumed") if small else ()
    found = [Stage("equality", (*tests, *quick, f"--junitxml={out / 'equality.xml'}"), 140)]
    kernels = (*tests, "-k", "triton", f"--junitxml={out / 'triton-equality.xml'}")
    skipped = _no_triton(device)
    found.append(Stage("triton-equality", kernels, 40, skipped))
    for rate in ("1.0", "0.1"):
        options = f"--rate {rate} --rows bfloat16 --compute bfloat16 --impl triton --against fused".split()
        found.append(replace(head(f"triton-{million}-{rate}", 40, million, *options), skipped=skipped))
    for compute in ("float32", "tf32", "bfloat16"):
        for rate in ("1.0", "0.1"):
            only = () if compute == "float32" else ("--only", "ours")
            name = f"head-{million}-{rate}-{compute}"
            found.append(head(name, 60, million, "--rate", rate, "--compute", compute, *only))
    ours = ("--only", "ours", "--rows", "bfloat16", "--compute", "bfloat16")
    found.append(head(f"head-{more}-0.1-bfloat16", 60, more, "--rate", "0.1", *ours))
    found.append(head(f"head-{more}-1.0-bfloat16", 60, more, "--rate", "1.0", *ours))
    found.append(head("lce-direct", 45, million, "--rate", "0.1", "--lce", "direct", "--against-no-lce"))
    found.append(head("trace", 45, million, "--rate", "0.1", "--trace"))
    if not small:
        ladder = ("--ladder", "--every-rows", "--rate", "0.1", "--markdown", str(out / "ladder.md"))
        found.append(head("ladder", 120, million, *ladder))
    verify = ("tools.cli", "plan", "--verify", "--device", device, "--json", str(out / "plan.json"))
    found.append(Stage("plan", verify, 60))
    return found


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
    ended: list[dict[str, Any]] = []
    until = time.monotonic() + args.seconds
    for stage in every:
        if not wanted or stage.name in wanted:
            ended.append(_run_stage(stage, args.out, args.device, until))
            state, seconds = ended[-1]["state"], ended[-1]["seconds"]
            print(f"{stage.name:32} {state:10} {seconds:7.1f} s", flush=True)
            write_json(
                {"bench": "gpu_check", "device": _device(args.device), **origin(), "stages": ended},
                args.out / "summary.json",
            )
    fine = ("done",) if wanted else ("done", "skipped")
    return int(any(not stage["state"].startswith(fine) for stage in ended))


def _no_triton(device: str) -> str:
    """Why Triton's kernels cannot run; empty: they can."""
    if device != "cuda":
        return "only a GPU runs Triton's kernels"
    return "" if importlib.util.find_spec("triton") else "the package triton is not installed"


def _check(args: argparse.Namespace) -> None:
    import torch

    from trainer.errors import ConfigError

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("`device` cuda: torch sees no usable GPU; --device cpu --small tries the stages themselves")
    missing = [name for name in ("pytest", "yaml", "safetensors", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"needs {', '.join(missing)}: install it, or carry its wheel")


def _device(kind: str) -> str:
    import torch

    return torch.cuda.get_device_name(0) if kind == "cuda" else "cpu"


def _run_stage(stage: Stage, out: Path, device: str, until: float) -> dict[str, Any]:
    """How it ended, at the latest at ``until`` of the monotonic clock."""
    if stage.skipped:
        return asdict(stage) | {"state": f"skipped: {stage.skipped}", "seconds": 0.0}
    began = time.monotonic()
    if began >= until:
        return asdict(stage) | {"state": "no time left", "seconds": 0.0}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "LCE_TEST_DEVICE": device}
    with (out / f"{stage.name}.log").open("w") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", *stage.argv],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            state = "done" if child.wait(min(stage.seconds, until - began)) == 0 else f"failed {child.returncode}"
        except subprocess.TimeoutExpired:
            _end(child)
            state = "too long"
    return asdict(stage) | {"state": state, "seconds": round(time.monotonic() - began, 1)}


def _end(child: "subprocess.Popen[bytes]") -> None:
    import signal

    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
