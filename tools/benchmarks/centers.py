"""Measure making a centre bank against copying its source: both sides in one run, alternating, medians.

Example:
  lce bench centers                                      # 1,000,000 × 512 classifier rows in 8 rank files
  lce bench centers --source embeddings --classes 100000 --images 10
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HELP = "making a centre bank against copying its source"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lce bench centers``."""
    parser.add_argument(
        "--source",
        choices=("classifier", "embeddings", "shuffled"),
        default="classifier",
        help="shuffled: embeddings whose labels are in random order",
    )
    parser.add_argument("--classes", type=int, default=1_000_000, help="classes (1,000,000)")
    parser.add_argument("--dim", type=int, default=512, help="dimension (512)")
    parser.add_argument("--images", type=int, default=1, help="embeddings per class (1)")
    parser.add_argument("--files", type=int, default=8, help="rank files of the classifier (8)")
    parser.add_argument("--storage", choices=("float32", "bfloat16", "int8"), default="float32")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of both sides (3)")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON (- for standard output)")


def run(args: argparse.Namespace) -> int:
    """Measure and report; returns the exit status."""
    from tools.measuring import write_json

    figures = measure(args)
    write_json(figures, args.json)
    if args.json != "-":
        ours, copy = figures["ours"], figures["reference"]
        print(
            f"{figures['source_bytes'] / 1e9:.2f} GB: copy {copy['seconds']:.2f} s, bank {ours['seconds']:.2f} s, "
            f"ratio {figures['ratio']:.2f}; largest own memory {ours['peak_bytes'] / 1e6:.0f} MB"
        )
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The figures, as the JSON holds them."""
    from tools.measuring import origin, seconds_of

    with tempfile.TemporaryDirectory(dir=args.folder, prefix="lce-bench-centers-") as scratch:
        folder = Path(scratch)
        files, convert = _prepare(args, folder)
        copies: list[float] = []
        banks: list[float] = []
        peak = 0
        for number in range(args.rounds):
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
            copies.append(seconds_of(lambda: _copy(files, folder / "copy")))
            shutil.rmtree(folder / "copy")
            with _own_memory() as memory:
                banks.append(seconds_of(lambda: convert(folder / "bank")))
            peak = max(peak, memory[0])
            shutil.rmtree(folder / "bank")
        source_bytes = sum(path.stat().st_size for path in files)
    return {
        "bench": "centers",
        **{key: getattr(args, key) for key in ("source", "classes", "dim", "images", "files", "storage", "rounds")},
        "source_bytes": source_bytes,
        "reference": {"seconds": statistics.median(copies), "rounds_seconds": copies, "what": "shutil.copyfile"},
        "ours": {"seconds": statistics.median(banks), "rounds_seconds": banks, "peak_bytes": peak},
        "ratio": statistics.median(banks) / statistics.median(copies),
        **origin(),
    }


def _prepare(args: argparse.Namespace, folder: Path) -> tuple[list[Path], Callable[[Path], object]]:
    """Write the source; its files, and what makes a bank of them."""
    import numpy as np
    import torch

    from trainer.compat.bank.center_bank import BankInfo
    from trainer.compat.bank.classifiers import open_classifier
    from trainer.compat.bank.convert import bank_from_embeddings, bank_from_rows
    from trainer.compat.bank.matrices import open_rows

    generator = torch.Generator().manual_seed(0)
    if args.source == "classifier":
        sizes = [args.classes // args.files + (rank < args.classes % args.files) for rank in range(args.files)]
        files = []
        for rank, size in enumerate(sizes):
            files.append(folder / f"checkpoint_gpu_{rank}.pt")
            weight = torch.randn(size, args.dim, generator=generator)
            torch.save({"state_dict_softmax_fc": {"weight": weight}}, files[-1])
        return files, lambda out: bank_from_rows(open_classifier(files).rows, out, BankInfo(), storage=args.storage)
    count = args.classes * args.images
    source = folder / "embeddings.npy"
    array = np.lib.format.open_memmap(source, "w+", np.float32, (count, args.dim))
    for start in range(0, count, 1 << 16):
        rows = min(1 << 16, count - start)
        array[start : start + rows] = torch.randn(rows, args.dim, generator=generator).numpy()
    del array
    labels = np.repeat(np.arange(args.classes), args.images)
    if args.source == "shuffled":
        labels = np.random.default_rng(0).permutation(labels)

    def convert(out: Path) -> object:
        return bank_from_embeddings(open_rows([source]), labels, args.classes, out, BankInfo(), storage=args.storage)

    return [source], convert


def _copy(files: list[Path], folder: Path) -> None:
    folder.mkdir()
    for path in files:
        shutil.copyfile(path, folder / path.name)


@contextmanager
def _own_memory() -> Iterator[list[int]]:
    """The largest growth of this process's anonymous memory (mapped files not counted), in bytes, in the list's only
    place."""
    peak, stop = [0], threading.Event()
    before = _anonymous_bytes()

    def watch() -> None:
        while not stop.wait(0.005):
            peak[0] = max(peak[0], _anonymous_bytes() - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
