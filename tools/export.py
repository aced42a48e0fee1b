"""Write a trained model in the form that its users load, and compare it with torch on real images before saying done.

  lce export runs/new new.onnx --dataset data/train                   # ONNX, pixels in, unit embeddings out
  lce export runs/new small.onnx --dataset data/train --precision int8
  lce export runs/new old-space.onnx --dataset data/train --transform t21     # embeddings for the old gallery
  lce export runs/new t12.onnx --dataset data/train --only t12 --old runs/old   # T₁₂ alone: converts old embeddings
  lce export runs/new new.pt2 --dataset data/train                    # a torch.export program
  lce export runs/new handover --dataset data/train --licence Apache-2.0 --figures evaluation.json     # a folder

The form follows from the name. ONNX files and programs hold one graph: without --transform the network alone, whose
embeddings search galleries of the new model. Every form carries the model card. A file that differs by more than is
allowed is not kept (exit status 2).
"""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.arguments import whole_number
from tools.foreign import add_reading_arguments, open_model
from tools.output import write_json

if TYPE_CHECKING:
    import numpy as np

    from trainer.models.graph import Parity
    from trainer.models.model import TorchModel

HELP = "write a model as ONNX, torch.export program or folder, checked against torch on real images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``lce export``."""
    parser.add_argument("model", type=Path, help="run folder, model folder or torch weights")
    parser.add_argument("out", type=Path, help="NAME.onnx, NAME.pt2 or a folder")
    parser.add_argument("--dataset", type=Path, required=True, help="real images for the check")
    parser.add_argument("--images", type=whole_number(1), default=64, help="how many of them")
    parser.add_argument("--bound", type=float, default=1e-4, help="largest difference allowed in a component (float32)")
    parser.add_argument(
        "--normalisation", choices=("inside", "outside"), default="inside", help="inside: the file takes pixels 0 … 255"
    )
    parser.add_argument(
        "--precision", choices=("float32", "float16", "int8"), default="float32", help="of an ONNX file"
    )
    parser.add_argument(
        "--smallest-cosine", type=float, help="to float32, accepted (default: float16 0.999, int8 0.98)"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--transform", choices=("t21",), help="append this transformation to the network")
    which.add_argument("--only", choices=("t21", "t12"), help="this transformation alone, vectors in, vectors out")
    parser.add_argument("--old", type=Path, help="with --only t12: the old model, whose embeddings are compared on")
    card = parser.add_argument_group("the model card, which every form carries")
    card.add_argument("--licence", help="of the weights")
    card.add_argument("--notes", help="anything that users should know")
    card.add_argument("--compatible-with", help="the old model, in the users' words")
    card.add_argument("--figures", type=Path, help="what lce evaluate --json wrote, or any JSON of numbers")
    parser.add_argument("--json", metavar="FILE", help="write the figures there; - is standard output")
    add_reading_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Export and compare; returns the exit status."""
    from trainer.data.index import open_dataset
    from trainer.errors import ModelError
    from trainer.models.card import IDENTITIES
    from trainer.models.graph import pick_images
    from trainer.models.model import TorchModel

    model = open_model(args.model, args)
    if not isinstance(model, TorchModel):
        raise ModelError(f"{args.model}: is an ONNX file already; export from the run or the model folder")
    parity = _write(args, model, pick_images(model.card, open_dataset(args.dataset), args.images))
    figures = {"out": str(args.out), "model": str(args.model), "model_hash": model.hash, **parity.as_dict()}
    write_json(figures, args.json)
    if args.json != "-":
        allowed = f"difference {parity.bound:.0e}" if parity.bound is not None else f"cosine {parity.cosine_bound:g}"
        print(
            f"{args.out}: {parity.size_bytes / 1e6:.1f} MB; on {parity.images} real images the largest difference from "
            f"torch is {parity.largest_difference:.1e}, the smallest cosine {parity.smallest_cosine:.7f} "
            f"(allowed: {allowed})"
        )
        identities = args.out.with_suffix(f".{IDENTITIES}")
        if args.out.suffix == ".onnx" and args.only is None and model.identities is not None:
            print(f"{identities}: hashes of the training identities, for `lce evaluate`; do not pass them on")
    return 0


def _write(args: argparse.Namespace, model: "TorchModel", images: "np.ndarray") -> "Parity":
    """Write ``args.out`` in the form that its name asks for, with the card that the arguments describe."""
    from trainer.errors import ModelError
    from trainer.models.onnx_export import export_onnx, export_transform
    from trainer.models.program_export import export_folder, export_program

    model.card = model.card.model_copy(update=_card_changes(args))
    suffix = args.out.suffix
    if suffix != ".onnx" and (args.only or args.precision != "float32"):
        raise ModelError(f"{args.out}: --only and --precision are for .onnx files")
    if suffix == ".pt2":
        return export_program(
            model,
            args.out,
            images,
            normalisation=args.normalisation,
            direction=args.transform,
            bound=args.bound,
        )
    if suffix != ".onnx":
        if suffix or args.transform:
            raise ModelError(f"{args.out}: known forms are .onnx, .pt2, and a folder (which keeps its transformations)")
        return export_folder(model, args.out, images, model.card)
    if args.only is not None:
        source = model if args.only == "t21" else _old_model(args)
        return export_transform(model, args.only, args.out, source.embed(images), bound=args.bound)
    return export_onnx(
        model,
        args.out,
        images,
        normalisation=args.normalisation,
        direction=args.transform,
        bound=args.bound,
        precision=args.precision,
        smallest_cosine=args.smallest_cosine,
    )


def _card_changes(args: argparse.Namespace) -> dict[str, Any]:
    from trainer.errors import ModelError
    from trainer.reading import read_json

    named = {"licence": args.licence, "notes": args.notes, "compatible_with": args.compatible_with}
    changes: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    if args.figures is not None:
        try:
            changes["figures"] = _figures(read_json(args.figures, ModelError))
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ModelError(f"{args.figures}: no JSON object of figures ({error})") from None
        if not changes["figures"]:
            raise ModelError(f"{args.figures}: holds no number at its top level, and no sets of lce evaluate")
    return changes


def _figures(tree: dict[str, Any]) -> dict[str, float]:
    """The top-level numbers; of a result of ``lce evaluate`` rank-1 and TAR of each set and cell; finite ones."""
    figures = {k: v for k, v in tree.items() if isinstance(v, int | float)}
    for name, one in tree.get("sets", {}).items():
        for cell, value in one["cells"].items():
            figures[f"{name} {cell} rank-1"] = value["rank"]["1"]["value"]
            for row in value["tar"]:
                if row["resolved"]:
                    figures[f"{name} {cell} TAR@FAR={row['far']:g}"] = row["value"]
    return {k: float(v) for k, v in figures.items() if v is not None and math.isfinite(v)}


def _old_model(args: argparse.Namespace) -> Any:
    from trainer.errors import ModelError

    if args.old is None:
        raise ModelError("--only t12 is compared on old embeddings: give the old model with --old")
    return open_model(args.old, args)
