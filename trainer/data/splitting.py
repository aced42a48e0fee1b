"""Splits for compatible training, as label tables over one data set: no image is copied."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trainer.data.index import Dataset, check_description, describe_table
from trainer.errors import DataError
from trainer.files import partial_of, remove, write_array
from trainer.owner import owned
from trainer.reading import read_text

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


Amount = float | int | tuple[int, ...]
"""Of classes: a share (float, 0 to 1), a count (int), or these very ones (class numbers of the data set)."""


@dataclass(frozen=True)
class SplitOptions:
    """How a data set is split.

    Attributes:
        kind: ``extended-class``: the old model gets a share of the classes, the new one all of them; ``open-class``:
            the new one gets the other classes only. ``extended-data`` and ``open-data``: the same with a share of each
            class's images, at least one each where the class has two: a class with one image is the old model's
            alone in ``open-data``. ``extended-group`` and ``open-group``: the same with a share of the groups of images
            (cameras, typefaces, years); a class without an image in them is not in the table.
        share: the old model's share; of classes a count or a list too, of groups a count too.
        unseen, tune: classes held out of both, for the report and for choosing settings.
        seen: images of each remaining class held out of both.
        seed: of every choice.
    """

    kind: Kind = "extended-class"
    share: Amount = 0.3
    unseen: Amount = 0.0
    tune: Amount = 0.0
    seen: int = 0
    seed: int = 0


def split(dataset: Dataset, options: SplitOptions, groups: NDArray[np.int64] | None = None) -> dict[str, Table]:
    """The tables ``old``, ``new`` and, where asked for, ``unseen``, ``tune`` and ``seen``.

    Args:
        dataset: what is split.
        options: see there.
        groups: (N,) the group of each record, for the kinds that split by it.

    Raises:
        DataError: amounts that leave no class or no image for a table, counts of more than there are, lists that share
            a class; groups that do not fit or are missing.
    """
    labels = np.asarray(dataset.labels)
    random = np.random.Generator(np.random.Philox(key=options.seed))
    classes = random.permutation(np.unique(labels[labels >= 0]))
    listed = _listed(dataset, options, classes)
    free = classes[~np.isin(classes, listed)]
    unseen, free = _take(options.unseen, free, len(classes), "--unseen")
    tune, free = _take(options.tune, free, len(classes), "--tune")
    rest = classes[~np.isin(classes, np.concatenate([unseen, tune]))]
    rank = _rank_within_class(labels, random)
    counts = np.bincount(labels[labels >= 0], minlength=dataset.num_classes)
    base = np.isin(labels, rest)
    seen = base & (rank < np.minimum(options.seen, counts[labels] - 1))
    pool = base & ~seen
    if options.kind.endswith("class"):
        chosen, others = _take(options.share, free, len(rest), "--share")
        if isinstance(options.share, tuple):
            others = free
        old = pool & np.isin(labels, chosen)
        new = pool if options.kind.startswith("extended") else pool & ~old
        old_classes = np.sort(chosen)
        new_classes = np.sort(rest if options.kind.startswith("extended") else others)
    elif options.kind.endswith("group"):
        if isinstance(options.share, tuple):
            raise DataError(f"{dataset.path}: {options.kind} takes a share or a count of groups, no list of identities")
        old = pool & _in_share(dataset, groups, options.share, random)
        new = pool if options.kind.startswith("extended") else pool & ~old
        old_classes, new_classes = np.unique(labels[old]), np.unique(labels[new])
    else:
        if not isinstance(options.share, float):
            raise DataError(f"{dataset.path}: {options.kind} takes a share of each class's images, 0.0 to 1.0")
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


def identity_list(dataset: Dataset, file: Path) -> tuple[int, ...]:
    """The class numbers of the identities that a text file names, one a line: by name, or by number where the data set
    has no names.

    Raises:
        DataError: an identity that the data set does not have, or none at all.
    """
    names = dataset.class_names
    known = {name: k for k, name in enumerate(map(str, range(dataset.num_classes)) if names is None else names)}
    found: dict[int, None] = {}
    for number, line in enumerate(read_text(file, DataError, "utf-8-sig").splitlines(), 1):
        name = line.strip()
        if name and name not in known:
            raise DataError(f"{file}: line {number}: {dataset.path} has no identity {name!r}")
        if name:
            found[known[name]] = None
    if not found:
        raise DataError(f"{file}: names no identity; expected one a line")
    return tuple(found)


def _listed(dataset: Dataset, options: SplitOptions, classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """All classes that are named in lists. Raises :class:`DataError`: one without images, or in two lists."""
    lists = [amount for amount in (options.unseen, options.tune, options.share) if isinstance(amount, tuple)]
    listed, counts = np.unique([k for one in lists for k in one], return_counts=True)
    listed = listed.astype(np.int64)
    wrong = next(
        ((k, "has no image in use") for k in listed if k not in classes),
        next(((k, "is in two lists") for k in listed[counts > 1]), None),
    )
    if wrong is not None:
        names = dataset.class_names
        name = wrong[0] if names is None else names[wrong[0]]
        raise DataError(f"{dataset.path}: the identity {name} {wrong[1]}")
    return listed


def _take(
    amount: Amount, free: NDArray[np.int64], total: int, option: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The classes of an amount, from the front of ``free`` unless they are listed, and what is left of ``free``."""
    if isinstance(amount, tuple):
        return np.array(amount, np.int64), free
    count = amount if isinstance(amount, int) else round(amount * total)
    if count > len(free):
        raise DataError(f"{option} {amount}: {count} identities are wanted and {len(free)} are left")
    return free[:count], free[count:]


def _in_share(
    dataset: Dataset, groups: NDArray[np.int64] | None, share: float | int, random: np.random.Generator
) -> NDArray[np.bool_]:
    """Which records (N,) are in the old model's groups: a share of them, at least one and not all."""
    if groups is None or np.shape(groups) != (len(dataset),):
        given = "none are given" if groups is None else f"found the shape {np.shape(groups)}"
        raise DataError(f"{dataset.path}: a split by group needs the group of each of its records; {given}")
    names = random.permutation(np.unique(groups))
    if len(names) < 2:
        raise DataError(f"{dataset.path}: a split by group needs two groups; all records are in one")
    count = share if isinstance(share, int) else round(share * len(names))
    chosen = names[: min(len(names) - 1, max(1, count))]
    return np.isin(groups, chosen)


def save_tables(tables: dict[str, Table], folder: Path, dataset: Dataset, made_by: str) -> list[str]:
    """Write NAME.npy (labels), NAME.classes.npy and NAME.yaml for each table of ``dataset``.

    All are complete before the first gets its name, and those of an earlier split are gone by then: what is there
    after a kill is of this split. Each NAME.npy comes last, so that none is without its description.

    Returns:
        Tables of other splits that the folder holds.

    Raises:
        DataError: another process writes tables there, or the folder cannot be written.
    """
    try:
        with owned(folder, DataError, lock=folder / ".owner"):
            for name in tables:
                check_description(folder / f"{name}.npy")
            partial = partial_of(folder / "split")
            try:
                partial.mkdir()
                for name, table in tables.items():
                    labels, classes = partial / f"{name}.npy", partial / f"{name}.classes.npy"
                    write_array(labels, table.labels)
                    write_array(classes, table.classes)
                    describe_table(labels, dataset, len(table.classes), made_by, classes)
                for name in tables:
                    (folder / f"{name}.npy").unlink(missing_ok=True)
                for name in tables:
                    for file in (f"{name}.yaml", f"{name}.classes.npy", f"{name}.npy"):
                        (partial / file).rename(folder / file)
            finally:
                remove(partial)
            names = {file.name.partition(".")[0] for file in folder.glob("*.classes.npy")}
            return sorted(names - set(tables))
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
