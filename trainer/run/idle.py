"""Run folders of version 0.1: their configurations hold every key of every variant, most of them without effect."""

from collections.abc import Mapping
from typing import Any

VARIANTS: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "data": (
        "loader",
        {
            "path labels workers max_bad_records augment": ("auto", "dali", "torch"),
            "synthetic_classes synthetic_size synthetic_records": ("synthetic",),
        },
    ),
    "head.margin": (
        "name",
        {
            "m": ("cosface", "arcface", "adaface", "curricular"),
            "m1 m2 m3": ("combined",),
            "gradient": ("arcface", "combined"),
            "h norm_momentum": ("adaface",),
            "lower_norm upper_norm lower_margin upper_margin norm_weight": ("magface",),
        },
    ),
    "head.optimizer": ("name", {"momentum": ("sgd",), "beta1 beta2 eps": ("adamw",)}),
    "compat.transform": ("name", {"blocks paths bottleneck": ("rbt",), "hidden": ("mlp",)}),
    "optimizer": ("name", {"momentum start_momentum": ("sgd",), "betas": ("adamw",)}),
    "schedule": ("name", {"power": ("polynomial",), "milestones gamma": ("step",)}),
}
"""section → its tag, and of the keys that some variants lack: which values of the tag have them."""

METHODS = {
    "none": "",
    "direct": "mode bank alignment_weight boundary_weight centers authors_formula",
    "backward forward both": "mode bank alignment_weight boundary_weight transform authors_formula",
    "cross-model": "mode bank alignment_weight boundary_weight transform authors_formula old_embeddings old_model "
    "new_embeddings new_model new_bank maps",
    "bct": "bank weight old_margin",
    "unibct": "bank old_embeddings weight old_margin",
    "l2": "bank old_embeddings old_model weight",
    "advbct": "bank old_embeddings old_model weight boundary_weight",
    "mixbct": "bank old_embeddings old_model mix_share",
    "fct": "bank old_embeddings old_model weight transform",
}
"""method, or mode of LCE → the keys of ``compat`` that it has."""


def without_idle(tree: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A tree without the keys that version 0.1 wrote although they had no effect, and their names.

    Only what that version wrote is touched: it is known by ``head.margin`` and ``compat`` holding all their keys.
    """
    if not is_complete(tree):
        return tree, []
    out: dict[str, Any] = _copied(tree)
    dropped: list[str] = []
    compat, train, head = out["compat"], out["train"], out["head"]
    label = compat["mode"] if compat["method"] == "lce" else compat["method"]
    known = {"method", *next(keys for names, keys in METHODS.items() if label in names.split()).split()}
    _drop(compat, [key for key in compat if key not in known], "compat.", dropped)
    for section, (tag, owners) in VARIANTS.items():
        part: Any = out
        for name in section.split("."):
            part = part.get(name, {})
        for keys, values in owners.items():
            if part and part[tag] not in values:
                _drop(part, keys.split(), f"{section}.", dropped)
    if train["steps"] is not None:
        _drop(train, ["epochs"], "train.", dropped)
    if head["sample_rate"] == 1 and head["sampling_correction"]:
        _drop(head, ["sampling_correction"], "head.", dropped)
    if head["impl"] == "reference" and head["chunk_rows"]:
        _drop(head, ["chunk_rows"], "head.", dropped)
    evaluate, optimizer = out["evaluate"], out["optimizer"]
    if bool(evaluate["sets"]) != bool(evaluate["every_steps"]):
        _drop(evaluate, ["sets", "every_steps"], "evaluate.", dropped)
    if optimizer.get("start_momentum") and out["backbone"]["weights"] is None and head["weights"] is None:
        _drop(optimizer, ["start_momentum"], "optimizer.", dropped)
    if label == "cross-model":
        _drop(out, ["backbone", "head"], "", dropped)
    return out, dropped


def is_complete(tree: Mapping[str, Any]) -> bool:
    """Whether version 0.1 wrote this tree."""
    margin, compat = (tree.get("head") or {}).get("margin"), tree.get("compat")
    if not isinstance(margin, Mapping) or not isinstance(compat, Mapping):
        return False
    margins = {"name", "scale", *(key for keys in VARIANTS["head.margin"][1] for key in keys.split())}
    methods = {"method", *(key for keys in METHODS.values() for key in keys.split())}
    return margins <= margin.keys() and methods <= compat.keys()


def _copied(value: Any) -> Any:
    return {key: _copied(one) for key, one in value.items()} if isinstance(value, Mapping) else value


def _drop(tree: dict[str, Any], keys: list[str], prefix: str, dropped: list[str]) -> None:
    for key in keys:
        if key in tree:
            del tree[key]
            dropped.append(prefix + key)
