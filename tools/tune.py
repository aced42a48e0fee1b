"""Choose the weights of a method, or of several methods together, by what the new model finds in the old gallery.

  lce tune new.yaml --old runs/old --validation packed@splits/tune.npy --out tuned
  lce tune new.yaml --old runs/old --validation packed@splits/tune.npy --out tuned --range lce=5:40 --nproc 8
  lce launch new.yaml tuned/chosen.yaml               # trains with what was chosen

Successive halving: --candidates choices of weights get a training run of --updates each; the better half of them gets
runs of twice as many updates, as often as --rungs says. Better is the higher TAR of new→old at --far on the validation
identities, then the higher rank-1. These must be identities that nobody trains on, and others than those that are
reported later (lce split --tune sets some aside). All weights of one method get the same value.

--out holds everything: chosen.yaml (a layer for lce launch), tune.json, tune.png, and the runs. The same command
continues where it was interrupted and repeats no finished run. Exit status: 0 chosen; 1 no candidate could be trained;
2 wrong use; 75 and 130 stopped, to be continued.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.arguments import above_zero, whole_number
from tools.tuning import RANGES, Range, best_first, points, rung_sizes, survivors

if TYPE_CHECKING:
    from trainer.data import Dataset
    from trainer.models.model import EmbeddingModel
    from trainer.run.config import Config

HELP = "choose the weights of compatible training by validation identities"

STOPPED = (75, 130)
Weights = tuple[float, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``lce tune``."""
    parser.add_argument("config", type=Path, help="the new model's YAML file, as lce launch takes it")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="or a further YAML file")
    parser.add_argument("--old", required=True, metavar="MODEL", help="the deployed model")
    parser.add_argument(
        "--validation", required=True, metavar="DATASET[@LABELS.npy]", help="identities that nobody trains on"
    )
    parser.add_argument("--out", type=Path, default=Path("tuned"), help="folder of everything (tuned)")
    parser.add_argument("--candidates", type=whole_number(1), default=8, help="choices of weights to begin with (8)")
    parser.add_argument("--updates", type=whole_number(1), default=1500, help="updates of a first run (1,500)")
    parser.add_argument("--rungs", type=whole_number(1), default=2, help="lengths of runs, each twice the last (2)")
    parser.add_argument(
        "--range",
        action="append",
        default=[],
        metavar="METHOD=LOW:HIGH",
        help="weights to try, evenly in their logarithm (lce 2:60, bct and unibct 0.3:10, l2 3.1:97, …)",
    )
    parser.add_argument("--far", type=above_zero, default=1e-4, help="false accept rate of the figure (1e-4)")
    parser.add_argument("--nproc", type=whole_number(1), default=1, help="processes of a training run (1)")
    parser.add_argument("--json", metavar="FILE", help="the figures as JSON; - for standard output")


def run(args: argparse.Namespace) -> int:
    """Train, measure, choose; returns the exit status."""
    from tools.output import table_console, write_json
    from tools.steps import StepFailed, interruptible
    from trainer.errors import ConfigError
    from trainer.files import write_text

    search = Search.opened(args)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with interruptible():
            rungs = search.halve()
    except OSError as error:
        raise ConfigError(f"--out {args.out}: cannot be written: {error.strerror}") from None
    except StepFailed as stopped:
        print(f"lce tune: {stopped}", file=sys.stderr)
        return stopped.status
    figures = search.figures(rungs)
    write_json(figures, args.out / "tune.json")
    write_json(figures, args.json)
    if figures["chosen"] is None:
        for run_ in figures["rungs"][0]["runs"]:
            print(f"lce tune: {run_['name']}: {run_['problem']}", file=sys.stderr)
        return 1
    layer = search.layer(tuple(figures["chosen"].values()))
    write_text(args.out / "chosen.yaml", layer)
    plot(figures, args.out / "tune.png")
    console = table_console(args.json, 120)
    for line in summary(figures, args.out):
        console.print(line, soft_wrap=True, markup=False)
    return 0


@dataclass
class Search:
    """What is tried, on what.

    Attributes:
        config: of the first run's length. methods, ranges: of its methods. old, validation: opened.
        shared: validation identities that share a name with training identities; None: cannot be told.
        origin: what else a finished run's figures depend on.
    """

    args: argparse.Namespace
    config: "Config"
    ranges: list[Range]
    old: "EmbeddingModel"
    validation: "Dataset"
    shared: int | None
    origin: list[str]

    @classmethod
    def opened(cls, args: argparse.Namespace) -> "Search":
        """Open and check everything that the runs need. Raises :class:`LceError`."""
        import numpy as np

        from trainer.compat.methods.config import LceCrossConfig
        from trainer.data import open_named
        from trainer.errors import ConfigError
        from trainer.models.open import load_model
        from trainer.run.config import load_config
        from trainer.run.startup import check

        config = load_config(args.config, _settings(args, args.out / "runs" / "check", args.updates))
        if not config.methods:
            raise ConfigError(f"{args.config}: compat.method is none: there are no weights to choose")
        if isinstance(config.methods[0], LceCrossConfig):
            raise ConfigError(f"{args.config}: compat.mode is cross-model: nothing is weighed against a classification")
        without = [one.method for one in config.methods if one.method not in RANGES]
        if without:
            raise ConfigError(f"{args.config}: compat.method {', '.join(without)} has no weight to choose")
        ranges = _ranges([one.method for one in config.methods], args.range)
        validation = open_named(args.validation)
        _check_far(validation, args.far)
        inputs = check(config, args.nproc)
        old = load_model(args.old)
        named = (inputs.bank.info.model_hash if inputs.bank is not None else None) or old.hash
        if named != old.hash:
            raise ConfigError(
                f"--old {args.old}: the centre bank is of another model ({named[:12]}, not {old.hash[:12]})"
            )
        kept = hashlib.sha256(np.ascontiguousarray(validation.labels).tobytes()).hexdigest()
        origin = [old.hash, validation.fingerprint, kept, f"{args.far:g}"]
        origin += [inputs.bank.fingerprint] if inputs.bank is not None else []
        origin += [inputs.dataset.fingerprint] if inputs.dataset is not None else []
        return cls(args, config, ranges, old, validation, _shared(inputs.dataset, validation), origin)

    @property
    def names(self) -> list[str]:
        """The methods."""
        return [one.method for one in self.config.methods]

    def layer(self, weights: Weights) -> str:
        """The section ``compat`` with these weights, as a YAML file that goes behind the configuration."""
        import yaml

        sections = []
        for one, area, value in zip(self.config.methods, self.ranges, weights, strict=True):
            given = one.model_dump(mode="json", exclude_unset=True)
            sections.append({"method": one.method, **given, **dict.fromkeys(area.keys, value)})
        compat = sections if len(sections) > 1 else sections[0]
        return f"# {self.name(weights)}, by lce tune\n" + yaml.safe_dump({"compat": compat}, sort_keys=False)

    def name(self, weights: Weights) -> str:
        """What a candidate's files are called."""
        return "-".join(f"{method}{value:g}" for method, value in zip(self.names, weights, strict=True))

    def halve(self) -> list[dict[str, Any]]:
        """All rungs. Raises :class:`StepFailed`: a run was stopped; the same command continues."""
        from tools.progress import progress_bar

        alive: Sequence[Weights] = points(self.ranges, self.args.candidates)
        total, done, rungs = sum(rung_sizes(len(alive), self.args.rungs)), 0, []
        with progress_bar("training runs", sys.stderr.isatty()) as update:
            for rung in range(self.args.rungs):
                updates, runs = self.args.updates * 2**rung, {}
                for weights in alive:
                    runs[weights] = self.measured(weights, updates)
                    done += 1
                    if update is not None:
                        update(done, total)
                    else:
                        print(f"{done} of {total}: {_line(runs[weights])}", file=sys.stderr)
                rungs.append({"updates": updates, "runs": list(runs.values())})
                alive = survivors({weights: score(one) for weights, one in runs.items()})
                if not alive:
                    break
        return rungs

    def measured(self, weights: Weights, updates: int) -> dict[str, Any]:
        """One candidate's figures after a training run of so many updates, or its problem."""
        from tools.steps import StepFailed, Steps
        from trainer.errors import LceError
        from trainer.files import write_text
        from trainer.run.config import dump_config, load_config

        name = f"{self.name(weights)}-{updates}"
        folder, layer = self.args.out / "runs" / name, self.args.out / "layers" / f"{self.name(weights)}.yaml"
        figures, log = self.args.out / "figures" / f"{name}.json", self.args.out / "output" / f"{name}.txt"
        for place in (layer, figures, log):
            place.parent.mkdir(parents=True, exist_ok=True)
        write_text(layer, self.layer(weights))
        words = _settings(self.args, folder, updates, layer)
        key = [dump_config(load_config(self.args.config, words)), *self.origin]
        one = {"name": name, "weights": dict(zip(self.names, weights, strict=True)), "updates": updates}

        def action() -> None:
            train([str(self.args.config), *words, "--nproc", str(self.args.nproc)], log)
            write_text(figures, json.dumps(self.measure(folder)))

        try:
            Steps(self.args.out / "stamps" / name, lambda line: None).run(
                "run", "", key, [folder, figures], action, continues=True
            )
        except StepFailed as failed:
            if failed.status in STOPPED:
                raise
            return {**one, "problem": f"{_last_line(log)} (exit status {failed.status}; all of it: {log})"}
        except LceError as error:
            return {**one, "problem": str(error)}
        return {**one, "cells": json.loads(figures.read_text())}

    def measure(self, run_folder: Path) -> dict[str, dict[str, float]]:
        """What queries find in galleries: "query->gallery" → metric → value."""
        from trainer.distributed import Ranks
        from trainer.evaluation.embeddings import EmbeddingCache, embed_set
        from trainer.evaluation.results import Options, measure_cells
        from trainer.models.open import load_model

        models = {"old": self.old, "new": load_model(run_folder)}
        cache = EmbeddingCache(self.args.out / "embeddings")
        one = embed_set("validation", models, self.validation, cache, Ranks())
        cells = measure_cells(one, Options(fars=(self.args.far,), replicates=2), lambda stage: None)
        return {f"{query}->{gallery}": dict(cell.value) for (query, gallery), cell in cells.items()}

    def figures(self, rungs: list[dict[str, Any]]) -> dict[str, Any]:
        """What the JSON holds."""
        from tools.measuring import origin

        last = {one["name"]: one for one in rungs[-1]["runs"]}
        order = best_first({name: score(one) for name, one in last.items()})
        best = last[order[0]] if order else None
        areas = zip(self.names, self.ranges, strict=True)
        return {
            "tune": self.names,
            "far": self.args.far,
            "ranges": {name: {"keys": list(area.keys), "low": area.low, "high": area.high} for name, area in areas},
            "validation": {"set": self.args.validation, "shared_identities": self.shared},
            "budget_updates": sum(rung["updates"] * len(rung["runs"]) for rung in rungs),
            "rungs": rungs,
            "chosen": None if best is None else best["weights"],
            "cells": None if best is None else best["cells"],
            **origin(),
        }


def train(words: Sequence[str], log: Path) -> None:
    """One training run as a process of its own, its output to ``log``. Raises :class:`StepFailed`."""
    from tools.steps import run_lce

    with log.open("wb") as stream:
        run_lce(["launch", *words], stdout=stream.fileno(), stderr=stream.fileno())


def score(one: dict[str, Any]) -> tuple[float, ...] | None:
    """What candidates are compared by, the higher the better; None: it could not be trained."""
    return None if "cells" not in one else tuple(one["cells"]["new->old"].values())


def summary(figures: dict[str, Any], out: Path) -> list[str]:
    """What the command prints."""
    lines = [_line(one) for rung in figures["rungs"] for one in rung["runs"]]
    new, old = (figures["cells"][cell] for cell in ("new->old", "old->old"))
    metric = next(iter(new))
    chosen = ", ".join(f"{name} {value:g}" for name, value in figures["chosen"].items())
    lines += ["", f"chosen: {chosen}, after {figures['budget_updates']:,} updates in all"]
    word = "above" if new[metric] > old[metric] else "NOT above"
    lines.append(f"new→old {metric} {new[metric]:.3f}: {word} old→old, {old[metric]:.3f}, on the validation identities")
    for name, value in figures["chosen"].items():
        area = figures["ranges"][name]
        if value in (area["low"], area["high"]) and area["low"] < area["high"]:
            lines.append(f"{name} {value:g} is at the end of what was tried: widen it by --range {name}=LOW:HIGH")
    if figures["validation"]["shared_identities"]:
        lines.append(
            f"{figures['validation']['shared_identities']} validation identities share a name with training "
            "identities: if they are the same, the figures are of what was learned by heart"
        )
    return [*lines, f"train with them: lce launch CONFIG {out / 'chosen.yaml'}; all figures and a plot: {out}"]


def plot(figures: dict[str, Any], path: Path) -> None:
    """new→old over each method's weight, a line for each length of runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = figures["tune"]
    panels, axes = pyplot.subplots(1, len(names), figsize=(6 * len(names), 4.5), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for rung in figures["rungs"]:
            good = sorted((one for one in rung["runs"] if "cells" in one), key=lambda one: float(one["weights"][name]))
            style = "o-" if len(names) == 1 else "o"
            axis.plot(
                [one["weights"][name] for one in good],
                [next(iter(one["cells"]["new->old"].values())) for one in good],
                style,
                label=f"{rung['updates']:,} updates",
            )
        axis.axhline(next(iter(figures["cells"]["old->old"].values())), color="grey", ls="--", label="old → old")
        axis.axvline(figures["chosen"][name], color="black", ls=":", label="chosen")
        axis.set_xscale("log")
        axis.set_xlabel(f"weight of {name}")
        axis.set_ylabel(f"new → old TAR at FAR {figures['far']:g}, validation")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    panels.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(panels)


def _settings(args: argparse.Namespace, folder: Path, updates: int, *layers: Path) -> list[str]:
    own = [f"run.dir={folder}", f"train.steps={updates}", "log.progress=false", "log.tensorboard=false"]
    return [*args.overrides, *map(str, layers), *own]


def _ranges(methods: Sequence[str], texts: Sequence[str]) -> list[Range]:
    from trainer.errors import ConfigError

    known = dict(RANGES)
    for text in texts:
        name, _, ends = text.partition("=")
        low, _, high = ends.partition(":")
        if name not in methods:
            raise ConfigError(f"--range {text}: the configuration's methods are {', '.join(methods)}")
        try:
            area = Range(known[name].keys, float(low), float(high))
        except ValueError:
            raise ConfigError(f"--range {text}: expected METHOD=LOW:HIGH, for example lce=2:60") from None
        if not 0 < area.low <= area.high < float("inf"):
            raise ConfigError(f"--range {text}: expected 0 < LOW ≤ HIGH")
        known[name] = area
    return [known[name] for name in methods]


def _check_far(validation: "Dataset", far: float) -> None:
    """Refuse a rate that the set has too few pairs for."""
    import numpy as np

    from trainer.errors import ConfigError
    from trainer.evaluation.verdict import Rules

    labels = np.asarray(validation.labels)
    sizes = np.unique(labels[labels >= 0], return_counts=True)[1].astype(np.int64)
    pairs = int(sizes.sum() ** 2 - (sizes**2).sum()) // 2
    least = Rules().min_false_accepts
    if far * pairs < least:
        smallest = f"use --far {least / pairs:.1g} or more" if pairs > least else "take more identities"
        raise ConfigError(f"--far {far:g}: the validation set's {pairs:,} impostor pairs cannot resolve it; {smallest}")


def _shared(training: "Dataset | None", validation: "Dataset") -> int | None:
    from trainer.data.identities import named_identities

    sides = [named_identities(one) for one in (validation, training) if one is not None]
    found = [one for one in sides if one is not None]
    if len(found) < 2:
        return None
    shared = found[0][0].shared(found[1][0])
    return None if shared is None else int(shared.sum())


def _line(one: dict[str, Any]) -> str:
    if "problem" in one:
        return f"{one['name']}: {one['problem']}"
    values = ", ".join(f"{metric} {value:.3f}" for metric, value in one["cells"]["new->old"].items())
    return f"{one['name']}: new→old {values}"


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    return lines[-1] if lines else "no output"
