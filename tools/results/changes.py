"""What may change between two models, and whether the criterion M(new, old) > M(old, old) is met then: one table.

  lce bench changes                                        # all changes under LCE, BCT and AdvBCT
  lce bench changes --kinds loss,two --methods lce,unibct --weights benchmarks/compat.json --json -

The changes are those of the LCE paper (data, loss, architecture, dimension), and two of them at once. Old and new
model have the same recipe and as many updates, and differ in what a change names alone. M is TAR@FAR 1e-4 and rank-1 on
unseen identities. LCE is direct where the dimensions agree and backward where they do not; a method that compares
embeddings as they are cannot be trained there: "not possible". What is done is kept under --out: the same command
continues.

Exit status: 0 the first method meets the criterion in every cell; 1 not so, or a training run failed; 2 wrong use; 130
interrupted.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.results.compat import METRICS

if TYPE_CHECKING:
    from tools.results.comparison import Comparison

HELP = "the criterion new→old above old→old, for every kind of change and several methods"

KINDS = ("data", "loss", "architecture", "dimension", "two")
METHODS = "lce,bct,advbct"
NOT_POSSIBLE = "not possible"
_MARGINS = {
    "softmax": "{name: softmax, scale: 32.0}",
    "cosface": "{name: cosface, scale: 32.0, m: 0.2}",
    "arcface": "{name: arcface, scale: 32.0, m: 0.2}",
}
_NETWORKS = {
    "small": ("backbone.name=small",),
    "small_resnet": ("backbone.name=small_resnet",),
    "vit_xs": (
        "backbone.name=vit_xs",
        "backbone.width=null",
        "optimizer={name: adamw, lr: 0.001}",
        "head.optimizer.lr_factor=100",  # the rows keep their learning rate
    ),
}


@dataclass(frozen=True)
class Model:
    """One side of a change.

    Attributes:
        data: ``all``, or the share of the training set that it sees: ``identities`` or ``typefaces``.
    """

    data: str = "all"
    margin: str = "cosface"
    network: str = "small"
    dim: int = 64

    @property
    def name(self) -> str:
        """The old model's training run."""
        return f"{self.data}-{self.margin}-{self.network}-{self.dim}"

    def settings(self, seed_folder: Path) -> list[str]:
        """Overrides of the recipe."""
        overrides = [*_NETWORKS[self.network], f"backbone.dim={self.dim}", f"head.margin={_MARGINS[self.margin]}"]
        return overrides if self.data == "all" else [*overrides, f"data.labels={_table(seed_folder, self.data)}"]


@dataclass(frozen=True)
class Change:
    """What differs between an old and a new model; ``name`` names its training runs."""

    kind: str
    name: str
    title: str
    old: Model
    new: Model


_BASE = Model()
CHANGES = (
    Change("data", "identities", "some → all identities", replace(_BASE, data="identities"), _BASE),
    Change("data", "typefaces", "half → all typefaces", replace(_BASE, data="typefaces"), _BASE),
    Change("loss", "softmax-cosface", "softmax → CosFace", replace(_BASE, margin="softmax"), _BASE),
    Change("loss", "cosface-arcface", "CosFace → ArcFace", _BASE, replace(_BASE, margin="arcface")),
    Change("architecture", "small-resnet", "small → residual", _BASE, replace(_BASE, network="small_resnet")),
    Change(
        "architecture",
        "resnet-vit",
        "residual → ViT",
        replace(_BASE, network="small_resnet"),
        replace(_BASE, network="vit_xs"),
    ),
    Change("dimension", "64-128", "64 → 128", _BASE, replace(_BASE, dim=128)),
    Change("dimension", "128-64", "128 → 64", replace(_BASE, dim=128), _BASE),
    Change(
        "two",
        "loss-network",
        "softmax, small → CosFace, residual",
        replace(_BASE, margin="softmax"),
        replace(_BASE, network="small_resnet"),
    ),
    Change(
        "two",
        "data-network",
        "some identities, small → all, residual",
        replace(_BASE, data="identities"),
        replace(_BASE, network="small_resnet"),
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lce bench changes``."""
    from tools.results.compat import add_data_arguments, add_run_arguments

    add_data_arguments(parser, "those of an old model that sees some (half of them; not of a folder)")
    parser.add_argument("--kinds", default="all", help=f"all, or some of {','.join(KINDS)}")
    parser.add_argument("--methods", default=METHODS, help="of lce bench compat (default: %(default)s)")
    parser.add_argument(
        "--weights", type=Path, metavar="JSON", help="as lce bench compat chose them (else: the middle)"
    )
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 … N−1 (1)")
    parser.add_argument("--steps", type=int, default=800, help="updates of a new model (800)")
    parser.add_argument("--old-steps", type=int, default=800, help="updates of an old model (800)")
    add_run_arguments(parser, "changes", "data.batch_size=64")


def run(args: argparse.Namespace) -> int:
    """Train, measure and report; returns the exit status."""
    from rich.table import Table

    from tools.measuring import origin, write_json
    from tools.output import table_console
    from tools.results import compat
    from tools.results.comparison import source_of
    from tools.steps import interruptible
    from trainer.errors import ConfigError

    if args.seeds < 1:
        raise ConfigError(f"--seeds {args.seeds}: at least 1")
    changes, names = _chosen(args.kinds), _methods(args.methods)
    weights = compat.weights_or_middle(args.weights, names)
    if args.old_classes is None and source_of(args.data).folder is None:
        args.old_classes = (args.classes or compat.CLASSES) // 2
    comparison = compat.make_comparison(args)
    with interruptible():
        lines = check(comparison, changes, names, args.seeds, weights)
    fine = all(line["cells"][names[0]]["met"] for line in lines)
    settings = {**compat.settings_of(args, comparison), "weights": weights, "methods": _titles(names)}
    figures = {"bench": "changes", **settings, "lines": lines, "fine": fine, **origin()}
    write_json(figures, args.json)
    head, rows = table(figures)
    shown = Table(*head, title="TAR at FAR 1e-4 / rank-1 of new → old, unseen identities")
    for row in rows:
        shown.add_row(*row)
    table_console(args.json, 140).print(shown)
    return 0 if fine and not any("problem" in cell for line in lines for cell in line["cells"].values()) else 1


def _chosen(kinds: str) -> list[Change]:
    from trainer.errors import ConfigError

    wanted = KINDS if kinds == "all" else tuple(kinds.split(","))
    unknown = [kind for kind in wanted if kind not in KINDS]
    if unknown:
        raise ConfigError(f"--kinds {kinds}: unknown {', '.join(unknown)}; known: all, {', '.join(KINDS)}")
    return [change for change in CHANGES if change.kind in wanted]


def _methods(text: str) -> list[str]:
    from tools.results.compat import METHODS, check_sizes, names_of
    from trainer.errors import ConfigError

    names = names_of(text)
    check_sizes(names)
    idle = [name for name in names if not METHODS[name].settings]
    if idle:
        raise ConfigError(f"--methods {text}: {', '.join(idle)} is not trained for compatibility")
    return names


def _titles(names: Sequence[str]) -> dict[str, str]:
    from tools.results.compat import METHODS

    return {name: METHODS[name].title.removesuffix(", direct") for name in names}


def fitting(name: str, change: Change) -> str | None:
    """The method of ``lce bench compat`` that ``name`` is between these models; None: it needs equal dimensions."""
    from tools.results.compat import MAPPED

    if change.old.dim == change.new.dim or name in MAPPED:
        return name
    return {"lce": "lce-backward"}.get(name)


def check(
    comparison: "Comparison", changes: Sequence[Change], names: Sequence[str], seeds: int, weights: dict[str, float]
) -> list[dict[str, Any]]:
    """Train and measure each change under each method: a line a change, with a cell for each method.

    Raises:
        LceError: an old model could not be trained (a method that fails has a cell with its ``problem``).
    """
    from tools.results.compat import counting, raise_first

    olds = [(seed, old) for seed in range(seeds) for old in dict.fromkeys(change.old for change in changes)]
    jobs = [
        (seed, change, name) for seed in range(seeds) for change in changes for name in names if fitting(name, change)
    ]
    with counting(seeds + len(olds) + len(jobs)) as count:

        def pictures(seed: int) -> None:
            comparison.pictures(seed)
            _write_tables(comparison, seed)
            count()

        def old(one: tuple[int, Model]) -> None:
            seed, model = one
            overrides = [*model.settings(comparison.folder(seed)), f"train.steps={comparison.old_steps}"]
            comparison.train(seed, model.name, "paragon", overrides)
            comparison.bank(seed, model.name)
            count()

        def new(one: tuple[int, Change, str]) -> None:
            _train(comparison, *one, weights)
            count()

        raise_first(comparison.each(pictures, range(seeds)))
        raise_first(comparison.each(old, olds))
        failed = comparison.each(new, jobs)
    return [
        {
            "kind": change.kind,
            "change": change.title,
            "dims": [change.old.dim, change.new.dim],
            "cells": {name: _cell(comparison, change, name, seeds, weights, failed) for name in names},
        }
        for change in changes
    ]


def _write_tables(comparison: "Comparison", seed: int) -> None:
    """The label tables of the old models that see a part of the training set."""
    import numpy as np

    from trainer.data import open_dataset
    from trainer.data.splitting import SplitOptions, save_tables, split

    dataset = open_dataset(comparison.dataset(seed, "train"))
    typefaces = np.load(comparison.typefaces(seed), allow_pickle=False)
    for data, options in (
        ("identities", SplitOptions("extended-class", comparison.old_classes, seed=seed)),
        ("typefaces", SplitOptions("extended-group", 0.5, seed=seed)),
    ):
        table = split(dataset, options, typefaces)["old"]
        save_tables({data: table}, _table(comparison.folder(seed), data).parent, dataset, "lce bench changes")


def _table(seed_folder: Path, data: str) -> Path:
    return seed_folder / "labels" / f"{data}.npy"


def _train(comparison: "Comparison", seed: int, change: Change, name: str, weights: dict[str, float]) -> None:
    """The new model of a change under a method, and its figures."""
    from tools.results.compat import METHODS

    method, folder, old = fitting(name, change), comparison.folder(seed), change.old.name
    assert method is not None
    overrides = METHODS[method].overrides(folder / f"{old}-bank", folder / f"{old}.npy", weights[name])
    overrides = [*change.new.settings(folder), *overrides]
    comparison.train(seed, _run_name(change, name, weights), "paragon", overrides, old)
    _measured(comparison, seed, change, name, weights)


def _run_name(change: Change, name: str, weights: dict[str, float]) -> str:
    return f"{change.name}-{fitting(name, change)}-{weights[name]:g}"


def _measured(
    comparison: "Comparison", seed: int, change: Change, name: str, weights: dict[str, float]
) -> dict[str, Any]:
    """What the trained model finds, by cell."""
    run = _run_name(change, name, weights)
    cells: dict[str, Any] = comparison.measure(seed, "unseen", change.old.name, run)["cells"]
    return cells


def _cell(
    comparison: "Comparison",
    change: Change,
    name: str,
    seeds: int,
    weights: dict[str, float],
    failed: dict[tuple[int, Change, str], Any],
) -> dict[str, Any]:
    """What a method reached, as the JSON holds it: ``met``, and ``method`` with ``seeds``, or why there is nothing."""
    if fitting(name, change) is None:
        return {"met": False, "reason": NOT_POSSIBLE}
    problems = [str(failed[seed, change, name]) for seed in range(seeds) if failed[seed, change, name] is not None]
    if problems:
        return {"met": False, "reason": "failed", "problem": problems[0]}
    found = []
    for seed in range(seeds):
        cells = _measured(comparison, seed, change, name, weights)
        found.append({"seed": seed, **{cell: cells[cell] for cell in ("old->old", "new->old", "new->new")}})
    met = {metric: all(one["new->old"][metric] > one["old->old"][metric] for one in found) for metric in METRICS}
    return {"met": all(met.values()), "by": met, "method": fitting(name, change), "seeds": found}


def means(cell: dict[str, Any], which: str) -> dict[str, float] | None:
    """The mean over the seeds of a cell's ``which`` (``new->old``) by metric; None: it was not measured."""
    if "seeds" not in cell:
        return None
    return {metric: sum(one[which][metric] for one in cell["seeds"]) / len(cell["seeds"]) for metric in METRICS}


def table(figures: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and lines: the old model's own figures, then each method's with whether the criterion is met."""
    head, rows = ["change", "old → new", "old → old", *figures["methods"].values()], []
    for line in figures["lines"]:
        own = next((found for cell in line["cells"].values() if (found := means(cell, "old->old"))), None)
        cells = [_text(line["cells"][name], line["dims"]) for name in figures["methods"]]
        rows.append([line["kind"], line["change"], "–" if own is None else _pair(own), *cells])
    return head, rows


def _text(cell: dict[str, Any], dims: Sequence[int]) -> str:
    found = means(cell, "new->old")
    if found is None:
        return str(cell["reason"])
    missed = [name for name, met in zip(("TAR", "rank-1"), cell["by"].values(), strict=True) if not met]
    mode = ", backward" if cell["method"].endswith("backward") and dims[0] != dims[1] else ""
    return f"{_pair(found)} {'not by ' + ' and '.join(missed) if missed else 'met'}{mode}"


def _pair(values: dict[str, float]) -> str:
    return " / ".join(f"{values[metric]:.3f}" for metric in METRICS)


def markdown(figures: dict[str, Any]) -> str:
    """The table as Markdown."""
    head, rows = table(figures)
    weights = ", ".join(f"{title} {figures['weights'][name]:g}" for name, title in figures["methods"].items())
    problems = [cell["problem"] for line in figures["lines"] for cell in line["cells"].values() if "problem" in cell]
    lines = [
        f"New → old on unseen identities, TAR at FAR 1e-4 / rank-1; met: above old → old by both, in "
        f"{figures['seeds']} seed(s). {figures['data']}: {figures['classes']:,} training identities, "
        f"{figures['steps']} updates of the new and {figures['old_steps']} of the old model, which are alike but for "
        f"the change; some: {figures['old_classes']:,} identities. Weights: {weights}. "
        f"Not possible: the method needs equal dimensions. {figures['machine']}, commit {figures['commit']}.",
        "",
        *(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)),
        *(f"\n{problem}" for problem in problems),
    ]
    return "\n".join(lines) + "\n"
