"""Make a centre bank: from an old classifier's rows, or from old embeddings and their labels.

Both stream: memory is one chunk of vectors (and a few numbers per class), whatever the length of the source. Results
do not depend on how the source is cut into files or chunks.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.compat.bank.boundary import MINIMUM, UNRESTRAINED, BoundaryRule
from trainer.compat.bank.center_bank import BankInfo, BankWriter, CenterBank
from trainer.compat.bank.class_map import ClassMap
from trainer.compat.bank.matrices import Rows
from trainer.data.index import MOST_CLASSES, renumbered
from trainer.distributed import one_thread
from trainer.errors import CenterBankError

CHUNK_BYTES = 2 * 2**20  # stays in the processor's caches from reading to writing
SMALLEST_NORM = 1e-6
COLLAPSED = 0.99
"""5 % quantile of the boundaries above which embeddings are taken to coincide."""
FEWEST_MEASURED = 8

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


def bank_from_rows(
    rows: Rows,
    path: str | Path,
    info: BankInfo,
    *,
    class_map: ClassMap | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    progress: Progress | None = None,
    **options: Any,
) -> CenterBank:
    """The rows w_j of an old classifier as centres n(w_j); boundaries are unknown and restrain nothing.

    Args:
        rows: (C_old, D1), in the old model's class order.
        class_map: which old classes each new class takes; none: new class j is old class j. Several old classes of one
            new class are merged into the normalised mean of their unit rows. New classes without an old one are masked.
        options: of :class:`BankWriter` (storage, overwrite).

    Raises:
        CenterBankError: a row that is zero or not finite, or a map to an old class that does not exist.
    """
    total = len(rows) if class_map is None else class_map.num_classes
    if class_map is not None:
        class_map.check(len(rows))
    step = max(1, chunk_bytes // (4 * rows.dim))
    mask = torch.ones(total, dtype=torch.bool)
    with one_thread(), BankWriter(path, total, rows.dim, info, **options) as writer:
        for start in range(0, total, step):
            stop = min(start + step, total)
            if class_map is None:
                writer.append(_unit_rows(rows.read(start, stop), rows, range(start, stop)))
            else:
                centers, mask[start:stop] = _mapped_rows(rows, class_map, start, stop)
                writer.append(centers)
            if progress is not None:
                progress(stop, total)
        ids = torch.arange(total) if class_map is None else torch.from_numpy(class_map.first)
        writer.finish(torch.full((total,), UNRESTRAINED), torch.zeros(total, dtype=torch.int64), mask, ids)
    return CenterBank.open(path)


def bank_from_embeddings(
    embeddings: Rows,
    labels: np.ndarray,
    num_classes: int,
    path: str | Path,
    info: BankInfo,
    *,
    rule: BoundaryRule = MINIMUM,
    centers: CenterBank | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    progress: Progress | None = None,
    allow_collapsed: bool = False,
    **options: Any,
) -> CenterBank:
    """Centres as the normalised mean of the class's normalised embeddings, and boundaries by ``rule``.

    Vectors are read once, class by class: in file order where labels ascend, else by index (random reads of the mapped
    file).

    Args:
        embeddings: (N, D1) old embeddings, normalised or not.
        labels: (N,) int64, the new class of each; −1 leaves an embedding out.
        num_classes: C. Classes without an embedding are masked.
        centers: take this bank's centres where it has one (old classifier rows) and measure the boundaries and counts
        only.
        chunk_bytes: of vectors held at once; a single class with more is held whole.
        allow_collapsed: boundaries may all be close to 1, as those of a model that was fed wrongly are.
        options: of :class:`BankWriter` (storage, overwrite).

    Raises:
        CenterBankError: lengths differ, a label outside [−1, C), an embedding that is zero or not finite, or
            ``centers`` of another shape or of other identities, or boundaries that all but coincide with 1.
    """
    _check_embeddings(embeddings, labels, num_classes)
    if centers is not None:
        check_centers(centers, num_classes, embeddings.dim, info)
    order = np.argsort(labels, kind="stable")
    order = order[np.searchsorted(labels, 0, sorter=order) :]
    counts = np.bincount(labels[order], minlength=num_classes)
    starts = np.concatenate([[0], np.cumsum(counts)])
    boundaries = np.full(num_classes, UNRESTRAINED, np.float32)
    mask = np.zeros(num_classes, bool)
    ids = torch.full((num_classes,), -1, dtype=torch.int64)
    step = max(1, chunk_bytes // (4 * embeddings.dim))
    with one_thread(), BankWriter(path, num_classes, embeddings.dim, info, **options) as writer:
        for first, last in _class_blocks(starts, step):
            index = order[starts[first] : starts[last]]
            block = _take(embeddings, index)
            groups = np.repeat(np.arange(last - first), counts[first:last])
            unit = _unit_rows(block, embeddings, index)
            known = None if centers is None else centers.rows(first, last)
            means, has_center = _means(unit, groups, last - first)
            if known is not None:
                means = torch.where(known.mask[:, None], known.centers, means)
                has_center |= known.mask
                ids[first:last] = known.class_ids
            cosines = (unit * means[torch.from_numpy(groups)]).sum(1).numpy()
            boundaries[first:last] = rule.of_groups(cosines, groups, last - first)
            alone = counts[first:last] == 1
            if known is not None:
                alone &= ~known.mask.numpy()
            boundaries[first:last][alone] = np.nan
            boundaries[first:last][~has_center.numpy()] = UNRESTRAINED
            mask[first:last] = has_center.numpy()
            writer.append(torch.where(has_center[:, None], means, 0.0))
            if progress is not None:
                progress(int(starts[last]), len(order))
        if not allow_collapsed:
            _check_spread(boundaries[(counts > 1) & mask], path)
        writer.finish(
            torch.from_numpy(_fill_single(boundaries, counts, rule)),
            torch.from_numpy(counts),
            torch.from_numpy(mask),
            ids if centers is not None else None,
        )
    return CenterBank.open(path)


def check_centers(centers: CenterBank, num_classes: int, dim: int, info: BankInfo) -> None:
    """Raises :class:`CenterBankError` unless the bank of :func:`bank_from_embeddings` can take these centres."""
    if (centers.num_classes, centers.dim) != (num_classes, dim):
        raise CenterBankError(
            f"{centers.folder}: {centers.num_classes} classes × {centers.dim}, the embeddings need {num_classes} × "
            f"{dim}"
        )
    if renumbered(centers.info.numbering, info.numbering):
        raise CenterBankError(
            f"{centers.folder}: made for {centers.info.dataset}, whose classes are other identities than those of "
            f"{info.dataset}; take centres of this data set"
        )


def _check_embeddings(embeddings: Rows, labels: np.ndarray, num_classes: int) -> None:
    if len(embeddings) != len(labels):
        raise CenterBankError(f"{len(embeddings)} embeddings but {len(labels)} labels; each embedding needs its label")
    if not len(labels) or labels.max() < 0:
        raise CenterBankError("there is no labelled embedding")
    if num_classes > MOST_CLASSES:
        raise CenterBankError(f"{num_classes} classes; more than {MOST_CLASSES} are not supported")
    wrong = np.flatnonzero((labels < -1) | (labels >= num_classes))
    if len(wrong):
        raise CenterBankError(f"label {labels[wrong[0]]} of record {wrong[0]} is outside [-1, {num_classes})")


def _check_spread(boundaries: np.ndarray, path: str | Path) -> None:
    """Raise where nearly every measured boundary is close to 1: all images of a class coincide."""
    if len(boundaries) < FEWEST_MEASURED:
        return
    low = float(np.quantile(boundaries, 0.05))
    if low > COLLAPSED:
        raise CenterBankError(
            f"{path}: 95 % of the classes have boundaries above {low:.4f}: embeddings that all but coincide are of a "
            "model that was fed what it does not take (lce model describe); the bank was not kept; `allow_collapsed` "
            "if it is right"
        )


def _class_blocks(starts: np.ndarray, step: int) -> Iterator[tuple[int, int]]:
    """Ranges of classes with at most ``step`` embeddings (one class at least) and at most ``step`` classes."""
    first, total = 0, len(starts) - 1
    while first < total:
        last = int(np.searchsorted(starts, starts[first] + step, side="right")) - 1
        last = min(max(last, first + 1), first + step, total)
        yield first, last
        first = last


def _take(embeddings: Rows, index: np.ndarray) -> Tensor:
    if not len(index):
        return torch.empty(0, embeddings.dim)
    if index[-1] - index[0] == len(index) - 1 and bool((np.diff(index) == 1).all()):
        return embeddings.read(int(index[0]), int(index[-1]) + 1)
    return embeddings.take(index)


def _unit_rows(vectors: Tensor, rows: Rows, numbers: Sequence[int] | np.ndarray) -> Tensor:
    """n(v) of (n, D1) vectors; ``rows`` and their ``numbers`` in it name the one that has no direction."""
    norms = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    wrong = ~((norms > SMALLEST_NORM) & norms.isfinite())
    if bool(wrong.any()):
        row = int(wrong.flatten().nonzero()[0])
        raise CenterBankError(
            f"{rows.name_of(int(numbers[row]))}: a vector of norm {float(norms[row]):g} has no direction"
        )
    return vectors / norms


def _means(unit: Tensor, groups: np.ndarray, num_groups: int) -> tuple[Tensor, Tensor]:
    """Normalised group sums (num_groups, D1) and whether each group has one (bool)."""
    sums = torch.zeros(num_groups, unit.shape[1]).index_add_(0, torch.from_numpy(groups), unit)
    norms = torch.linalg.vector_norm(sums, dim=1, keepdim=True)
    return sums / norms.clamp_min(SMALLEST_NORM), norms[:, 0] > SMALLEST_NORM


def _mapped_rows(rows: Rows, class_map: ClassMap, start: int, stop: int) -> tuple[Tensor, Tensor]:
    old, groups = class_map.members(start, stop)
    if not len(old):
        return torch.zeros(stop - start, rows.dim), torch.zeros(stop - start, dtype=torch.bool)
    # Read in ascending order of the old classes: neighbouring rows of a file come from one read.
    order = np.argsort(old, kind="stable")
    unit = torch.empty(len(old), rows.dim)
    unit[torch.from_numpy(order)] = _unit_rows(rows.take(old[order]), rows, old[order])
    alone = bool((np.bincount(groups, minlength=stop - start) <= 1).all())
    if alone:
        centers = torch.zeros(stop - start, rows.dim)
        centers[torch.from_numpy(groups)] = unit
        mask = torch.zeros(stop - start, dtype=torch.bool)
        mask[torch.from_numpy(groups)] = True
        return centers, mask
    means, mask = _means(unit, groups, stop - start)
    return torch.where(mask[:, None], means, 0.0), mask


def _fill_single(boundaries: np.ndarray, counts: np.ndarray, rule: BoundaryRule) -> np.ndarray:
    """Replace the NaN of single images by the rule's value: given, or the median over classes with more images."""
    value = rule.single
    if value is None:
        several = boundaries[(counts > 1) & np.isfinite(boundaries)]
        value = float(np.median(several)) if len(several) else UNRESTRAINED
    return np.where(np.isnan(boundaries), np.float32(value), boundaries)
