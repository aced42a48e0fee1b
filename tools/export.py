"""Write a trained model in the form that its users load, and compare it with torch on real images before saying done.

  lce export runs/new new.onnx --dataset data/train                 # ONNX, pixels in, unit embeddings out
  lce export runs/new new.onnx --dataset data/train --transform t21 # with T₂₁: embeddings for the old gallery
  lce export runs/new t12.onnx --dataset data/train --only t12 --old runs/old   # T₁₂ alone: converts old embeddings

A file that differs by more than --bound is not kept.
"""

import argparse
import json
from pathlib import Path
from typing import Any

HELP = "write a model as ONNX, checked against torch on real images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``lce export``."""
    parser.add_argument("model", type=Path, help="run folder or export folder")
    parser.add_argument("out", type=Path, help="the .onnx file to be")
    parser.add_argument("--dataset", type=Path, required=True, help="real images for the check")
    parser.add_argument("--images", type=int, default=64, help="how many of them")
    parser.add_argument("--bound", type=float, default=1e-4, help="largest difference allowed in a component")
    parser.add_argument(
        "--normalisation", choices=("inside", "outside"), default="inside", help="inside: the file takes pixels 0 … 255"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--transform", choices=("t21",), help="append this transformation to the network")
    which.add_argument("--only", choices=("t21", "t12"), help="this transformation alone, vectors in, vectors out")
    parser.add_argument("--old", type=Path, help="with --only t12: the old model, whose embeddings are compared on")
    parser.add_argument("--json", metavar="FILE", help="write the figures there; - is standard output")


def run(args: argparse.Namespace) -> int:
    """Export and compare; returns the exit status."""
    from trainer.data.index import open_dataset
    from trainer.errors import ModelError
    from trainer.export import TorchModel, load_model
    from trainer.onnx_export import export_onnx, export_transform, pick_images

    model = load_model(args.model)
    if not isinstance(model, TorchModel):
        raise ModelError(f"{args.model}: is an ONNX file already; export from the run or the model folder")
    images = pick_images(model.card, open_dataset(args.dataset), args.images)
    if args.only is not None:
        source = model if args.only == "t21" else _old_model(args)
        parity = export_transform(model, args.only, args.out, source.embed(images), bound=args.bound)
    else:
        parity = export_onnx(
            model, args.out, images, normalisation=args.normalisation, direction=args.transform, bound=args.bound
        )
    figures = {"out": str(args.out), "model": str(args.model), "model_hash": model.hash, **parity.as_dict()}
    if args.json and args.json != "-":
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if args.json == "-":
        print(json.dumps(figures, indent=1))
    else:
        print(
            f"{args.out}: {parity.size_bytes / 1e6:.1f} MB; on {parity.images} real images the largest difference from "
            f"torch is {parity.largest_difference:.1e} (allowed {parity.bound:.0e}), smallest cosine "
            f"{parity.smallest_cosine:.7f}"
        )
    return 0


def _old_model(args: argparse.Namespace) -> Any:
    from trainer.errors import ModelError
    from trainer.export import load_model

    if args.old is None:
        raise ModelError("--only t12 is compared on old embeddings: give the old model with --old")
    return load_model(args.old)
