"""What reading the old embeddings of a batch costs an update: from a file that no memory holds, read when they are
needed or ahead, and from memory.

  lce bench compat-step --method l2                              # 1,000,000 classes, 2,000,000 images: a file of 4 GB
  lce bench compat-step --method fct --rate 1.0 --records 500000 --json -

A file of random vectors is written to --out, and the system is asked to drop it from its cache. Updates of a run on
synthetic images with a small network and the whole head then read it in three ways, some updates each by turns: `cold`
reads a batch's vectors when they are needed, `ahead` asks for them four batches before, as training does, `memory` has
read them before. No record is read twice as long as there are many more than the updates need.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

from tools.arguments import whole_number
from tools.measuring import origin, write_json

NAME = "compat-step"
HELP = "the share of an update that reading old embeddings takes"
METHODS = ("l2", "fct", "mixbct", "advbct")
MODES = ("cold", "ahead", "memory")
BLOCK = 65536


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``lce bench compat-step``."""
    parser.add_argument("--method", choices=METHODS, default="l2", help="compat.method (l2)")
    parser.add_argument("--classes", type=whole_number(2), default=1_000_000, help="C (1000000)")
    parser.add_argument("--records", type=whole_number(2), default=2_000_000, help="images, a vector each (2000000)")
    parser.add_argument("--rate", type=float, default=0.1, help="head.sample_rate (0.1)")
    parser.add_argument("--batch", type=whole_number(2), default=128, help="B (128)")
    parser.add_argument("--dim", type=whole_number(1), default=512, help="D1 and D2 (512)")
    parser.add_argument("--steps", type=whole_number(1), default=10, help="updates that count of each turn (10)")
    parser.add_argument("--turns", type=whole_number(1), default=3, help="turns of each (3)")
    parser.add_argument("--out", type=Path, help="folder for the file (default: a temporary one)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there; - for standard output")


def run(args: argparse.Namespace) -> int:
    """Measure and report. Raises :class:`ConfigError`: too few records for files that nobody has read yet."""
    _check(args)
    with tempfile.TemporaryDirectory(prefix="lce-bench-", dir=args.out) as folder:
        path = Path(folder) / "old.npy"
        _write(path, args.records, args.dim)
        figures = measure(args, path)
    write_json(figures, args.json)
    if args.json != "-":
        print(
            f"{args.method}, {args.classes:,} classes, rate {args.rate:g}, batch {args.batch}, {args.records:,} images"
        )
        for mode in MODES:
            one = figures[mode]
            print(
                f"  {mode:7} update {one['update_seconds']:.4f} s, of it reading {one['reading_seconds']:.5f} s: "
                f"{one['share']:.1%}"
            )
    return 0


def _check(args: argparse.Namespace) -> None:
    from trainer.data.loader import READ_AHEAD
    from trainer.errors import ConfigError

    read = args.turns * len(MODES) * (READ_AHEAD + 1 + args.steps) * args.batch
    if args.records < read:
        raise ConfigError(
            f"--records {args.records}: the turns read {read:,} vectors, some of them twice then, from memory; give "
            f"--records {read} or more, or fewer --steps, --turns or a smaller --batch"
        )


def measure(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """The figures, as the JSON holds them: medians of an update and of reading within it, and its share."""
    import numpy as np

    from trainer.compat.methods.old_embeddings import StoredEmbeddings
    from trainer.data.loader import READ_AHEAD
    from trainer.distributed import Ranks
    from trainer.planning.simulation import Updates

    source = StoredEmbeddings(path, args.records)
    reading: list[float] = []
    read = source.read

    def timed(records: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        began = time.perf_counter()
        out = read(records)
        reading.append(time.perf_counter() - began)
        return out

    source.read = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        updates = Updates(_config(args, Path(folder)), Ranks(), args.dim, source)
    coming: deque[np.ndarray[Any, Any]] = deque()
    mode = MODES[0]

    def announced(records: np.ndarray[Any, Any]) -> None:
        coming.append(records)
        if mode == "ahead":
            source.will_need(records)

    updates.loader.follow(announced)
    _forget(path)
    seconds: dict[str, list[tuple[float, float]]] = {one: [] for one in MODES}
    for _ in range(args.turns):
        for mode in MODES:
            for number in range(READ_AHEAD + 1 + args.steps):  # the first were announced in another mode
                if mode == "memory" and coming:
                    read(coming[0])
                began = time.perf_counter()
                updates.take()
                taken = time.perf_counter() - began
                coming.popleft()
                if number > READ_AHEAD:
                    seconds[mode].append((taken, reading[-1]))
    updates.close()
    names = ("method", "classes", "records", "rate", "batch", "dim")
    figures: dict[str, Any] = {"bench": NAME, **{name: getattr(args, name) for name in names}, **origin()}
    for mode, pairs in seconds.items():
        update, within = (statistics.median(values) for values in zip(*pairs, strict=True))
        figures[mode] = {"update_seconds": update, "reading_seconds": within, "share": within / update}
    return figures


def _config(args: argparse.Namespace, folder: Path) -> Any:
    from trainer.run.config import parse_config

    compat: dict[str, Any] = {"method": args.method, "old_embeddings": str(folder / "old.npy")}
    if args.method in ("mixbct", "advbct"):
        compat["bank"] = str(folder / "synthetic")
    data = {"synthetic_classes": args.classes, "synthetic_records": args.records, "synthetic_size": 16}
    tree = {
        "run": {"dir": str(folder / "run"), "device": "cpu"},
        "data": {"loader": "synthetic", "batch_size": args.batch, **data},
        "backbone": {"name": "small", "dim": args.dim},
        "head": {"sample_rate": args.rate},
        "compat": compat,
        "train": {"steps": 1_000_000, "precision": "float32"},
    }
    return parse_config(tree, "lce bench compat-step")


def _write(path: Path, records: int, dim: int) -> None:
    """Random rows, a block of them again and again."""
    import numpy as np

    block = np.random.default_rng(0).standard_normal((min(BLOCK, records), dim), np.float32)
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(records, dim))
    for first in range(0, records, len(block)):
        out[first : first + len(block)] = block[: records - first]
    out.flush()


def _forget(path: Path) -> None:
    """Drop the file from the system's cache."""
    from trainer.files import advise

    with path.open("rb") as file:
        os.fsync(file.fileno())
        advise(file.fileno(), 0, 0, "DONTNEED")
