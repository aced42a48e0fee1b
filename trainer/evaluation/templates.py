"""Template protocols in the layout of IJB-B and IJB-C: 1:1 over listed pairs of templates, 1:N in two galleries.

A folder holds ``loose_crop/`` and ``meta/`` with ``*_face_tid_mid.txt`` (image, template, media),
``*_name_5pts_score.txt`` (image, five points, detection score), ``*_template_pair_label.txt`` (gallery template,
probe template, 1 or 0) and, for 1:N, two ``*_1N_gallery_*.csv`` and ``*_1N_probe_mixed.csv`` (template, subject, …).
Images are brought to 112 × 112 by a similarity transform of their five points, as is usual for these sets.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from trainer.data.index import Dataset, DatasetInfo
from trainer.data.store import FileStore
from trainer.errors import DataError
from trainer.evaluation.arrays import BoolArray, FloatArray, IntArray
from trainer.evaluation.compatibility import Spaces, cell_pairs
from trainer.evaluation.identification import OpenSet, open_set
from trainer.evaluation.pairs import pair_cosines, pair_figures
from trainer.reading import read_text, regular

POINTS_112 = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
"""Where eyes, nose tip and mouth corners lie in an aligned 112 × 112 face (x, y)."""


@dataclass(frozen=True)
class Gallery:
    """Enrolled or probed templates (k,) and their subjects (k,)."""

    templates: IntArray
    subjects: IntArray


@dataclass(frozen=True)
class TemplateSet:
    """A template protocol. Per image: file name, template, media, five points (n, 5, 2), detection score, all (n, …).

    pairs: (m, 2) gallery and probe template; genuine (m,); both None without a 1:1 list. galleries, probes: empty and
    None without 1:N.
    """

    folder: Path
    names: list[str]
    template: IntArray
    media: IntArray
    points: FloatArray
    score: FloatArray
    pairs: IntArray | None
    genuine: BoolArray | None
    galleries: list[Gallery]
    probes: Gallery | None


def read_templates(folder: Path, weighted: bool = False) -> TemplateSet:
    """Read a protocol's files.

    Args:
        weighted: images are to be weighed by their detection scores, which must then be finite and above 0.

    Raises:
        DataError: naming the file that is missing or of another form, with the line where one can be named.
    """
    meta = folder / "meta"
    faces = _rows(_one(meta, "*_face_tid_mid.txt"), 3)
    marks_file = _one(meta, "*_name_5pts_score.txt")
    by_name = {row.fields[0]: row for row in _rows(marks_file, 12)}
    names = [row.fields[0] for row in faces]
    missing = next((name for name in names if name not in by_name), None)
    if missing is not None:
        raise DataError(f"{meta}: {missing} is in the template list but has no points and score")
    numbered = _numbers(faces, np.int64)
    marks = [by_name[name] for name in names]
    numbers = _numbers(marks, np.float64)
    _refuse(~np.isfinite(numbers[:, :10]).all(1), marks, "its five points are not all finite numbers")
    if weighted:
        usable = np.isfinite(numbers[:, 10]) & (numbers[:, 10] > 0)
        _refuse(~usable, marks, "its detection score, the last column, cannot weigh it: it must be finite and above 0")
    pair_file = _one(meta, "*_template_pair_label.txt", needed=False)
    pairs = None if pair_file is None else _integers(pair_file)
    probe_file = _one(meta, "*_1N_probe_mixed.csv", needed=False)
    galleries = [_gallery(path) for path in sorted(meta.glob("*_1N_gallery_*.csv"))] if probe_file else []
    if pairs is None and not galleries:
        raise DataError(f"{meta}: holds neither *_template_pair_label.txt (1:1) nor gallery and probe files (1:N)")
    return TemplateSet(
        folder, names, numbered[:, 0], numbered[:, 1], numbers[:, :10].reshape(-1, 5, 2), numbers[:, 10],
        None if pairs is None else pairs[:, :2], None if pairs is None else pairs[:, 2] == 1,
        galleries, None if probe_file is None else _gallery(probe_file),
    )  # fmt: skip


def _one(meta: Path, pattern: str, needed: bool = True) -> Path | None:
    found = sorted(meta.glob(pattern))
    if not found and needed:
        raise DataError(f"{meta}: no {pattern}; expected the published layout of IJB-B or IJB-C")
    return found[0] if found else None


class _Row(NamedTuple):
    """A line of a file: its fields, the first of which is an image."""

    path: Path
    line: int
    fields: list[str]

    def __str__(self) -> str:
        return f"{self.path}: line {self.line}: {self.fields[0]}"


def _rows(path: Path | None, width: int) -> list[_Row]:
    assert path is not None
    lines = read_text(path, DataError).splitlines()
    rows = [_Row(path, number, line.split()) for number, line in enumerate(lines, 1) if line.strip()]
    wrong = next((row for row in rows if len(row.fields) != width), None)
    if wrong is not None or not rows:
        raise DataError(f"{path}: line {wrong.line if wrong else 1}: expected {width} columns")
    return rows


def _numbers(rows: Sequence[_Row], dtype: type[Any]) -> NDArray[Any]:
    """What stands behind the images' names: (n, columns)."""
    try:
        return np.array([row.fields[1:] for row in rows], dtype)
    except (ValueError, OverflowError):
        for row in rows:
            try:
                np.array(row.fields[1:], dtype)
            except (ValueError, OverflowError) as error:
                raise DataError(f"{row}: a template, media, point or score is no number: {error}") from None
        raise


def _refuse(wrong: BoolArray, rows: Sequence[_Row], why: str) -> None:
    """Raise :class:`DataError` at the first of the ``wrong`` rows."""
    if wrong.any():
        raise DataError(
            f"{rows[int(wrong.argmax())]}: {why}; correct the line, or leave the image out of the template list"
        )


def _integers(path: Path) -> IntArray:
    regular(path, DataError)
    try:
        table = np.loadtxt(path, dtype=np.int64, ndmin=2)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}") from None
    if table.shape[1:] != (3,):
        raise DataError(f"{path}: expected three columns, gallery template, probe template, 1 or 0")
    return table


def _gallery(path: Path) -> Gallery:
    regular(path, DataError)
    try:
        table = np.loadtxt(path, dtype=np.int64, delimiter=",", skiprows=1, usecols=(0, 1), ndmin=2)
    except (OSError, ValueError, IndexError) as error:
        raise DataError(f"{path}: expected template and subject in the first two columns: {error}") from None
    # A template has a row for each of its images.
    templates, first = np.unique(table[:, 0], return_index=True)
    return Gallery(templates, table[first, 1])


def align(image: Image.Image, points: FloatArray, size: tuple[int, int] = (112, 112)) -> Image.Image:
    """The similarity transform that takes a face's five points (5, 2) nearest to :data:`POINTS_112`, in this size."""
    scale = np.array([size[1] / 112, size[0] / 112])
    target = POINTS_112 * scale
    # As complex numbers a similarity is z ↦ a·z + b. PIL wants the way back, from the result to the source: fit that
    # one.
    from_, to = target @ [1, 1j], points @ [1, 1j]
    centred = from_ - from_.mean()
    a = np.vdot(centred, to - to.mean()) / np.vdot(centred, centred)
    b = to.mean() - a * from_.mean()
    matrix = (a.real, -a.imag, b.real, a.imag, a.real, b.imag)
    return image.transform((size[1], size[0]), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


class AlignedImages(Dataset):
    """The images of a template set as a data set; labels are record numbers."""

    def __init__(self, templates: TemplateSet, size: tuple[int, int]) -> None:
        self._points, self._size = templates.points, size
        files = FileStore([templates.folder / "loose_crop" / name for name in templates.names])
        count, folder = len(templates.names), templates.folder
        super().__init__(folder, DatasetInfo(image_size=size), files, np.arange(count), count, folder)

    @cached_property
    def fingerprint(self) -> str:
        """A data set's, and the points: they decide what is seen of the images."""
        digest = hashlib.blake2b(super().fingerprint.encode(), digest_size=16)
        digest.update(np.ascontiguousarray(self._points).tobytes())
        return digest.hexdigest()

    def decode(self, record: int) -> NDArray[np.uint8]:
        """Pixels (H, W, 3) uint8 of an image, aligned. Raises :class:`DataError` naming the file."""
        try:
            with Image.open(io.BytesIO(self.read(record))) as image:
                return np.asarray(align(image.convert("RGB"), self._points[record], self._size), np.uint8)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.where(record)} does not decode: {error}") from None


def pool(
    embeddings: FloatArray, template: IntArray, media: IntArray, weights: FloatArray | None = None
) -> tuple[IntArray, FloatArray]:
    """Templates from images: the mean over each medium's images, summed over a template's media, normalised.

    Args:
        embeddings: (n, D) unit. template, media: (n,). weights: (n,) > 0, detection scores, norms or their product, by
            which each embedding is multiplied first, as is usual for these sets; None: all alike.

    Returns:
        Template numbers (t,) ascending and unit embeddings (t, D) float32.

    Raises:
        DataError: a weight that is not finite and above 0, or a template whose embeddings sum to nothing.
    """
    weights = np.ones(len(embeddings)) if weights is None else np.asarray(weights, np.float64)
    wrong = ~(np.isfinite(weights) & (weights > 0))
    if wrong.any():
        at = int(wrong.argmax())
        raise DataError(
            f"template {template[at]}: image {at} weighs {weights[at]:g}; weights must be finite and above 0"
        )
    order = np.lexsort((media, template))
    t, m = template[order], media[order]
    starts = np.flatnonzero(np.r_[True, (t[1:] != t[:-1]) | (m[1:] != m[:-1])])
    sizes = np.diff(np.append(starts, len(t)))
    share = np.empty(len(t), np.float32)  # what an image counts in the sum of its template
    share[order] = weights[order] / np.repeat(sizes, sizes)
    numbers, group = np.unique(template, return_inverse=True)
    sums = torch.zeros(len(numbers), embeddings.shape[1])
    for a in range(0, len(group), 1 << 14):
        part = slice(a, a + (1 << 14))
        weighed = np.asarray(embeddings[part] * share[part, None], np.float32)
        sums.index_add_(0, torch.from_numpy(group[part]), torch.from_numpy(weighed))
    pooled = torch.nn.functional.normalize(sums).numpy()
    lost = ~(np.abs(np.linalg.norm(pooled, axis=1) - 1) < 1e-3)
    if lost.any():
        raise DataError(
            f"template {numbers[lost.argmax()]}: the weighed embeddings of its images sum to no direction; "
            "leave it out of the protocol, or weigh its images otherwise"
        )
    return numbers, pooled


def measure_templates(
    protocol: TemplateSet,
    spaces: Spaces,
    numbers: IntArray,
    fars: Sequence[float],
    replicates: int,
    seed: int,
    fpirs: Sequence[float] = (1e-2, 1e-1),
) -> dict[str, Any]:
    """1:1 and 1:N in every comparable cell.

    Args:
        spaces: template embeddings (t, D) of ``numbers`` (t,), ascending. Gallery templates are the gallery model's,
        probes the
            query model's.
    """
    cells: dict[str, Any] = {}
    for query, gallery in cell_pairs(spaces.native):
        view = spaces.view(query, gallery)
        if view is None:
            continue
        probes, enrolled = view[0], view[0] if view[1] is None else view[1]
        cell: dict[str, Any] = {"how": view[2]}
        if protocol.pairs is not None and protocol.genuine is not None:
            left, right = (_rows_of(numbers, protocol.pairs[:, side], protocol.folder) for side in (0, 1))
            cosines = pair_cosines(enrolled, probes, left, right)
            cell["verification"] = pair_figures(cosines, protocol.genuine, tuple(fars), replicates, seed)
        if protocol.probes is not None and protocol.galleries:
            cell["identification"] = _identify(protocol, numbers, probes, enrolled, fpirs)
        cells[f"{query}->{gallery}"] = cell
    return {"images": len(protocol.names), "templates": len(numbers), "cells": cells}


def _identify(
    protocol: TemplateSet, numbers: IntArray, probes: FloatArray, enrolled: FloatArray, fpirs: Sequence[float]
) -> dict[str, Any]:
    """Rank-k over all galleries together (closed set); TPIR as the mean over the galleries one by one (open set)."""
    assert protocol.probes is not None
    asked = probes[_rows_of(numbers, protocol.probes.templates, protocol.folder)]
    subjects = protocol.probes.subjects
    kept = [enrolled[_rows_of(numbers, g.templates, protocol.folder)] for g in protocol.galleries]
    together = np.concatenate([g.subjects for g in protocol.galleries])
    closed = open_set(asked, subjects, np.concatenate(kept), together, fpirs=())
    each: list[OpenSet] = [
        open_set(asked, subjects, k, g.subjects, fpirs=fpirs) for k, g in zip(kept, protocol.galleries, strict=True)
    ]
    tpir = {f: float(np.mean([one.tpir[f] for one in each])) for f in fpirs if all(f in one.tpir for one in each)}
    return {"rank": closed.rank, "tpir": tpir, "enrolled": len(together), "probes": len(subjects)}


def _rows_of(numbers: IntArray, wanted: IntArray, folder: Path) -> IntArray:
    at = np.searchsorted(numbers, wanted)
    at[at == len(numbers)] = 0
    wrong = np.flatnonzero(numbers[at] != wanted)
    if len(wrong):
        raise DataError(f"{folder}: template {wanted[wrong[0]]} is asked for but has no images")
    return at
