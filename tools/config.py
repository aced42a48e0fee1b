"""Show every key of a run's configuration: type, default, unit, meaning, and the variants that it belongs to.

Without an argument every section is shown, with SECTION or KEY that one. With a FILE (and `key=value` or further files
behind it) the resolved configuration is printed as YAML, as the run folder would hold it.

Examples:
  lce config
  lce config head.margin
  lce config head.margin.upper_norm
  lce config --schema > lce.schema.json
  lce config configs/demo-faces.yaml head.sample_rate=0.1
"""

import argparse
import difflib
import json
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.errors import ConfigError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from trainer.config import Node, Section

HELP = "show every key of the configuration, or a resolved one"
INTRODUCTION = """# Configuration

Made by `lce config --markdown`; the descriptions stand with the classes that use the keys. A configuration is a YAML
file of these sections. It may extend others (`extends: base.yaml`), and further files and `key=value` overrides on the
command line go over it, each over what stands before it. Where a section has variants, a key belongs to those in the
last column: with another one it is refused. When a later layer chooses another variant, what lower layers gave for keys
of the former one falls away, also where the new one has a key of the same name (`head.margin.m` of cosface is no
angle). What all variants have, such as `head.margin.scale` and `optimizer.lr`, stays, and so does `compat.bank`.

For completion in editors: `lce config --schema > lce.schema.json`, and the line
`# yaml-language-server: $schema=lce.schema.json` at the top of the file.
"""


@dataclass(frozen=True)
class Key:
    """A key as people read it.

    Attributes:
        name: within its section. default: as YAML gives it; ``required`` where there is none.
        variants: that have it; empty: all have.
    """

    name: str
    type: str
    default: str
    unit: str
    meaning: str
    variants: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lce config`."""
    parser.add_argument(
        "what", nargs="?", metavar="SECTION|KEY|FILE", help="such as head.margin, or a configuration file"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="behind FILE; or a further YAML file"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--schema", action="store_true", help="a JSON schema of configuration files, for editors")
    form.add_argument("--markdown", action="store_true", help="the page docs/configuration.md")


def run(args: argparse.Namespace) -> int:
    """Print what is asked for."""
    from trainer.config import is_layer
    from trainer.run.config import Config, dump_config, load_config

    if args.what is not None and (args.schema or args.markdown):
        option = "--schema" if args.schema else "--markdown"
        raise ConfigError(f"{args.what}: {option} prints the whole; give it alone")
    if args.what is not None and is_layer(args.what):
        print(dump_config(load_config(args.what, args.overrides)), end="")
        return 0
    if args.overrides:
        raise ConfigError(f"{args.overrides[0]}: stands behind a configuration file, and {args.what} is none")
    if args.schema:
        print(json.dumps(schema(Config), indent=1, ensure_ascii=False))
    elif args.markdown:
        print(page(), end="")
    else:
        print("\n\n".join(_text(name, node, only) for name, node, only in shown(args.what)))
    return 0


def sections(root: "type[Section]") -> "Iterator[tuple[str, Node]]":
    """Every section by its dotted name, in the order of the file; those inside others follow them."""
    from trainer.config import Node

    yield from _below("", Node((root,)))


def _below(prefix: str, node: "Node") -> "Iterator[tuple[str, Node]]":
    for key in node.all_keys():
        child = node.child(key, node.kinds[0])
        if child is not None:
            yield prefix + key, child
            yield from _below(f"{prefix}{key}.", child)


def shown(name: str | None) -> "list[tuple[str, Node, str | None]]":
    """What ``lce config NAME`` prints: the section of that name with those inside it, each with None; or the section of
    the key of that name, with the key; None: all sections.

    Raises:
        ConfigError: neither a section nor a key; the nearest one is named.
    """
    from trainer.run.config import Config

    every = list(sections(Config))
    found = [(key, node, None) for key, node in every if name is None or f"{key}.".startswith(f"{name}.")]
    if name is None or found:
        return [*found]
    section, _, last = name.rpartition(".")
    owner = [(key, node, last) for key, node in every if key == section and last in {one.name for one in keys(node)}]
    if owner:
        return [*owner]
    known = [key for key, _ in every] + [f"{key}.{one.name}" for key, node in every for one in keys(node)]
    ends = [key for key in dict.fromkeys(known) if key.rpartition(".")[2] == last]
    near = ends or difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(key for key, _ in every)}"
    raise ConfigError(f"{name}: no such section or key; {hint}")


def keys(node: "Node") -> list[Key]:
    """The keys of a section that hold values, those of all variants; one that differs between them once for each."""
    out = []
    for name in node.all_keys():
        if node.child(name, node.kinds[0]) is not None:
            continue
        groups: dict[tuple[str, str, str, str], list[type[Section]]] = {}
        for kind in node.kinds:
            if name in kind.model_fields:
                groups.setdefault(_described(node, name, kind), []).append(kind)
        for (type_, default, unit, meaning), kinds in groups.items():
            of = () if len(kinds) == len(node.kinds) else tuple(node.called(kinds))
            out.append(Key(name, type_, default, unit, meaning, of))
    return out


def _described(node: "Node", name: str, kind: "type[Section]") -> tuple[str, str, str, str]:
    """Type, default, unit and meaning of a key of one variant."""
    from trainer.config import values_of

    known = kind.model_fields[name]
    if name in node.tags:
        values = dict.fromkeys(value for one in node.kinds for value in values_of(one, name))
        return " or ".join(values), node.tags[name], "", known.description or ""
    extra = known.json_schema_extra if isinstance(known.json_schema_extra, dict) else {}
    return _type(known), _default(known), str(extra.get("unit", "")), known.description or ""


def _default(known: "FieldInfo") -> str:
    if known.is_required():
        return "required"
    value = known.get_default(call_default_factory=True)
    if isinstance(value, tuple):
        value = list(value)
    return json.dumps(value)


def _type(known: "FieldInfo") -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [f"{signs[k]} {getattr(m, k):g}" for m in known.metadata for k in signs if hasattr(m, k)]
    return f"{_name(known.annotation)} {', '.join(bounds)}".strip()


def _name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _name(arguments[0])
    if origin is typing.Literal:
        return " or ".join(arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_name(one) for one in arguments)
    if origin is tuple:
        inner = [_name(one) for one in arguments if one is not Ellipsis]
        return f"list of {inner[0]}s" if Ellipsis in arguments else f"[{', '.join(inner)}]"
    if origin is dict:
        return f"mapping of {_name(arguments[1])}s" if typing.get_origin(arguments[1]) is None else "mapping"
    names = {bool: "true or false", int: "integer", float: "number", str: "text", type(None): "null"}
    return names.get(annotation, "path")


def _text(name: str, node: "Node", only: str | None = None) -> str:
    lines = [name]
    for key in keys(node):
        if only not in (None, key.name):
            continue
        unit = f" {key.unit}" if key.unit else ""
        of = f"; {node_word(node)} {', '.join(key.variants)}" if key.variants else ""
        lines.append(f"  {key.name} = {key.default}{unit}  ({key.type}{of})")
        lines.append(f"      {key.meaning}")
    return "\n".join(lines)


def node_word(node: "Node") -> str:
    """What tells the variants of a section apart."""
    return next(iter(node.tags), "")


def page() -> str:
    """The page docs/configuration.md."""
    parts = [INTRODUCTION]
    for name, node, _ in shown(None):
        parts.append(f"\n## {name}\n\n")
        head = ["key", "type", "default", "unit", "meaning"] + ([f"only with {node_word(node)}"] if node.tags else [])
        parts.append(_row(head) + _row(["---"] * len(head)))
        for key in keys(node):
            cells = [f"`{key.name}`", key.type, f"`{key.default}`", key.unit, key.meaning]
            parts.append(_row(cells + ([", ".join(key.variants)] if node.tags else [])))
    return "".join(parts)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def schema(root: "type[Section]") -> dict[str, Any]:
    """A JSON schema of configuration files. They are layers: nothing is required, and a section that does not choose
    a variant may have the keys of any one."""
    tree = root.model_json_schema()
    for part in (tree, *tree["$defs"].values()):
        part.pop("required", None)
        for rule in part["properties"].values():
            for holder in (rule, rule.get("items", {})):
                if "oneOf" in holder:
                    holder["anyOf"] = holder.pop("oneOf")
    compat = tree["properties"]["compat"]
    one = compat.pop("items")
    compat["anyOf"] = [*one["anyOf"], {"type": "array", "items": one}]
    del compat["type"]
    extends = {"type": ["string", "array"], "items": {"type": "string"}, "description": "files that this one goes over"}
    tree["properties"]["extends"] = extends
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **tree}
