"""Upgrade the stored embeddings of a gallery to the new model, in place, and back again.

    lce gallery plan     faces.npy --model runs/new       what it takes, and what cannot be kept
    lce gallery upgrade  faces.npy --model runs/new       T₁₂ of every stored vector, without images
    lce gallery verify   faces.npy --model runs/new
    lce gallery status   faces.npy
    lce gallery rollback faces.npy                        the old vectors again
    lce gallery finish   faces.npy                        the old vectors are dropped: no way back

The gallery is a .npy, a .npz, a .safetensors or a folder of such shards, a .parquet, a FAISS index that holds whole
vectors, a table of PostgreSQL with pgvector (postgresql://user@host/database --table faces --column embedding), or a
Qdrant collection behind an alias (qdrant:http://host:6333 --alias faces; a second collection is made, or with
--new-vector NAME a second vector in the same points). An upgrade that was interrupted in any way
continues when it is started again. On PostgreSQL any number of these commands, on any machines, share the work. The
next upgrade, to a third model, comes after `finish`.

`lce gallery ACTION --help` has each action's options. Exit status: 0 done, 1 verification failed, 2 wrong use, 75 not
finished: run the same command again.
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
    from collections.abc import Callable

    from trainer.evaluation.arrays import FloatArray, IntArray
    from trainer.gallery.convert import Converter
    from trainer.gallery.files import Check
    from trainer.gallery.postgres import PostgresGallery

HELP = "upgrade stored embeddings: arrays, FAISS indexes, PostgreSQL, Qdrant"
EXIT_UNFINISHED = 75
MIXED = 0.02  # share of rows in another space, at which verification fails
RECALL_LOSS = 0.05  # of an index against the old one's, at which verification fails

ACTIONS = {
    "plan": (
        "what an upgrade takes: rows, bytes, seconds, and what cannot be kept; changes nothing",
        "lce gallery plan faces.npy --model runs/new",
    ),
    "upgrade": (
        "convert every vector and swap the result in; an interrupted one goes on",
        "lce gallery upgrade postgresql://user@host/database --table faces --model runs/new",
    ),
    "verify": (
        "re-compute a sample and compare; of an index the recall, of a table the plans of its queries",
        "lce gallery verify faces.npy --model runs/new",
    ),
    "status": ("where an upgrade stands", "lce gallery status faces.npy"),
    "rollback": ("the old vectors again", "lce gallery rollback faces.npy"),
    "finish": ("drop the old vectors: no way back, and the next upgrade may begin", "lce gallery finish faces.npy"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, (what, example) in ACTIONS.items():
        sub = actions.add_parser(
            name, help=what, description=f"{what[0].upper()}{what[1:]}.", epilog=f"Example: {example}"
        )
        sub.add_argument(
            "store", help="a gallery file or folder, postgresql://user@host/database, or qdrant:http://host:6333"
        )
        if name in ("plan", "upgrade", "verify"):
            sub.add_argument("--model", metavar="MODEL", help="the new model")
            sub.add_argument(
                "--images",
                metavar="DATASET",
                help="embed the images anew instead of converting the vectors; ids are record numbers",
            )
            sub.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where the model runs")
            add_reading_arguments(sub)
        if name == "upgrade":
            _add_upgrade(sub)
        if name == "verify":
            _add_verify(sub)
        table = sub.add_argument_group("PostgreSQL")
        table.add_argument("--table", default="faces", help="the table (default: %(default)s)")
        table.add_argument("--column", default="embedding", help="its vector column (default: %(default)s)")
        table.add_argument("--key", help="what names a row: a column, or several as a,b (default: the primary key)")
        if name == "upgrade":
            table.add_argument(
                "--index",
                choices=("same", "hnsw", "ivfflat", "none"),
                default="same",
                help="the new column's: as the old one's, by their own definitions, or one by cosine (default: same)",
            )
            table.add_argument("--no-swap", action="store_true", help="convert, but leave the swap to a later call")
        points = sub.add_argument_group("Qdrant")
        points.add_argument("--alias", default="faces", help="the alias that queries go through (default: %(default)s)")
        points.add_argument("--vector", default="", help="the vector's name, where the collection has names")
        if name in ("plan", "upgrade"):
            points.add_argument(
                "--new-vector",
                metavar="NAME",
                default="",
                help="make a second vector of this name in the same points (Qdrant 1.18 or later)",
            )
        sub.add_argument("--json", metavar="FILE", help="write the outcome as JSON; - for standard output")


def _add_upgrade(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--order",
        default="stored",
        help="which rows come first: stored, random, confidence (least certain first; needs --images), distance (what "
        "T₁₂ is expected to map worst first; the model needs compat.distance), highest:WHERE or lowest:WHERE, where "
        "WHERE is a column of the table or a .npy of one number a row, such as how often it was searched (default: "
        "%(default)s)",
    )
    parser.add_argument("--batch", type=int, default=4096, help="rows at a time (default: %(default)s)")
    parser.add_argument("--rate", type=float, metavar="ROWS", help="at most so many rows per second")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sample", type=int, default=1000, help="rows re-computed (default: %(default)s)")
    parser.add_argument("--least-cosine", type=float, default=0.999, help="what they must reach (default: %(default)s)")
    parser.add_argument(
        "--least-recall", type=float, help="what an index must find (default: 0.05 less than the old one found)"
    )
    parser.add_argument("--old", metavar="MODEL", help="the old model: says in whose space rows are, by --images")
    parser.add_argument("--bank", metavar="BANK", help="the old model's centre bank: says in whose space rows are")


def run(args: argparse.Namespace) -> int:
    """Run ``lce gallery``; returns the exit status."""
    if args.action == "upgrade" and (args.batch < 1 or (args.rate is not None and args.rate <= 0)):
        raise LceError("--batch and --rate must be positive")
    if args.action == "verify" and args.sample < 1:
        raise LceError(f"--sample {args.sample}: at least 1")
    kinds = {"postgresql://": _database, "postgres://": _database, "qdrant:": _points}
    open_store = next((function for start, function in kinds.items() if args.store.startswith(start)), _file)
    outcome, unfinished = open_store(args)
    reasons = _failures(args, outcome) if args.action == "verify" else []
    if args.action == "verify":
        outcome["verified"] = not reasons
    write_json({"action": args.action, **outcome}, args.json)
    if args.json != "-":
        for line in _lines(args, outcome):
            print(line)
    for reason in reasons:
        print(f"lce gallery: NOT verified: {reason}", file=sys.stderr)
    if unfinished is not None:
        print(f"lce gallery: not finished: {unfinished}", file=sys.stderr)
        return EXIT_UNFINISHED
    return 1 if reasons else 0


def _mixed(outcome: dict[str, Any]) -> list[str]:
    """Why the spaces of the rows are not as they should be; empty: they are, or nothing says it."""
    spaces = outcome.get("spaces")
    if spaces is None:
        return []
    wanted = outcome["expected_space"] or max(("old", "new"), key=lambda space: spaces[space])
    other = "new" if wanted == "old" else "old"
    if spaces[other] <= MIXED:
        return []
    shares = f"{spaces[other]:.1%} of the rows are in the {other} model's space"
    return [f"{shares}, {spaces[wanted]:.1%} in the {wanted} one's"]


def _failures(args: argparse.Namespace, outcome: dict[str, Any]) -> list[str]:
    """Why a verification fails; empty: it does not."""
    found = _mixed(outcome)
    if "smallest_cosine" not in outcome:
        return found
    recall, before, least = outcome["recall"], outcome["recall_before"], args.least_recall
    if outcome["smallest_cosine"] < args.least_cosine:
        found.append(f"the smallest cosine is {outcome['smallest_cosine']:.6f}, allowed is {args.least_cosine}")
    if least is None and before is not None:
        least = before - RECALL_LOSS
    if least is not None and recall is not None and recall < least:
        found.append(f"the index finds {recall:.3f} of the exact neighbours, wanted are {least:.3f}")
    if outcome["missing"] or outcome["rows_now"] < outcome["rows_before"]:
        found.append(f"there were {outcome['rows_before']:,} rows and there are {outcome['rows_now']:,}")
    found += [
        f"a query by {search['index']} was answered by an index and takes a {search['after']} now"
        for search in outcome.get("searches", ())
        if search["before"] == "index" and search["after"] != "index"
    ]
    return found


_NAMES = {
    "version": "conversion",
    "dim_in": "dimension before",
    "dim_out": "dimension after",
    "done": "rows converted",
    "left": "rows left",
    "converted_here": "rows converted here",
    "bytes_needed": "bytes needed",
    "bytes_free": "bytes free",
    "rows": "rows",
    "phase": "phase",
    "written_after_the_swap": "what was written after the swap is kept in",
}


def _lines(args: argparse.Namespace, outcome: dict[str, Any]) -> list[str]:
    """An outcome for people."""
    if args.action == "verify":
        lines = []
        if (spaces := outcome.get("spaces")) is not None:
            shares = f"the old model's {spaces['old']:.1%}, the new one's {spaces['new']:.1%}"
            lines.append(f"spaces of {spaces['rows']:,} rows: {shares}, unclear {spaces['unclear']:.1%}")
        if "smallest_cosine" not in outcome:
            return lines
        begin = "verified: " if outcome["verified"] else ""
        lines.append(f"{begin}{outcome['rows']:,} rows re-computed, smallest cosine {outcome['smallest_cosine']:.6f}")
        lines.append(f"rows: {outcome['rows_now']:,}, {outcome['rows_before']:,} before")
        if outcome["recall"] is not None:
            before = "" if outcome["recall_before"] is None else f", {outcome['recall_before']:.3f} before"
            lines.append(f"exact neighbours that the index finds: {outcome['recall']:.3f}{before}")
        for search in outcome.get("searches", ()):
            lines.append(f"a query by {search['index']}: {search['after']}, {search['before']} before")
        return lines
    lines = [f"{_NAMES[name]}: {value:,}" if isinstance(value, int) else f"{_NAMES[name]}: {value}"
             for name, value in outcome.items() if name in _NAMES and value is not None]  # fmt: skip
    if "seconds" in outcome:
        lines.append(f"time: about {outcome['seconds']:.0f} s")
    return lines + [f"not kept: {text}" for text in outcome.get("not_kept", ())]


_Outcome = tuple[dict[str, Any], str | None]
"""Figures, and why the work is not finished."""


def _verify(
    args: argparse.Namespace,
    phase: str,
    verify: "Callable[[], Check]",
    draw: "Callable[[], tuple[IntArray, list[FloatArray]]]",
) -> _Outcome:
    """Verify an upgrade, and (with --old and --images, or --bank) say in whose space a sample of the rows is."""
    if args.bank is None and args.old is None:
        return asdict(verify()), None
    from trainer.compat.bank.center_bank import CenterBank
    from trainer.data import open_dataset
    from trainer.distributed import choose_device
    from trainer.gallery.spaces import by_centers, by_images

    device = choose_device(args.device, 0)
    new = open_model(_model(args), args, device)
    ids, vectors = draw()
    if args.bank is not None:
        bank = CenterBank.open(args.bank)
        blocks = (bank.rows(at, min(at + 65536, bank.num_classes)) for at in range(0, bank.num_classes, 65536))
        spaces = by_centers(vectors, (rows.centers[rows.mask].numpy() for rows in blocks), new)
    elif args.images is None:
        raise LceError("gallery verify: --old needs --images, the pictures of the gallery")
    else:
        spaces = by_images(ids, vectors, open_dataset(args.images), open_model(args.old, args, device), new)
    outcome: dict[str, Any] = asdict(verify()) if phase == "swapped" else {"rows": spaces.rows}
    expected = {"swapped": "new", "finished": "new", "converting": "old"}.get(phase)
    return {**outcome, "spaces": asdict(spaces), "expected_space": expected}, None


def _model(args: argparse.Namespace) -> str:
    if args.model is None:
        raise LceError(f"gallery {args.action}: give the new model with --model")
    return str(args.model)


def _converter(args: argparse.Namespace, dim_in: int, version: str | None = None) -> "Converter":
    """The conversion that the arguments ask for; pictures that only tell the spaces apart (``version``) make none."""
    from trainer.data import open_dataset
    from trainer.distributed import choose_device
    from trainer.gallery.convert import Forward, Reencode
    from trainer.models.model import check_distinct

    model = open_model(_model(args), args, choose_device(args.device, 0))
    if not args.images or (args.action == "verify" and (version or "").startswith("t12-")):
        return Forward(model)
    images = open_dataset(args.images)
    check_distinct(model, images)
    return Reencode(model, images, dim_in)


def _file(args: argparse.Namespace) -> _Outcome:
    from trainer.gallery import files
    from trainer.gallery.open import open_gallery

    path = Path(args.store)
    if args.action == "status":
        state = files.status(path)
        return ({"phase": "none", "rows": open_gallery(path).rows} if state is None else asdict(state)), None
    if args.action == "rollback":
        kept = files.rollback(path)
        return {"phase": "none", "written_after_the_swap": None if kept is None else str(kept)}, None
    if args.action == "finish":
        files.finish(path)
        return {"phase": "finished"}, None
    before = files.status(path)
    fresh = before is None or before.phase == "finished"
    if args.action == "verify":
        phase, version, dim = ("none", None, 0) if before is None else (before.phase, before.version, before.dim_in)
        return _verify(
            args,
            phase,
            lambda: files.verify(path, _converter(args, dim, version), args.sample),
            lambda: files.sample(path, args.sample),
        )
    converter = _converter(args, open_gallery(path).dim if before is None or fresh else before.dim_in)
    if args.action == "plan":
        return asdict(files.plan(path, converter)), None
    from tools.progress import progress_bar
    from trainer.data import open_dataset
    from trainer.gallery.orders import order_rows

    if fresh:
        _say(files.plan(path, converter, 1).not_kept)
    # An upgrade that continues has its order.
    order = None
    if fresh and args.order != "stored":
        images = open_dataset(args.images) if args.images else None
        model = open_model(_model(args), args, "cpu") if args.order == "distance" else None
        order = order_rows(args.order, path, images, model=model)
    with progress_bar("converting") as progress:
        state = files.upgrade(
            path, converter, order=order, batch=args.batch, rows_per_second=args.rate, progress=progress
        )
    return asdict(state), None


def _say(not_kept: list[str]) -> None:
    for text in not_kept:
        print(f"not kept: {text}", file=sys.stderr)


def _database(args: argparse.Namespace) -> _Outcome:
    from trainer.gallery.postgres import PostgresGallery

    order = args.order if args.action == "upgrade" else "stored"
    gallery = PostgresGallery(args.store, args.table, args.column, args.key, order)
    if args.action == "status":
        return asdict(gallery.status()), None
    if args.action in ("rollback", "finish"):
        gallery.rollback() if args.action == "rollback" else gallery.finish()
        return asdict(gallery.status()), None
    if args.action == "verify":
        state = gallery.status()
        return _verify(
            args,
            state.phase,
            lambda: gallery.verify(_converter(args, gallery.dim, state.version), args.sample),
            lambda: gallery.sample(args.sample),
        )
    converter = _converter(args, gallery.dim)
    if args.action == "plan":
        return gallery.plan(converter), None
    return _upgrade_table(args, gallery, converter)


def _upgrade_table(args: argparse.Namespace, gallery: "PostgresGallery", converter: "Converter") -> _Outcome:
    from tools.progress import progress_bar
    from trainer.gallery.postgres import UnfinishedError

    _say(gallery.begin(converter, args.index == "same"))
    total, done = gallery.status().left, 0
    unfinished: str | None = None
    with progress_bar("converting") as progress:

        def count(rows: int) -> None:
            nonlocal done
            done += rows
            if progress is not None:
                progress(done, max(done, total))

        pace: dict[str, Any] = {"batch": args.batch, "rows_per_second": args.rate, "progress": count}
        try:
            if total:
                gallery.work(converter, **pace)
            if not args.no_swap and gallery.status().phase == "converting":
                print("building the indexes and swapping …", file=sys.stderr)
                gallery.complete(converter, index=args.index, **pace)
        except UnfinishedError as error:
            unfinished = str(error)
    return {"converted_here": done, **asdict(gallery.status())}, unfinished


def _points(args: argparse.Namespace) -> _Outcome:
    from tools.progress import progress_bar
    from trainer.gallery.qdrant_vector import open_points

    new_vector = getattr(args, "new_vector", "")
    gallery = open_points(args.store.removeprefix("qdrant:"), args.alias, args.vector, new_vector)
    try:
        if args.action in ("rollback", "finish"):
            gallery.rollback() if args.action == "rollback" else gallery.finish()
        if args.action == "finish":
            return {"phase": "finished"}, None
        if args.action not in ("plan", "upgrade", "verify"):
            return asdict(gallery.status()), None
        state = gallery.status()
        if args.action == "verify":
            return _verify(
                args,
                state.phase,
                lambda: gallery.verify(_converter(args, gallery.dim, state.version), args.sample),
                lambda: gallery.sample(args.sample),
            )
        converter = _converter(args, state.dim_in or gallery.dim)
        if args.action == "plan":
            return gallery.plan(converter), None
        if args.order != "stored":
            raise LceError("gallery upgrade: Qdrant gives points by id; leave out --order")
        with progress_bar("converting") as progress:
            state = gallery.upgrade(converter, batch=args.batch, rows_per_second=args.rate, progress=progress)
        return asdict(state), None
    finally:
        gallery.close()
