"""Look for damage in a data set: every record is read, and with --deep every image is decoded.

Reported: records and classes, classes without images, images per class, header records, sizes, byte-identical images,
records whose header has another label than the label table, which data.order suits the storage, and damage: records
that cannot be read or decoded, files that were cut, offsets that point nowhere, sizes other than described. Exit status
1 when there is damage, else 0.

--write-bad puts the damaged records' numbers into DATASET/bad_records.npy; training skips them, up to
data.max_bad_records of them.

`lce pack` writes checksums of the tables and of every record (checksums.json, *.crc.npy); they are compared when a data
set is opened and a record is read. --seal writes them for a data set of other origin, or anew after a change that is
meant.

Example:
  lce check packed/
  lce check ms1mv3/ --seal
  lce check packed/ --deep --write-bad --json report.json
"""

import argparse
import dataclasses
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from tools.arguments import whole_number
from tools.output import write_json
from tools.progress import progress_bars
from trainer.errors import DataError, ForeignRecordsError, MissingDataError, OutsideError

if TYPE_CHECKING:
    from trainer.data.checking import CheckReport

HELP = "what is wrong with a data set"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lce check`."""
    parser.add_argument("dataset", type=Path, metavar="DATASET")
    parser.add_argument("--labels", type=Path, help="check with this label table instead of the data set's own")
    parser.add_argument(
        "--deep", action="store_true", help="decode every image, by Pillow and by DALI where it is installed"
    )
    parser.add_argument("--write-bad", action="store_true", help="write DATASET/bad_records.npy for training to skip")
    parser.add_argument(
        "--seal",
        action="store_true",
        help="where no damage is found, take the data set as it is: write checksums of its tables and records; with "
        "--labels: of that table, and whose records it numbers",
    )
    parser.add_argument(
        "--processes", type=whole_number(0), default=0, metavar="N", help="reading processes (one per core)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the findings as JSON (- for standard output)")


def run(args: argparse.Namespace) -> int:
    """Check; returns 0, or 1 when damage was found."""
    from trainer.owner import owned

    dataset, table = args.dataset, args.labels if args.seal else None
    # The folder that is written to, whose lock `lce split` and `lce pack` take → of what.
    folders: dict[Path, Path] = {}
    if dataset.exists() and (args.write_bad or (args.seal and table is None)):
        folders[(dataset if dataset.is_dir() else dataset.parent).resolve()] = dataset
    if dataset.exists() and table is not None and table.exists():
        folders.setdefault(table.parent.resolve(), table)
    with ExitStack() as stack:
        for folder, what in folders.items():
            stack.enter_context(owned(what, DataError, lock=folder / ".owner"))
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    import numpy as np

    from trainer.data import open_dataset
    from trainer.data.checking import check
    from trainer.data.checksums import change_sum
    from trainer.data.index import BAD_RECORDS, seal_dataset, seal_table
    from trainer.files import write_array

    try:
        dataset = open_dataset(args.dataset, args.labels, verify=not args.seal)
    except (MissingDataError, ForeignRecordsError, OutsideError):
        raise
    except DataError as error:
        write_json({"dataset": str(args.dataset), "damage": [str(error)]}, args.json)
        print(f"damage: {error}", file=sys.stderr if args.json == "-" else sys.stdout)
        return 1
    processes = args.processes or len(os.sched_getaffinity(0))
    with progress_bars() as bars:

        def progress(done: int) -> None:
            bars.update("checking", done, len(dataset))

        report = check(dataset, deep=args.deep, processes=processes, progress=progress)
    if args.seal and not report.damage and args.labels is not None:
        seal_table(args.labels, dataset)
    elif args.seal and not report.damage:
        seal_dataset(dataset)
    elif args.seal:
        print("nothing was sealed, because damage was found", file=sys.stderr)
    if args.write_bad:
        write_array(args.dataset / BAD_RECORDS, np.array(sorted(report.bad), np.int64))
        change_sum(args.dataset, BAD_RECORDS)
    write_json({"dataset": str(args.dataset), **dataclasses.asdict(report)}, args.json)
    if args.json != "-":
        _print(args.dataset, report)
    return 1 if report.damage else 0


def _print(dataset: Path, report: "CheckReport") -> None:
    spread = report.images_per_class
    sizes = ", ".join(f"{size} ({count})" for size, count in report.sizes.items())
    print(
        f"{dataset}: {report.records} records in {report.parts} part(s), {report.used} used, {report.classes} classes"
    )
    print(f"  images per class: {spread['min']:.0f} to {spread['max']:.0f}, median {spread['median']:.0f}")
    if report.empty_classes:
        print(f"  classes without images: {report.empty_classes} (the first: {report.first_empty})")
    print(f"  sizes: {sizes}; header records: {report.header_records}")
    print(
        f"  byte-identical images: {report.duplicates} (under another label: {report.duplicates_across_classes}); "
        f"relabelled: {report.relabelled}"
    )
    if report.by_pillow:
        first = min(report.by_pillow)
        print(
            f"  DALI does not decode {len(report.by_pillow)} record(s), which training reads by Pillow instead; the "
            f"first: {first} ({report.by_pillow[first]})"
        )
    if report.decoders_differ:
        first = max(report.decoders_differ, key=lambda record: report.decoders_differ[record])
        mean, most = report.decoders_differ[first]
        print(
            f"  DALI and Pillow make different pixels of {len(report.decoders_differ)} record(s), the most of {first}: "
            f"by {mean} in the mean and up to {most} of 255; use one data.loader for all runs, or `lce pack` them"
        )
    print(f"  data.order: {report.order} ({report.order_reason})")
    for line in report.damage:
        print(f"damage: {line}")
    for record in sorted(report.bad)[:20]:
        print(f"  record {record}: {report.bad[record]}")
    print(
        "damage was found" if report.damage else f"no damage was found{'' if report.deep else ' (--deep decodes too)'}"
    )
