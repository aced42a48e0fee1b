"""The section ``data``: which images are trained on, in what order, and how they are changed."""

import importlib.util
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from trainer.config import Section, Variants, unit
from trainer.errors import ConfigError

_LOADER = "what reads the images, or makes synthetic ones; auto: DALI when installed, else torch"
_ORDER = "global: a permutation of all records; blocks: of blocks of neighbours, then in a buffer, for slow storage"


class AugmentConfig(Section):
    """Random image changes in training, drawn per sample from (seed, epoch, record); every probability or size of 0 is
    off."""

    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    rotate_degrees: float = Field(
        0.0, ge=0, description="standard deviation of the rotation", json_schema_extra=unit("degrees")
    )
    scale: float = Field(0.0, ge=0, lt=1, description="standard deviation of the relative size")
    translate: float = Field(
        0.0, ge=0, lt=1, description="standard deviation of the shift", json_schema_extra=unit("image widths")
    )
    contrast: float = Field(0.0, ge=0, description="standard deviation of the relative contrast about mid grey")
    brightness: float = Field(
        0.0, ge=0, description="standard deviation of the shift of brightness; 1 is the full range"
    )
    saturation: float = Field(0.0, ge=0, description="standard deviation of the relative saturation")
    noise: float = Field(0.0, ge=0, description="standard deviation of the pixel noise; 1 is the full range")
    blur: float = Field(0.0, ge=0, le=1, description="probability of a Gaussian blur of 0.5 to 1.5 pixels")
    low_resolution: float = Field(
        0.0, ge=0, le=1, description="probability of shrinking to 1/4…1/2 of the size and back"
    )
    occlusion: float = Field(0.0, ge=0, le=1, description="probability of a grey rectangle over 1/5…2/5 of each side")


class DataConfig(Section):
    """The training images; the base of what the loaders take.

    ``loader: auto`` takes DALI where it is installed, else torch.
    """

    loader: str
    batch_size: int = Field(128, ge=1, description="the global batch B; every rank reads its slice of it")
    drop_last: bool = Field(False, description="drop the incomplete last batch of an epoch instead of training on it")
    sampling: Literal["shuffle", "class_balanced"] = Field(
        "shuffle", description="shuffle: every record once an epoch; class_balanced: every class equally often"
    )
    repeat: int = Field(1, ge=1, description="repeated augmentation: each drawn record this many times in a row")


class ImagesConfig(DataConfig):
    """Images of a data set; the base of its orders."""

    order: str
    loader: Literal["auto", "dali", "torch"] = Field("auto", description=_LOADER)
    path: Path = Field(description="a folder with dataset.yaml (made by `lce pack`)")
    labels: Path | None = Field(None, description="int64 .npy that replaces the data set's labels; -1 drops a record")
    workers: int = Field(2, ge=0, description="decoding threads (DALI) or processes (torch) per rank")
    allow_outside: bool = Field(False, description="follow names in a dataset.yaml that lead out of its folder")
    max_bad_records: int = Field(0, ge=0, description="how many damaged records training may skip before it stops")
    augment: AugmentConfig = Field(AugmentConfig(), description="random image changes in training")


class RecordsConfig(ImagesConfig):
    """Images in a permutation of all records: every record is read at random."""

    order: Literal["global"] = Field("global", description=_ORDER)


class BlocksConfig(ImagesConfig):
    """Images in blocks of neighbours, which slow storage reads in a row.

    Blocks are permuted anew each epoch, and the records of ``buffer_bytes`` of blocks among themselves.
    """

    order: Literal["blocks"] = Field("blocks", description=_ORDER)
    sampling: Literal["shuffle"] = Field("shuffle", description="every record once an epoch")
    block_bytes: int = Field(
        4 << 20, ge=1, description="neighbours that are read in a row", json_schema_extra=unit("bytes")
    )
    buffer_bytes: int = Field(
        1 << 30,
        ge=1,
        description="blocks whose records are mixed; twice as much is cached",
        json_schema_extra=unit("bytes"),
    )

    @model_validator(mode="after")
    def _fits(self) -> "BlocksConfig":
        if self.buffer_bytes < self.block_bytes:
            raise ValueError(f"buffer_bytes = {self.buffer_bytes} is smaller than a block of {self.block_bytes}")
        return self


class SyntheticConfig(DataConfig):
    """Synthetic images, for measurements and trials."""

    loader: Literal["synthetic"] = Field("synthetic", description=_LOADER)
    synthetic_classes: int = Field(1000, ge=2, description="the class count C")
    synthetic_size: int = Field(112, ge=8, description="the image side", json_schema_extra=unit("pixels"))
    synthetic_records: int = Field(100_000, ge=1, description="the records of one epoch")


AnyData: TypeAlias = Annotated[RecordsConfig | BlocksConfig | SyntheticConfig, Variants(loader="auto", order="global")]


def choose_loader(wanted: str) -> tuple[str, str]:
    """``auto``, ``dali`` or ``torch`` → the loader, and why. Raises :class:`ConfigError`: DALI wanted, not there."""
    try:
        installed = importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        installed = False
    if wanted == "dali" and not installed:
        raise ConfigError(
            "data.loader = dali: DALI is not installed; pip install nvidia-dali-cuda130, or use data.loader=torch"
        )
    if wanted != "auto":
        return wanted, "data.loader asks for it"
    return ("dali", "it is installed") if installed else ("torch", "DALI is not installed")
