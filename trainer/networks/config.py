"""The sections ``backbone`` and ``transform``: the networks that are built from a configuration."""

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from trainer.config import Section, Variants


class BackboneConfig(Section):
    """The network that maps an image to an embedding."""

    name: str = Field("iresnet18", description="a name known to trainer.networks (an unknown one lists them all)")
    dim: int = Field(512, ge=2, description="embedding dimension D")
    width: int | None = Field(
        None, ge=1, description="first stage's channels, which vision transformers have fixed; null: the network's own"
    )
    weights: Path | None = Field(
        None, description="start from these weights (.safetensors, .pt state dict or a run folder)"
    )


class TransformConfig(Section):
    """The map T between the embedding spaces (trainer/networks/transform.py); the base of its kinds."""

    name: str


class RbtConfig(TransformConfig):
    """The paper's map: residual bottleneck blocks."""

    name: Literal["rbt"] = Field("rbt", description="kind of the map T between the embedding spaces")
    blocks: int = Field(4, ge=1, description="residual bottleneck blocks in series")
    paths: int = Field(4, ge=1, description="parallel paths of a block")
    bottleneck: int = Field(16, ge=1, description="width of a path")


class LinearConfig(TransformConfig):
    """A matrix and a bias, started at the identity."""

    name: Literal["linear"] = Field("linear", description="kind of the map T between the embedding spaces")


class OrthogonalConfig(TransformConfig):
    """A semi-orthogonal matrix."""

    name: Literal["orthogonal"] = Field("orthogonal", description="kind of the map T between the embedding spaces")


class MlpConfig(TransformConfig):
    """One hidden layer."""

    name: Literal["mlp"] = Field("mlp", description="kind of the map T between the embedding spaces")
    hidden: int = Field(0, ge=0, description="hidden width; 0: twice the larger dimension")


AnyTransform: TypeAlias = Annotated[RbtConfig | LinearConfig | OrthogonalConfig | MlpConfig, Variants(name="rbt")]
