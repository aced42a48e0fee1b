"""The report's figures. Colours are Okabe and Ito's, safe for the colour-blind; lines differ in dash too."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from trainer.evaluation.bootstrap import LEVEL
from trainer.evaluation.compatibility import rate_text

Result = Mapping[str, Any]

CELL_STYLES: dict[str, tuple[str, str]] = {
    "old->old": ("#000000", "--"),
    "new->old": ("#0072B2", "-"),
    "new->new": ("#009E73", "-."),
    "old->new": ("#E69F00", ":"),
    "paragon->paragon": ("#CC79A7", (0, (5, 1, 1, 1, 1, 1))),  # type: ignore[dict-item]
    "paragon->old": ("#D55E00", (0, (1, 2))),  # type: ignore[dict-item]
}
_ORDER_STYLES = {
    "random": ("#0072B2", "-", "o"),
    "confidence": ("#D55E00", "--", "s"),
    "class": ("#009E73", "-.", "^"),
    "distance": ("#CC79A7", ":", "D"),
}
_RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLE = {
    "font.size": 10,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "path",
    "svg.hashsalt": "lce",
}


_HALF, _WHOLE = 4.8, 9.6
"""Widths in inches of a figure next to another one, and of one that has the page for itself."""


def arrow(cell: str) -> str:
    """``new->old`` → ``new → old``, the way figures and tables write it."""
    return cell.replace("->", " → ")


def _figure(height: float = 3.3, width: float = _HALF) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def figures(
    result: Result, runs: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]
) -> dict[str, tuple[Figure, str]]:
    """Every figure of a report: name → (figure, description for those who cannot see it).

    Args:
        result: what :func:`trainer.evaluation.results.measure_sets` returned, with ``pair_sets`` and
            ``template_sets`` where there are any. runs: run → series → [(step, value), …].
    """
    with mpl.rc_context(_STYLE):
        out: dict[str, tuple[Figure, str]] = {}
        if result["verdict"]["sets"]:
            out["criterion"] = (
                _criterion(result["verdict"]["sets"]),
                "Differences new→old less old→old with intervals",
            )
        for name, one in result["sets"].items():
            out[f"{name}-roc"] = (_roc(one["cells"]), f"ROC curves on {name}")
            out[f"{name}-scores"] = (_scores(one), f"Scores of genuine and impostor pairs, new → old, on {name}")
            if one["backfill"]:
                out[f"{name}-backfill"] = (_backfill(one), f"Backfill curves on {name}")
        for name, one in result.get("pair_sets", {}).items():
            out[f"pairs/{name}-roc"] = (_roc(one["cells"]), f"ROC curves on the pairs of {name}")
        for name, one in result.get("template_sets", {}).items():
            cells = {cell: entry["verification"] for cell, entry in one["cells"].items() if "verification" in entry}
            if cells:
                out[f"templates/{name}-roc"] = (_roc(cells), f"ROC curves on the templates of {name}")
        keys = dict.fromkeys(key for series in runs.values() for key in series)
        for key in keys:
            width = _HALF if len(keys) > 1 else _WHOLE
            out[f"training-{key}"] = (_training(key, runs, width), f"Training curves: {key}")
        return out


def svg(figure: Figure) -> bytes:
    """A figure as SVG."""
    with mpl.rc_context(_STYLE):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        return buffer.getvalue()


def png(figure: Figure) -> bytes:
    """A figure as PNG, 150 dots per inch."""
    with mpl.rc_context(_STYLE):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        return buffer.getvalue()


def _criterion(sets: Sequence[Result]) -> Figure:
    rows = [(one["name"], finding) for one in sets for finding in one["findings"]]
    figure, axes = _figure(1.1 + 0.5 * len(rows), _WHOLE)
    colours = {"better": "#009E73", "worse": "#D55E00", "level": "#0072B2", "unclear": "#000000"}
    markers = {"better": "^", "worse": "v", "level": "o", "unclear": "D"}
    axes.axvline(0, color="#000000", linewidth=1)
    for y, (_, finding) in enumerate(rows):
        d, outcome = finding["difference"], finding["outcome"]
        low, high = (d["value"] if d[end] is None else d[end] for end in ("low", "high"))
        axes.plot([low, high], [y, y], color=colours[outcome], linewidth=3, solid_capstyle="butt")
        axes.plot(d["value"], y, marker=markers[outcome], color=colours[outcome], markersize=8)
        axes.annotate(outcome, (d["value"], y), (0, 8), textcoords="offset points", ha="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [f"{name}\n{finding['metric']}" for name, finding in rows])
    axes.set_ylim(len(rows) - 0.5, -0.7)
    axes.set_xlabel(f"(new → old) less (old → old), {100 * LEVEL:g} % interval")
    return figure


def _roc(cells: Result) -> Figure:
    figure, axes = _figure(3.8)
    for name, cell in cells.items():
        if name not in CELL_STYLES:
            continue  # the other pairs of a chain stand in the table
        colour, dash = CELL_STYLES[name]
        axes.plot(cell["roc"]["far"], cell["roc"]["tar"], color=colour, linestyle=dash, label=arrow(name))
    axes.set_xscale("log")
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("FAR (impostors accepted)")
    axes.set_ylabel("TAR (genuine accepted)")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _scores(one: Result) -> Figure:
    figure, axes = _figure(3.6)
    cell, point = one["cells"]["new->old"], one["operating_point"]["new->old"]
    edges = cell["histogram"]["edges"]
    for kind, colour, dash in (("impostor", "#D55E00", "--"), ("genuine", "#0072B2", "-")):
        axes.stairs(cell["histogram"][kind], edges, color=colour, linestyle=dash, linewidth=1.6, label=f"{kind} pairs")
        axes.stairs(cell["histogram"][kind], edges, color=colour, fill=True, alpha=0.12)
    axes.axvline(
        point["threshold"], color="#000000", linestyle="--", label=f"deployed threshold {point['threshold']:.3f}"
    )
    axes.axvline(point["restored"], color="#009E73", label=f"restored threshold {point['restored']:.3f}")
    used = [
        e
        for e, g, i in zip(edges, cell["histogram"]["genuine"], cell["histogram"]["impostor"], strict=False)
        if g + i > 0
    ]
    axes.set_xlim(min(used) - 0.05, 1.02)
    axes.set_xlabel("cosine, new → old")
    axes.set_ylabel("share of pairs")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _backfill(one: Result) -> Figure:
    figure = Figure(figsize=(4.8, 4.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, key, base in ((upper, "rank1", "rank-1"), (lower, "tar", "TAR")):
        for curve in one["backfill"]:
            colour, dash, marker = _ORDER_STYLES[curve["order"]]
            label = curve["order"] if axes is upper else None
            axes.plot(
                curve["shares"], curve[key], color=colour, linestyle=dash, marker=marker, markersize=4, label=label
            )
        axes.set_ylabel(base if key == "rank1" else f"TAR at FAR {rate_text(one['far'])}")
    lower.xaxis.set_major_formatter(PercentFormatter(1.0))
    lower.set_xlabel("share of the gallery re-encoded")
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def _training(key: str, runs: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], width: float) -> Figure:
    figure, axes = _figure(width=width)
    dashes = ("-", "--", "-.", ":")
    for at, (run, series) in enumerate(runs.items()):
        if key in series:
            steps, values = zip(*series[key], strict=True)
            axes.plot(steps, values, color=_RUN_COLOURS[at % 6], linestyle=dashes[at % 4], linewidth=1.2, label=run)
    axes.set_xlabel("step")
    axes.set_ylabel(key)
    figure.legend(loc="outside lower center", ncols=2)
    return figure
