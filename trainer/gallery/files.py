"""Upgrade of a gallery file or folder: converted next to it, resumable at any moment, swapped in, and back again.

Next to ``NAME`` lies ``NAME.upgrade/`` with ``state.json``, ``vectors.npy`` (what is converted so far), ``order.npy``
(which row comes when, where an order was asked for) and, after the swap, ``before``: the old file. Rows are written and
flushed before the state counts them, and each row's place is its own, so a process killed at any moment loses no row
and does none twice; so are rollback and finish. While rows are converted :func:`search` compares each in the space that
it is in. A link stands for the gallery that it names.

One process at a time changes a gallery (:mod:`trainer.owner`). The old file must stay as it is until the swap: its
size, time and identity are compared at every batch, before the swap and after it. What ``finish`` leaves is a state
that says which conversions the vectors went through, so that none is applied twice; kinds of files with metadata say so
themselves as well.
"""

import json
import os
import shutil
import time
import zlib
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
from trainer.gallery.convert import Converter, check_direction, usable
from trainer.gallery.formats import Format, batches
from trainer.gallery.open import open_gallery
from trainer.owner import owned

Phase = Literal["converting", "swapping", "swapped", "rolling back", "finished"]


@dataclass(frozen=True)
class State:
    """Where an upgrade stands.

    Attributes:
        source: size and time of the old file, which must not change meanwhile. result: those of the new one when it was
            swapped in.
        ordered: rows are done in the order of ``order.npy``, else in that of the file.
        applied: the conversions before this one.
    """

    version: str
    rows: int
    dim_in: int
    dim_out: int
    done: int
    phase: Phase
    source: tuple[int, int]
    ordered: bool = False
    applied: tuple[str, ...] = ()
    result: tuple[int, int] | None = None

    @property
    def through(self) -> tuple[str, ...]:
        """The conversions that the vectors under the gallery's name went through."""
        return (*self.applied, self.version) if self.phase in ("swapped", "finished") else self.applied


@dataclass(frozen=True)
class Plan:
    """What an upgrade takes: rows, dimensions, bytes needed next to the file, seconds estimated from a sample, and what
    the new file cannot keep of the old one."""

    rows: int
    dim_in: int
    dim_out: int
    bytes_needed: int
    bytes_free: int
    seconds: float
    not_kept: list[str]


@dataclass(frozen=True)
class Check:
    """A verified sample.

    Attributes:
        rows: how many were re-computed. smallest_cosine: of these to what is stored.
        rows_before, rows_now: of the whole gallery. missing: sampled rows that are not in the new one.
        recall: of an approximate index, the share of the 10 exact neighbours of sampled rows that it finds;
            recall_before: that of the old index. None for arrays, whose search is exact.
    """

    rows: int
    smallest_cosine: float
    recall: float | None = None
    recall_before: float | None = None
    rows_before: int = 0
    rows_now: int = 0
    missing: int = 0


def work_folder(path: Path) -> Path:
    """The folder next to a gallery file in which its upgrade lives."""
    path = path.resolve()
    return path.with_name(f"{path.name}.upgrade")


def status(path: Path) -> State | None:
    """The state of a gallery file's upgrade; None when there is none. Raises :class:`DataError` if it is damaged."""
    file = work_folder(path) / "state.json"
    if not file.exists():
        return None
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        result = tree.get("result")
        lists = {"source": tuple(tree["source"]), "applied": tuple(tree.get("applied", ()))}
        return State(**{**tree, **lists, "result": None if result is None else tuple(result)})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        kept = f"; move {_before(path)}, the old gallery, to safety, and" if _before(path).exists() else ";"
        raise DataError(f"{file}: damaged ({error}){kept} remove {file.parent} to begin anew") from None


def plan(path: Path, converter: Converter, sample: int = 1000) -> Plan:
    """What :func:`upgrade` would take; a sample is converted to estimate the time. Raises :class:`DataError`."""
    gallery, state = open_gallery(path), status(path)
    if state is None or state.phase == "finished":
        _check_new(path, gallery, state, converter)
    _check_dimension(path, gallery.dim, converter)
    count = min(sample, gallery.rows)
    converter(gallery.ids(slice(0, 1)), gallery.read(slice(0, 1)))  # the first call takes longer than its share
    start = time.perf_counter()
    converter(gallery.ids(slice(0, count)), gallery.read(slice(0, count)))
    seconds = (time.perf_counter() - start) / count * gallery.rows
    room = _room(path, gallery, converter)
    return Plan(gallery.rows, gallery.dim, converter.dim_out, *room, seconds, gallery.changes(converter.dim_out))


def _room(path: Path, gallery: Format, converter: Converter) -> tuple[int, int]:
    """Bytes needed next to a gallery, of the vectors and of the new file, and bytes free there."""
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
        DataError: an upgrade to another version is under way or done, or this one was finished before; the file changed
            meanwhile, another process changes the gallery, no room, a folder that cannot be written, wrong dimension.
        ModelError: the converter gives vectors that cannot be used.
    """
    path = _there(path)
    with owned(path, DataError):
        return _upgrade(path, converter, order, batch, rows_per_second, progress)


def _there(path: Path) -> Path:
    """The gallery that a path or a link names, if it or its upgrade is there. Raises :class:`DataError`."""
    if not path.exists() and not work_folder(path).exists():
        raise DataError(f"{path}: no such gallery file")
    return path.resolve()


def _upgrade(
    path: Path,
    converter: Converter,
    order: IntArray | None,
    batch: int,
    rows_per_second: float | None,
    progress: Callable[[int, int], None] | None,
) -> State:
    state = status(path)
    if state is not None and state.phase == "finished":
        _check_new(path, open_gallery(path), state, converter)
        before, state = state.through, None
        with _written(path):
            _clear(work_folder(path))  # of a `finish` that was cut off
    else:
        before = () if state is None else state.applied
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
            state = _convert(path, converter, state, before, order, batch, rows_per_second, progress)
        return _swap(path, state)


def _check_new(path: Path, gallery: Format, state: State | None, converter: Converter) -> None:
    """Whether a conversion may begin: its result must not be there already, and it must come from what is there.

    Raises:
        DataError: it would convert converted vectors, or several rows would become the same picture's.
    """
    known = gallery.applied
    if state is not None and not (gallery.dim == state.dim_in != state.dim_out):  # else it was replaced by an old one
        known = known or state.through
    check_direction(str(path), known, converter, f"remove {work_folder(path)}")
    if converter.by_id:
        names, counts = np.unique(gallery.ids(slice(0, gallery.rows)), return_counts=True)
        if counts.max() > 1:
            raise DataError(
                f"{path}: {counts.max()} vectors have the id {names[counts.argmax()]}, so that it names no picture; "
                "convert the vectors instead (without `images`)"
            )


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """What the file system refuses is one clear error."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or work_folder(path)}: {error.strerror or error}; the gallery is whole, and the same "
            "command goes on once that is repaired"
        ) from None


def _convert(
    path: Path,
    converter: Converter,
    state: State | None,
    before: tuple[str, ...],
    order: IntArray | None,
    batch: int,
    rows_per_second: float | None,
    progress: Callable[[int, int], None] | None,
) -> State:
    source = _stamp(path)
    gallery = open_gallery(path)
    if state is None:
        _check_new(path, gallery, None, converter)
        before = before or gallery.applied
    _check_dimension(path, gallery.dim, converter)
    work, inode = work_folder(path), path.stat().st_ino
    vectors = work / "vectors.npy"
    if state is None:
        gallery.changes(converter.dim_out)  # what cannot be built is refused before it is converted
        state = _prepare(path, gallery, converter, order, before, source)
    elif state.source != source:
        raise DataError(f"{path}: changed since its upgrade began; roll back and begin anew")
    kept_order = np.load(work / "order.npy", mmap_mode="r", allow_pickle=False) if state.ordered else None
    out = np.lib.format.open_memmap(vectors, "r+")
    began, first = time.perf_counter(), state.done
    for start, stop in batches(gallery.rows, state.done, batch):
        rows = slice(start, stop) if kept_order is None else np.array(kept_order[start:stop])
        ids = gallery.ids(rows)
        old = gallery.read(rows)
        _check_source(path, state, inode)
        out[rows] = converter(ids, usable(old, ids, str(path)))
        out.flush()
        state = replace(state, done=stop)
        _save(work, state)
        if progress is not None:
            progress(stop, gallery.rows)
        if rows_per_second is not None:
            time.sleep(max(0.0, (stop - first) / rows_per_second - (time.perf_counter() - began)))
    partial = work / f"partial{path.suffix}"
    gallery.build(out, partial, (*state.applied, state.version))
    _check_source(path, state, inode)
    _same_rights(path, partial)
    partial.rename(_new(path))
    state = replace(state, phase="swapping")
    _save(work, state)
    return state


def _check_source(path: Path, state: State, inode: int) -> None:
    """Raises :class:`DataError` if the old file is not what it was when its upgrade began."""
    with suppress(OSError):
        if path.stat().st_ino == inode and _stamp(path) == state.source:
            return
    raise _written_to(path)


def _written_to(path: Path) -> DataError:
    return DataError(
        f"{path}: was written to, replaced or removed while its upgrade ran, and nothing was swapped; stop what writes "
        "to it, roll back (which keeps the file as it is now) and upgrade again"
    )


def _same_rights(old: Path, new: Path) -> None:
    """Who may read and write the new gallery is who may the old one (the owner as far as this user may set it)."""
    parts = [(old, new), *((old / part.name, part) for part in (new.iterdir() if new.is_dir() else ()))]
    for before, now in parts:
        with suppress(OSError):
            os.chown(now, before.stat().st_uid, before.stat().st_gid)
        shutil.copymode(before, now)


def _prepare(
    path: Path,
    gallery: Format,
    converter: Converter,
    order: IntArray | None,
    before: tuple[str, ...],
    source: tuple[int, int],
) -> State:
    """Room for the new vectors, the order, and the first state."""
    work = work_folder(path)
    needed, free = _room(path, gallery, converter)
    if _before(path).exists():
        raise DataError(f"{_before(path)}: the old gallery of an upgrade without its state; move it away first")
    if needed > free:
        raise DataError(f"{path}: needs {needed:,} bytes next to it, {free:,} are free")
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
        source,
        order is not None,
        before,
    )
    _save(work, state)
    return state


def _swap(path: Path, state: State) -> State:
    """Both renames, whichever of them an earlier call has already made.

    Raises:
        DataError: the old file changed up to the swap; it has its name again.
    """
    work, before, new = work_folder(path), _before(path), _new(path)
    if new.exists():
        if not before.exists():
            if path.is_dir():
                path.rename(before)  # a folder is missing between the two renames, and whole before and after
            else:
                os.link(path, before)
        if _stamp(before) != state.source or (path.is_file() and not path.samefile(before)):
            if before.is_dir():
                before.rename(path)
            else:
                before.unlink()
            raise _written_to(path)
        new.rename(path)  # a file in one step: at every moment the name holds a whole gallery
    if before.exists() and _stamp(before) != state.source:  # by a process that had it open
        if path.is_dir():
            path.rename(new)
        before.rename(path)
        raise _written_to(path)
    for left in ("vectors.npy", "order.npy"):
        (work / left).unlink(missing_ok=True)
    state = replace(state, phase="swapped", result=_stamp(path))
    _save(work, state)
    return state


def rollback(path: Path) -> Path | None:
    """Put the old file back and remove what was converted; what was interrupted goes on with the next call.

    Returns:
        Where the new file is kept, if it was written to after the swap, so that nothing enrolled in it is lost.

    Raises:
        DataError: there is no upgrade, the old file is gone, another process changes the gallery, or the folder cannot
            be written.
    """
    path = _there(path)
    with owned(path, DataError):
        state, work, kept = status(path), work_folder(path), None
        if state is None or state.phase == "finished":
            raise DataError(f"{path}: has no upgrade to roll back")
        if state.phase == "swapped" and not _before(path).exists():
            raise DataError(f"{_before(path)}: the old gallery is gone; there is no way back")
        with _written(path):
            if state.phase == "swapped" and path.exists() and state.result not in (None, _stamp(path)):
                kept = path.with_name(f"{path.name}.after")
                if kept.exists():
                    raise DataError(f"{kept}: keeps an earlier gallery; move it away first")
                shutil.copytree(path, kept) if path.is_dir() else shutil.copy2(path, kept)
            _save(work, replace(state, phase="rolling back"))
            if _before(path).exists():
                if path.is_dir():
                    path.rename(work / "after")
                _before(path).rename(path)
            _remove(work)
            if state.applied:
                _keep_history(path, state)
    return kept


def _keep_history(path: Path, state: State) -> None:
    """The state that the upgrade before a rolled back one had left."""
    work = work_folder(path)
    work.mkdir(exist_ok=True)
    *earlier, last = state.applied
    rows, dim = state.rows, state.dim_in
    _save(work, State(last, rows, dim, dim, rows, "finished", (0, 0), applied=tuple(earlier)))


def finish(path: Path) -> None:
    """Remove the old file that a rollback would need: the upgrade is final, and the next one may begin. What stays is
    a ``state.json`` that says what was converted.

    Raises:
        DataError: not upgraded, somebody wrote to the old file after the swap, another process changes the gallery, or
            the folder cannot be written.
    """
    path = _there(path)
    with owned(path, DataError):
        state, work, before = status(path), work_folder(path), _before(path)
        if state is None or state.phase not in ("swapped", "finished"):
            raise DataError(f"{path}: is not upgraded; there is nothing to finish")
        if before.exists() and _stamp(before) != state.source:
            raise DataError(
                f"{before}: was written to after the swap, by a process that had the old gallery open, and what it "
                f"wrote is not in {path.name}: enrol it again and remove {before}, or roll back"
            )
        with _written(path):
            _save(work, replace(state, phase="finished"))
            _clear(work)


def _clear(work: Path) -> None:
    """Remove all but the state."""
    for left in work.iterdir():
        if left.name != "state.json":
            shutil.rmtree(left) if left.is_dir() else left.unlink()


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
    is_new = np.full(gallery.rows, state is not None and state.phase in ("swapped", "finished"))
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
    if new.dim != converter.dim_out:
        raise DataError(f"{path}: holds vectors of dimension {new.dim}, the upgrade made {converter.dim_out}")
    rows = np.sort(np.random.default_rng(seed).choice(old.rows, min(sample, old.rows), replace=False))
    at = _positions(old, new, rows)
    missing, rows, at = int((at < 0).sum()), rows[at >= 0], at[at >= 0]
    stored, smallest = new.read(at), 2.0 if len(rows) else -1.0
    for start, stop in batches(len(rows), 0, 256):
        made: FloatArray = converter(old.ids(rows[start:stop]), old.read(rows[start:stop]))
        smallest = min(smallest, smallest_cosine(made, stored[start:stop]))
    recalls = (_recall(new, at), _recall(old, rows)) if len(rows) else (None, None)
    return Check(len(rows), smallest, *recalls, old.rows, new.rows, missing)


def sample(path: Path, count: int, seed: int = 0) -> tuple[IntArray, list[FloatArray]]:
    """Ids and stored vectors of random rows, whatever space they are in."""
    gallery = open_gallery(path)
    rows = np.sort(np.random.default_rng(seed).choice(gallery.rows, min(count, gallery.rows), replace=False))
    return gallery.ids(rows), list(gallery.read(rows))


def _positions(old: Format, new: Format, rows: IntArray) -> IntArray:
    """Where rows (n,) of the old gallery stand in the new one (n,); −1: nowhere. By number while the ids agree, else by
    id."""
    every = new.ids(slice(0, new.rows))
    same = min(old.rows, new.rows)
    if np.array_equal(old.ids(slice(0, same)), every[:same]):
        return np.where(rows < new.rows, rows, -1)
    order = np.argsort(every, kind="stable")
    ids = old.ids(rows)
    at = np.minimum(np.searchsorted(every[order], ids), new.rows - 1)
    return np.where(every[order][at] == ids, order[at], -1)


def smallest_cosine(made: FloatArray, stored: FloatArray) -> float:
    """The smallest cosine of re-computed unit vectors (n, D) to the stored ones; −1 if one of these is zero or not
    finite."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        cosines = np.einsum("nd,nd->n", made, stored) / np.linalg.norm(stored, axis=1)
    return float(np.nan_to_num(cosines, nan=-1.0, posinf=-1.0, neginf=-1.0).min())


def _recall(gallery: Format, rows: IntArray, k: int = 10) -> float | None:
    """The share of the ``k`` exact neighbours of up to 200 stored rows that an index finds itself."""
    search: Callable[[FloatArray, int], IntArray] | None = getattr(gallery, "search", None)
    if search is None:
        return None
    queries, k = gallery.read(rows[:: max(1, len(rows) // 200)]), min(k, gallery.rows)
    exact = gallery.ids(search_exactly(queries, gallery.read(slice(0, gallery.rows)), k)[1].ravel()).reshape(-1, k)
    found = search(queries, k)
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
    """Bytes and time of a file; of a folder the bytes of its files, and a number of their names, sizes and times."""
    if not path.is_dir():
        stat = path.stat()
        return stat.st_size, stat.st_mtime_ns
    found = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in path.iterdir())
    return sum(size for _, size, _ in found), zlib.crc32(repr(found).encode())


def _save(work: Path, state: State) -> None:
    write_text(work / "state.json", json.dumps(asdict(state)))
