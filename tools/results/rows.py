"""What the rows' dtype and momentum cost in accuracy: the same training runs with each of them, on drawn characters.

Without momentum the rows' learning rate is chosen once, in float32, by --trials runs with seed 0 on validation
identities that are not reported: the highest TAR@FAR 1e-4. Then every kind is trained with every seed and measured on
unseen identities. A kind reaches float32 where its mean is at most one standard deviation of float32's seeds below it.

Examples:
  lce bench rows --json - --markdown rows.md
  lce bench rows --kinds float32,float8 --seeds 1 --steps 200 --out tried

What is done is kept under --out: the same command continues. About an hour and a half on two idle cores. Exit status:
0 done; 2 wrong use; 130 interrupted.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.results.compat import (
    CRITERION,
    METRICS,
    PARAGON,
    add_data_arguments,
    add_run_arguments,
    counting,
    make_comparison,
    make_pictures,
    raise_first,
)

if TYPE_CHECKING:
    from tools.results.comparison import Comparison

HELP = "accuracy with the head's rows in float32, bfloat16 and float8, with and without momentum"

WITHOUT = "head.optimizer.momentum=0"
KINDS: dict[str, tuple[str, ...]] = {
    "float32": (),
    "bfloat16": ("head.rows=bfloat16",),
    "float32-0": (WITHOUT,),
    "bfloat16-0": (WITHOUT, "head.rows=bfloat16"),
    "float8": (WITHOUT, "head.rows=float8"),
    "float8-residual": (WITHOUT, "head.rows=float8", "head.rows_residual=true"),
}
"""name → overrides of the recipe; those without momentum get the chosen learning rate besides."""
FACTORS = (1.0, 3.0, 10.0, 30.0)
"""What is tried for ``head.optimizer.lr_factor`` without momentum; with μ = 0.9 a gradient counts ten times in all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lce bench rows``."""
    add_data_arguments(parser)
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"some of {','.join(KINDS)} (all)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 … N−1 (3)")
    parser.add_argument("--factor", type=float, help="no trials: lr_factor without momentum")
    parser.add_argument("--steps", type=int, default=800, help="updates of a model (800)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table as Markdown")
    add_run_arguments(parser, "rows")
    parser.set_defaults(old_steps=1)


def run(args: argparse.Namespace) -> int:
    """Train, measure and report; returns the exit status."""
    from tools.measuring import origin, write_json
    from tools.output import table_console
    from tools.steps import interruptible
    from trainer.errors import ConfigError

    names = args.kinds.split(",")
    if unknown := [name for name in names if name not in KINDS]:
        raise ConfigError(f"--kinds {args.kinds}: unknown {', '.join(unknown)}; known: {', '.join(KINDS)}")
    if args.seeds < 1:
        raise ConfigError(f"--seeds {args.seeds}: at least 1")
    comparison = make_comparison(args)
    with interruptible():
        kinds, factor = compare(comparison, names, args.seeds, args.factor)
    sizes = {"data": args.data, "classes": comparison.classes, "steps": comparison.steps, "seeds": args.seeds}
    figures = {"bench": "rows", **sizes, "lr_factor": factor, "kinds": kinds, **origin()}
    write_json(figures, args.json)
    if args.markdown:
        args.markdown.write_text(as_markdown(figures), encoding="utf-8")
    table_console(args.json, 120).print(as_markdown(figures), markup=False, soft_wrap=True)
    return 0


def compare(
    comparison: "Comparison", names: Sequence[str], seeds: int, factor: float | None
) -> tuple[dict[str, Any], float | None]:
    """name → figures by seed and whether float32's are reached; and the factor that was chosen (None: no need)."""
    needed = any(WITHOUT in KINDS[name] for name in names)
    trials = FACTORS if needed and factor is None else ()
    with counting(seeds + len(trials) + len(names) * seeds) as count:

        def trial(value: float) -> None:
            _figures(comparison, "float32-0", 0, value, "validation")
            count()

        def final(one: tuple[str, int]) -> None:
            _figures(comparison, *one, factor, "unseen")
            count()

        make_pictures(comparison, range(seeds), count)
        raise_first(comparison.each(trial, trials))
        if trials:
            factor = max(trials, key=lambda value: _figures(comparison, "float32-0", 0, value, "validation")[CRITERION])
        raise_first(comparison.each(final, [(name, seed) for seed in range(seeds) for name in names]))
    found: dict[str, Any] = {}
    for name in names:
        runs = [_figures(comparison, name, seed, factor, "unseen") for seed in range(seeds)]
        found[name] = {"overrides": KINDS[name], "seeds": runs}
    return {name: one | _verdict(one["seeds"], found) for name, one in found.items()}, factor if needed else None


def _figures(comparison: "Comparison", name: str, seed: int, factor: float | None, part: str) -> dict[str, Any]:
    """Train a kind, or find it, and measure what it finds among its own embeddings."""
    overrides, label = list(KINDS[name]), name
    if WITHOUT in overrides and factor is not None:
        overrides.append(f"head.optimizer.lr_factor={factor:g}")
        label = f"{name}-{factor:g}"
    comparison.train(seed, label, PARAGON, overrides)
    return {"seed": seed, **comparison.measure(seed, part, label, label)["cells"]["new->new"]}


def _verdict(runs: Sequence[dict[str, Any]], found: dict[str, Any]) -> dict[str, Any]:
    """Means and deviations, and how far the mean lies above float32's, in deviations of its seeds (None: unknown)."""
    spread = {metric: _spread([one[metric] for one in runs]) for metric in METRICS}
    float32 = found.get("float32", {"seeds": []})["seeds"]
    above: dict[str, float | None] = dict.fromkeys(METRICS)
    reached = None
    for metric in METRICS if float32 else ():
        mean, deviation = _spread([one[metric] for one in float32])
        above[metric] = difference = spread[metric][0] - mean
        if deviation is not None and metric == CRITERION:
            reached = difference >= -deviation
    return {"spread": spread, "above_float32": above, "reached": reached}


def _spread(values: Sequence[float]) -> tuple[float, float | None]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def as_markdown(figures: dict[str, Any]) -> str:
    """The table that people read."""
    rate = "" if figures["lr_factor"] is None else f", rows' learning rate × {figures['lr_factor']:g} without momentum"
    lines = [
        f"{figures['classes']} classes, {figures['steps']} updates, {figures['seeds']} seeds{rate}; unseen identities.",
        "",
        "| rows | TAR@FAR 1e-4 | rank-1 | above float32 (TAR) | reached |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, one in figures["kinds"].items():
        cells = [_text(*one["spread"][metric]) for metric in METRICS]
        above = one["above_float32"][CRITERION]
        verdict = {None: "–", True: "yes", False: "no"}[one["reached"]]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {'–' if above is None else f'{above:+.4f}'} | {verdict} |")
    return "\n".join(lines) + "\n"


def _text(mean: float, deviation: float | None) -> str:
    return f"{mean:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")
