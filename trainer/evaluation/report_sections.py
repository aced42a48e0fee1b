"""The sections of the report: each makes a piece of HTML from plain values; :mod:`trainer.evaluation.report` joins."""

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from trainer.evaluation.compatibility import rate_text
from trainer.evaluation.plots import arrow

Result = Mapping[str, Any]
Plots = Mapping[str, tuple[bytes, str]]
"""Name → (SVG, description)."""
Pictures = Callable[[str, int], bytes | None]
"""(set, record number) → an encoded PNG or JPEG, or None where there is no picture."""

_ANSWERS = {"SAFE": ("safe", "✔"), "NOT SAFE": ("unsafe", "✘"), "NOT ENOUGH DATA": ("undecided", "?")}
_KINDS = {
    "missed": ("Wrong: genuine pairs that are missed", "One identity, below the threshold; the lowest cosines."),
    "false": ("Wrong: impostors that are accepted", "Two identities, above the threshold; the highest cosines."),
    "accepted": ("Right, but close: genuine pairs just accepted", "One identity, just above the threshold."),
    "near": ("Right, but close: impostors just rejected", "Two identities, just below the threshold."),
}
_UNRESOLVED = '<p class="soft">* too few impostor pairs to resolve this FAR: shown, but not used for the verdict.</p>'
_ROC = "ROC: the share of genuine pairs that pass, by the share of impostors that pass."
_GAIN = (
    '<h3>Update gain and cost</h3><p class="soft">Gain: the share of the way from the old model to the paragon (a new '
    "model trained without compatibility) that users get before anything is re-encoded. Cost: what compatibility takes "
    "from the new model itself; below zero it is a benefit.</p>"
)


class Album:
    """Pictures as ``<img>``; an empty text where there is none."""

    def __init__(self, pictures: Pictures | None) -> None:
        self._pictures = pictures

    def img(self, name: str, record: int, text: str) -> str:
        """The picture of a set's record; ``text`` says what it is."""
        data = self._pictures(name, record) if self._pictures else None
        if data is None:
            return ""
        kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
        tiny = ' class="tiny"' if kind == "png" and int.from_bytes(data[16:20], "big") < 64 else ""
        encoded = base64.b64encode(data).decode()
        return f'<img{tiny} alt="{escape(text)}" title="{escape(text)}" src="data:image/{kind};base64,{encoded}">'


def verdict(value: Result) -> str:
    """The answer and its paragraph."""
    kind, mark = _ANSWERS[value["answer"]]
    rest = value["paragraph"].partition(": ")[2]
    return (
        f'<div class="verdict {kind}"><b>{mark} {escape(value["answer"])}</b>'
        f"<p>{escape(rest[:1].upper() + rest[1:])}</p></div>"
    )


def figure(plots: Plots, name: str, caption: str) -> str:
    """A plot as an image that carries its own SVG."""
    if name not in plots:
        return ""
    data, text = plots[name]
    source = f"data:image/svg+xml;base64,{base64.b64encode(data).decode()}"
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img class="plot" alt="{escape(text)}" src="{source}">{below}</figure>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already; those that start like a number are set as numbers."""

    def cell(text: str) -> str:
        return f'<td class="n">{text}</td>' if re.match(r"[-+–.0-9]", text) else f"<td>{text}</td>"

    top = "".join(f"<th>{name}</th>" for name in head)
    lines = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>{lines}</table></div>'


def _number(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None else format(value, form)


def _interval(value: Result, form: str = ".3f") -> str:
    if value["value"] is None or value["low"] is None:
        return _number(value["value"], form)
    return f"{value['value']:{form}} <small>[{value['low']:{form}}, {value['high']:{form}}]</small>"


def _tar(value: Result) -> str:
    return _interval(value) + ("" if value["resolved"] else " *")


def models(value: Result) -> str:
    """The models that were compared: role → {property: value}."""
    if not value:
        return ""
    columns = list(dict.fromkeys(key for model in value.values() for key in model))
    rows = [[escape(role), *(escape(str(model.get(key, "–"))) for key in columns)] for role, model in value.items()]
    return "<h2>Models</h2>" + _table(["role", *(escape(key) for key in columns)], rows)


def data_set(name: str, one: Result, plots: Plots, album: Album) -> str:
    """Everything that was measured on one labelled set."""
    captions = {
        "roc": _ROC,
        "scores": "New queries against the old gallery: scores, and what becomes of the threshold.",
        "backfill": "Search with new queries while the gallery is re-encoded, by order of re-encoding.",
    }
    parts = [
        f"<h2>On {escape(name)}</h2><p>{one['identities']:,} identities, {one['images']:,} images. Every image is "
        "compared with every other one, never with itself. In brackets: 95 % intervals by resampling identities.</p>",
        _matrix(one),
        _gain(one),
        _chain(one),
        '<div class="figures">',
        *(figure(plots, f"{name}-{kind}", text) for kind, text in captions.items()),
        "</div>",
        _operating_points(one),
        _point_to_set(one),
        _backfill(one),
        _flips(name, one, album),
        _examples(name, one, album),
    ]
    return "\n".join(part for part in parts if part)


def _matrix(one: Result) -> str:
    fars = [entry["far"] for entry in one["cells"]["old->old"]["tar"]]
    head = [
        "query → gallery",
        "how",
        *(f"TAR at FAR {rate_text(far)}" for far in fars),
        "rank-1",
        "rank-5",
        "EER",
        "pairs",
    ]
    rows = []
    for name, cell in one["cells"].items():
        pairs = f"{cell['genuine_pairs']:,} + {cell['impostor_pairs']:,}"
        rank = [_interval(cell["rank"]["1"]), _number(cell["rank"]["5"])]
        tars = [_tar(value) for value in cell["tar"]]
        rows.append([escape(arrow(name)), cell["how"], *tars, *rank, _number(cell["eer"]), pairs])
    return _table(head, rows) + _unresolved(one["cells"])


def _unresolved(cells: Mapping[str, Result]) -> str:
    """The note on the starred figures, where there are any."""
    starred = any(not value["resolved"] for cell in cells.values() for value in cell["tar"])
    return _UNRESOLVED if starred else ""


def _gain(one: Result) -> str:
    rows = [
        [escape(metric), _interval(value["update_gain"]), _interval(value["cost"])]
        for metric, value in one["gain"].items()
        if value is not None
    ]
    return _GAIN + _table(["metric", "update gain", "cost"], rows) if rows else ""


def _chain(one: Result) -> str:
    rows = [
        [
            escape(f"{pair['query']} → {pair['gallery']}"),
            escape(finding["metric"]),
            _interval(finding["old"]),
            _interval(finding["new"]),
            _interval(finding["difference"], "+.3f"),
            finding["outcome"],
        ]
        for pair in one["chain"]
        for finding in pair["findings"]
    ]
    lead = (
        '<h3>The chain of models</h3><p class="soft">Each later model on each earlier one\'s gallery, against that '
        "model itself.</p>"
    )
    head = ["query → gallery", "metric", "gallery's own model", "later model", "difference", "outcome"]
    return lead + _table(head, rows) if rows else ""


def _operating_points(one: Result) -> str:
    rows = [
        [
            escape(arrow(name)),
            _number(point["threshold"], ".4f"),
            rate_text(point["far_kept"]),
            _number(point["tar_kept"]),
            _number(point["restored"], ".4f"),
            _number(point["tar_restored"]),
        ]
        for name, point in one["operating_point"].items()
    ]
    today = one["operating_point"]["new->old"]
    head = ["query → gallery", "threshold kept", "FAR then", "TAR then", "restoring threshold", "TAR at it"]
    lead = (
        f"<h3>The deployed threshold</h3><p>Today the threshold {today['threshold']:.4f} gives FAR "
        f"{rate_text(today['far'])} and TAR {today['tar']:.3f}. What it gives after the "
        "upgrade, and the threshold that restores the FAR:</p>"
    )
    return lead + _table(head, rows)


def _point_to_set(one: Result) -> str:
    share = one["point_to_set"]
    if share is None:
        return ""
    return (
        f"<h3>Point-to-set criterion</h3><p>{share['nearest']:.1%} of the new embeddings are nearest to the old centre "
        f"of their own class (of the old embeddings {share['old_nearest']:.1%}), {share['within']:.1%} lie within "
        f"their class's old boundary, {share['both']:.1%} are both.</p>{_centre_queries(one)}"
    )


def _centre_queries(one: Result) -> str:
    figures = [f"{escape(metric)} {value:.3f}" for metric, value in one["centre->old"].items()]
    return (
        "<p>A query that stands at the old centre of its identity (made of the images that are not searched for) has "
        f"{', '.join(figures)}: about what compatible training can reach before anything is re-encoded.</p>"
    )


def _backfill(one: Result) -> str:
    if not one["backfill"]:
        return ""
    rows = [
        [
            escape(curve["order"]),
            *(_number(value) for value in (curve["rank1"][0], curve["rank1"][-1], curve["area"]["rank-1"])),
            *(_number(value) for value in (curve["tar"][0], curve["tar"][-1], curve["area"]["TAR"])),
        ]
        for curve in one["backfill"]
    ]
    head = [
        "order of re-encoding",
        "rank-1 before",
        "after",
        "area",
        f"TAR at FAR {rate_text(one['far'])} before",
        "after",
        "area",
    ]
    return "<h3>Backfill</h3>" + _table(head, rows)


def _flips(name: str, one: Result, album: Album) -> str:
    turned = one["flips"]
    parts = [
        f"<h3>Answers that changed</h3><p>Of the rank-1 answers {turned['share_negative']:.2%} were right and are now "
        f"wrong ({turned['negative_count']:,} images), {turned['share_positive']:.2%} were wrong and are now right "
        f"({turned['positive_count']:,}).</p>"
    ]
    if turned["worst_identities"]:
        rows = [
            [escape(str(w["identity"])), str(w["lost"]), str(w["gained"]), str(w["images"])]
            for w in turned["worst_identities"]
        ]
        table = _table(["identity", "lost", "gained", "images"], rows)
        count = f"{turned['worse_identities_count']:,} identities got worse; the {len(rows)} that lost most"
        parts.append(f"<details><summary>{count}</summary>{table}</details>")
    shown = []
    for flip in turned["negative"]:
        trio = (("query", "query"), ("before", "found before"), ("now", "found now"))
        images = [album.img(name, flip[key], f"{text}, record {flip[key]}") for key, text in trio]
        if all(images):
            shown.append(f'<div class="pair">{"".join(images)}<br>cosine now {_number(flip["cosine"])}</div>')
    if shown:
        parts.append('<p class="soft">Each: the query, the right answer of before, the wrong answer of now.</p>')
        parts.append(f'<div class="pairs">{"".join(shown)}</div>')
    return "".join(parts)


def _examples(name: str, one: Result, album: Album) -> str:
    parts = []
    for kind, (heading, meaning) in _KINDS.items():
        cards = []
        for example in (e for e in one["examples"] if e["kind"] == kind):
            images = [
                album.img(name, example[side], f"{side}, record {example[side]}") for side in ("query", "gallery")
            ]
            if all(images):
                cards.append(f'<div class="pair">{"".join(images)}<br>cosine {example["cosine"]:.3f}</div>')
        if cards:
            parts.append(f'<h3>{heading}</h3><p class="soft">{meaning}</p><div class="pairs">{"".join(cards)}</div>')
    if not parts:
        return ""
    lead = (
        "<h3>Pairs to look at</h3><p>New queries (left) against the old gallery (right) at the threshold "
        f"{one['example_threshold']:.4f}.</p>"
    )
    return lead + "".join(parts)


def pair_sets(value: Result, plots: Plots) -> str:
    """Verification sets that are lists of pairs."""
    parts = []
    for name, one in value.items():
        fars = [entry["far"] for entry in next(iter(one["cells"].values()))["tar"]]
        head = ["query → gallery", "accuracy, 10 folds", *(f"TAR at FAR {rate_text(far)}" for far in fars), "EER"]
        rows = [
            [
                escape(arrow(cell_name)),
                f"{cell['accuracy']['mean']:.4f} ± {cell['accuracy']['std']:.4f}",
                *(_tar(entry) for entry in cell["tar"]),
                _number(cell["eer"], ".4f"),
            ]
            for cell_name, cell in one["cells"].items()
        ]
        count = f"{one['genuine']:,} genuine and {one['impostor']:,} impostor pairs"
        parts.append(f"<h3>{escape(name)}</h3><p>{count}; intervals by resampling pairs.</p>{_table(head, rows)}")
        parts.append(_unresolved(one["cells"]) + figure(plots, f"pairs/{name}-roc", _ROC))
    return "<h2>Pair lists</h2>" + "".join(parts) if parts else ""


def template_sets(value: Result, plots: Plots) -> str:
    """Template protocols: 1:1 and 1:N."""
    parts = []
    for name, one in value.items():
        parts.append(f"<h3>{escape(name)}</h3><p>{one['templates']:,} templates of {one['images']:,} images.</p>")
        for kind in ("verification", "identification"):
            cells = {cell: entry[kind] for cell, entry in one["cells"].items() if entry.get(kind)}
            if cells:
                parts.append(_templates_1_1(cells) if kind == "verification" else _templates_1_n(cells))
        parts.append(figure(plots, f"templates/{name}-roc", _ROC))
    return "<h2>Template sets</h2>" + "".join(parts) if parts else ""


def _templates_1_1(cells: Mapping[str, Result]) -> str:
    fars = [entry["far"] for entry in next(iter(cells.values()))["tar"]]
    rows = [[escape(arrow(name)), *(_tar(entry) for entry in cell["tar"])] for name, cell in cells.items()]
    return _table(["1:1", *(f"TAR at FAR {rate_text(far)}" for far in fars)], rows) + _unresolved(cells)


def _templates_1_n(cells: Mapping[str, Result]) -> str:
    first = next(iter(cells.values()))
    rows = [
        [
            escape(arrow(name)),
            *(_number(cell["rank"][k]) for k in first["rank"]),
            *(_number(cell["tpir"][fpir]) for fpir in first["tpir"]),
        ]
        for name, cell in cells.items()
    ]
    head = [
        *(f"rank-{k}" for k in first["rank"]),
        *(f"TPIR at FPIR {rate_text(float(fpir))}" for fpir in first["tpir"]),
    ]
    return _table(["1:N", *head], rows)


def settings(result: Result, runs: Mapping[str, str]) -> str:
    """Versions, the evaluation's settings and those of the runs (name → text)."""
    made = [[escape(key), escape(str(value))] for key, value in result.get("provenance", {}).items()]
    chosen = {**result["options"], **result.get("settings", {})}
    options = _table(["setting", "value"], [[escape(key), escape(str(value))] for key, value in chosen.items()])
    parts = ["<h2>How this was made</h2>", _table(["what", "version"], made) if made else ""]
    parts.append(f"<details><summary>Settings of the evaluation</summary>{options}</details>")
    for name, text in runs.items():
        if text:
            parts.append(
                f"<details><summary>Settings of the run {escape(name)}</summary><pre>{escape(text)}</pre></details>"
            )
    return "".join(parts)
