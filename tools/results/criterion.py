"""Check the criterion M(new, old) > M(old, old) on unseen identities, for every mode of LCE and pair of dimensions.

  lce bench criterion                                       # all modes, D1 = D2, D1 = 2·D2 and D2 = 2·D1
  lce bench criterion --modes direct,backward --dims 64:64 --seeds 3 --json -

M is TAR@FAR 1e-4 and rank-1; a line is met when both are above the old model's own, in every seed. The last line is
the control: a new model that was trained without regard to the old one must fail. Cross-model takes that same model
and trains only maps, from stored embeddings. What is done is kept under --out: the same command continues.

Exit status: 0 all lines are met and the control fails; 1 not so; 2 wrong use, or a run failed; 130 interrupted.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tools.results.comparison import Comparison

HELP = "the criterion new→old above old→old, for every mode and pair of dimensions"

MODES = ("direct", "backward", "forward", "both", "cross-model")
CONTROL = "independent"


@dataclass(frozen=True)
class Case:
    """A mode, D1 and D2."""

    mode: str
    old: int
    new: int

    @property
    def name(self) -> str:
        """The training's name in the comparison."""
        return f"alone-{self.new}" if self.mode == CONTROL else f"{self.mode}-{self.old}-{self.new}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lce bench criterion``."""
    from tools.results.compat import add_data_arguments, add_run_arguments

    add_data_arguments(parser)
    parser.add_argument("--modes", default="all", help=f"all, or some of {','.join(MODES)}")
    parser.add_argument("--dims", default="64:64,128:64,64:128", help="pairs D1:D2 (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 … N−1 (1)")
    parser.add_argument(
        "--steps", type=int, default=800, help="updates of a new model (800); maps alone take their recipe's"
    )
    parser.add_argument("--old-steps", type=int, default=600, help="updates of an old model (600)")
    parser.add_argument("--alignment-weight", type=float, default=12.5, help="λ_a in (1 − cos) units (12.5)")
    parser.add_argument("--boundary-weight", type=float, default=10.0, help="λ_b (10)")
    add_run_arguments(parser, "criterion")


def run(args: argparse.Namespace) -> int:
    """Train, measure and report; returns the exit status."""
    from rich.table import Table

    from tools.measuring import origin, write_json
    from tools.output import table_console
    from tools.results.compat import make_comparison, settings_of
    from tools.steps import CROSS_MODEL, interruptible, without_network
    from trainer.errors import ConfigError
    from trainer.run.config import load_config

    if args.seeds < 1:
        raise ConfigError(f"--seeds {args.seeds}: at least 1")
    cases, comparison = _cases(args.modes, args.dims), make_comparison(args)
    weights, maps = (args.alignment_weight, args.boundary_weight), {}
    if any(case.mode == "cross-model" for case in cases):  # before anything is trained: an override may not fit it
        maps["map_steps"] = load_config(CROSS_MODEL, without_network(args.overrides)).train.steps
    with interruptible():
        lines = check(comparison, cases, args.seeds, weights)
    fine = all(line["met"] != (line["mode"] == CONTROL) for line in lines)
    settings = {**settings_of(args, comparison), "alignment_weight": weights[0], "boundary_weight": weights[1]}
    write_json({"bench": "criterion", **settings, **maps, "lines": lines, "fine": fine, **origin()}, args.json)
    table = Table("mode", "D1", "D2", "seed", "old → old", "new → old", "met", title="TAR at FAR 1e-4 / rank-1, unseen")
    for line in lines:
        for one in line["seeds"]:
            shown = [" / ".join(f"{value:.3f}" for value in one[cell].values()) for cell in ("old->old", "new->old")]
            met = "yes" if one["met"] else "no, as it must" if line["mode"] == CONTROL else "NO"
            table.add_row(line["mode"], str(line["old_dim"]), str(line["new_dim"]), str(one["seed"]), *shown, met)
    table_console(args.json, 120).print(table)
    return 0 if fine else 1


def _cases(modes: str, dims: str) -> list[Case]:
    """The cases, the control last; direct mode takes only equal dimensions."""
    from trainer.errors import ConfigError

    wanted = MODES if modes == "all" else tuple(modes.split(","))
    unknown = [mode for mode in wanted if mode not in MODES]
    if unknown:
        raise ConfigError(f"--modes {modes}: unknown {', '.join(unknown)}; known: all, {', '.join(MODES)}")
    try:
        pairs = [(int(old), int(new)) for old, new in (pair.split(":") for pair in dims.split(","))]
    except ValueError:
        raise ConfigError(f"--dims {dims}: expected D1:D2, several separated by commas: 64:64,128:64") from None
    cases = [Case(mode, *pair) for mode in wanted for pair in pairs if mode != "direct" or pair[0] == pair[1]]
    return cases + [Case(CONTROL, *pair) for pair in pairs if pair[0] == pair[1]][:1]


def check(
    comparison: "Comparison", cases: Sequence[Case], seeds: int, weights: tuple[float, float]
) -> list[dict[str, Any]]:
    """Train what the cases need and measure them; a line a case.

    Raises:
        LceError: a training run failed.
    """
    from tools.results.compat import counting, make_pictures, raise_first

    olds = [(seed, dim) for seed in range(seeds) for dim in sorted({case.old for case in cases})]
    alone = sorted({case.new for case in cases if case.mode in ("cross-model", CONTROL)})
    independent = [(seed, dim) for seed in range(seeds) for dim in alone]
    jobs = [(seed, case) for seed in range(seeds) for case in cases]
    with counting(seeds + len(olds) + len(independent) + len(jobs)) as count:

        def old(one: tuple[int, int]) -> None:
            comparison.train(one[0], f"old-{one[1]}", "old", [f"backbone.dim={one[1]}"])
            comparison.bank(one[0], f"old-{one[1]}")
            count()

        def new(one: tuple[int, int]) -> None:
            comparison.train(one[0], f"alone-{one[1]}", "paragon", [f"backbone.dim={one[1]}"])
            comparison.bank(one[0], f"alone-{one[1]}")
            count()

        def compatible(one: tuple[int, Case]) -> None:
            if one[1].mode != CONTROL:
                settings = _settings(comparison.folder(one[0]), one[1], weights)
                recipe = "cross-model" if one[1].mode == "cross-model" else "paragon"
                comparison.train(one[0], one[1].name, recipe, settings, f"old-{one[1].old}")
            comparison.measure(one[0], "unseen", f"old-{one[1].old}", one[1].name)
            count()

        make_pictures(comparison, range(seeds), count)
        raise_first(comparison.each(old, olds))
        raise_first(comparison.each(new, independent))
        raise_first(comparison.each(compatible, jobs))
    return [_line(comparison, case, seeds) for case in cases]


def _settings(folder: Path, case: Case, weights: tuple[float, float]) -> list[str]:
    overrides = ["compat.method=lce", f"compat.mode={case.mode}"]
    overrides += [f"compat.alignment_weight={weights[0]}", f"compat.boundary_weight={weights[1]}"]
    overrides.append(f"compat.bank={folder / f'old-{case.old}-bank'}")
    if case.mode == "cross-model":
        alone = folder / f"alone-{case.new}"
        overrides += [f"compat.new_model={alone}", f"compat.new_embeddings={alone}.npy"]
        overrides.append(f"compat.old_embeddings={folder / f'old-{case.old}.npy'}")
    else:
        overrides.append(f"backbone.dim={case.new}")
    return overrides


def _line(comparison: "Comparison", case: Case, seeds: int) -> dict[str, Any]:
    found = []
    for seed in range(seeds):
        cells = comparison.measure(seed, "unseen", f"old-{case.old}", case.name)["cells"]
        old, new = cells["old->old"], cells["new->old"]
        met = all(new[metric] > old[metric] for metric in old)
        found.append({"seed": seed, "old->old": old, "new->old": new, "met": met})
    met = all(one["met"] for one in found) if case.mode != CONTROL else any(one["met"] for one in found)
    return {"mode": case.mode, "old_dim": case.old, "new_dim": case.new, "seeds": found, "met": met}
