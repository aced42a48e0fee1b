"""Which old classes a new class stands for: the old and the new data set rarely number their identities alike."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trainer.compat.bank.matrices import read_labels
from trainer.data.index import MOST_CLASSES
from trainer.data.listing import is_whole_number
from trainer.errors import CenterBankError
from trainer.reading import open_regular


class ClassMap:
    """For each of C new classes the old classes that are the same identity: none, one, or several (which are merged).

    Attributes:
        first: (C,) int64, the lowest old class of each new one; −1 where there is none.
    """

    def __init__(self, new: np.ndarray, old: np.ndarray, num_classes: int, source: str) -> None:
        """Pairs (new[i], old[i]), both int64 (P,), any order; a repeated pair counts once.

        Raises:
            CenterBankError: a new class outside [0, num_classes) or an old one below 0.
        """
        if len(new) and (new.min() < 0 or new.max() >= num_classes or old.min() < 0):
            raise CenterBankError(f"{source}: names a class outside the {num_classes} new ones or below 0")
        pairs = np.unique(np.stack([new, old], 1).astype(np.int64), axis=0).reshape(-1, 2)
        self.num_classes, self.source = num_classes, source
        self._new, self._old = pairs[:, 0], pairs[:, 1]
        self.first = np.full(num_classes, -1, np.int64)
        self.first[self._new[::-1]] = self._old[::-1]

    @staticmethod
    def from_index(index: np.ndarray, source: str = "class map") -> "ClassMap":
        """An array (C,) of integers: entry j is the old class of new class j, −1 for none.

        Raises:
            CenterBankError: no one-dimensional array of integers, or an entry below −1.
        """
        if index.ndim != 1 or index.dtype.kind not in "iu" or not len(index):
            raise CenterBankError(f"{source}: needs one row of integers, not {index.dtype} of shape {index.shape}")
        index = index.astype(np.int64)
        if index.min() < -1:
            raise CenterBankError(f"{source}: entry {int(index.argmin())} is {index.min()}; −1 means no old class")
        known = np.flatnonzero(index >= 0)
        return ClassMap(known, index[known], len(index), source)

    @staticmethod
    def from_file(
        path: str | Path,
        new_names: Sequence[str] | None,
        old_names: Sequence[str] | None,
        num_classes: int | None = None,
    ) -> "ClassMap":
        """Read a map: ``.npy`` as for :meth:`from_index`, or ``.csv`` with lines ``new,old`` (a header of these words
        may lead).

        The CSV's entries are class names where name lists are given, else class numbers, which may also stand for names
        where no name of the list is a number. One new class on several lines merges the old ones.

        Args:
            path: the file.
            new_names, old_names: the classes' names, where they have some.
            num_classes: the new class count; None: that of ``new_names`` or of the file (``.csv``: the largest number
                plus one).

        Raises:
            CenterBankError: unreadable, another kind of file, a name that is not in its list (file and line are
            named), or another class count.
        """
        path = Path(path)
        if path.suffix == ".npy":
            index = read_labels(path, "old class numbers")
            if num_classes is not None and len(index) != num_classes:
                raise CenterBankError(
                    f"{path}: maps {len(index)} classes, the new data set has {num_classes}; give one entry for each, "
                    "−1 for none"
                )
            return ClassMap.from_index(index, str(path))
        if path.suffix != ".csv":
            raise CenterBankError(f"{path}: a class map is a .npy array or a .csv file of new,old")
        new, old = _read_csv(path, new_names, old_names)
        if num_classes is None:
            num_classes = len(new_names) if new_names is not None else int(new.max()) + 1
        return ClassMap(new, old, num_classes, str(path))

    @staticmethod
    def from_names(new_names: Sequence[str], old_names: Sequence[str], source: str = "class names") -> "ClassMap":
        """New and old classes of the same name are the same identity. Raises :class:`CenterBankError` when none is."""
        where: dict[str, list[int]] = {}
        for number, name in enumerate(old_names):
            where.setdefault(name, []).append(number)
        pairs = [(new, old) for new, name in enumerate(new_names) for old in where.get(name, ())]
        if not pairs:
            raise CenterBankError(f"{source}: no class name is in both data sets; give a map with `map`")
        array = np.array(pairs, np.int64)
        return ClassMap(array[:, 0], array[:, 1], len(new_names), source)

    def check(self, num_old: int) -> None:
        """Raises :class:`CenterBankError` when an old class ≥ ``num_old`` is named."""
        if len(self._old) and self._old.max() >= num_old:
            raise CenterBankError(f"{self.source}: names old class {self._old.max()}, the old model has {num_old}")

    def members(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The pairs of the new classes [start, stop): old classes (m,) int64 and, counted from ``start``, new ones
        (m,)."""
        low, high = np.searchsorted(self._new, [start, stop])
        return self._old[low:high], self._new[low:high] - start

    @property
    def summary(self) -> str:
        """How many classes are mapped, merged and masked, in words."""
        per_class = np.bincount(self._new, minlength=self.num_classes)
        return (
            f"{int((per_class > 0).sum())} of {self.num_classes} classes have an old one, "
            f"{int((per_class > 1).sum())} of them merged from several; {int((per_class == 0).sum())} masked"
        )


def _read_csv(
    path: Path, new_names: Sequence[str] | None, old_names: Sequence[str] | None
) -> tuple[np.ndarray, np.ndarray]:
    numbers: list[tuple[int, int]] = []
    columns = [_Column(names) for names in (new_names, old_names)]
    try:
        with open_regular(path, CenterBankError) as file:
            for line, row in enumerate(csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline="")), 1):
                if not row or (line == 1 and [cell.strip().lower() for cell in row] == ["new", "old"]):
                    continue
                if len(row) != 2:
                    raise CenterBankError(f"{path}, line {line}: {len(row)} columns; needed are two: new,old")
                cells = zip(row, columns, strict=True)
                new, old = (column.number_of(cell.strip(), f"{path}, line {line}") for cell, column in cells)
                numbers.append((new, old))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CenterBankError(f"{path}: cannot be read: {error}") from None
    if not numbers:
        raise CenterBankError(f"{path}: holds no pair of classes")
    array = np.array(numbers, np.int64)
    return array[:, 0], array[:, 1]


class _Column:
    """What the cells of one column may be: names of a list, or numbers where no name is one."""

    def __init__(self, names: Sequence[str] | None) -> None:
        self._lookup = {name: number for number, name in enumerate(names or ())}
        self._takes_numbers = not any(is_whole_number(name) for name in self._lookup)
        self._named = names is not None

    def number_of(self, cell: str, where: str) -> int:
        """The class number of a cell. Raises :class:`CenterBankError`."""
        if cell in self._lookup:
            return self._lookup[cell]
        if self._takes_numbers and is_whole_number(cell) and int(cell) < MOST_CLASSES:
            return int(cell)
        if self._named:
            raise CenterBankError(f"{where}: no class is called {cell!r}")
        raise CenterBankError(f"{where}: {cell!r} is no class number; names need the data sets' class_names")
