"""The reader of configurations: YAML files that extend others, layers, overrides, and keys that only a variant has.

A configuration is a YAML file that may extend others (``extends: base.yaml``, relative to the file that says so),
followed by further files and by overrides from the command line (``optimizer.lr=0.05``). Each is a layer over those
before it; overrides in a row are one layer. The classes of a section stand in the room that uses them and derive from
:class:`Section`; the whole is assembled in :mod:`trainer.run.config`.

Where a section has variants (:class:`Variants`), such as ``head.margin`` by its ``name``, each variant owns its keys. A
key of another variant is refused. When a later layer chooses another variant, the keys of the former one that lower
layers gave fall away, also where the new one has a key of the same name: a margin on the cosine is none on the angle.
What all have (``scale``, ``lr``, ``bank``: a field of their common base) stays.
"""

import difflib
import logging
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pydantic
from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import CoreSchema, core_schema

from trainer.errors import ConfigError
from trainer.reading import parse_yaml, read_yaml

log = logging.getLogger(__name__)
_RANK = {"RANK", "LCE_LAUNCHED"}
"""Variables of a process that a launcher started, which has read the configuration before it."""


class Section(BaseModel):
    """Base of every section: immutable; unknown keys, numbers that are not finite and true for a number are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Groups of keys that exclude each other: one that a later layer gives replaces the others of lower layers."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads yes, on and true as one value, which Python would take for the number 1."""
        values = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(one, bool) for one in values) and _is_number(
            cls.model_fields[str(info.field_name)].annotation
        ):
            raise ValueError("expected a number, not yes or no")
        return value

    @classmethod
    def without_idle(cls, tree: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """A tree of plain values as a file or seal holds it, without the keys that an earlier version wrote although
        they had no effect; and the names of those keys."""
        return tree, []


def _is_number(annotation: Any) -> bool:
    """Whether a field holds numbers and no truth value."""
    if annotation in (int, float):
        return True
    return annotation is not bool and any(_is_number(one) for one in typing.get_args(annotation))


class Variants:
    """Annotates a union of sections that are told apart by tags, such as ``Annotated[A | B, Variants(name="a")]``.

    Args:
        tags: key → the value that counts where it is not given. A member of the union has the key as a field of type
            ``Literal``. Of several tags, the later ones tell the members apart that the first one leaves.
    """

    def __init__(self, **tags: str) -> None:
        self.tags = tags

    def __get_pydantic_core_schema__(self, source: Any, handler: pydantic.GetCoreSchemaHandler) -> CoreSchema:
        node = Node(typing.get_args(source), self.tags)

        def label(value: Any) -> str | None:
            if isinstance(value, Section):
                return f"<{type(value).__name__}>"
            try:
                return f"<{node.kind(value, '', '').__name__}>" if isinstance(value, Mapping) else None
            except ConfigError:
                return None

        choices = {f"<{kind.__name__}>": handler.generate_schema(kind) for kind in node.kinds}
        return core_schema.tagged_union_schema(choices, discriminator=label)


def values_of(kind: type[Section], tag: str) -> tuple[str, ...]:
    """The values of the tag ``tag`` for which ``kind`` is meant; empty: it does not have that tag."""
    known = kind.model_fields.get(tag)
    return typing.get_args(known.annotation) if known else ()


@dataclass(frozen=True)
class Node:
    """What stands under a section's key.

    Attributes:
        kinds: the section, or its variants.
        tags: tag → default, see :class:`Variants`; empty: there is one kind.
        many: whether the key holds a list of such sections, of which a single one may be given as it is.
    """

    kinds: tuple[type[Section], ...]
    tags: Mapping[str, str] = field(default_factory=dict)
    many: bool = False

    def kind(self, tree: Mapping[str, Any], prefix: str, source: str) -> type[Section]:
        """The variant that a tree's tags choose. Raises :class:`ConfigError` for a value that none has."""
        left = self.kinds
        for tag, default in self.tags.items():
            having = [k for k in left if values_of(k, tag)]
            if len(left) == 1 or not having:
                break
            value = tree.get(tag, default)
            left = tuple(k for k in having if value in values_of(k, tag))
            if not left:
                known = [v for k in having for v in values_of(k, tag)]
                near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}? " if near else ""
                raise ConfigError(f"{source}: {prefix}{tag} = {value!r}: unknown; {hint}known: {', '.join(known)}")
        return left[0]

    def all_keys(self) -> list[str]:
        """The keys of all variants, each once."""
        return list(dict.fromkeys(key for kind in self.kinds for key in kind.model_fields))

    def child(self, key: str, kind: type[Section]) -> "Node | None":
        """What stands under ``key`` in ``kind``, or in another variant where that does not have it; None: a value."""
        owner = kind if key in kind.model_fields else next((k for k in self.kinds if key in k.model_fields), None)
        return None if owner is None else node_of(owner.model_fields[key])

    def shares(self, key: str, before: type[Section], after: type[Section]) -> bool:
        """Whether a key means the same in two variants: it is a tag of both, or a field of a base of both."""
        if key in self.tags:
            return key in after.model_fields
        bases = (base for base in before.__mro__ if issubclass(base, Section) and issubclass(after, base))
        return any(key in base.model_fields for base in bases)

    def owners(self, key: str) -> list[str]:
        """How the variants that have ``key`` are called."""
        return self.called([kind for kind in self.kinds if key in kind.model_fields])

    def called(self, kinds: Sequence[type[Section]]) -> list[str]:
        """How some of the variants are called: ``arcface``; where a second tag decides, ``lce/both``."""
        first, *rest = self.tags
        out: list[str] = []
        for kind in kinds:
            values = values_of(kind, first)
            if all(k in kinds for k in self.kinds if values_of(k, first) == values):
                out += values
            else:
                out += [f"{value}/{one}" for value in values for tag in rest for one in values_of(kind, tag)]
        return list(dict.fromkeys(out))


def node_of(known: pydantic.fields.FieldInfo) -> Node | None:
    """What a field holds when it holds sections; None: a plain value."""
    return node_for(known.annotation, known.metadata)


def node_for(annotation: Any, metadata: Sequence[Any] = ()) -> Node | None:
    """What a type holds when it holds sections, with its annotations; None: a plain value."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return node_for(arguments[0], arguments[1:])
    variants = next((m for m in metadata if isinstance(m, Variants)), None)
    if variants is not None:
        return Node(arguments, variants.tags)
    if origin is tuple and arguments:
        inner = node_for(arguments[0])
        return None if inner is None else Node(inner.kinds, inner.tags, many=True)
    options = arguments if origin in (types.UnionType, typing.Union) else (annotation,)
    found = [o for o in options if isinstance(o, type) and issubclass(o, Section)]
    return Node((found[0],)) if found else None


class Layers:
    """A tree of plain values, put together from layers.

    Args:
        root: the class of the whole configuration.

    Attributes:
        tree: the values so far.
    """

    def __init__(self, root: type[Section]) -> None:
        self.root, self.tree = Node((root,)), dict[str, Any]()
        self._given: dict[str, tuple[int, str]] = {}  # key → number of the layer, its name
        self._count = 0

    def add(self, tree: Mapping[str, Any], source: str) -> None:
        """Put a layer over what is there; ``source`` names it in errors.

        Raises:
            ConfigError: an unknown key (the nearest known one is named), an unknown variant, a value for a section.
        """
        kept, dropped = self.root.kinds[0].without_idle(dict(tree))
        if dropped and not _RANK & os.environ.keys():
            log.warning(
                "%s: written by an earlier version; keys without effect left out: %s", source, ", ".join(dropped)
            )
        self._count += 1
        self._merge(self.root, self.tree, kept, "", source)

    def add_file(self, path: Path) -> None:
        """Put a file, over what it extends, over what is there. Raises :class:`ConfigError`."""
        for source, tree in read_layers(path):
            self.add(tree, source)

    def add_overrides(self, overrides: Sequence[str]) -> None:
        """Put further files and ``section.key=value`` strings over what is there, in their order; strings in a row are
        one layer. Raises :class:`ConfigError`."""
        if isinstance(overrides, str):
            raise ConfigError(f"`overrides` = {overrides!r}: expected a list of texts, such as [{overrides!r}]")
        layer: dict[str, Any] = {}
        for override in overrides:
            if is_layer(override):
                self.add(layer, "command line")
                layer = {}
                self.add_file(Path(override))
            else:
                _nest(layer, override)
        self.add(layer, "command line")

    def check(self) -> None:
        """Raise :class:`ConfigError` for a key of a variant that is not chosen."""
        self._check(self.root, self.tree, "")

    def purpose(self, key: str) -> str:
        """What a message adds to a dotted key that is missing: what it is for; of a section the keys that it needs."""
        node: Node | None = self.root
        tree: Any = self.tree
        found = ""
        for part in key.split("."):
            if node is None or not isinstance(tree, Mapping):
                return ""
            kind = node.kind(tree, "", "")
            found = (kind.model_fields[part].description or "") if part in kind.model_fields else ""
            node, tree = node.child(part, kind), tree.get(part)
        if node is None:
            return found and f": {found}"
        needed = [name for name, one in node.kind({}, "", "").model_fields.items() if one.is_required()]
        return f"; give {', '.join(f'{key}.{name}' for name in needed)}" if needed else ""

    def source(self, key: str, default: str) -> str:
        """Where the value of a dotted key was given."""
        return self._given.get(key, (0, default))[1]

    def last_source(self, section: str, message: str, default: str) -> str:
        """Where the last of the values was given that a message about a section is about: of the keys that it names,
        else of all keys of the section."""
        inside = [key for key in self._given if not section or f"{key}.".startswith(f"{section}.")]
        in_message = set(re.findall(r"\w+(?:\.\w+)*", message))
        named = [
            key for key in self._given if key in in_message or (key in inside and key.rpartition(".")[2] in in_message)
        ]
        return max((self._given[key] for key in named or inside), default=(0, default))[1]

    def _merge(self, node: Node, into: dict[str, Any], layer: Mapping[str, Any], prefix: str, source: str) -> None:
        known, before = node.all_keys(), node.kind(into, prefix, source)
        chosen = node.kind(into | {tag: layer[tag] for tag in node.tags if tag in layer}, prefix, source)
        if chosen is not before:
            self._drop(into, (k for k in before.model_fields if not node.shares(k, before, chosen)), prefix)
        for group in chosen.alternatives:
            if any(layer.get(key) is not None for key in group):
                self._drop(into, (key for key in group if key not in layer), prefix)
        for key, value in layer.items():
            if key not in known:
                _refuse_unknown(node, str(key), prefix, source)
            child = node.child(key, chosen)
            if child is None:
                into[key], self._given[prefix + key] = value, (self._count, source)
            else:
                into[key] = self._section(child, into.get(key), value, prefix + key, source)

    def _section(self, node: Node, below: Any, value: Any, key: str, source: str) -> Any:
        """What stands under a section's key after a layer gave ``value`` for it."""
        if node.many and isinstance(value, list):
            if len(value) == 1:
                return self._section(node, None, value[0], key, source)
            return [self._section(node, None, one, f"{key}.{index}", source) for index, one in enumerate(value)]
        if not isinstance(value, Mapping):
            raise ConfigError(f"{source}: {key} is a section; known keys: {', '.join(node.all_keys())}")
        if isinstance(below, list):
            raise ConfigError(f"{source}: {key}: a list was given before; give the whole list")
        into = dict(below or {})
        self._merge(node, into, value, f"{key}.", source)
        return into

    def _drop(self, into: dict[str, Any], keys: Iterator[str], prefix: str) -> None:
        for key in list(keys):
            if into.pop(key, None) is not None:
                for given in [g for g in self._given if f"{g}.".startswith(f"{prefix}{key}.")]:
                    del self._given[given]

    def _check(self, node: Node, tree: Mapping[str, Any], prefix: str) -> None:
        kind = node.kind(tree, prefix, "")
        for key, value in tree.items():
            if key not in kind.model_fields:
                tag, default = _deciding(node, key, tree)
                given = self.source(prefix + key, self._any_source(prefix + key))
                raise ConfigError(
                    f"{given}: {prefix}{key} belongs to {_listed(node.owners(key))}; {prefix}{tag} is "
                    f"{tree.get(tag, default)}: remove the key, or set {prefix}{tag}"
                )
            child = node.child(key, kind)
            for index, one in enumerate(value if isinstance(value, list) else [value]):
                if child is not None:
                    self._check(child, one, f"{prefix}{key}." + (f"{index}." if isinstance(value, list) else ""))

    def _any_source(self, key: str) -> str:
        """Where any key below a section was given."""
        return next((s for k, (_, s) in self._given.items() if k.startswith(f"{key}.")), "configuration")


def load(root: type[Section], path: Path, overrides: Sequence[str] = ()) -> Layers:
    """The layers of a file and what stands behind it. Raises :class:`ConfigError`."""
    layers = Layers(root)
    layers.add_file(path)
    layers.add_overrides(overrides)
    return layers


def build(kind: Any, layers: Layers, source: str) -> Any:
    """The validated configuration of ``layers``; ``source`` names it in errors. Raises :class:`ConfigError`."""
    layers.check()
    try:
        return kind.model_validate(layers.tree)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(_explain(problem, layers, source) for problem in error.errors())) from None


def parse_section(kind: Any, tree: Mapping[str, Any], source: str) -> Any:
    """One section, or one of its variants, from plain values. Raises :class:`ConfigError`."""
    node = node_for(kind)
    assert node is not None
    layers = Layers(Section)
    layers.root = node
    layers._merge(node, layers.tree, tree, "", source)
    return build(node.kind(layers.tree, "", source), layers, source)


def is_layer(word: str) -> bool:
    """Whether a word of the command line names a further configuration file, and is no ``key=value``."""
    return "=" not in word and word.endswith((".yaml", ".yml"))


def refuse_idle(section: Section, name: str, keys: Sequence[str], reason: str) -> None:
    """Raise :class:`ValueError` for a key that differs from its default where it has no effect.

    Args:
        name: of the section. reason: why none of the ``keys`` has one, such as ``without evaluate.sets``.
    """
    for key in keys:
        value, default = getattr(section, key), type(section).model_fields[key].get_default(call_default_factory=True)
        if value != default:
            shown, usual = (str(one).lower() if isinstance(one, bool) else one for one in (value, default))
            plain = isinstance(default, bool | int | float | str)
            over = f", or put {name}.{key}={usual} over a file that sets it" if plain else ""
            raise ValueError(f"{name}.{key} = {shown}: has no effect {reason}; remove it{over}")


def unit(name: str) -> dict[str, Any]:
    """For ``Field(json_schema_extra=…)``: the unit of a key."""
    return {"unit": name}


def read_layers(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """A file's own tree, after those of what it extends, each with its name. Raises :class:`ConfigError`."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: extends itself: {' → '.join(str(p) for p in (*seen, path))}")
    tree = read_yaml(path, ConfigError) or {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as `run:` and `data:`, found {type(tree).__name__}")
    parents = tree.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ConfigError(f"{path}: extends = {parents!r}: expected a file or a list of files")
    out = []
    for parent in parents:
        out += read_layers(path.parent / Path(parent).expanduser(), (*seen, path.resolve()))
    return [*out, (str(path), tree)]


def _nest(layer: dict[str, Any], override: str) -> None:
    """Put ``section.key=value``, the value read as YAML, into a layer."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r}: expected section.key=value, for example optimizer.lr=0.05")
    value = parse_yaml(text, f"override {override!r}", ConfigError)
    *sections, last = key.split(".")
    for section in sections:
        below = layer.get(section)
        layer[section] = layer = dict(below) if isinstance(below, dict) else {}
    if isinstance(value, dict) and isinstance(layer.get(last), dict):
        value = layer[last] | value
    layer[last] = value


def _refuse_unknown(node: Node, key: str, prefix: str, source: str) -> typing.NoReturn:
    known, (section, _, rest) = node.all_keys(), key.partition(".")
    near = in_sections(node, key) or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{f' or {prefix}'.join(near)}?" if near else f"known keys: {', '.join(known)}"
    if rest and section in known:  # in a file; on the command line dots lead into sections
        hint = f"write {section}: {{{rest}: …}}"
    raise ConfigError(f"{source}: unknown key {prefix}{key or repr(key)}; {hint}")


def in_sections(node: Node, key: str) -> list[str]:
    """``section.key`` for each section of a tree, such as that of a configuration, that has a key."""
    sections = {section: node.child(section, node.kinds[0]) for section in node.all_keys()}
    return [f"{section}.{key}" for section, below in sections.items() if below and key in below.all_keys()]


def _deciding(node: Node, key: str, tree: Mapping[str, Any]) -> tuple[str, str]:
    """The tag, with its default, whose value decides that a tree's variant does not have ``key``."""
    left = node.kinds
    for tag, default in node.tags.items():
        value = tree.get(tag, default)
        left = tuple(k for k in left if value in values_of(k, tag))
        if not any(key in k.model_fields for k in left):
            return tag, default
    raise AssertionError(key)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _explain(problem: Any, layers: Layers, source: str) -> str:
    parts: list[str] = []
    tree: Any = layers.tree
    for part in problem["loc"]:
        if isinstance(part, str) and part.startswith("<"):
            continue  # a variant, not a key
        if isinstance(part, int) and isinstance(tree, Mapping):
            continue  # the only one of a list
        parts.append(str(part))
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            tree = None
    key, value = ".".join(parts), problem["input"]
    message = _PLAIN.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    if problem["type"] == "missing":
        if parts[-1].isdecimal() and len(parts) > 1:
            return f"{layers.source('.'.join(parts[:-1]), source)}: {'.'.join(parts[:-1])}: has too few values"
        return f"{layers.source(key, source)}: {key} is missing and has no default{layers.purpose(key)}"
    if not key or (problem["type"] == "value_error" and isinstance(value, Mapping | Section)):
        return f"{layers.last_source(key, message, source)}: {message}"
    if value is None and ":" in parts[-1]:
        first, _, rest = parts[-1].partition(":")
        message = f"{message}; YAML takes a colon with a space behind it: {first}: {rest}"
    source = layers.source(key, layers.source(".".join(parts[:-1]), source))
    message = message.replace("Input should", "must")
    if problem["type"] == "literal_error" and isinstance(value, str):
        message += _near_value(value, re.findall(r"'([^']+)'", message))
    given = "is empty" if value is None else f"= {value!r}"
    return f"{source}: {key} {given}: {message[0].lower()}{message[1:]}"


def _near_value(value: str, known: Sequence[str]) -> str:
    """The known value that was meant; ``bf16`` and ``fp16`` are short for types of torch."""
    whole = re.sub(r"^(bf|fp)(?=\d+$)", lambda short: {"bf": "bfloat", "fp": "float"}[short[1]], value.lower())
    near = difflib.get_close_matches(whole, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


_PLAIN = {
    "path_type": "expected a path, such as runs/a",
    "tuple_type": "expected a list, such as [1, 2]",
    "dict_type": "expected a mapping, such as {name: value}",
    "bool_type": "expected true or false",
    "bool_parsing": "expected true or false",
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "expected a whole number"),
    **dict.fromkeys(("float_parsing", "float_type"), "expected a number"),
}
"""What pydantic says in terms of Python."""
