"""From a listing of images to a RecordIO data set: shuffled once, cut into parts, each written by one process.

The parts depend on the listing, the seed and the options alone: not on how many processes or machines write them. A
part is complete when its note in ``.pack/`` exists; a second run writes only what is missing, and ``dataset.yaml``
appears when nothing is. After that, a run writes the parts again whose files are missing or of another length.
"""

import contextlib
import hashlib
import io
import json
import math
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.data import recordio, store
from trainer.data.checksums import Sums, crcs_path, read_sums, sum_of_text, write_sums
from trainer.data.index import (
    DESCRIPTION,
    DatasetInfo,
    PartInfo,
    description_text,
    load_description,
    save_description,
)
from trainer.data.listing import Listing
from trainer.data.pixels import decode_image, image_problem, is_deep_png, upright_size
from trainer.data.processes import worker_context
from trainer.distributed import end_with_parent
from trainer.errors import ConfigError, DataError
from trainer.files import checksum, write_array, write_text
from trainer.owner import owned
from trainer.reading import open_regular, read_json
from trainer.seals import find_change

_SMALLEST_PART, _MOST_PARTS = 4096, 512
_COUNTED = 32  # images between two reports of progress
_STAMPS = ".pack"
_PLAN = "pack.json"
_LABELS, _NAMES = "labels.npy", "classes.txt"
_KEPT_FORMATS = ("JPEG", "PNG")
_MOST_PIXELS = 50_000_000
_DAMAGE = (OSError, ValueError, SyntaxError, DataError)  # what Pillow makes of damaged files, and ours of no files


@dataclass(frozen=True)
class PackOptions:
    """How images are packed.

    Attributes:
        size: (H, W) that images of another size are resized to (and re-encoded); None: sizes stay.
        encode: ``keep``: JPEG and PNG bytes stay as they are where nothing has to be changed, other formats and 16-bit
            PNGs become PNG; ``jpeg``, ``png``: every image is re-encoded.
        quality: of JPEG where it is encoded.
        seed: of the one shuffle; None keeps the listing's order.
        part_records: records per part; 0: at least 4,096, at most 512 parts.
        layout: ``insightface`` writes one part in class order with header record 0 and identity records.
        skip_damaged: leave out images that do not decode (they are listed in ``skipped.txt``) instead of stopping.
        max_pixels: an image of more counts as damaged: one small file may declare thousands of millions.
        color, mean, std: how loaders deliver the images; see :class:`trainer.data.index.DatasetInfo`.
    """

    size: tuple[int, int] | None = None
    encode: str = "keep"
    quality: int = 95
    seed: int | None = 0
    part_records: int = 0
    layout: str = "plain"
    skip_damaged: bool = False
    max_pixels: int = _MOST_PIXELS
    color: str = "RGB"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        """Raises :class:`ConfigError` for a quality outside JPEG's range, a mean or deviation that makes no finite
        pixels."""
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"`quality` {self.quality}: from 1 to 100")
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0:
            raise ConfigError(f"`mean` {self.mean}, `std` {self.std}: finite numbers, and deviations above 0")


@dataclass(frozen=True)
class PackResult:
    """What a run of :func:`pack` did; ``complete`` is False while other jobs' parts are missing."""

    records: int
    classes: int
    bytes: int
    parts: int
    written_parts: int
    skipped: int
    seconds: float
    complete: bool


@dataclass(frozen=True)
class _Part:
    """What one process needs to write a part. origins: where a list names each image, for messages."""

    out: Path
    name: str
    number: int
    plan: str
    files: list[str]
    spans: NDArray[np.int64]
    labels: NDArray[np.int64]
    options: PackOptions
    origins: list[str]


def pack(
    listing: Listing,
    out: Path,
    options: PackOptions,
    *,
    processes: int = 1,
    job: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PackResult:
    """Write a data set.

    Args:
        listing: the images.
        out: the folder; made if missing. What an earlier run of the same packing left is continued.
        options: see there.
        processes: how many processes write parts.
        job: (i, n): write only every n-th part from the i-th on (0-based); the job that completes the last part writes
            dataset.yaml.
        progress: called with (images done, images to do).

    Raises:
        DataError: another process packs into the folder (it is named), the folder holds something else, cannot be
            written, or an image is damaged (nothing of its part stays).
    """
    parts, (part, jobs) = _plan(listing, out, options), job
    partners = f"{parts[0].plan} in {jobs} parts" if jobs > 1 else ""
    with owned(out, DataError, lock=out / ".owner", partners=partners), contextlib.ExitStack() as own:
        if jobs > 1:
            own.enter_context(owned(out, DataError, lock=out / f".owner-{part + 1}-of-{jobs}"))
        try:
            return _pack(listing, out, options, parts, processes, job, progress)
        except OSError as error:
            file = error.filename or out
            raise DataError(
                f"{file}: {error.strerror or error}; the same command continues when that is repaired"
            ) from None


def _pack(
    listing: Listing,
    out: Path,
    options: PackOptions,
    parts: list[_Part],
    processes: int,
    job: tuple[int, int],
    progress: Callable[[int, int], None],
) -> PackResult:
    began = time.monotonic()
    _claim(out, parts[0].plan, listing, options)
    if (out / DESCRIPTION).exists():
        written, complete = _repair(out, parts, listing, job, processes, progress)
    else:
        (out / _STAMPS).mkdir(exist_ok=True)
        missing = [part for part in parts[job[0] :: job[1]] if not _stamp(part).exists()]
        _write_parts(missing, processes, progress)
        stamps = [read_json(_stamp(part), DataError) for part in parts if _stamp(part).exists()]
        if len(stamps) < len(parts):
            done, size = sum(stamp["records"] for stamp in stamps), sum(stamp["bytes"] for stamp in stamps)
            left_out = sum(len(stamp["skipped"]) for stamp in stamps)
            return PackResult(
                done, listing.num_classes, size, len(parts), len(missing), left_out, time.monotonic() - began, False
            )
        _finish(out, parts, stamps, listing, options)
        written, complete = len(missing), True
        if job[1] == 1:
            _clean(out)
    described = load_description(out).parts
    records, size = sum(part.records or 0 for part in described), sum(part.bytes or 0 for part in described)
    left_out = len(listing) - records
    return PackResult(
        records, listing.num_classes, size, len(parts), written, left_out, time.monotonic() - began, complete
    )


def _repair(
    out: Path,
    parts: list[_Part],
    listing: Listing,
    job: tuple[int, int],
    processes: int,
    progress: Callable[[int, int], None],
) -> tuple[int, bool]:
    """Write this job's parts of a finished data set again whose files are not as its description says.

    Returns:
        How many were written, and whether all parts are sound now.

    Raises:
        DataError: a part comes out other than it was, or the tables over all parts are damaged.
    """
    described = load_description(out).parts
    again = f"remove {out} and pack again"
    try:
        labels = store.load_array(out / _LABELS, 1)
    except DataError as error:
        raise DataError(f"{error}; {again}") from None
    sums = read_sums(out) or {}
    change = find_change(out / _LABELS, *sums[_LABELS]) if _LABELS in sums else None
    if change is not None:
        raise DataError(f"{change}; {again}, or, if the change is meant, `lce check {out} --seal` first")
    ends = np.cumsum([part.records or 0 for part in described])
    if [part.rec for part in described] != [f"{part.name}.rec" for part in parts] or len(labels) != ends[-1]:
        raise DataError(f"{out}: {DESCRIPTION} or {_LABELS} is not what was packed; {again}")
    _write_names(out, listing)
    broken = [part for part in parts if not _is_whole(part, described[part.number], sums)]
    mine = [part for part in broken if part.number % job[1] == job[0]]
    if mine:
        (out / _STAMPS).mkdir(exist_ok=True)
        _write_parts(mine, processes, progress)
    for part in mine:
        known, stop = described[part.number], ends[part.number]
        kept = labels[stop - (known.records or 0) : stop]
        given = store.load_array(_stamp_labels(part), 1)
        if len(given) != len(kept) or ((kept != given) & (kept >= 0)).any() or not _is_whole(part, known, sums):
            raise DataError(f"{out / known.rec}: its images are not those that were packed; {again}")
    if mine and job[1] == 1:
        _clean(out)
    return len(mine), len(mine) == len(broken)


def _is_whole(part: _Part, known: PartInfo, sums: Sums) -> bool:
    """Whether a written part's files are there, the .rec as long as it was, and its tables are as they were."""
    rec = part.out / known.rec
    tables = (store.offsets_path(rec), crcs_path(rec))
    companions = (rec.with_suffix(".idx"), *(path for path in tables if path.name in sums or path == tables[0]))
    if not all(path.is_file() for path in (rec, *companions)) or rec.stat().st_size != known.bytes:
        return False
    return not any(find_change(path, *sums[path.name]) for path in tables if path.name in sums)


def packed_order(listing: Listing, options: PackOptions) -> NDArray[np.int64]:
    """Which image of the listing each record is, (N,)."""
    if options.layout == "insightface":
        return np.argsort(listing.labels, kind="stable")
    if options.seed is None:
        return np.arange(len(listing))
    return np.random.Generator(np.random.Philox(key=options.seed)).permutation(len(listing))


def _plan(listing: Listing, out: Path, options: PackOptions) -> list[_Part]:
    n, order = len(listing), packed_order(listing, options)
    width = options.part_records or max(_SMALLEST_PART, -(-n // _MOST_PARTS))
    if options.layout == "insightface":
        width = n
    # Data sets that were packed before there was a limit are still the same packing.
    chosen = {key: value for key, value in asdict(options).items() if (key, value) != ("max_pixels", _MOST_PIXELS)}
    plan = hashlib.blake2b((listing.digest() + json.dumps(chosen)).encode(), digest_size=16).hexdigest()
    count = -(-n // width)
    parts = []
    for k in range(count):
        rows = order[k * width : (k + 1) * width]
        name = "train" if count == 1 else f"train-{k:05d}"
        files = [listing.files[row] for row in rows.tolist()]
        origins = [listing.where(row) for row in rows.tolist()]
        parts.append(_Part(out, name, k, plan, files, listing.spans[rows], listing.labels[rows], options, origins))
    return parts


def _claim(out: Path, plan: str, listing: Listing, options: PackOptions) -> None:
    """Make the folder ours, or find that it is."""
    file = out / _PLAN
    try:
        out.mkdir(parents=True, exist_ok=True)
        if file.exists():
            if read_json(file, DataError)["plan"] != plan:
                raise DataError(
                    f"{out}: holds another packing (other images or options); remove it or choose another folder"
                )
            return
        others = sorted(p.name for p in out.iterdir() if not p.name.startswith("."))
        if others:
            raise DataError(f"{out}: is not empty (it holds {others[0]}); choose another folder")
        about = {"plan": plan, "images": len(listing), "classes": listing.num_classes, "options": asdict(options)}
        write_text(file, json.dumps(about, indent=1) + "\n")
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{out}: cannot be packed into: {error}") from None


def _stamp(part: _Part) -> Path:
    return part.out / _STAMPS / f"{part.number:05d}.json"


def _stamp_labels(part: _Part) -> Path:
    return part.out / _STAMPS / f"{part.number:05d}.labels.npy"


_done: Any = None  # the shared counter of images, in the worker processes


def _start_worker(counter: Any) -> None:
    global _done
    _done = counter
    end_with_parent(signal.SIGKILL)


def _write_parts(parts: list[_Part], processes: int, progress: Callable[[int, int], None]) -> None:
    if not parts:
        return
    total = sum(len(part.files) for part in parts)
    if min(processes, len(parts)) == 1:
        before = 0
        for part in parts:
            _write_part(part, _counting_from(before, total, progress))
            before += len(part.files)
        return
    context = worker_context()
    counter = context.Value("q", 0)
    with ProcessPoolExecutor(min(processes, len(parts)), context, _start_worker, (counter,)) as pool:
        waiting = {pool.submit(_write_counted, part) for part in parts}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                progress(counter.value, total)
        except BrokenProcessPool:
            raise DataError("a packing process died (out of memory?); run the same command again to continue") from None
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _counting_from(before: int, total: int, progress: Callable[[int, int], None]) -> Callable[[int], None]:
    return lambda images: progress(before + images, total)


def _write_counted(part: _Part) -> None:
    before = 0

    def count(images: int) -> None:
        nonlocal before
        with _done.get_lock():
            _done.value += images - before
        before = images

    _write_part(part, count)


def _write_part(part: _Part, count: Callable[[int], None]) -> None:
    """Write a part's .rec, .idx and offsets, then its note; on any failure nothing of them stays."""
    writer = recordio.RecordWriter(part.out / f"{part.name}.rec")
    first_id = 1 if part.options.layout == "insightface" else part.number << 32
    labels: list[int] = []
    skipped: list[str] = []
    sizes: set[tuple[int, int]] = set()
    try:
        if part.options.layout == "insightface":
            _write_insightface_header(writer, part)
        images = zip(part.files, part.spans.tolist(), part.labels.tolist(), part.origins, strict=True)
        for file, (start, length), label, origin in images:
            try:
                image, size = _load(file, start, length, part.options)
            except _DAMAGE as error:
                reason = origin + (str(error) if isinstance(error, DataError) else f"{file}: {error}")
                if not part.options.skip_damaged:
                    raise DataError(f"{reason}; repair or remove it, or use `skip_damaged`") from None
                skipped.append(reason)
                continue
            id = first_id + len(labels)
            # Above 2^24 the header cannot hold the label: −1 says so, and labels.npy has it.
            header = float(label) if label < recordio.EXACT_FLOAT_LABELS else -1.0
            writer.write(id, recordio.encode_record(image, header, id))
            labels.append(label)
            sizes.add(size)
            if len(labels) % _COUNTED == 0:
                count(len(labels))
        if not labels:
            raise DataError(
                f"{part.out / part.name}.rec: none of its {len(part.files)} images can be read ({skipped[0]})"
            )
        offsets = np.array([*writer.offsets[-len(labels) :], writer.position], np.int64)
        crcs = np.array(writer.crcs[-len(labels) :], np.uint32)
        if part.options.layout == "insightface":
            _write_identities(writer, np.array(labels))
        write_array(store.offsets_path(writer.path), offsets)
        write_array(crcs_path(writer.path), crcs)
        write_array(_stamp_labels(part), np.array(labels, np.int64))
        writer.close()
        about = {"records": len(labels), "bytes": writer.position, "first_id": first_id, "skipped": skipped}
        files = (_stamp_labels(part), store.offsets_path(writer.path), crcs_path(writer.path))
        about |= {"sizes": sorted(sizes)[:8], "plan": part.plan, "files": {f.name: checksum(f) for f in files}}
        write_text(_stamp(part), json.dumps(about))
        count(len(part.files))
    except BaseException:
        writer.abort()
        raise


def _write_insightface_header(writer: recordio.RecordWriter, part: _Part) -> None:
    """Record 0: flag 2, the key after the last image and the key after the last identity record."""
    if part.options.skip_damaged:
        raise DataError("`layout` insightface announces its counts first, so it cannot be combined with `skip_damaged`")
    after = len(part.files) + 1
    writer.write(0, recordio.encode_record(b"", (float(after), float(after + len(np.unique(part.labels))))))


def _write_identities(writer: recordio.RecordWriter, labels: NDArray[np.int64]) -> None:
    """One record per identity: flag 2, the keys [first, last) of its images."""
    _, first, counts = np.unique(labels, return_index=True, return_counts=True)
    for k, (start, count) in enumerate(zip(first.tolist(), counts.tolist(), strict=True)):
        key = len(labels) + 1 + k
        writer.write(key, recordio.encode_record(b"", (float(start + 1), float(start + 1 + count)), key))


def _load(file: str, start: int, length: int, options: PackOptions) -> tuple[bytes, tuple[int, int]]:
    """An image as it is to be stored, and its (H, W). Raises: see :data:`_DAMAGE`."""
    with open_regular(file, DataError) as handle:
        handle.seek(start)
        data = handle.read(length)
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as opened:
            if opened.width * opened.height > options.max_pixels:
                raise ValueError(
                    f"its {opened.height} × {opened.width} pixels are more than `max_pixels` {options.max_pixels}"
                )
            kind, shape = opened.format, upright_size(opened)
            opened.load()
    except Image.DecompressionBombError:
        raise ValueError(f"declares more pixels than any picture has; the limit is {options.max_pixels}") from None
    as_wanted = shape == (options.size or shape) and kind in _KEPT_FORMATS and not is_deep_png(data)
    if options.encode == "keep" and as_wanted and image_problem(data) is None:
        return data, shape
    image = Image.fromarray(decode_image(data, options.size))
    out = io.BytesIO()
    if options.encode == "jpeg" or (options.encode == "keep" and kind == "JPEG"):
        image.save(out, "JPEG", quality=options.quality)
    else:
        image.save(out, "PNG")
    return out.getvalue(), (image.height, image.width)


def _finish(
    out: Path, parts: list[_Part], stamps: list[dict[str, Any]], listing: Listing, options: PackOptions
) -> None:
    """All parts are there: labels, class names, checksums and, last, the description."""
    for part, stamp in zip(parts, stamps, strict=True):
        change = find_change(_stamp_labels(part), *stamp["files"][_stamp_labels(part).name])
        if change is not None:
            raise DataError(f"{change}; remove {out} and pack again")
    write_array(out / _LABELS, np.concatenate([store.load_array(_stamp_labels(part), 1) for part in parts]))
    _write_names(out, listing)
    skipped = [line for stamp in stamps for line in stamp["skipped"]]
    if skipped:
        write_text(out / "skipped.txt", "".join(f"{line}\n" for line in skipped))
    sizes = sorted({tuple(size) for stamp in stamps for size in stamp["sizes"]})
    size = options.size or sizes[0]
    if options.layout == "insightface":
        write_text(out / "property", f"{listing.num_classes},{size[0]},{size[1]}\n")
    info = DatasetInfo(
        image_size=size,
        uniform=sizes == [size],
        color=options.color,
        mean=options.mean,
        std=options.std,
        num_classes=listing.num_classes,
        labels=_LABELS,
        class_names=_NAMES if listing.names is not None else None,
        parts=tuple(
            PartInfo(rec=f"{part.name}.rec", records=stamp["records"], bytes=stamp["bytes"], first_id=stamp["first_id"])
            for part, stamp in zip(parts, stamps, strict=True)
        ),
    )
    tables = {name: known for stamp in stamps for name, known in stamp["files"].items() if (out / name).is_file()}
    texts = [name for name in (_LABELS, _NAMES, "property") if (out / name).is_file()]
    sums = {**tables, **{name: checksum(out / name) for name in texts}}
    write_sums(out, {DESCRIPTION: sum_of_text(description_text(info)), **sums})
    save_description(out, info)


def _write_names(out: Path, listing: Listing) -> None:
    """classes.txt, unless it is there as it should be."""
    if listing.names is None:
        return
    text = "".join(f"{name}\n" for name in listing.names)
    if not (out / _NAMES).is_file() or (out / _NAMES).read_bytes() != text.encode():
        write_text(out / _NAMES, text)


def _clean(out: Path) -> None:
    """Remove the stamps of finished parts, and what a killed run left under temporary names."""
    shutil.rmtree(out / _STAMPS)
    for stray in (*out.glob(".*.tmp"), *out.glob(".*.partial")):
        stray.unlink(missing_ok=True)
