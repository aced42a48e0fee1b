"""The data set: a table of records with labels, opened from a folder in seconds whatever its size.

A data set folder holds ``dataset.yaml`` (:class:`DatasetInfo` and the list of parts), the parts (``*.rec`` with
``*.idx`` and ``*.offsets.npy``), ``labels.npy`` (int64, one entry a record, −1 drops it) and, where classes have names,
``classes.txt`` (UTF-8, one line a class). Opened as well: a folder with .rec files of other tools (InsightFace's layout
too) and a folder of identity folders with image files.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import pydantic
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from trainer.data import checksums, recordio, store
from trainer.data.pixels import decode_image, image_size
from trainer.errors import DataError, ForeignRecordsError, MissingDataError, OutsideError
from trainer.files import checksum, write_text
from trainer.reading import as_path, read_text, read_yaml
from trainer.seals import find_change, sealed, unsealed, warn_once

DESCRIPTION = "dataset.yaml"
BAD_RECORDS = "bad_records.npy"
MOST_CLASSES = 1_000_000_000
"""More is refused: such a label is a mistake, and tables with an entry for each class would fill the memory."""
MOST_COMPARED_BYTES = 16 << 30
"""Embeddings by record in a larger file are not read whole when a run starts."""
Checks = Literal["all", "records", "none"]
"""Which checksums are compared: of tables at the opening and of records as they are read; of records; none."""
_allowed = False
_CHUNK = 1 << 22
_SAMPLED = 16


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
    """The file next to a label table (``NAME.yaml`` for ``NAME.npy``): its class count and where it came from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_classes: int = Field(ge=1)
    records: int = Field(ge=0)
    made_by: str = ""
    classes: str | None = Field(
        None, description=".npy (int64): the class of the data set that each class of the table is"
    )
    dataset: str | None = Field(None, description="the folder of the records that it numbers")
    fingerprint: str | None = Field(None, description="of these records: Dataset.records_fingerprint")
    labels_file: tuple[int, int] | None = Field(None, description="(bytes, CRC-32) of the table")
    classes_file: tuple[int, int] | None = Field(None, description="(bytes, CRC-32) of the file of ``classes``")


def describe_table(
    table: Path, dataset: "Dataset", num_classes: int, made_by: str, classes: Path | None = None
) -> None:
    """Write NAME.yaml next to a label table NAME.npy: whose records it numbers, its class count and checksums."""
    info = LabelsInfo(
        num_classes=num_classes,
        records=len(dataset),
        made_by=made_by,
        classes=None if classes is None else classes.name,
        dataset=str(dataset.path),
        fingerprint=dataset.records_fingerprint,
        labels_file=checksum(table),
        classes_file=None if classes is None else checksum(classes),
    )
    tree = sealed(info.model_dump(mode="json", exclude_none=True))
    write_text(table.with_suffix(".yaml"), yaml.safe_dump(tree, sort_keys=False))


def seal_table(table: Path, dataset: "Dataset") -> None:
    """Write what stands next to a label table anew, for the table as it is now and a data set opened with it."""
    known = table_info(table)
    classes = None if known is None or known.classes is None else table.parent / known.classes
    kept = classes if classes is not None and classes.exists() else None
    describe_table(table, dataset, dataset.num_classes, "" if known is None else known.made_by, kept)


class RowsInfo(BaseModel):
    """The file next to embeddings by record (``NAME.yaml`` for ``NAME.npy``): whose records, and which model's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    records: int = Field(ge=0)
    dim: int = Field(ge=1)
    model: str
    model_hash: str
    dataset: str
    fingerprint: str = Field(description="of the records: Dataset.records_fingerprint")
    file: tuple[int, int] | None = Field(None, description="(bytes, CRC-32) of the embeddings")


def describe_rows(rows: Path, info: RowsInfo) -> None:
    """Write what stands next to embeddings by record, with their checksum."""
    info = info.model_copy(update={"file": checksum(rows)})
    tree = sealed(info.model_dump(mode="json"))
    write_text(rows.with_suffix(".yaml"), yaml.safe_dump(tree, sort_keys=False))


def check_description(array: Path) -> None:
    """Refuse to write NAME.npy where NAME.yaml is another's: the description of the array would take its place.

    Raises:
        DataError: there is such a file, and it describes no array.
    """
    file = array.with_suffix(".yaml")
    if not file.exists():
        return
    tree = read_yaml(file, DataError)
    if not isinstance(tree, dict) or "records" not in tree:
        raise DataError(
            f"{file}: exists and describes no array; the description of {array.name} would replace it: choose another "
            "name for the array"
        )


def rows_info(rows: Path) -> RowsInfo | None:
    """What stands next to embeddings by record, or None; the embeddings are compared with their checksum, up to
    :data:`MOST_COMPARED_BYTES` of them. Raises :class:`DataError`: damage in either."""
    file = rows.with_suffix(".yaml")
    known = _read_description(file, RowsInfo, "embeddings by record") if file.exists() else None
    if known is not None and known.file is not None and known.file[0] <= MOST_COMPARED_BYTES:
        change = find_change(rows, *known.file)
        if change is not None:
            raise DataError(f"{change}; make the embeddings again")
    return known


def check_rows(rows: Path, labels: "Dataset | Path") -> None:
    """Refuse embeddings by record of other records than those of a data set, or of a label table (its file); those that
    do not say whose they are pass. Raises :class:`ForeignRecordsError`."""
    known = rows_info(rows)
    table = table_info(labels) if isinstance(labels, Path) else None
    if known is None:
        return
    if isinstance(labels, Dataset):
        labels.check_numbering(f"the file of embeddings {rows}", known.fingerprint, known.dataset)
    elif table and table.fingerprint and not same_records(known.fingerprint, table.fingerprint):
        raise ForeignRecordsError(
            f"{rows} holds the embeddings of {known.dataset} ({_short(known.fingerprint)}); the label table {labels} "
            f"numbers the records of {table.dataset} ({_short(table.fingerprint)}): take both from one data set"
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
        checks: Checks = "all",
        before: NDArray[np.int64] | None = None,
    ) -> None:
        self.path, self.info, self.store, self.labels, self.num_classes = path, info, images, labels, num_classes
        self._labels_source, self._own_labels, self._checks = source, own_labels, checks
        self._before = labels if before is None else before  # what the data set itself says, whatever the label table
        if num_classes > MOST_CLASSES:
            raise DataError(f"{source}: {num_classes} classes; more than {MOST_CLASSES} are not supported")
        if len(labels) != len(images):
            raise DataError(f"{source}: has {len(labels)} labels for the {len(images)} records of {path}")
        self._check_labels()

    def __reduce__(self) -> tuple[Any, ...]:
        """A worker process opens the data set for itself; tables are mapped again, not copied."""
        return _open, (self.path, self._own_labels, "none" if self._checks == "none" else "records")

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

    @property
    def checksummed(self) -> bool:
        """Whether every record that is read is compared with its checksum."""
        if isinstance(self.store, store.RecordStore):
            return all(part.crcs is not None for part in self.store.parts)
        return isinstance(self.store, store.FileStore) and self.store.crcs is not None

    def __len__(self) -> int:
        """N, with the records that are not used."""
        return len(self.labels)

    @property
    def named(self) -> str:
        """The folder and, where there is one, the label table, for messages."""
        return str(self.path) if self._own_labels is None else f"{self.path} with the labels {self._own_labels}"

    @property
    def packed_labels(self) -> bool:
        """Whether the labels are those that `lce pack` wrote, and no table of somebody's own."""
        return self._own_labels is None and self.info.labels == "labels.npy" and (self.path / "pack.json").exists()

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
    def own_classes(self) -> tuple[NDArray[np.int64], list[str] | None]:
        """The data set's own classes of the records in use, ascending (k,) int64, and the names of all its classes."""
        there = np.zeros(int(np.asarray(self._before).max(initial=-1)) + 1, bool)
        for start in range(0, len(self.labels), _CHUNK):
            rows = slice(start, start + _CHUNK)
            used = self._before[rows][self.labels[rows] >= 0]
            there[used[used >= 0]] = True
        return np.flatnonzero(there), self._own_names()

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

    @cached_property
    def records_fingerprint(self) -> str:
        """Which image each record number is, as a short text to compare with :func:`same_records`; labels, classes and
        the cut into parts do not change it.

        A hash of the sizes of all records in their order, then four digits of each of some images. For 42 million
        records it takes half a second and reads no others.
        """
        digest = hashlib.blake2b(digest_size=12)
        count = len(self.store)
        for start in range(0, count, _CHUNK):
            digest.update(self.store.lengths(start, min(start + _CHUNK, count)).astype("<u4").tobytes())
        numbers = np.unique(np.linspace(0, count - 1, min(count, _SAMPLED)).astype(np.int64)).tolist()
        return f"{count}-{digest.hexdigest()}-{'.'.join(map(self._image_digits, numbers))}"

    def _image_digits(self, record: int) -> str:
        try:
            return _digest(self.read(record))[:4]
        except DataError:
            return "?"

    def check_numbering(self, what: str, fingerprint: str | None, made_for: str | None) -> None:
        """Refuse what numbers other records than these; what does not say which it numbers is taken with a warning.

        Args:
            what: the file, with what it is, for messages. fingerprint: of the records that it numbers, where known.
            made_for: their folder.

        Raises:
            ForeignRecordsError: the records are others, or in another order.
        """
        if fingerprint is None:
            warn_once(f"{what} does not say whose records it numbers; it is taken as made for {self.path}")
        elif not same_records(fingerprint, self.records_fingerprint):
            raise ForeignRecordsError(
                f"{what} numbers the records of {made_for or 'another data set'} ({_short(fingerprint)}), not those of "
                f"{self.path} ({_short(self.records_fingerprint)}): other images, or the same in another order; give "
                "the data set that it was made from, or make it from this one"
            )

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

    def byte_positions(self, records: NDArray[np.int64]) -> NDArray[np.int64]:
        """The first byte of each of some records, counted through all files in their order, (n,) int64."""
        ends = np.empty(len(self.store), np.int64)
        for start in range(0, len(ends), _CHUNK):
            ends[start : start + _CHUNK] = self.store.lengths(start, min(start + _CHUNK, len(ends)))
        np.cumsum(ends, out=ends)
        first = ends[records - 1]  # of record 0: the last one's, which is replaced
        first[records == 0] = 0
        return first

    def close(self) -> None:
        """Close the files; reading opens them again."""
        self.store.close()


def open_dataset(path: str | Path, labels: str | Path | None = None, *, verify: bool = True) -> Dataset:
    """Open a data set folder.

    Args:
        path: a folder with dataset.yaml, or with .rec files, or with one folder of images per identity.
        labels: an int64 .npy (N,) that replaces the data set's labels; −1 drops a record. Its class count is that of
            the .yaml next to it (`lce split` writes one), else its largest label + 1.
        verify: compare the checksums of the tables, now, and of each record when it is read.

    Raises:
        MissingDataError: there is no such data set or label table.
        ForeignRecordsError: the label table was made for other records.
        DataError: missing parts, empty or damaged files, a label out of range.
    """
    table = None if labels is None else as_path(labels, "labels", "the path of a label table (.npy)")
    dataset = _open(as_path(path, "path", "the path of a data set"), table, "all" if verify else "none")
    if table is not None:
        known = table_info(table)
        of = (None, None) if known is None else (known.fingerprint, known.dataset)
        dataset.check_numbering(f"the label table {labels}", *of)
    return dataset


def _open(folder: Path, labels: Path | None, checks: Checks) -> Dataset:
    if folder.is_file():
        raise MissingDataError(f"{folder}: is a file; give the data set's folder")
    if not folder.is_dir():
        raise MissingDataError(f"{folder}: no such data set folder; make one with `lce pack SOURCE {folder}`")
    if labels is not None and not labels.exists():
        raise MissingDataError(f"{labels}: no such file")
    stated, ours = folder / DESCRIPTION, (folder / "pack.json").exists()
    if checks == "all":
        sums = checksums.read_sums(folder)
        if sums is not None:
            checksums.verify(folder, sums, (BAD_RECORDS,))
        elif ours and stated.exists():
            warn_once(
                f"{folder}: was packed without checksums; damage that still decodes would not be noticed "
                f"(`lce check {folder} --seal` adds them)"
            )
    if not stated.exists() and ours:
        raise DataError(
            f"{folder}: its packing is not finished, images are missing; run the same `lce pack` again (or remove "
            "pack.json, to take the .rec files that are there for the whole)"
        )
    if stated.exists():
        info, images, found = _open_described(folder)
    elif recs := sorted(folder.glob("*.rec")):
        info, images, found = _open_records(folder, recs)
        stated = folder / "property" if info.num_classes is not None else recs[0]
    else:
        info, images, found = _open_files(folder)
    if checks != "none":
        checksums.attach(folder, images)
    source = folder / info.labels if info.labels else stated
    classes, before = info.num_classes, found
    if labels is not None:
        source = labels
        described = table_info(source)
        if checks == "all" and described is not None:
            _check_table(source, described)
        found, classes = store.load_array(source, 1), None if described is None else described.num_classes
    if classes is None:
        classes = max(int(found[start : start + _CHUNK].max()) for start in range(0, max(1, len(found)), _CHUNK)) + 1
        if classes < 1:
            raise DataError(f"{source}: every label is −1; there is nothing to train on")
    return Dataset(folder, info, images, found, classes, source, labels, checks, before)


def _check_table(table: Path, described: LabelsInfo) -> None:
    """Raise :class:`DataError` where a label table, or its file of classes, is not as it was written."""
    classes = None if described.classes is None else table.parent / described.classes
    for file, known in ((table, described.labels_file), (classes, described.classes_file)):
        change = find_change(file, *known) if file is not None and known is not None and file.exists() else None
        if change is not None:
            raise DataError(
                f"{change}; make the label table again, or, if the change is meant, `lce check DATASET --labels "
                f"{table} --seal`"
            )


@contextmanager
def outside_allowed(yes: bool) -> Iterator[None]:
    """Follow names in a dataset.yaml that lead out of its folder, in this process, where the user trusts them."""
    global _allowed
    before, _allowed = _allowed, yes or _allowed
    try:
        yield
    finally:
        _allowed = before


def open_named(text: str | Path) -> Dataset:
    """The data set that ``FOLDER``, or ``FOLDER@LABELS.npy`` with a label table, names. Raises: as
    :func:`open_dataset`."""
    folder, separator, labels = str(text).rpartition("@")
    if separator and not labels:
        raise DataError(f"{text}: no label table behind the @, such as {folder}@unseen.npy")
    return open_dataset(folder, labels) if separator and labels.endswith(".npy") else open_dataset(text)


def load_description(folder: Path) -> DatasetInfo:
    """Read dataset.yaml. Raises :class:`DataError` naming the file, the key and what is allowed."""
    file = folder / DESCRIPTION
    try:
        return DatasetInfo.model_validate(read_yaml(file, DataError))
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        raise DataError(f"{file}: {'.'.join(map(str, problem['loc'])) or 'content'}: {problem['msg']}") from None


def description_text(info: DatasetInfo) -> str:
    """What dataset.yaml holds."""
    return yaml.safe_dump(info.model_dump(mode="json", exclude_none=True), sort_keys=False, default_flow_style=None)


def seal_dataset(dataset: Dataset) -> None:
    """Write the checksums of a data set as it is now (``lce check --seal``).

    Raises:
        DataError: a record cannot be read, or the folder cannot be written.
    """
    info, folder = dataset.info, dataset.path
    names = [DESCRIPTION, "property", BAD_RECORDS, info.labels, info.class_names]
    names += [part.label_map for part in info.parts]
    if isinstance(dataset.store, store.RecordStore):
        described = [store.offsets_path(part.path) for part in dataset.store.parts] if info.labels else []
        indexes = [part.path.with_suffix(".idx") for part in dataset.store.parts] if not info.labels else []
        names += [path.relative_to(folder).as_posix() for path in (*described, *indexes)]
    checksums.seal(folder, dataset.store, [name for name in names if name is not None])


def save_description(folder: Path, info: DatasetInfo) -> None:
    """Write dataset.yaml, atomically."""
    write_text(folder / DESCRIPTION, description_text(info))


def renumbered(one: str | None, other: str | None) -> bool:
    """Whether two :attr:`Dataset.numbering` certainly number other identities; what is not known is not held against
    them."""
    (kind, _, classes), (other_kind, _, other_classes) = ((text or "").partition(":") for text in (one, other))
    return bool(kind) and kind == other_kind and classes != other_classes


def same_records(one: str, other: str) -> bool:
    """Whether two :attr:`Dataset.records_fingerprint` are of the same images in the same order.

    Some of the sampled images may have been damaged meanwhile.
    """
    (sizes, _, images), (other_sizes, _, other_images) = (text.rpartition("-") for text in (one, other))
    pairs = list(zip(images.split("."), other_images.split("."), strict=False))
    return sizes == other_sizes and 2 * sum(a == b or "?" in (a, b) for a, b in pairs) > len(pairs)


def _short(fingerprint: str) -> str:
    count, _, rest = fingerprint.partition("-")
    return f"{count} records, {rest[:8]}"


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def table_info(table: Path) -> LabelsInfo | None:
    """What stands next to a label table, or None. Raises :class:`DataError`: it cannot be read."""
    file = table.with_suffix(".yaml")
    described = _read_description(file, LabelsInfo, "a label table") if file.exists() else None
    if described is not None and described.classes is not None and Path(described.classes).name != described.classes:
        raise DataError(f"{file}: classes = {described.classes}: names a file outside the table's folder")
    return described


_Info = TypeVar("_Info", bound=BaseModel)


def _read_description(file: Path, kind: type[_Info], what: str) -> _Info:
    try:
        return kind.model_validate(unsealed(read_yaml(file, DataError), file, DataError))
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"])) or "content"
        reason = "is missing" if problem["type"] == "missing" else problem["msg"]
        raise DataError(f"{file}: does not describe {what}: {key}: {reason}") from None


def _check_inside(folder: Path, info: DatasetInfo) -> None:
    """Refuse names that lead out of the data set's folder, unless the user allows them."""
    names = [info.labels, info.class_names, *(name for part in info.parts for name in (part.rec, part.label_map))]
    outside = next((n for n in names if n is not None and (Path(n).is_absolute() or ".." in Path(n).parts)), None)
    if outside is not None and not _allowed:
        raise OutsideError(
            f"{folder / DESCRIPTION}: names {outside}, which is outside its folder; if you trust it, allow it: "
            "data.allow_outside=true in a training configuration, `allow_outside` elsewhere"
        )


def _open_described(folder: Path) -> tuple[DatasetInfo, store.Store, NDArray[np.int64]]:
    info = load_description(folder)
    _check_inside(folder, info)
    if not info.parts:
        raise DataError(f"{folder / DESCRIPTION}: lists no parts; the data set is empty")
    if info.labels is not None:
        parts = [store.open_part(folder / p.rec, p.records, p.bytes, p.first_id) for p in info.parts]
        return info, store.RecordStore(parts), store.load_array(folder / info.labels, 1)
    parts, labels = [], []
    for part in info.parts:
        found = store.load_or_find(folder / part.rec)
        if info.num_classes is None and part.label_map is None:
            _check_identities(folder / part.rec, found)
        parts.append(store.Part(folder / part.rec, found.offsets, part.first_id))
        labels.append(_mapped(found.labels, part, folder))
    return info, store.RecordStore(parts), np.concatenate(labels)


def _check_identities(rec: Path, found: store.Found) -> None:
    """Raise :class:`DataError` where InsightFace's header record counts other identities than the labels do."""
    largest = int(found.labels.max(initial=-1))
    identities = found.identities or 0
    if identities <= 0 or largest >= MOST_CLASSES:  # some headers count none; so many classes are refused
        return
    there = np.zeros(largest + 1, bool)
    there[found.labels[found.labels >= 0]] = True
    distinct = int(there.sum())
    exact = len(found.labels) + identities < recordio.EXACT_FLOAT_LABELS  # its keys are float32
    if abs(distinct - identities) > (0 if exact else 4):
        raise DataError(
            f"{rec}: its header record counts {identities} identities, but the images have {distinct} different "
            f"labels; was the list it was written from sorted by label? Sort it and write it again, or state "
            f"num_classes and parts in a {DESCRIPTION}"
        )


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
    """A folder of .rec files of other tools; InsightFace's ``property`` file (classes,height,width) is
    honoured."""
    found = [store.load_or_find(rec) for rec in recs]
    for rec, one in zip(recs, found, strict=True):
        _check_identities(rec, one)
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
    others: list[tuple[str, Path]] = []
    pairs = list(store.image_files(folder, others))
    left = store.left_out_text(*store.left_out(others, {name for name, _ in pairs}))
    if not pairs:
        raise MissingDataError(
            "; ".join(
                [f"{folder}: holds neither dataset.yaml, nor .rec files, nor identity folders with images", *left[:1]]
            )
        )
    if left:
        warn_once(f"{folder}: {'; '.join(left)}")
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
