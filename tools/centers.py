"""Make the centre bank that training needs to stay compatible with an old model, and look into one.

  lce centers from-model runs/old data/train bank --nproc 2             # the old model, run over the new images
  lce centers from-model runs/old data/train bank --labels splits/new.npy   # with the label table that is trained on
  lce centers from-embeddings old.npy bank --dataset data/train         # old embeddings, one row per record
  lce centers from-classifier checkpoint_gpu_*.pt bank                  # the old classifier's rows, as saved per rank
  lce centers from-classifier head.pt bank --map map.csv                # other class numbers: lines new,old
  lce centers info bank                                                 # counts, boundaries, likely duplicates

A bank holds a centre and a boundary for each class of the *new* training set (trainer/compat/bank/center_bank.py).
"""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.arguments import whole_number
from tools.foreign import add_reading_arguments, open_model
from tools.output import write_json

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

    from trainer.compat.bank.boundary import BoundaryRule
    from trainer.compat.bank.center_bank import CenterBank
    from trainer.compat.bank.class_map import ClassMap
    from trainer.data.index import Dataset

HELP = "make the centre bank of an old model, or look into one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``lce centers``."""
    commands = parser.add_subparsers(dest="how", required=True, metavar="HOW")
    model = _parser(commands, "from-model", "run the old model over the new training set")
    model.add_argument("model", type=Path, help="run folder, checkpoint, model folder, .onnx or weights file")
    model.add_argument("dataset", type=Path, help="data set folder")
    model.add_argument("out", type=Path, help="the bank's folder")
    model.add_argument("--labels", type=Path, help="int64 .npy that replaces the data set's labels")
    model.add_argument(
        "--nproc", type=whole_number(1), default=1, help="processes on this machine (torchrun is started for you)"
    )
    model.add_argument("--batch-size", type=whole_number(1), default=256, help="images at a time (%(default)s)")
    model.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    model.add_argument("--flip", action="store_true", help="embed as the sum of the image and its mirror image")
    model.add_argument("--embeddings", type=Path, help="keep the embeddings by record in this new .npy file")
    _add_rule(model)
    add_reading_arguments(model)
    embeddings = _parser(commands, "from-embeddings", "mean and boundary of old embeddings per class")
    embeddings.add_argument("embeddings", type=Path, nargs="+", help=".npy, .npz, .safetensors or .pt files, in order")
    embeddings.add_argument("out", type=Path, help="the bank's folder")
    embeddings.add_argument(
        "--labels",
        type=Path,
        help="whole numbers (.npy), the new class of each embedding (−1: leave out); the .yaml next to it counts",
    )
    embeddings.add_argument("--dataset", type=Path, help="take labels and class count from this data set")
    embeddings.add_argument(
        "--classes", type=whole_number(1), help="class count, where neither the data set nor the labels' .yaml says it"
    )
    embeddings.add_argument("--key", help="the array's name inside the files")
    _add_rule(embeddings)
    embeddings.add_argument("--allow-collapsed", action="store_true", help="boundaries may all be close to 1")
    classifier = _parser(commands, "from-classifier", "the rows of the old model's classifier")
    classifier.add_argument("source", type=Path, nargs="+", help="a file, the files of all ranks, or a folder")
    classifier.add_argument("out", type=Path, help="the bank's folder")
    classifier.add_argument("--key", help="the weight's name inside the file (default: guessed and shown)")
    classifier.add_argument("--layout", choices=("auto", "rows", "columns"), default="auto", help="rows: classes × dim")
    classifier.add_argument(
        "--old-classes", type=whole_number(1), help="the old class count: settles guesses, finds lost ranks"
    )
    classifier.add_argument(
        "--ranks", type=whole_number(1), help="how many files of ranks there are: needed for a lone checkpoint_gpu_0.pt"
    )
    classifier.add_argument(
        "--map", type=Path, help="which old class each new class is: .npy (−1: none) or .csv new,old"
    )
    classifier.add_argument("--new-dataset", type=Path, help="the new training set, for class names and count")
    classifier.add_argument("--old-dataset", type=Path, help="the old training set, for class names")
    for sub in (model, embeddings, classifier):
        _add_output(sub)
    info = _parser(commands, "info", "counts, boundaries, and likely duplicates in a bank")
    info.add_argument("bank", type=Path)
    info.add_argument("--pairs", type=whole_number(0), default=10, help="how many nearest pairs of centres to show")
    info.add_argument("--dataset", metavar="FOLDER[@LABELS.npy]", help="the set whose names the classes have")
    info.add_argument("--verify", action="store_true", help="read everything and compare the checksums first")
    info.add_argument("--json", metavar="FILE", help="write the figures there; - is standard output")


def _parser(commands: "Commands", name: str, what: str) -> argparse.ArgumentParser:
    """A way to make a bank, whose help shows its lines of this module's examples."""
    assert __doc__ is not None
    examples = [line for line in __doc__.splitlines() if line.startswith(f"  lce centers {name} ")]
    return commands.add_parser(
        name,
        help=what,
        description="\n".join([f"{what[0].upper()}{what[1:]}.", "", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_rule(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("centres and boundaries")
    group.add_argument("--centers", type=Path, metavar="BANK", help="keep this bank's centres, measure boundaries only")
    group.add_argument("--quantile", type=float, default=0.0, help="share of a class outside its boundary (0: minimum)")
    group.add_argument(
        "--outliers", choices=("none", "iqr", "nearest"), default="none", help="left out before that (%(default)s)"
    )
    group.add_argument("--nearest-share", type=float, default=0.9, help="with --outliers nearest (%(default)s)")
    group.add_argument("--single", type=float, help="boundary of classes with one image (default: the others' median)")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--storage", choices=("float32", "bfloat16", "int8"), default="float32", help="on disk (%(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="replace what exists")
    parser.add_argument("--json", metavar="FILE", help="write the figures there; - is standard output")


def run(args: argparse.Namespace) -> int:
    """Do what ``args.how`` says; returns the exit status."""
    actions = {
        "from-model": _from_model,
        "from-embeddings": _from_embeddings,
        "from-classifier": _from_classifier,
        "info": _info,
    }
    return actions[args.how](args)


def _from_model(args: argparse.Namespace) -> int:
    from tools.parallel import on_ranks_already, one_voice, start_ranks
    from trainer.distributed import process_group

    if args.nproc != 1 and not on_ranks_already():
        return start_ranks(args.argv, args.nproc)
    with process_group(args.device, timeout_seconds=24 * 3600) as ranks, one_voice(ranks):
        return _run_model(args, ranks)


def _run_model(args: argparse.Namespace, ranks: Any) -> int:
    from tools.progress import progress_bar
    from trainer.compat.bank.center_bank import CenterBank
    from trainer.compat.bank.from_model import bank_from_model
    from trainer.data.index import open_dataset
    from trainer.models.model import resizing

    rule = _rule(args)
    dataset = open_dataset(args.dataset, args.labels)
    model = open_model(args.model, args, ranks.device, ranks.is_main)
    if ranks.is_main and resizing(model, dataset):
        print(resizing(model, dataset), file=sys.stderr)
    centers = None if args.centers is None else CenterBank.open(args.centers)
    started = time.perf_counter()
    with progress_bar("embedding, then centres", ranks.is_main) as progress:
        bank = bank_from_model(
            model,
            dataset,
            args.out,
            rule=rule,
            centers=centers,
            flip=args.flip,
            batch_size=args.batch_size,
            keep_embeddings=args.embeddings,
            ranks=ranks,
            embed_progress=progress,
            bank_progress=progress,
            storage=args.storage,
            overwrite=args.force,
        )
    if ranks.is_main:
        _report(args, bank, time.perf_counter() - started)
        unused = int((dataset.sound_labels < 0).sum())
        if args.embeddings is not None and unused:
            print(
                f"{args.embeddings}: one row per record; the {unused} records without a class (label −1, or damaged) "
                "were not embedded and have rows of zeros",
                file=sys.stderr,
            )
    return 0


def _from_embeddings(args: argparse.Namespace) -> int:
    from tools.progress import progress_bar
    from trainer.compat.bank.center_bank import BankInfo, CenterBank
    from trainer.compat.bank.convert import bank_from_embeddings
    from trainer.compat.bank.matrices import open_rows, read_labels
    from trainer.data.index import check_rows, open_dataset, table_info
    from trainer.errors import LceError

    if (args.labels is None) == (args.dataset is None):
        raise LceError("give the classes of the embeddings: --labels FILE or --dataset FOLDER, one of them")
    rule, dataset = _rule(args), None
    if args.dataset is not None:
        dataset = open_dataset(args.dataset)
        labels, classes = dataset.sound_labels, args.classes or dataset.num_classes
    else:
        labels, described = read_labels(args.labels), table_info(args.labels)
        classes = args.classes or (described.num_classes if described else int(labels.max(initial=-1)) + 1)
    if len(args.embeddings) == 1:
        check_rows(args.embeddings[0], dataset if dataset is not None else args.labels)
    info = BankInfo(
        made_from="embeddings",
        source=" ".join(str(path) for path in args.embeddings),
        dataset=None if dataset is None else dataset.named,
        dataset_fingerprint=None if dataset is None else dataset.fingerprint,
        numbering=None if dataset is None or classes != dataset.num_classes else dataset.numbering,
        boundary=rule.text(),
    )
    started = time.perf_counter()
    with progress_bar("centres") as progress:
        bank = bank_from_embeddings(
            open_rows(args.embeddings, args.key),
            labels,
            classes,
            args.out,
            info,
            rule=rule,
            centers=None if args.centers is None else CenterBank.open(args.centers),
            progress=progress,
            storage=args.storage,
            overwrite=args.force,
            allow_collapsed=args.allow_collapsed,
        )
    _report(args, bank, time.perf_counter() - started)
    return 0


def _from_classifier(args: argparse.Namespace) -> int:
    from tools.cli import translated
    from tools.progress import progress_bar
    from trainer.compat.bank.center_bank import BankInfo
    from trainer.compat.bank.classifiers import open_classifier
    from trainer.compat.bank.convert import bank_from_rows
    from trainer.data.index import open_dataset

    new, old = (None if path is None else open_dataset(path) for path in (args.new_dataset, args.old_dataset))
    classifier = open_classifier(args.source, args.key, args.layout, args.old_classes, args.ranks)
    class_map = _class_map(args.map, new, old)
    print(translated(classifier.found, args.parser), file=sys.stderr)
    if class_map is not None:
        print(class_map.summary, file=sys.stderr)
    info = BankInfo(
        made_from="classifier",
        source=" ".join(str(path) for path in args.source),
        dataset=None if new is None else new.named,
        numbering=None if new is None else new.numbering,
        boundary="none (a classifier says nothing of the spread of its images)",
    )
    started = time.perf_counter()
    with progress_bar("centres") as progress:
        bank = bank_from_rows(
            classifier.rows,
            args.out,
            info,
            class_map=class_map,
            progress=progress,
            storage=args.storage,
            overwrite=args.force,
        )
    _report(args, bank, time.perf_counter() - started)
    return 0


def _class_map(file: Path | None, new: "Dataset | None", old: "Dataset | None") -> "ClassMap | None":
    """From a file (its names are those of the data sets, where they have some), else from equal names, else None."""
    from trainer.compat.bank.class_map import ClassMap
    from trainer.errors import CenterBankError

    new_names, old_names = (None if dataset is None else dataset.class_names for dataset in (new, old))
    if file is not None:
        return ClassMap.from_file(file, new_names, old_names, None if new is None else new.num_classes)
    for dataset, names in ((new, new_names), (old, old_names)):
        if dataset is not None and names is None:
            raise CenterBankError(f"{dataset.path}: its classes have no names; give numbers in --map instead")
    if new is None and old is None:
        return None
    if new is None or old is None or new_names is None or old_names is None:
        raise CenterBankError("identical names need both --new-dataset and --old-dataset")
    return ClassMap.from_names(new_names, old_names, f"{new.path} and {old.path}")


def _info(args: argparse.Namespace) -> int:
    from tools.cli import translated
    from tools.progress import progress_bar
    from trainer.compat.bank.bank_info import describe, nearest_pairs, summarise
    from trainer.compat.bank.center_bank import CenterBank

    bank = CenterBank.open(args.bank)
    if args.verify:
        bank.verify()
    names = _identity_names(bank, args.dataset)
    with progress_bar("comparing centres") as progress:
        pairs = nearest_pairs(bank, args.pairs, progress=progress)
    figures = {**summarise(bank), "nearest_pairs": pairs}
    if names is not None:
        for pair in pairs:
            pair["names"] = [names[k] for k in pair["classes"]]
        figures["meaningless"]["names"] = [names[k] for k in figures["meaningless"]["examples"]]
    write_json(figures, args.json)
    if args.json != "-":
        print(translated(describe(args.bank, figures), args.parser))
        if names is None:
            print("classes are shown by number: --dataset FOLDER[@LABELS.npy], the set it was made for, names them")
    return 0


def _identity_names(bank: "CenterBank", given: str | None) -> list[str] | None:
    """The names of a bank's classes, from the data set that is given or, where it is still there, that it was made for.

    Raises:
        LceError: the data set that is given cannot be opened, or numbers other identities.
    """
    from trainer.data.index import open_named
    from trainer.errors import LceError

    made_for = (bank.info.dataset or "").replace(" with the labels ", "@")
    if given is None and not made_for:
        return None
    try:
        dataset = open_named(given or made_for)
        bank.check_classes(dataset.num_classes, dataset, "the bank")
        return dataset.class_names
    except LceError:
        if given is not None:
            raise
        return None


def _rule(args: argparse.Namespace) -> "BoundaryRule":
    from trainer.compat.bank.boundary import BoundaryRule
    from trainer.errors import LceError

    try:
        return BoundaryRule(args.quantile, args.outliers, args.nearest_share, args.single)
    except ValueError as error:
        raise LceError(str(error)) from None


def _report(args: argparse.Namespace, bank: "CenterBank", seconds: float) -> None:
    """Say what was made, on the screen or as JSON."""
    from trainer.compat.bank.bank_info import summarise

    figures = {**summarise(bank), "out": str(args.out), "seconds": round(seconds, 3)}
    write_json(figures, args.json)
    if args.json != "-":
        boundary = figures["boundary"]
        known = (
            f"boundaries {boundary['min']:.3f} … {boundary['median']:.3f} … {boundary['max']:.3f}" if boundary else ""
        )
        print(
            f"{args.out}: {figures['classes']} classes × {figures['dim']} ({figures['storage']}), {figures['masked']} "
            f"without a centre, {known or 'no boundaries'}; {seconds:.1f} s"
        )
