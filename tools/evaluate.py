"""Say whether a new model may query the gallery of a deployed one: verdict, figures with intervals, JSON and a report.

    lce evaluate --old runs/old --new runs/new --paragon runs/alone --data unseen=data/unseen seen=data/seen \\
        --fars 1e-4,1e-3 --json result.json --report report.html --runs runs/old runs/new --fail-unsafe

In a chain of upgrades --between names the models that came between, and the new one is judged on the galleries of all:

    lce evaluate --old runs/v1 --between v2=runs/v2 --new runs/v3 --data unseen=data/unseen

Pair lists and template sets name no identities: they give figures, no verdict.

    lce evaluate --old runs/old --new runs/new --pairs lfw=data/lfw.bin --templates ijbc=data/IJBC

Of two finished models and maps that were trained between them (configs/cross-model.yaml), or of embeddings on disk:

    lce evaluate --old old.onnx --new new.onnx --maps runs/maps --data unseen=data/unseen
    lce evaluate --old-embeddings old.npy --new-embeddings new.npy --labels labels.npy --maps runs/maps

Models are run folders, checkpoints, model folders or ONNX files; data sets are what `lce pack` makes, RecordIO, or a
folder of identity folders, with a label table behind an @ (unseen=data/packed@splits/unseen.npy). Give identities that
no setting was chosen on. A set's answer is by rank-1 and by the TAR at the smallest of the FARs that its pairs can
resolve: SAFE when one of them is better (its whole 95 % interval above zero) and the other better or level, with at
least --min-identities; NOT SAFE when one is worse; else NOT ENOUGH DATA. A set with identities
that a model was trained on, found automatically or declared by --seen, is judged apart: it neither makes nor blocks the
verdict; --unseen declares that equal names mean other people. Embeddings on disk are the set `embeddings`, of which
nothing is found: --seen embeddings or --unseen embeddings. Several ranks share the embedding:

    torchrun --nproc-per-node 2 -m tools.cli evaluate …

Exit status: 0 done (1 with --fail-unsafe unless the verdict is SAFE), 2 wrong use.
"""

import argparse
import io
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.arguments import at_least_zero, whole_number
from tools.evaluate_tables import print_tables
from tools.foreign import add_reading_arguments, open_model
from tools.output import write_json
from trainer.errors import LceError

if TYPE_CHECKING:
    from trainer.data.index import Dataset
    from trainer.distributed import Ranks
    from trainer.evaluation.embeddings import EmbeddingCache, Progress
    from trainer.evaluation.report import RunRecord
    from trainer.evaluation.results import Options
    from trainer.models.model import EmbeddingModel

HELP = "may the new model query the old gallery? verdict, figures, report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--old", metavar="MODEL", help="the deployed model")
    parser.add_argument("--new", metavar="MODEL", help="the model that is to replace it")
    parser.add_argument("--maps", metavar="FOLDER", help="maps of the new embeddings, where they were written alone")
    stored = parser.add_argument_group("embeddings on disk, in place of models and data sets")
    stored.add_argument(
        "--old-embeddings", type=Path, metavar="FILE", help="the old model's, one row an image (.npy …)"
    )
    stored.add_argument("--new-embeddings", type=Path, metavar="FILE", help="the new model's, of the same images")
    stored.add_argument("--labels", type=Path, metavar="FILE", help="the identity of each (.npy; −1: left out)")
    parser.add_argument(
        "--between",
        nargs="+",
        default=[],
        metavar="NAME=MODEL",
        help="models deployed after the old one and before the new one, in this order",
    )
    parser.add_argument(
        "--paragon", metavar="MODEL", help="a new model trained without compatibility, for the update gain"
    )
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="NAME=DATASET",
        help="labelled sets: the verdict is theirs; with a label table of lce split: NAME=DATASET@LABELS.npy",
    )
    parser.add_argument(
        "--seen",
        nargs="+",
        default=[],
        metavar="NAME",
        help="sets of --data whose identities were trained on: judged apart, no part of the verdict; embeddings on "
        "disk are the set `embeddings`",
    )
    parser.add_argument(
        "--unseen",
        nargs="+",
        default=[],
        metavar="NAME",
        help="sets of --data whose people only share names (person1) with training identities of other data sets; "
        "`embeddings`: nobody was trained on those of the embeddings on disk",
    )
    parser.add_argument(
        "--pairs",
        nargs="+",
        default=[],
        metavar="NAME=FILE",
        help="pair lists: NAME=FILE.bin, or NAME=LIST.txt@DATASET",
    )
    parser.add_argument(
        "--templates",
        nargs="+",
        default=[],
        metavar="NAME=FOLDER",
        help="template sets, in the layout of IJB-B and IJB-C",
    )
    parser.add_argument(
        "--gallery",
        choices=("images", "pooled"),
        default="images",
        help="pooled: measure galleries of one vector an identity as well, as a table of its own",
    )
    parser.add_argument("--score-weights", action="store_true", help="weigh a template's images by detection score")
    parser.add_argument("--norm-weights", action="store_true", help="weigh a template's images by embedding norm")
    parser.add_argument(
        "--fars", default="1e-4,1e-3,1e-2", help="false accept rates, comma separated (default: %(default)s)"
    )
    parser.add_argument(
        "--runs", nargs="*", default=[], metavar="RUN", help="run folders whose training the report shows"
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the HTML report (and its plots next to it)")
    parser.add_argument(
        "--pictures", action="store_true", help="the report holds pictures of example pairs (of people: personal data)"
    )
    parser.add_argument("--pdf", type=Path, metavar="FILE", help="print the report as PDF as well (needs Chromium)")
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON; - for standard output")
    parser.add_argument("--fail-unsafe", action="store_true", help="exit status 1 unless the verdict is SAFE")
    parser.add_argument(
        "--tolerance", type=at_least_zero, default=0.0, help="a loss of at most this much counts as level (default: 0)"
    )
    parser.add_argument(
        "--min-identities",
        type=whole_number(0),
        default=20,
        help="with fewer the verdict is never SAFE (default: %(default)s)",
    )
    parser.add_argument(
        "--replicates",
        type=whole_number(100),
        default=500,
        help="bootstrap draws of identities, at least 100 (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, help="seed of the bootstrap and of random orders (default: 0)"
    )
    parser.add_argument(
        "--no-colour-check",
        action="store_true",
        help="do not refuse sets that a model reads better with red and blue swapped",
    )
    parser.add_argument("--flip", action="store_true", help="add the mirrored image's embedding to each")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where models run")
    parser.add_argument(
        "--cache", metavar="FOLDER", help="where embeddings are kept; none: nowhere (default: user's cache)"
    )
    add_reading_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run ``lce evaluate``; returns the exit status."""
    from trainer.distributed import process_group

    fars = _fars(args.fars)
    _check_outputs(args)
    runs = _runs(args.runs)
    with process_group(args.device) as ranks:
        if _from_disk(args):
            result, datasets = (_measure_stored(args, fars, ranks) if ranks.is_main else {}), {}
        else:
            asked = _Evaluation(args, fars, ranks)
            asked.check()
            result, datasets = asked.measure(), asked.datasets
        if not ranks.is_main:
            return 0
        _write(args, result, datasets, runs)
        if args.json != "-":
            print_tables(result)
            if args.report is not None:
                print(f"report: {args.report}; its plots as files: {args.report.with_suffix('')}-plots")
        return 1 if args.fail_unsafe and result["verdict"]["answer"] != "SAFE" else 0


def _from_disk(args: argparse.Namespace) -> bool:
    """Whether embeddings on disk are evaluated. Raises :class:`LceError`: neither these nor models are given whole."""
    stored = {"--old-embeddings": args.old_embeddings, "--new-embeddings": args.new_embeddings, "--labels": args.labels}
    given = {"--old": args.old, "--new": args.new}
    needed = stored if any(value is not None for value in stored.values()) else given
    missing = [option for option, value in needed.items() if value is None]
    if missing:
        raise LceError(
            f"{missing[0]} is missing: give --old and --new, or --old-embeddings, --new-embeddings and --labels"
        )
    if needed is stored:
        wrong = next((name for name in _OF_MODELS if getattr(args, name)), None)
        if wrong is not None:
            option = f"--{wrong.replace('_', '-')}"
            raise LceError(f"{option}: not with embeddings on disk, which are evaluated as they are; leave it out")
    return needed is stored


_OF_MODELS = (
    *("old", "new", "between", "paragon", "data", "pairs", "templates", "pictures", "cache", "no_colour_check"),
    *("flip", "norm_weights", "score_weights", "pixels", "color", "mean", "std", "size", "output", "backbone"),
    "allow_collapsed",
)
"""Options of models and pictures, of which embeddings on disk have neither."""


def _options(args: argparse.Namespace, fars: tuple[float, ...]) -> "Options":
    from trainer.evaluation.results import Options
    from trainer.evaluation.verdict import Rules

    rules = Rules(tolerance=args.tolerance, min_identities=args.min_identities)
    return Options(fars=fars, replicates=args.replicates, seed=args.seed, rules=rules, pooled=args.gallery == "pooled")


def _measure_stored(args: argparse.Namespace, fars: tuple[float, ...], ranks: "Ranks") -> dict[str, Any]:
    from trainer.compat.bank.matrices import open_rows, read_labels
    from trainer.evaluation.embeddings import STORED, stored_set
    from trainer.evaluation.overlap import declarations
    from trainer.evaluation.provenance import provenance
    from trainer.evaluation.results import measure_sets, stages
    from trainer.models.open import load_model

    declared = declarations((STORED,), args.seen, args.unseen).get(STORED)
    maps = None if args.maps is None else load_model(args.maps, ranks.device)
    files = {"old": args.old_embeddings, "new": args.new_embeddings}
    opened = {role: open_rows([path]) for role, path in files.items()}
    rows = {role: found.read(0, len(found)).numpy() for role, found in opened.items()}
    labels = read_labels(args.labels, "the identity of each embedding")
    one, models = stored_set(files, rows, labels, maps, declared)
    with _progress(True) as (_, staged):
        result = measure_sets([one], _options(args, fars), staged(stages(1, models)))
    result["models"] = {role: _describe(model) for role, model in models.items()}
    named = ("old_embeddings", "new_embeddings", "labels", "maps")
    result["settings"] = {name: None if getattr(args, name) is None else str(getattr(args, name)) for name in named}
    result["settings"] |= {"seen": args.seen, "unseen": args.unseen}
    result |= {"pair_sets": {}, "template_sets": {}, "provenance": provenance()}
    return result


def _fars(text: str) -> tuple[float, ...]:
    try:
        return tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        raise LceError(f"--fars {text}: expected numbers separated by commas, for example 1e-4,1e-3") from None


def _named(option: str, texts: Sequence[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for text in texts:
        name, separator, path = text.partition("=")
        if not separator or not name or not path:
            raise LceError(f"{option} {text}: expected NAME=PATH, for example unseen=data/unseen")
        if name in named:
            raise LceError(f"{option}: two sets are named {name}; give each a name of its own")
        named[name] = path
    return named


def _check_outputs(args: argparse.Namespace) -> None:
    if args.report is None and (args.pictures or args.pdf):
        raise LceError(
            f"{'--pictures' if args.pictures else '--pdf'}: is part of the report; name it with --report FILE"
        )
    if args.pdf is not None:
        from trainer.evaluation.pdf import chromium

        chromium()
    files = [("--report", args.report), ("--pdf", args.pdf)]
    for option, file in (*files, ("--json", None if args.json in (None, "-") else Path(args.json))):
        if file is not None and not file.absolute().parent.is_dir():
            raise LceError(f"{option} {file}: the folder {file.absolute().parent} does not exist; make it first")


class _Evaluation:
    """What is evaluated. All is opened at once, so that what is wrong shows before anything is embedded."""

    def __init__(self, args: argparse.Namespace, fars: tuple[float, ...], ranks: "Ranks") -> None:
        from trainer.data import open_dataset, open_named
        from trainer.evaluation.overlap import declarations
        from trainer.evaluation.pairs import read_bin, read_list
        from trainer.evaluation.templates import read_templates
        from trainer.models.mapped import MappedModel
        from trainer.models.open import load_model

        if not (args.data or args.pairs or args.templates):
            raise LceError("nothing to measure on: give --data NAME=DATASET, --pairs or --templates")
        if not args.templates and (args.score_weights or args.norm_weights):
            option = "--score-weights" if args.score_weights else "--norm-weights"
            raise LceError(f"{option}: weighs the images of templates; name them with --templates, or leave it out")
        self.args, self.ranks = args, ranks
        self.options = _options(args, fars)
        between = _named("--between", args.between)
        wrong = next((name for name in between if name in ("old", "new", "paragon") or "->" in name), None)
        if wrong is not None:
            raise LceError(f"--between {wrong}: this name is taken; give the model another, for example v2")
        paths = {"old": args.old, **between, "new": args.new} | ({"paragon": args.paragon} if args.paragon else {})
        self.models = {role: open_model(path, args, ranks.device, ranks.is_main) for role, path in paths.items()}
        if args.maps is not None:
            self.models["new"] = MappedModel(self.models["new"], load_model(args.maps, ranks.device))
        self.size = self.models["old"].card.image_size
        self.datasets = {name: open_named(text) for name, text in _named("--data", args.data).items()}
        self.declared = declarations(self.datasets, args.seen, args.unseen)
        self.pairs = {}
        for name, text in _named("--pairs", args.pairs).items():
            file, separator, folder = text.partition("@")
            self.pairs[name] = (
                read_list(Path(file), open_dataset(folder)) if separator else read_bin(Path(file), self.size)
            )
        self.templates = {
            name: read_templates(Path(path), args.score_weights)
            for name, path in _named("--templates", args.templates).items()
        }

    def check(self) -> None:
        """Refuse what cannot be compared. Raises :class:`LceError`."""
        from trainer.distributed import on_main
        from trainer.evaluation.arrays import class_index
        from trainer.evaluation.chain import check_links
        from trainer.evaluation.embeddings import check_colours
        from trainer.models.model import check_distinct, resizing

        check_links(self.models)
        sets = self.datasets | {name: pairs.dataset for name, pairs in self.pairs.items()}
        for dataset, model in itertools.product(sets.values(), self.models.values()):
            if self.ranks.is_main and resizing(model, dataset):
                print(resizing(model, dataset), file=sys.stderr)
            on_main(partial(check_distinct, model, dataset), self.ranks)
        for name, dataset in self.datasets.items():
            class_index(dataset.labels[dataset.kept], f"{name} ({dataset.path})")
        for name, dataset in {} if self.args.no_colour_check else self.datasets.items():
            on_main(partial(check_colours, name, self.models, dataset), self.ranks)

    def measure(self) -> dict[str, Any]:
        """Embed on all ranks, measure on the first (the others return nothing)."""
        from trainer.evaluation.embeddings import EmbeddingCache, default_cache, embed_set
        from trainer.evaluation.provenance import provenance
        from trainer.evaluation.results import measure_sets, plain, stages

        folder = self.args.cache
        cache = EmbeddingCache(None if folder == "none" else Path(folder) if folder else default_cache())
        with _progress(self.ranks.is_main) as (counted, staged):
            sets = [
                embed_set(
                    name, self.models, dataset, cache, self.ranks, counted, self.args.flip, self.declared.get(name)
                )
                for name, dataset in self.datasets.items()
            ]
            more = {
                "pair_sets": self._measure_pairs(cache, counted),
                "template_sets": self._measure_templates(cache, counted),
            }
            if not self.ranks.is_main:
                return {}
            result = measure_sets(sets, self.options, staged(stages(len(sets), self.models)))
        result.update(plain(more))
        result["models"] = {role: _describe(model) for role, model in self.models.items()}
        given = {
            option: getattr(self.args, option)
            for option in ("data", "seen", "unseen", "pairs", "templates", "flip", "score_weights", "norm_weights")
        }
        result["settings"], result["provenance"] = given, provenance()
        return result

    def _measure_pairs(self, cache: "EmbeddingCache", counted: "Progress") -> dict[str, Any]:
        import numpy as np

        from trainer.evaluation.embeddings import embed_spaces
        from trainer.evaluation.pairs import measure_pairs

        measured, o = {}, self.options
        for name, pairs in self.pairs.items():
            records = np.unique(np.concatenate([pairs.first, pairs.second]))
            spaces = embed_spaces(name, self.models, pairs.dataset, records, cache, self.ranks, counted, self.args.flip)
            if self.ranks.is_main:
                measured[name] = measure_pairs(pairs, spaces, records, o.fars, o.replicates, o.seed)
        return measured

    def _measure_templates(self, cache: "EmbeddingCache", counted: "Progress") -> dict[str, Any]:
        from trainer.evaluation.embeddings import embed_spaces, pool_spaces
        from trainer.evaluation.templates import AlignedImages, measure_templates

        measured, o = {}, self.options
        for name, protocol in self.templates.items():
            images = AlignedImages(protocol, self.size)
            flips, norms = self.args.flip, self.args.norm_weights
            flat = embed_spaces(name, self.models, images, images.kept, cache, self.ranks, counted, flips, norms)
            if self.ranks.is_main:
                numbers, spaces = pool_spaces(flat, protocol, self.models, self.args.score_weights)
                measured[name] = measure_templates(protocol, spaces, numbers, o.fars, o.replicates, o.seed)
        return measured


def _describe(model: "EmbeddingModel") -> dict[str, Any]:
    card = model.card
    stored = card.image_size == (1, 1)  # embeddings on disk, of which nothing else is known
    return {
        "path": str(model.path),
        "backbone": card.backbone.name if card.backbone else "embeddings" if stored else "ONNX graph",
        "dimension": card.dim,
        "image": "–" if stored else f"{card.image_size[0]} × {card.image_size[1]} {card.color}",
        "mode": card.mode or "–",
        "identities": card.classes or "–",
        "steps": card.step or "–",
        "hash": model.hash,
    }


@contextmanager
def _progress(shown: bool) -> Iterator[tuple["Progress", Callable[[int], Callable[[str], None]]]]:
    """Two kinds of bars: images embedded, stages measured."""
    from tools.progress import progress_bars

    with progress_bars(shown) as bars:

        def counted(what: str, done: int, total: int) -> None:
            bars.update(f"embedding {what}", done, total)

        def staged(total: int) -> Callable[[str], None]:
            stages = itertools.count(1)
            bars.update("measuring", 0, total)
            return lambda stage: bars.update("measuring", next(stages), total, f"measuring {stage}")

        yield counted, staged


def _write(
    args: argparse.Namespace, result: dict[str, Any], datasets: dict[str, "Dataset"], runs: "list[RunRecord]"
) -> None:
    from trainer.evaluation.report import write_report

    if args.report is not None:
        write_report(args.report, result, runs, _pictures(datasets) if args.pictures else None)
    if args.pdf is not None:
        from trainer.evaluation.pdf import print_pdf

        print_pdf(args.report, args.pdf)
    write_json(result, args.json)


def _runs(folders: Sequence[str]) -> "list[RunRecord]":
    from trainer.evaluation.embeddings import training_curves
    from trainer.evaluation.report import RunRecord

    records = []
    for folder in map(Path, folders):
        config = folder / "config.yaml"
        settings = config.read_text(encoding="utf-8") if config.is_file() else ""
        records.append(RunRecord(folder.name, training_curves(folder), settings))
    return records


def _pictures(datasets: dict[str, "Dataset"]) -> Callable[[str, int], bytes | None]:
    from PIL import Image

    def picture(name: str, record: int) -> bytes | None:
        if name not in datasets:
            return None
        pixels = datasets[name].decode(record)
        if datasets[name].info.color == "BGR":
            pixels = pixels[..., ::-1]
        image = Image.fromarray(pixels)
        image.thumbnail((112, 112))
        buffer = io.BytesIO()
        small = max(image.size) < 64
        image.save(buffer, "PNG" if small else "JPEG", **({} if small else {"quality": 85}))
        return buffer.getvalue()

    return picture
