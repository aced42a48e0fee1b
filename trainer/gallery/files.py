"""Upgrade of a gallery file: converted into a folder beside it, resumable at any moment, swapped in, and back again.

Beside ``NAME`` lies ``NAME.upgrade/`` with ``state.json``, ``vectors.npy`` (what is converted so far) and, after the
swap, ``before``: the old file. Rows are written and flushed before the state counts them, and each row's place is its
own, so a process killed at any moment loses no row and does none twice.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from trainer.errors import DataError
from trainer.evaluation.arrays import FloatArray
from trainer.gallery.convert import Converter
from trainer.gallery.formats import batches, open_gallery

Phase = Literal["converting", "swapping", "swapped"]


@dataclass(frozen=True)
class State:
    """Where an upgrade stands. source: size and time of the old file, which must not change meanwhile."""

    version: str
    rows: int
    dim_in: int
    dim_out: int
    done: int
    phase: Phase
    source: tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """What an upgrade takes: rows, dimensions, bytes needed beside the file, seconds estimated from a sample."""

    rows: int
    dim_in: int
    dim_out: int
    bytes_needed: int
    bytes_free: int
    seconds: float


@dataclass(frozen=True)
class Check:
    """A verified sample: rows re-computed, their smallest cosine to what is stored."""

    rows: int
    smallest_cosine: float


def work_folder(path: Path) -> Path:
    """The folder beside a gallery file in which its upgrade lives."""
    return path.with_name(f"{path.name}.upgrade")


def status(path: Path) -> State | None:
    """The state of a gallery file's upgrade; None when there is none. Raises :class:`DataError` if it is damaged."""
    file = work_folder(path) / "state.json"
    if not file.exists():
        return None
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        return State(**{**tree, "source": tuple(tree["source"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{file}: damaged ({error}); remove {file.parent} to begin anew") from None


def plan(path: Path, converter: Converter, sample: int = 1000) -> Plan:
    """What :func:`upgrade` would take; a sample is converted to estimate the time. Raises :class:`DataError`."""
    gallery = open_gallery(path)
    _check_dimension(path, gallery.dim, converter)
    count = min(sample, gallery.rows)
    start = time.perf_counter()
    converter(gallery.ids(0, count), gallery.read(0, count))
    seconds = (time.perf_counter() - start) / count * gallery.rows
    needed = gallery.rows * converter.dim_out * 4 + int(path.stat().st_size * converter.dim_out / gallery.dim)
    free = shutil.disk_usage(path.absolute().parent).free
    return Plan(gallery.rows, gallery.dim, converter.dim_out, needed, free, seconds)


def upgrade(
    path: Path,
    converter: Converter,
    *,
    batch: int = 1 << 14,
    rows_per_second: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> State:
    """Convert a gallery file and swap the result in; continues what an earlier, interrupted call has done.

    Args:
        rows_per_second: an upper limit of the pace.

    Raises:
        DataError: an upgrade to another version is under way or done, the file changed meanwhile, no room, wrong
        dimension.
        ModelError: the converter gives vectors that cannot be used.
    """
    state = status(path)
    if state is not None and state.version != converter.version:
        raise DataError(
            f"{path}: an upgrade to {state.version} is {state.phase}; roll it back before one to {converter.version}"
        )
    if state is not None and state.phase == "swapped":
        return state
    if state is None or state.phase == "converting":
        state = _convert(path, converter, state, batch, rows_per_second, progress)
    return _swap(path, state)


def _convert(
    path: Path,
    converter: Converter,
    state: State | None,
    batch: int,
    rows_per_second: float | None,
    progress: Callable[[int, int], None] | None,
) -> State:
    gallery = open_gallery(path)
    _check_dimension(path, gallery.dim, converter)
    work = work_folder(path)
    vectors = work / "vectors.npy"
    if state is None:
        needed, free = gallery.rows * converter.dim_out * 4, shutil.disk_usage(path.absolute().parent).free
        if needed > free:
            raise DataError(f"{path}: needs {needed:,} bytes beside it, {free:,} are free")
        work.mkdir(exist_ok=True)
        np.lib.format.open_memmap(vectors, "w+", np.float32, (gallery.rows, converter.dim_out)).flush()
        state = State(converter.version, gallery.rows, gallery.dim, converter.dim_out, 0, "converting", _stamp(path))
        _save(work, state)
    elif state.source != _stamp(path):
        raise DataError(f"{path}: changed since its upgrade began; roll back and begin anew")
    out = np.lib.format.open_memmap(vectors, "r+")
    began, first = time.perf_counter(), state.done
    for start, stop in batches(gallery.rows, state.done, batch):
        out[start:stop] = converter(gallery.ids(start, stop), gallery.read(start, stop))
        out.flush()
        state = replace(state, done=stop)
        _save(work, state)
        if progress is not None:
            progress(stop, gallery.rows)
        if rows_per_second is not None:
            time.sleep(max(0.0, (stop - first) / rows_per_second - (time.perf_counter() - began)))
    partial = work / f"partial{path.suffix}"
    gallery.build(out, partial)
    partial.rename(_new(path))
    state = replace(state, phase="swapping")
    _save(work, state)
    return state


def _swap(path: Path, state: State) -> State:
    """Both renames, whichever of them an earlier call has already made."""
    work = work_folder(path)
    if _new(path).exists():
        if not _before(path).exists():
            os.link(path, _before(path))
        _new(path).rename(path)  # in one step: at every moment the name holds a whole gallery
    (work / "vectors.npy").unlink(missing_ok=True)
    state = replace(state, phase="swapped")
    _save(work, state)
    return state


def rollback(path: Path) -> None:
    """Put the old file back and remove what was converted. Raises :class:`DataError` if there is no upgrade."""
    if status(path) is None:
        raise DataError(f"{path}: has no upgrade to roll back")
    work = work_folder(path)
    if _before(path).exists():
        _before(path).rename(path)
    shutil.rmtree(work)


def verify(path: Path, converter: Converter, sample: int = 1000, seed: int = 0) -> Check:
    """Re-compute a random sample from the old file and compare with the upgraded one.

    Raises:
        DataError: not upgraded, or by another model.
    """
    state = status(path)
    if state is None or state.phase != "swapped" or state.version != converter.version:
        raise DataError(f"{path}: is not upgraded to {converter.version}; `lce gallery status` says where it stands")
    old, new = open_gallery(_before(path)), open_gallery(path)
    rows = np.sort(np.random.default_rng(seed).choice(old.rows, min(sample, old.rows), replace=False))
    smallest = 2.0
    for at in rows:
        made: FloatArray = converter(old.ids(at, at + 1), old.read(at, at + 1))
        stored = new.read(at, at + 1)
        smallest = min(smallest, float((made * stored).sum() / np.linalg.norm(stored)))
    return Check(len(rows), smallest)


def _before(path: Path) -> Path:
    return work_folder(path) / f"before{path.suffix}"


def _new(path: Path) -> Path:
    return work_folder(path) / f"new{path.suffix}"


def _check_dimension(path: Path, dim: int, converter: Converter) -> None:
    if dim != converter.dim_in:
        raise DataError(
            f"{path}: holds vectors of dimension {dim}, the conversion takes {converter.dim_in}: not the old model's"
        )


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _save(work: Path, state: State) -> None:
    partial = work / "state.json.partial"
    with partial.open("w", encoding="utf-8") as file:
        json.dump(asdict(state), file)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(work / "state.json")
