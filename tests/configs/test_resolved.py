"""The resolved configuration of every recipe is that of version 0.1 (resolved-0.1.json, dumped by commit ca532cf): only
keys without effect have gone, and a file that holds them is read without them."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.errors import ConfigError
from trainer.run.config import dump_config, load_config, parse_config
from trainer.run.folder import changes_since, flat

CONFIGS = Path(__file__).parents[2] / "configs"
SNAPSHOT = json.loads(Path(__file__).with_name("resolved-0.1.json").read_text())
NEW = {
    *("log.line_seconds", "log.images", "train.matmul", "data.order", "data.allow_outside", "head.rows_residual"),
    *("compat.contrastive_weight", "compat.contrastive_temperature", "compat.orthogonal_weight"),
    *("compat.orthogonal_threshold", "compat.noise", "compat.distance"),
}
"""Keys that version 0.1 did not have."""
GIVEN = {"cross-model.yaml": ["compat.contrastive_weight=5", "compat.noise=0.5"]}
"""Those of them that a recipe gives."""
BETTER = {
    "cross-model.yaml": {
        **{"compat.old_embeddings": "old-embeddings.npy", "compat.new_embeddings": "new-embeddings.npy"},
        **{"compat.transform.name": "mlp", "compat.transform.hidden": 1024},
        **{"optimizer.lr": 0.01, "train.steps": 1600},
    }
}
"""What a recipe has changed since, on purpose."""


def resolved(files: str) -> dict[str, Any]:
    """What version 0.1 made of a recipe, flat, with what is better now."""
    return dict(SNAPSHOT["base"] | SNAPSHOT["recipes"][files] | BETTER.get(files, {}))


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """The tree of flat values."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, last = key.split(".")
        below = tree
        for section in sections:
            below = below.setdefault(section, {})
        below[last] = value
    return tree


@pytest.mark.parametrize("files", SNAPSHOT["recipes"])
def test_a_recipe_resolves_as_before(files: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, *rest = [str(CONFIGS / file) for file in files.split()]
    now = load_config(first, [*rest, "run.dir=runs/x"])
    before, after = resolved(files), flat(yaml.safe_load(dump_config(now)))
    assert (before["head.impl"], after.get("head.impl", "auto")) == ("fused", "auto")  # another name for the same
    expected = before | {"head.impl": "auto"}
    assert {key: value for key, value in after.items() if key not in NEW} == {
        key: value for key, value in expected.items() if key in after
    }
    assert not caplog.records
    assert parse_config(nested(before), "old", GIVEN.get(files, [])) == now
    assert "old: written by an earlier version; keys without effect left out: compat." in caplog.text
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(nested(before)))
    new = changes_since(tmp_path / "config.yaml", now)
    assert {line.split(":")[0] for line in new} <= NEW


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"compat.method": "none"}, "compat.bank belongs to .*; compat.method is none: remove the key, or set compat"),
        ({"head.margin.upper_norm": 90}, "head.margin.upper_norm belongs to magface"),
        ({"schedule.power": 3}, "schedule.power belongs to polynomial"),
        ({"train.epochs": 5}, "train.epochs has no effect with train.steps"),
        ({"compat.transform.hidden": 9}, "compat.transform belongs to"),
        ({"data.augment.flip": 0.25}, "data.augment belongs to"),
    ],
)
def test_a_changed_key_without_effect_in_a_copy_is_refused(change: dict[str, Any], reason: str) -> None:
    values = resolved("million_cpu.yaml")
    with pytest.raises(ConfigError, match=f"copy: {reason}"):
        parse_config(nested(values | change), "copy")
    named = "compat.bank" if "compat.method" in change else next(iter(change))
    left = {key: value for key, value in (values | change).items() if key != named}
    parse_config(nested(left), "with that key removed")


def test_only_what_version_01_wrote_is_forgiven() -> None:
    with pytest.raises(ConfigError, match="belongs to magface"):
        parse_config({"run": {"dir": "x"}, "data": {"path": "d"}, "head": {"margin": {"upper_norm": 110.0}}}, "typed")


def test_a_key_with_its_default_that_was_added_since_is_no_change(tmp_path: Path) -> None:
    values = resolved("million_cpu.yaml")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(nested(values)))
    now = parse_config(nested(values), "old")
    assert changes_since(tmp_path / "config.yaml", now) == []
    other = parse_config(nested(values), "old", ["log.line_seconds=5"])
    assert changes_since(tmp_path / "config.yaml", other) == ["log.line_seconds: None → 5.0"]
