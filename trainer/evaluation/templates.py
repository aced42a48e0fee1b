"""Template protocols in the layout of IJB-B and IJB-C: 1:1 over listed pairs of templates, 1:N in two galleries.

A folder holds ``loose_crop/`` and ``meta/`` with ``*_face_tid_mid.txt`` (image, template, media),
``*_name_5pts_score.txt`` (image, five points, detection score), ``*_template_pair_label.txt`` (gallery template,
probe template, 1 or 0) and, for 1:N, two ``*_1N_gallery_*.csv`` and ``*_1N_probe_mixed.csv`` (template, subject, …).
Images are brought to 112 × 112 by a similarity transform of their five points, as is usual for these sets.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def read_templates(folder: Path) -> TemplateSet:
    """Read a protocol's files. Raises :class:`DataError` naming the file that is missing or of another form."""
    meta = folder / "meta"
    faces = _rows(_one(meta, "*_face_tid_mid.txt"), 3)
    marks = _rows(_one(meta, "*_name_5pts_score.txt"), 12)
    names = [row[0] for row in faces]
    by_name = {row[0]: row for row in marks}
    missing = next((name for name in names if name not in by_name), None)
    if missing is not None:
        raise DataError(f"{meta}: {missing} is in the template list but has no points and score")
    try:
        template = np.array([row[1] for row in faces], np.int64)
        media = np.array([row[2] for row in faces], np.int64)
        numbers = np.array([by_name[name][1:] for name in names], np.float64)
    except ValueError as error:
        raise DataError(f"{meta}: a template, media, point or score is no number: {error}") from None
    pair_file = _one(meta, "*_template_pair_label.txt", needed=False)
    pairs = None if pair_file is None else _integers(pair_file)
    probe_file = _one(meta, "*_1N_probe_mixed.csv", needed=False)
    galleries = [_gallery(path) for path in sorted(meta.glob("*_1N_gallery_*.csv"))] if probe_file else []
    if pairs is None and not galleries:
        raise DataError(f"{meta}: holds neither *_template_pair_label.txt (1:1) nor gallery and probe files (1:N)")
    return TemplateSet(
        folder, names, template, media, numbers[:, :10].reshape(-1, 5, 2), numbers[:, 10],
        None if pairs is None else pairs[:, :2], None if pairs is None else pairs[:, 2] == 1,
        galleries, None if probe_file is None else _gallery(probe_file),
    )  # fmt: skip


def _one(meta: Path, pattern: str, needed: bool = True) -> Path | None:
    found = sorted(meta.glob(pattern))
    if not found and needed:
        raise DataError(f"{meta}: no {pattern}; expected the published layout of IJB-B or IJB-C")
    return found[0] if found else None


def _rows(path: Path | None, width: int) -> list[list[str]]:
    assert path is not None
    rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    wrong = next((i for i, row in enumerate(rows, 1) if len(row) != width), None)
    if wrong is not None or not rows:
        raise DataError(f"{path}: line {wrong or 1}: expected {width} columns")
    return rows


def _integers(path: Path) -> IntArray:
    try:
        table = np.loadtxt(path, dtype=np.int64, ndmin=2)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    if table.shape[1:] != (3,):
        raise DataError(f"{path}: expected three columns, gallery template, probe template, 1 or 0")
    return table


def _gallery(path: Path) -> Gallery:
    try:
        table = np.loadtxt(path, dtype=np.int64, delimiter=",", skiprows=1, usecols=(0, 1), ndmin=2)
    except (ValueError, IndexError) as error:
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
    """
    weights = np.ones(len(embeddings)) if weights is None else np.asarray(weights, np.float64)
    order = np.lexsort((media, template))
    t, m = template[order], media[order]
    starts = np.flatnonzero(np.r_[True, (t[1:] != t[:-1]) | (m[1:] != m[:-1])])
    sizes = np.diff(np.append(starts, len(t)))
    share = np.empty(len(t), np.float32)  # what an image counts in the sum of its template
    share[order] = weights[order] / np.repeat(sizes, sizes)
    numbers, place = np.unique(template, return_inverse=True)
    sums = torch.zeros(len(numbers), embeddings.shape[1])
    for a in range(0, len(place), 1 << 14):
        part = slice(a, a + (1 << 14))
        weighed = np.asarray(embeddings[part] * share[part, None], np.float32)
        sums.index_add_(0, torch.from_numpy(place[part]), torch.from_numpy(weighed))
    return numbers, torch.nn.functional.normalize(sums).numpy()


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
            left, right = (_places(numbers, protocol.pairs[:, side], protocol.folder) for side in (0, 1))
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
    asked = probes[_places(numbers, protocol.probes.templates, protocol.folder)]
    subjects = protocol.probes.subjects
    kept = [enrolled[_places(numbers, g.templates, protocol.folder)] for g in protocol.galleries]
    together = np.concatenate([g.subjects for g in protocol.galleries])
    closed = open_set(asked, subjects, np.concatenate(kept), together, fpirs=())
    each: list[OpenSet] = [
        open_set(asked, subjects, k, g.subjects, fpirs=fpirs) for k, g in zip(kept, protocol.galleries, strict=True)
    ]
    tpir = {f: float(np.mean([one.tpir[f] for one in each])) for f in fpirs if all(f in one.tpir for one in each)}
    return {"rank": closed.rank, "tpir": tpir, "enrolled": len(together), "probes": len(subjects)}


def _places(numbers: IntArray, wanted: IntArray, folder: Path) -> IntArray:
    at = np.searchsorted(numbers, wanted)
    at[at == len(numbers)] = 0
    wrong = np.flatnonzero(numbers[at] != wanted)
    if len(wrong):
        raise DataError(f"{folder}: template {wanted[wrong[0]]} is asked for but has no images")
    return at
