"""Find the rows of an old classifier in the files that trainers leave behind.

Understood: arcface_torch's sharded head as saved per rank (``checkpoint_gpu_{rank}.pt``, key
``state_dict_softmax_fc``; older ``rank_{rank}_softmax_weight.pt``; and ``softmax_fc_gpu_{rank}.pt``, the head's state
dict alone), CVLface's (``classifier_rank{rank}.pt``, key ``partial_fc.weight``), any state dict (.pt, .safetensors) or
array (.npy, .npz) with the weight's name given or guessed, classes × dimension or dimension × classes (as MagFace saves
it), and this project's own checkpoints and runs.
"""

import io
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from trainer.checkpoint import read_index
from trainer.checkpoint_folder import SEAL, find_damage, list_checkpoints, read_seal
from trainer.compat.bank.matrices import Rows, open_arrays
from trainer.errors import CenterBankError, CheckpointError
from trainer.head.float8 import CODES, SCALE
from trainer.reading import open_regular

Layout = Literal["auto", "rows", "columns"]

_RANK_FILE = re.compile(r"^(?:(?:checkpoint|softmax_fc)_gpu_(\d+)|rank_(\d+)_softmax_weight|classifier_rank(\d+))\.pt$")
_PADDED = "partial_fc.weight"  # CVLface rounds the class count up to a multiple of the ranks
_EXACT = ("state_dict_softmax_fc.weight", _PADDED)  # of one rank's classes: arcface_torch's, CVLface's
_WHOLE = "classifier.weight"  # CVLface's head of all classes, which rank 0 alone saves
_WEIGHT_NAMES = ("weight", "kernel", "array", "fc.weight", "head.weight", "head.kernel", "classifier.weight", "rows")
_HEAD_WORDS = ("softmax_fc", "head", "fc", "classifier", "margin", "loss", "logits", "arcface", "metric")
_USUAL_DIMS = (64, 128, 192, 256, 384, 512, 768, 1024, 2048)


@dataclass(frozen=True)
class Classifier:
    """An old classifier's rows, (C_old, D1), and how they were found, in words for the user to check."""

    rows: Rows
    found: str


def open_classifier(
    paths: Sequence[str | Path],
    key: str | None = None,
    layout: Layout = "auto",
    num_classes: int | None = None,
    ranks: int | None = None,
) -> Classifier:
    """Open an old classifier.

    Args:
        paths: one file; or the files of all ranks; or one folder (of rank files, a checkpoint, or a run of this
        project).
        key: the weight's name; None: guessed, and said in ``found``.
        layout: ``rows``: classes × dimension; ``columns``: the transpose; ``auto``: by the shape.
        num_classes: C_old where it is known: settles guesses, finds a missing last rank, and drops the rows without a
            class that CVLface's ranks have at the end.
        ranks: how many there were, where it is known: a file of one rank does not say.

    Raises:
        CenterBankError: missing or refused files, a missing or repeated rank (named), no or several candidates,
        another count.
    """
    files = [Path(path) for path in paths]
    if len(files) == 1 and files[0].is_dir():
        folder = files[0]
        if (folder / SEAL).is_file() or (folder / "checkpoints").is_dir():
            return _checked(_own_checkpoint(folder), num_classes, folder)
        files = sorted(path for path in folder.glob("*.pt") if _rank_of(path) is not None)
        if not files:
            raise CenterBankError(
                f"{folder}: holds no checkpoint_gpu_*.pt, rank_*_softmax_weight.pt, classifier_rank*.pt or checkpoint"
            )
    if len(files) > 1 or (_rank_of(files[0]) is not None and _WHOLE not in open_arrays(files[0])):
        return _sharded(files, key, num_classes, ranks)
    name, weight = _find_weight(files[0], key, num_classes)
    weight, how = _oriented(weight, layout, num_classes, files[0], name)
    rows = Rows([weight], [str(files[0])])
    found = f"{files[0]}: {name!r} {how}"
    return _checked(Classifier(rows, f"{found}: {len(rows)} classes of dimension {rows.dim}"), num_classes, files[0])


def _rank_of(path: Path) -> int | None:
    """The rank that a file's name says it is of; None: no file of a rank."""
    match = _RANK_FILE.match(path.name)
    return int(match[match.lastindex]) if match and match.lastindex else None


def _checked(classifier: Classifier, num_classes: int | None, where: Path) -> Classifier:
    if num_classes is not None and len(classifier.rows) != num_classes:
        raise CenterBankError(f"{where}: has {len(classifier.rows)} classes, expected are {num_classes}")
    return classifier


def _find_weight(path: Path, key: str | None, num_classes: int | None) -> tuple[str, Tensor]:
    """The matrix called ``key``, or the only plausible one."""
    matrices = {name: array for name, array in open_arrays(path).items() if array.ndim == 2}
    if key is not None:
        if key not in matrices:
            raise CenterBankError(f"{path}: has no matrix {key!r}; it has {_listed(matrices)}")
        return key, matrices[key]
    candidates = {name: m for name, m in matrices.items() if num_classes is None or num_classes in m.shape}
    if len(candidates) > 1:
        candidates = {name: m for name, m in candidates.items() if _looks_like_head(name)} or candidates
    wanted = "" if num_classes is None else f" with {num_classes} classes"
    if not candidates:
        raise CenterBankError(f"{path}: has no matrix{wanted}; it has {_listed(matrices)}")
    if len(candidates) > 1:
        raise CenterBankError(
            f"{path}: which matrix{wanted} is the classifier? give its `key`, or a file that holds it alone; it has "
            f"{_listed(matrices)}"
        )
    return next(iter(candidates.items()))


def _looks_like_head(name: str) -> bool:
    if name.startswith(("state_dict_backbone", "state_optimizer", "optimizer")):
        return False
    named = any(name == weight or name.endswith(f".{weight}") for weight in _WEIGHT_NAMES)
    return named and ("." not in name or any(word in name.lower() for word in _HEAD_WORDS))


def _listed(matrices: dict[str, Tensor]) -> str:
    shown = [f"{name} {tuple(m.shape)}" for name, m in list(matrices.items())[:8]]
    more = f" and {len(matrices) - 8} more" if len(matrices) > 8 else ""
    return ", ".join(shown) + more if shown else "none"


def _oriented(weight: Tensor, layout: Layout, num_classes: int | None, path: Path, name: str) -> tuple[Tensor, str]:
    """The matrix as classes × dimension, and how it was read."""
    first, second = weight.shape
    if layout == "auto":
        if num_classes is not None and first != second and num_classes in (first, second):
            layout = "rows" if first == num_classes else "columns"
        elif (first in _USUAL_DIMS) != (second in _USUAL_DIMS):
            layout = "rows" if second in _USUAL_DIMS else "columns"
        elif max(first, second) >= 4 * min(first, second):
            layout = "rows" if first > second else "columns"
        else:
            raise CenterBankError(
                f"{path}: is {name} {first} × {second} classes × dimension? give `layout` or `old_classes`"
            )
    if layout == "rows":
        return weight, "read as classes × dimension"
    return weight.t(), "read as dimension × classes"


def _sharded(files: list[Path], key: str | None, num_classes: int | None, ranks: int | None) -> Classifier:
    """One file per rank: ordered by rank, complete, and with sizes that one sharded head can have."""
    by_rank: dict[int, Path] = {}
    for path in files:
        rank = _rank_of(path)
        if rank is None:
            raise CenterBankError(
                f"{path}: several files must be called checkpoint_gpu_RANK.pt, rank_RANK_softmax_weight.pt or "
                "classifier_rankRANK.pt"
            )
        if rank in by_rank:
            raise CenterBankError(f"{path}: rank {rank} is given twice, also by {by_rank[rank]}")
        by_rank[rank] = path
    folder = _shown(files[0].parent)
    missing = sorted(set(range(max(by_rank) + 1)) - set(by_rank))
    if missing:
        raise CenterBankError(f"{folder}: the file of rank {_ranks(missing)} is missing; ranks are 0 … {max(by_rank)}")
    _check_all_ranks(by_rank, num_classes, ranks)
    ordered = [by_rank[rank] for rank in range(len(by_rank))]
    found = [_find_weight(path, key, None) if key else _shard_weight(path) for path in ordered]
    name, weights = found[0][0], [weight for _, weight in found]
    sizes = [len(weight) for weight in weights]
    said = f"{folder}: {name!r} of {len(sizes)} ranks, {min(sizes)} … {max(sizes)} classes each"
    padded = name == _PADDED and len(sizes) > 1
    if padded and num_classes is not None and 0 <= sum(sizes) - num_classes < len(sizes):
        weights = _first_rows(weights, num_classes)
        sizes = [len(weight) for weight in weights]
    _check_sizes(folder, sizes, num_classes)
    rows = Rows(weights, [str(path) for path in ordered[: len(weights)]])
    said += f": {len(rows)} classes of dimension {rows.dim}"
    if padded and num_classes is None:
        said += (
            f"; CVLface rounds the count up to a multiple of the ranks: up to {len(found) - 1} of the last may be no "
            "class, which `old_classes` settles"
        )
    return Classifier(rows, said)


def _first_rows(weights: list[Tensor], count: int) -> list[Tensor]:
    """The first ``count`` rows of matrices one below the other; those that have none of them are left out."""
    starts = [0, *accumulate(len(weight) for weight in weights)]
    kept = [weight[: max(0, count - start)] for weight, start in zip(weights, starts, strict=False)]
    return [weight for weight in kept if len(weight)]


def _check_all_ranks(by_rank: dict[int, Path], num_classes: int | None, ranks: int | None) -> None:
    """Raise unless the files of ranks 0 … n−1 are known to be all: no file of a rank says how many there were."""
    first, given = by_rank[0], len(by_rank)
    if ranks is not None and ranks != given:
        raise CenterBankError(
            f"{_shown(first.parent)}: the files of {given} ranks, `ranks` says {ranks}; name all of them"
        )
    if ranks is not None or num_classes is not None:
        return
    kind = re.sub(r"\d+", "*", first.name)
    more = [
        path for path in sorted(first.parent.glob(kind)) if _rank_of(path) is not None and path not in by_rank.values()
    ]
    if more:
        raise CenterBankError(
            f"{more[0]}: a file of another rank next to the {given} given; name all, or the folder "
            f"(`ranks` {given} if it is of another run)"
        )
    if given == 1:
        raise CenterBankError(
            f"{first}: the classes of rank 0; its name does not say how many ranks there were. Name the other files, "
            "or say the count with `ranks` (`ranks` 1: it was the only one) or `old_classes`"
        )


def rank_files(path: Path) -> list[Path]:
    """The per-rank files in a folder, by rank; of a file: itself, when it is one."""
    files = [path] if path.is_file() else path.glob("*.pt")
    by_rank = {rank: file for file in files if (rank := _rank_of(file)) is not None}
    return [by_rank[rank] for rank in sorted(by_rank)]


def _shard_weight(path: Path) -> tuple[str, Tensor]:
    arrays = {name: array for name, array in open_arrays(path).items() if array.ndim == 2}
    exact = next((name for name in _EXACT if name in arrays), None)  # older versions keep momentum and drawn rows too
    if exact is not None:
        return exact, arrays[exact]
    own = {n: a for n, a in arrays.items() if n.startswith("state_dict_softmax_fc.") or n in ("array", "weight")}
    if len(own) != 1:
        raise CenterBankError(
            f"{path}: one matrix under state_dict_softmax_fc or partial_fc is needed; it has {_listed(own or arrays)}"
        )
    return next(iter(own.items()))


def _balanced(total: int, world: int) -> list[int]:
    """arcface_torch's split: sizes differ by at most one, the first ranks have more."""
    return [total // world + (rank < total % world) for rank in range(world)]


def _shown(folder: Path) -> Path:
    """A folder as it is named in messages: the one where the command runs by its full name, not as a dot."""
    return folder.resolve() if str(folder) == "." else folder


def _check_sizes(folder: Path, sizes: list[int], num_classes: int | None) -> None:
    total = sum(sizes)
    if num_classes is not None and total != num_classes:
        for world in range(len(sizes) + 1, num_classes + 1):
            if _balanced(num_classes, world)[: len(sizes)] == sizes:
                lost = list(range(len(sizes), world))
                raise CenterBankError(
                    f"{folder}: {total} of {num_classes} classes; the file of rank {_ranks(lost)} of {world} is missing"
                )
            if num_classes // world + 1 < sizes[0]:
                break
        raise CenterBankError(f"{folder}: the ranks have {total} classes together, expected are {num_classes}")
    width = sizes[0]
    ceiling = [min(width, max(0, total - rank * width)) for rank in range(len(sizes))]
    if sizes not in (_balanced(total, len(sizes)), ceiling):
        raise CenterBankError(
            f"{folder}: the ranks have {', '.join(map(str, sizes[:8]))} … classes, which is no split of one head; "
            "files of several training runs are mixed, or one is missing"
        )


def _ranks(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks)) if len(ranks) <= 4 else f"{ranks[0]} … {ranks[-1]}"


def _own_checkpoint(folder: Path) -> Classifier:
    """The head's rows in a checkpoint of this project, mapped where they lie in its files."""
    try:
        if not (folder / SEAL).is_file():
            complete = [path for path in list_checkpoints(folder / "checkpoints") if (path / SEAL).is_file()]
            if not complete:
                raise CenterBankError(f"{folder}: the run has no complete checkpoint")
            folder = complete[-1]
        seal, index = read_seal(folder), read_index(folder)
    except CheckpointError as error:
        raise CenterBankError(str(error)) from None
    tables = {
        name: entry
        for name, entry in index.state_dict_metadata.items()
        if name.split(".")[-1] in ("rows", CODES) and isinstance(entry, TensorStorageMetadata) and len(entry.size) == 2
    }
    if len(tables) != 1:
        raise CenterBankError(f"{folder}: holds no classifier rows (found: {', '.join(tables) or 'none'})")
    name, entry = next(iter(tables.items()))
    parts, used = _mapped_table(folder, index, name)
    scales = None
    if name.endswith(CODES):
        scales, more = _mapped_table(folder, index, name.removesuffix(CODES) + SCALE)
        used |= more
    damage = find_damage(folder, {file: value for file, value in seal["files"].items() if file in used})
    if damage:
        raise CenterBankError(damage)
    rows = Rows(parts, [str(folder)] * len(parts), scales)
    if len(rows) != entry.size[0]:
        raise CenterBankError(f"{folder}: {name} has {entry.size[0]} rows, its files hold {len(rows)}")
    return Classifier(rows, f"{folder}: {name!r}: {len(rows)} classes of dimension {rows.dim}")


def _mapped_table(folder: Path, index: Metadata, name: str) -> tuple[list[Tensor], set[str]]:
    """The parts (n, …) of a table in a checkpoint, mapped, without empty ones; and the files that hold them."""
    entry = index.state_dict_metadata.get(name)
    if not isinstance(entry, TensorStorageMetadata):
        raise CenterBankError(f"{folder}: has no {name}")
    parts, used = [], set()
    for chunk in sorted(entry.chunks, key=lambda c: c.offsets[0]):
        stored = index.storage_data[MetadataIndex(name, chunk.offsets)]
        used.add(stored.relative_path)
        part = _mapped_tensor(folder / stored.relative_path, stored.offset, stored.length, entry.properties.dtype)
        parts.append(part.reshape(tuple(chunk.sizes)))
    return [part for part in parts if len(part)], used


class _Window(io.RawIOBase):
    """Bytes [start, start + length) of a file as a file of its own."""

    def __init__(self, path: Path, start: int, length: int) -> None:
        self._file = open_regular(path, CenterBankError)
        self._start, self._length, self._at = start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + {0: 0, 1: self._at, 2: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        self._file.seek(self._start + self._at)
        data = self._file.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data

    def close(self) -> None:
        self._file.close()
        super().close()


def _mapped_tensor(path: Path, start: int, length: int, dtype: torch.dtype) -> Tensor:
    """The storage of the one tensor that ``torch.save`` wrote at this place, mapped: (n,) of ``dtype``."""
    try:
        with _Window(path, start, length) as window, zipfile.ZipFile(window) as archive:
            member = next(m for m in archive.infolist() if m.filename.endswith("data/0"))
            window.seek(member.header_offset + 26)
            name_bytes, extra_bytes = np.frombuffer(window.read(4), "<u2").tolist()
            at = start + member.header_offset + 30 + name_bytes + extra_bytes
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError("compressed")
        raw = np.memmap(path, np.uint8, "c", at, (member.file_size,))
    except (OSError, ValueError, StopIteration, zipfile.BadZipFile) as error:
        raise CenterBankError(f"{path}: no readable tensor at byte {start} ({error})") from None
    return torch.from_numpy(raw).view(dtype)
