"""Identities that a set shares with those a model was trained on: figures of them say little about other people."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trainer.data.identities import named_identities
from trainer.data.index import Dataset, same_records
from trainer.models.model import EmbeddingModel

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
    """What is known of a set: ``declared`` by the user as seen, its ``identities``, and the overlap by model."""

    declared: bool
    identities: int
    models: dict[str, Overlap]

    @property
    def seen(self) -> bool:
        """Whether the set is no evidence about identities that nobody was trained on."""
        return self.declared or any(one.shared for one in self.models.values())

    @property
    def words(self) -> str:
        """What is seen, for people; empty for a set that is not."""
        found = [
            f"{one.shared:,} of its {self.identities:,} by the {role} model ({_some(one)})"
            for role, one in self.models.items()
            if one.shared
        ]
        if not self.seen:
            return ""
        return "its identities were trained on: " + ("; ".join(found) or "so it is declared")


def overlaps(dataset: Dataset, models: Mapping[str, EmbeddingModel], declared: bool) -> Known:
    """Compare a labelled set's identities with those that each model but the paragon was trained on."""
    found = named_identities(dataset)
    judged = {role: model for role, model in models.items() if role != "paragon"}
    if found is None:
        return Known(declared, 0, {role: Overlap(None, why="the set's classes say no identity") for role in judged})
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
    return Known(declared, len(names), by_model)


def unknown_words(sets: Mapping[str, Known]) -> str:
    """One line on what is not known of sets that count as unseen; empty when all is known."""
    open_: dict[tuple[str, str], list[str]] = {}
    for name, known in sets.items():
        for role, one in known.models.items():
            if one.shared is None and not known.seen:
                open_.setdefault((role, one.why), []).append(name)
    lines = [f"{_list(names)} by the {role} model ({why})" for (role, why), names in open_.items()]
    return f"Not known is whether identities were trained on: {'; '.join(lines)}." if lines else ""


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)


def _some(one: Overlap) -> str:
    return (
        ("by name: " if one.by_name else "")
        + _list(one.names)
        + (" …" if one.shared is not None and one.shared > len(one.names) else "")
    )
