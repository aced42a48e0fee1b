"""Torch weights without a model card as models: the network is guessed from their names and shapes, and run by torch.

How images are fed is what the origin that the names show does, unless it is stated: MagFace trains on BGR in 0 … 1 (and
its batch norms have another epsilon), AdaFace on BGR, everybody else on RGB, normalised by mean and std 0.5.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer.errors import ConfigError, ModelError
from trainer.models.card import Color, ModelCard
from trainer.models.description import Reading, reading_hash
from trainer.models.model import TorchModel
from trainer.networks import build_backbone
from trainer.networks.guess import guess_backbone
from trainer.networks.weights import fitted, read_weights

EPSILON = 1e-5  # of our batch norms


@dataclass(frozen=True)
class Origin:
    """What is known of a trainer by the names that it saves: how it feeds images; color None: has to be stated."""

    name: str
    color: Color | None = "RGB"
    reading: Reading = Reading(pixels="normalised")  # noqa: RUF009  (frozen)
    epsilon: float = EPSILON


def open_weights(path: Path, device: str | torch.device, stated: Reading) -> TorchModel:
    """A weights file as a model.

    Raises:
        ModelError: no weights, of no network known here, or their colour order has to be stated.
    """
    given = read_weights(path)
    config, size = guess_backbone(given, path, stated.backbone)
    size = stated.size or size
    if stated.output is not None:
        raise ModelError(f"{path}: `output` names an output of an ONNX graph; this file holds weights")
    try:
        backbone = build_backbone(config, size)
    except ConfigError as error:
        raise ModelError(f"{path}: {error}") from None
    state, prefix = fitted(backbone, given, path)
    origin = _origin(config.name, prefix)
    backbone.load_state_dict(_with_epsilon(state, origin.epsilon))
    color = stated.color or origin.color
    if color is None:
        raise ModelError(
            f"{path}: an IR network without AdaFace's or CVLface's wrapping: AdaFace trains it on BGR, CVLface on RGB; "
            "state which with `color`"
        )
    mean, std = stated.preprocessing() or origin.reading.preprocessing() or ((0.5,) * 3, (0.5,) * 3)
    card = ModelCard(
        backbone=config, dim=config.dim, image_size=size, color=color, mean=mean, std=std, notes=f"weights of {path}"
    )
    content = reading_hash(path, config.model_dump(), color, mean, std, size, origin.epsilon)
    model = TorchModel(card, path, content, backbone, {}, device)
    model.foreign, model.allow_collapsed = True, stated.allow_collapsed
    pixels = stated.pixels or ("normalised" if stated.preprocessing() else origin.reading.pixels)
    width = f" of width {config.width}" if config.width else ""
    fed = f"mean {mean[0]:.4g}, std {std[0]:.4g}" if pixels == "normalised" else f"pixels {pixels}"
    as_stated = "as stated" if stated.preprocessing() and stated.color else f"as {origin.name} does, where not stated"
    model.reading = (
        f"{path}: {config.name}{width}, dimension {config.dim}, {size[0]} × {size[1]}, by its layers"
        f"{f' below {prefix!r}' if prefix else ''}; fed {color}, {fed} ({as_stated})"
    )
    return model


def _origin(backbone: str, prefix: str) -> Origin:
    parts = prefix.split(".")
    if backbone.startswith("iresnet") and "features" in parts:
        return Origin("MagFace", "BGR", Reading(pixels="0..1"), 2e-5)
    if backbone.startswith("ir_"):
        if "net" in parts:
            return Origin("CVLface")
        return Origin("AdaFace", "BGR" if "model" in parts else None)
    return Origin("arcface_torch")


def _with_epsilon(state: dict[str, Tensor], epsilon: float) -> dict[str, Tensor]:
    """The weights of batch norms with another epsilon, for ours: the variances take the difference."""
    if epsilon == EPSILON:
        return state
    return {k: v + (epsilon - EPSILON) if k.endswith("running_var") else v for k, v in state.items()}
