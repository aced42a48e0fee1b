"""Choose the weights of a method, or of several methods together, by what the new model finds in the old gallery.

  lce tune new.yaml --old runs/old --validation packed@splits/tune.npy --out tuned
  lce tune new.yaml --old runs/old --validation packed@splits/tune.npy --out tuned --range lce=5:40 --nproc 8
  lce launch new.yaml tuned/chosen.yaml               # trains with what was chosen

Successive halving: --candidates choices of weights get a training run of --updates each; the better half of them gets
runs of twice as many updates, as often as --rungs says. Better is the higher TAR of new→old at --far on the validation
identities, then the higher rank-1. These must be identities that nobody trains on, and others than those that are
reported later (lce split --tune sets some aside). All weights of one method get the same value.

--out holds everything: chosen.yaml (a layer for lce launch), tune.json, tune.png, and the runs. The same command
continues where it was interrupted and repeats no finished run. A run that diverged is left out; anything else that ends
a run ends the search. Exit status: 0 chosen; 1 all runs of one length diverged; 2 wrong use; 70 a run crashed; 75 and
130 stopped, to be continued.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.arguments import above_zero, whole_number
from tools.tuning import RANGES, Range, best_first, points, rung_sizes, survivors

if TYPE_CHECKING:
    from trainer.compat.methods.inputs import Inputs
    from trainer.data import Dataset
    from trainer.evaluation.embeddings import EmbeddingCache
    from trainer.models.model import EmbeddingModel
    from trainer.run.config import Config

HELP = "choose the weights of compatible training by validation identities"

OWN_STATUSES = (2, 75, 130)
Weights = tuple[float, ...]


class Diverged(Exception):
    """A candidate whose training run cannot usefully go on, or whose model gives no embeddings."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``lce tune``."""
    parser.add_argument("config", type=Path, help="the new model's YAML file, as lce launch takes it")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="or a further YAML file")
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
    from trainer.owner import owned

    with owned(args.out, ConfigError, lock=args.out / ".owner"):
        search = Search.opened(args)
        try:
            with interruptible():
                figures = search.made()
        except OSError as error:
            raise ConfigError(f"--out {args.out}: cannot be written: {error.strerror or error}") from None
        except StepFailed as stopped:
            for line in (stopped, *getattr(stopped, "__notes__", ())):
                print(f"lce tune: {line}", file=sys.stderr)
            return stopped.status if stopped.status in OWN_STATUSES else 70
    write_json(figures, args.json)
    if figures["chosen"] is None:
        for run_ in figures["rungs"][-1]["runs"]:
            print(f"lce tune: {run_['name']}: {run_['problem']}", file=sys.stderr)
        return 1
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
        """Open and check everything that the runs need.

        Raises:
            LceError: one of them is wrong. ModuleNotFoundError: the plot's package is not installed.
        """
        import matplotlib  # noqa: F401
        import numpy as np

        from trainer.compat.methods.config import LceCrossConfig
        from trainer.data import open_named
        from trainer.errors import ConfigError
        from trainer.models.open import load_model
        from trainer.run.config import load_config
        from trainer.run.startup import check

        if args.json not in (None, "-") and not Path(args.json).absolute().parent.is_dir():
            raise ConfigError(f"--json {args.json}: the folder {Path(args.json).absolute().parent} does not exist")
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
        _check_old(args.old, old.hash, inputs)
        kept = hashlib.sha256(np.ascontiguousarray(validation.labels).tobytes()).hexdigest()
        origin = [old.hash, validation.fingerprint, kept, f"{args.far:g}"]
        origin += [inputs.bank.fingerprint] if inputs.bank is not None else []
        origin += [inputs.old.fingerprint] if inputs.old is not None else []
        origin += [inputs.dataset.fingerprint] if inputs.dataset is not None else []
        origin += [_content(path) for path in (config.backbone.weights, config.head.weights) if path is not None]
        search = cls(args, config, ranges, old, validation, _shared(inputs.dataset, validation), origin)
        search.check_candidates(inputs)
        return search

    def check_candidates(self, inputs: "Inputs") -> None:
        """Resolve every run that may be. Raises :class:`ConfigError`: one cannot be; its candidate is named."""
        from trainer.compat.methods.registry import check_methods
        from trainer.errors import ConfigError, LceError
        from trainer.run.config import load_config

        with tempfile.TemporaryDirectory() as folder:
            for weights in points(self.ranges, self.args.candidates):
                layer = Path(folder) / f"{self.name(weights)}.yaml"
                layer.write_text(self.layer(weights), encoding="utf-8")
                for updates in self.lengths:
                    overrides = _settings(self.args, self.args.out / "runs" / "check", updates, layer)
                    try:
                        config = load_config(self.args.config, overrides)
                        check_methods(config.methods, config, inputs)
                    except LceError as error:
                        reason = str(error).replace(f"{folder}/", "")
                        raise ConfigError(f"candidate {self.name(weights)}, {updates:,} updates: {reason}") from None

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

    @property
    def lengths(self) -> list[int]:
        """The updates of each rung's runs."""
        return [self.args.updates * 2**rung for rung in range(self.args.rungs)]

    def made(self) -> dict[str, Any]:
        """Search, and write what was found to --out, ``chosen.yaml`` last.

        Returns:
            What the JSON holds.

        Raises:
            StepFailed: a run was stopped or failed. OSError: --out cannot be written. LceError: as :meth:`measured`.
        """
        from tools.output import write_json
        from trainer.files import write_text

        chosen, drawn = self.args.out / "chosen.yaml", self.args.out / "tune.png"
        for file in (chosen, drawn):
            file.unlink(missing_ok=True)  # of a search before
        figures = self.figures(self.halve())
        write_json(figures, self.args.out / "tune.json")
        if figures["chosen"] is not None:
            plot(figures, drawn)
            write_text(chosen, self.layer(tuple(figures["chosen"].values())))
        return figures

    def halve(self) -> list[dict[str, Any]]:
        """All rungs. Raises :class:`StepFailed`: a run was stopped or failed; the same command continues."""
        from tools.progress import progress_bar

        self.embed("old", self.old)
        alive: Sequence[Weights] = points(self.ranges, self.args.candidates)
        total, done, rungs = sum(rung_sizes(len(alive), self.args.rungs)), 0, []
        with progress_bar("training runs", sys.stderr.isatty()) as update:
            for updates in self.lengths:
                runs = {}
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
        """One candidate's figures after a training run of so many updates, or its problem, where it diverged.

        Raises:
            StepFailed: the run ended otherwise. LceError: its model cannot be opened or compared.
        """
        from tools.steps import StepFailed, Steps
        from trainer.files import write_text
        from trainer.run.config import dump_config, load_config

        name = f"{self.name(weights)}-{updates}"
        folder, layer = self.args.out / "runs" / name, self.args.out / "layers" / f"{self.name(weights)}.yaml"
        figures, log = self.args.out / "figures" / f"{name}.json", self.args.out / "output" / f"{name}.txt"
        for file in (layer, figures, log):
            file.parent.mkdir(parents=True, exist_ok=True)
        write_text(layer, self.layer(weights))
        overrides = _settings(self.args, folder, updates, layer)
        key = [dump_config(load_config(self.args.config, overrides)), *self.origin]
        one = {"name": name, "weights": dict(zip(self.names, weights, strict=True)), "updates": updates}

        def action() -> None:
            try:
                train([str(self.args.config), *overrides, "--nproc", str(self.args.nproc)], log)
            except StepFailed as failed:
                reason = _divergence(log) if failed.status == 2 else None
                if reason is not None:
                    raise Diverged(reason) from None
                failed.add_note(f"{name}: {_last_line(log)} (all of it: {log})")
                raise
            write_text(figures, json.dumps(self.measure(folder)))

        try:
            Steps(self.args.out / "stamps" / name, lambda line: None).run(
                "run", "", key, [folder, figures], action, continues=True
            )
        except Diverged as diverged:
            return {**one, "problem": str(diverged)}
        return {**one, "cells": json.loads(figures.read_text())}

    @property
    def cache(self) -> "EmbeddingCache":
        """The validation set's embeddings by model."""
        from trainer.evaluation.embeddings import EmbeddingCache

        return EmbeddingCache(self.args.out / "embeddings")

    def embed(self, role: str, model: "EmbeddingModel") -> None:
        """Embed the validation set, to be found in the cache. Raises :class:`LceError`: the model gives no embeddings,
        or an image cannot be read."""
        from trainer.distributed import Ranks
        from trainer.evaluation.embeddings import embed_spaces

        embed_spaces("validation", {role: model}, self.validation, self.validation.kept, self.cache, Ranks())

    def measure(self, run_folder: Path) -> dict[str, dict[str, float]]:
        """What queries find in galleries: "query->gallery" → metric → value. Raises :class:`Diverged`: the new model
        gives no unit embeddings. LceError: no model, or the two cannot be compared."""
        from trainer.distributed import Ranks
        from trainer.errors import ModelError
        from trainer.evaluation.embeddings import embed_set
        from trainer.evaluation.results import Options, measure_cells
        from trainer.models.open import load_model

        new = load_model(run_folder)
        try:
            self.embed("new", new)
        except ModelError as error:
            raise Diverged(str(error)) from None
        one = embed_set("validation", {"old": self.old, "new": new}, self.validation, self.cache, Ranks())
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


def train(arguments: Sequence[str], log: Path) -> None:
    """One training run as a process of its own, its output to ``log``. Raises :class:`StepFailed`."""
    from tools.steps import run_lce

    with log.open("wb") as stream:
        run_lce(["launch", *arguments], stdout=stream.fileno(), stderr=stream.fileno())


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
        tried = {one["weights"][name] for one in figures["rungs"][0]["runs"]}
        if len(tried) > 1 and value in (min(tried), max(tried)):
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


def _check_old(name: str, hash_: str, inputs: "Inputs") -> None:
    """Refuse a --old that is another model than the one that the runs are made compatible with, as far as it is known.
    Raises :class:`ConfigError`."""
    from trainer.compat.methods.old_embeddings import StoredEmbeddings
    from trainer.data.index import rows_info
    from trainer.errors import ConfigError

    known: dict[str, str | None] = {}
    if inputs.bank is not None:
        known["the centre bank is of"] = inputs.bank.info.model_hash
    if isinstance(inputs.old, StoredEmbeddings):
        described = rows_info(inputs.old.path)
        known[f"{inputs.old.path} holds embeddings of"] = None if described is None else described.model_hash
    elif inputs.old is not None and inputs.old.model is not None:
        known[f"compat.old_model = {inputs.old.model[0]} is"] = inputs.old.model[1]
    for what, other in known.items():
        if other is None:
            print(f"lce tune: nothing tells whether {what} the model --old {name}: make sure of it", file=sys.stderr)
        elif other != hash_:
            raise ConfigError(f"--old {name}: {what} another model ({other[:12]}, not {hash_[:12]})")


def _content(path: Path) -> str:
    """A checksum of a file, or of all files in a folder."""
    from trainer.files import checksum

    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    return json.dumps([[str(one.relative_to(path)), *checksum(one)] for one in files])


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

    both = [named_identities(one) for one in (validation, training) if one is not None]
    found = [one for one in both if one is not None]
    if len(found) < 2:
        return None
    shared = found[0][0].shared(found[1][0])
    return None if shared is None else int(shared.sum())


def _line(one: dict[str, Any]) -> str:
    if "problem" in one:
        return f"{one['name']}: {one['problem']}"
    values = ", ".join(f"{metric} {value:.3f}" for metric, value in one["cells"]["new->old"].items())
    return f"{one['name']}: new→old {values}"


def _divergence(log: Path) -> str | None:
    """Why a run says that it cannot usefully go on; None: it does not say so."""
    from trainer.errors import DIVERGED

    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return next((line.partition(DIVERGED)[2] for line in lines if DIVERGED in line), None)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    return lines[-1] if lines else "no output"
