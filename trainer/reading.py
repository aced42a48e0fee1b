"""Files that others made, read so that nothing in them can do more than be refused in one line.

Every path that a user gives, and every file inside what a user gives, is opened here or checked by :func:`regular`
first: a pipe or a device would be waited for, or read, without end. JSON, YAML and .npy end in an error of the caller's
type, whatever their parsers make of what they hold.
"""

import json
import os
import re
import stat
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import yaml
from numpy.typing import NDArray

from trainer.errors import ConfigError, LceError

MOST_BYTES = 1 << 28
"""Of a text that is read whole."""
MOST_LEVELS = 100
"""Of lists and mappings inside each other."""
MOST_VALUES = 10_000_000
"""With what YAML repeats by reference counted each time."""
_LARGEST_FILE = 1 << 50  # what announces more was not cut but made so
_MAGIC = {".npy": (b"\x93NUMPY", "array of numpy"), ".npz": (b"PK", "archive of numpy arrays")}
"""How files of some suffixes begin, and what they are."""
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def regular(path: str | Path, error_type: type[LceError]) -> Path:
    """``path``, when it is a regular file. Raises: it is missing, a folder, a pipe or a device."""
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError:
        raise error_type(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise error_type(f"{path}: cannot be read: {_line(error)}") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or socket" if not stat.S_ISCHR(mode) else "a device"
        raise error_type(f"{path}: is {kind}, not a file")
    return Path(path)


def open_regular(path: str | Path, error_type: type[LceError]) -> BinaryIO:
    """Open a regular file for reading bytes. Raises: as :func:`regular`, or it may not be read."""
    regular(path, error_type)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # it may have been exchanged meanwhile
    except OSError as error:
        raise error_type(f"{path}: cannot be read: {_line(error)}") from None
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise error_type(f"{path}: is not a file")
    return file


def read_bytes(path: str | Path, error_type: type[LceError], most_bytes: int = MOST_BYTES) -> bytes:
    """A regular file's bytes. Raises: as :func:`open_regular`, or it is larger than ``most_bytes``."""
    with open_regular(path, error_type) as file:
        if os.fstat(file.fileno()).st_size > most_bytes:
            raise error_type(f"{path}: is larger than the {most_bytes} bytes that are read of such a file")
        try:
            return file.read(most_bytes)
        except OSError as error:
            raise error_type(f"{path}: cannot be read: {_line(error)}") from None


def read_text(path: str | Path, error_type: type[LceError], encoding: str = "utf-8") -> str:
    """A regular file's text, line ends as \\n. Raises: as :func:`read_bytes`, or it is not of that encoding."""
    try:
        text = read_bytes(path, error_type).decode(encoding)
    except UnicodeDecodeError as error:
        raise error_type(f"{path}: is no {encoding.upper()} text: byte {error.start} is none of it") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str | Path, error_type: type[LceError]) -> Any:
    """What a JSON file holds. Raises: as :func:`parse_json`."""
    return parse_json(read_bytes(path, error_type), str(path), error_type)


def parse_json(data: str | bytes, name: str, error_type: type[LceError]) -> Any:
    """What a JSON text holds.

    Raises:
        LceError: of ``error_type``, with ``name``: no JSON, numbers of thousands of digits, more than
            :data:`MOST_LEVELS` levels, characters that are none (lone surrogates; those that stand for the bytes of a
            file's name are let through).
    """
    raw = data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass")
    try:
        tree = json.loads(raw)
        _check_size(tree)
        if _SURROGATE.search(raw):
            json.dumps(tree, ensure_ascii=False).encode("utf-8", "surrogateescape")
    except Exception as error:
        raise error_type(f"{name}: is no readable JSON: {_line(error)}") from None
    return tree


class _Loader(yaml.SafeLoader):
    """Refuses a key that a mapping gives twice, of which PyYAML silently drops the first."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set[tuple[str, str]]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.YAMLError(f"line {key.start_mark.line + 1}: {key.value} is given twice; keep one")
                seen.add((key.tag, key.value))
        return node


def read_yaml(path: str | Path, error_type: type[LceError]) -> Any:
    """What a YAML file holds. Raises: as :func:`parse_yaml`."""
    return parse_yaml(read_text(path, error_type), str(path), error_type)


def parse_yaml(text: str, name: str, error_type: type[LceError]) -> Any:
    """What a YAML text holds, plain values only.

    Raises:
        LceError: of ``error_type``, with ``name``: no YAML, values that cannot be (dates, numbers), more than
            :data:`MOST_LEVELS` levels, references to what they are part of, or that multiply without bound.
    """
    try:
        tree = yaml.load(text, _Loader)
        _check_size(tree)
    except Exception as error:
        raise error_type(f"{name}: is no readable YAML: {_line(error)}") from None
    return tree


_POINTER = b"version https://git-lfs"
_WEB_PAGE = re.compile(rb"\s*<(!doctype html|html|head)", re.IGNORECASE)


def is_pointer(data: bytes) -> bool:
    """Whether these bytes stand for a file that Git LFS keeps elsewhere."""
    return data.startswith(_POINTER)


_OTHERS = {
    (".pdparams", ".pdmodel", ".pdiparams"): (
        "a file of Paddle: paddle.onnx.export writes its network as ONNX, numpy.save the classifier that paddle.load "
        "gives with return_numpy=True"
    ),
    (".params",): "a file of MXNet: mxnet.onnx.export_model writes the network as ONNX",
    (".h5", ".keras", ".pb", ".tflite"): "a file of TensorFlow: tf2onnx writes the network as ONNX",
    (".json",): "no ONNX file; `lce model convert` makes one of a TensorFlow.js graph model",
    (".caffemodel", ".prototxt"): "a file of Caffe: export the network to ONNX",
    (".dat",): "no file that is read; with dlib's network embed the images there and give the embeddings",
}


def other_framework(path: str | Path) -> str | None:
    """What a file of another framework is, by its name, and how what it holds is brought here. None: of none known."""
    suffix = Path(path).suffix.lower()
    return next((text for suffixes, text in _OTHERS.items() if suffix in suffixes), None)


def why_unreadable(path: str | Path) -> str | None:
    """What the matter is with a file that its reader does not take, as far as its first and last bytes show: a Git LFS
    pointer, a web page, nothing, or the beginning of a longer file. None: they do not."""
    try:
        with Path(path).open("rb") as file:
            begin, size = file.read(1024), os.fstat(file.fileno()).st_size
            file.seek(max(0, size - 4))
            end = file.read(4)
    except OSError:
        return None
    if not size:
        return "is empty"
    if is_pointer(begin):
        return "is a Git LFS pointer, not the file itself; run `git lfs pull` where it was cloned"
    if _WEB_PAGE.match(begin):
        return "is a web page: a download gave that and not the file"
    magic, kind = _MAGIC.get(Path(path).suffix, (b"", ""))
    if not begin.startswith(magic[: len(begin)]):
        return f"is no {kind}: it does not begin as one"
    if Path(path).suffix == ".safetensors" and len(begin) > 8 and begin[8:9] != b"{":
        return "is no safetensors file: it does not begin as one"
    cut = f"is cut short or damaged ({size:,} bytes, without the end that such a file has); copy it again"
    if begin.startswith(b"PK\x03\x04"):
        return None if zipfile.is_zipfile(path) else cut
    if begin.startswith(b"PAR1"):
        return None if end == b"PAR1" and size > 8 else cut
    wanted = _announced(path, begin)
    if wanted is None or not size < wanted < _LARGEST_FILE:
        return None
    return f"is cut short ({size:,} of {wanted:,} bytes); copy it again"


def _announced(path: str | Path, begin: bytes) -> int | None:
    """The size that a .npy or .safetensors file says it has; None: it does not."""
    with Path(path).open("rb") as file:
        try:
            if begin.startswith(b"\x93NUMPY"):
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
                return file.tell() + int(np.prod(shape, dtype=object)) * dtype.itemsize
            length = int.from_bytes(begin[:8], "little")
            if Path(path).suffix != ".safetensors" or length > MOST_BYTES:
                return None
            file.seek(8)
            header = file.read(length)
            if len(header) < length:
                return 8 + length
            tree = json.loads(header)
            return 8 + length + max(tree[n]["data_offsets"][1] for n in tree if n != "__metadata__")
        except Exception:  # no such header
            return None


def read_array(path: str | Path, error_type: type[LceError]) -> NDArray[Any]:
    """The array of a .npy file, memory-mapped read-only. Raises: it is none, is cut short, or would unpickle."""
    regular(path, error_type)
    try:
        with np.errstate(all="ignore"):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy parses the header as Python does, and fails as variously
        with Path(path).open("rb") as file:
            numpys = file.read(6) == b"\x93NUMPY"
        other = f"is no readable .npy file: {_line(error)}" if numpys else "is no .npy file"
        raise error_type(f"{path}: {why_unreadable(path) or other}") from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise error_type(f"{path}: is no .npy file but an archive of arrays")
    return array


def _check_size(tree: Any) -> None:
    """Raises :class:`ValueError`: nested too deeply, within itself, or too large when it is written out."""
    sizes: dict[int, int] = {}

    def count(node: Any, level: int) -> int:
        if not isinstance(node, dict | list | tuple | set):
            return 1
        if level > MOST_LEVELS:
            raise ValueError(f"more than {MOST_LEVELS} levels of lists and mappings inside each other")
        known = sizes.get(id(node))
        if known is None:
            children = node.values() if isinstance(node, dict) else node
            known = 1 + sum(count(child, level + 1) for child in children)
            sizes[id(node)] = known
        if known > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES} values, with those that are repeated by reference")
        return known

    count(tree, 1)


def _line(error: BaseException) -> str:
    """The reason in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, RecursionError):
        return "too many levels of lists and mappings inside each other"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    text = " ".join(str(error).split())
    return (text if len(text) <= 300 else f"{text[:297]}…") or type(error).__name__


def as_path(value: object, argument: str, what: str = "a path") -> Path:
    """An argument that names a file or folder. Raises :class:`ConfigError`: empty, or neither a text nor a path."""
    if not isinstance(value, str | os.PathLike) or not (text := os.fspath(value)) or not isinstance(text, str):
        raise wrong_argument(argument, value, what)
    return Path(text)


def wrong_argument(argument: str, value: object, expected: str) -> ConfigError:
    """The error for an argument of another type, in one line."""
    shown = " ".join(repr(value).split())
    shown = shown if len(shown) <= 60 else f"of type {type(value).__name__}"
    return ConfigError(f"`{argument}` {shown}: expected {expected}")
