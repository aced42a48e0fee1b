"""The DALI loader: our order and our random numbers, DALI's decoding and image operations, on the CPU or the GPU.

A thread of our own reads the records of the next batches and draws their augmentations; DALI gets the encoded bytes and
the parameters without a copy and hands over finished batches. DALI itself decides nothing at random.
"""

import logging
import math
import queue
import re
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.tensors import TensorCPU, TensorListCPU
from torch import Tensor

from trainer.data import augment
from trainer.data.config import AugmentConfig
from trainer.data.index import Dataset, DatasetInfo
from trainer.data.loader import Batch, PositionedLoader, Reader, empty_batch, labels_of, slots_ahead
from trainer.data.order import Samples, Schedule, Slot
from trainer.data.pixels import as_png
from trainer.errors import DataError

log = logging.getLogger(__name__)

_DEPTH = 2  # batches that DALI works on ahead of the one handed out
_READ_AHEAD = 3  # batches that are read ahead of DALI
# How the formats begin that DALI decodes: JPEG, PNG, BMP, TIFF, PNM, WebP (in RIFF) and JPEG 2000.
_KNOWN = (
    b"\xff\xd8",
    b"\x89PNG",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"P4",
    b"P5",
    b"P6",
    b"RIFF",
    b"\0\0\0\x0cjP",
    b"\xff\x4f",
)

Feed = dict[str, Any]


@dataclass(frozen=True)
class _Job:
    """One batch on its way: what DALI was fed is kept alive until its output has been taken."""

    slot: Slot
    samples: Samples
    images: list[bytes]
    feed: Feed


def build_pipeline(
    info: DatasetInfo, config: AugmentConfig, batch_size: int, threads: int, device_id: int | None
) -> tuple[Pipeline, list[str]]:
    """The DALI graph for a data set and its augmentations, and the names of its inputs.

    Args:
        info: image size, colour order, mean and standard deviation.
        config: which augmentations are on; steps that are off are not in the graph.
        batch_size: the largest batch.
        threads: decoding threads.
        device_id: None: everything on the CPU; else decoding (``mixed``) and image operations on that GPU.
    """
    pipeline = Pipeline(batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=_DEPTH)
    names = ["images"]

    def parameter(name: str, gpu: bool = False) -> Any:
        names.append(name)
        node = fn.external_source(name=name, no_copy=True, batch=True)
        return node.gpu() if gpu and device_id is not None else node

    with pipeline:
        encoded = fn.external_source(name="images", no_copy=True, batch=True)
        pipeline.set_outputs(image_graph(encoded, info, config, parameter, device_id is not None))
    pipeline.build()
    return pipeline, names


def image_graph(encoded: Any, info: DatasetInfo, config: AugmentConfig, parameter: Any, gpu: bool) -> Any:
    """Decode, augment, normalise ``encoded``; ``parameter(name, gpu=False)`` gives a per-sample parameter's node."""
    size = list(info.image_size)
    x = fn.decoders.image(
        encoded,
        device="mixed" if gpu else "cpu",
        output_type=types.RGB if info.color == "RGB" else types.BGR,
        jpeg_fancy_upsampling=True,
    )
    triangular = {"interp_type": types.INTERP_TRIANGULAR, "antialias": True}
    if not info.uniform:
        x = fn.resize(x, size=size, **triangular)
    if config.low_resolution:
        x = fn.resize(fn.resize(x, size=parameter("low_size"), **triangular), size=size, **triangular)
    if config.rotate_degrees or config.scale or config.translate:
        x = fn.warp_affine(x, matrix=parameter("warp"), interp_type=types.INTERP_LINEAR)
    if config.blur:
        x = fn.gaussian_blur(x, sigma=parameter("blur"))
    if config.occlusion:
        corner, sides = parameter("hole_corner"), parameter("hole_size")
        x = fn.erase(x, anchor=corner, shape=sides, axis_names="HW", fill_value=float(round(augment.GREY)))
    if config.contrast or config.brightness or config.saturation:
        x = fn.coord_transform(x, MT=parameter("colour"), dtype=types.UINT8)
    if config.noise:
        x = x + parameter("noise", gpu=True) * (255.0 * config.noise)
    mirror = {"mirror": parameter("flip")} if config.flip else {}
    return fn.crop_mirror_normalize(
        x,
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255.0 * m for m in info.mean],
        std=[255.0 * s for s in info.std],
        **mirror,
    )


def _views(arrays: Iterable[NDArray[Any]]) -> TensorListCPU:
    """Wrap arrays as DALI tensors without copying; letting DALI wrap them itself is several times slower."""
    tensors = [TensorCPU(array) for array in arrays]
    return TensorListCPU(tensors, contiguous=False)  # type: ignore[call-overload]  # DALI's stub lacks `contiguous`


def feed_of(draw: augment.Draw, images: list[bytes], size: tuple[int, int], ring: augment.Floats | None) -> Feed:
    """What DALI is fed for a batch, by input name; encoded images and noise are views, not copies."""
    feed: Feed = {"images": _views(np.frombuffer(image, np.uint8) for image in images)}
    for name in ("flip", "warp", "low_size", "blur", "colour"):
        value = getattr(draw, name)
        if value is not None:
            feed[name] = value[:, None] if name == "blur" else value
    if draw.hole is not None:
        feed["hole_corner"], feed["hole_size"] = (
            np.ascontiguousarray(draw.hole[:, :2]),
            np.ascontiguousarray(draw.hole[:, 2:]),
        )
    if draw.noise is not None and ring is not None:
        shape = (*size, 3)
        feed["noise"] = _views(ring[at : at + math.prod(shape)].reshape(shape) for at in draw.noise.tolist())
    return feed


class DaliLoader(PositionedLoader):
    """See the module. Raises :class:`DataError` from ``batches()`` when more records are damaged than allowed.

    Attributes:
        by_pillow: records that DALI does not decode and Pillow does, with DALI's reason; DALI gets a PNG of them.
    """

    name = "dali"

    def __init__(
        self,
        dataset: Dataset,
        schedule: Schedule,
        config: AugmentConfig,
        *,
        seed: int,
        threads: int,
        device: torch.device,
        max_bad: int = 0,
    ) -> None:
        super().__init__(schedule)
        self.dataset, self.config, self.seed, self.threads, self.device = dataset, config, seed, max(1, threads), device
        self.reader = Reader(dataset, max_bad, self._readable)
        self.by_pillow: dict[int, str] = {}
        self.bad_records = self.reader.bad
        self.ring = augment.noise_ring(seed) if config.noise else None
        self._held = _Held()  # of all pipelines: one that failed must not take its last batches along

    @property
    def _device_id(self) -> int | None:
        return (self.device.index or 0) if self.device.type == "cuda" else None

    def _produce(self, epoch: int, samples: int) -> Generator[tuple[Slot, Batch], None, None]:
        while True:
            jobs: deque[_Job] = deque()
            try:
                for slot, batch in self._run(epoch, samples, jobs):
                    yield slot, batch
                    epoch, samples = slot.next_epoch, slot.next_samples
            except RuntimeError as error:  # DALI's only kind of error; it spoils the pipeline, so a new one is made
                self._blame(jobs, error)

    def _run(self, epoch: int, samples: int, jobs: deque[_Job]) -> Iterator[tuple[Slot, Batch]]:
        pipeline, names = build_pipeline(
            self.dataset.info, self.config, max(1, self.schedule.largest_slice), self.threads, self._device_id
        )
        slots = self._announced(slots_ahead(self.dataset, self.schedule, epoch, samples))
        ahead = _Ahead(self._job(slot) for slot in slots)

        def feed() -> None:
            job = ahead.next()
            jobs.append(job)
            for name in names:
                pipeline.feed_input(name, job.feed[name])

        try:
            for _ in range(_DEPTH):
                feed()
            while True:
                pipeline.schedule_run()  # the first call starts all that was fed
                (images,) = pipeline.share_outputs()
                tensor = torch.utils.dlpack.from_dlpack(images.as_tensor())
                pipeline.release_outputs()
                job = jobs.popleft()
                feed()
                yield job.slot, self._batch(job, tensor)
                self._held.hold(tensor)
        finally:
            ahead.close()

    def _batch(self, job: _Job, images: Tensor) -> Batch:
        if not len(job.slot.samples):
            return empty_batch(self.dataset.info.image_size, self.device)
        records = job.samples.records
        return Batch(images, labels_of(self.dataset, records, self.device), torch.from_numpy(records))

    def _job(self, slot: Slot) -> _Job:
        wanted = slot.samples
        if not len(wanted):  # DALI runs no empty batches; it gets one image that nobody looks at
            wanted = Samples(wanted.epoch, self.dataset.kept[:1], np.zeros(1, np.int64))
        info = self.dataset.info
        samples, images = self.reader.fetch_all(wanted)
        draw = augment.draw(self.config, self.seed, samples, info.image_size, info.color)
        return _Job(slot, samples, images, feed_of(draw, images, info.image_size, self.ring))

    def _blame(self, jobs: deque[_Job], error: RuntimeError) -> None:
        """Find the records that DALI cannot decode, one by one; if there is none the error is not the data's."""
        before, converted = len(self.reader.bad) + len(self.by_pillow), set(self.by_pillow)
        for job in jobs:
            for record, image in zip(job.samples.records.tolist(), job.images, strict=True):
                if record in self.by_pillow and record not in converted:
                    continue  # found in an earlier batch of these
                reason = self._decode_error(record, image)
                if reason is not None:
                    self.reader.skip(record, f"{self.dataset.where(record)} does not decode: {reason}")
        if len(self.reader.bad) + len(self.by_pillow) == before:
            raise DataError(
                f"{self.dataset.path}: DALI failed on records that decode one by one: {_short(error)}"
            ) from error

    def _decode_error(self, record: int, image: bytes) -> str | None:
        """Why a record cannot be trained on, or None: DALI decodes it, or Pillow will from now on."""
        (decoded,) = decode_each([image], self._device_id)
        if isinstance(decoded, str):
            try:
                as_png(image)
            except ValueError as why:
                return str(why)
            if record in self.by_pillow:
                return decoded
            self._take_over(record, decoded)
            return None
        wanted = self.dataset.info.image_size
        if self.dataset.info.uniform and decoded.shape[:2] != tuple(wanted):
            return f"it is {decoded.shape[0]}x{decoded.shape[1]}, not {wanted[0]}x{wanted[1]} as all others"
        return None

    def _readable(self, record: int, image: bytes) -> bytes:
        if record not in self.by_pillow:
            if image.startswith(_KNOWN):
                return image
            self._take_over(record, "a format that it does not know")
        return as_png(image)

    def _take_over(self, record: int, reason: str) -> None:
        self.by_pillow[record] = reason
        count = len(self.by_pillow)
        if count in (1, 10, 100) or count % 1000 == 0:
            log.warning(
                "%d record(s) that DALI does not decode are read by Pillow, the newest: %s (DALI: %s)",
                count,
                self.dataset.where(record),
                reason,
            )


def decode_each(images: list[bytes], device_id: int | None = None) -> list[NDArray[np.uint8] | str]:
    """What DALI makes of encoded images by themselves: (H, W, 3) uint8 RGB, or why it does not decode one."""
    pipeline = Pipeline(batch_size=max(1, len(images)), num_threads=1, device_id=device_id)
    with pipeline:
        encoded = fn.external_source(name="images", batch=True)
        device = "mixed" if device_id is not None else "cpu"
        pipeline.set_outputs(fn.decoders.image(encoded, device=device, jpeg_fancy_upsampling=True))
    try:
        pipeline.feed_input("images", [np.frombuffer(image, np.uint8) for image in images])
        (decoded,) = pipeline.run()
    except RuntimeError as error:
        return [_short(error)] if len(images) == 1 else [decode_each([image], device_id)[0] for image in images]
    there = decoded.as_cpu() if device_id is not None else decoded
    return [np.array(there.at(k)) for k in range(len(images))]


class _Held:
    """Keeps a GPU's batches until what read them is over.

    DALI hands its own memory to torch without a copy and uses it again once the tensor is gone. The host drops a batch
    while the last of its readers, the first convolution's weight gradient, may still be queued.
    """

    def __init__(self) -> None:
        self.kept: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def hold(self, images: Tensor) -> None:
        """Keep a batch whose work has been queued; let go of those before it whose work is done."""
        if not images.is_cuda:
            return
        over = torch.cuda.Event()
        over.record()
        self.kept.append((images, over))
        while self.kept[0][1].query() and len(self.kept) > 1:
            self.kept.popleft()


class _Ahead:
    """Runs an iterator in a thread, a few items ahead; its exception is raised where the item was due."""

    def __init__(self, items: Iterator[_Job]) -> None:
        self._queue: queue.Queue[_Job | BaseException] = queue.Queue(_READ_AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(items,), name="data-reader", daemon=True)
        self._thread.start()

    def _work(self, items: Iterator[_Job]) -> None:
        try:
            for item in items:
                if not self._put(item):
                    return
        except BaseException as error:
            self._put(error)

    def _put(self, item: "_Job | BaseException") -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def next(self) -> _Job:
        """The next item; waits for it."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()


_STATUS = re.compile(r"nvImageCodec failure: '#(\d+)'")
_MEANING = {
    3: "the image is damaged",
    4: "a format that it does not know, or no image",
    9: "a variant of the format that it does not decode",
    13: "the image is damaged",
    14: "a variant of the format that it does not decode",
    17: "the image is cut short or damaged",
    18: "a variant of the format that it does not decode",
    19: "the image is cut short",
}
"""What the statuses of nvImageCodec, by which DALI decodes, come to (``nvimgcodecStatus_t``)."""


def _short(error: BaseException) -> str:
    """What happened, in plain words or DALI's own: what follows `encountered:`, not the graph's traceback before it."""
    text = str(error).partition("encountered:")[2] or str(error)
    if (status := _STATUS.search(text)) and int(status[1]) in _MEANING:
        return _MEANING[int(status[1])]
    if "Failed to decode sample" in text:
        return "the image is damaged"
    lines = [line.strip() for line in text.splitlines()]
    telling = [line for line in lines if line and not line.startswith(("File ", "Current pipeline", "Critical error"))]
    return (telling or [repr(error)])[0][:300]
