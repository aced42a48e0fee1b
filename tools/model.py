"""Say how a model file is read, and keep what is stated of a foreign one; convert TensorFlow.js graph models to ONNX.

  lce model describe old.onnx                                            # what is read from the file, what is assumed
  lce model describe old.onnx --data data/train                          # and whether its embeddings tell images apart
  lce model describe old.onnx --pixels 0..255 --color BGR --write old.model.json
  lce model convert faceres.json --output global_pooling/Mean --write faceres.onnx --pixels 0..255

A description next to the file it describes (old.model.json next to old.onnx) is found by every command and by training
runs; one elsewhere is given in the file's stead. Models of this trainer carry a card, which needs no description.
A converted graph is described too, where something is stated of it.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.foreign import add_reading_arguments, reading_of
from tools.output import write_json

if TYPE_CHECKING:
    from trainer.models.model import EmbeddingModel

HELP = "how a model file is read; describe or convert a foreign one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("action", choices=("describe", "convert"))
    parser.add_argument(
        "model",
        type=Path,
        help="run folder, checkpoint, model folder, .onnx or weights file; for convert a graph model's model.json",
    )
    parser.add_argument("--data", metavar="DATASET", help="refuse a model whose embeddings of its images coincide")
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="NAME.model.json: keep what is stated of a foreign model; for convert NAME.onnx",
    )
    parser.add_argument("--force", action="store_true", help="replace a file that exists")
    parser.add_argument("--json", metavar="FILE", help="write the figures there; - is standard output")
    add_reading_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Describe or convert; returns the exit status."""
    return _convert(args) if args.action == "convert" else _describe(args)


def _convert(args: argparse.Namespace) -> int:
    from trainer.data import open_named
    from trainer.errors import ModelError
    from trainer.models.description import description_of, write_description
    from trainer.models.model import check_distinct
    from trainer.models.onnx import OnnxModel
    from trainer.models.tensorflow_js import convert_graph_model
    from trainer.owner import owned

    target: Path | None = args.write
    if target is None or target.suffix != ".onnx":
        raise ModelError(f"{args.model}: say where it is written: --write NAME.onnx")
    kept = description_of(target)
    stated = reading_of(args).model_copy(update={"output": None})  # the file has one output
    data = None if args.data is None else open_named(args.data)
    models: list[OnnxModel] = []

    def accept(made: Path) -> None:
        try:
            model = OnnxModel.open(made, "cpu", stated)
            if data is not None:
                check_distinct(model, data)
        except ModelError as error:
            raise ModelError(str(error).replace(str(made), str(target))) from None
        model.path, model.reading = target, model.reading.replace(str(made), str(target))
        models.append(model)
        if stated != type(stated)():  # first, so that no model is ever without what was stated of it
            write_description(kept, target, stated, made)

    with owned(target, ModelError):
        if exists := next((path for path in (target, kept) if path.exists() and not args.force), None):
            raise ModelError(f"{exists}: exists already; --force replaces it")
        convert_graph_model(args.model, target, args.output, accept)
        if stated == type(stated)():
            kept.unlink(missing_ok=True)  # it was of the file that is replaced
    return _say(args, models[0])


def _describe(args: argparse.Namespace) -> int:
    from trainer.data import open_named
    from trainer.errors import ModelError
    from trainer.models.description import description_of, with_description, write_description
    from trainer.models.model import check_distinct
    from trainer.models.open import load_model

    stated = reading_of(args)
    replaces = args.write is not None and args.write.exists()
    if replaces and not args.force:
        raise ModelError(f"{args.write}: exists already; --force replaces it")
    # The one that is replaced may be of an earlier file; what counts is what is stated now.
    anew = replaces and args.write.resolve() == description_of(args.model).resolve()
    model = load_model(args.model, "cpu", stated, described=not anew)
    if args.data is not None:
        check_distinct(model, open_named(args.data))
    if args.write is not None:
        if not model.foreign:
            raise ModelError(f"{args.model}: carries a model card, which says how it is read; there is nothing to keep")
        file, known = (args.model, stated) if anew else with_description(args.model, stated)
        write_description(args.write, file, known)
    return _say(args, model)


def _say(args: argparse.Namespace, model: "EmbeddingModel") -> int:
    from tools.cli import translated

    figures = _figures(model)
    write_json(figures, args.json)
    if args.json != "-":
        print(
            translated(model.reading, args.parser)
            or f"{model.path}: {figures['network']}, dimension {model.dim}; read as its card says"
        )
    return 0


def _figures(model: "EmbeddingModel") -> dict[str, Any]:
    card = model.card
    return {
        "path": str(model.path),
        "network": card.backbone.name if card.backbone else "ONNX graph",
        "dimension": card.dim,
        "image_size": list(card.image_size),
        "color": card.color,
        "mean": list(card.mean),
        "std": list(card.std),
        "foreign": model.foreign,
        "reading": model.reading,
        "hash": model.hash,
    }
