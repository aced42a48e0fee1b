"""`lce config`: every key with its meaning, the page and the schema made from the same classes."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.configs.test_resolved import CONFIGS
from tools import cli
from tools.config import keys, page, schema, shown
from trainer.run.config import Config, load_config

ROOT = Path(__file__).parents[2]


def test_every_key_is_described() -> None:
    found = [key for _, node, _ in shown(None) for key in keys(node)]
    assert len(found) > 120
    assert [key.name for key in found if not key.meaning or not key.type or not key.default] == []


def test_the_page_is_made_from_the_classes() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == page(), (
        "make it again: lce config --markdown > docs/configuration.md"
    )


def test_sections_and_files_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "head.margin"]) == 0
    shown = capsys.readouterr().out
    assert "upper_norm = 110.0  (number > 0; name magface)" in shown
    assert "head.optimizer" not in shown
    assert cli.main(["config", "run"]) == 0
    assert "timeout_seconds = 600.0 seconds  (number > 0)" in capsys.readouterr().out
    words = [str(CONFIGS / "demo-faces.yaml"), "head.sample_rate=0.25", "run.dir=x"]
    assert cli.main(["config", *words]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["head"]["sample_rate"] == 0.25
    assert cli.main(["config", "head.margins"]) == 2
    assert "head.margins: no such section or key; did you mean head.margin?" in capsys.readouterr().err
    assert cli.main(["config", "xyz"]) == 2
    assert "xyz: no such section or key; known: run, data," in capsys.readouterr().err
    assert cli.main(["config", "head", "run.dir=x"]) == 2
    assert cli.main(["config", *words, "head.margin.upper_norm=3"]) == 2
    assert "belongs to magface" in capsys.readouterr().err


def test_a_single_key_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "head.margin.upper_norm"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("head.margin\n  upper_norm = 110.0  (number > 0; name magface)\n      u_a, ")
    assert out.count("\n") == 3
    assert cli.main(["config", "run.timeout_seconds"]) == 0
    out = capsys.readouterr().out
    assert "timeout_seconds = 600.0 seconds  (number > 0)" in out
    assert "device" not in out
    assert cli.main(["config", "head.margin.m"]) == 0
    assert capsys.readouterr().out.count("  m = ") > 1  # one a variant that means another thing by it


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("head.margin.uper_norm", "did you mean head.margin.upper_norm?"),
        ("upper_norm", "did you mean head.margin.upper_norm?"),
        ("head.upper_norm", "did you mean head.margin.upper_norm?"),
        ("seed", "did you mean run.seed?"),
        ("momentum", "did you mean head.optimizer.momentum or optimizer.momentum?"),
        ("head.margin.upper_norm.x", "did you mean head.margin.upper_norm?"),
    ],
)
def test_an_unknown_key_gets_a_hint(capsys: pytest.CaptureFixture[str], name: str, hint: str) -> None:
    assert cli.main(["config", name]) == 2
    error = capsys.readouterr().err
    assert f"{name}: no such section or key; {hint}" in error
    assert error.count("\n") == 1


def fits(value: Any, rule: dict[str, Any], root: dict[str, Any]) -> bool:
    """Whether a value fits a JSON schema, as far as this project's schema goes."""
    if "$ref" in rule:
        return fits(value, root["$defs"][rule["$ref"].rpartition("/")[2]], root)
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "integer": int}
    asked = rule.get("type", [])
    asked = [asked] if isinstance(asked, str) else asked
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if asked and not any(number if kind == "number" else isinstance(value, kinds[kind]) for kind in asked):
        return False
    if "const" in rule and value != rule["const"]:
        return False
    if "enum" in rule and value not in rule["enum"]:
        return False
    if "oneOf" in rule and sum(fits(value, one, root) for one in rule["oneOf"]) != 1:
        return False
    if "anyOf" in rule and not any(fits(value, one, root) for one in rule["anyOf"]):
        return False
    if isinstance(value, dict) and "properties" in rule:
        known = rule["properties"]
        whole = set(rule.get("required", [])) <= value.keys() <= known.keys()
        return whole and all(fits(one, known[key], root) for key, one in value.items())
    return True


def test_the_schema_takes_every_recipe_and_no_key_of_another_variant(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--schema"]) == 0
    root = json.loads(capsys.readouterr().out)
    assert root == schema(Config)
    for path in CONFIGS.rglob("*.yaml"):
        assert fits(yaml.safe_load(path.read_text()), root, root), path
    for path in CONFIGS.glob("*.yaml"):
        if path.name != "base.yaml":
            resolved = yaml.safe_load(load_config(path, ["run.dir=x"]).model_dump_json())
            assert fits(resolved, root, root), path
    for tree in (
        {"head": {"margin": {"upper_norm": 5, "m": 0.5}}},
        {"head": {"margin": {"upper_norms": 5}}},
        {"compat": {"banks": "b"}},
        {"head": {"margin": {"name": "softmax", "m": 0.5}}},
        {"compat": {"method": "bct", "mode": "both"}},
        {"head": {"sample_rates": 0.5}},
        {"optimizer": {"name": "adamw", "momentum": 0.9}},
    ):
        assert not fits(tree, root, root), tree
    for tree in ({"compat": {"bank": "b"}}, {"compat": {"mode": "both"}}, {"head": {"margin": {"upper_norm": 5}}}):
        assert fits(tree, root, root), tree
    assert fits({"extends": "base.yaml", "head": {"margin": {"name": "magface", "upper_norm": 5}}}, root, root)


@pytest.mark.parametrize("option", ["--schema", "--markdown"])
def test_what_prints_the_whole_takes_no_section_and_no_file(capsys: pytest.CaptureFixture[str], option: str) -> None:
    for what in ("head", "configs/base.yaml"):
        assert cli.main(["config", what, option]) == 2
        assert f"{option} prints the whole" in capsys.readouterr().err
