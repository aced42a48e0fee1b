"""Pack images into a RecordIO data set that `lce launch`, MXNet and DALI's own reader can read.

SOURCE is one of
  a folder with one folder of images per identity         faces/alice/1.jpg, faces/bob/1.png …
  a list: .csv, .tsv or .txt with path and label (by header or in this order), MXNet's .lst (index, label, path), or
    InsightFace's (1, path, label); numbers are compared as numbers, so 0 and 0.0 are one class, and 007 and 7
  a .tar file, or a folder of them (WebDataset: key.jpg with key.cls, or one folder per identity)

OUT gets train.rec, train.idx (train-00000.rec … for more than 4,096 images), labels.npy, classes.txt and dataset.yaml.
The images are shuffled once by --seed. JPEG and PNG bytes are kept as they are unless --size or --encode asks for more;
other formats and PNGs of 16 bits become PNGs of 8: whatever Pillow reads, of a GIF the first frame, and .heic where
pillow-heif is installed. Files that are not taken are counted by suffix, and identities that lose all are named. A
second run of the same command continues where the first was stopped, and writes parts again that are missing or not as
long as they were.

Example:
  lce pack faces/ packed/ --size 112
  lce pack list.csv packed/ --processes 8 --part 3/16        # one of 16 jobs on as many machines
"""

import argparse
import dataclasses
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from tools.arguments import whole_number
from tools.output import write_json
from tools.progress import progress_bars

if TYPE_CHECKING:
    from trainer.data.listing import Listing

HELP = "folders of identities, a list or tar files → a RecordIO data set"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lce pack`."""
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("out", type=Path, metavar="OUT", help="the data set's folder; made if missing")
    parser.add_argument("--size", type=_size, metavar="HxW", help="resize images of another size (one number: square)")
    parser.add_argument("--encode", choices=("keep", "jpeg", "png"), default="keep", help="re-encode every image")
    parser.add_argument("--quality", type=whole_number(1), default=95, help="of JPEG where it is encoded (95)")
    parser.add_argument(
        "--color", choices=("RGB", "BGR"), default="RGB", help="channel order that models are trained on"
    )
    parser.add_argument("--mean", type=float, nargs=3, default=(0.5, 0.5, 0.5), help="of pixel/255, per channel")
    parser.add_argument("--std", type=float, nargs=3, default=(0.5, 0.5, 0.5), help="of pixel/255, per channel")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of the one shuffle (0)")
    parser.add_argument("--no-shuffle", action="store_true", help="keep the source's order")
    parser.add_argument("--keep-labels", action="store_true", help="identities are numbers and stay what they are")
    parser.add_argument("--root", type=Path, help="folder that a list's relative paths start from (the list's own)")
    parser.add_argument(
        "--layout", choices=("plain", "insightface"), default="plain", help="insightface: header records"
    )
    parser.add_argument(
        "--part-records", type=whole_number(0), default=0, metavar="N", help="records per .rec (4,096 or n/512)"
    )
    parser.add_argument(
        "--skip-damaged", action="store_true", help="leave out images that do not decode, and list them"
    )
    parser.add_argument(
        "--max-pixels",
        type=whole_number(1),
        default=50_000_000,
        metavar="N",
        help="an image of more counts as damaged (%(default)s)",
    )
    parser.add_argument(
        "--processes", type=whole_number(0), default=0, metavar="N", help="writing processes (one per core)"
    )
    parser.add_argument(
        "--part", type=_job, default=(0, 1), metavar="I/N", help="write every N-th .rec, from the I-th (1…N)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON (- for standard output)")


def run(args: argparse.Namespace) -> int:
    """Pack; returns the exit status."""
    from rich.console import Console

    from trainer.data.listing import list_source
    from trainer.data.packing import PackOptions, pack
    from trainer.errors import ConfigError

    if args.out.is_file():
        raise ConfigError(f"{args.out}: is a file; name a folder for the data set")
    options = PackOptions(
        size=args.size,
        encode=args.encode,
        quality=args.quality,
        seed=None if args.no_shuffle else args.seed,
        part_records=args.part_records,
        layout=args.layout,
        skip_damaged=args.skip_damaged,
        max_pixels=args.max_pixels,
        color=args.color,
        mean=tuple(args.mean),
        std=tuple(args.std),
    )
    with Console(stderr=True).status(f"listing {args.source}"):
        listing = list_source(args.source, args.keep_labels, args.root)
    processes = args.processes or len(os.sched_getaffinity(0))
    with progress_bars() as bars:

        def progress(done: int, total: int) -> None:
            bars.update("packing", done, total)

        result = pack(listing, args.out, options, processes=processes, job=args.part, progress=progress)
    kinds = Counter(Path(file).suffix.lower() for file in listing.files)
    figures = {**dataclasses.asdict(result), "out": str(args.out), "first_frames": kinds[".gif"]}
    figures |= {"not_taken": listing.not_taken, "without_images": listing.without_images}
    write_json(figures, args.json)
    if args.json != "-":
        state = "complete" if result.complete else "waits for the parts of other jobs"
        print(
            f"{args.out}: {result.records} images of {result.classes} classes in {result.parts} part(s), {state}; "
            f"{result.written_parts} written in {result.seconds:.1f} s, {result.skipped} image(s) left out"
        )
        _print_others(listing, kinds[".gif"])
    return 0


def _print_others(listing: "Listing", gifs: int) -> None:
    """What of the source is not in the data set, and what is there in part."""
    from trainer.data.store import left_out_text

    if gifs:
        print(f"{gifs} .gif file(s): of an animation, the first frame is taken")
    if listing.merged:
        shown = ", ".join(f"{' and '.join(forms)} as {name}" for name, forms in list(listing.merged.items())[:10])
        print(f"numbers written in several forms are one class each: {len(listing.merged)} ({shown})")
    for line in left_out_text(listing.not_taken, listing.without_images):
        print(line)


def _size(text: str) -> tuple[int, int]:
    numbers = [int(word) if word.isdigit() else 0 for word in text.lower().split("x")]
    if len(numbers) > 2 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected HEIGHTxWIDTH or one number, in pixels")
    return numbers[0], numbers[-1]


def _job(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text}: expected I/N with I from 1 to N")
    return int(index) - 1, int(count)
