"""Upgrade of a gallery file or folder: converted beside it, resumable at any moment, swapped in, and back again.

Beside ``NAME`` lies ``NAME.upgrade/`` with ``state.json``, ``vectors.npy`` (what is converted so far), ``order.npy``
(which row comes when, where an order was asked for) and, after the swap, ``before``: the old file. Rows are written and
flushed before the state counts them, and each row's place is its own, so a process killed at any moment loses no row
and does none twice; so are rollback and finish. While rows are converted :func:`search` compares each in the space that
it is in. A link stands for the gallery that it names.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from trainer.errors import DataError
from trainer.evaluation.arrays import FloatArray, IntArray
from trainer.evaluation.identification import search as search_exactly
from trainer.files import write_text
from trainer.gallery.convert import Converter, usable
from trainer.gallery.formats import FaissGallery, Format, batches, open_gallery

Phase = Literal["converting", "swapping", "swapped", "rolling back"]


@dataclass(frozen=True)
class State:
    """Where an upgrade stands. source: size and time of the old file, which must not change meanwhile; ordered: rows
    are done in the order of ``order.npy``, else in that of the file."""

    version: str
    rows: int
    dim_in: int
    dim_out: int
    done: int
    phase: Phase
    source: tuple[int, int]
    ordered: bool = False


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
    """A verified sample: rows re-computed, and their smallest cosine to what is stored.

    recall: of an approximate index, the share of the 10 exact neighbours of sampled rows that it finds; recall_before:
    that of the old index. None for arrays, whose search is exact.
    """

    rows: int
    smallest_cosine: float
    recall: float | None = None
    recall_before: float | None = None


def work_folder(path: Path) -> Path:
    """The folder beside a gallery file in which its upgrade lives."""
    path = path.resolve()
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
        kept = f"; move {_before(path)}, the old gallery, to safety, and" if _before(path).exists() else ";"
        raise DataError(f"{file}: damaged ({error}){kept} remove {file.parent} to begin anew") from None


def plan(path: Path, converter: Converter, sample: int = 1000) -> Plan:
    """What :func:`upgrade` would take; a sample is converted to estimate the time. Raises :class:`DataError`."""
    gallery = open_gallery(path)
    _check_dimension(path, gallery.dim, converter)
    count = min(sample, gallery.rows)
    converter(gallery.ids(slice(0, 1)), gallery.read(slice(0, 1)))  # the first call takes longer than its share
    start = time.perf_counter()
    converter(gallery.ids(slice(0, count)), gallery.read(slice(0, count)))
    seconds = (time.perf_counter() - start) / count * gallery.rows
    return Plan(gallery.rows, gallery.dim, converter.dim_out, *_room(path, gallery, converter), seconds)


def _room(path: Path, gallery: Format, converter: Converter) -> tuple[int, int]:
    """Bytes needed beside a gallery, of the vectors and of the new file, and bytes free there."""
    needed = gallery.rows * converter.dim_out * 4 + int(_stamp(path)[0] * converter.dim_out / gallery.dim)
    return needed, shutil.disk_usage(path.resolve().parent).free


def upgrade(
    path: Path,
    converter: Converter,
    *,
    order: IntArray | None = None,
    batch: int = 1 << 14,
    rows_per_second: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> State:
    """Convert a gallery file and swap the result in; continues what an earlier, interrupted call has done.

    Args:
        order: row numbers (rows,), each once, in the order in which they are converted (see
            :mod:`trainer.gallery.orders`); an upgrade that continues keeps the order that it began with.
        rows_per_second: an upper limit of the pace.

    Raises:
        DataError: an upgrade to another version is under way or done, the file changed meanwhile, no room, a folder
            that cannot be written, wrong dimension.
        ModelError: the converter gives vectors that cannot be used.
    """
    path = path.resolve()
    state = status(path)
    if state is not None and state.phase == "rolling back":
        raise DataError(f"{path}: is being rolled back; run the rollback again")
    if state is not None and state.version != converter.version:
        raise DataError(
            f"{path}: an upgrade to {state.version} is {state.phase}; finish it or roll it back before one to "
            f"{converter.version}"
        )
    if state is not None and state.phase == "swapped":
        return state
    with _written(path):
        if state is None or state.phase == "converting":
            state = _convert(path, converter, state, order, batch, rows_per_second, progress)
        return _swap(path, state)


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """What the file system refuses is one clear error."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or work_folder(path)}: {error.strerror or error}; the gallery is whole, and the same "
            "command goes on once that is mended"
        ) from None


def _convert(
    path: Path,
    converter: Converter,
    state: State | None,
    order: IntArray | None,
    batch: int,
    rows_per_second: float | None,
    progress: Callable[[int, int], None] | None,
) -> State:
    gallery = open_gallery(path)
    _check_dimension(path, gallery.dim, converter)
    work = work_folder(path)
    vectors = work / "vectors.npy"
    if state is None:
        state = _prepare(path, gallery, converter, order)
    elif state.source != _stamp(path):
        raise DataError(f"{path}: changed since its upgrade began; roll back and begin anew")
    kept_order = np.load(work / "order.npy", mmap_mode="r", allow_pickle=False) if state.ordered else None
    out = np.lib.format.open_memmap(vectors, "r+")
    began, first = time.perf_counter(), state.done
    for start, stop in batches(gallery.rows, state.done, batch):
        rows = slice(start, stop) if kept_order is None else np.array(kept_order[start:stop])
        ids = gallery.ids(rows)
        out[rows] = converter(ids, usable(gallery.read(rows), ids, str(path)))
        out.flush()
        state = replace(state, done=stop)
        _save(work, state)
        if progress is not None:
            progress(stop, gallery.rows)
        if rows_per_second is not None:
            time.sleep(max(0.0, (stop - first) / rows_per_second - (time.perf_counter() - began)))
    partial = work / f"partial{path.suffix}"
    gallery.build(out, partial)
    _same_rights(path, partial)
    partial.rename(_new(path))
    state = replace(state, phase="swapping")
    _save(work, state)
    return state


def _same_rights(old: Path, new: Path) -> None:
    """Who may read and write the new gallery is who may the old one (the owner as far as this user may set it)."""
    parts = [(old, new), *((old / part.name, part) for part in (new.iterdir() if new.is_dir() else ()))]
    for before, now in parts:
        with suppress(OSError):
            os.chown(now, before.stat().st_uid, before.stat().st_gid)
        shutil.copymode(before, now)


def _prepare(path: Path, gallery: Format, converter: Converter, order: IntArray | None) -> State:
    """Room for the new vectors, the order, and the first state."""
    work = work_folder(path)
    needed, free = _room(path, gallery, converter)
    if _before(path).exists():
        raise DataError(f"{_before(path)}: the old gallery of an upgrade without its state; move it away first")
    if needed > free:
        raise DataError(f"{path}: needs {needed:,} bytes beside it, {free:,} are free")
    if order is not None and not np.array_equal(np.sort(order), np.arange(gallery.rows)):
        raise DataError(f"{path}: an order must name each of the {gallery.rows:,} rows once")
    work.mkdir(exist_ok=True)
    np.lib.format.open_memmap(work / "vectors.npy", "w+", np.float32, (gallery.rows, converter.dim_out)).flush()
    if order is not None:
        np.save(work / "order.npy", order)
    state = State(
        converter.version,
        gallery.rows,
        gallery.dim,
        converter.dim_out,
        0,
        "converting",
        _stamp(path),
        order is not None,
    )
    _save(work, state)
    return state


def _swap(path: Path, state: State) -> State:
    """Both renames, whichever of them an earlier call has already made."""
    work = work_folder(path)
    if _new(path).exists():
        if not _before(path).exists():
            if path.is_dir():
                path.rename(_before(path))  # a folder is missing between the two renames, and whole before and after
            else:
                os.link(path, _before(path))
        _new(path).rename(path)  # a file in one step: at every moment the name holds a whole gallery
    for left in ("vectors.npy", "order.npy"):
        (work / left).unlink(missing_ok=True)
    state = replace(state, phase="swapped")
    _save(work, state)
    return state


def rollback(path: Path) -> None:
    """Put the old file back and remove what was converted; what was interrupted goes on with the next call.

    Raises:
        DataError: there is no upgrade, the old file is gone, or the folder cannot be written.
    """
    path = path.resolve()
    state, work = status(path), work_folder(path)
    if state is None:
        raise DataError(f"{path}: has no upgrade to roll back")
    if state.phase == "swapped" and not _before(path).exists():
        raise DataError(f"{_before(path)}: the old gallery is gone; there is no way back")
    with _written(path):
        _save(work, replace(state, phase="rolling back"))
        if _before(path).exists():
            if path.is_dir():
                path.rename(work / "after")
            _before(path).rename(path)
        _remove(work)


def finish(path: Path) -> None:
    """Remove the old file that a rollback would need: the upgrade is final, and the next one may begin.

    Raises:
        DataError: not upgraded, or the folder cannot be written.
    """
    state = status(path)
    if state is None or state.phase != "swapped":
        raise DataError(f"{path}: is not upgraded; there is nothing to finish")
    with _written(path):
        _remove(work_folder(path))


def _remove(work: Path) -> None:
    """Remove the folder, in one step as far as anybody can see."""
    gone = work.with_name(f"{work.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)  # of a call that was killed
    work.rename(gone)
    shutil.rmtree(gone)


def search(path: Path, as_old: FloatArray | None, as_new: FloatArray, k: int) -> list[tuple[int, float]]:
    """The ``k`` nearest rows of a gallery in any phase: (id, cosine), best first; exact.

    Args:
        as_old: the query (D1,), unit, as it meets an old row; None once no old row is left. as_new: as it meets a new
            one (D2,), unit.

    While rows are being converted each is compared in the space it is in.

    Raises:
        DataError: old rows and no ``as_old``, or the gallery is just being swapped.
    """
    state = status(path)
    gallery = open_gallery(path)
    if state is not None and state.phase == "swapping":
        raise DataError(f"{path}: is being swapped; run the upgrade again if it was interrupted")
    is_new = np.full(gallery.rows, state is not None and state.phase == "swapped")
    new: FloatArray | None = None
    if state is not None and state.phase == "converting":
        work = work_folder(path)
        is_new[np.load(work / "order.npy")[: state.done] if state.ordered else slice(0, state.done)] = True
        new = np.load(work / "vectors.npy", mmap_mode="r", allow_pickle=False)
    if as_old is None and not is_new.all():
        raise DataError(f"{path}: holds old rows; give the query as it meets them too")
    best = np.empty(0, np.int64), np.empty(0)
    for start, stop in batches(gallery.rows, 0, 1 << 14):
        cosines = np.empty(stop - start)
        for kind, query in ((True, as_new), (False, as_old)):
            rows = start + np.flatnonzero(is_new[start:stop] == kind)
            if query is not None and len(rows):
                found = new[rows] if kind and new is not None else gallery.read(rows)
                cosines[rows - start] = (found @ query) / np.linalg.norm(found, axis=1)
        every = np.append(best[0], gallery.ids(slice(start, stop))), np.append(best[1], cosines)
        top = np.argsort(-every[1], kind="stable")[:k]
        best = every[0][top], every[1][top]
    return list(zip(best[0].tolist(), best[1].tolist(), strict=True))


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
    stored, smallest = new.read(rows), 2.0
    for start, stop in batches(len(rows), 0, 256):
        made: FloatArray = converter(old.ids(rows[start:stop]), old.read(rows[start:stop]))
        smallest = min(smallest, smallest_cosine(made, stored[start:stop]))
    return Check(len(rows), smallest, _recall(new, rows), _recall(old, rows))


def smallest_cosine(made: FloatArray, stored: FloatArray) -> float:
    """The smallest cosine of re-computed unit vectors (n, D) to the stored ones; −1 if one of these is zero or not
    finite."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        cosines = np.einsum("nd,nd->n", made, stored) / np.linalg.norm(stored, axis=1)
    return float(np.nan_to_num(cosines, nan=-1.0, posinf=-1.0, neginf=-1.0).min())


def _recall(gallery: Format, rows: IntArray, k: int = 10) -> float | None:
    """The share of the ``k`` exact neighbours of up to 200 stored rows that an index finds itself."""
    if not isinstance(gallery, FaissGallery):
        return None
    queries, k = gallery.read(rows[:: max(1, len(rows) // 200)]), min(k, gallery.rows)
    exact = gallery.ids(search_exactly(queries, gallery.read(slice(0, gallery.rows)), k)[1].ravel()).reshape(-1, k)
    found = gallery.search(queries, k)
    return float(np.mean([np.isin(e, f).mean() for e, f in zip(exact, found, strict=True)]))


def _before(path: Path) -> Path:
    return work_folder(path) / f"before{path.resolve().suffix}"


def _new(path: Path) -> Path:
    return work_folder(path) / f"new{path.resolve().suffix}"


def _check_dimension(path: Path, dim: int, converter: Converter) -> None:
    if dim != converter.dim_in:
        raise DataError(
            f"{path}: holds vectors of dimension {dim}, the conversion takes {converter.dim_in}: not the old model's"
        )


def _stamp(path: Path) -> tuple[int, int]:
    """Bytes and newest time of a file, or of all files of a folder."""
    stats = [file.stat() for file in (path.iterdir() if path.is_dir() else [path])]
    return sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats)


def _save(work: Path, state: State) -> None:
    write_text(work / "state.json", json.dumps(asdict(state)))
