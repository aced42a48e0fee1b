"""Golden runs: the losses of 30 steps of the main configurations, as text files that a refactoring must not move.

``python -m tests.golden`` makes them anew and prints what changed; only a wanted change of the mathematics may move
them. They are in float64; the images are float32, whose last digit depends on the processor. So they must repeat to
1e-9 where the processor and torch are those that made them (``made-on.json``), and to 1e-4 elsewhere.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.banks import write_bank
from tests.runs import config, losses_of
from trainer.compat.bank.center_bank import BankInfo
from trainer.distributed import Ranks
from trainer.machine import processor_name
from trainer.run.engine import train

FOLDER = Path(__file__).parent / "golden"
MADE_ON = FOLDER / "made-on.json"
TIGHT, LOOSE = 1e-9, 1e-4

RUNS: dict[str, dict[str, Any]] = {
    "cosface": {"backbone__name": "small", "data__synthetic_size": 16, "schedule__name": "cosine"},
    "arcface-sampled": {
        "backbone__name": "iresnet18",
        "backbone__width": 4,
        "data__synthetic_size": 16,
        "head__margin": {"name": "arcface", "scale": 16, "m": 0.3},
        "head__sample_rate": 0.4,
        "train__accumulate": 2,
    },
    "lce-direct": {
        "backbone__name": "small_resnet",
        "data__synthetic_size": 16,
        "head__sample_rate": 0.4,
        "compat__method": "lce",
        "compat__alignment_weight": 2.0,
        "compat__boundary_weight": 3.0,
    },
    "adamw-clip": {
        "backbone__name": "mobilefacenet",
        "backbone__width": 8,
        "data__synthetic_size": 32,
        "optimizer__name": "adamw",
        "optimizer__lr": 0.003,
        "optimizer__clip_norm": 1.0,
        "schedule__name": "step",
    },
}


def make(name: str) -> list[float]:
    """The losses of a golden run, made now."""
    changes = {"train__steps": 30, "optimizer__lr": 0.03} | RUNS[name]
    with tempfile.TemporaryDirectory() as folder:
        if "compat__method" in changes:
            changes["compat__bank"] = str(_bank(Path(folder) / "bank"))
        train(config(Path(folder) / "run", **changes), Ranks())
        return losses_of(Path(folder) / "run")


def _bank(path: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    centers = torch.nn.functional.normalize(torch.randn(11, 6, generator=generator, dtype=torch.float64), dim=1).float()
    mask = torch.arange(11) != 4
    counts = torch.ones(11, dtype=torch.int64)
    write_bank(path, centers=centers, boundaries=torch.full((11,), 0.4), counts=counts, mask=mask, info=BankInfo())
    return path


def read(name: str) -> list[float]:
    """The losses on file."""
    return [float(line) for line in (FOLDER / f"{name}.txt").read_text().split()]


def machine() -> dict[str, str]:
    """What the last digits depend on."""
    kernels = torch.backends.cpu.get_cpu_capability()
    return {"processor": processor_name(), "kernels": kernels, "torch": torch.__version__.partition("+")[0]}


def tolerance() -> float:
    """How far a loss may be from that on file, relatively, on this machine."""
    return TIGHT if machine() == json.loads(MADE_ON.read_text()) else LOOSE


def main() -> int:
    """Make all anew; 1 when one of them moved."""
    FOLDER.mkdir(exist_ok=True)
    moved, allowed = 0, tolerance()
    for name in RUNS:
        now = make(name)
        path = FOLDER / f"{name}.txt"
        before = read(name) if path.exists() else []
        path.write_text("".join(f"{loss:.12g}\n" for loss in now))
        pairs = list(zip(before, now, strict=False))
        worst = max((abs(a / b - 1) for a, b in pairs), default=float("inf"))
        first = next((i + 1 for i, (a, b) in enumerate(pairs) if abs(a / b - 1) > allowed), None)
        moved += first is not None or len(before) != len(now)
        print(f"{name}: largest relative difference {worst:.2e}" + (f", first moved in step {first}" if first else ""))
    MADE_ON.write_text(json.dumps(machine(), indent=1) + "\n")
    return 1 if moved else 0


if __name__ == "__main__":
    sys.exit(main())
