"""Write docs/results.md and its plots from the figures that benchmarks left as JSON.

With --measure the benchmarks run first, one after the other: some hours on two cores, on a machine that does nothing
else, with the typefaces of docs/characters.md in --fonts. What is interrupted goes on with the same command.

Examples:
  lce bench results                                       # the page, from benchmarks/*.json
  lce bench results --measure --fonts fonts --work work   # everything again
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.results.paired import common, difference, over_runs
from tools.results.paired import text as interval_text

HELP = "write docs/results.md and its plots from the JSON of the other benchmarks"

METRIC = "TAR@FAR=1e-4"
# Okabe and Ito's palette: told apart by the colour-blind too.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lce bench results``."""
    parser.add_argument(
        "--figures", type=Path, default=Path("benchmarks"), help="folder of the JSON files (benchmarks)"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"), help="the page (docs/results.md)")
    parser.add_argument("--measure", dest="again", action="store_true", help="run the benchmarks first")
    parser.add_argument("--work", type=Path, default=Path("results-work"), help="their data sets and training runs")
    parser.add_argument("--fonts", type=Path, default=Path("fonts"), help="Debian's font packages (fonts)")


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: its headline. file: the JSON under the figures' folder.
        commands: `lce …` that make the file; ``{json}`` stands for it, ``{figures}``, ``{work}`` and ``{fonts}`` for
            the folders of the options.
        text: the part's Markdown from what the file holds.
        next_to: a file of another part; whether both may be compared is said at the end of this one.
    """

    title: str
    file: str
    commands: tuple[str, ...]
    text: Callable[[Any], str]
    next_to: str | None = None


def _compat(figures: dict[str, Any]) -> str:
    from tools.results.compat import markdown

    return markdown(figures)


def _changes(figures: dict[str, Any]) -> str:
    from tools.results.changes import markdown

    return markdown(figures)


def _criterion(figures: dict[str, Any]) -> str:
    lines = ["| mode | D1 | D2 | seed | old → old | new → old | met |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for line in figures["lines"]:
        for one in line["seeds"]:
            cells = [" / ".join(f"{v:.3f}" for v in one[cell].values()) for cell in ("old->old", "new->old")]
            row = [line["mode"], line["old_dim"], line["new_dim"], one["seed"], *cells, "yes" if one["met"] else "no"]
            lines.append(f"| {' | '.join(map(str, row))} |")
    maps = f", maps alone {figures['map_steps']:,}" if "map_steps" in figures else ""
    older = not maps and any(line["mode"] == "cross-model" for line in figures["lines"])
    lines += ["", "The maps alone are of an earlier recipe: those of today are in the next part."] if older else []
    return (
        f"M(new, old) > M(old, old) on unseen identities, TAR at FAR 1e-4 / rank-1; {figures['classes']:,} training "
        f"identities, {figures['steps']} updates{maps}; “independent” is the control, which must fail. "
        f"{figures['machine']}, commit {figures['commit']}.\n\n" + "\n".join(lines) + "\n"
    )


def _chain(figures: dict[str, Any]) -> str:
    from tools.results.chain import markdown

    return markdown(figures)


def _deployments(figures: dict[str, Any]) -> str:
    """The ways of deploying of one evaluation, with their verdicts, then galleries pooled by identity."""
    from trainer.evaluation.compatibility import rate_text

    (name, found), *_ = figures["sets"].items()
    verdict, provenance = figures["verdict"], figures["provenance"]
    lines = [
        f"{name}: {found['identities']:,} identities, {found['images']:,} images, TAR at FAR "
        f"{rate_text(found['far'])}; seed 0. Verdict: "
        f"{verdict['answer']}. Commit {provenance['commit']}.",
        "",
        "| query → gallery | TAR | rank-1 | verdict | meaning |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in found["deployments"]:
        cells = [f"{row[key]['value']:.3f}" for key in ("tar", "rank-1")]
        lines.append(f"| {row['way']} | {' | '.join(cells)} | {row['answer'] or '–'} | {row['meaning']} |")
    lines += [
        f"| {one['name']}, pooled | {one['tar'][0]:.3f} | {one['rank1']['value']:.3f} | – | |"
        for one in found["pooled"]
    ]
    return "\n".join([*lines, "", f"Pooled: {found['pooled'][0]['protocol']}; never the criterion's cell."]) + "\n"


def _head(rows: list[dict[str, Any]]) -> str:
    from tools.results.table import as_markdown

    return as_markdown(rows).split("\n\n", 1)[1]


def _ladder(figures: dict[str, Any]) -> str:
    from tools.benchmarks.ladder import as_markdown

    return as_markdown(figures).split("\n\n", 1)[1]


def _plan(figures: dict[str, Any]) -> str:
    lines = ["| classes | rate | ranks | planned | measured | off |", "| --- | --- | --- | --- | --- | --- |"]
    for case in figures["cases"]:
        sizes = " | ".join(f"{case[key] / 2**30:.2f} GiB" for key in ("planned_bytes", "measured_bytes"))
        lines.append(f"| {case['classes']:,} | {case['rate']} | {case['ranks']} | {sizes} | {case['off']:+.1%} |")
    return f"Peak memory of a rank. {figures['machine']}, commit {figures['commit']}.\n\n" + "\n".join(lines) + "\n"


def _million(figures: dict[str, Any]) -> str:
    lines = ["| stage | seconds | peak memory |", "| --- | --- | --- |"]
    for stage in figures["stages"]:
        lines.append(f"| {stage['name']} | {stage['seconds']:.1f} | {stage['peak_bytes'] / 2**30:.2f} GiB |")
    return f"{figures['machine']}, commit {figures['commit']}.\n\n" + "\n".join(lines) + "\n"


def _input(figures: dict[str, Any]) -> str:
    speeds = [f"{figures[name]['images_per_second']:,.0f}" for name in ("ours", "reference")]
    return (
        f"{speeds[0]} images/s in a global random order, {speeds[1]} of a bare DALI pipeline in file order: ratio "
        f"{figures['ratio']:.2f}. {figures['image_size'][0]} × {figures['image_size'][1]} JPEG, augmentation: "
        f"{figures['augment']}, {figures['threads']} threads, on {figures['device']}. {figures['machine']}, commit "
        f"{figures['commit']}.\n"
    )


METHODS = "--methods independent,l2,bct,unibct,advbct,mixbct,fct,lce"
CHOSEN = "--weights {figures}/compat.json"
ALL = f"{METHODS} {CHOSEN} --seeds 3 --steps 1500"
LONG = f"{CHOSEN} --steps 9000"
LONG_RUN = "compat-hangul-long.json"
RIVALS = "compat-hangul-rivals.json"
TOGETHER = "compat-together.json"
LONG_HANGUL = "--old-steps 3000 --out {work}/compat-hangul-long --json {json}"
AGAINST = (
    "compat.json",
    "compat-hangul.json",
    RIVALS,
    LONG_RUN,
    "compat-both.json",
    "compat-both-long.json",
)
"""Where LCE stands against all other methods."""
FEWER_OR_MORE = (1000, 2000, 8000)
"""Training identities of the runs besides the first one, which has 4,000."""
SECTIONS = (
    Section(
        "Ways to stay compatible: 4,000 syllables",
        "compat.json",
        (f"bench compat {METHODS} --seeds 3 --out {{work}}/compat --json {{json}}",),
        _compat,
    ),
    Section(
        "Two methods together: 4,000 syllables",
        TOGETHER,
        ("bench compat --methods lce,lce+bct --seeds 3 --out {work}/compat --json {json}",),
        _compat,
    ),
    Section(
        "Three more rivals: 4,000 syllables",
        "compat-more.json",
        ("bench compat --methods lce,ndpp,bt2,frozen --seeds 3 --out {work}/compat --json {json}",),
        _compat,
        TOGETHER,
    ),
    Section(
        "Ways of deploying: 4,000 syllables",
        "deployments.json",
        (
            "evaluate --old {work}/compat/seed-0/old --new {work}/compat/seed-0/lce-19 "
            "--paragon {work}/compat/seed-0/paragon --data unseen={work}/compat/seed-0/data/unseen --fars 1e-4 "
            "--gallery pooled --json {json}",
        ),
        _deployments,
    ),
    Section(
        "The same with all Hangul syllables",
        "compat-hangul.json",
        (
            "characters {work}/hangul --fonts {fonts} --script hangul --old-share 0.125",
            f"bench compat --data {{work}}/hangul {ALL} --time --old-steps 3000 --out {{work}}/compat-hangul "
            "--json {json}",
        ),
        _compat,
    ),
    Section(
        "All Hangul syllables, until the paragon has learned",
        RIVALS,
        (
            "bench compat --data {work}/hangul --methods bct,unibct,advbct,l2,lce --trials 4 --trial-steps 1500 "
            f"--steps 9000 --seeds 1 {LONG_HANGUL}",
        ),
        _compat,
    ),
    Section(
        "All Hangul syllables, the best rival and LCE as long, three seeds",
        LONG_RUN,
        (f"bench compat --data {{work}}/hangul --methods independent,advbct,lce {LONG} --seeds 3 {LONG_HANGUL}",),
        _compat,
        RIVALS,
    ),
    Section(
        "All Hangul syllables, two methods together as long",
        "compat-hangul-together.json",
        (
            f"bench compat --data {{work}}/hangul --methods lce,lce+bct --weights {{figures}}/{TOGETHER} --steps 9000 "
            f"--seeds 1 {LONG_HANGUL}",
        ),
        _compat,
        LONG_RUN,
    ),
    Section(
        "The same with Han and Hangul",
        "compat-both.json",
        (
            "characters {work}/both --fonts {fonts} --script both --old-share 0.125",
            f"bench compat --data {{work}}/both {ALL} --old-steps 4000 --out {{work}}/compat-both --json {{json}}",
        ),
        _compat,
    ),
    Section(
        "Han and Hangul, until the paragon has learned",
        "compat-both-long.json",
        (
            f"bench compat --data {{work}}/both --methods independent,unibct,lce {LONG} --seeds 1 --old-steps 4000 "
            "--out {work}/compat-both-long --json {json}",
        ),
        _compat,
    ),
    *(
        Section(
            f"With {classes:,} instead of 4,000 syllables",
            f"compat-{classes}.json",
            (
                f"bench compat --classes {classes} --methods independent,lce {CHOSEN} --seeds 3 "
                f"--out {{work}}/compat-{classes} --json {{json}}",
            ),
            _compat,
        )
        for classes in FEWER_OR_MORE
    ),
    Section(
        "The criterion, mode by mode",
        "criterion.json",
        ("bench criterion --out {work}/criterion --json {json}",),
        _criterion,
    ),
    Section(
        "The criterion by maps alone, three seeds",
        "criterion-maps.json",
        ("bench criterion --modes cross-model --seeds 3 --out {work}/criterion --json {json}",),
        _criterion,
    ),
    Section(
        "A chain of five models",
        "chain.json",
        (f"bench chain {CHOSEN} --out {{work}}/chain --json {{json}}",),
        _chain,
    ),
    Section(
        "Every kind of change",
        "changes.json",
        ("bench changes --weights {figures}/compat.json --out {work}/changes --json {json}",),
        _changes,
    ),
    Section("The class-sharded head", "head.json", ("bench table --out {figures}",), _head),
    Section(
        "The ladder",
        "ladder.json",
        (
            "bench head --ladder --rungs 1e6 2e6 5.5e6 --memory 20GiB --lce direct --centers mapped --steps 2 "
            "--warmup 1 --json {json}",
        ),
        _ladder,
    ),
    Section("A million classes end to end", "million.json", ("bench million --json {json}",), _million),
    Section("Input", "input.json", ("bench input --no-torch --steps 80 --rounds 9 --json {json}",), _input),
    Section("Planned against measured memory", "plan.json", ("plan --verify --json {json}",), _plan),
)


def run(args: argparse.Namespace) -> int:
    """Write the page; returns the exit status."""
    from trainer.errors import ConfigError
    from trainer.files import replaced

    if args.again and (failed := _measure(args)):
        return failed
    if not args.figures.is_dir():
        raise ConfigError(f"--figures {args.figures}: no such folder")
    known = {one.file: _read(args.figures / one.file, one.text) for one in SECTIONS}
    pictures = args.out.parent / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    plots = [name for name, plot in PLOTS.items() if plot(known, pictures / name)]
    with replaced(args.out, ConfigError) as partial:
        partial.write_text(page(known, plots), encoding="utf-8")
    missing = [one.file for one in SECTIONS if known[one.file] is None]
    print(f"{args.out}: {len(SECTIONS) - len(missing)} of {len(SECTIONS)} parts" + _without(missing))
    return 0


def _measure(args: argparse.Namespace) -> int:
    """Run each benchmark as a process of its own; the exit status of the first that failed, or 0 (a "no" is a finding).

    Raises:
        ConfigError: no folder of typefaces.
    """
    from tools.steps import StepFailed, interruptible, run_lce
    from trainer.errors import ConfigError

    if not args.fonts.is_dir():
        raise ConfigError(f"--fonts {args.fonts}: no such folder; docs/characters.md says which packages to put there")
    args.figures.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    with interruptible():
        for section in SECTIONS:
            for command in section.commands:
                names = {"json": args.figures / section.file, "figures": args.figures}
                argv = [w.format(**names, work=args.work, fonts=args.fonts) for w in command.split()]
                print(f"{section.title}: lce {' '.join(argv)}", file=sys.stderr, flush=True)
                try:
                    run_lce(argv)
                except StepFailed as failed:
                    if failed.status != 1:
                        return failed.status
    return 0


def _without(missing: Sequence[str]) -> str:
    return f"; not measured: {', '.join(missing)}" if missing else ""


def _read(path: Path, text: Callable[[Any], str]) -> Any:
    from trainer.errors import ConfigError

    if not path.is_file():
        return None
    try:
        figures = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    try:
        text(figures)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path}: not what its benchmark writes ({error!r}); remove the file, or measure again with --measure"
        ) from None
    return figures


def page(known: dict[str, Any], plots: Sequence[str]) -> str:
    """The whole page in Markdown."""
    out = [
        "# Results",
        "",
        "Written by `lce bench results` from the JSON files in [benchmarks/](../benchmarks/README.md); `make results` "
        "measures all of them again, which takes some hours on two cores. Each part names its command, its machine and "
        "its commit. Nothing here was measured on a GPU.",
        "",
    ]
    out += [text + "\n" for text in (headline(known),) if text]
    for one in SECTIONS:
        names = {"json": f"benchmarks/{one.file}", "figures": "benchmarks", "work": "work", "fonts": "fonts"}
        out += [f"## {one.title}", "", *(f"`lce {command.format(**names)}`\n" for command in one.commands)]
        out += [one.text(known[one.file]) if known[one.file] is not None else "Not measured yet.\n"]
        if one.next_to is not None and known[one.file] is not None:
            out += [_agreement(known[one.file], known[one.next_to])]
    captions = {name: CAPTIONS[name] for name in plots}
    out += ["## Plots\n"] if captions else []
    out += [f"![{text}](pictures/{name})\n\n{text}\n" for name, text in captions.items()]
    return "\n".join(out)


def headline(known: dict[str, Any]) -> str:
    """Which method, by how much, at what cost, and where LCE loses; empty where the figures for it are not there."""
    long = known.get(LONG_RUN)
    given = [_with_lce(run, long) for name in AGAINST if (run := known.get(name))]
    runs: list[dict[str, Any]] = [run for run in given if _lce(run) and _rivals(run)]
    if not long or not _lce(long) or not runs:
        return ""
    lce, base = _lce(long), long["base"]

    def pair(cells: dict[str, Any]) -> str:
        return " / ".join(f"{cells[metric]['mean']:.3f}" for metric in (METRIC, "rank-1"))

    cost = base["paragon->paragon"][METRIC]["mean"] - lce["new->new"][METRIC]["mean"]
    price = f"at the price of {cost:.3f} of its own TAR" if cost > 0 else "at no cost to its own TAR"
    timed = [run for run in runs if "update_time" in run["methods"]["lce"]]
    if timed:
        price += f" and with {timed[0]['methods']['lce']['update_time']:.2f} times the paragon's time for an update"
        price += "" if timed[0]["steps"] == long["steps"] else f" (in the run of {timed[0]['steps']:,})"
    found = [_standing(run, metric) for run in runs for metric in (METRIC, "rank-1")]
    ahead, level, behind = ([text for standing, text in found if standing == which] for which in (1, 0, -1))
    gain = _gain(long, "lce")
    share = "" if gain is None else f"{gain['mean']:.0%} of the way to the paragon by TAR, "
    out = [
        f"**LCE** takes the search of old galleries from {pair(base['old->old'])} (TAR at FAR 1e-4 / rank-1) to "
        f"{pair(lce['new->old'])}, {share}{price} ({long['classes']:,} identities, {long['steps']:,} updates, "
        f"{long['seeds']} seed(s)). Against the best other method of each run, by the 95 % interval of the difference "
        "(over training runs and, where the run's table says so, identities):",
        "",
        f"- clearly ahead in {_joined(ahead)};",
        f"- about level in {_joined(level)};",
        f"- it loses in {_joined(behind)}.",
        "",
    ]
    longest = max(run["steps"] for run in [long, *runs])
    ends = [
        f"Comparisons after fewer than {longest:,} updates stop before the paragon has learned as much, so that part "
        "of a lead there is quicker learning."
        if any(run["steps"] < longest for run in runs)
        else "",
        _chain_losses(known.get("chain.json")),
        _change_losses(known.get("changes.json")),
    ]
    return "\n".join([*out, " ".join(one for one in ends if one)])


def _chain_losses(chain: dict[str, Any] | None) -> str:
    """Where another method is ahead of LCE at the end of a chain, as one sentence; empty without one."""
    if chain is None or "lce" not in chain["methods"]:
        return ""
    last = len(chain["identities"])

    def ends(one: dict[str, Any]) -> dict[str, float]:
        cells = {f"{last} → 1 by {_short(metric)}": one["cells"][f"{last}->1"][metric] for metric in (METRIC, "rank-1")}
        means = {f"the mean {_short(metric)}": one["summary"]["average"][metric] for metric in (METRIC, "rank-1")}
        return {**cells, **means, "drift": one["summary"]["drift"][str(last)]}

    mine, lost = ends(chain["methods"]["lce"]), []
    for name, one in chain["methods"].items():
        better = [
            f"{what} ({value:.3f} against {mine[what]:.3f})"
            for what, value in ends(one).items()
            if name != "lce" and (value < mine[what] if what == "drift" else value > mine[what])
        ]
        lost += [f"{one['title']} in {_joined(better)}"] if better else []
    return f"In a chain of {last} models, one training run each, ahead of LCE: {'; '.join(lost)}." if lost else ""


def _change_losses(changes: dict[str, Any] | None) -> str:
    """The kinds of change under which another method has more than LCE, as one sentence; empty without one."""
    if changes is None:
        return ""
    lost = []
    for line in changes["lines"]:
        mine = line["cells"].get("lce", {}).get("seeds")
        for name, title in changes["methods"].items() if mine else ():
            theirs = line["cells"][name].get("seeds")
            for metric in (METRIC, "rank-1") if theirs and name != "lce" else ():
                values = [
                    round(statistics.fmean(one["new->old"][metric] for one in seeds), 3) for seeds in (mine, theirs)
                ]
                if values[1] > values[0]:
                    lost.append(f"{line['change']} in {_short(metric)} ({title} {values[1]:.3f}, LCE {values[0]:.3f})")
    runs = "one training run each" if changes["seeds"] == 1 else f"{changes['seeds']} seeds"
    return f"Of the kinds of change, {runs}, another method has more for {_joined(lost)}." if lost else ""


def _short(metric: str) -> str:
    return "TAR" if metric == METRIC else metric


def _standing(run: dict[str, Any], metric: str) -> tuple[int, str]:
    """Whether LCE is ahead (1), level (0) or behind (−1) of the best other method by the 95 % interval of the
    difference, and the figures. One training run each decides nothing: it is level."""
    cells = {name: one["spread"]["new->old"][metric] for name, one in _rivals(run).items()}
    mine = run["methods"]["lce"]["spread"]["new->old"][metric]
    best = max(cells, key=lambda name: float(cells[name]["mean"]))
    title = run["methods"][best]["title"]
    text = f"{_short(metric)} with {run['classes']:,} identities after {run['steps']:,} updates ({mine['mean']:.3f} "
    text += f"against {title}'s {cells[best]['mean']:.3f}"
    ours, theirs = run["methods"]["lce"]["seeds"], run["methods"][best]["seeds"]
    paired = difference(ours, theirs, metric)
    if len(common(ours, theirs)) < 2:
        over = "" if paired is None else f": {interval_text(paired)} over identities alone"
        return 0, f"{text}{over}; one training run each: no verdict)"
    paired = paired or over_runs(ours, theirs, metric)
    assert paired is not None
    return (1 if paired.low > 0 else -1 if paired.high < 0 else 0), f"{text}: {interval_text(paired)})"


def _with_lce(run: dict[str, Any], long: dict[str, Any] | None) -> dict[str, Any]:
    """A run without LCE of its own gets that of the long run, of the same seeds, where both had the same old models."""
    from tools.results.compat import spreads

    if "lce" in run["methods"] or not long or not _lce(long) or same_old(run, long) is not True:
        return run
    numbers = {one["seed"] for method in run["methods"].values() for one in method["seeds"]}
    lce = long["methods"]["lce"]
    seeds = [one for one in lce["seeds"] if one["seed"] in numbers]
    return {**run, "methods": {**run["methods"], "lce": {**lce, "seeds": seeds, "spread": spreads(seeds)}}}


def same_old(run: dict[str, Any], other: dict[str, Any]) -> bool | None:
    """Whether two runs' old models of the same seeds find the same (to 1e-3 in each metric); None: no common seed, or
    other settings or updates, so that their figures have nothing to do with each other."""
    settings = ("data", "classes", "old_classes", "old_steps", "steps", "overrides")
    if any(run.get(key) != other.get(key) for key in settings):
        return None
    found: list[dict[int, dict[str, float]]] = [
        {s["seed"]: s["cells"]["old->old"] for method in one["methods"].values() for s in method["seeds"]}
        for one in (run, other)
    ]
    common = sorted(set(found[0]) & set(found[1]))
    if not common:
        return None
    return all(abs(found[0][s][m] - found[1][s][m]) <= 1e-3 for s in common for m in (METRIC, "rank-1"))


def _agreement(run: dict[str, Any], long: dict[str, Any] | None) -> str:
    """Whether the rivals' run may be read next to LCE's of three seeds; empty where it cannot be said."""
    same = same_old(run, long) if long else None
    if same is None:
        return ""
    if same:
        return "The old models of these seeds are those of the run above: figures of both may be compared.\n"
    cells = [one["base"]["old->old"][METRIC]["mean"] for one in (run, long) if one]
    return (
        f"The old models are not those of the run above (old → old {cells[0]:.3f}, there {cells[1]:.3f} by TAR): "
        "compare figures within this section only.\n"
    )


def _lce(run: dict[str, Any]) -> dict[str, Any]:
    """LCE's figures; empty where a run does not have it, or where it could not be trained."""
    found: dict[str, Any] = run["methods"].get("lce", {}).get("spread", {})
    return found


def _rivals(run: dict[str, Any]) -> dict[str, Any]:
    """The other methods of compatible training that could be measured."""
    return {name: one for name, one in run["methods"].items() if one["spread"] and name not in ("independent", "lce")}


def _joined(texts: Sequence[str]) -> str:
    return ", ".join(texts) or "none"


# ---- plots ----


def _plot_weights(known: dict[str, Any], path: Path) -> bool:
    """new→old on the validation identities over each method's weight."""
    figures = known["compat.json"]
    if figures is None or not any(one["trials"] for one in figures["methods"].values()):
        return False
    axes, save = _axes("weight of the compatibility loss", "new → old TAR at FAR 1e-4, validation")
    for colour, one in zip(COLOURS, [m for m in figures["methods"].values() if m["trials"]], strict=False):
        first = [trial for trial in one["trials"] if trial.get("updates") == one["trials"][0].get("updates")]
        values = [trial["validation"]["new->old"][METRIC] for trial in first]
        axes.plot([trial["weight"] for trial in first], values, "o-", color=colour, label=one["title"])
    trial = next(m["trials"][0] for m in figures["methods"].values() if m["trials"])
    axes.axhline(trial["validation"]["old->old"][METRIC], color="grey", ls="--", label="old → old")
    axes.set_xscale("log")
    save(path)
    return True


def _plot_growth(known: dict[str, Any], path: Path) -> bool:
    """LCE over the number of training identities: one old model and gallery a seed, more and more identities."""
    runs = [known[name] for name in ("compat.json", *(f"compat-{classes}.json" for classes in FEWER_OR_MORE))]
    if not all(run and _lce(run) for run in runs):
        return False
    axes, save = _axes("training identities", "TAR at FAR 1e-4, unseen identities")
    runs.sort(key=lambda run: run["classes"])
    classes = [run["classes"] for run in runs]
    lines = {
        "LCE: new → new": ("#009E73", [_lce(run)["new->new"] for run in runs]),
        "paragon → paragon": ("#E69F00", [run["base"]["paragon->paragon"] for run in runs]),
        "old centre → old": ("grey", [run["base"]["centre->old"] for run in runs]),
        "LCE: new → old": ("#0072B2", [_lce(run)["new->old"] for run in runs]),
        "old → old": ("#000000", [run["base"]["old->old"] for run in runs]),
    }
    for title, (colour, found) in lines.items():
        spreads = [one[METRIC] for one in found]
        means, errors = [one["mean"] for one in spreads], [one["deviation"] or 0 for one in spreads]
        axes.errorbar(classes, means, errors, fmt="o-", capsize=3, color=colour, label=title)
    axes.set_xscale("log")
    axes.set_xticks(classes, [f"{count:,}" for count in classes])
    axes.minorticks_off()
    save(path)
    return True


def _plot_classes(known: dict[str, Any], path: Path) -> bool:
    """Update gain of each method over the number of training identities."""
    runs = [known[name] for name in ("compat-hangul-long.json", "compat-both-long.json") if known[name]]
    if len(runs) < 2:
        return False
    axes, save = _axes("training identities", "update gain, TAR at FAR 1e-4")
    names = [name for name in runs[0]["methods"] if name != "independent"]
    for colour, name in zip(COLOURS, names, strict=False):
        gains = {r["classes"]: _gain(r, name) for r in runs if name in r["methods"]}
        found = {classes: gain for classes, gain in gains.items() if gain is not None}
        means, errors = [g["mean"] for g in found.values()], [g["deviation"] or 0 for g in found.values()]
        title = runs[0]["methods"][name]["title"]
        axes.errorbar(list(found), means, errors, fmt="o-", capsize=3, color=colour, label=title)
    axes.plot(
        [r["classes"] for r in runs], [_reach(r["base"]) for r in runs], "s:", color="grey", label="old centre → old"
    )
    axes.axhline(1.0, color="grey", ls="--", label="the paragon's own")
    axes.set_xscale("log")
    save(path)
    return True


def _plot_changes(known: dict[str, Any], path: Path) -> bool:
    """new→old of each method and old→old, a line for every change."""
    from tools.results.changes import means

    figures = known["changes.json"]
    if figures is None:
        return False
    axes, save = _axes("TAR at FAR 1e-4, unseen identities", "", above=True)
    lines = figures["lines"][::-1]
    for index, (colour, name) in enumerate(zip(COLOURS[1:], figures["methods"], strict=False)):
        found = {
            row: values[METRIC] for row, one in enumerate(lines) if (values := means(one["cells"][name], "new->old"))
        }
        rows = [row + 0.15 * (len(figures["methods"]) / 2 - index) for row in found]
        axes.plot(list(found.values()), rows, "o", color=colour, label=f"{figures['methods'][name]}: new → old")
    old = {
        row: values[METRIC]
        for row, one in enumerate(lines)
        for cell in one["cells"].values()
        if (values := means(cell, "old->old"))
    }
    axes.plot(list(old.values()), list(old), "k|", ms=18, label="old → old")
    axes.set_yticks(range(len(lines)), [one["change"] for one in lines])
    save(path)
    return True


def _gain(run: dict[str, Any], name: str) -> dict[str, Any] | None:
    """A method's update gain over the seeds; None where the paragon is not clearly better than the old model."""
    from tools.results.compat import no_gain

    gain: dict[str, Any] | None = run["methods"][name]["spread"].get("update_gain", {}).get(METRIC)
    return None if no_gain(run) else gain


def _reach(base: dict[str, Any]) -> float:
    """The update gain of queries at the old centres."""
    centre, old, paragon = (base[cell][METRIC]["mean"] for cell in ("centre->old", "old->old", "paragon->paragon"))
    return float((centre - old) / (paragon - old)) if paragon > old else math.nan


PLOTS = {
    "results-weights.png": _plot_weights,
    "results-growth.png": _plot_growth,
    "results-classes.png": _plot_classes,
    "results-changes.png": _plot_changes,
}
CAPTIONS = {
    "results-growth.png": "More training identities, the same old models: a run's identities are among those of the "
    "next. All have 800 updates, in which a paragon of many classes does not learn. Means and standard deviations of 3 "
    "seeds.",
    "results-weights.png": "What each method's weight does (4,000 syllables, seed 0, validation identities).",
    "results-classes.png": "Update gain over the number of training identities, where the paragon has learned, and "
    "that of queries at the old centres. The old model and the characters differ between the points.",
    "results-changes.png": "The search of the old gallery when one thing or two change between the models. No point: "
    "the method needs equal dimensions.",
}


def _axes(x: str, y: str, above: bool = False) -> tuple[Any, Callable[[Path], None]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)

    def save(path: Path) -> None:
        if above:
            figure.legend(loc="outside upper center", ncols=4, fontsize="small", markerscale=0.5)
        else:
            axes.legend(fontsize="small")
        figure.savefig(path, dpi=110, metadata={"Software": None})
        pyplot.close(figure)

    return axes, save
