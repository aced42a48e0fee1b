"""A million classes end to end on two CPU cores: every stage a command of its own, with its time and peak memory.

An old head, saved by 8 ranks in arcface_torch's layout (synthetic rows) → `lce centers` → a training run with LCE
on 2 ranks → SIGKILL after a checkpoint → the same run continued on 1 rank → ONNX, compared with torch on images.
Memory is the largest sum of the resident sets of all processes of a stage, sampled ten times a second; pages that
processes share count once for each. It needs 11 GB of disk.

Examples:
  lce bench million
  lce bench million --classes 50000 --out runs/trial --json -
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tools.steps import CONFIGS

HELP = "a million classes end to end on two cores: centre bank, training, kill, resume, export"

CONFIG = CONFIGS / "million_cpu.yaml"
OLD_RANKS = 8
SAMPLE_SECONDS = 0.1
IMAGES, IDENTITIES = 64, 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lce bench million`."""
    parser.add_argument("--classes", type=lambda t: int(float(t)), default=1_000_000, help="C (1000000)")
    parser.add_argument("--config", type=Path, default=CONFIG, help="the recipe (configs/million_cpu.yaml)")
    parser.add_argument("--out", type=Path, help="an empty folder to keep everything in (default: nothing is kept)")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON (- for standard output)")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="of the recipe, for example train.steps=60"
    )


def run(args: argparse.Namespace) -> int:
    """Run all stages; returns the exit status: 1 when a stage ends otherwise than it should."""
    from tools.output import write_json
    from trainer.errors import ConfigError

    if not args.config.is_file():
        raise ConfigError(f"{args.config}: no such recipe; give --config configs/million_cpu.yaml of a checkout")
    if args.out is not None:
        if args.out.exists() and any(args.out.iterdir()):
            raise ConfigError(f"--out {args.out}: is not empty; choose another folder")
        figures = _stages(args, args.out)
    else:
        with tempfile.TemporaryDirectory(prefix="lce-million-") as folder:
            figures = _stages(args, Path(folder))
    write_json(figures, args.json)
    if args.json != "-":
        print(summary(figures))
    return 0 if figures["whole"] else 1


@dataclass(frozen=True)
class Stage:
    """One command and what it took: wall time, and the largest sum of its processes' resident sets."""

    name: str
    command: str
    seconds: float
    peak_bytes: int
    status: int


def summary(figures: dict[str, Any]) -> str:
    """The stages as a table, and what they came to, in words."""
    lines = [f"{figures['classes']:,} classes, dimension {figures['dim']}, rate {figures['rate']}"]
    for stage in figures["stages"]:
        lines.append(f"  {stage['name']:28} {stage['seconds']:7.1f} s  {stage['peak_bytes'] / 2**30:6.2f} GiB")
    total = f"{figures['seconds']:7.1f} s  {figures['peak_bytes'] / 2**30:6.2f} GiB"
    lines.append(f"  {'in all':28} {total}")
    lines.append(
        f"  killed at step {figures['killed_at']} of {figures['steps']}, continued on 1 rank from step "
        f"{figures['continued_from']}; checkpoint {figures['checkpoint_bytes'] / 1e9:.2f} GB; "
        f"{figures['samples_per_second']} samples/s on 2 ranks"
    )
    if not figures["whole"]:
        lines.append(f"  NOT as it should be: {figures['problem']}")
    return "\n".join(lines)


def _stages(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All stages in ``folder``; stops at the first that fails."""
    import torch

    from tools.measuring import origin
    from trainer.data.config import SyntheticConfig
    from trainer.distributed import peak_memory_bytes
    from trainer.errors import ConfigError
    from trainer.run.config import load_config

    run_dir, bank = folder / "run", folder / "bank"
    overrides = [
        f"run.dir={run_dir}",
        f"compat.bank={bank}",
        f"data.synthetic_classes={args.classes}",
        f"data.synthetic_records={args.classes}",
        *args.overrides,
    ]
    config = load_config(args.config, overrides)
    if not isinstance(config.data, SyntheticConfig):
        raise ConfigError(f"{args.config}: data.loader = {config.data.loader}: this benchmark needs synthetic")
    dim, size = config.backbone.dim, config.data.synthetic_size
    launch = ["launch", str(args.config), "--nproc"]
    stages: list[Stage] = []
    problem = ""

    def stage(name: str, arguments: Sequence[str], until: Callable[[], bool] | None = None) -> bool:
        nonlocal problem
        print(f"{name}: lce {' '.join(arguments)}", file=sys.stderr)
        done = measured(name, arguments, until)
        stages.append(done)
        wanted = -signal.SIGKILL if until is not None else 0
        if done.status != wanted:
            problem = problem or f"{name} ended with status {done.status}, not {wanted}"
        return not problem

    began = time.perf_counter()
    write_old_head(folder / "old", args.classes, dim, OLD_RANKS)
    own = peak_memory_bytes(torch.device("cpu"))
    stages.append(Stage("old head of 8 ranks, synthetic", "", time.perf_counter() - began, own, 0))
    write_pictures(folder / "pictures", size)
    killed_at, continued_from = 0, 0
    if stage("centre bank", ["centers", "from-classifier", str(folder / "old"), str(bank)]):
        ready = _past_a_checkpoint(run_dir)
        if stage("training on 2 ranks, killed", [*launch, "2", *overrides], ready):
            killed_at, continued_from = _last_step(run_dir), _newest(run_dir)
            if stage("continued on 1 rank", [*launch, "1", *overrides]):
                pack = ["pack", str(folder / "pictures"), str(folder / "packed"), "--processes", "1"]
                onnx = ["export", str(run_dir), str(folder / "new.onnx"), "--dataset", str(folder / "packed")]
                _ = stage("pictures for the check", pack) and stage("export to ONNX", onnx)

    def placeless(command: str) -> str:
        return command.replace(str(folder), "OUT").replace(str(CONFIG.parent), CONFIG.parent.name)

    lines = _log(run_dir)
    end = json.loads((run_dir / "summary.json").read_text()) if (run_dir / "summary.json").exists() else {}
    if not problem and end.get("step") != config.train.steps:
        problem = f"the run ended at step {end.get('step')} of {config.train.steps}"
    newest = max((run_dir / "checkpoints").glob("step-*"), default=None)
    return {
        "bench": "million",
        "classes": args.classes,
        "dim": dim,
        "rate": config.head.sample_rate,
        "batch": config.data.batch_size,
        **origin(),
        "stages": [asdict(s) | {"command": placeless(s.command)} for s in stages],
        "seconds": sum(s.seconds for s in stages),
        "peak_bytes": max(s.peak_bytes for s in stages),
        "steps": config.train.steps,
        "killed_at": killed_at,
        "continued_from": continued_from,
        "checkpoint_bytes": 0 if newest is None else sum(p.stat().st_size for p in newest.iterdir()),
        "samples_per_second": max((x["samples_per_second"] for x in lines if x["step"] <= killed_at), default=0.0),
        "first": lines[0] if lines else {},
        "last": lines[-1] if lines else {},
        "whole": not problem,
        "problem": problem,
    }


def write_old_head(folder: Path, classes: int, dim: int, ranks: int) -> None:
    """A saved sharded head as arcface_torch leaves it: ``checkpoint_gpu_{rank}.pt`` of (c, dim) float32 rows.

    The rows are synthetic: normal with deviation 0.01, as such a head starts. Ranks own ⌊C/W⌋ or ⌈C/W⌉ classes.
    """
    import torch

    folder.mkdir(parents=True)
    for rank in range(ranks):
        size = classes // ranks + (rank < classes % ranks)
        weight = torch.randn(size, dim, generator=torch.Generator().manual_seed(rank)) * 0.01
        content = {"epoch": 1, "global_step": 1, "state_dict_softmax_fc": {"weight": weight}}
        torch.save(content, folder / f"checkpoint_gpu_{rank}.pt")


def write_pictures(folder: Path, size: int) -> None:
    """Some pictures of smooth random patterns, one folder an identity, for the check of the export."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        coarse = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        path = folder / f"identity{number % IDENTITIES}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(path)


def measured(name: str, arguments: Sequence[str], until: Callable[[], bool] | None = None) -> Stage:
    """Run ``lce ARGUMENTS`` and watch its memory; with ``until``, SIGKILL all its processes once that is true."""
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-m", "tools.cli", *arguments], stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            family = descendants(process.pid)
            peak = max(peak, sum(map(resident_bytes, family)))
            if until is not None and until():
                kill(family)
            time.sleep(SAMPLE_SECONDS)
    finally:
        if process.poll() is None:
            kill(descendants(process.pid))
        process.wait()
    return Stage(name, " ".join(("lce", *arguments)), time.perf_counter() - began, peak, process.returncode)


def descendants(pid: int) -> list[int]:
    """A process and all its children's children, by Linux's /proc."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
    family = [pid]
    for member in family:
        family += [child for child, parent in parents.items() if parent == member]
    return family


def resident_bytes(pid: int) -> int:
    """The resident set of a process; 0 when it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def kill(family: Sequence[int]) -> None:
    """SIGKILL to every process of a family that is still there."""
    for pid in family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _past_a_checkpoint(run_dir: Path) -> Callable[[], bool]:
    """True once a line was logged behind the newest whole checkpoint: the kill then loses some steps."""
    return lambda: 0 < _newest(run_dir) < _last_step(run_dir)


def _newest(run_dir: Path) -> int:
    return max((int(p.name.removeprefix("step-")) for p in (run_dir / "checkpoints").glob("step-*")), default=0)


def _log(run_dir: Path) -> list[dict[str, Any]]:
    from trainer.run.monitor import read_log

    path = run_dir / "log.jsonl"
    return read_log(path) if path.exists() else []


def _last_step(run_dir: Path) -> int:
    try:
        lines = _log(run_dir)
    except ValueError:  # a line is being written
        return 0
    return int(lines[-1]["step"]) if lines else 0
