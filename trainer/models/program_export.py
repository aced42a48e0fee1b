"""Models for torch's own users: a folder of safetensors with its card, and a ``torch.export`` program. Both are
checked as ONNX is."""

from functools import partial as partial_of
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.errors import ModelError
from trainer.files import replaced
from trainer.models.card import Direction, ModelCard
from trainer.models.folder import refuse_foreign, save_model
from trainer.models.graph import ImageGraph, Normalisation, Parity, compare, graph_card
from trainer.models.model import TorchModel
from trainer.models.open import load_model
from trainer.owner import owned


def export_folder(model: TorchModel, folder: str | Path, images: np.ndarray, card: ModelCard) -> Parity:
    """Write the model folder anew with another ``card`` (licence, figures, …), and compare it with ``model``: the
    network on ``images``, each map on random unit vectors.

    Raises:
        ModelError: the card is of another network, a row that is not unit or differs, or the folder cannot be written;
            then there is no folder.
    """
    folder = Path(folder)
    refuse_foreign(folder)
    with owned(folder, ModelError), replaced(folder, ModelError) as partial:
        save_model(partial, model.backbone, card, model.transforms, model.identities, model.distance_head)
        loaded = load_model(partial)
        for direction, part in model.card.transforms.items():
            given = np.random.default_rng(0).normal(size=(64, part.dim_in)).astype(np.float32)
            expected = model.transform(direction, given)
            compare(partial_of(loaded.transform, direction), given, expected, folder / direction, partial, 1e-6)
        return compare(loaded.embed, images, model.embed(images), folder, partial, 1e-6)


def export_program(
    model: TorchModel,
    path: str | Path,
    images: np.ndarray,
    *,
    normalisation: Normalisation = "inside",
    direction: Direction | None = None,
    bound: float = 1e-4,
) -> Parity:
    """Write a ``torch.export`` program (.pt2): (b, 3, H, W) float32 RGB in, unit embeddings out, b free.

    Users open it with ``torch.export.load(path).module()``, which compares no checksums; those of the archive's entries
    are compared by ``python -m zipfile -t``. Arguments as for
    :func:`trainer.models.onnx_export.export_onnx`.

    Raises:
        ModelError: no such transformation, no image, or a difference above ``bound``: then there is no file.
    """
    path = Path(path)
    if not len(images):
        raise ModelError(f"{path}: an export is compared on real images; none were given")
    expected = model.embed(images)
    if direction is not None:
        expected = model.transform(direction, expected)
    graph = ImageGraph(model, normalisation, direction).eval()
    pixels = _feed(model.card, images, normalisation)
    example = pixels[:1].repeat(2, 1, 1, 1)
    with owned(path, ModelError), replaced(path, ModelError) as partial:
        program = torch.export.export(graph, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        with partial.open("wb") as out:
            torch.export.save(
                program, out, extra_files={"model.json": graph_card(model.card, direction).model_dump_json()}
            )
        with partial.open("rb") as back:
            loaded: Any = torch.export.load(back).module()

        def run(part: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return np.asarray(loaded(_feed(model.card, part, normalisation)))

        return compare(run, images, expected, path, partial, bound)


def _feed(card: ModelCard, images: np.ndarray, normalisation: Normalisation) -> torch.Tensor:
    """(b, H, W, 3) uint8 RGB → what the program takes."""
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float()
    if normalisation == "inside":
        return pixels
    order = slice(None, None, 1 if card.color == "RGB" else -1)
    mean, std = (torch.tensor(values[order]).view(3, 1, 1) for values in (card.mean, card.std))
    return (pixels / 255 - mean) / std
