"""What the verdict asks of the person who decides: one to three sentences, from the values of a result."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.evaluation.compatibility import rate_text

Result = Mapping[str, Any]


def next_steps(verdict: Result, sets: Mapping[str, Result], rules: Result) -> list[str]:
    """What to do now: deploy with a threshold, re-encode first, or collect so many more identities.

    Args:
        verdict, sets: of :func:`trainer.evaluation.results.measure_sets`, as plain values. rules: its options' rules.
    """
    judged = [s for s in verdict["sets"] if not s["seen"]]
    if verdict["answer"] == "SAFE":
        name, one = _strictest(judged, sets)
        stays = "" if one["cells"]["new->old"]["how"] == "t12" else "; the gallery stays as it is"
        return [
            f"Deploy the new model for queries{_through(one)}{stays}.",
            _with_threshold(name, one, "new->old"),
            "Re-encode the gallery later; the backfill curves show what that brings.",
            *_about_conversion(judged, sets),
        ]
    if verdict["answer"] == "NOT SAFE":
        return _not_safe(judged, sets)
    return _collect(judged, rules)


def _strictest(judged: Sequence[Result], sets: Mapping[str, Result]) -> tuple[str, Result]:
    """The set that asks for the highest threshold: with it the FAR holds on each."""
    names = {s["name"].partition(", gallery of ")[0] for s in judged}
    name = max(names & set(sets), key=lambda n: sets[n]["operating_point"]["new->old"]["restored"])
    return name, sets[name]


def _through(one: Result) -> str:
    return {
        "t21": ", through T₂₁ (`lce export --transform t21`)",
        "t12": ", after the gallery was converted by T₁₂ (`lce gallery upgrade`)",
    }.get(one["cells"]["new->old"]["how"], "")


def _with_threshold(name: str, one: Result, cell: str) -> str:
    point = one["operating_point"][cell]
    return (
        f"Set the threshold {point['restored']:.4f}: on {name} it gives FAR {rate_text(point['far'])}, as today's "
        f"{point['threshold']:.4f} does, and TAR {point['tar_restored']:.3f} (today {point['tar']:.3f})."
    )


def _not_safe(judged: Sequence[Result], sets: Mapping[str, Result]) -> list[str]:
    keep = "Keep the old model for queries to the present gallery."
    name, one = _strictest(judged, sets)
    old, new = one["cells"]["old->old"], one["cells"]["new->new"]
    if new["rank"]["1"]["value"] <= old["rank"]["1"]["value"]:
        alone = next(entry["answer"] for entry in one["deployments"] if entry["way"] == "new → new")
        if alone == "NOT ENOUGH DATA":
            return [
                keep,
                f"Whether to re-encode is open: {name} cannot tell the new model alone (new → new) from the old one. "
                "Evaluate on a larger or harder set before you decide.",
            ]
        return [
            keep,
            f"Do not re-encode either: on {name} the new model alone (new → new) finds no more than the old one. Train "
            "it longer or with a weaker weight of compatibility first.",
        ]
    return [
        keep,
        "To use the new model, re-encode the whole gallery from its images first (`lce gallery upgrade --images`). "
        + _with_threshold(name, one, "new->new"),
        *_about_conversion(judged, sets),
        "Or train again with a stronger weight of compatibility, and evaluate that model.",
    ]


def _about_conversion(judged: Sequence[Result], sets: Mapping[str, Result]) -> list[str]:
    """Whether the stored vectors may be converted by T₁₂, where the queries do not need it."""
    names = {s["name"].partition(", gallery of ")[0] for s in judged}
    entries = [(name, entry) for name in sorted(names & set(sets)) for entry in sets[name]["deployments"][2:]]
    found = [(name, entry) for name, entry in entries if entry["way"] == "new → T₁₂(old)"]
    if not found:
        return []
    if all(entry["answer"] == "SAFE" for _, entry in found):
        name, entry = max(found, key=lambda item: item[1]["thresholds"]["all"])
        return [
            f"The gallery may be converted by T₁₂ (`lce gallery upgrade`), with the threshold "
            f"{entry['thresholds']['all']:.4f} from then on ({name}, TAR {entry['tar']['value']:.3f})."
        ]
    name, entry = next(item for item in found if item[1]["answer"] != "SAFE")
    return [
        f"Do not convert the gallery by T₁₂ (`lce gallery upgrade`): on {name} new → T₁₂(old) is {entry['answer']}, "
        f"with rank-1 {entry['rank-1']['value']:.3f} where old → old has "
        f"{sets[name]['cells']['old->old']['rank']['1']['value']:.3f}."
    ]


def _collect(judged: Sequence[Result], rules: Result) -> list[str]:
    keep = "Keep the old model until it is decided."
    if not judged:
        return [
            keep,
            "Evaluate on a labelled set of identities that neither model was trained on (`lce evaluate --data`).",
        ]
    return [keep, *(_what_is_missing(s, rules) for s in judged if s["answer"] == "NOT ENOUGH DATA")]


def _what_is_missing(s: Result, rules: Result) -> str:
    more = max(0, rules["min_identities"] - s["identities"])
    for finding in s["findings"]:
        d = finding["difference"]
        if finding["outcome"] == "unclear" and d["value"] and d["low"] is not None:
            reach = max(d["high"] - d["value"], d["value"] - d["low"]) / abs(d["value"])
            more = max(more, math.ceil(s["identities"] * (reach**2 - 1)))
    if any(f["outcome"] == "unclear" for f in s["findings"]) and more > 20 * s["identities"]:
        return (
            f"{s['name']}: the models are so close that no set of a practical size tells them apart; use harder images."
        )
    if more:
        return (
            f"{s['name']}: collect about {more:,} more identities (it has {s['identities']:,}). The estimate holds the "
            "measured differences for true; intervals shrink with the root of the number of identities."
        )
    if len(s["findings"]) < 2:
        return f"{s['name']}: collect more images, so that there are enough impostor pairs for the smallest FAR."
    return f"{s['name']}: use a harder set; on this one both models do equally well."
