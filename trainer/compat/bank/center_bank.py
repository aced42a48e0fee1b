"""The centre bank: what training needs to know of the old model, one row per class of the new training set.

A bank is a folder::

    bank.json                    counts, dimension, how it was made, of every file its size and CRC-32, and a
                                 checksum of itself
    classes.safetensors          boundaries (C,) float32 · counts (C,) int64 · mask (C,) bool · class_ids (C,) int64
                                 and, where centres are int8, their scales (C,) float32
    centers-00000.safetensors …  centers (n, D1) float32, bfloat16 or int8

It is written under another name and renamed when complete. It is read by ranges of rows, so that every rank of any
world size reads its own classes only; a shard's checksum is verified when its first row is read (a file lost to a
power cut is noticed).
"""

import json
import zlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

import pydantic
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer import __version__
from trainer.data.index import Dataset, renumbered
from trainer.errors import CenterBankError
from trainer.files import checksum, partial_of, remove, replace_folder
from trainer.owner import owned
from trainer.reading import read_json
from trainer.seals import sealed, unsealed
from trainer.tensor_files import TensorStream, save_tensors

SHARD_BYTES = 64 * 2**20
NORM_TOLERANCE = 1e-3

Storage = Literal["float32", "bfloat16", "int8"]
_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


class BankInfo(pydantic.BaseModel):
    """How a bank was made; words for people and hashes for checks."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    made_from: str = pydantic.Field(default="", description="classifier, embeddings or model")
    source: str = pydantic.Field(default="", description="the file or folder that the centres came from")
    model: str | None = pydantic.Field(default=None, description="the old model's name or path")
    model_hash: str | None = None
    dataset: str | None = None
    dataset_fingerprint: str | None = None
    numbering: str | None = pydantic.Field(
        default=None, description="which identity each class is, where known: trainer.data.index.Dataset.numbering"
    )
    boundary: str = pydantic.Field(default="none", description="the rule of the boundaries, in words")
    version: str = pydantic.Field(default=__version__, description="the lce-trainer that wrote it")


class _FileInfo(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    file: str
    start: int = pydantic.Field(ge=0)
    stop: int = pydantic.Field(ge=0)
    size_bytes: int = pydantic.Field(ge=0)
    crc32: int = pydantic.Field(ge=0)


class _Manifest(pydantic.BaseModel):
    """bank.json."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    format: Literal["lce-center-bank"]
    format_version: Literal[1]
    num_classes: int = pydantic.Field(ge=1)
    dim: int = pydantic.Field(ge=1)
    storage: Storage
    largest_error: float = pydantic.Field(ge=0, description="largest 1 − cos between a given and a stored centre")
    info: BankInfo
    classes: _FileInfo
    centers: list[_FileInfo]


@dataclass(frozen=True)
class BankRows:
    """The old model's knowledge of the classes [start, stop), c of them.

    Attributes:
        centers: (c, D1) float32, unit; zeros where masked.
        boundaries: (c,) float32, the cosine b_j; −1 restrains nothing.
        mask: (c,) bool, whether the class has a centre at all.
        counts: (c,) int64, the images behind the centre; 0 when unknown.
        class_ids: (c,) int64, the class's number in the old model's own numbering; −1 for none.
    """

    centers: Tensor
    boundaries: Tensor
    mask: Tensor
    counts: Tensor
    class_ids: Tensor


def encode_centers(centers: Tensor, storage: Storage) -> tuple[Tensor, Tensor | None]:
    """Unit rows (n, D1) float32 → what is stored, and for int8 the scales (n,): per row x ≈ q · scale, |q| ≤ 127."""
    if storage != "int8":
        return centers.to(_DTYPES[storage]), None
    scales = centers.abs().amax(1).clamp_min(1e-12) / 127
    return (centers / scales[:, None]).round().to(torch.int8), scales


def decode_centers(stored: Tensor, scales: Tensor | None) -> Tensor:
    """The inverse of :func:`encode_centers`: (n, D1) float32; rows stored with loss are made unit again, zeros stay."""
    if stored.dtype == torch.float32:
        return stored
    centers = stored.float()
    if scales is not None:
        centers = centers * scales[:, None]
    return centers / centers.norm(dim=1, keepdim=True).clamp_min(1e-12)


class CenterBank:
    """A bank on disk, opened for reading. Use :meth:`open`."""

    def __init__(self, folder: Path, manifest: _Manifest) -> None:
        self.folder = folder
        self.num_classes = manifest.num_classes
        self.dim = manifest.dim
        self.storage: Storage = manifest.storage
        self.largest_error = manifest.largest_error
        self.info = manifest.info
        self._manifest = manifest
        self._verified: set[str] = set()

    @staticmethod
    def open(path: str | Path) -> "CenterBank":
        """Open a bank; check its description, its files' sizes and shapes, and the per-class file's checksum.

        Raises:
            CenterBankError: no bank, another format, a missing, truncated or damaged file; it is named with the reason.
        """
        folder = Path(path)
        bank = CenterBank(folder, _read_manifest(folder))
        for part in (bank._manifest.classes, *bank._manifest.centers):
            bank._check_file(part)
        bank._verify(bank._manifest.classes)
        return bank

    def check_classes(self, num_classes: int, dataset: Dataset | None, key: str) -> None:
        """Refuse a bank whose classes are not those of a training run's data.

        Args:
            num_classes: of the training. dataset: its data; None for synthetic data. key: of the configuration.

        Raises:
            CenterBankError: another class count, or (where both are known) another identity behind a class number.
        """
        if self.num_classes != num_classes:
            raise CenterBankError(
                f"{key} = {self.folder}: {self.num_classes} classes, the data set has {num_classes}; "
                "make the bank from this data set (lce centers)"
            )
        if dataset is None or not self.info.numbering or self.info.dataset_fingerprint == dataset.fingerprint:
            return
        if renumbered(self.info.numbering, dataset.numbering):
            raise CenterBankError(
                f"{key} = {self.folder}: made for {self.info.dataset}, whose classes are other identities than those "
                f"of {dataset.named}; make the bank from this data set (lce centers) with the same label table"
            )

    @property
    def fingerprint(self) -> str:
        """A short hash of the whole bank: of its description, which holds the checksum of every file."""
        try:
            text = self._manifest.model_dump_json()
        except ValueError:  # a file name whose bytes are no UTF-8
            text = json.dumps(self._manifest.model_dump(mode="json"))
        return f"{zlib.crc32(text.encode()):08x}"

    def rows(self, start: int, stop: int) -> BankRows:
        """The classes [start, stop), copied out of the mapped files.

        Raises:
            ValueError: the range is not inside [0, num_classes].
            CenterBankError: a shard that holds some of the rows is damaged.
        """
        if not 0 <= start <= stop <= self.num_classes:
            raise ValueError(f"rows [{start}, {stop}) of a bank of {self.num_classes} classes")
        parts = [
            self._slice(part, max(start, part.start) - part.start, min(stop, part.stop) - part.start)["centers"]
            for part in self._manifest.centers
            if part.start < stop and start < part.stop
        ]
        stored = torch.cat(parts) if len(parts) > 1 else parts[0] if parts else torch.empty(0, self.dim)
        per_class = self.per_class(start, stop)
        return BankRows(
            decode_centers(stored, per_class.get("scales")),
            per_class["boundaries"],
            per_class["mask"],
            per_class["counts"],
            per_class["class_ids"],
        )

    def per_class(self, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """``boundaries``, ``class_ids``, ``counts``, ``mask`` (and ``scales``) of the classes [start, stop), no
        centres."""
        return self._slice(self._manifest.classes, start, self.num_classes if stop is None else stop)

    def verify(self) -> None:
        """Read every byte once and compare all checksums. Raises :class:`CenterBankError`."""
        for part in (self._manifest.classes, *self._manifest.centers):
            self._verify(part)

    def _slice(self, part: _FileInfo, start: int, stop: int) -> dict[str, Tensor]:
        self._verify(part)
        with safe_open(self.folder / part.file, framework="pt") as file:
            return {name: file.get_slice(name)[start:stop] for name in file.keys()}  # noqa: SIM118  (no mapping)

    def _verify(self, part: _FileInfo) -> None:
        if part.file in self._verified:
            return
        if checksum(self.folder / part.file)[1] != part.crc32:
            raise CenterBankError(f"{self.folder / part.file}: damaged (its checksum differs); make the bank again")
        self._verified.add(part.file)

    def _check_file(self, part: _FileInfo) -> None:
        path = self.folder / part.file
        if not path.is_file():
            raise CenterBankError(f"{path}: missing; copy the whole bank folder or make the bank again")
        if path.stat().st_size != part.size_bytes:
            raise CenterBankError(
                f"{path}: {path.stat().st_size} bytes instead of {part.size_bytes} (truncated?); make the bank again"
            )
        rows = part.stop - part.start
        expected = _expected_shapes(part is self._manifest.classes, self.storage, rows, self.dim)
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  (no mapping)
        except SafetensorError as error:
            raise CenterBankError(f"{path}: no readable safetensors file ({error}); make the bank again") from None
        if found != expected:
            raise CenterBankError(f"{path}: holds {found}, bank.json says {expected}; make the bank again")


def _expected_shapes(per_class: bool, storage: Storage, rows: int, dim: int) -> dict[str, list[int]]:
    if not per_class:
        return {"centers": [rows, dim]}
    names = ["boundaries", "class_ids", "counts", "mask", *(["scales"] if storage == "int8" else [])]
    return {name: [rows] for name in names}


def _read_manifest(folder: Path) -> _Manifest:
    path = folder / "bank.json"
    if not path.is_file():
        found = "bank.json is missing" if folder.is_dir() else "a file; a bank is a folder" if folder.exists() else ""
        reason = f"no centre bank ({found})" if found else "no such folder"
        raise CenterBankError(f"{folder}: {reason}; make one with `lce centers`")
    try:
        tree = unsealed(read_json(path, CenterBankError), path, CenterBankError, "centre bank")
        manifest = _Manifest.model_validate(tree)
    except CenterBankError as error:
        raise CenterBankError(f"{error}: no description of a centre bank; make the bank again") from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise CenterBankError(f"{path}: no description of a centre bank ({reason}); make the bank again") from None
    parts = manifest.centers
    ends = [0, *(part.stop for part in parts)]
    contiguous = all(part.start == end < part.stop for part, end in zip(parts, ends, strict=False))
    whole = (manifest.classes.start, manifest.classes.stop) == (0, manifest.num_classes)
    if not contiguous or ends[-1] != manifest.num_classes or not whole:
        raise CenterBankError(f"{path}: its files do not cover the {manifest.num_classes} classes; make the bank again")
    if any(Path(part.file).name != part.file for part in (manifest.classes, *parts)):
        raise CenterBankError(f"{path}: names a file outside the bank's folder")
    return manifest


class BankWriter:
    """Write a bank piece by piece: centres in class order, then :meth:`finish`.

    A context manager: what is unfinished at its end is removed. Memory: what is appended, and some numbers per class.

    Raises:
        CenterBankError: another process owns the target (it is named), it exists and ``overwrite`` is False, or its
            parent folder cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        num_classes: int,
        dim: int,
        info: BankInfo,
        *,
        storage: Storage = "float32",
        overwrite: bool = False,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.path = Path(path)
        self.num_classes, self.dim, self.info, self.storage = num_classes, dim, info, storage
        if num_classes < 1 or dim < 1:
            raise CenterBankError(f"{self.path}: a bank needs at least one class and one dimension")
        self._overwrite, self._own = overwrite, ExitStack()
        self._partial: Path  # from __enter__ on
        self._rows_per_shard = max(1, shard_bytes // (dim * _DTYPES[storage].itemsize))
        self._parts: list[_FileInfo] = []
        self._stream: TensorStream | None = None
        self._scales = torch.zeros(num_classes if storage == "int8" else 0)
        self.rows_written = 0
        self._largest_error = 0.0

    def __enter__(self) -> "BankWriter":
        self._own.enter_context(owned(self.path, CenterBankError))
        try:
            self._begin()
        except BaseException:
            self._own.close()
            raise
        return self

    def _begin(self) -> None:
        if self.path.exists() and not self._overwrite:
            raise CenterBankError(
                f"{self.path}: exists already; remove it or choose another place (`force` replaces it)"
            )
        is_bank = (self.path / "bank.json").is_file()
        if self.path.is_file() or (self.path.is_dir() and any(self.path.iterdir()) and not is_bank):
            raise CenterBankError(f"{self.path}: exists and is no centre bank; nothing was replaced")
        self._partial = partial_of(self.path)
        try:
            self._partial.mkdir(parents=True)
        except OSError as error:
            raise CenterBankError(f"{self.path}: cannot be written here: {error.strerror}") from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()
        remove(self._partial)
        self._own.close()

    def append(self, centers: Tensor) -> None:
        """Add the next classes' centres: (n, D1) float32, unit rows, or zero rows for classes without a centre.

        Raises:
            CenterBankError: another dimension, too many rows, or a row neither unit nor zero (its class is named).
        """
        first = self.rows_written
        if centers.ndim != 2 or centers.shape[1] != self.dim or first + len(centers) > self.num_classes:
            raise CenterBankError(
                f"{self.path}: centres of shape {tuple(centers.shape)} at class {first} do not fit a bank of "
                f"{self.num_classes} × {self.dim}"
            )
        centers = centers.to(torch.float32)
        norms = torch.linalg.vector_norm(centers, dim=1)
        wrong = ~(((norms - 1).abs() < NORM_TOLERANCE) | (norms == 0))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise CenterBankError(
                f"{self.path}: the centre of class {first + row} is not unit (norm {float(norms[row]):g})"
            )
        stored, scales = encode_centers(centers, self.storage)
        if self.storage != "float32" and len(centers):
            error = (decode_centers(stored, scales) - centers).square().sum(1).amax() / 2
            self._largest_error = max(self._largest_error, float(error))
        if scales is not None:
            self._scales[first : first + len(scales)] = scales
        try:
            self._write(stored)
        except OSError as problem:
            raise CenterBankError(f"{self.path}: cannot be written: {problem.strerror}") from None

    def finish(self, boundaries: Tensor, counts: Tensor, mask: Tensor, class_ids: Tensor | None = None) -> None:
        """Write the per-class values, each (C,), and put the bank in its place.

        Args:
            boundaries: cosines in [−1, 1], float32. counts: int64 ≥ 0. mask: bool. class_ids: int64, default 0 … C − 1.

        Raises:
            CenterBankError: rows are missing, or a value has the wrong shape or is out of range.
        """
        if self.rows_written != self.num_classes:
            raise CenterBankError(f"{self.path}: {self.rows_written} centres were given for {self.num_classes} classes")
        ids = torch.where(mask, torch.arange(self.num_classes), -1) if class_ids is None else class_ids
        per_class = {
            "boundaries": boundaries.to(torch.float32).contiguous(),
            "class_ids": ids.to(torch.int64).contiguous(),
            "counts": counts.to(torch.int64).contiguous(),
            "mask": mask.to(torch.bool).contiguous(),
        }
        if self.storage == "int8":
            per_class["scales"] = self._scales
        for name, value in per_class.items():
            if value.shape != (self.num_classes,):
                raise CenterBankError(
                    f"{self.path}: {name} has shape {tuple(value.shape)}, needed ({self.num_classes},)"
                )
        if not bool((per_class["boundaries"].abs() <= 1 + 1e-5).all()):
            raise CenterBankError(f"{self.path}: boundaries are cosines, some are outside [−1, 1] or not a number")
        path = self._partial / "classes.safetensors"
        try:
            save_tensors(per_class, path)
        except (OSError, SafetensorError) as error:
            raise CenterBankError(f"{self.path}: cannot be written: {error}") from None
        size, crc32 = checksum(path)
        classes = _FileInfo(file=path.name, start=0, stop=self.num_classes, size_bytes=size, crc32=crc32)
        manifest = _Manifest(
            format="lce-center-bank",
            format_version=1,
            num_classes=self.num_classes,
            dim=self.dim,
            storage=self.storage,
            largest_error=self._largest_error,
            info=self.info,
            classes=classes,
            centers=self._parts,
        )
        text = json.dumps(sealed(manifest.model_dump(mode="json")), indent=2)
        try:
            (self._partial / "bank.json").write_text(text + "\n", encoding="utf-8")
            replace_folder(self._partial, self.path)
        except OSError as problem:
            raise CenterBankError(f"{self.path}: cannot be written: {problem.strerror}") from None

    def _write(self, stored: Tensor) -> None:
        """Append rows to the present shard, and begin the next where it is full."""
        while len(stored):
            name = f"centers-{len(self._parts):05d}.safetensors"
            if self._stream is None:
                rows = min(self._rows_per_shard, self.num_classes - self.rows_written)
                self._stream = TensorStream(self._partial / name, "centers", stored.dtype, rows, self.dim)
            stream = self._stream
            block, stored = stored[: stream.rows_left], stored[stream.rows_left :]
            stream.write(block)
            self.rows_written += len(block)
            if stream.rows_left == 0:
                stream.close()
                self._stream = None
                start, stop = self._parts[-1].stop if self._parts else 0, self.rows_written
                size, crc32 = stream.size_bytes, stream.crc32
                self._parts.append(_FileInfo(file=name, start=start, stop=stop, size_bytes=size, crc32=crc32))
