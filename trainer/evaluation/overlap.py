"""Identities that a set shares with those a model was trained on: figures of them say little about other people."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from trainer.data.identities import named_identities
from trainer.data.index import Dataset, same_records
from trainer.errors import ConfigError
from trainer.models.model import EmbeddingModel

Declared: TypeAlias = Literal["seen", "unseen"]
"""What a user says of a set: it was trained on, or its people only share names with others who were."""
_SHOWN = 5


@dataclass(frozen=True)
class Overlap:
    """One set against one model.

    Attributes:
        shared: how many of the set's identities the model was trained on; None: not known, ``why`` says why.
        names: of some of them.
        by_name: they are in another data set, under the same names.
    """

    shared: int | None
    names: list[str] = field(default_factory=list)
    why: str = ""
    by_name: bool = False


@dataclass(frozen=True)
class Known:
    """What is known of a set: ``declared`` by the user as seen, its ``identities``, and the overlap by model;
    ``others``: declared to be other people than those whose names they share with another data set. Without ``models``
    nothing but the declaration is known, and ``others`` means people whom nobody was trained on."""

    declared: bool
    identities: int
    models: dict[str, Overlap]
    others: bool = False

    @property
    def seen(self) -> bool:
        """Whether the set is no evidence about identities that nobody was trained on."""
        return self.declared or any(self._counts(one) for one in self.models.values())

    def _counts(self, one: Overlap) -> bool:
        return bool(one.shared) and not (self.others and one.by_name)

    @property
    def sentence(self) -> str:
        """What is seen, as a sentence; empty for a set that is not."""
        found = [self._sharing(role) for role, one in self.models.items() if self._counts(one)]
        if not self.seen:
            return ""
        by_name = any(self._counts(one) and one.by_name for one in self.models.values())
        hint = "; if these are other people of the same names, declare the set unseen" if by_name else ""
        return "its identities were trained on: " + ("; ".join(found) or "so it is declared") + hint

    @property
    def denied(self) -> str:
        """Which names the user declared to mean other people; empty: none."""
        found = [self._sharing(role) for role, one in self.models.items() if one.shared and not self._counts(one)]
        return "; ".join(found)

    def _sharing(self, role: str) -> str:
        one = self.models[role]
        return f"{one.shared:,} of its {self.identities:,} by the {role} model ({_some(one)})"


def declarations(sets: Collection[str], seen: Sequence[str], unseen: Sequence[str]) -> dict[str, Declared]:
    """What a user declares of some sets, by name.

    Raises:
        ConfigError: a name is no set's, or stands in both.
    """
    for option, names in (("seen", seen), ("unseen", unseen)):
        stray = next((name for name in names if name not in sets), None)
        if stray is not None:
            raise ConfigError(f"`{option}` {stray}: no labelled set has this name; there are: {_list(sets) or 'none'}")
    both = next((name for name in seen if name in unseen), None)
    if both is not None:
        raise ConfigError(f"{both}: stands in `seen` and in `unseen`; choose one")
    return {**dict.fromkeys(seen, "seen"), **dict.fromkeys(unseen, "unseen")}


def overlaps(dataset: Dataset, models: Mapping[str, EmbeddingModel], declared: Declared | None = None) -> Known:
    """Compare a labelled set's identities with those that each model but the paragon was trained on, heeding what the
    user ``declared``."""
    said = declared == "seen", declared == "unseen"
    found = named_identities(dataset)
    judged = {role: model for role, model in models.items() if role != "paragon"}
    if found is None:
        unknown = Overlap(None, why="the set's classes say no identity")
        return Known(said[0], 0, dict.fromkeys(judged, unknown), said[1])
    mine, names = found
    by_model = {}
    for role, model in judged.items():
        theirs = model.identities
        shared = None if theirs is None else mine.shared(theirs)
        if theirs is None or shared is None:
            why = "the model does not say" if theirs is None else "the classes' names do not tell identities apart"
            by_model[role] = Overlap(None, why=why)
        elif not shared.any() and not theirs.complete:
            by_model[role] = Overlap(None, why="training started from weights that do not say")
        else:
            some = [name for name, is_shared in zip(names, shared.tolist(), strict=True) if is_shared]
            by_name = not same_records(mine.records, theirs.records)
            by_model[role] = Overlap(len(some), some[:_SHOWN], by_name=by_name)
    return Known(said[0], len(names), by_model, said[1])


def unknown_words(sets: Mapping[str, Known]) -> str:
    """What is not known of sets that count as unseen, or known by declaration alone; empty when all is known."""
    open_: dict[tuple[str, str], list[str]] = {}
    for name, known in sets.items():
        for role, one in known.models.items():
            if one.shared is None and not known.seen:
                open_.setdefault((role, one.why), []).append(name)
    alone = {name: known.others for name, known in sets.items() if not known.models and not known.seen}
    trusted = [name for name, others in alone.items() if others]
    lines = [f"{_list(names)} by the {role} model ({why})" for (role, why), names in open_.items()]
    lines += [f"{name} (declare the set seen or unseen)" for name, others in alone.items() if not others]
    denied = [f"{name}: {known.denied}" for name, known in sets.items() if known.denied and not known.seen]
    sentences = [f"Not known is whether identities were trained on: {'; '.join(lines)}."] if lines else []
    sentences += [f"Declared to be identities that nobody was trained on: {_list(trusted)}."] if trusted else []
    sentences += (
        [f"Declared to be other people under names that were trained on: {'; '.join(denied)}."] if denied else []
    )
    return " ".join(sentences)


def _list(names: Collection[str]) -> str:
    return ", ".join(names)


def _some(one: Overlap) -> str:
    return (
        ("by name: " if one.by_name else "")
        + _list(one.names)
        + (" …" if one.shared is not None and one.shared > len(one.names) else "")
    )
