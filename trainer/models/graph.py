"""What every exporter shares: the graph that is exported, and its comparison with torch on real images."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from trainer.errors import ModelError
from trainer.models.card import Direction, ModelCard
from trainer.models.model import TorchModel
from trainer.networks.transform import Orthogonal

Normalisation = Literal["inside", "outside"]

UNIT_ERROR = 1e-3
"""How far the norm of an exported embedding may be from 1: float16 rounds each component by up to 5e-4 of itself."""

SAME_COSINE = 0.999
"""The cosine that an exported embedding has at least with torch's, where only their difference is bounded."""


@dataclass(frozen=True)
class Parity:
    """How an exported file compares with torch.

    Attributes:
        images: how many real images (or vectors) were compared.
        largest_difference: largest absolute difference of a component of the unit embeddings.
        smallest_cosine: smallest cosine between the two embeddings of one image.
        bound: what ``largest_difference`` was allowed to be; None: only the cosine was bounded.
        cosine_bound: what ``smallest_cosine`` had to be at least; None: :data:`SAME_COSINE`, and the difference.
        size_bytes: of the file.
    """

    images: int
    largest_difference: float
    smallest_cosine: float
    bound: float | None
    cosine_bound: float | None
    size_bytes: int

    def as_dict(self) -> dict[str, float | None]:
        """For JSON."""
        return asdict(self)


class ImageGraph(nn.Module):
    """What is exported: (b, 3, H, W) RGB → unit (b, D) float32, through T₂₁ where asked."""

    def __init__(self, model: TorchModel, normalisation: Normalisation, direction: Direction | None) -> None:
        super().__init__()
        self.backbone = plain_copy(model.backbone)
        self.transform = plain_copy(model.transforms[direction]) if direction is not None else None
        self.inside = normalisation == "inside"
        self.bgr = model.card.color == "BGR"
        order = slice(None, None, -1 if self.bgr else 1)
        mean = torch.tensor(model.card.mean[order]).view(1, 3, 1, 1)
        std = torch.tensor(model.card.std[order]).view(1, 3, 1, 1)
        self.register_buffer("shift", 255 * mean)
        self.register_buffer("factor", 1 / (255 * std))

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, height, width) float32 of 0 … 255, or normalised already → embeddings (n, D)."""
        if self.inside:
            images = (images - self.get_buffer("shift")) * self.get_buffer("factor")
        if self.bgr:
            images = images[:, [2, 1, 0]]
        unit = normalize(self.backbone(images))
        return unit if self.transform is None else normalize(self.transform(unit))


def graph_card(card: ModelCard, direction: Direction | None) -> ModelCard:
    """The card of a graph from images to embeddings, through ``direction`` where given: of what comes out of it, and
    without transformations and predicted distances, of which such a graph has none to call."""
    card = card.model_copy(update={"distance": False})
    if direction is not None:
        return card.model_copy(update={"dim": card.transforms[direction].dim_out, "transforms": {}})
    return card.model_copy(update={"transforms": {}, "left_out": tuple(card.transforms)})


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy on the CPU for inference, the orthogonal map as an ordinary linear layer."""
    module = module.plain() if isinstance(module, Orthogonal) else copy.deepcopy(module)
    return module.cpu().eval().requires_grad_(False)


def compare(
    run: Callable[[np.ndarray], np.ndarray],
    inputs: np.ndarray,
    expected: np.ndarray,
    path: Path,
    written: Path,
    bound: float | None,
    cosine_bound: float | None = None,
) -> Parity:
    """Run what was written on one input alone and on all together, and compare with torch.

    Args:
        run: what was written, (n, …) → (n, D) rows as they come out of it.
        expected: (n, D) unit rows of torch.

    Raises:
        ModelError: a row that is not unit, torch's or the file's; a difference above ``bound``; a cosine below
            ``cosine_bound`` (without one, below :data:`SAME_COSINE`).
    """
    _check_unit(expected, f"{path}: torch's embedding")
    got, alone = run(inputs), run(inputs[:1])
    _check_unit(np.concatenate([got, alone]), f"{path}: the exported file's embedding")
    # An int8 graph takes one scale for a whole batch, so one input alone may differ from itself among others a little.
    difference = float(max(np.abs(got - expected).max(), np.abs(alone - expected[:1]).max()))
    pairs = np.concatenate([got, alone]).astype(np.float64) * np.concatenate([expected, expected[:1]])
    cosine = float(pairs.sum(1).min())
    smallest = SAME_COSINE if cosine_bound is None else cosine_bound
    if (bound is not None and not difference <= bound) or not cosine >= smallest:
        limit = f"smallest cosine {smallest:.7g}" if bound is None else f"difference {bound:.2g}, cosine {smallest:.7g}"
        raise ModelError(
            f"{path}: the exported file differs from torch by {difference:.2g}, smallest cosine {cosine:.7f} (allowed: "
            f"{limit}) on {len(inputs)} real inputs; it was not kept"
        )
    size = sum(f.stat().st_size for f in written.rglob("*")) if written.is_dir() else written.stat().st_size
    return Parity(len(inputs), difference, cosine, bound, cosine_bound, size)


def _check_unit(rows: np.ndarray, what: str) -> None:
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    wrong = np.flatnonzero(~(np.abs(norms - 1) <= UNIT_ERROR))
    if len(wrong):
        raise ModelError(
            f"{what} of input {wrong[0]} has norm {norms[wrong[0]]:.3g}, not 1 ({len(wrong)} of {len(norms)} are like "
            "it); nothing can be compared by such rows, and no file was kept. Were model and map trained?"
        )


def pick_images(card: ModelCard, dataset: Any, count: int) -> np.ndarray:
    """``count`` images spread evenly over a data set, (n, H, W, 3) uint8 RGB.

    Raises:
        ModelError: the data set's images are not of the model's size, or none are asked for.
    """
    if count < 1:
        raise ModelError(f"{count} images: an export is compared on real images, at least one")
    if tuple(dataset.info.image_size) != tuple(card.image_size):
        raise ModelError(f"the data set's images are {dataset.info.image_size}, the model takes {card.image_size}")
    chosen = np.unique(np.linspace(0, len(dataset) - 1, count).astype(int))
    images = np.stack([dataset.decode(int(record)) for record in chosen])
    return images if dataset.info.color == "RGB" else np.ascontiguousarray(images[..., ::-1])
