"""Row vectors from files as one long matrix: memory-mapped where the format allows, never unpickled without restraint.

Understood are ``.npy``, ``.npz``, ``.safetensors`` and torch's ``.pt`` / ``.pth`` / ``.bin`` (``weights_only=True``: a
file that would have to execute something is refused). Reading is by row ranges, so memory stays at the size of a range.
"""

import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from trainer import tensor_files
from trainer.data.store import load_array
from trainer.errors import CenterBankError, DataError
from trainer.head.float8 import decode
from trainer.reading import other_framework, regular, why_unreadable

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


class Rows:
    """Matrices of one width, one below the other: N rows of dimension D that are read by range or by index."""

    def __init__(self, parts: Sequence[Tensor], names: Sequence[str], scales: Sequence[Tensor] | None = None) -> None:
        """Take ``parts``, each (n, D) of a floating dtype (mapped or not); ``names`` say in errors where each came
        from. With ``scales``, (n, 1) each, the parts are codes of :mod:`trainer.head.float8`.

        Raises:
            CenterBankError: no part, a part that is no matrix of floating numbers, or parts of different widths.
        """
        self._scales = None if scales is None else list(scales)
        for part, name in zip(parts, names, strict=True):
            if part.ndim != 2 or not (part.is_floating_point() or scales is not None) or 0 in part.shape:
                raise CenterBankError(f"{name}: a {part.dtype} array of shape {tuple(part.shape)}, not rows of vectors")
            if part.shape[1] != parts[0].shape[1]:
                raise CenterBankError(f"{name}: dimension {part.shape[1]}, but {names[0]} has {parts[0].shape[1]}")
        if not parts:
            raise CenterBankError("no file with row vectors was given")
        self.dim = int(parts[0].shape[1])
        self._parts, self._names = list(parts), list(names)
        self._starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) as float32 (n, D), a copy unless they lie in one float32 part."""
        pieces = []
        for number, (part, first) in enumerate(zip(self._parts, self._starts, strict=False)):
            low, high = max(start - int(first), 0), min(stop - int(first), len(part))
            if low < high:
                pieces.append(self._floats(number, slice(low, high)))
        return torch.cat(pieces) if len(pieces) != 1 else pieces[0].contiguous()

    def take(self, index: np.ndarray) -> Tensor:
        """The rows of an int64 index (n,) in its order, as float32 (n, D)."""
        if len(self._parts) == 1:
            return self._floats(0, torch.from_numpy(index))
        out = torch.empty(len(index), self.dim)
        owner = np.searchsorted(self._starts, index, side="right") - 1
        for number in np.unique(owner):
            here = np.flatnonzero(owner == number)
            local = torch.from_numpy(index[here] - self._starts[number])
            out[torch.from_numpy(here)] = self._floats(int(number), local)
        return out

    def _floats(self, number: int, at: slice | Tensor) -> Tensor:
        """Some rows of a part in float32."""
        piece = self._parts[number][at]
        if self._scales is not None:
            return decode(piece, self._scales[number][at])
        aligned = piece.data_ptr() % piece.element_size() == 0  # a mapped file may begin anywhere
        return (piece if aligned else piece.clone()).to(torch.float32)

    def name_of(self, row: int) -> str:
        """``file, row k`` for errors."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return f"{self._names[number]}, row {row - int(self._starts[number])}"


def open_rows(paths: Sequence[str | Path], key: str | None = None) -> Rows:
    """Open files of row vectors (embeddings, centres) as one matrix, in the order given.

    Args:
        paths: .npy, .npz, .safetensors or .pt files.
        key: the array's name inside the files; needed where a file holds more than one matrix.

    Raises:
        CenterBankError: a file is missing, unreadable, or it is not clear which array is meant.
    """
    parts = []
    for path in map(Path, paths):
        arrays = {name: array for name, array in open_arrays(path).items() if array.ndim == 2}
        if key is not None:
            if key not in arrays:
                raise CenterBankError(f"{path}: has no matrix {key!r}; it has {', '.join(arrays) or 'none'}")
            parts.append(arrays[key])
        elif len(arrays) == 1:
            parts.append(next(iter(arrays.values())))
        else:
            raise CenterBankError(f"{path}: give the name of one of its {len(arrays)} matrices: {', '.join(arrays)}")
    return Rows(parts, [str(path) for path in paths])


def open_arrays(path: str | Path) -> dict[str, Tensor]:
    """The arrays of a file by name, mapped into memory where the format allows. A .npy file's array has the name
    ``array``.

    Nested dictionaries of a .pt file are flattened with dots.

    Raises:
        CenterBankError: missing, damaged, of an unknown kind, or a pickle that wants more than tensors and plain
        values.
    """
    path = regular(path, CenterBankError)
    try:
        if path.suffix == ".npy":
            return {"array": _from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))}
        if path.suffix == ".npz":
            return _npz_arrays(path)
        if path.suffix == ".safetensors":
            return _safetensors_arrays(path)
        if path.suffix in TORCH_SUFFIXES:
            return _flatten(load_torch(path))
    except CenterBankError:
        raise
    except Exception as error:  # numpy, zipfile and safetensors fail as variously as files can be damaged
        reason = why_unreadable(path) or f"cannot be read: {' '.join(str(error).split()) or type(error).__name__}"
        raise CenterBankError(f"{path}: {reason}") from None
    known = ".npy, .npz, .safetensors, " + ", ".join(TORCH_SUFFIXES)
    kind = other_framework(path) or "unknown kind of file"
    raise CenterBankError(f"{path}: {kind}; known are {known}")


def load_torch(path: Path) -> Any:
    """See :func:`trainer.tensor_files.load_torch`. Raises :class:`CenterBankError`."""
    return tensor_files.load_torch(path, CenterBankError)


def read_labels(path: str | Path, what: str = "labels") -> np.ndarray:
    """Labels (N,) int64 from a .npy file, memory-mapped. Raises :class:`CenterBankError`, which says ``what`` they
    are."""
    try:
        return load_array(Path(path), 1, None).astype(np.int64, copy=False)
    except DataError as error:
        raise CenterBankError(f"{error}; needed are {what}") from None


def _from_numpy(array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "fiu":
        raise ValueError(f"an array of {array.dtype}, not of numbers")
    if not array.dtype.isnative or not array.flags.c_contiguous:
        array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    return torch.from_numpy(array)


def _npz_arrays(path: Path) -> dict[str, Tensor]:
    """Members stored without compression are mapped in place; compressed ones through an unpacked temporary copy."""
    out = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.filename.endswith(".npy"):
                continue
            with tempfile.NamedTemporaryFile(suffix=".npy", dir=path.parent) as copy, archive.open(member) as source:
                if member.compress_type == zipfile.ZIP_STORED:
                    array = _mapped_member(path, member)
                else:
                    shutil.copyfileobj(source, copy, 2**22)
                    copy.flush()
                    array = np.load(copy.name, mmap_mode="c", allow_pickle=False)
            out[member.filename.removesuffix(".npy")] = _from_numpy(array)
    return out


def _mapped_member(path: Path, member: zipfile.ZipInfo) -> np.ndarray:
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)
        name_bytes, extra_bytes = np.frombuffer(file.read(4), "<u2").tolist()
        file.seek(member.header_offset + 30 + name_bytes + extra_bytes)
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
        if dtype.hasobject:
            raise ValueError(f"{member.filename} holds Python objects")
        return np.memmap(path, dtype, "c", file.tell(), shape, "F" if fortran else "C")


def _safetensors_arrays(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)


def _flatten(tree: Any, prefix: str = "") -> dict[str, Tensor]:
    if isinstance(tree, Tensor):
        return {prefix or "array": tree}
    if not isinstance(tree, dict):
        return {}
    flat: dict[str, Tensor] = {}
    for key, value in tree.items():
        flat.update(_flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat
