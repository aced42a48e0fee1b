"""List training runs, compare their settings, plot their curves into one page.

A RUN is a run folder; a folder that holds run folders stands for all of them. Without an action the runs are listed:
state, step, last figures and the settings in which they differ from each other.

Examples:
  lce runs runs/
  lce runs runs/ --json -
  lce runs diff runs/old runs/new
  lce runs plot runs/ curves.html

Exit status: 0 done; 1 done, but for run folders that are damaged, which are named; 2 wrong use.
"""

import argparse
import base64
import html
import io
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tools.output import table_console, write_json
from trainer.errors import DataError

HELP = "list runs, compare their settings, plot their curves"
ACTIONS = ("list", "diff", "plot")
ALIVE_SECONDS = 30.0
"""A rank renews its file in RUN/ranks every two seconds; a run without any renewed file for so long counts as ended."""
NOT_SETTINGS = ("run.dir",)
NOT_CURVES = ("step", "epoch", "seconds")


@dataclass(frozen=True)
class Run:
    """A run folder as it lies there.

    Attributes:
        state: finished, running, failed (its command said why), or stopped (a call of the same command continues it).
        steps: updates that the run has in all, where that is known.
        last: the last logged figures. settings: the resolved configuration by dotted key.
    """

    path: str
    state: str
    step: int
    steps: int | None
    last: dict[str, float]
    settings: dict[str, Any] = field(repr=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lce runs`."""
    parser.add_argument("runs", nargs="+", metavar="[list|diff|plot] RUN…", help="run folders, or folders of them")
    parser.add_argument("--json", metavar="FILE", help="write what was found as JSON (- for standard output)")


def run(args: argparse.Namespace) -> int:
    """List, compare or plot; returns 0, or 1 where damaged run folders were left out."""
    action, folders = (args.runs[0], args.runs[1:]) if args.runs[0] in ACTIONS else ("list", args.runs)
    if action == "plot":
        if len(folders) < 2 or not folders[-1].endswith(".html"):
            raise DataError("plot: needs runs and then the page to write, such as curves.html")
        folders, page = folders[:-1], Path(folders[-1])
    if not folders:
        raise DataError(f"{action}: name at least one run folder")
    runs, damaged = list[Run](), list[DataError]()
    for folder in (found for name in folders for found in find_runs(Path(name))):
        try:
            runs.append(read_run(folder))
        except DataError as error:
            damaged.append(error)
    if damaged and (not runs or action == "diff"):
        raise damaged[0]
    if action == "diff":
        if len(runs) != 2:
            raise DataError(f"diff: compares two runs, {len(runs)} given")
        _print_difference(runs, args.json)
    elif action == "plot":
        write_page(runs, page)
        print(f"{page}: {len(runs)} run(s)")
    else:
        _print_list(runs, args.json)
    write_json([asdict(found) for found in runs], args.json)
    for problem in damaged:
        print(f"lce runs: left out: {problem}", file=sys.stderr)
    return 1 if damaged else 0


def find_runs(folder: Path) -> list[Path]:
    """``folder`` itself if it is a run folder, else the run folders in it, at any depth, in the order of their names.

    Raises:
        DataError: there is none.
    """
    if (folder / "config.yaml").is_file() or (folder / "ranks").is_dir():
        return [folder]
    found = sorted(path.parent for path in folder.rglob("config.yaml") if (path.parent / "ranks").is_dir())
    if not found:
        raise DataError(f"{folder}: no run folder, and none in it (a run folder has a config.yaml and a log.jsonl)")
    return found


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises :class:`DataError` when its configuration, log or summary cannot be read."""
    from trainer.checkpoint_folder import list_checkpoints
    from trainer.reading import read_json, read_yaml
    from trainer.run.folder import SUMMARY, flat

    settings = read_yaml(folder / "config.yaml", DataError)
    if not isinstance(settings, dict):
        raise DataError(f"{folder / 'config.yaml'}: holds no configuration; restore it, or remove the run")
    lines = read_lines(folder / "log.jsonl")
    last = {k: v for k, v in lines[-1].items() if isinstance(v, int | float)} if lines else {}
    summary: Any = {}
    if (folder / SUMMARY).exists():  # else not finished
        summary = read_json(folder / SUMMARY, DataError)
        if not isinstance(summary, dict):
            raise DataError(f"{folder / SUMMARY}: not a summary of a run; remove it to continue the run")
    now = time.time()
    alive = any(now - status.stat().st_mtime < ALIVE_SECONDS for status in folder.glob("ranks/rank-*.json"))
    failed = (folder / "ranks" / "failed").is_file()
    ended = "finished" if summary.get("status") == "finished" else "failed" if failed else "stopped"
    state = "running" if alive and ended == "stopped" else ended
    steps = summary.get("steps") or settings.get("train", {}).get("steps")
    saved = [int(path.name.removeprefix("step-")) for path in list_checkpoints(folder / "checkpoints")[-1:]]
    step = int(summary.get("step") or max([int(last.get("step", 0)), *saved]))
    return Run(str(folder), state, step, steps, last, flat(settings))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``log.jsonl`` that are whole; none where there is no log. Raises :class:`DataError`: it has some,
    and none of them is a line of figures."""
    if not path.is_file():
        return []
    lines, log = [], path.read_text(encoding="utf-8", errors="replace")
    for text in log.splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # a line that is being written
        if isinstance(line, dict):
            lines.append(line)
    if not lines and "\n" in log:
        raise DataError(f"{path}: holds no line of figures; it was not written by a run, or is damaged")
    return lines


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The settings that are not the same in all runs: key → value in each run, None where a run does not have it."""
    keys = sorted({key for found in runs for key in found.settings} - set(NOT_SETTINGS))
    values = {key: [found.settings.get(key) for found in runs] for key in keys}
    return {key: given for key, given in values.items() if any(value != given[0] for value in given)}


def _told_apart(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Those of :func:`differences` in which runs that have the key differ: a key that comes with another's value, such
    as those of one loader, says nothing more."""
    found = differences(runs)
    known = {key: [value for value in values if value is not None] for key, values in found.items()}
    return {key: found[key] for key, values in known.items() if any(value != values[0] for value in values)}


def _print_list(runs: Sequence[Run], target: str | None) -> None:
    from rich.table import Table

    changed = _told_apart(runs)
    table = Table(box=None, header_style="bold")
    table.add_column("run", overflow="fold")
    table.add_column("state", no_wrap=True)
    for name in ("step", "loss"):
        table.add_column(name, justify="right")
    for name in ("evaluation", "settings that differ"):
        table.add_column(name, overflow="fold")
    for number, found in enumerate(runs):
        evaluated = ", ".join(f"{key} {value:.4g}" for key, value in found.last.items() if "." in key)
        own = "\n".join(f"{key}={values[number]}" for key, values in changed.items() if values[number] is not None)
        loss = f"{found.last['loss']:.4g}" if "loss" in found.last else "–"
        step = str(found.step) if found.steps is None else f"{found.step}/{found.steps}"
        table.add_row(found.path, found.state, step, loss, evaluated or "–", own or "–")
    table_console(target, 200).print(table)


def _figure(key: str, value: float) -> str:
    from tools.output import size_text

    return size_text(value) if key.endswith("_bytes") else f"{value:.5g}"


def _print_difference(runs: Sequence[Run], target: str | None) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for name in ("", runs[0].path, runs[1].path):
        table.add_column(name, overflow="fold")
    for key, values in differences(runs).items():
        table.add_row(key, *("–" if value is None else str(value) for value in values))
    for key in sorted(runs[0].last.keys() | runs[1].last.keys()):
        table.add_row(f"last {key}", *(_figure(key, found.last[key]) if key in found.last else "–" for found in runs))
    table_console(target, 160).print(table)


def write_page(runs: Sequence[Run], page: Path) -> None:
    """One HTML page with a plot for each logged figure, a line for each run. Raises :class:`DataError` without a
    logged step."""
    from matplotlib.figure import Figure

    from trainer.files import replaced

    logs = {found.path: read_lines(Path(found.path) / "log.jsonl") for found in runs}
    keys = {key: None for lines in logs.values() for line in lines for key in line if key not in NOT_CURVES}
    if not keys:
        raise DataError(f"{', '.join(logs)}: no step is logged yet")
    plots = []
    for key in keys:
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for path, lines in logs.items():
            points = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
            if points:
                axes.plot(*zip(*points, strict=True), label=path, marker="o" if len(points) == 1 else None)
        axes.set(title=key, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=110)
        data = base64.b64encode(out.getvalue()).decode()
        plots.append(f'<img src="data:image/png;base64,{data}" alt="{html.escape(key)} over the steps">')
    style = "body{font-family:sans-serif;margin:2rem auto;max-width:60rem}img{width:100%}"
    title = html.escape(f"{len(runs)} training runs")
    text = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{style}</style><h1>{title}</h1>{''.join(plots)}</html>\n"
    )
    with replaced(page, DataError) as partial:
        partial.write_text(text, encoding="utf-8")
