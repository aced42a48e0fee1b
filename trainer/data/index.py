"""The data set: a table of records with labels, opened from a folder in seconds whatever its size.

A data set folder holds ``dataset.yaml`` (:class:`DatasetInfo` and the list of parts), the parts (``*.rec`` with
``*.idx`` and ``*.offsets.npy``), ``labels.npy`` (int64, one entry a record, −1 drops it) and, where classes have names,
``classes.txt`` (UTF-8, one line a class). Opened as well: a folder with .rec files of other tools (InsightFace's layout
too) and a folder of identity folders with image files.
"""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from trainer.data import store
from trainer.data.pixels import decode_image, image_size
from trainer.errors import DataError, MissingDataError
from trainer.reading import read_text, read_yaml

DESCRIPTION = "dataset.yaml"
BAD_RECORDS = "bad_records.npy"
MOST_CLASSES = 1_000_000_000
"""More is refused: such a label is a mistake, and tables with an entry for each class would fill the memory."""
_CHUNK = 1 << 22


class PartInfo(BaseModel):
    """One .rec of a data set; paths are relative to the folder of dataset.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rec: str
    records: int | None = Field(None, ge=0)
    bytes: int | None = Field(None, ge=0)
    first_id: int | None = Field(None, ge=0)
    class_offset: int = Field(0, ge=0)
    label_map: str | None = None


_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Spread = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class DatasetInfo(BaseModel):
    """What dataset.yaml says: how images are to be read, and what the set consists of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["lce-dataset-1"] = "lce-dataset-1"
    image_size: tuple[int, int] = (112, 112)
    uniform: bool = False
    color: Literal["RGB", "BGR"] = "RGB"
    mean: tuple[_Finite, _Finite, _Finite] = (0.5, 0.5, 0.5)
    std: tuple[_Spread, _Spread, _Spread] = (0.5, 0.5, 0.5)
    num_classes: int | None = Field(None, ge=1)
    labels: str | None = None
    class_names: str | None = None
    parts: tuple[PartInfo, ...] = ()


class LabelsInfo(BaseModel):
    """What stands beside a label table (``NAME.yaml`` beside ``NAME.npy``): its class count and where it came from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_classes: int = Field(ge=1)
    records: int = Field(ge=0)
    made_by: str = ""
    classes: str | None = Field(
        None, description=".npy (int64): the class of the data set that each class of the table is"
    )


class Dataset:
    """Records with labels. Record numbers run from 0 through all parts; header records have none.

    Attributes:
        path: the folder.
        info: how the images are stored and normalised.
        labels: (N,) int64, memory-mapped where it comes from a file; −1: not used.
        num_classes: C; labels are < C.
    """

    def __init__(
        self,
        path: Path,
        info: DatasetInfo,
        images: store.Store,
        labels: NDArray[np.int64],
        num_classes: int,
        source: Path,
        own_labels: Path | None = None,
    ) -> None:
        self.path, self.info, self.store, self.labels, self.num_classes = path, info, images, labels, num_classes
        self._labels_source, self._own_labels = source, own_labels
        if num_classes > MOST_CLASSES:
            raise DataError(f"{source}: {num_classes} classes; more than {MOST_CLASSES} are not supported")
        if len(labels) != len(images):
            raise DataError(f"{source}: has {len(labels)} labels for the {len(images)} records of {path}")
        self._check_labels()

    def __reduce__(self) -> tuple[Any, ...]:
        """A worker process opens the data set for itself; tables are mapped again, not copied."""
        return open_dataset, (self.path, self._own_labels)

    def _check_labels(self) -> None:
        for start in range(0, len(self.labels), _CHUNK):
            block = self.labels[start : start + _CHUNK]
            wrong = (block < -1) | (block >= self.num_classes)
            if wrong.any():
                at = int(np.flatnonzero(wrong)[0])
                raise DataError(
                    f"{self._labels_source}: record {start + at} has the label {block[at]}; "
                    f"allowed are 0…{self.num_classes - 1} and −1 (not used)"
                )

    def __len__(self) -> int:
        """N, with the records that are not used."""
        return len(self.labels)

    @property
    def named(self) -> str:
        """The folder and, where there is one, the label table, for messages."""
        return str(self.path) if self._own_labels is None else f"{self.path} with the labels {self._own_labels}"

    @cached_property
    def kept(self) -> NDArray[np.int64]:
        """The record numbers whose label is not −1, ascending (n,) int64."""
        return np.flatnonzero(np.asarray(self.labels) >= 0)

    @cached_property
    def class_names(self) -> list[str] | None:
        """The classes' names by class number, where the data set has them (folders have their own).

        A label table that says which classes its own are gets their names; any other one is taken to keep the data
        set's numbers.

        Raises:
            DataError: the file of names cannot be read, or names another number of classes.
        """
        return self._names()

    @cached_property
    def numbering(self) -> str | None:
        """Which identity each class number stands for, as a short text to compare with :func:`renumbered`.

        It comes from the classes' names, else from the table's classes of these very records. Labels that are −1 do not
        change it. None: not known, as for a label table that does not say which classes its own are.

        Raises:
            DataError: as :attr:`class_names`, or the table's classes are damaged.
        """
        classes = self._table_classes
        if self._own_labels is not None and classes is None:
            return None
        names = self._names()
        if names is not None:
            return f"names:{_digest(chr(10).join(names).encode('utf-8', 'surrogateescape'))}"
        numbers = np.arange(self.num_classes) if classes is None else classes
        return f"records {_digest(repr(self.store.sizes()).encode())}:{_digest(numbers.astype('<i8').tobytes())}"

    def _names(self) -> list[str] | None:
        names = self._own_names()
        if names is None or self._table_classes is None:
            return names
        if int(self._table_classes.max()) >= len(names):
            raise DataError(
                f"{self._labels_source}: its classes go up to {self._table_classes.max()}, but {self.path} names "
                f"{len(names)}; the table belongs to another data set"
            )
        return [names[number] for number in self._table_classes.tolist()]

    def _own_names(self) -> list[str] | None:
        """The names of the data set's own classes, whatever the label table."""
        if isinstance(self.store, store.FileStore):
            return list(dict.fromkeys(path.relative_to(self.path).parts[0] for path in self.store.paths))
        if self.info.class_names is None:
            return None
        file = self.path / self.info.class_names
        names = read_text(file, DataError).removesuffix("\n").split("\n")
        if self.info.num_classes is not None and len(names) != self.info.num_classes:
            raise DataError(
                f"{file}: names {len(names)} classes of {self.info.num_classes}; it needs one line for each class"
            )
        return names

    @cached_property
    def _table_classes(self) -> NDArray[np.int64] | None:
        """The data set's class of each class of the label table (C,), where the table says so."""
        described = None if self._own_labels is None else table_info(self._own_labels)
        if self._own_labels is None or described is None or described.classes is None:
            return None
        file = self._own_labels.parent / described.classes
        if not file.exists():  # the table was copied without it
            return None
        classes = np.asarray(store.load_array(file, 1))
        if len(classes) != self.num_classes or int(classes.min(initial=0)) < 0:
            raise DataError(f"{file}: expected the data set's class of each of the table's {self.num_classes} classes")
        return classes

    @property
    def sound_labels(self) -> NDArray[np.int64]:
        """A copy of the labels (N,) int64 in which the records that ``lce check`` found damaged have −1."""
        labels = np.array(self.labels)
        bad = self.known_bad
        labels[bad[(bad >= 0) & (bad < len(labels))]] = -1
        return labels

    @cached_property
    def known_bad(self) -> NDArray[np.int64]:
        """Records that ``lce check`` found damaged (``bad_records.npy`` in the folder), (k,) int64."""
        file = self.path / BAD_RECORDS
        return np.asarray(store.load_array(file, 1)) if file.exists() else np.empty(0, np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the description, the file sizes and the labels; the images themselves are not read."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self.info.image_size, self.info.color, self.num_classes, self.store.sizes())).encode())
        for start in range(0, len(self.labels), _CHUNK):
            digest.update(np.ascontiguousarray(self.labels[start : start + _CHUNK]).tobytes())
        return digest.hexdigest()

    def read(self, record: int) -> bytes:
        """The encoded image of a record. Raises :class:`DataError` naming file and record."""
        return self.store.read(record)

    def where(self, record: int) -> str:
        """File and place of a record, for messages."""
        return self.store.where(record)

    def decode(self, record: int) -> NDArray[np.uint8]:
        """A record's pixels, (H, W, 3) uint8 in the data set's size and colour order. Raises :class:`DataError`."""
        try:
            return decode_image(self.read(record), self.info.image_size, self.info.color, exact=self.info.uniform)
        except ValueError as error:
            raise DataError(f"{self.where(record)} does not decode: {error}") from None

    def close(self) -> None:
        """Close the files; reading opens them again."""
        self.store.close()


def open_dataset(path: str | Path, labels: str | Path | None = None) -> Dataset:
    """Open a data set folder.

    Args:
        path: a folder with dataset.yaml, or with .rec files, or with one folder of images per identity.
        labels: an int64 .npy (N,) that replaces the data set's labels; −1 drops a record. Its class count is that of
            the .yaml beside it (`lce split` writes one), else its largest label + 1.

    Raises:
        MissingDataError: there is no such data set or label table.
        DataError: missing parts, empty or damaged files, a label out of range.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise MissingDataError(f"{folder}: no such data set folder; make one with `lce pack SOURCE {folder}`")
    if labels is not None and not Path(labels).exists():
        raise MissingDataError(f"{labels}: no such file")
    if (folder / DESCRIPTION).exists():
        info, images, found = _open_described(folder)
    elif recs := sorted(folder.glob("*.rec")):
        info, images, found = _open_records(folder, recs)
    else:
        info, images, found = _open_files(folder)
    source = folder / (info.labels or DESCRIPTION)
    classes = info.num_classes
    if labels is not None:
        source = Path(labels)
        described = table_info(source)
        found, classes = store.load_array(source, 1), None if described is None else described.num_classes
    if classes is None:
        classes = max(int(found[start : start + _CHUNK].max()) for start in range(0, max(1, len(found)), _CHUNK)) + 1
        if classes < 1:
            raise DataError(f"{source}: every label is −1; there is nothing to train on")
    return Dataset(folder, info, images, found, classes, source, None if labels is None else source)


def open_named(text: str | Path) -> Dataset:
    """The data set that ``FOLDER``, or ``FOLDER@LABELS.npy`` with a label table, names. Raises: as
    :func:`open_dataset`."""
    folder, separator, labels = str(text).rpartition("@")
    return open_dataset(folder, labels) if separator and labels.endswith(".npy") else open_dataset(text)


def load_description(folder: Path) -> DatasetInfo:
    """Read dataset.yaml. Raises :class:`DataError` naming the file, the key and what is allowed."""
    file = folder / DESCRIPTION
    try:
        return DatasetInfo.model_validate(read_yaml(file, DataError))
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        raise DataError(f"{file}: {'.'.join(map(str, problem['loc'])) or 'content'}: {problem['msg']}") from None


def save_description(folder: Path, info: DatasetInfo) -> None:
    """Write dataset.yaml, atomically."""
    text = yaml.safe_dump(info.model_dump(mode="json", exclude_none=True), sort_keys=False, default_flow_style=None)
    store.write_text(folder / DESCRIPTION, text)


def renumbered(one: str | None, other: str | None) -> bool:
    """Whether two :attr:`Dataset.numbering` certainly number other identities; what is not known is not held against
    them."""
    (kind, _, classes), (other_kind, _, other_classes) = ((text or "").partition(":") for text in (one, other))
    return bool(kind) and kind == other_kind and classes != other_classes


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def table_info(table: Path) -> LabelsInfo | None:
    """What stands beside a label table, or None. Raises :class:`DataError`: it cannot be read."""
    file = table.with_suffix(".yaml")
    if not file.exists():
        return None
    try:
        return LabelsInfo.model_validate(read_yaml(file, DataError))
    except pydantic.ValidationError as error:
        raise DataError(f"{file}: does not describe a label table: {error}") from None


def _open_described(folder: Path) -> tuple[DatasetInfo, store.Store, NDArray[np.int64]]:
    info = load_description(folder)
    if not info.parts:
        raise DataError(f"{folder / DESCRIPTION}: lists no parts; the data set is empty")
    if info.labels is not None:
        parts = [store.open_part(folder / p.rec, p.records, p.bytes, p.first_id) for p in info.parts]
        return info, store.RecordStore(parts), store.load_array(folder / info.labels, 1)
    parts, labels = [], []
    for part in info.parts:
        found = store.load_or_find(folder / part.rec)
        parts.append(store.Part(folder / part.rec, found.offsets, part.first_id))
        labels.append(_mapped(found.labels, part, folder))
    return info, store.RecordStore(parts), np.concatenate(labels)


def _mapped(labels: NDArray[np.int64], part: PartInfo, folder: Path) -> NDArray[np.int64]:
    if part.label_map is not None:
        table = store.load_array(folder / part.label_map, 1)
        if int(labels.max(initial=-1)) >= len(table):
            raise DataError(
                f"{folder / part.label_map}: has {len(table)} entries; {part.rec} has the label {labels.max()}"
            )
        labels = np.where(labels >= 0, table[labels], -1)
    return np.where(labels >= 0, labels + part.class_offset, -1)


def _open_records(folder: Path, recs: list[Path]) -> tuple[DatasetInfo, store.Store, NDArray[np.int64]]:
    """A folder of .rec files of other tools; InsightFace's ``property`` file (classes,height,width) is honoured."""
    found = [store.load_or_find(rec) for rec in recs]
    images = store.RecordStore([store.Part(rec, f.offsets) for rec, f in zip(recs, found, strict=True)])
    labels = found[0].labels if len(found) == 1 else np.concatenate([f.labels for f in found])
    file = folder / "property"
    if not file.exists():
        return DatasetInfo(image_size=_first_size(images)), images, labels
    try:
        classes, height, width = (int(word) for word in read_text(file, DataError).strip().split(","))
        return DatasetInfo(image_size=(height, width), num_classes=classes), images, labels
    except (ValueError, pydantic.ValidationError):
        raise DataError(f"{file}: expected classes,height,width (for example 85742,112,112)") from None


def _open_files(folder: Path) -> tuple[DatasetInfo, store.Store, NDArray[np.int64]]:
    pairs = list(store.image_files(folder))
    if not pairs:
        raise MissingDataError(
            f"{folder}: holds neither dataset.yaml, nor .rec files, nor identity folders with images"
        )
    number = {name: index for index, name in enumerate(dict.fromkeys(name for name, _ in pairs))}
    labels = np.array([number[name] for name, _ in pairs], np.int64)
    images = store.FileStore([file for _, file in pairs])
    return DatasetInfo(image_size=_first_size(images), num_classes=len(number)), images, labels


def _first_size(images: store.Store) -> tuple[int, int]:
    """(H, W) of the first record that shows one, for data sets that do not say their size."""
    for record in range(min(len(images), 16)):
        try:
            return image_size(images.read(record))
        except (ValueError, DataError):
            continue
    raise DataError(f"{images.where(0)}: neither this record nor those after it hold an image that can be read")
