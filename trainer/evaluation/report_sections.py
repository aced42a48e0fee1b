"""The report's contents: what the templates of ``pages/`` show, made from the plain values of a result.

Nothing here is HTML; the templates escape every text.
"""

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.evaluation.compatibility import MAPS, rate_text
from trainer.evaluation.compatibility import no_gain as no_gain
from trainer.evaluation.plots import arrow

Result = Mapping[str, Any]
Pictures = Callable[[str, int], bytes | None]
"""(set, record number) → an encoded PNG or JPEG, or None where there is no picture."""

ANSWERS = {"SAFE": ("safe", "✔"), "NOT SAFE": ("unsafe", "✘"), "NOT ENOUGH DATA": ("undecided", "?")}
_KINDS = {
    "missed": ("Wrong: genuine pairs that are missed", "One identity, below the threshold; the lowest cosines."),
    "false": ("Wrong: impostors that are accepted", "Two identities, above the threshold; the highest cosines."),
    "accepted": ("Right, but close: genuine pairs just accepted", "One identity, just above the threshold."),
    "near": ("Right, but close: impostors just rejected", "Two identities, just below the threshold."),
}
GLOSSARY = (
    ("new → old", "Queries of the new model against a gallery of the old one: query first, gallery second."),
    (
        "T₂₁, T₁₂",
        "Trained maps: T₂₁ carries the new model's vectors into the old space, T₁₂ the old ones into the new.",
    ),
    ("Gallery", "The stored vectors of known identities, in which a query is searched."),
    ("Genuine, impostor", "A pair of images of one identity; a pair of images of two identities."),
    ("FAR", "False accept rate: the share of impostor pairs that pass the threshold. 1e-4 is one in 10,000."),
    ("TAR", "True accept rate: the share of genuine pairs that pass it. Higher is better."),
    ("Rank-1", "The share of queries whose best match in the gallery is of the own identity. Higher is better."),
    ("EER", "Equal error rate: where as many genuine pairs are missed as impostors are accepted. Lower is better."),
    ("Interval", "The range in which the figure lies with the stated confidence, if other identities had been drawn."),
    ("Paragon", "The new model trained without regard to the old one: the best that new → new could be."),
    ("Backfill", "Re-encoding the gallery's images with the new model, part by part."),
    (
        "Orders of re-encoding",
        "random: images in random order. confidence: the images first that the old model places least clearly. class: "
        "whole identities, one after another.",
    ),
)


@dataclass(frozen=True)
class Value:
    """One entry of a table: its text, an interval in brackets, and a mark behind it."""

    text: str
    interval: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """Column names and rows; ``title`` is for those who hear the page. A column of numbers is set to the right."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Value]] = ()

    @property
    def numeric(self) -> list[bool]:
        """By column: whether each of its entries is a number or a dash."""
        columns = zip(*self.rows, strict=True)
        return [all(re.match(r"[-+–.0-9]", cell.text) for cell in column) for column in columns]

    @property
    def starred(self) -> bool:
        """Whether a figure is marked as unresolved."""
        return any(cell.mark for row in self.rows for cell in row)


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[Value | str]]) -> Table:
    """A table of values and texts."""
    return Table(title, head, [[v if isinstance(v, Value) else Value(v) for v in row] for row in rows])


@dataclass(frozen=True)
class Image:
    """A picture or plot as a data URI, and what it shows."""

    source: str
    text: str
    tiny: bool = False


def plot(svg: bytes, text: str) -> Image:
    """A plot as an image that carries its own SVG."""
    return Image(f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}", text)


Plots = Mapping[str, Image]


@dataclass
class Album:
    """The pictures of example pairs; ``used`` after one was given."""

    pictures: Pictures | None
    used: bool = field(default=False, init=False)

    def image(self, name: str, record: int, text: str) -> Image | None:
        """The picture of a set's record, None where there is none; ``text`` says what it is."""
        data = self.pictures(name, record) if self.pictures else None
        if data is None:
            return None
        self.used = True
        kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
        tiny = kind == "png" and int.from_bytes(data[16:20], "big") < 64
        return Image(f"data:image/{kind};base64,{base64.b64encode(data).decode()}", text, tiny)


def number(value: float | None, form: str = ".3f") -> str:
    """A number, or a dash."""
    return "–" if value is None else format(value, form)


def _interval(value: Result, form: str = ".3f") -> Value:
    if value["value"] is None or value["low"] is None:
        return Value(number(value["value"], form))
    return Value(f"{value['value']:{form}}", f"[{value['low']:{form}}, {value['high']:{form}}]")


def _tar(value: Result) -> Value:
    measured = _interval(value)
    return Value(measured.text, measured.interval, "" if value["resolved"] else " *")


def facts(result: Result) -> list[tuple[str, str]]:
    """What the head of the page names: the models, the data, the date."""
    titles = {"old": "Deployed model", "new": "New model", "paragon": "Paragon"}
    found = [
        (titles.get(role, f"Model between, {role}"), str(model["path"]))
        for role, model in result.get("models", {}).items()
    ]
    sets = [f"{name} ({_size(one)})" for name, one in result["sets"].items()]
    sets += [f"{name} (pair list)" for name in result.get("pair_sets", {})]
    sets += [f"{name} (template protocol)" for name in result.get("template_sets", {})]
    found.append(("Data", "; ".join(sets) or "none"))
    date = result.get("provenance", {}).get("date")
    return [*found, *([("Date", str(date))] if date else [])]


def _size(one: Result) -> str:
    return f"{one['identities']:,} identities, {one['images']:,} images"


def models(value: Result) -> Table:
    """The models that were compared: role → {property: value}."""
    columns = list(dict.fromkeys(key for model in value.values() for key in model))
    rows = [[role, *(str(model.get(key, "–")) for key in columns)] for role, model in value.items()]
    return table("Models", ["role", *columns], rows)


def data_set(at: int, name: str, one: Result, plots: Plots, album: Album, level: float) -> dict[str, Any]:
    """Everything that was measured on one labelled set, the ``at``-th."""
    gain, no_gain = _gain(one)
    lost, lost_count = _lost(one)
    today = one["operating_point"]["new->old"]
    return {
        "id": f"set-{at}",
        "name": name,
        "size": _size(one),
        "level": f"{100 * level:g} %",
        "matrix": _matrix(one),
        "gain": gain,
        "no_gain": no_gain,
        "deployments": deployments(one),
        "pooled": pooled(one),
        "pooled_protocol": one["pooled"][0]["protocol"] if one["pooled"] else "",
        "chain": _chain(one),
        "chain_summary": chain_summary(one),
        "roc": plots.get(f"{name}-roc"),
        "scores": plots.get(f"{name}-scores"),
        "curves": plots.get(f"{name}-backfill"),
        "today": f"Today the threshold {today['threshold']:.4f} gives FAR {rate_text(today['far'])} and TAR "
        f"{today['tar']:.3f}. What it gives after the upgrade, and the threshold that restores the FAR:",
        "points": _operating_points(one),
        "point_to_set": _point_to_set(one),
        "centre": _centre_queries(one),
        "backfill": _backfill(one),
        "changed": _changed(one),
        "lost": lost,
        "lost_count": lost_count,
        "turned": _turned(name, one, album),
        "examples": _examples(name, one, album),
        "examples_lead": "New queries (left) against the old gallery (right) at the threshold "
        f"{one['example_threshold']:.4f}.",
    }


def _matrix(one: Result) -> Table:
    fars = [entry["far"] for entry in one["cells"]["old->old"]["tar"]]
    head = ["query → gallery", "how", *_tar_heads(fars), "rank-1", "rank-5", "EER", "genuine pairs", "impostor pairs"]
    rows: list[list[Value | str]] = []
    for cell in one["cells"].values():
        rank: list[Value | str] = [_interval(cell["rank"]["1"]), number(cell["rank"]["5"])]
        pairs = [f"{cell['genuine_pairs']:,}", f"{cell['impostor_pairs']:,}"]
        rows.append(
            [
                cell["title"],
                MAPS.get(cell["how"], cell["how"]),
                *map(_tar, cell["tar"]),
                *rank,
                number(cell["eer"]),
                *pairs,
            ]
        )
    return table("Figures by query and gallery model", head, rows)


def deployments(one: Result) -> Table:
    """Every way of deploying with its threshold and verdict."""
    rows: list[list[Value | str]] = [
        [
            entry["way"],
            thresholds(entry),
            _interval(entry["tar"]),
            _interval(entry["rank-1"]),
            entry["answer"] or ("today" if entry["meaning"] == "today" else "comparison"),
            entry["meaning"],
        ]
        for entry in one["deployments"]
    ]
    far = rate_text(one["far"])
    head = ["query → gallery", f"threshold for FAR {far}", f"TAR at FAR {far}", "rank-1", "verdict", "what it is"]
    return table("Ways of deploying", head, rows)


def thresholds(entry: Result) -> str:
    """The threshold of a deployment, or one for each store."""
    return ", ".join(
        number(value, ".4f") + ("" if store == "all" else f" ({store})") for store, value in entry["thresholds"].items()
    )


def pooled(one: Result) -> Table:
    """Galleries of one vector an identity."""
    rows: list[list[Value | str]] = []
    for entry in one["pooled"]:
        known = zip(entry["tar"], entry["resolved"], strict=True)
        tars = [Value(number(tar), mark="" if resolved else " *") for tar, resolved in known]
        rows.append([entry["name"], *tars, _interval(entry["rank1"])])
    fars = one["pooled"][0]["fars"] if rows else ()
    return table("Pooled galleries", ["query → pooled gallery", *_tar_heads(fars), "rank-1"], rows)


def chain_summary(one: Result) -> str:
    """Average compatibility, average figures and drift, in sentences; empty for two models."""
    found = one["chain_summary"]
    if found is None:
        return ""
    shares = ", ".join(f"{share:.0%} by {metric}" for metric, share in found["average_compatibility"].items())
    means = ", ".join(f"{metric} {value:.3f}" for metric, value in found["average"].items())
    drift = ", ".join(f"{model} {value:.3f}" for model, value in found["drift"].items())
    return (
        f"Average compatibility (the share of {found['pairs']} pairs above the gallery's own model): {shares}. Mean "
        f"over these pairs and every model alone: {means}. Drift from the first gallery (1 less the mean cosine to its "
        f"vectors): {drift or 'not comparable'}."
    )


def _tar_heads(fars: Sequence[float]) -> list[str]:
    return [f"TAR at FAR {rate_text(far)}" for far in fars]


def _gain(one: Result) -> tuple[Table, list[str]]:
    """The table, and a sentence for each metric whose gain would say nothing."""
    rows: list[list[Value | str]] = []
    for metric, value in one["gain"].items():
        if value is not None:
            shown = "–" if no_gain(value) else _interval(value["update_gain"])
            rows.append([metric, shown, _interval(value["cost"])])
    return table("Update gain and cost", ["metric", "update gain", "cost"], rows), no_gains(one)


def no_gains(one: Result) -> list[str]:
    """A sentence for each metric whose gain would say nothing."""
    reasons = {metric: no_gain(value) for metric, value in one["gain"].items() if value is not None}
    return [f"No gain by {metric}: {why}." for metric, why in reasons.items() if why]


def _chain(one: Result) -> Table:
    rows = [
        [
            f"{pair['query']} → {pair['gallery']}",
            finding["metric"],
            _interval(finding["old"]),
            _interval(finding["new"]),
            _interval(finding["difference"], "+.3f"),
            finding["outcome"],
        ]
        for pair in one["chain"]
        for finding in pair["findings"]
    ]
    head = ["query → gallery", "metric", "gallery's own model", "later model", "difference", "outcome"]
    return table("The chain of models", head, rows)


def _operating_points(one: Result) -> Table:
    rows = [
        [
            one["cells"][name]["title"],
            number(point["threshold"], ".4f"),
            rate_text(point["far_kept"]),
            number(point["tar_kept"]),
            number(point["restored"], ".4f"),
            number(point["tar_restored"]),
        ]
        for name, point in one["operating_point"].items()
    ]
    head = ["query → gallery", "threshold kept", "FAR then", "TAR then", "restoring threshold", "TAR at it"]
    return table("The deployed threshold", head, rows)


def _point_to_set(one: Result) -> str:
    share = one["point_to_set"]
    if share is None:
        return ""
    return (
        f"{share['nearest']:.1%} of the new embeddings are nearest to the old centre of their own class (of the old "
        f"embeddings {share['old_nearest']:.1%}), {share['within']:.1%} lie within their class's old boundary, "
        f"{share['both']:.1%} are both."
    )


def _centre_queries(one: Result) -> str:
    if one["centre->old"] is None:
        return ""
    figures = ", ".join(f"{metric} {value:.3f}" for metric, value in one["centre->old"].items())
    return (
        "A query that stands at the old centre of its identity (made of the images that are not searched for) has "
        f"{figures}. That is where LCE pulls new embeddings. It is no upper bound: a query that also knows how its "
        "image differs from the centre can find more."
    )


def _backfill(one: Result) -> Table:
    rows = [
        [
            curve["order"],
            *(number(value) for value in (curve["rank1"][0], curve["rank1"][-1], curve["area"]["rank-1"])),
            *(number(value) for value in (curve["tar"][0], curve["tar"][-1], curve["area"]["TAR"])),
        ]
        for curve in one["backfill"]
    ]
    tar = f"TAR at FAR {rate_text(one['far'])}"
    head = ["order of re-encoding", "rank-1 before", "after", "mean", f"{tar} before", "after", "mean"]
    return table("Backfill", head, rows)


def _changed(one: Result) -> str:
    turned = one["flips"]
    return (
        f"Of the rank-1 answers {turned['share_negative']:.2%} were right and are now wrong "
        f"({turned['negative_count']:,} images), {turned['share_positive']:.2%} were wrong and are now right "
        f"({turned['positive_count']:,})."
    )


def _lost(one: Result) -> tuple[Table, str]:
    worst = one["flips"]["worst_identities"]
    rows = [[str(w["identity"]), str(w["lost"]), str(w["gained"]), str(w["images"])] for w in worst]
    count = f"{one['flips']['worse_identities_count']:,} identities got worse; the {len(rows)} that lost most"
    return table("Identities that got worse", ["identity", "lost", "gained", "images"], rows), count


def _turned(name: str, one: Result, album: Album) -> list[dict[str, Any]]:
    """Cards of three pictures: the query, what was found before, what is found now."""
    trio = (("query", "query"), ("before", "found before"), ("now", "found now"))
    found = []
    for flip in one["flips"]["negative"]:
        images = [album.image(name, flip[key], f"{text}, record {flip[key]}") for key, text in trio]
        if all(images):
            found.append({"images": images, "text": f"cosine now {number(flip['cosine'])}"})
    return found


def _examples(name: str, one: Result, album: Album) -> list[dict[str, Any]]:
    groups = []
    for kind, (heading, meaning) in _KINDS.items():
        cards = []
        for example in (e for e in one["examples"] if e["kind"] == kind):
            images = [album.image(name, example[end], f"{end}, record {example[end]}") for end in ("query", "gallery")]
            if all(images):
                cards.append({"images": images, "text": f"cosine {example['cosine']:.3f}"})
        if cards:
            groups.append({"heading": heading, "meaning": meaning, "cards": cards})
    return groups


def pair_sets(value: Result, plots: Plots) -> list[dict[str, Any]]:
    """Verification sets that are lists of pairs."""
    found = []
    for name, one in value.items():
        fars = [entry["far"] for entry in next(iter(one["cells"].values()))["tar"]]
        head = ["query → gallery", "accuracy, 10 folds", *_tar_heads(fars), "EER"]
        rows: list[list[Value | str]] = [
            [
                arrow(cell_name),
                f"{cell['accuracy']['mean']:.4f} ± {cell['accuracy']['std']:.4f}",
                *map(_tar, cell["tar"]),
                number(cell["eer"], ".4f"),
            ]
            for cell_name, cell in one["cells"].items()
        ]
        size = f"{one['genuine']:,} genuine and {one['impostor']:,} impostor pairs"
        roc = plots.get(f"pairs/{name}-roc")
        found.append({"name": name, "size": size, "table": table(f"Pairs of {name}", head, rows), "roc": roc})
    return found


def template_sets(value: Result, plots: Plots) -> list[dict[str, Any]]:
    """Template protocols: 1:1 and 1:N."""
    found = []
    for name, one in value.items():
        kinds = {
            kind: {cell: entry[kind] for cell, entry in one["cells"].items() if entry.get(kind)}
            for kind in ("verification", "identification")
        }
        found.append(
            {
                "name": name,
                "size": f"{one['templates']:,} templates of {one['images']:,} images",
                "verification": _templates_1_1(kinds["verification"]) if kinds["verification"] else None,
                "identification": _templates_1_n(kinds["identification"]) if kinds["identification"] else None,
                "roc": plots.get(f"templates/{name}-roc"),
            }
        )
    return found


def _templates_1_1(cells: Mapping[str, Result]) -> Table:
    fars = [entry["far"] for entry in next(iter(cells.values()))["tar"]]
    rows: list[list[Value | str]] = [[arrow(name), *map(_tar, cell["tar"])] for name, cell in cells.items()]
    return table("Templates, 1:1", ["1:1", *_tar_heads(fars)], rows)


def _templates_1_n(cells: Mapping[str, Result]) -> Table:
    first = next(iter(cells.values()))
    rows = [
        [
            arrow(name),
            *(number(cell["rank"][k]) for k in first["rank"]),
            *(number(cell["tpir"][fpir]) for fpir in first["tpir"]),
        ]
        for name, cell in cells.items()
    ]
    searches = [f"TPIR at FPIR {rate_text(float(fpir))}" for fpir in first["tpir"]]
    return table("Templates, 1:N", ["1:N", *(f"rank-{k}" for k in first["rank"]), *searches], rows)


def versions(result: Result) -> Table:
    """What the result was made with."""
    made = result.get("provenance", {}).items()
    return table("Versions", ["what", "version"], [[key, str(value)] for key, value in made])


def options(result: Result) -> Table:
    """The evaluation's settings."""
    chosen = {**result["options"], **result.get("settings", {})}
    rows = []
    for key, value in chosen.items():
        inner = {f"{key}: {name}": one for name, one in value.items()} if isinstance(value, dict) else {key: value}
        rows += [[name, _plain(one)] for name, one in inner.items()]
    return table("Settings", ["setting", "value"], rows)


def _plain(value: Any) -> str:
    """A setting in words."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
