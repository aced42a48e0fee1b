"""Files of tensors: safetensors, and what ``torch.save`` wrote, read without running anything of it."""

import json
import re
import tarfile
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from trainer.errors import LceError
from trainer.reading import other_framework, why_unreadable

_SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8"}


class TensorStream:
    """A safetensors file of one matrix, written from the first row to the last in blocks; memory is one block.

    The file's CRC-32 is kept while writing, so that it need not be read again.

    Args:
        path: the file. name: of the tensor. dtype, rows, dim: what it will hold.
    """

    def __init__(self, path: Path, name: str, dtype: torch.dtype, rows: int, dim: int) -> None:
        self.dtype, self.rows_left = dtype, rows
        length = rows * dim * dtype.itemsize
        entry = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": [rows, dim], "data_offsets": [0, length]}
        header = json.dumps({name: entry}).encode()
        header += b" " * (-len(header) % 8)
        self._file = path.open("wb", buffering=0)
        self.crc32, self.size_bytes = 0, 0
        self._put(len(header).to_bytes(8, "little") + header)

    def write(self, rows: Tensor) -> None:
        """Append rows (n, dim) of the dtype."""
        self.rows_left -= len(rows)
        self._put(rows.contiguous().view(torch.uint8).flatten().numpy().data)

    def _put(self, data: bytes | memoryview) -> None:
        self.crc32 = zlib.crc32(data, self.crc32)
        self.size_bytes += len(data)
        while data:
            data = data[self._file.write(data) :]

    def close(self) -> None:
        """Close the file; it is whole when ``rows_left`` is 0."""
        self._file.close()


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the permissions of any new file (the library alone makes it private to its
    owner)."""
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path)
    path.chmod(mode)


class _Inert:
    """Stands for an object of a class that a file names next to its tensors (a trainer's settings, a callback): nothing
    of that class is imported or run, and the object is empty."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def load_torch(path: Path, error_type: type[LceError]) -> Any:
    """What ``torch.save`` wrote, on the CPU, mapped where the format allows; read with ``weights_only=True``: tensors
    and plain containers.

    Objects of other classes next to them become empty stand-ins, so that the checkpoints of other trainers can be read
    without running anything of what they name.

    Raises:
        LceError: of ``error_type``: missing, or nothing that can be read so.
    """
    try:
        others = get_unsafe_globals_in_checkpoint(path)
    except Exception:
        others = []  # no zip archive: files of torch < 1.6
    stand_ins = [(type(name.rpartition(".")[2], (_Inert,), {}), name) for name in others]
    try:
        with safe_globals(stand_ins), warnings.catch_warnings():  # type: ignore[arg-type]
            warnings.simplefilter("ignore")  # of TorchScript archives, which are refused next
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # not a zip archive, which cannot be mapped
                return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if shown := why_unreadable(path):
            raise error_type(f"{path}: {shown}") from None
        if _is_foreign(path):
            kind = other_framework(path) or "is no file of PyTorch: it does not begin as one"
            raise error_type(f"{path}: {kind}; known are PyTorch's files and .safetensors") from None
        if "TorchScript archive" in str(error):
            raise error_type(
                f"{path}: a TorchScript archive, which is a program and is not run; export the network to ONNX, or "
                "save its weights alone (a state dict, or .safetensors)"
            ) from None
        reason = _reason(error)
        raise error_type(
            f"{path}: refused: it is no file of plain tensors ({reason}); nothing of it was executed. "
            "Save the weights alone (a state dict, or .safetensors) and try again"
        ) from None


def _is_foreign(path: Path) -> bool:
    """Whether a file begins as none of torch's do: zip archives, pickles, and (before 0.1.10) tar archives."""
    try:
        with path.open("rb") as file:
            begin = file.read(2)
        return not begin.startswith((b"PK", b"\x80")) and not tarfile.is_tarfile(path)
    except OSError:
        return False


def _reason(error: Exception) -> str:
    """The line of torch's message that says what is the matter."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    wanted = [line for line in lines if re.search(r"GLOBAL|global|TorchScript|Unsupported|blocked", line)]
    return (wanted or lines or [type(error).__name__])[0][:200]
