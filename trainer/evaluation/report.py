"""The report: one self-contained HTML file (no script, no network) and its plots as PNG files next to it.

Everything in it comes from the result of :func:`trainer.evaluation.results.study` (with ``models``, ``provenance`` and
``settings`` where the caller has them), the runs' training curves, and pictures on request.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from trainer.errors import DataError
from trainer.evaluation.plots import figures, png, svg
from trainer.evaluation.report_sections import (
    Album,
    Pictures,
    Plots,
    Result,
    data_set,
    figure,
    models,
    pair_sets,
    settings,
    template_sets,
    verdict,
)
from trainer.files import replaced

_CSS = """
:root{--ink:#1a1a1a;--soft:#555;--line:#d5d5d5;--safe:#009E73;--unsafe:#D55E00;--undecided:#0072B2}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:#fff;max-width:64rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem;margin:.5rem 0}
h2{font-size:1.25rem;margin:2.5rem 0 .5rem;border-bottom:2px solid var(--line)}
h3{font-size:1.05rem;margin:1.5rem 0 .25rem}
p,li{max-width:46rem}
.soft{color:var(--soft);font-size:.9rem}
.verdict{border-left:.6rem solid;padding:.75rem 1rem;margin:1rem 0;background:#f7f7f7}
.verdict b{font-size:1.3rem;display:block}
.safe{border-color:var(--safe)}
.unsafe{border-color:var(--unsafe)}
.undecided{border-color:var(--undecided)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;margin:.5rem 0}
th,td{border:1px solid var(--line);padding:.3rem .55rem;text-align:left;vertical-align:top}
th{background:#f2f2f2}
td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td small{color:var(--soft)}td:first-child{white-space:nowrap}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,21rem),1fr));gap:1rem}
figure{margin:0;max-width:34rem}
figure>img{width:100%;height:auto}
figcaption{font-size:.85rem;color:var(--soft)}
.pairs{display:flex;flex-wrap:wrap;gap:.75rem;margin:.5rem 0}
.pair{border:1px solid var(--line);padding:.35rem;font-size:.8rem;text-align:center}
.pair img{width:4.5rem;height:4.5rem;object-fit:contain;margin:0 .1rem}
.pair img.tiny{image-rendering:pixelated}
details{margin:.5rem 0}
summary{cursor:pointer;font-weight:600}
pre{overflow-x:auto;background:#f7f7f7;padding:.5rem;font-size:.8rem}
@media (max-width:30rem){body{padding:.6rem;font-size:15px}th,td{padding:.25rem .35rem}}
"""


@dataclass(frozen=True)
class RunRecord:
    """A training run: its name, its curves {series: [(step, value), …]} and its settings as text."""

    name: str
    curves: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    settings: str = ""


def write_report(
    path: Path,
    result: Result,
    runs: Sequence[RunRecord] = (),
    pictures: Pictures | None = None,
    title: str = "Upgrade report",
) -> list[Path]:
    """Write the report and, in the folder ``NAME-plots`` next to it, each plot as PNG.

    Args:
        path: the .html file; replaced in one piece.
        result: plain values, see :func:`trainer.evaluation.results.study`.
        runs: the training runs behind the models.
        pictures: gives the images of example pairs.
        title: the heading.

    Returns:
        The written files, the report first.

    Raises:
        DataError: the place cannot be written.
    """
    drawn = figures(result, {run.name: run.curves for run in runs})
    plots = {name: (svg(plot), text) for name, (plot, text) in drawn.items()}
    page = _page(result, runs, plots, Album(pictures), title)
    written = [path]
    with replaced(path, DataError) as partial:
        folder = path.parent / f"{path.stem}-plots"
        folder.mkdir(exist_ok=True)
        for name, (plot, _) in zip(_file_names(drawn), drawn.values(), strict=True):
            written.append(folder / f"{name}.png")
            written[-1].write_bytes(png(plot))
        partial.write_text(page, encoding="utf-8")
    return written


def _file_names(plots: Iterable[str]) -> list[str]:
    """Names of files for plots: ASCII; those that would be one file, on any system, are numbered."""
    names: list[str] = []
    taken: set[str] = set()
    for plot in plots:
        stem = name = re.sub(r"[^A-Za-z0-9_-]+", "_", plot)
        number = 1
        while name.lower() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.lower())
        names.append(name)
    return names


def _page(result: Result, runs: Sequence[RunRecord], plots: Plots, album: Album, title: str) -> str:
    body = [verdict(result["verdict"]), figure(plots, "criterion", "The pairwise criterion: right of zero is better.")]
    body += [data_set(name, one, plots, album) for name, one in result["sets"].items()]
    body += [pair_sets(result.get("pair_sets", {}), plots), template_sets(result.get("template_sets", {}), plots)]
    curves = [figure(plots, name, "") for name in plots if name.startswith("training-")]
    if curves:
        body.append(f'<h2>Training</h2><div class="figures">{"".join(curves)}</div>')
    body.append(models(result.get("models", {})))
    body.append(settings(result, {run.name: run.settings for run in runs}))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}: {escape(result["verdict"]["answer"])}</title>'
        f"<style>{_CSS}</style></head><body><h1>{escape(title)}</h1>\n"
        + "\n".join(part for part in body if part)
        + "\n</body></html>\n"
    )
