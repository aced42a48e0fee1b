"""The model card: what a user must know of a model, written next to its weights and into every export."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, field_validator

from trainer import __version__
from trainer.data.identities import IdentitiesCard
from trainer.data.index import DatasetInfo
from trainer.errors import ModelError
from trainer.networks.config import AnyTransform, BackboneConfig
from trainer.reading import parse_json, read_json
from trainer.seals import sealed, unsealed

Color = Literal["RGB", "BGR"]


Direction = Literal["t21", "t12"]


CARD_FILE = "model.json"
IDENTITIES = "identities.npy"
DISTANCE = "t12_distance"
"""The head that predicts how far T₁₂ errs: the name of its file and in checkpoints."""


class TransformCard(BaseModel):
    """One transformation of a model: what to build and between which dimensions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: AnyTransform
    dim_in: int = Field(ge=1)
    dim_out: int = Field(ge=1)

    @field_validator("config", mode="before")
    @classmethod
    def _own_keys(cls, value: Any) -> Any:
        """Version 0.1 wrote the keys of every kind of map."""
        kinds = ("blocks", "paths", "bottleneck", "hidden")
        if not isinstance(value, dict) or not all(key in value for key in kinds):
            return value
        kept = {"rbt": kinds[:3], "mlp": kinds[3:]}.get(value.get("name", "rbt"), ())
        return {key: one for key, one in value.items() if key in kept or key not in kinds}


class ModelCard(BaseModel):
    """What a user must know of a model; everything that preprocessing and compatibility depend on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["lce-model-1"] = "lce-model-1"
    backbone: BackboneConfig | None = Field(None, description="None: the network is known as an ONNX graph only")
    dim: int = Field(ge=1, description="embedding dimension D")
    image_size: tuple[int, int] = Field(description="(H, W) in pixels")
    color: Color = "RGB"
    mean: tuple[float, float, float] = Field((0.5, 0.5, 0.5), description="of pixel / 255, in the order of color")
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    transforms: dict[Direction, TransformCard] = Field(default_factory=dict)
    left_out: tuple[Direction, ...] = Field(
        (), description="transformations that the model has besides this graph, which holds none of them"
    )
    distance: bool = Field(False, description="whether it predicts how far T₁₂ of an old embedding is from the new one")
    mode: str = Field(
        "", description="how it was made compatible: direct, backward, forward, both, cross-model or nothing"
    )
    compatible_with: str | None = Field(None, description="the old model")
    compatible_with_hash: str | None = None
    maps_of: str | None = Field(None, description="of maps alone: the hash of the model whose embeddings they map")
    step: int = Field(0, ge=0, description="updates that it was trained for")
    trained_on: str = ""
    classes: int = Field(0, ge=0, description="identities that it was trained on")
    identities: IdentitiesCard | None = Field(None, description="which they were; None: not known")
    figures: dict[str, float] = Field(default_factory=dict, description="measured figures, by name")
    licence: str = ""
    notes: str = ""
    version: str = Field(__version__, description="the lce-trainer that wrote it")


def transform_card(config: AnyTransform, direction: Direction, new: int, old: int) -> TransformCard:
    """T₂₁ from ``new`` to ``old`` dimensions, or T₁₂ the other way."""
    dim_in, dim_out = (new, old) if direction == "t21" else (old, new)
    return TransformCard(config=config, dim_in=dim_in, dim_out=dim_out)


def trained_card(
    images: DatasetInfo | ModelCard, trained_on: Path | str | None, old_model: Sequence[str | None], **fields: Any
) -> ModelCard:
    """The card of what a training run makes.

    Args:
        images: whose preprocessing it takes. trained_on: the data set; None: synthetic data.
        old_model: name and hash of the model that it is compatible with, as far as they are known.
        fields: further fields of the card.
    """
    name, content = old_model
    return ModelCard(
        image_size=images.image_size,
        color=images.color,
        mean=images.mean,
        std=images.std,
        trained_on="synthetic" if trained_on is None else str(trained_on),
        compatible_with=name,
        compatible_with_hash=content,
        **fields,
    )


Files = dict[str, tuple[int, int]]
"""Name → (bytes, CRC-32)."""


def card_text(card: ModelCard, files: Files) -> str:
    """What ``model.json`` holds: the card, the checksums of the files next to it, and one of itself."""
    return json.dumps(sealed({**card.model_dump(mode="json"), "files": files}), indent=2) + "\n"


def read_folder_card(folder: Path) -> tuple[ModelCard, Files | None]:
    """The card of a model folder, and the checksums of its files (None: written before there were any).

    Raises:
        ModelError: the file cannot be read or is not as it was written; it is named, with the key.
    """
    file = folder / CARD_FILE
    try:
        tree = unsealed(read_json(file, ModelError), file, ModelError, "model")
        files = tree.pop("files", None) if isinstance(tree, dict) else None
        known = pydantic.TypeAdapter(Files | None).validate_python(files)
        return ModelCard.model_validate(tree), known
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        raise ModelError(f"{file}: {'.'.join(map(str, problem['loc'])) or 'content'}: {problem['msg']}") from None


def read_card(data: bytes | str, source: str) -> ModelCard:
    """Parse a model card. Raises :class:`ModelError` naming ``source`` and the key."""
    try:
        return ModelCard.model_validate(parse_json(data, source, ModelError))
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        raise ModelError(f"{source}: {'.'.join(map(str, problem['loc'])) or 'content'}: {problem['msg']}") from None
