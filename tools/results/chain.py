"""A chain of models, each made compatible with the one before: what every later one finds in every earlier gallery.

  lce bench chain --methods lce,bct,advbct --weights benchmarks/compat.json --json -
  lce bench chain --methods lce --models 3 --steps 200     # shorter

The first model has --old-classes of the training identities, the last one all, those between equal steps more. Each is
trained with the centres or embeddings of the one before it alone, and is measured on unseen identities against the
galleries of all before it. What is done is kept under --out: the same command continues.

Exit status: 0 done; 2 wrong use, or a model could not be trained; 130 interrupted.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tools.results.comparison import Comparison

HELP = "several models after one another: average compatibility and drift"

FIRST = "chain-1"
METHODS = "lce,bct,advbct"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lce bench chain``."""
    from tools.results.compat import add_data_arguments, add_run_arguments

    add_data_arguments(parser)
    parser.add_argument("--methods", default=METHODS, help=f"of lce bench compat, a chain each ({METHODS})")
    parser.add_argument("--models", type=int, default=5, help="models of a chain, at least 3 (5)")
    parser.add_argument("--weights", type=Path, metavar="JSON", help="out of a JSON of lce bench compat (middle ones)")
    parser.add_argument("--steps", type=int, default=800, help="updates of every model but the first (800)")
    parser.add_argument("--old-steps", type=int, default=600, help="updates of the first one (600)")
    add_run_arguments(parser, "chain")


def run(args: argparse.Namespace) -> int:
    """Train, measure and report; returns the exit status."""
    from tools.measuring import origin, write_json
    from tools.output import table_console
    from tools.results.compat import METHODS as KNOWN
    from tools.results.compat import check_sizes, make_comparison, names_of, settings_of, weights_or_middle
    from tools.steps import interruptible
    from trainer.errors import ConfigError

    names = names_of(args.methods)
    check_sizes(names)
    if not all(KNOWN[name].settings for name in names):
        raise ConfigError(f"--methods {args.methods}: independent models are no chain")
    if args.models < 3:
        raise ConfigError(f"--models {args.models}: a chain has at least 3")
    args.seeds = 1
    comparison = make_comparison(args)
    weights = weights_or_middle(args.weights, names)
    sizes = identities(comparison.old_classes, comparison.classes, args.models)
    with interruptible():
        methods = chains(comparison, sizes, weights)
    figures = {"bench": "chain", **settings_of(args, comparison), "identities": sizes, "methods": methods, **origin()}
    write_json(figures, args.json)
    table_console(args.json, 120).print(markdown(figures), markup=False, soft_wrap=True)
    return 0


def identities(first: int, last: int, models: int) -> list[int]:
    """How many training identities each model has: equal steps."""
    return [first + (last - first) * at // (models - 1) for at in range(models)]


def chains(comparison: "Comparison", sizes: Sequence[int], weights: Mapping[str, float]) -> dict[str, Any]:
    """Train and measure a chain for each method (name → weight), all from the same first model."""
    from tools.results.compat import METHODS as KNOWN
    from tools.results.compat import counting, raise_first

    with counting(2 + len(weights) * len(sizes)) as count:
        comparison.pictures(0)
        count()
        tables = _tables(comparison, sizes)
        overrides = [f"data.path={comparison.dataset(0, 'train')}", f"data.labels={tables[0]}"]
        comparison.train(0, FIRST, "old", overrides)
        count()

        def one(name: str) -> None:
            before = FIRST
            for at, table in enumerate(tables[1:], 2):
                called = f"chain-{name}-{weights[name]:g}-{at}"
                bank = comparison.bank(0, before, table, f"{called}-from")
                more = KNOWN[name].overrides(*bank, weights[name])
                comparison.train(0, called, "paragon", [f"data.labels={table}", *more], before)
                before = called
                count()
            count()

        raise_first(comparison.each(one, weights))
    return {
        name: {"title": KNOWN[name].title, "weight": weight, **_measured(comparison, name, weight, len(sizes))}
        for name, weight in weights.items()
    }


def _tables(comparison: "Comparison", sizes: Sequence[int]) -> list[Path]:
    """A label table for each model; the identities of one are among those of the next."""
    import numpy as np

    from trainer.data import open_dataset
    from trainer.data.splitting import Table, save_tables

    train = open_dataset(comparison.dataset(0, "train"))
    labels = np.asarray(train.labels)
    drawn = np.random.default_rng(0).permutation(train.num_classes)
    tables = {}
    for at, size in enumerate(sizes, 1):
        kept = np.sort(drawn[:size])
        number = np.full(train.num_classes + 1, -1, np.int64)  # the last entry: of label −1
        number[kept] = np.arange(len(kept))
        tables[f"labels-{at}"] = Table(number[labels], kept.astype(np.int64))
    folder = comparison.folder(0) / "chain-tables"
    save_tables(tables, folder, train, "lce bench chain")
    return [folder / f"{name}.npy" for name in tables]


def _measured(comparison: "Comparison", name: str, weight: float, models: int) -> dict[str, Any]:
    """The matrix of a chain, by model number (``5->1``), and its summary."""
    from tools.results.comparison import FAR
    from tools.results.compat import METRICS
    from trainer.evaluation.results import Options, chain_summary, measure_cells, plain

    roles = ["old", *(f"v{at}" for at in range(2, models)), "new"]
    runs = [FIRST, *(f"chain-{name}-{weight:g}-{at}" for at in range(2, models + 1))]
    one = comparison.embedded(0, "unseen", dict(zip(roles, runs, strict=True)))
    cells = measure_cells(one, Options(fars=(FAR,), replicates=2), lambda stage: None)
    number = {role: at for at, role in enumerate(roles, 1)}
    found = {f"{number[q]}->{number[g]}": cell.value for (q, g), cell in cells.items()}
    summary = chain_summary(one, cells, METRICS)
    assert summary is not None
    summary["drift"] = {str(number[role]): drift for role, drift in summary["drift"].items()}
    return dict(plain({"cells": found, "summary": summary}))


def markdown(figures: dict[str, Any]) -> str:
    """What docs/results.md shows: the summaries, then each chain's matrix."""
    from tools.results.compat import METRICS

    last = len(figures["identities"])
    text = [
        f"{figures['data']}: {last} models with {', '.join(f'{size:,}' for size in figures['identities'])} training "
        f"identities, each made compatible with the one before; {figures['steps']:,} updates each "
        f"({figures['old_steps']:,} the first); unseen identities, TAR at FAR 1e-4 / rank-1; seed 0; "
        f"{figures['machine']}, commit {figures['commit']}.",
        "",
        f"| method | weight | pairs above the gallery's own model | mean of all pairs | {last} → 1 | drift from the "
        "first gallery |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in figures["methods"].values():
        summary = one["summary"]
        shares = " / ".join(f"{summary['average_compatibility'][metric]:.0%}" for metric in METRICS)
        means = " / ".join(f"{summary['average'][metric]:.3f}" for metric in METRICS)
        drift = ", ".join(f"{value:.3f}" for value in summary["drift"].values())
        ends = _both(one["cells"][f"{last}->1"])
        text.append(f"| {one['title']} | {one['weight']:g} | {shares} | {means} | {ends} | {drift} |")
    for one in figures["methods"].values():
        text += ["", f"{one['title']}, query (row) against gallery (column):", ""]
        text += [f"| | {' | '.join(map(str, range(1, last + 1)))} |", f"| {'--- | ' * (last + 1)}".rstrip()]
        for query in range(1, last + 1):
            row = [
                _both(one["cells"][f"{query}->{gallery}"]) if gallery <= query else "" for gallery in range(1, last + 1)
            ]
            text.append(f"| {query} | {' | '.join(row)} |")
    text += [
        "",
        "Pairs: a later model that queries an earlier gallery. Drift: 1 less the mean cosine of an image's vector "
        "under models 2 … to the one that the first model stored.",
    ]
    return "\n".join(text) + "\n"


def _both(cell: Mapping[str, float]) -> str:
    return " / ".join(f"{value:.3f}" for value in cell.values())
