"""What is wrong with a data set: the work behind `lce check`."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data import recordio
from trainer.data.config import choose_loader
from trainer.data.index import Dataset
from trainer.data.pixels import decode_image, image_size
from trainer.data.processes import worker_context
from trainer.data.store import Part, RecordStore
from trainer.errors import DataError

_BLOCK = 2048
_LISTED = 20
_DECODED = 64  # images that DALI decodes at once
_FAR = 4.0


@dataclass
class CheckReport:
    """The findings. ``damage`` is what makes `lce check` answer no; the rest is for people to judge.

    Attributes:
        records, used: all records, and those whose label is not −1.
        classes: the class count; ``empty_classes`` of them have no image.
        images_per_class: minimum, median, mean and maximum over the classes that have images.
        relabelled: records whose own header has another label than the label table (not damage: tables are there for
            that; but ``labels.npy`` of `lce pack` has the labels of the headers).
        duplicates: records whose bytes an earlier record has too; ``duplicates_across_classes`` under another label.
        sizes: image height×width → count.
        order, order_reason: the data.order that the folder wants where it lies, and why.
        by_pillow: with ``deep`` and where DALI is installed: records that it does not decode and Pillow does, with its
            reason; training reads them by Pillow.
        decoders_differ: records of which the two make pixels that differ by more than 4/255 in the mean, with the mean
            and the largest difference.
        bad: damaged record → reason.
        damage: one line per kind of damage.
    """

    records: int
    used: int
    classes: int
    empty_classes: int
    first_empty: list[int]
    images_per_class: dict[str, float]
    fingerprint: str
    parts: int
    deep: bool
    header_records: int = 0
    relabelled: int = 0
    duplicates: int = 0
    duplicates_across_classes: int = 0
    first_duplicates: list[list[int]] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    order: str = "global"
    order_reason: str = ""
    by_pillow: dict[int, str] = field(default_factory=dict)
    decoders_differ: dict[int, tuple[float, int]] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)
    damage: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Block:
    """What one process found in the records [start, start + n)."""

    start: int
    hashes: NDArray[np.uint64]
    sizes: NDArray[np.int32]
    header_labels: NDArray[np.float32]
    bad: dict[int, str]
    by_pillow: dict[int, str] = field(default_factory=dict)
    differ: dict[int, tuple[float, int]] = field(default_factory=dict)


def check(
    dataset: Dataset,
    *,
    deep: bool = False,
    processes: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> CheckReport:
    """Read every record of a data set and judge it.

    Args:
        dataset: opened, so its tables have been checked already.
        deep: decode every image, by DALI too where it is installed; otherwise its beginning, its end and its announced
            size are looked at.
        processes: how many read.
        progress: called with the number of records done so far.
    """
    report = _tables(dataset, deep)
    _walk_files(dataset, report)
    hashes = np.zeros(len(dataset), np.uint64)
    sizes = np.zeros((len(dataset), 2), np.int32)
    headers = np.full(len(dataset), -1, np.float32)
    done = 0
    for block in _blocks(dataset, deep, processes):
        rows = slice(block.start, block.start + len(block.hashes))
        hashes[rows], sizes[rows], headers[rows] = block.hashes, block.sizes, block.header_labels
        report.bad.update(block.bad)
        report.by_pillow.update(block.by_pillow)
        report.decoders_differ.update(block.differ)
        done += len(block.hashes)
        progress(done)
    good = np.ones(len(dataset), bool)
    good[list(report.bad)] = False
    _sizes(dataset, sizes[good], report)
    report.order, report.order_reason = wanted_order(dataset)
    _duplicates(dataset, hashes, good, report)
    exact = good & (headers >= 0) & (headers < recordio.EXACT_FLOAT_LABELS)
    own = np.asarray(dataset.labels)
    other = exact & (headers != own)
    report.relabelled = int(other.sum())
    wrong = np.flatnonzero(other & (own >= 0))
    if dataset.packed_labels and len(wrong):
        report.damage.append(
            f"{dataset.path / 'labels.npy'}: {len(wrong)} label(s) are not those of the packed records, the first: "
            f"record {wrong[0]} ({own[wrong[0]]}, packed {int(headers[wrong[0]])}); pack again, and give other labels "
            "as a label table (data.labels)"
        )
    if report.bad:
        report.damage.append(f"{len(report.bad)} damaged record(s), the first: {report.bad[min(report.bad)]}")
    return report


def _tables(dataset: Dataset, deep: bool) -> CheckReport:
    labels = np.asarray(dataset.labels)
    counts = np.bincount(labels[labels >= 0], minlength=dataset.num_classes)
    filled = counts[counts > 0]
    empty = np.flatnonzero(counts == 0)
    spread = {"min": 0.0, "median": 0.0, "mean": 0.0, "max": 0.0}
    if len(filled):
        spread = {
            "min": float(filled.min()),
            "median": float(np.median(filled)),
            "mean": float(filled.mean()),
            "max": float(filled.max()),
        }
    parts = len(dataset.store.parts) if isinstance(dataset.store, RecordStore) else 0
    return CheckReport(
        records=len(dataset),
        used=int(counts.sum()),
        classes=dataset.num_classes,
        empty_classes=len(empty),
        first_empty=empty[:_LISTED].tolist(),
        images_per_class=spread,
        fingerprint=dataset.fingerprint,
        parts=parts,
        deep=deep,
    )


def _walk_files(dataset: Dataset, report: CheckReport) -> None:
    """Walk each .rec from frame to frame: what the table lists must be there, and the rest is counted."""
    if not isinstance(dataset.store, RecordStore):
        return
    for part in dataset.store.parts:
        try:
            found = np.fromiter(recordio.scan(part.path), np.int64)
        except DataError as error:
            report.damage.append(str(error))
            continue
        missing = np.setdiff1d(part.offsets[:-1], found)
        if len(missing):
            report.damage.append(
                f"{part.path}: {len(missing)} offset(s) lie where no record begins, first {missing[0]}"
            )
        if dataset.info.labels is not None:  # `lce pack` wrote it; else the .idx was read, or there need be none
            _index_file(part, report)
        headers = np.setdiff1d(found, part.offsets[:-1])
        report.header_records += len(headers)
        if len(dataset.store.parts) == 1 and len(headers):
            _identity_ranges(part, headers, dataset, report)


def _index_file(part: Part, report: CheckReport) -> None:
    """The .idx next to a table of offsets, which is read here instead of it: other readers need it."""
    idx = part.path.with_suffix(".idx")
    try:
        listed = recordio.read_index(idx)[1] if idx.exists() else part.offsets[:0]
    except DataError as error:
        report.damage.append(str(error))
        return
    missing = len(np.setdiff1d(part.offsets[:-1], listed))
    if missing:
        what = f"leaves out {missing} of {len(part.offsets) - 1} records" if idx.exists() else "is missing"
        report.damage.append(f"{idx}: {what}; MXNet and DALI's own reader need it: pack again, or copy it once more")


def _identity_ranges(part: Part, headers: NDArray[np.int64], dataset: Dataset, report: CheckReport) -> None:
    """InsightFace's identity records: the images of each range [first, last) of keys must have one label.

    The header record has the id 0, and the identity records have their keys. Keys are float32 there, so a file of more
    than 2²⁴ records cannot be judged.
    """
    size = part.path.stat().st_size
    labels = np.asarray(dataset.labels)
    for start, stop in zip(headers.tolist(), [*headers[1:].tolist(), size], strict=True):
        try:
            one = Part(part.path, np.array([start, stop]))
            record = one.record(0)
            one.close()
        except DataError as error:
            report.damage.append(str(error))
            continue
        if record.flag != 2 or record.image or record.id == 0 or max(record.labels) >= recordio.EXACT_FLOAT_LABELS:
            continue
        first, last = (int(key) - 1 for key in record.labels)
        if not 0 <= first <= last <= len(labels):
            report.damage.append(f"{part.path}: the identity record at byte {start} names images that do not exist")
        elif len(set(labels[first:last].tolist()) - {-1}) > 1:
            report.damage.append(f"{part.path}: records {first}…{last - 1} are one identity but have several labels")


def _blocks(dataset: Dataset, deep: bool, processes: int) -> Iterator[_Block]:
    starts = range(0, len(dataset), _BLOCK)
    if processes == 1 or len(starts) == 1:
        yield from (_examine(dataset, start, deep) for start in starts)
        return
    with ProcessPoolExecutor(processes, worker_context(), _start_worker, (dataset, deep)) as pool:
        yield from pool.map(_work, starts)


_dataset: Any = None
_deep = False


def _start_worker(dataset: Dataset, deep: bool) -> None:
    global _dataset, _deep
    _dataset, _deep = dataset, deep


def _work(start: int) -> _Block:
    return _examine(_dataset, start, _deep)


def _examine(dataset: Dataset, start: int, deep: bool) -> _Block:
    stop = min(start + _BLOCK, len(dataset))
    n = stop - start
    block = _Block(start, np.zeros(n, np.uint64), np.zeros((n, 2), np.int32), np.full(n, -1, np.float32), {})
    waiting: dict[int, tuple[bytes, NDArray[np.uint8]]] = {}
    dali = deep and choose_loader("auto")[0] == "dali"
    for row, number in enumerate(range(start, stop)):
        if len(waiting) == _DECODED:
            _compare_decoders(waiting, block)
        try:
            if isinstance(dataset.store, RecordStore):
                record = dataset.store.record(number)
                image, block.header_labels[row] = record.image, record.label
            else:
                image = dataset.read(number)
            block.hashes[row] = int.from_bytes(hashlib.blake2b(image, digest_size=8).digest(), "little")
            if not deep:
                block.sizes[row] = image_size(image)
                continue
            pixels = decode_image(image, None)
            block.sizes[row] = pixels.shape[:2]
            if dali:
                waiting[number] = image, pixels
        except DataError as error:
            block.bad[number] = str(error)
        except ValueError as error:
            block.bad[number] = f"{dataset.where(number)}: {error}"
    if waiting:
        _compare_decoders(waiting, block)
    return block


def _compare_decoders(waiting: dict[int, tuple[bytes, NDArray[np.uint8]]], block: _Block) -> None:
    """Decode by DALI what Pillow has decoded, note what it makes otherwise, and forget the images."""
    from trainer.data.dali import decode_each

    decoded = decode_each([image for image, _ in waiting.values()])
    for (number, (_, pixels)), other in zip(waiting.items(), decoded, strict=True):
        if isinstance(other, str):
            block.by_pillow[number] = other
        elif other.shape != pixels.shape:
            block.differ[number] = 255.0, 255
        else:
            apart = np.abs(other.astype(np.int16) - pixels)
            if apart.mean() > _FAR:
                block.differ[number] = round(float(apart.mean()), 1), int(apart.max())
    waiting.clear()


def _sizes(dataset: Dataset, sizes: NDArray[np.int32], report: CheckReport) -> None:
    distinct, counts = np.unique(sizes, axis=0, return_counts=True) if len(sizes) else (sizes, np.empty(0, int))
    by_count = np.argsort(-counts)
    report.sizes = {f"{distinct[k][0]}x{distinct[k][1]}": int(counts[k]) for k in by_count[:_LISTED]}
    wanted = dataset.info.image_size
    odd = int((sizes != np.array(wanted)).any(1).sum()) if len(sizes) else 0
    if dataset.info.uniform and odd:
        report.damage.append(f"{odd} image(s) are not {wanted[0]}x{wanted[1]}, as dataset.yaml says")


def _duplicates(dataset: Dataset, hashes: NDArray[np.uint64], good: NDArray[np.bool_], report: CheckReport) -> None:
    rows = np.flatnonzero(good)
    ordered = rows[np.argsort(hashes[rows], kind="stable")]
    same = np.flatnonzero(hashes[ordered][1:] == hashes[ordered][:-1])
    earlier, later = ordered[same], ordered[same + 1]
    labels = np.asarray(dataset.labels)
    report.duplicates = len(same)
    report.duplicates_across_classes = int((labels[earlier] != labels[later]).sum())
    report.first_duplicates = [[int(a), int(b)] for a, b in zip(earlier[:_LISTED], later[:_LISTED], strict=True)]


def wanted_order(dataset: Dataset, storage: str | None = None, memory_bytes: int | None = None) -> tuple[str, str]:
    """The ``data.order`` for a data set where it lies, and why, in words.

    Args:
        dataset: the data set.
        storage: what it lies on, see :func:`storage_of`; found by default.
        memory_bytes: of the machine; found by default.
    """
    storage = storage_of(dataset.path) if storage is None else storage
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if memory_bytes is None else memory_bytes
    size = sum(dataset.store.sizes())
    figures = f"{size / 1e9:,.1f} GB on {storage}"
    if storage == "fast storage":
        return "global", f"{figures}, which reads at random as fast as in a row"
    if size <= memory // 2:
        return "global", f"{figures}, which fit into half the memory ({memory / 1e9:,.0f} GB): read once, then cached"
    reason = f"{figures}, which is slow at random reads, and too large to be cached"
    labels = np.asarray(dataset.labels[dataset.kept])
    alike = float((labels[1:] == labels[:-1]).mean()) if len(labels) > 1 else 0.0
    counts = np.bincount(labels)
    chance = float(((counts / max(1, len(labels))) ** 2).sum())
    if alike > 0.5 and alike > 4 * chance:
        reason += (
            "; its records are sorted by class, so a batch would share classes about (GB of the file) / (GB of "
            "data.buffer_bytes) times as often as at random: `lce pack` shuffles it once"
        )
    return "blocks", reason


def storage_of(path: Path) -> str:
    """``network storage (TYPE)``, ``a disk`` (one that turns) or ``fast storage``, by what the system says."""
    kind = _file_system(path)
    if kind in _NETWORK or kind.startswith("fuse."):
        return f"network storage ({kind})"
    number = path.stat().st_dev
    block = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    for device in (block, block.resolve().parent):  # a partition's queue is that of its disk
        with contextlib.suppress(OSError):
            return "a disk" if (device / "queue" / "rotational").read_text().strip() == "1" else "fast storage"
    return "fast storage"


def _file_system(path: Path) -> str:
    """The type of the file system that holds a folder, as Linux names it; empty: not known."""
    number = path.stat().st_dev
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            if before.split()[2] == f"{os.major(number)}:{os.minor(number)}":
                return after.split()[0]
    return ""


_NETWORK = frozenset({"nfs", "nfs4", "lustre", "cifs", "smb3", "ceph", "beegfs", "gpfs", "9p", "afs", "glusterfs"})
