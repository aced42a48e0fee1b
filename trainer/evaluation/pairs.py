"""Verification sets that are lists of pairs: InsightFace's .bin files (LFW, CFP-FP, AgeDB, …) and text lists over a
data set.

A .bin is a pickle of (encoded images, same or not), two images a pair. It is read by an unpickler that builds lists,
tuples, bytes, booleans and numbers and refuses everything else, so that a file from elsewhere cannot run code.
"""

import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.index import Dataset, DatasetInfo
from trainer.data.store import FileStore
from trainer.errors import DataError
from trainer.evaluation.arrays import BoolArray, FloatArray, IntArray
from trainer.evaluation.bootstrap import interval
from trainer.evaluation.compatibility import Spaces, cell_pairs
from trainer.evaluation.verification import fold_accuracy, resample_pairs, scores_of
from trainer.reading import open_regular, read_text, why_unreadable


@dataclass(frozen=True)
class PairSet:
    """Pairs of records of a data set: first and second record (m,), whether of one identity (m,)."""

    dataset: Dataset
    first: IntArray
    second: IntArray
    genuine: BoolArray


class _Refused(Exception):
    """A pickle asks for what is not built."""


class _BytesUnpickler(pickle.Unpickler):
    """Builds containers, bytes, booleans and numbers only."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse every name but the one that stands for bytes."""
        if (module, name) == ("_codecs", "encode"):
            return _latin1  # how Python 3 writes bytes in pickles that Python 2 can read
        raise _Refused(f"it asks for {module}.{name}; only bytes and booleans are built")

    def persistent_load(self, pid: Any) -> Any:
        """Refuse."""
        raise _Refused("it refers to objects outside the file")


def _latin1(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("it encodes something that is no text of bytes")
    return text.encode("latin1")


class _MemoryStore:
    """Encoded images in memory, in the form of :class:`trainer.data.store.Store`."""

    def __init__(self, path: Path, images: list[bytes]) -> None:
        self._path, self._images = path, images

    def __len__(self) -> int:
        return len(self._images)

    def read(self, record: int) -> bytes:
        """The encoded image."""
        return self._images[record]

    def where(self, record: int) -> str:
        """File and image, for messages."""
        return f"{self._path}: image {record}"

    def sizes(self) -> list[int]:
        """The images' sizes and a hash of their content, for the fingerprint."""
        digest = hashlib.sha256()
        for image in self._images:
            digest.update(image)
        return [len(image) for image in self._images] + [int.from_bytes(digest.digest()[:8], "big")]

    def lengths(self, start: int, stop: int) -> np.ndarray:
        """The images' sizes."""
        return np.array([len(image) for image in self._images[start:stop]], np.int64)

    def will_need(self, records: np.ndarray) -> int:
        """They are in memory."""
        return 0

    def forget(self) -> None:
        """They stay in memory."""

    def close(self) -> None:
        """Nothing is held open."""


def read_bin(path: Path, image_size: tuple[int, int]) -> PairSet:
    """Read an InsightFace .bin.

    Args:
        image_size: (H, W) that the images are brought to; the published sets are 112 × 112.

    Raises:
        DataError: missing or damaged, or it holds anything but encoded images and booleans.
    """
    try:
        with open_regular(path, DataError) as file:
            content = _BytesUnpickler(file, encoding="bytes").load()
    except DataError:
        raise
    except _Refused as error:
        raise DataError(f"{path}: is no verification .bin: {error}") from None
    except Exception:  # damaged pickles raise nearly anything
        reason = f": it {shown}" if (shown := why_unreadable(path)) else ", or a damaged one"
        raise DataError(f"{path}: is no verification .bin{reason}") from None
    if (
        not isinstance(content, (tuple, list))
        or len(content) != 2
        or not all(isinstance(c, (list, tuple)) for c in content)
    ):
        raise DataError(f"{path}: is no verification .bin: expected (images, same or not)")
    images, same = content
    wrong = next((i for i, image in enumerate(images) if not isinstance(image, bytes)), None)
    if wrong is not None:
        raise DataError(f"{path}: image {wrong} is no bytes but {type(images[wrong]).__name__}")
    if not all(isinstance(value, (bool, int)) and value in (0, 1) for value in same):
        raise DataError(f"{path}: the answers are not all booleans")
    if len(images) != 2 * len(same) or not same:
        raise DataError(f"{path}: {len(images)} images for {len(same)} pairs; expected two images a pair")
    info = DatasetInfo(image_size=image_size)
    numbers = np.arange(len(images))
    dataset = Dataset(path, info, _MemoryStore(path, list(images)), numbers, len(images), path)
    return PairSet(dataset, numbers[0::2], numbers[1::2], np.array(same, bool))


def read_list(path: Path, dataset: Dataset) -> PairSet:
    """Read a text list of pairs over a data set: ``A B 1`` (one identity) or ``A B 0`` a line; # begins a comment.

    A and B are record numbers or, for a folder of images, file names relative to it (no spaces in them).

    Raises:
        DataError: unreadable, a line of another form, an unknown record.
    """
    lines = read_text(path, DataError).splitlines()
    known = _file_names(dataset)
    rows = []
    for number, line in enumerate(lines, 1):
        fields = line.partition("#")[0].split()
        if not fields:
            continue
        if len(fields) != 3 or fields[2] not in ("0", "1"):
            raise DataError(f"{path}: line {number}: expected two records and 1 or 0, found {line.strip()!r}")
        rows.append([*(_record(word, known, len(dataset), path, number) for word in fields[:2]), int(fields[2])])
    if not rows:
        raise DataError(f"{path}: holds no pairs")
    table = np.array(rows, np.int64)
    return PairSet(dataset, table[:, 0], table[:, 1], table[:, 2] == 1)


def _file_names(dataset: Dataset) -> dict[str, int]:
    if not isinstance(dataset.store, FileStore):
        return {}
    return {file.relative_to(dataset.path).as_posix(): i for i, file in enumerate(dataset.store.paths)}


def _record(word: str, known: dict[str, int], records: int, path: Path, line: int) -> int:
    if word in known:
        return known[word]
    if word.isdecimal() and int(word) < records:
        return int(word)
    raise DataError(f"{path}: line {line}: {word} is no record of the data set (it has {records:,})")


def measure_pairs(
    pairs: PairSet, spaces: Spaces, records: IntArray, fars: tuple[float, ...], replicates: int, seed: int
) -> dict[str, Any]:
    """10-fold accuracy, TAR at FARs with intervals and EER in every comparable cell.

    Args:
        spaces: embeddings of ``records`` (n,), ascending, which hold every record of the pairs. A pair's first image
        is the query.

    Returns:
        Plain values except for intervals; see :func:`trainer.evaluation.results.plain`.
    """
    first, second = np.searchsorted(records, pairs.first), np.searchsorted(records, pairs.second)
    cells: dict[str, Any] = {}
    for query, gallery in cell_pairs(spaces.native):
        view = spaces.view(query, gallery)
        if view is not None:
            left, right = view[0], view[0] if view[1] is None else view[1]
            cosines = pair_cosines(left, right, first, second)
            cells[f"{query}->{gallery}"] = {"how": view[2], **_figures(cosines, pairs.genuine, fars, replicates, seed)}
    genuine = int(pairs.genuine.sum())
    return {"genuine": genuine, "impostor": len(pairs.genuine) - genuine, "cells": cells}


def _figures(
    cosines: FloatArray, genuine: BoolArray, fars: tuple[float, ...], replicates: int, seed: int
) -> dict[str, Any]:
    mean, std = fold_accuracy(cosines, genuine)
    return {"accuracy": {"mean": mean, "std": std}, **pair_figures(cosines, genuine, fars, replicates, seed)}


def pair_figures(
    cosines: FloatArray, genuine: BoolArray, fars: tuple[float, ...], replicates: int, seed: int
) -> dict[str, Any]:
    """TAR at FARs with intervals (pairs resampled), EER and ROC of given pairs (m,)."""
    scores = scores_of(cosines, genuine)
    drawn = resample_pairs(scores, fars, replicates, seed)
    far, tar = scores.roc()
    rows = [
        {
            "far": wanted,
            "threshold": scores.threshold_at(wanted),
            "resolved": wanted * scores.impostor_count >= 10,
            **vars(interval(scores.tar_at(wanted), drawn[:, at])),
        }
        for at, wanted in enumerate(fars)
    ]
    return {"tar": rows, "eer": scores.eer(), "roc": {"far": far, "tar": tar}}


def pair_cosines(left: FloatArray, right: FloatArray, first: IntArray, second: IntArray) -> FloatArray:
    """Cosines (m,) float32 of pairs: unit rows ``first`` of ``left`` against ``second`` of ``right``.

    Pairs are taken by their first row, so that dense lists (templates) cost matrix products over blocks of rows and
    sparse ones a gather; memory is one block.
    """
    out = np.empty(len(first), np.float32)
    order = np.argsort(first, kind="stable")
    step = 1 << 18
    for start in range(0, len(order), step):
        at = order[start : start + step]
        rows, row_of = np.unique(first[at], return_inverse=True)
        columns, column_of = np.unique(second[at], return_inverse=True)
        if len(rows) * len(columns) <= 8 * len(at):
            out[at] = (left[rows] @ right[columns].T)[row_of, column_of]
        else:
            out[at] = np.einsum("nd,nd->n", left[first[at]], right[second[at]])
    return out
