"""Splits for compatible training, as label tables over one data set: no image is copied."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trainer.data.index import Dataset, describe_table
from trainer.errors import DataError
from trainer.files import write_array

Kind = Literal["extended-class", "extended-data", "extended-group", "open-class", "open-data", "open-group"]
KINDS: tuple[Kind, ...] = ("extended-class", "extended-data", "extended-group", "open-class", "open-data", "open-group")


@dataclass(frozen=True)
class Table:
    """Labels over all records of a data set; ``classes[j]`` is the data set's class that the table calls j."""

    labels: NDArray[np.int64]
    classes: NDArray[np.int64]

    @property
    def images(self) -> int:
        """How many records the table uses."""
        return int((self.labels >= 0).sum())


@dataclass(frozen=True)
class SplitOptions:
    """How a data set is split.

    Attributes:
        kind: ``extended-class``: the old model gets a share of the classes, the new one all of them; ``open-class``:
            the new one gets the other classes only. ``extended-data`` and ``open-data``: the same with a share of each
            class's images, at least one each where the class has two: a class with one image is the old model's
            alone in ``open-data``. ``extended-group`` and ``open-group``: the same with a share of the groups of images
            (cameras, typefaces, years); a class without an image in them is not in the table.
        share: the old model's share.
        unseen, tune: shares of the classes held out of both, for the report and for choosing settings.
        seen: images of each remaining class held out of both.
        seed: of every choice.
    """

    kind: Kind = "extended-class"
    share: float = 0.3
    unseen: float = 0.0
    tune: float = 0.0
    seen: int = 0
    seed: int = 0


def split(dataset: Dataset, options: SplitOptions, groups: NDArray[np.int64] | None = None) -> dict[str, Table]:
    """The tables ``old``, ``new`` and, where asked for, ``unseen``, ``tune`` and ``seen``.

    Args:
        dataset: what is split.
        options: see there.
        groups: (N,) the group of each record, for the kinds that split by it.

    Raises:
        DataError: shares that leave no class or no image for a table; groups that do not fit or are missing.
    """
    labels = np.asarray(dataset.labels)
    random = np.random.Generator(np.random.Philox(key=options.seed))
    classes = random.permutation(np.unique(labels[labels >= 0]))
    parts = [round(share * len(classes)) for share in (options.unseen, options.tune)]
    unseen, tune, rest = np.split(classes, np.cumsum(parts))
    rank = _rank_within_class(labels, random)
    counts = np.bincount(labels[labels >= 0], minlength=dataset.num_classes)
    base = np.isin(labels, rest)
    seen = base & (rank < np.minimum(options.seen, counts[labels] - 1))
    pool = base & ~seen
    if options.kind.endswith("class"):
        chosen = rest[: round(options.share * len(rest))]
        old = pool & np.isin(labels, chosen)
        new = pool if options.kind.startswith("extended") else pool & ~old
        old_classes = np.sort(chosen)
        new_classes = np.sort(rest if options.kind.startswith("extended") else rest[len(chosen) :])
    elif options.kind.endswith("group"):
        old = pool & _in_share(dataset, groups, options.share, random)
        new = pool if options.kind.startswith("extended") else pool & ~old
        old_classes, new_classes = np.unique(labels[old]), np.unique(labels[new])
    else:
        held = np.minimum(options.seen, counts[labels] - 1)
        left, opened = counts[labels] - held, options.kind.startswith("open")
        quota = np.maximum(1, np.rint(options.share * left))
        old = pool & (rank - held < (np.minimum(quota, np.maximum(1, left - 1)) if opened else quota))
        new = pool & ~old if opened else pool
        old_classes, new_classes = np.unique(labels[old]), np.unique(labels[new])
    tables = {"old": _table(labels, old, old_classes), "new": _table(labels, new, new_classes)}
    for name, classes_of, wanted in (("unseen", unseen, options.unseen), ("tune", tune, options.tune)):
        if wanted:
            tables[name] = _table(labels, np.isin(labels, classes_of) & (labels >= 0), np.sort(classes_of))
    if options.seen:
        tables["seen"] = _table(labels, seen, np.unique(labels[seen]))
    for name, table in tables.items():
        if not table.images:
            raise DataError(f"{dataset.path}: the split leaves no image for `{name}`; change the shares")
    return tables


def _in_share(
    dataset: Dataset, groups: NDArray[np.int64] | None, share: float, random: np.random.Generator
) -> NDArray[np.bool_]:
    """Which records (N,) are in the old model's groups: a share of them, at least one and not all."""
    if groups is None or np.shape(groups) != (len(dataset),):
        given = "none are given" if groups is None else f"found the shape {np.shape(groups)}"
        raise DataError(f"{dataset.path}: a split by group needs the group of each of its records; {given}")
    names = random.permutation(np.unique(groups))
    if len(names) < 2:
        raise DataError(f"{dataset.path}: a split by group needs two groups; all records are in one")
    chosen = names[: min(len(names) - 1, max(1, round(share * len(names))))]
    return np.isin(groups, chosen)


def save_tables(tables: dict[str, Table], folder: Path, dataset: Dataset, made_by: str) -> None:
    """Write NAME.npy (labels), NAME.classes.npy and, last, NAME.yaml for each table of ``dataset``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            labels, classes = folder / f"{name}.npy", folder / f"{name}.classes.npy"
            write_array(labels, table.labels)
            write_array(classes, table.classes)
            describe_table(labels, dataset, len(table.classes), made_by, classes)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror}") from None


def _table(labels: NDArray[np.int64], used: NDArray[np.bool_], classes: NDArray[np.int64]) -> Table:
    number = np.full(int(labels.max()) + 1, -1, np.int64)
    number[classes] = np.arange(len(classes))
    return Table(np.where(used, number[labels], -1), classes.astype(np.int64))


def _rank_within_class(labels: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
    """For each record its place 0, 1, … in a random order of its class's records."""
    shuffled = random.permutation(len(labels))
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]
    ordered = labels[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    rank = np.empty(len(labels), np.int64)
    rank[order] = np.arange(len(labels)) - np.repeat(starts, np.diff(np.append(starts, len(labels))))
    return rank
