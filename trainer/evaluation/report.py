"""The report: one self-contained HTML file (no script, no network) and its plots as PNG files next to it.

Everything in it comes from the result of :func:`trainer.evaluation.results.measure_sets` (with ``models``,
``provenance`` and ``settings`` where the caller has them), the runs' training curves, and pictures on request.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from trainer.errors import DataError
from trainer.evaluation.plots import figures, png, svg
from trainer.evaluation.report_sections import (
    ANSWERS,
    GLOSSARY,
    Album,
    Pictures,
    Plots,
    Result,
    data_set,
    facts,
    models,
    options,
    pair_sets,
    plot,
    template_sets,
    versions,
)
from trainer.files import replaced


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
    title: str = "",
) -> list[Path]:
    """Write the report and, in the folder ``NAME-plots`` next to it, each plot as PNG.

    Args:
        path: the .html file; replaced in one piece.
        result: plain values, see :func:`trainer.evaluation.results.measure_sets`.
        runs: the training runs behind the models.
        pictures: gives the images of example pairs; None: the report holds none.
        title: the heading; by default the question that the report answers, with the names of the models.

    Returns:
        The written files, the report first.

    Raises:
        DataError: the place cannot be written.
    """
    drawn = figures(result, {run.name: run.curves for run in runs})
    plots = {name: plot(svg(figure), text) for name, (figure, text) in drawn.items()}
    page = _page(result, runs, plots, Album(pictures), title)
    written = [path]
    with replaced(path, DataError) as partial:
        folder = path.parent / f"{path.stem}-plots"
        folder.mkdir(exist_ok=True)
        for name, (figure, _) in zip(_file_names(drawn), drawn.values(), strict=True):
            written.append(folder / f"{name}.png")
            written[-1].write_bytes(png(figure))
        partial.write_text(page, encoding="utf-8")
    return written


def _file_names(plots: Iterable[str]) -> list[str]:
    """Names of files for plots: ASCII; those that would be one file, on any system, are numbered."""
    names: list[str] = []
    taken: set[str] = set()
    for given in plots:
        stem = name = re.sub(r"[^A-Za-z0-9_-]+", "_", given)
        number = 1
        while name.lower() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.lower())
        names.append(name)
    return names


def _page(result: Result, runs: Sequence[RunRecord], plots: Plots, album: Album, title: str) -> str:
    import jinja2  # loaded with torch in any case, but not for --help

    verdict = result["verdict"]
    kind, mark = ANSWERS[verdict["answer"]]
    level = result["options"]["rules"]["level"]
    sentence, _, reasons = verdict["paragraph"].partition(". ")
    answer, _, said = sentence.partition(": ")
    sets = [data_set(at, name, one, plots, album, level) for at, (name, one) in enumerate(result["sets"].items(), 1)]
    values = {
        "title": title or _title(result),
        "facts": facts(result),
        "kind": kind,
        "mark": mark,
        "answer": answer,
        "sentence": f"{said[:1].upper()}{said[1:]}.",
        "caveats": verdict["caveats"],
        "reasons": reasons.removeprefix(" ".join(verdict["caveats"])).strip(),
        "steps": verdict["next"],
        "criterion": plots.get("criterion"),
        "labelled": sets,
        "pair_sets": pair_sets(result.get("pair_sets", {}), plots),
        "template_sets": template_sets(result.get("template_sets", {}), plots),
        "training": [plots[name] for name in plots if name.startswith("training-")],
        "models": models(result.get("models", {})),
        "glossary": GLOSSARY,
        "versions": versions(result),
        "options": options(result),
        "runs": [(run.name, run.settings) for run in runs if run.settings],
        "holds_pictures": album.used,
    }
    pages = Path(__file__).parent / "pages"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pages), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    # Of this package, not of a user's file; < and & of CSS would not survive escaping.
    css = Markup((pages / "report.css").read_text(encoding="utf-8"))
    return environment.get_template("report.html").render(values, css=css, contents=_contents(values))


def _title(result: Result) -> str:
    paths = {role: str(model["path"]) for role, model in result.get("models", {}).items()}
    if "old" not in paths or "new" not in paths:
        return "Upgrade report"
    old, new = (re.split(r"[/\\](?=.)", paths[role])[-1] for role in ("old", "new"))
    if old == new:
        old, new = paths["old"], paths["new"]
    return f"May {new} query the gallery of {old}?"


def _contents(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(anchor, text) of the sections that the page has."""
    found = [("next", "What to do now"), ("why", "Why")]
    found += [(one["id"], f"On {one['name']}") for one in values["labelled"]]
    optional = (("pairs", "Pair lists", "pair_sets"), ("templates", "Template sets", "template_sets"))
    found += [(anchor, text) for anchor, text, key in (*optional, ("training", "Training", "training")) if values[key]]
    found += [("models", "Models")] if values["models"].rows else []
    return [*found, ("glossary", "Glossary"), ("made", "How this was made")]
