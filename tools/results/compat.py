"""Compare the ways to stay compatible with a deployed model: one table, every method with the same number of trials.

  lce bench compat --data characters --methods all --seeds 3 --json - --markdown compat.md
  lce bench compat --methods bct,lce --trials 6 --steps 600 --out tried      # fewer methods, more weights, shorter
  lce bench compat --methods lce,lce+bct                   # one method, and two together
  lce bench compat --data FOLDER --weights compat.json     # a folder of lce characters, weights as chosen before

Each method's weights are chosen by --trials training runs with seed 0, on validation identities that are not reported:
the highest TAR@FAR 1e-4 of new→old there. With --trial-steps these runs are short, and the better half gets runs of
twice as many updates, as lce tune does, until one is left or they are as long as --steps. Then it is trained with every
seed, each with an old model, training identities and a paragon (the new model without compatibility) of its own, and
measured on unseen identities.
LCE's differences to the others have intervals, paired over these identities and the seeds.
"independent" is the paragon used on the old gallery. Update gain and cost are in trainer/evaluation/compatibility.py.

--weights takes an earlier run's JSON and its choices. A FOLDER's identities are the same for every seed.

What is done is kept under --out: the same command continues. Exit status: 0 done; 1 a method could not be trained (the
others are in the table); 2 wrong use; 130 interrupted.
"""

import argparse
import math
import statistics
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.tuning import RANGES, Range, points, rung_sizes, survivors

if TYPE_CHECKING:
    from rich.table import Table

    from tools.results.comparison import Comparison
    from trainer.errors import LceError

HELP = "the methods of compatibility against each other: one table"

OLD, PARAGON = "old", "paragon"
CRITERION = "TAR@FAR=1e-4"
METRICS = (CRITERION, "rank-1")
SHOWN = ("new->old", "new->new")
ALONE = ("old->old", "paragon->paragon")
CLASSES = 4000


@dataclass(frozen=True)
class Method:
    """A way to train the new model.

    Attributes:
        settings: overrides of the recipe; ``{bank}``, ``{embeddings}`` and ``{weight}`` are filled in.
        low, high: the ends of the weights that the trials span, evenly in their logarithm.
        others: of methods together, by the others' names: the ends of their weights.
    """

    title: str
    settings: tuple[str, ...]
    low: float = 1.0
    high: float = 1.0
    others: tuple[tuple[str, float, float], ...] = ()

    def overrides(self, bank: Path, embeddings: Path, weight: float) -> list[str]:
        """The settings with the old model's bank and embeddings, and this weight."""
        others = {}
        if self.others:
            share = math.log(weight / self.low) / math.log(self.high / self.low) if self.low < self.high else 0.5
            others = {f"{name}_weight": f"{low * (high / low) ** share:.3g}" for name, low, high in self.others}
        known = {"bank": bank, "embeddings": embeddings, "weight": weight, **others}
        return [word.format(**known) for word in self.settings]

    def weights(self, trials: int) -> list[float]:
        """So many weights from ``low`` to ``high``; the middle one for a single trial or where there is nothing to
        choose."""
        return [weight for (weight,) in points([Range((), self.low, self.high)], trials)]


def _method(title: str, method: str, needs: str, *more: str) -> Method:
    """The weights are those that ``lce tune`` tries."""
    area = RANGES[method]
    files = {"bank": "compat.bank={bank}", "old": "compat.old_embeddings={embeddings}"}
    overrides = [f"compat.method={method}", *more, *(files[name] for name in needs.split())]
    return Method(title, (*overrides, *(f"compat.{key}={{weight}}" for key in area.keys)), area.low, area.high)


@dataclass(frozen=True)
class Rung:
    """One length of trials: how many of each method at most, and of how many updates."""

    trials: int
    updates: int


class _Methods(dict[str, Method]):
    """Methods by name; ``lce+bct`` is both together, their weights at the same point of their logarithmic ranges, which
    may span other factors. The weight of the first that has a range stands for all."""

    def __missing__(self, name: str) -> Method:
        parts = name.split("+")
        if len(parts) < 2 or any(part not in self for part in parts):
            raise KeyError(name)
        first = next((part for part in parts if self[part].low < self[part].high), parts[0])
        overrides, sections = list[str](), list[str]()
        for part in parts:
            weight = "{weight}" if part == first else f"{{{part}_weight}}"
            own = [word.replace("{weight}", weight) for word in self[part].settings]
            overrides += [word for word in own if not word.startswith("compat.")]
            pairs = [word.removeprefix("compat.").split("=") for word in own if word.startswith("compat.")]
            sections.append(f"{{{{{', '.join(f'{key}: {chr(34)}{value}{chr(34)}' for key, value in pairs)}}}}}")
        title = " + ".join(self[part].title.removesuffix(", direct") for part in parts)
        others = tuple((part, self[part].low, self[part].high) for part in parts if part != first)
        settings = (*overrides, f"compat=[{', '.join(sections)}]")
        return Method(title, settings, self[first].low, self[first].high, others)


METHODS = _Methods()
METHODS |= {
    "independent": Method("independent", ()),
    "l2": _method("L2 to the old embedding", "l2", "old"),
    "bct": _method("BCT", "bct", "bank"),
    "unibct": _method("UniBCT", "unibct", "old"),
    "ndpp": _method("NDPP, ours after it", "ndpp", "bank"),
    "bt2": _method("BT², 32 dimensions more, ours after it", "bt2", "bank old", "backbone.dim=96"),
    "frozen": Method("old rows stay", ("compat.method=frozen", "compat.bank={bank}")),
    "advbct": _method("AdvBCT", "advbct", "bank old"),
    "mixbct": _method("MixBCT", "mixbct", "bank old"),
    "fct": _method("FCT (no side information)", "fct", "old"),
    "lce": _method("LCE, direct", "lce", "bank", "compat.mode=direct"),
    "lce-backward": _method("LCE, backward", "lce", "bank", "compat.mode=backward"),
    "lce-forward": _method("LCE, forward", "lce", "bank", "compat.mode=forward"),
}
MAPPED = ("fct", "lce-backward", "lce-forward")
"""Those that compare two models of different dimensions, through maps."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lce bench compat``."""
    add_data_arguments(parser)
    parser.add_argument("--methods", default="all", help=f"all, or some of {','.join(METHODS)}; lce+bct: both")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 … N−1 (3)")
    parser.add_argument("--trials", type=int, default=4, help="training runs to choose each method's weights (4)")
    parser.add_argument("--trial-steps", type=int, help="updates of a first trial; then halving (all trials: --steps)")
    parser.add_argument("--weights", type=Path, metavar="JSON", help="no trials: weights out of an earlier run's JSON")
    parser.add_argument("--steps", type=int, default=800, help="updates of a new model (800)")
    parser.add_argument("--old-steps", type=int, default=600, help="updates of an old model (600)")
    parser.add_argument(
        "--time", action="store_true", help="also the time of an update, one training at a time and in turns: minutes"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown")
    add_run_arguments(parser, "compat")


def add_data_arguments(
    parser: argparse.ArgumentParser, old: str = "of them, the old model's (500; not of a folder)"
) -> None:
    """What the benchmarks with a comparison train on; ``old`` says what ``--old-classes`` is."""
    parser.add_argument(
        "--data", metavar="NAME", default="characters", help="characters, or a folder made by lce characters"
    )
    parser.add_argument("--classes", type=int, help="training identities of the new models (4,000; not of a folder)")
    parser.add_argument("--old-classes", type=int, help=old)


def add_run_arguments(parser: argparse.ArgumentParser, name: str, override: str = "backbone.width=4") -> None:
    """What all of them have in common besides: how many runs at a time, where they are kept, the figures and the
    overrides, of which ``override`` is an example."""
    parser.add_argument("--parallel", type=int, default=2, help="training runs at a time, one thread each (2)")
    folder = f"bench-{name}"
    parser.add_argument("--out", type=Path, default=Path(folder), help=f"folder of all runs ({folder})")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON (- for standard output)")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help=f"for all training runs: {override}"
    )


def run(args: argparse.Namespace) -> int:
    """Train, measure and report; returns the exit status."""
    from tools.measuring import write_json
    from tools.output import table_console
    from tools.steps import interruptible

    names = names_of(args.methods)
    _check(args)
    comparison, weights = make_comparison(args), weights_of(args.weights, names)
    with interruptible():
        figures = compare(comparison, names, args.seeds, rungs_of(args), weights)
        if args.time:
            time_updates(comparison, figures["methods"])
    figures = {"bench": "compat", **settings_of(args, comparison), "trials": args.trials, **figures}
    write_json(figures, args.json)
    if args.markdown:
        args.markdown.write_text(markdown(figures), encoding="utf-8")
    console = table_console(args.json, 160)
    console.print(_table(figures))
    for name, one in figures["methods"].items():
        for problem in one["problems"]:
            console.print(f"{name}: {problem}", style="red", soft_wrap=True, markup=False)
    return 1 if any(one["problems"] for one in figures["methods"].values()) else 0


def make_comparison(args: argparse.Namespace) -> "Comparison":
    """The comparison that the options describe, checked."""
    import torch

    from tools.results.comparison import Comparison, source_of
    from trainer.errors import ConfigError

    torch.set_num_threads(1)
    source, asked = source_of(args.data), (args.classes, args.old_classes)
    if source.folder and asked != (None, None):
        raise ConfigError(f"--classes and --old-classes do not go with a folder: {args.data} says how many there are")
    classes, old = source.counts() if source.folder else (asked[0] or CLASSES, asked[1] or 500)
    sizes = (classes, old, args.steps, args.old_steps)
    comparison = Comparison(args.out.absolute(), source, *sizes, tuple(args.overrides), args.parallel)
    comparison.check()
    return comparison


def settings_of(args: argparse.Namespace, comparison: "Comparison") -> dict[str, Any]:
    """What a benchmark was run with, for its JSON."""
    data = comparison.source.folder.name if comparison.source.folder else args.data
    sizes = {key: getattr(comparison, key) for key in ("classes", "old_classes", "steps", "old_steps")}
    found = {"data": data, **sizes, "seeds": args.seeds, "overrides": args.overrides}
    typefaces = comparison.source.typefaces()
    return {**found, "typefaces": typefaces} if typefaces else found


def rungs_of(args: argparse.Namespace) -> list[Rung]:
    """All trials of ``--steps`` updates, or from ``--trial-steps`` on, halving until one is left; none is longer than
    ``--steps``, and the last that is as long chooses."""
    if args.trial_steps is None:
        return [Rung(args.trials, args.steps)]
    rungs = max(1, math.ceil(math.log2(args.trials)))
    rungs = min(rungs, 1 + math.ceil(math.log2(args.steps / args.trial_steps)))  # those after it would be as long
    sizes = rung_sizes(args.trials, rungs)
    return [Rung(size, min(args.trial_steps * 2**number, args.steps)) for number, size in enumerate(sizes)]


def weights_of(path: Path | None, names: Sequence[str]) -> dict[str, float] | None:
    """The weights that an earlier run chose. Raises :class:`ConfigError`: unreadable, or not there for a method."""
    import json

    from trainer.errors import ConfigError

    if path is None:
        return None
    try:
        methods = json.loads(path.read_text())["methods"]
        found = {name: methods[name]["weight"] for name in names if METHODS[name].settings}
        weights = {name: float(weight) for name, weight in found.items()}
        if all(0 < weight < math.inf for weight in weights.values()):
            return weights
        raise ValueError
    except OSError as error:
        raise ConfigError(f"--weights {path}: cannot be read: {error.strerror}") from None
    except KeyError as error:
        raise ConfigError(f"--weights {path}: has nothing about {error.args[0]}") from None
    except (ValueError, TypeError):
        raise ConfigError(f"--weights {path}: not the JSON of lce bench compat, or a method without a weight") from None


def weights_or_middle(path: Path | None, names: Sequence[str]) -> dict[str, float]:
    """:func:`weights_of`; without an earlier run the middle of each method's range."""
    return weights_of(path, names) or {name: METHODS[name].weights(1)[0] for name in names}


def names_of(text: str) -> list[str]:
    """The methods that an option names. Raises :class:`ConfigError`: an unknown one, or methods that no training run
    takes together."""
    from trainer.errors import ConfigError

    names = list(METHODS) if text == "all" else text.split(",")
    parts = [part for name in names for part in name.split("+")]
    unknown = [part for part in parts if part not in METHODS]
    if unknown:
        raise ConfigError(f"--methods {text}: unknown {', '.join(unknown)}; known: all, {', '.join(METHODS)}")
    for name in names:
        if "+" in name:
            _check_together(name)
    return names


def _check_together(name: str) -> None:
    """Resolve the recipe with several methods, as their training runs do. Raises :class:`ConfigError`: impossible."""
    from tools.steps import CONFIGS
    from trainer.errors import ConfigError
    from trainer.run.config import load_config

    alone = next((part for part in name.split("+") if not METHODS[part].settings), None)
    if alone is not None:
        raise ConfigError(f"--methods {name}: {alone} is no method of training; give it by itself")
    overrides = METHODS[name].overrides(Path("bank"), Path("embeddings.npy"), METHODS[name].weights(1)[0])
    try:
        load_config(CONFIGS / "demo-characters-paragon.yaml", overrides)
    except ConfigError as error:
        raise ConfigError(f"--methods {name}: {str(error).removeprefix('command line: ')}") from None


def check_sizes(names: Sequence[str]) -> None:
    """Refuse methods that size the new model themselves, where a benchmark does. Raises :class:`ConfigError`."""
    from trainer.errors import ConfigError

    for name in names:
        sizes = [word for word in METHODS[name].settings if word.startswith("backbone.")]
        if sizes:
            raise ConfigError(
                f"--methods {name}: it sets {', '.join(sizes)} itself, but here the models' sizes are those of the "
                "benchmark; lce bench compat measures it"
            )


def _check(args: argparse.Namespace) -> None:
    from trainer.errors import ConfigError

    if args.trial_steps is not None and not 1 <= args.trial_steps <= args.steps:
        raise ConfigError(f"--trial-steps {args.trial_steps}: from 1 to --steps, {args.steps}")
    if min(args.seeds, args.trials) < 1:
        raise ConfigError(f"--seeds {args.seeds} --trials {args.trials}: both at least 1")
    for option, file in (("--json", args.json), ("--markdown", args.markdown)):
        if file not in (None, "-") and not Path(file).absolute().parent.is_dir():
            raise ConfigError(f"{option} {file}: the folder {Path(file).absolute().parent} does not exist")


# ---- training and measuring ----


def compare(
    comparison: "Comparison",
    names: Sequence[str],
    seeds: int,
    rungs: Sequence[Rung],
    weights: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Choose every method's weights, train it with every seed and measure it: the figures as the JSON holds them.

    With ``weights`` (by method) nothing is tried.

    Raises:
        LceError: an old model or a paragon could not be trained (a method that fails is reported instead).
    """
    from tools.measuring import origin

    trained = [name for name in names if METHODS[name].settings]
    tried = {name: [] if weights else METHODS[name].weights(rungs[0].trials) for name in trained}
    sizes = [rung_sizes(len(one), len(rungs)) for one in tried.values() if one]
    reused = bool(sizes) and rungs[-1].updates == comparison.steps  # then seed 0's last trial is its measured run
    total = seeds * 4 + sum(map(sum, sizes)) + len(trained) * (seeds - reused)
    with counting(total) as count:
        prepare(comparison, seeds, count)

        def measure(one: tuple[str, int, float]) -> None:
            _final(comparison, *one)
            if one[0] in trained and not (reused and one[1] == 0):  # the others were trained before
                count()

        trials = _halve(comparison, tried, rungs, count)
        methods = {name: _choose(name, trials.get(name, [])) for name in names}
        for name, weight in (weights or {}).items():
            methods[name]["weight"] = weight
        chosen = {name: one["weight"] for name, one in methods.items() if one["weight"] is not None}
        final = [(name, seed, weight) for name, weight in chosen.items() for seed in range(seeds)]
        failed = comparison.each(measure, final)
    for name, one in methods.items():
        runs = [job for job in final if job[0] == name and failed[job] is None]
        one["seeds"] = [{"seed": job[1], **_crossed(_final(comparison, *job))} for job in runs]
        one["problems"] += [str(failed[job]) for job in final if job[0] == name and failed[job] is not None]
        one["spread"] = spreads(one["seeds"])
    measured = [comparison.measure(seed, "unseen", OLD, PARAGON, PARAGON) for seed in range(seeds)]
    centres = [comparison.centre_queries(seed, "unseen", OLD) for seed in range(seeds)]
    base = spreads(
        [
            {"cells": {"centre->old": at, **{cell: one["cells"][cell] for cell in ALONE}}}
            for one, at in zip(measured, centres, strict=True)
        ]
    )
    return {
        "far": 1e-4,
        "chosen_by": "an earlier run" if weights else f"new->old {CRITERION} on validation",
        "base": base,
        "alone": [
            {"seed": seed, "replicates": {cell: one["replicates"][cell] for cell in ALONE}}
            for seed, one in enumerate(measured)
        ],
        "methods": methods,
        **origin(),
    }


def _crossed(figures: dict[str, Any]) -> dict[str, Any]:
    """A method's figures of one seed with the replicates of its own cell; all methods share those of :data:`ALONE`."""
    return {**figures, "replicates": {"new->old": figures["replicates"]["new->old"]}}


def time_updates(comparison: "Comparison", methods: dict[str, Any]) -> None:
    """Add ``update_time`` to each method that could be trained: how many times as long as the paragon's an update
    takes, the median over the turns."""
    from tools.results.comparison import TIMED_ROUNDS

    chosen = {name: one["weight"] for name, one in methods.items() if one["seeds"]}
    overrides = {name: _overrides(comparison, name, 0, weight) for name, weight in chosen.items()}
    with counting(TIMED_ROUNDS * (1 + len(chosen))) as count:
        seconds = comparison.update_seconds({PARAGON: [], **overrides}, count)
    for name in chosen:
        ratios = [own / base for own, base in zip(seconds[name], seconds[PARAGON], strict=True)]
        methods[name]["update_time"] = statistics.median(ratios)


def prepare(comparison: "Comparison", seeds: int, count: Callable[[], None]) -> None:
    """Pictures, old models, their banks and paragons of all seeds. Raises the first problem."""

    def train(one: tuple[int, str]) -> None:
        comparison.train(one[0], one[1], one[1], ())
        count()

    def bank(seed: int) -> None:
        comparison.bank(seed, OLD)
        count()

    everyone = range(seeds)
    models = [(seed, OLD) for seed in everyone] + [(seed, PARAGON) for seed in everyone]
    make_pictures(comparison, everyone, count)
    raise_first(comparison.each(train, models))
    raise_first(comparison.each(bank, everyone))


def make_pictures(comparison: "Comparison", seeds: Sequence[int], count: Callable[[], None]) -> None:
    """The data sets of some seeds. Raises the first problem."""

    def pictures(seed: int) -> None:
        comparison.pictures(seed)
        count()

    raise_first(comparison.each(pictures, seeds[:1]))  # alone: fetches what the others find in the cache
    raise_first(comparison.each(pictures, seeds[1:]))


def raise_first(problems: "Mapping[Any, LceError | None]") -> None:
    """Raise one of the problems, if there is any."""
    for problem in problems.values():
        if problem is not None:
            raise problem


@dataclass(frozen=True)
class Trial:
    """A short run of a method with seed 0 and what it found on the validation identities, or its problem."""

    weight: float
    updates: int
    cells: dict[str, Any] | None
    problem: str = ""

    @property
    def score(self) -> tuple[float, ...] | None:
        """Compared by this, the higher the better."""
        return None if self.cells is None else (self.cells["new->old"][CRITERION],)


def _halve(
    comparison: "Comparison", tried: Mapping[str, Sequence[float]], rungs: Sequence[Rung], count: Callable[[], None]
) -> dict[str, list[Trial]]:
    """All trials of each method, rung by rung; all methods get as many runs and updates."""

    def trial(one: tuple[str, float, int]) -> None:
        _trial(comparison, *one)
        count()

    out: dict[str, list[Trial]] = {name: [] for name in tried}
    alive = {name: list(weights) for name, weights in tried.items()}
    for rung in rungs:
        jobs = [(name, weight, rung.updates) for name, weights in alive.items() for weight in weights]
        problems = comparison.each(trial, jobs)
        for name, weights in alive.items():
            found: dict[float, Trial] = {}
            for weight in weights:
                problem = problems[name, weight, rung.updates]
                cells = None if problem else _trial(comparison, name, weight, rung.updates)["cells"]
                found[weight] = Trial(weight, rung.updates, cells, str(problem or ""))
            out[name] += found.values()
            alive[name] = survivors({weight: one.score for weight, one in found.items()})
    return out


def _name(name: str, weight: float) -> str:
    return f"{name}-{weight:g}" if METHODS[name].settings else PARAGON


def _train(comparison: "Comparison", name: str, seed: int, weight: float, updates: int | None = None) -> str:
    called, overrides = _name(name, weight), _overrides(comparison, name, seed, weight)
    if updates not in (None, comparison.steps):
        called, overrides = f"{called}-{updates}", [*overrides, f"train.steps={updates}"]
    if METHODS[name].settings:
        comparison.train(seed, called, PARAGON, overrides, OLD)
    return called


def _overrides(comparison: "Comparison", name: str, seed: int, weight: float) -> list[str]:
    folder = comparison.folder(seed)
    return METHODS[name].overrides(folder / f"{OLD}-bank", folder / f"{OLD}.npy", weight)


def _trial(comparison: "Comparison", name: str, weight: float, updates: int) -> dict[str, Any]:
    return comparison.measure(0, "validation", OLD, _train(comparison, name, 0, weight, updates))


def _final(comparison: "Comparison", name: str, seed: int, weight: float) -> dict[str, Any]:
    return comparison.measure(seed, "unseen", OLD, _train(comparison, name, seed, weight), PARAGON)


def _choose(name: str, trials: Sequence[Trial]) -> dict[str, Any]:
    """The trial of the last rung with the best validation figure; weight None when every trial failed."""
    method = METHODS[name]
    good = [one for one in trials if one.cells is not None]
    last = [one for one in good if one.updates == trials[-1].updates]
    best = max(last, key=lambda one: one.score or (), default=None)
    return {
        "title": method.title,
        "weight": (None if best is None else best.weight) if method.settings else method.low,
        "trials": [{"weight": one.weight, "updates": one.updates, "validation": one.cells} for one in good],
        "problems": [one.problem for one in trials if one.cells is None],
    }


def spreads(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """name → metric → mean and standard deviation over the seeds: cells, update gain and cost."""
    out: dict[str, Any] = {}
    for one in runs:
        parts = {**one["cells"], **{key: one[key] for key in ("update_gain", "cost") if key in one}}
        for name, values in parts.items():
            for metric, value in values.items():
                out.setdefault(name, {}).setdefault(metric, []).append(value)
    return {name: {metric: _spread(v) for metric, v in values.items()} for name, values in out.items()}


def _spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    deviation = statistics.stdev(known) if len(known) > 1 else None
    return {"mean": statistics.fmean(known), "deviation": deviation, "seeds": len(known)}


@contextmanager
def counting(total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error that moves on by one with each call; lines where that is no terminal."""
    from tools.progress import progress_bar

    done, lock = 0, threading.Lock()
    with progress_bar("pieces made", sys.stderr.isatty()) as update:

        def count() -> None:
            nonlocal done
            with lock:
                done += 1
                if update is not None:
                    update(done, total)
                else:
                    print(f"{done} of {total} pieces made", file=sys.stderr)

        yield count


# ---- reporting ----

_COLUMNS = [
    *((cell, metric) for cell in SHOWN for metric in METRICS),
    *((what, CRITERION) for what in ("update_gain", "cost")),
]


def _rows(figures: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table: the old model's, its centres' and the paragon's own figures, then every method's."""
    titles = {"new->old": "new → old", "new->new": "new → new", "update_gain": "update gain", "cost": "cost"}
    short = {CRITERION: "TAR", "rank-1": "rank-1"}
    spreads, why = [one["spread"] for one in figures["methods"].values()], no_gain(figures)
    columns = [column for column in _COLUMNS if any(column[0] in spread for spread in spreads)]
    head = ["method", "weight", *(f"{titles[part]} {short[metric]}" for part, metric in columns)]
    own = {cell: [_text(values[metric]) for metric in METRICS] for cell, values in figures["base"].items()}
    lines = [
        ["old → old", "", *own["old->old"], *[""] * (len(columns) - 2)],
        ["old centre → old", "", *own["centre->old"], *[""] * (len(columns) - 2)],
        ["paragon → paragon", "", "", "", *own["paragon->paragon"], *[""] * (len(columns) - 4)],
    ]
    timed = any("update_time" in one for one in figures["methods"].values())
    if timed:
        head, lines = [*head, "time of an update ÷ paragon's"], [[*line, ""] for line in lines]
    for name, one in figures["methods"].items():
        weight = f"{one['weight']:g}" if METHODS[name].settings and one["weight"] else ""
        spread = one["spread"]
        cells = [_shown(part, spread[part][metric], why) if spread else "failed" for part, metric in columns]
        time = [f"{one['update_time']:.2f}" if "update_time" in one else "–"] if timed else []
        lines.append([one["title"], weight, *cells, *time])
    return head, lines


def _shown(part: str, value: dict[str, Any] | None, why: str) -> str:
    """A gain below 0 is no share of a way, nor is one of a way that may be none (see :func:`no_gain`)."""
    return _text(None if part == "update_gain" and value is not None and (why or value["mean"] < 0) else value)


def no_gain(figures: dict[str, Any]) -> str:
    """Why update gains by TAR say nothing here; empty where they do: the paragon must be clearly above the old model,
    or the gain divides by what may be 0."""
    from tools.results.paired import room, text

    found = room(figures, CRITERION)
    if found is None or found.low > 0:
        return ""
    return f"paragon − old is {text(found)}, so that a share of it says nothing"


def _text(value: dict[str, Any] | None) -> str:
    if value is None:
        return "–"
    return f"{value['mean']:.3f}" + ("" if value["deviation"] is None else f" ± {value['deviation']:.3f}")


def _table(figures: dict[str, Any]) -> "Table":
    from rich.table import Table

    head, lines = _rows(figures)
    table = Table(*head, title=f"{figures['data']}, unseen identities, {figures['seeds']} seed(s); TAR at FAR 1e-4")
    for line in lines:
        table.add_row(*line)
    return table


def markdown(figures: dict[str, Any]) -> str:
    """Both tables as Markdown: the figures, and how the weights were chosen."""
    head, lines = _rows(figures)
    text = [
        f"{figures['data']}: {figures['classes']:,} training identities{_drawn(figures)}, "
        f"{figures['old_classes']:,} of them the old model's; {figures['steps']:,} updates; measured on unseen "
        f"identities, TAR at FAR 1e-4; mean ± standard deviation of {figures['seeds']} seed(s); "
        f"{figures['machine']}, commit {figures['commit']}.",
        "",
        *_markdown_rows(head, lines),
        "",
        "Old centre → old: queries at the mean of an identity's other old embeddings, where LCE pulls the new ones. "
        "An update gain of –: new → old is below old → old, or the paragon is no better than the old model.",
        *(f"\nNo update gain by TAR: {why}." for why in [no_gain(figures)] if why),
        *_paired(figures),
        *(f"\n{one['title']}: {problem}" for one in figures["methods"].values() for problem in one["problems"]),
    ]
    if any("+" in name for name in figures["methods"]):
        text += [
            "",
            "Methods together: each weight at the same point of its logarithmic range; the first one's is shown.",
        ]
    if figures["chosen_by"] == "an earlier run":
        chosen = "Weights: as an earlier run chose them, on its validation identities; some may be unseen ones here."
        return "\n".join([*text, "", chosen]) + "\n"
    text += [
        "",
        f"Weights, chosen with seed 0 on the validation identities among {figures['trials']} each, by the highest "
        f"{CRITERION.replace('=', ' ')} of new → old ({METRICS[1]} next to it):",
        "",
    ]
    columns = max(figures["trials"], *(len(one["trials"]) for one in figures["methods"].values()))
    trials = [
        [
            one["title"],
            *(_trial_text(trial, figures["steps"]) for trial in one["trials"]),
            *["failed" if one["problems"] else ""] * (columns - len(one["trials"])),
        ]
        for one in figures["methods"].values()
        if one["trials"] or one["problems"]
    ]
    return "\n".join([*text, *_markdown_rows(["method", *["weight: result"] * columns], trials)]) + "\n"


def _drawn(figures: dict[str, Any]) -> str:
    return f" in {len(figures['typefaces'])} typefaces" if "typefaces" in figures else ""


def _paired(figures: dict[str, Any]) -> list[str]:
    """LCE's lead over each other method as a table, where the figures hold what is needed."""
    from tools.results.paired import common, difference, over_runs, text

    lce = figures["methods"].get("lce", {}).get("seeds", [])
    lines: list[list[str]] = []
    over = set[str]()
    for name, one in figures["methods"].items():
        if name in ("independent", "lce"):
            continue
        kind = "identities" if len(common(lce, one["seeds"])) == 1 else "identities and seeds"
        found = [difference(lce, one["seeds"], metric) for metric in METRICS]
        if None in found:
            found, kind = [over_runs(lce, one["seeds"], metric) for metric in METRICS], "seeds"
        if None not in found:
            over.add(kind)
            lines.append([one["title"], *(text(interval) for interval in found if interval is not None), kind])
    if not lines:
        return []
    if len(over) == 1:
        lines = [line[:-1] for line in lines]
    each = f", paired over {over.pop()}" if len(over) == 1 else ""
    return [
        "",
        f"LCE less each other method, new → old, on the same identities; 95 % intervals{each}:",
        "",
        *_markdown_rows(["LCE −", "TAR", "rank-1", "over"][: len(lines[0])], lines),
    ]


def _trial_text(trial: dict[str, Any], steps: int) -> str:
    found, updates = trial["validation"]["new->old"], trial.get("updates", steps)  # older figures do not say
    short = "" if updates == steps else f" ({updates:,} updates)"
    return f"{trial['weight']:g}{short}: {found[CRITERION]:.3f} / {found['rank-1']:.3f}"


def _markdown_rows(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]
