"""`lce bench head --ladder`: the head at the class counts of published tables, those that fit, next to those figures.

Each rung runs float32 rows where they fit, else bfloat16 (both with --every-rows), against the plain implementation
where that fits too. What fits is decided by the arithmetic of `lce plan` before anything is allocated.
"""

import argparse
import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.plan import parse_bytes

RUNGS = (125_000, 1_000_000, 2_000_000, 5_500_000, 8_000_000, 16_000_000, 29_000_000)
SPARE = 0.93
"""Share of the free memory that a rung may be planned to take."""

# arcface_torch's published speed benchmark (its docs/speed_benchmark.md): 8 × V100 of 32 GB, ResNet-50, batch 1024,
# mixed precision; a whole training run, samples per second and MB per GPU. None: not given.
PUBLISHED: dict[int, dict[str, tuple[int, int] | None]] = {
    125_000: {"model parallel": (4824, 5306), "Partial FC 0.1": (5004, 4868)},
    1_000_000: {"model parallel": (3449, 9966), "Partial FC 0.1": (4803, 5620)},
    2_000_000: {"model parallel": (2593, 13978), "Partial FC 0.1": (4626, 6472)},
    5_500_000: {"model parallel": (1389, 32188), "Partial FC 0.1": (3975, 9854)},
    8_000_000: {"model parallel": None, "Partial FC 0.1": (3565, 12310)},
    16_000_000: {"model parallel": None, "Partial FC 0.1": (2679, 19950)},
    29_000_000: {"model parallel": None, "Partial FC 0.1": (1855, 32324)},
}
PUBLISHED_NOTE = (
    "Published by others, not measured here: arcface_torch, docs/speed_benchmark.md: a whole training run on 8 × "
    "V100 32 GB, ResNet-50, batch 1024, mixed precision, memory per GPU (PLSC states 92 million classes on 8 × 32 GB). "
    "What was measured here is a step of the head alone; the two are not to be divided by each other."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The ladder's options of `lce bench head`."""
    group = parser.add_argument_group("the ladder")
    group.add_argument("--ladder", action="store_true", help="125,000 to 29,000,000 classes, those that fit")
    group.add_argument("--rungs", type=lambda t: int(float(t)), nargs="+", default=RUNGS, metavar="C", help="others")
    group.add_argument("--every-rows", action="store_true", help="float32 and bfloat16 rows on each rung")
    group.add_argument("--memory", type=parse_bytes, metavar="SIZE", help="what may be taken (default: what is free)")
    group.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there")


def climb(args: argparse.Namespace, measure: Callable[[argparse.Namespace], dict[str, Any]]) -> dict[str, Any]:
    """Measure every rung that fits, and print and write the table.

    Args:
        args: of ``lce bench head``.
        measure: makes the figures of one run.
    """
    from tools.measuring import origin
    from tools.output import write_json
    from trainer.errors import ConfigError
    from trainer.files import replaced

    limit = args.memory or round(SPARE * free_bytes(args.device))
    rungs: list[dict[str, Any]] = []
    for classes in args.rungs:
        dtypes = ("float32", "bfloat16")
        fitting = [rows for rows in dtypes if needed_bytes(args, classes, rows, "auto") <= limit]
        chosen = fitting if args.every_rows else fitting[:1]
        if not chosen:
            need = needed_bytes(args, classes, "bfloat16", "auto")
            rungs.append({"classes": classes, "rows": None, "planned_bytes": need, "measured": None})
        for rows in chosen:
            print(f"{classes:,} classes, rows {rows}", file=sys.stderr)
            rungs.append(_rung(args, classes, rows, limit, measure))
    figures = {
        "bench": "ladder",
        **{k: getattr(args, k) for k in ("rate", "batch", "dim", "lce", "centers", "compute", "device", "world_size")},
        "memory_limit_bytes": limit,
        **origin(),
        "rungs": rungs,
        "published": {str(c): rung for c, rung in PUBLISHED.items()},
        "published_note": PUBLISHED_NOTE,
    }
    write_json(figures, args.json)
    text = as_markdown(figures)
    if args.markdown is not None:
        with replaced(args.markdown, ConfigError) as partial:
            partial.write_text(text)
    if args.json != "-":
        print(text)
    return figures


def _rung(
    args: argparse.Namespace,
    classes: int,
    rows: str,
    limit: int,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
) -> dict[str, Any]:
    ours = needed_bytes(args, classes, rows, "auto")
    theirs = needed_bytes(args, classes, "float32", "reference")
    case = copy.copy(args)
    case.classes, case.rows = classes, rows
    case.only = args.only if theirs <= limit else "ours"
    case.sequential = args.sequential or (case.only == "both" and ours + theirs > limit)
    figures = measure(case)
    return {"classes": classes, "rows": rows, "planned_bytes": ours * args.world_size, "measured": figures}


def needed_bytes(args: argparse.Namespace, classes: int, rows: str, impl: str) -> int:
    """The planned peak of all ranks of one side on this machine (of one rank with CUDA: each has a device)."""
    from trainer.planning.backbones import BackboneSizes
    from trainer.planning.memory import peak_bytes, rank_memory
    from trainer.planning.setting import Setting
    from trainer.run.config import parse_config

    reference = impl == "reference"
    tree: dict[str, Any] = {
        "run": {"dir": "unused"},
        "data": {"loader": "synthetic", "batch_size": args.batch},
        "backbone": {"dim": args.dim},
        "head": {
            "impl": impl,
            "rows": "float32" if reference else rows,
            "compute": "float32" if reference else args.compute,
            "sample_rate": args.rate,
            "optimizer": {"name": args.optimizer},
        },
        "checkpoint": {"asynchronous": False},
    }
    if args.lce == "direct":
        tree["compat"] = {"method": "lce", "bank": "unused"}
    bank_dim = args.dim if args.lce == "direct" else None
    setting = Setting(parse_config(tree, "ladder"), classes, (8, 8), args.world_size, args.device, bank_dim)
    parts = rank_memory(setting, BackboneSizes(0, 0, 0, 0, 0, 0, ()))
    share = {"float32": 1.0, "bfloat16": 0.5, "mapped": 0.0}[args.centers]
    saved = sum(round(part.bytes * (1 - share)) for part in parts if part.name == "old centres")
    peak = peak_bytes([part for part in parts if part.moment != "load"]) - saved
    return peak if args.device == "cuda" else peak * args.world_size


def free_bytes(device: str) -> int:
    """Memory that is free now: of the GPU, or what Linux calls available."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    try:
        text = Path("/proc/meminfo").read_text()
        return int(next(line for line in text.splitlines() if line.startswith("MemAvailable")).split()[1]) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def as_markdown(figures: dict[str, Any]) -> str:
    """The table that people read: what was measured on the left, what others published on the right."""
    lce = f", LCE direct ({figures['centers']} centres)" if figures["lce"] == "direct" else ""
    lines = [
        "# The ladder",
        "",
        f"Measured: a step of the head (forward, backward, update of the rows) on {figures['machine']}, "
        f"{figures['device']}, {figures['world_size']} rank(s), torch {figures['torch']}, commit {figures['commit']}; "
        f"batch {figures['batch']}, dimension {figures['dim']}, sample rate {figures['rate']}, products in "
        f"{figures['compute']}{lce}; medians. The reference is `impl: reference` in float32, where it fits "
        f"{figures['memory_limit_bytes'] / 2**30:.1f} GiB.",
        "",
        PUBLISHED_NOTE,
        "",
        "| classes | rows | reference | ours | ratio | samples/s of the head | *published: model parallel* | "
        "*published: Partial FC 0.1* |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for rung in figures["rungs"]:
        cells = _measured_cells(rung, figures["batch"])
        others = [_published_cell(rung["classes"], name) for name in ("model parallel", "Partial FC 0.1")]
        lines.append("| " + " | ".join([f"{rung['classes']:,}", *cells, *others]) + " |")
    return "\n".join(lines) + "\n"


def _measured_cells(rung: dict[str, Any], batch: int) -> list[str]:
    if rung["measured"] is None:
        return ["–", "–", f"does not fit: {rung['planned_bytes'] / 2**30:.1f} GiB planned", "–", "–"]
    figures = rung["measured"]

    def cell(name: str) -> str:
        one = figures.get(name)
        return "does not fit" if one is None else f"{one['seconds']:.4g} s, {one['peak_bytes'] / 2**30:.2f} GiB"

    ratio = f"{figures['ratio']:.2f}" if "ratio" in figures else "–"
    speed = f"{batch / figures['ours']['seconds']:,.0f}" if figures.get("ours") else "–"
    return [rung["rows"], cell("reference"), cell("ours"), ratio, speed]


def _published_cell(classes: int, method: str) -> str:
    if classes not in PUBLISHED:
        return "–"
    known = PUBLISHED[classes][method]
    return "*does not fit*" if known is None else f"*{known[0]} samples/s, {known[1] / 1000:.1f} GB*"
