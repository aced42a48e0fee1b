"""Run folders of version 0.1: their configurations hold every key of every variant, most of them without effect."""

from collections.abc import Callable, Iterable, Mapping
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
    "frozen": "bank",
    "ndpp": "bank weight old_margin neighbours push",
    "bt2": "bank old_embeddings old_model weight old_margin",
    "l2": "bank old_embeddings old_model weight",
    "advbct": "bank old_embeddings old_model weight boundary_weight",
    "mixbct": "bank old_embeddings old_model mix_share",
    "fct": "bank old_embeddings old_model weight transform",
}
"""method, or mode of LCE → the keys of ``compat`` that it has."""


def _tree(keys: str, **values: Any) -> dict[str, Any]:
    """Keys that version 0.1 wrote as null, and others with their values."""
    return dict.fromkeys(keys.split()) | values


_TRANSFORM = {"name": "rbt", "blocks": 4, "paths": 4, "bottleneck": 16, "hidden": 0}
_MARGIN = {
    **{"name": "cosface", "scale": 64.0, "m": 0.4, "m1": 1.0, "m2": 0.0, "m3": 0.0, "gradient": "exact", "h": 0.333},
    **{"norm_momentum": 0.01, "lower_norm": 10.0, "upper_norm": 110.0, "lower_margin": 0.45, "upper_margin": 0.8},
    **{"norm_weight": 35.0, "inter_class_filter": 0.0},
}
_ROWS = {"name": "sgd", "lr_factor": 1.0, "momentum": 0.9, "weight_decay": 5e-4}
_AUGMENT = "rotate_degrees scale translate contrast brightness saturation noise blur low_resolution occlusion"
DEFAULTS: dict[str, Any] = {
    "data": {
        **{"path": None, "labels": None, "workers": 2, "max_bad_records": 0},
        **{"synthetic_classes": 1000, "synthetic_size": 112, "synthetic_records": 100_000},
        "augment": {"flip": 0.5} | dict.fromkeys(_AUGMENT.split(), 0.0),
    },
    "backbone": _tree("width weights", name="iresnet18", dim=512),
    "head": {
        **{"impl": "fused", "update": "fused", "sample_rate": 1.0, "sampling_correction": False, "sub_centers": 1},
        **{"compute": "float32", "rows": "float32", "chunk_rows": 0, "init_std": 0.01, "weights": None},
        "margin": _MARGIN,
        "optimizer": _ROWS | {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8},
    },
    "compat": {
        **_tree("bank old_embeddings old_model new_embeddings new_model new_bank"),
        **{"mode": "direct", "alignment_weight": 0.4, "boundary_weight": 1.0, "centers": "device", "maps": "both"},
        **{"weight": 1.0, "old_margin": 0.0, "mix_share": 0.3, "authors_formula": False, "transform": _TRANSFORM},
    },
    "optimizer": {"momentum": 0.9, "start_momentum": False, "betas": [0.9, 0.999]},
    "schedule": {"power": 2.0, "milestones": [0.5, 0.75, 0.9], "gamma": 0.1},
    "train": {"epochs": 20.0},
}
"""What version 0.1 wrote for keys that nobody had set."""
_WRITTEN = (_MARGIN, DEFAULTS["compat"])
_NEVER = object()


def without_idle(tree: dict[str, Any], every: bool = False) -> tuple[dict[str, Any], list[str]]:
    """A tree without the keys that version 0.1 wrote although they had no effect, and their names.

    Only what that version wrote is touched: it is known by ``head.margin`` and ``compat`` holding the keys of most
    variants. A key with another value than that version's default was set by somebody, who expects something of it: it
    stays, and is refused by who owns it.

    Args:
        every: leave those out too: the run that the file belongs to ignored them.
    """
    if not is_complete(tree):
        return tree, []
    out: dict[str, Any] = _copied(tree)
    dropped: list[str] = []

    def drop(section: str, keys: Iterable[str]) -> None:
        part, usual = _inside(out, section), _inside(DEFAULTS, section)
        for key in keys:
            if key in part and _drop(part, key, usual.get(key, _NEVER), every):
                dropped.append(f"{section}.{key}".removeprefix("."))

    compat = _section(out, "compat")
    method = compat.get("method", "none")
    label = compat.get("mode") if method == "lce" else method
    known = next((keys for names, keys in METHODS.items() if label in names.split()), None)
    if known is not None:
        drop("compat", [key for key in compat if key not in {"method", *known.split()}])
    for section, (tag, owners) in VARIANTS.items():
        part = _inside(out, section)
        for keys, values in owners.items():
            if tag in part and part[tag] not in values:
                drop(section, keys.split())
    if _section(out, "train").get("steps") is not None:
        drop("train", ["epochs"])
    if _section(out, "head").get("impl") == "fused":
        drop("head", ["impl"])  # is called auto now
    if every:
        _drop_what_it_ignored(out, drop)
    if label == "cross-model":
        drop("", ["backbone", "head"])
    return out, dropped


def _drop_what_it_ignored(tree: dict[str, Any], drop: Callable[[str, Iterable[str]], None]) -> None:
    """Combinations without effect; nobody gets them by default."""
    head, evaluate, optimizer = (_section(tree, name) for name in ("head", "evaluate", "optimizer"))
    if head.get("sample_rate") == 1:
        drop("head", ["sampling_correction"])
    if head.get("impl") == "reference":
        drop("head", ["chunk_rows"])
    if bool(evaluate.get("sets")) != bool(evaluate.get("every_steps")):
        drop("evaluate", ["sets", "every_steps"])
    if _section(tree, "backbone").get("weights") is None and head.get("weights") is None:
        drop("optimizer", ["start_momentum"] if optimizer.get("start_momentum") else [])
    compat = _section(tree, "compat")
    if (compat.get("method"), compat.get("mode")) == ("lce", "cross-model"):
        if compat.get("new_bank") is not None:
            drop("compat", ["old_embeddings", "old_model"])
        elif compat.get("old_embeddings") is not None:
            drop("compat", ["old_model"])
        if compat.get("bank") is None:
            drop("compat", ["boundary_weight"])


def is_complete(tree: Mapping[str, Any]) -> bool:
    """Whether version 0.1 wrote this tree, from which somebody may have removed a few keys."""
    found = (_inside(tree, "head.margin"), _section(tree, "compat"))
    return all(2 * len(usual.keys() & part.keys()) > len(usual) for usual, part in zip(_WRITTEN, found, strict=True))


def _section(tree: Mapping[str, Any], key: str) -> Any:
    part = tree.get(key)
    return part if isinstance(part, Mapping) else {}


def _inside(tree: Mapping[str, Any], section: str) -> Any:
    """The section of that dotted name, empty where there is none."""
    for key in section.split(".") if section else ():
        tree = _section(tree, key)
    return tree


def _copied(value: Any) -> Any:
    return {key: _copied(one) for key, one in value.items()} if isinstance(value, Mapping) else value


def _drop(tree: dict[str, Any], key: str, usual: Any, every: bool) -> bool:
    """Remove a key, of a section what holds its default; whether all of it has gone."""
    value = tree[key]
    if isinstance(value, dict) and isinstance(usual, dict) and not every:
        for inner in list(value):
            _drop(value, inner, usual.get(inner, _NEVER), every)
        if value:
            return False
    elif value != usual and not every:
        return False
    del tree[key]
    return True
