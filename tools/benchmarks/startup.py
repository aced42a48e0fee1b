"""Measure what the command itself costs: user CPU seconds of `lce` commands whose work is next to nothing.

The references are an empty Python and one that imports torch, in the same turns. A data set of --records images, a
gallery and a run of one update are made for it in a temporary folder. A first turn is not counted: it may compile
sources, as the first command after an installation does.

  lce bench startup
  lce bench startup --repeats 9 --json -
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.arguments import whole_number
from trainer.errors import ConfigError

HELP = "user CPU seconds of commands that do next to nothing, against an empty Python"
CLASSES = 4
CONFIG = """
run: {dir: run, device: cpu}
data: {loader: synthetic, synthetic_classes: 4, synthetic_records: 8, synthetic_size: 16, batch_size: 4}
backbone: {name: small, dim: 16}
train: {steps: 1}
log: {tensorboard: false}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``lce bench startup``."""
    parser.add_argument("--repeats", type=whole_number(1), default=5, help="medians of so many runs (5)")
    parser.add_argument("--records", type=whole_number(CLASSES), default=628, help="images that are checked (628)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there; - for standard output")


def run(args: argparse.Namespace) -> int:
    """Measure and report."""
    from tools.measuring import origin, write_json
    from tools.progress import progress_bars

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _prepare(folder, args.records)
        rows = commands()
        seconds: dict[str, list[float]] = {row: [] for row in rows}
        with progress_bars() as bars:
            for number in range(args.repeats + 1):
                bars.update("measuring", number, args.repeats + 1)
                for row, (arguments, status) in rows.items():
                    seconds[row].append(user_seconds(arguments, status, folder))
    for found in seconds.values():
        del found[0]  # it may have compiled sources
    medians = {row: round(statistics.median(found), 3) for row, found in seconds.items()}
    reference = {row: medians.pop(row) for row in REFERENCES}
    figures: dict[str, Any] = {"bench": "startup", "repeats": args.repeats, "records": args.records, **origin()}
    write_json(figures | {"reference": reference, "ours": medians}, args.json)
    if args.json != "-":
        print(f"user CPU seconds, medians of {args.repeats}")
        for row, value in (reference | medians).items():
            print(f"  {row:24} {value:6.2f}")
    return 0


REFERENCES = {"python": "pass", "python, import torch": "import torch"}


def commands() -> dict[str, tuple[list[str], int]]:
    """What is measured: its name → the arguments of ``python``, and the exit status that is right."""
    ours = {
        "lce --help": (["--help"], 0),
        "a key with a typo": (["launch", "run.yaml", "optimiser.lr=1"], 2),
        "lce launch --dry-run": (["launch", "run.yaml", "run.dir=other", "--dry-run"], 0),
        "lce check": (["check", "packed"], 0),
        "lce gallery status": (["gallery", "status", "gallery.npy"], 0),
        "lce checkpoint info": (["checkpoint", "info", "run"], 0),
        "lce plan": (["plan", "--classes", "1e6", "--backbone", "iresnet50", "--gpus", "8"], 0),
    }
    plain = {row: (["-c", code], 0) for row, code in REFERENCES.items()}
    return plain | {row: (["-m", "tools.cli", *arguments], status) for row, (arguments, status) in ours.items()}


def user_seconds(arguments: Sequence[str], status: int, folder: Path) -> float:
    """User CPU seconds of ``python ARGUMENTS`` in ``folder``, its threads and children included.

    Raises:
        ConfigError: it did not end with ``status``; a measured failure is no measurement.
    """
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # sources are compiled once, as where a package is installed
    with tempfile.TemporaryFile() as out:
        command = [sys.executable, *arguments]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
        _, waited, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(waited)
        if process.returncode != status:
            out.seek(0)
            text = out.read().decode(errors="replace").strip()
            raise ConfigError(f"{' '.join(arguments)}: status {process.returncode}, expected {status}: {text[-500:]}")
    return usage.ru_utime


def _prepare(folder: Path, records: int) -> None:
    """``packed``, ``gallery.npy``, ``run.yaml`` and ``run`` in an empty folder, by the commands themselves."""
    import numpy as np
    from PIL import Image

    numbers = np.random.default_rng(0)
    for number in range(records):
        image = folder / "images" / f"{number % CLASSES}" / f"{number}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbers.integers(0, 256, (16, 16, 3), np.uint8)).save(image)
    vectors = numbers.standard_normal((1000, 16)).astype(np.float32)
    np.save(folder / "gallery.npy", vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    (folder / "run.yaml").write_text(CONFIG)
    user_seconds(["-m", "tools.cli", "pack", "images", "packed"], 0, folder)
    user_seconds(["-m", "tools.cli", "launch", "run.yaml"], 0, folder)
