"""Split a data set for compatible training: label tables for the old and the new model, no image is copied.

OUT gets old.npy and new.npy (and unseen.npy, tune.npy, seen.npy where asked for), each an int64 label per record, −1
where the table does not use it, with NAME.yaml (its class count) and NAME.classes.npy (the data set's class of each of
its classes). Use them as data.labels in a configuration.

  extended-class  old: a share of the classes;            new: all classes
  extended-data   old: a share of each class's images;    new: all images
  open-class      old: a share of the classes;            new: the other classes
  open-data       old: a share of each class's images;    new: the other images
  extended-group  old: a share of the groups of images;   new: all groups
  open-group      old: a share of the groups;             new: the other groups

Amounts are shares (0.3), counts (50), or files that name identities, one a line (benchmark.txt: these people are the
benchmark). A group is a camera, a year, a typeface …: --groups names a .npy with a whole number per record.

Example:
  lce split packed/ splits/ --kind extended-class --share 0.3 --unseen 0.2 --seen 1
  lce split packed/ splits/ --share 2000 --unseen benchmark.txt
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tools.arguments import whole_number
from tools.output import write_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from trainer.data.splitting import Table

HELP = "old, new and held-out label tables for compatible training"
KINDS = ("extended-class", "extended-data", "extended-group", "open-class", "open-data", "open-group")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lce split`."""
    parser.add_argument("dataset", type=Path, metavar="DATASET")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the tables; made if missing")
    parser.add_argument(
        "--kind", choices=KINDS, default="extended-class", help="what the new model has more (%(default)s)"
    )
    parser.add_argument("--groups", type=Path, metavar="FILE", help="the group of each record (.npy), to split by it")
    parser.add_argument("--share", type=_amount, default=0.3, metavar="AMOUNT", help="the old model's (0.3)")
    parser.add_argument(
        "--unseen", type=_amount, default=0.0, metavar="AMOUNT", help="identities held out for the report"
    )
    parser.add_argument(
        "--tune", type=_amount, default=0.0, metavar="AMOUNT", help="identities held out for choosing settings"
    )
    parser.add_argument(
        "--seen", type=whole_number(0), default=0, metavar="N", help="images of each other class held out"
    )
    parser.add_argument("--seed", type=whole_number(0), default=0)
    parser.add_argument("--json", metavar="FILE", help="write the counts as JSON (- for standard output)")


def run(args: argparse.Namespace) -> int:
    """Split; returns the exit status."""
    from trainer.data import open_dataset
    from trainer.data.splitting import SplitOptions, identity_list, save_tables, split

    dataset = open_dataset(args.dataset)
    share, unseen, tune = (
        identity_list(dataset, amount) if isinstance(amount, Path) else amount
        for amount in (args.share, args.unseen, args.tune)
    )
    options = SplitOptions(args.kind, share, unseen, tune, args.seen, args.seed)
    tables = split(dataset, options, None if args.groups is None else _groups(args.groups))
    made_by = f"lce split {args.dataset} --kind {args.kind} --share {args.share} --unseen {args.unseen} "
    others = save_tables(
        tables, args.out, dataset, made_by + f"--tune {args.tune} --seen {args.seen} --seed {args.seed}"
    )
    for name in others:
        print(f"{args.out / name}.npy: is of another split; remove it if it is not wanted", file=sys.stderr)
    counts = {name: {"classes": len(table.classes), "images": table.images} for name, table in tables.items()}
    write_json(counts, args.json)
    if args.json != "-":
        for name, count in counts.items():
            print(f"{args.out / name}.npy: {count['images']} images of {count['classes']} classes")
        missing = _lacking(tables, args.kind)
        if missing:
            print(f"{missing} classes of old.npy are not in new.npy: all of their images are the old model's")
    return 0


def _lacking(tables: "Mapping[str, Table]", kind: str) -> int:
    """How many of the old model's classes the new one lacks, where the kind shares out the images of each class."""
    return 0 if kind.endswith("class") else len(set(tables["old"].classes) - set(tables["new"].classes))


def _groups(path: Path) -> "NDArray[np.int64]":
    import numpy as np

    from trainer.data.store import load_array
    from trainer.errors import DataError

    try:
        return load_array(path, 1, None).astype(np.int64)
    except DataError as error:
        raise DataError(f"--groups {error}; expected a whole number per record") from None


def _amount(text: str) -> float | int | Path:
    """A share (0 and 1 too), a count from 2 on, or a file."""
    try:
        value = float(text)
    except ValueError:
        if Path(text).is_file():
            return Path(text)
        raise argparse.ArgumentTypeError(f"{text}: expected a share from 0 to 1, a count, or a file") from None
    if 0 <= value <= 1:
        return value
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text}: expected a share from 0 to 1, or a whole number of identities")
    return int(text)
