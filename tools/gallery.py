"""Upgrade the stored embeddings of a gallery to the new model, in place, and back again.

    lce gallery plan    faces.npy --model runs/new
    lce gallery upgrade faces.npy --model runs/new                          T₁₂ of every stored vector, without images
    lce gallery upgrade faces.npy --model runs/new --images data/gallery    the images anew; ids are record numbers
    lce gallery verify  faces.npy --model runs/new                          with the same --images, if any
    lce gallery status  faces.npy
    lce gallery rollback faces.npy                                          the old vectors again
    lce gallery finish  faces.npy                                           the old vectors are dropped: no way back

The gallery is a .npy, a .npz, a .safetensors or a folder of such shards, a .parquet, a FAISS index that holds whole
vectors, or a table of PostgreSQL with pgvector (postgresql://user@host/database --table faces --column embedding --key
id). An upgrade that was interrupted in any way continues when it is started again. On PostgreSQL any number of these
commands, on any machine, share the work; the last one swaps. The next upgrade, to a third model, comes after `finish`.

--order says which rows come first: stored, random, confidence (least certain first; needs --images), highest:WHERE or
lowest:WHERE, where WHERE is a column of the table or a .npy of one number a row, for example how often it was searched.

Exit status: 0 done, 1 verification failed, 2 wrong use.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.foreign import add_reading_arguments, open_model
from tools.output import write_json
from trainer.errors import LceError

if TYPE_CHECKING:
    from trainer.gallery.convert import Converter
    from trainer.gallery.postgres import PostgresGallery

HELP = "upgrade stored embeddings: arrays, FAISS indexes, PostgreSQL"
ACTIONS = ("plan", "upgrade", "verify", "status", "rollback", "finish")
RECALL_LOSS = 0.05  # of an index against the old one's, at which verification fails


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("store", help="a gallery file, or postgresql://…")
    parser.add_argument("--model", metavar="MODEL", help="the new model (for plan, upgrade and verify)")
    parser.add_argument("--images", metavar="DATASET", help="embed the images anew instead of converting the vectors")
    parser.add_argument("--table", default="faces", help="PostgreSQL: the table (default: %(default)s)")
    parser.add_argument("--column", default="embedding", help="PostgreSQL: its vector column (default: %(default)s)")
    parser.add_argument("--key", default="id", help="PostgreSQL: its integer primary key (default: %(default)s)")
    parser.add_argument("--order", default="stored", help="which rows are converted first (default: %(default)s)")
    parser.add_argument(
        "--index", choices=("hnsw", "ivfflat", "none"), default="hnsw", help="PostgreSQL: the new column's"
    )
    parser.add_argument(
        "--no-swap", action="store_true", help="PostgreSQL: convert, but leave the swap to a later call"
    )
    parser.add_argument("--batch", type=int, default=4096, help="rows at a time (default: %(default)s)")
    parser.add_argument("--rate", type=float, metavar="ROWS", help="at most so many rows per second")
    parser.add_argument("--sample", type=int, default=1000, help="verify: rows re-computed (default: %(default)s)")
    parser.add_argument(
        "--least-cosine", type=float, default=0.999, help="verify: what these must reach (default: %(default)s)"
    )
    parser.add_argument(
        "--least-recall", type=float, help="verify: what an index must find (default: 0.05 less than the old one found)"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where the model runs")
    parser.add_argument("--json", metavar="FILE", help="write the outcome as JSON; - for standard output")
    add_reading_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run ``lce gallery``; returns the exit status."""
    if args.batch < 1 or (args.rate is not None and args.rate <= 0):
        raise LceError("--batch and --rate must be positive")
    if args.sample < 1:
        raise LceError(f"--sample {args.sample}: at least 1")
    in_database = args.store.startswith(("postgresql://", "postgres://"))
    outcome = _database(args) if in_database else _file(args)
    write_json({"action": args.action, **outcome}, args.json)
    if args.json != "-":
        for name, value in outcome.items():
            print(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}")
    return 1 if args.action == "verify" and not _holds(args, outcome) else 0


def _holds(args: argparse.Namespace, outcome: dict[str, Any]) -> bool:
    recall, least = outcome["recall"], args.least_recall
    if least is None and outcome["recall_before"] is not None:
        least = outcome["recall_before"] - RECALL_LOSS
    return bool(outcome["smallest_cosine"] >= args.least_cosine and (None in (recall, least) or recall >= least))


def _converter(args: argparse.Namespace, dim_in: int) -> "Converter":
    from trainer.data import open_dataset
    from trainer.distributed import choose_device
    from trainer.gallery.convert import Forward, Reencode

    if args.model is None:
        raise LceError(f"gallery {args.action}: give the new model with --model")
    model = open_model(args.model, args, choose_device(args.device, 0))
    return Reencode(model, open_dataset(args.images), dim_in) if args.images else Forward(model)


def _file(args: argparse.Namespace) -> dict[str, Any]:
    from trainer.gallery import files
    from trainer.gallery.open import open_gallery

    path = Path(args.store)
    if args.action == "status":
        state = files.status(path)
        return {"phase": "none", "rows": open_gallery(path).rows} if state is None else asdict(state)
    if args.action == "rollback":
        kept = files.rollback(path)
        return {"phase": "none"} if kept is None else {"phase": "none", "written_after_the_swap": str(kept)}
    if args.action == "finish":
        files.finish(path)
        return {"phase": "finished"}
    before = files.status(path)
    converter = _converter(args, open_gallery(path).dim if before is None else before.dim_in)
    if args.action == "plan":
        return asdict(files.plan(path, converter))
    if args.action == "verify":
        return asdict(files.verify(path, converter, args.sample))
    from tools.progress import progress_bar
    from trainer.data import open_dataset
    from trainer.gallery.orders import order_rows

    if before is None or before.phase == "finished":
        for change in files.plan(path, converter, 1).not_kept:
            print(f"not kept: {change}", file=sys.stderr)
    # An upgrade that continues has its order.
    order = None
    if before is None and args.order != "stored":
        order = order_rows(args.order, path, open_dataset(args.images) if args.images else None)
    with progress_bar("converting") as progress:
        return asdict(
            files.upgrade(path, converter, order=order, batch=args.batch, rows_per_second=args.rate, progress=progress)
        )


def _database(args: argparse.Namespace) -> dict[str, Any]:
    from trainer.gallery.postgres import PostgresGallery

    gallery = PostgresGallery(args.store, args.table, args.column, args.key, args.order)
    if args.action == "status":
        return asdict(gallery.status())
    if args.action in ("rollback", "finish"):
        gallery.rollback() if args.action == "rollback" else gallery.finish()
        return asdict(gallery.status())
    converter = _converter(args, gallery.dim)
    if args.action == "plan":
        return gallery.plan(converter)
    if args.action == "verify":
        return asdict(gallery.verify(converter, args.sample))
    return _upgrade_table(args, gallery, converter)


def _upgrade_table(args: argparse.Namespace, gallery: "PostgresGallery", converter: "Converter") -> dict[str, Any]:
    from tools.progress import progress_bar

    gallery.begin(converter)
    total, done = gallery.status().left, 0
    with progress_bar("converting") as progress:

        def count(rows: int) -> None:
            nonlocal done
            done += rows
            if progress is not None:
                progress(done, total)

        if total:
            gallery.work(converter, batch=args.batch, rows_per_second=args.rate, progress=count)
    state = gallery.status()
    if state.phase == "converting" and state.left == 0 and not args.no_swap:
        print("building the index and swapping …", file=sys.stderr)
        if args.index != "none":
            gallery.index(args.index)
        gallery.swap()
    return {"converted_here": done, **asdict(gallery.status())}
