"""Measure a checkpoint: how long the step waits, how long until it is on disk, how long to verify and load it.

The reference is a plain synced copy of a file of the same size on the same disk: what any checkpoint can reach at best.
Verifying and loading read what was just written, so mostly from the page cache.

  lce bench checkpoint
  lce bench checkpoint --megabytes 1024 --folder /mnt/disk --json -
"""

import argparse
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

HELP = "stall, write, verify and load of a checkpoint against a plain file copy"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``lce bench checkpoint``."""
    parser.add_argument("--megabytes", type=int, default=256, help="size of the state (default 256)")
    parser.add_argument("--repeats", type=int, default=5, help="the medians of so many are given (default 5)")
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure (default: the temporary one)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there; - for standard output")


def run(args: argparse.Namespace) -> int:
    """Measure and report."""
    from tools.measuring import origin, write_json
    from trainer.errors import ConfigError

    if args.megabytes < 1 or args.repeats < 1:
        raise ConfigError("--megabytes and --repeats: at least 1")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        times = _measure(Path(name), args.megabytes << 20, args.repeats)
    size = args.megabytes << 20
    middle = {key: statistics.median(values) for key, values in times.items()}
    reference = middle.pop("copy")
    figures: dict[str, Any] = {
        "bench": "checkpoint",
        "bytes": size,
        "device": "cpu",
        "world_size": 1,
        **origin(),
        "reference": {"seconds": reference, "bytes_per_second": size / reference},
        "ours": {f"{key}_seconds": value for key, value in middle.items()},
        "ratio": middle["write"] / reference,
    }
    write_json(figures, args.json)
    if args.json != "-":
        print(f"{args.megabytes} MiB, medians of {args.repeats}; a plain synced copy takes {reference:.3f} s")
        print(f"  the step waits        {middle['stall']:.3f} s")
        print(f"  until it is on disk   {middle['write']:.3f} s ({middle['write'] / reference:.2f} × the copy)")
        print(f"  verify every byte     {middle['verify']:.3f} s")
        print(f"  load                  {middle['load']:.3f} s")
    return 0


def _measure(folder: Path, size: int, repeats: int) -> dict[str, list[float]]:
    """Seconds by kind: stall, write, verify, load and copy, each measured ``repeats`` times, alternating."""
    import torch
    import torch.distributed as dist

    from tools.measuring import seconds_of
    from tools.progress import progress_bars
    from trainer.checkpoint import Checkpoints, load_tensors
    from trainer.checkpoint_folder import CheckpointConfig, find_damage
    from trainer.distributed import Ranks

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    times: dict[str, list[float]] = {key: [] for key in ("stall", "write", "verify", "load", "copy")}
    try:
        rows = torch.randn(size // 4 // 512, 512)
        state = {"rows": rows[: len(rows) // 2], "momentum": rows[len(rows) // 2 :]}
        checkpoints = Checkpoints(folder, CheckpointConfig(keep=1), Ranks(), print)
        with progress_bars() as bars:
            for step in range(1, repeats + 1):
                bars.update("measuring", step - 1, repeats)
                start = time.perf_counter()
                checkpoints.save(state, {"step": step})
                times["stall"].append(time.perf_counter() - start)
                checkpoints.settle()
                times["write"].append(time.perf_counter() - start)
                found = checkpoints.newest()
                assert found is not None
                times["verify"].append(seconds_of(partial(find_damage, found.folder, found.seal["files"])))
                times["load"].append(seconds_of(partial(load_tensors, found, state)))
                largest = max(found.folder.iterdir(), key=lambda path: path.stat().st_size)
                times["copy"].append(seconds_of(partial(_copy, largest, folder / "copy")))
    finally:
        dist.destroy_process_group()
    return times


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as read, target.open("wb") as write:
        while block := read.read(1 << 22):
            write.write(block)
        write.flush()
        os.fsync(write.fileno())
    target.unlink()
