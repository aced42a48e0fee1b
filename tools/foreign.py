"""What commands share about models without a card of ours: the options that state how they are read, and opening."""

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from trainer.models.description import Reading
    from trainer.models.model import EmbeddingModel


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; they are of every foreign model that the command is given."""
    group = parser.add_argument_group(
        "models without a card (.onnx and torch weights of other trainers)",
        "What is not stated is read from the file or assumed, and printed. Where two models differ, describe each: "
        "lce model describe old.onnx --pixels 0..255 --write old.model.json",
    )
    group.add_argument("--pixels", choices=("0..255", "0..1", "normalised"), help="what the network is fed")
    group.add_argument("--color", choices=("RGB", "BGR"), help="in which order")
    group.add_argument("--mean", type=_three, help="of pixel / 255, one number or three with commas, in that order")
    group.add_argument("--std", type=_three, help="likewise")
    group.add_argument("--size", type=_size, help="of images, where the file leaves it free: 112, or 112x96 (H × W)")
    group.add_argument("--output", metavar="NAME", help="of the graph's output that is the embedding")
    group.add_argument("--backbone", metavar="NAME", help="of the network whose weights these are")
    group.add_argument(
        "--allow-collapsed", action="store_true", help="embeddings of different images may all but coincide"
    )


def reading_of(args: argparse.Namespace) -> "Reading":
    """What the options state. Raises :class:`LceError`: options that do not agree."""
    from trainer.models.description import parse_reading

    names = ("pixels", "color", "mean", "std", "size", "output", "backbone", "allow_collapsed")
    given = {name: getattr(args, name) for name in names}
    return parse_reading({name: value for name, value in given.items() if value is not None}, "options")


def open_model(
    path: object, args: argparse.Namespace, device: "str | torch.device" = "cpu", shown: bool = True
) -> "EmbeddingModel":
    """Open a model with what the options state of it, and print how a foreign one is read."""
    from tools.cli import translated
    from trainer.models.open import load_model

    model = load_model(str(path), device, reading_of(args))
    if shown and model.reading:
        print(translated(model.reading, args.parser), file=sys.stderr)
    return model


def _three(text: str) -> tuple[float, float, float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, 3):
        raise argparse.ArgumentTypeError(f"{text}: expected one number, or three with commas")
    first, second, third = values * 3 if len(values) == 1 else values
    return first, second, third


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) not in (1, 2) or not all(part.strip().isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text}: expected pixels, 112 or 112x96 (height × width)")
    return int(parts[0]), int(parts[-1])
