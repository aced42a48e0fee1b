"""What `lce evaluate` shows on the terminal: a table for each set of each kind, then the verdict."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def print_tables(result: Mapping[str, Any]) -> None:
    """Print the tables of a result and its verdict on standard output."""
    from rich.console import Console

    console = Console()
    for part in parts(result):
        if isinstance(part, str):
            console.print(part, highlight=False, markup=False)
        else:
            console.print(part)
    console.print(result["verdict"]["paragraph"], highlight=False, markup=False)
    for step in result["verdict"]["next"]:
        console.print(f"→ {step}", highlight=False, markup=False)


def parts(result: Mapping[str, Any]) -> "Iterator[Table | str]":
    """Labelled sets, pair lists, and template sets (1:1 and 1:N apart) of what ``lce evaluate`` measured: tables, and
    the sentences beneath them."""
    from trainer.evaluation.report_sections import chain_summary, no_gains

    for name, one in result["sets"].items():
        rows = {of["title"]: [*_tars(of), _number(of["rank"]["1"]["value"])] for of in one["cells"].values()}
        rows |= _gain(one)
        title = f"{name}: {one['identities']:,} identities, {one['images']:,} images"
        yield _table(title, "query → gallery", [*_far_names(one["cells"]), "rank-1"], rows)
        yield from no_gains(one)
        if one["chain_summary"] is not None:
            yield chain_summary(one)
        yield _deployments(name, one)
        if one["pooled"]:
            yield _pooled(name, one)
    for name, one in result["pair_sets"].items():
        rows = {
            cell: [_number(of["accuracy"]["mean"], ".4f"), *_tars(of), _number(of["eer"], ".4f")]
            for cell, of in one["cells"].items()
        }
        title = f"{name}: {one['genuine']:,} genuine and {one['impostor']:,} impostor pairs"
        yield _table(title, "query → gallery", ["accuracy", *_far_names(one["cells"]), "EER"], rows)
    for name, one in result["template_sets"].items():
        title = f"{name}: {one['templates']:,} templates of {one['images']:,} images"
        pairs, searches = (
            {cell: of[kind] for cell, of in one["cells"].items() if kind in of}
            for kind in ("verification", "identification")
        )
        if pairs:
            rows = {cell: [*_tars(of), _number(of["eer"], ".4f")] for cell, of in pairs.items()}
            yield _table(title, "1:1", [*_far_names(pairs), "EER"], rows)
        if searches:
            yield _table(title, "1:N", _search_names(searches), {c: _search(of) for c, of in searches.items()})


def _gain(one: Mapping[str, Any]) -> dict[str, list[str]]:
    """The row of the update gain, where there is a paragon; a dash where the gain says nothing."""
    from trainer.evaluation.compatibility import no_gain, tar_name

    metrics = [*(tar_name(entry["far"]) for entry in next(iter(one["cells"].values()))["tar"]), "rank-1"]
    gains = [one["gain"].get(metric) for metric in metrics]
    if not any(gains):
        return {}
    shown = [None if gain is None or no_gain(gain) else gain["update_gain"]["value"] for gain in gains]
    return {"update gain": [_number(value) for value in shown]}


def _deployments(name: str, one: Mapping[str, Any]) -> "Table":
    from trainer.evaluation.compatibility import rate_text
    from trainer.evaluation.report_sections import thresholds

    far = rate_text(one["far"])
    rows = {
        entry["way"]: [
            thresholds(entry), _number(entry["tar"]["value"]), _number(entry["rank-1"]["value"]), entry["answer"] or "–"
        ]
        for entry in one["deployments"]
    }  # fmt: skip
    head = [f"threshold for FAR {far}", f"TAR@FAR={far}", "rank-1", "verdict"]
    return _table(f"{name}: ways of deploying", "query → gallery", head, rows)


def _pooled(name: str, one: Mapping[str, Any]) -> "Table":
    from trainer.evaluation.compatibility import tar_name

    rows = {of["name"]: [*map(_tar, of["tar"], of["resolved"]), _number(of["rank1"]["value"])] for of in one["pooled"]}
    head = [*(tar_name(far) for far in one["pooled"][0]["fars"]), "rank-1"]
    return _table(f"{name}, pooled by identity: {one['pooled'][0]['protocol']}", "query → gallery", head, rows)


def _table(title: str, corner: str, head: Sequence[str], rows: Mapping[str, Sequence[str]]) -> "Table":
    from rich.markup import escape
    from rich.table import Column, Table

    starred = any(value.endswith("*") for row in rows.values() for value in row)
    caption = "* too few impostor pairs to resolve this FAR" if starred else None
    table = Table(Column(corner, overflow="fold"), *head, title=escape(title), caption=caption)
    for cell, values in rows.items():
        table.add_row(escape(cell.replace("->", " → ")), *values)
    return table


def _far_names(cells: Mapping[str, Any]) -> list[str]:
    from trainer.evaluation.compatibility import tar_name

    return [tar_name(entry["far"]) for entry in next(iter(cells.values()))["tar"]]


def _tars(cell: Mapping[str, Any]) -> list[str]:
    return [_tar(entry["value"], entry["resolved"]) for entry in cell["tar"]]


def _tar(value: float | None, resolved: bool) -> str:
    return _number(value) + ("" if resolved else " *")


def _search_names(cells: Mapping[str, Any]) -> list[str]:
    from trainer.evaluation.compatibility import rate_text

    first = next(iter(cells.values()))
    return [*(f"rank-{k}" for k in first["rank"]), *(f"TPIR@FPIR {rate_text(float(f))}" for f in first["tpir"])]


def _search(cell: Mapping[str, Any]) -> list[str]:
    return [_number(value) for value in (*cell["rank"].values(), *cell["tpir"].values())]


def _number(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None else format(value, form)
