"""Measure the input: our loader against a bare DALI pipeline, and the torch loader, on the same records in one run.

The reference is a DALI pipeline with DALI's own reader: the records in file order, the same decoding, the same
augmentations with random numbers of DALI's own. Ours reads them in the seeded global order with labels from the table.
Rounds of both alternate; the figures are medians. On a data set with checksums of its records, what comparing them
costs is to be at most 3 % of our loader's processor time. Reads with and without the comparison take turns of one
batch, in processor time as well, so that other work on the machine slows all of them alike.

--cold compares the two orders of reading instead, without decoding: each round drops the files from the page cache
first, and reads --steps batches in data.order global, then blocks. It counts reads: one for each record, or one for
each range that storage is asked to read ahead; and the bytes and requests that reached the storage, by the kernel's
counters (a storage that keeps a cache of its own, such as a virtual disk's, is not cold).

Example:
  lce bench input                                 # on synthetic JPEG images
  lce bench input --data packed/ --augment full --json -
  lce bench input --data /mnt/nfs/packed --cold --steps 500 --json -
"""

import argparse
import io
import itertools
import os
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.measuring import origin, write_json

if TYPE_CHECKING:
    from trainer.data import Dataset
    from trainer.data.config import AugmentConfig

MOST_COST = 0.03
HELP = "images per second of the loaders against a bare DALI pipeline"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lce bench input`."""
    parser.add_argument(
        "--data", type=Path, help="a data set of .rec files; default: synthetic images in a temporary folder"
    )
    parser.add_argument("--images", type=int, default=8192, help="synthetic images (8192)")
    parser.add_argument("--size", type=int, default=112, help="their side in pixels (112)")
    parser.add_argument("--batch", type=int, default=128, help="images per batch (128)")
    parser.add_argument("--threads", type=int, default=2, help="decoding threads or worker processes (2)")
    parser.add_argument("--steps", type=int, default=60, help="batches per round (60)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each side (5)")
    parser.add_argument("--augment", choices=("flip", "full"), default="flip", help="full: every augmentation there is")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: decode on the GPU")
    parser.add_argument("--cold", action="store_true", help="both orders, on files dropped from the page cache")
    parser.add_argument("--block-bytes", type=int, default=4 << 20, help="with --cold: data.block_bytes (4 MiB)")
    parser.add_argument("--buffer-bytes", type=int, default=1 << 30, help="with --cold: data.buffer_bytes (1 GiB)")
    parser.add_argument("--no-torch", action="store_true", help="leave the torch loader out")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON (- for standard output)")


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit status."""
    if args.cold:
        figures = measure_cold(args)
        write_json(figures, args.json)
        if args.json != "-":
            for order in ("global", "blocks"):
                one = figures[order]
                print(
                    f"{order:8} {one['images_per_second']:10,.0f} images/s  {one['reads']:9,} reads  "
                    f"{one['storage_bytes'] / 1e6:10,.1f} MB from storage  mixing of classes {one['mixing']:.2f}"
                )
        return 0
    figures = measure(args)
    write_json(figures, args.json)
    if args.json != "-":
        for name in ("reference", "ours", "torch"):
            if isinstance(figures.get(name), dict):  # without the loader "torch" is its version
                print(f"{name:9} {figures[name]['images_per_second']:10,.0f} images/s")
        print(f"ours / reference: {figures['ratio']:.3f}")
        cost = figures["checksums_cost"]
        if cost is not None:
            limit = "within" if cost <= MOST_COST else "above"
            print(
                f"checksums of the records, by zlib {figures['checksums']['zlib']}, cost {cost:.2%} of the loader's "
                f"processor time: {limit} the bound of {MOST_COST:.0%}"
            )
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one run, as the JSON holds them. Raises :class:`trainer.errors.ConfigError` without DALI."""

    from trainer.data import choose_loader, open_dataset
    from trainer.data.config import AugmentConfig

    choose_loader("dali")
    full = {
        **dict.fromkeys(("contrast", "saturation", "scale"), 0.1),
        **dict.fromkeys(("blur", "low_resolution", "occlusion"), 0.3),
        **{"brightness": 0.05, "translate": 0.03, "noise": 0.02, "rotate_degrees": 5.0},
    }
    augment = AugmentConfig(flip=0.5, **(full if args.augment == "full" else {}))
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.data or _make_images(Path(scratch), args.images, args.size)
        dataset = open_dataset(folder)
        pipelines = {"reference": _bare(dataset, augment, args), "ours": _ours("dali", dataset, augment, args)}
        if not args.no_torch:
            pipelines["torch"] = _ours("torch", dataset, augment, args)
        seconds: dict[str, list[float]] = {name: [] for name in pipelines}
        processor: list[float] = []
        for round_number in range(args.rounds + 1):
            for name, take in pipelines.items():
                used, began = time.process_time(), time.perf_counter()
                take(args.steps)
                if round_number:  # the first round warms up
                    seconds[name].append(time.perf_counter() - began)
                    if name == "ours":
                        processor.append(time.process_time() - used)
            print(f"round {round_number} of {args.rounds}", file=sys.stderr)
        images = args.steps * args.batch
        figures = {
            name: {"seconds": statistics.median(times), "images_per_second": images / statistics.median(times)}
            for name, times in seconds.items()
        }
        figures["ours"]["processor_seconds"] = statistics.median(processor)
        checksums = _reads(dataset, open_dataset(folder, verify=False), args) if dataset.checksummed else None
        return {
            "bench": "input",
            "images": len(dataset),
            "image_size": list(dataset.info.image_size),
            "batch": args.batch,
            "threads": args.threads,
            "augment": args.augment,
            "device": args.device,
            **origin(),
            **figures,
            "ratio": statistics.median(
                reference / ours for reference, ours in zip(seconds["reference"], seconds["ours"], strict=True)
            ),
            "checksums": checksums,
            "checksums_cost": checksums
            and (checksums["microseconds"] - checksums["microseconds_without"])
            / (1e6 * figures["ours"]["processor_seconds"] / images),
        }


def _reads(checked: "Dataset", bare: "Dataset", args: argparse.Namespace) -> dict[str, Any]:
    """Processor time to read a record, comparing its checksum and without: medians over turns of one batch, in random
    order."""
    import numpy as np

    order = np.random.default_rng(0).permutation(checked.kept)
    taken: dict[str, list[float]] = {"microseconds": [], "microseconds_without": []}
    for turn in range(args.steps * args.rounds):
        records = np.take(order, range(turn * args.batch, (turn + 1) * args.batch), mode="wrap").tolist()
        datasets = [("microseconds", checked), ("microseconds_without", bare)]
        for name, dataset in datasets if turn % 2 else reversed(datasets):
            began = time.thread_time()
            for record in records:
                dataset.store.read(record)
            taken[name].append(1e6 * (time.thread_time() - began) / args.batch)
    medians = {name: statistics.median(each) for name, each in taken.items()}
    return {"zlib": zlib.ZLIB_RUNTIME_VERSION, **medians}


def measure_cold(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of ``--cold``, as the JSON holds them: for each order images per second, reads, storage, mixing."""
    from trainer.data import open_dataset

    with tempfile.TemporaryDirectory() as scratch:
        folder = args.data or _make_images(Path(scratch), args.images, args.size)
        dataset = open_dataset(folder)
        rounds: dict[str, list[dict[str, float]]] = {"global": [], "blocks": []}
        for round_number in range(args.rounds):
            for order, done in rounds.items():
                done.append(_read_cold(dataset, order, args, epoch=round_number))
            print(f"round {round_number + 1} of {args.rounds}", file=sys.stderr)
        figures = {
            order: {key: statistics.median(one[key] for one in done) for key in done[0]}
            for order, done in rounds.items()
        }
        return {
            "bench": "input --cold",
            "images": len(dataset),
            "bytes": sum(dataset.store.sizes()),
            "batch": args.batch,
            "block_bytes": args.block_bytes,
            "buffer_bytes": args.buffer_bytes,
            **origin(),
            **figures,
        }


def _read_cold(dataset: "Dataset", name: str, args: argparse.Namespace, epoch: int) -> dict[str, float]:
    """Read one round's batches in an order, from storage."""
    import numpy as np

    from trainer.data.loader import slots_ahead
    from trainer.data.order import Blocks, Order, Schedule, mixing

    kept = dataset.kept
    blocks = Blocks(dataset.byte_positions(kept), args.block_bytes, args.buffer_bytes) if name == "blocks" else None
    order = Order(kept, seed=0, blocks=blocks)
    schedule = Schedule(order, min(args.batch, len(order)))
    order.take(epoch, 0, 0)  # the permutation is made before the clock starts
    advised, will_need = [0], dataset.store.will_need

    def counted(records: np.ndarray[tuple[int], np.dtype[np.int64]]) -> int:
        advised.append(will_need(records))
        return advised[-1]

    dataset.store.forget()
    dataset.store.will_need = counted  # type: ignore[method-assign]
    try:
        before, requests, began = _storage_bytes(), _requests(dataset.path), time.perf_counter()
        images = size = 0
        for slot in itertools.islice(
            slots_ahead(dataset, schedule, epoch, 0), min(args.steps, schedule.steps_per_epoch)
        ):
            size += sum(len(dataset.read(record)) for record in slot.samples.records.tolist())
            images += len(slot.samples)
        seconds = time.perf_counter() - began
    finally:
        dataset.store.will_need = will_need  # type: ignore[method-assign]
    labels = np.asarray(dataset.labels[kept])
    return {
        "seconds": seconds,
        "images_per_second": images / seconds,
        "image_bytes": size,
        "reads": images if blocks is None else sum(advised),
        "storage_bytes": _storage_bytes() - before,
        "device_requests": _requests(dataset.path) - requests,
        "mixing": mixing(order, labels, schedule.batch_size, epoch),
    }


def _storage_bytes() -> int:
    """The bytes that this process has had read from storage."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def _requests(path: Path) -> int:
    """The reads that the block device below a folder has done, everybody's; 0 where the system does not count them."""
    number = path.stat().st_dev
    try:
        return int(Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0


def _make_images(folder: Path, count: int, size: int) -> Path:
    """A packed data set of synthetic JPEG images: smooth coloured patterns of about the bytes of face photographs."""
    import numpy as np
    from PIL import Image

    from trainer.data import recordio, store
    from trainer.data.index import DatasetInfo, PartInfo, open_dataset, save_description, seal_dataset
    from trainer.files import write_array

    random = np.random.default_rng(0)
    writer = recordio.RecordWriter(folder / "train.rec")
    labels = np.arange(count) % 100
    for record, label in enumerate(labels.tolist()):
        coarse = Image.fromarray(random.integers(0, 256, (12, 12, 3), np.uint8)).resize(
            (size, size), Image.Resampling.BICUBIC
        )
        grain = random.normal(0, 4, (size, size, 3))
        out = io.BytesIO()
        Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
        writer.write(record, recordio.encode_record(out.getvalue(), float(label), record))
    offsets = np.array([*writer.offsets, writer.position])
    writer.close()
    write_array(store.offsets_path(writer.path), offsets)
    write_array(folder / "labels.npy", labels)
    part = PartInfo(rec="train.rec", records=count, bytes=writer.position, first_id=0)
    info = DatasetInfo(image_size=(size, size), uniform=True, num_classes=100, labels="labels.npy", parts=(part,))
    save_description(folder, info)
    seal_dataset(open_dataset(folder))
    return folder


def _ours(kind: str, dataset: "Dataset", augment: "AugmentConfig", args: argparse.Namespace) -> Callable[[int], None]:
    import torch

    from trainer.data import build_loader
    from trainer.data.config import RecordsConfig
    from trainer.distributed import Ranks

    data = RecordsConfig(
        path=dataset.path, loader=kind, batch_size=args.batch, workers=args.threads, drop_last=True, augment=augment
    )
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    loader = build_loader(data, 0, dataset, Ranks(device=device))
    batches = loader.batches()

    def take(steps: int) -> None:
        for _ in itertools.islice(batches, steps):
            pass

    return take


def _bare(dataset: "Dataset", augment: "AugmentConfig", args: argparse.Namespace) -> Callable[[int], None]:
    """DALI alone: its reader, the records in file order, its own random numbers."""
    import torch
    from nvidia.dali import Pipeline, fn, types

    from trainer.data.dali import image_graph
    from trainer.data.store import RecordStore
    from trainer.errors import ConfigError

    if not isinstance(dataset.store, RecordStore):
        raise ConfigError(f"{dataset.path}: the reference reads .rec files; pack the images first")
    height, width = dataset.info.image_size
    identity = types.Constant([1.0, 0.0, 0.0, 0.0, 1.0, 0.0], shape=(2, 3), dtype=types.FLOAT)
    grey = types.Constant([1.0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0], shape=(3, 4), dtype=types.FLOAT)
    random: dict[str, Callable[[], Any]] = {
        "flip": lambda: fn.random.coin_flip(probability=augment.flip),
        "warp": lambda: identity + fn.random.normal(shape=(2, 3), stddev=0.02),
        "low_size": lambda: fn.random.uniform(range=(height / 4, height / 1.0), shape=(2,)),
        "blur": lambda: fn.random.uniform(range=(0.01, 1.0)),
        "hole_corner": lambda: fn.random.uniform(range=(0.0, height / 2), shape=(2,)),
        "hole_size": lambda: fn.random.uniform(range=(0.0, height / 3), shape=(2,)),
        "colour": lambda: grey + fn.random.normal(shape=(3, 4), stddev=0.02),
        "noise": lambda: fn.random.normal(shape=(height, width, 3)),
    }
    gpu = args.device == "cuda"

    def parameter(name: str, gpu: bool = False) -> Any:
        return random[name]().gpu() if gpu and args.device == "cuda" else random[name]()

    pipeline = Pipeline(args.batch, args.threads, 0 if gpu else None, prefetch_queue_depth=2, seed=0)
    largest = max(dataset.store.parts, key=len).path  # DALI's reader takes one file
    with pipeline:
        encoded, labels = fn.readers.mxnet(path=[str(largest)], index_path=[str(largest.with_suffix(".idx"))])
        pipeline.set_outputs(image_graph(encoded, dataset.info, augment, parameter, gpu), labels)
    pipeline.build()

    def take(steps: int) -> None:
        for _ in range(steps):
            images, labels = pipeline.run()
            torch.utils.dlpack.from_dlpack(images.as_tensor())
            torch.utils.dlpack.from_dlpack(labels.as_tensor())

    return take
