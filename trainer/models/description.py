"""How images become the input of a foreign model, one without a model card: what a user states, and where it is kept.

A statement is given on the command line, or stands in ``NAME.model.json`` next to ``NAME.onnx`` (or any weights file),
which ``lce model describe … --write`` makes. Where nothing is stated, the graph itself is read
(:mod:`trainer.models.preprocessing`) or a convention is assumed; which of them is said in ``EmbeddingModel.reading``.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from trainer.errors import ModelError
from trainer.files import replaced
from trainer.models.card import Color
from trainer.reading import open_regular, read_json

Pixels = Literal["0..255", "0..1", "normalised"]

DESCRIPTION_SUFFIX = ".model.json"

_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Spread = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Triple = tuple[_Finite, _Finite, _Finite]


class Reading(BaseModel):
    """What is stated of a foreign model; None: not stated.

    Attributes:
        pixels: what the network takes: ``0..255``, ``0..1`` (pixel / 255) or ``normalised`` ((pixel / 255 −
            mean) / std).
        color: the order of its colours.
        mean, std: of pixel / 255, in the order of ``color``; for ``normalised`` only.
        size: (H, W) in pixels, for networks that leave it free.
        output: the name of the graph's output that holds the embedding.
        backbone: the name of the network that a state dict belongs to.
        allow_collapsed: embeddings of different images may all but coincide.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pixels: Pixels | None = None
    color: Color | None = None
    mean: Triple | None = None
    std: tuple[_Spread, _Spread, _Spread] | None = None
    size: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    output: str | None = None
    backbone: str | None = None
    allow_collapsed: bool = False

    @pydantic.model_validator(mode="after")
    def _agree(self) -> "Reading":
        if (self.mean is not None or self.std is not None) and self.pixels not in (None, "normalised"):
            raise ValueError(f"mean and std belong to pixels = normalised, not to {self.pixels}")
        return self

    def over(self, other: "Reading") -> "Reading":
        """This statement, and where it is silent the other one. Raises :class:`ModelError` if they do not agree."""
        merged = other.model_dump(exclude_defaults=True) | self.model_dump(exclude_defaults=True)
        return parse_reading(merged, "what is stated of the model")

    def preprocessing(self) -> tuple[Triple, Triple] | None:
        """(mean, std) of pixel / 255 that make the stated input; None: nothing is stated."""
        if self.pixels == "0..255":
            return (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)
        if self.pixels == "0..1":
            return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if self.pixels is None and self.mean is None and self.std is None:
            return None
        return self.mean or (0.5, 0.5, 0.5), self.std or (0.5, 0.5, 0.5)


class Description(Reading):
    """A statement as a file: which model it is of, by its name (relative to the description's folder) and SHA-256."""

    format: Literal["lce-reading-1"] = "lce-reading-1"
    file: str
    sha256: str

    def stated(self) -> Reading:
        """The statement alone."""
        return Reading(**self.model_dump(exclude={"format", "file", "sha256"}))


def parse_reading(values: dict[str, object], source: str) -> Reading:
    """Raises :class:`ModelError` naming ``source`` and the key."""
    try:
        return Reading.model_validate(values)
    except pydantic.ValidationError as error:
        raise ModelError(f"{source}: {_first(error)}") from None


def _first(error: pydantic.ValidationError) -> str:
    problem = error.errors()[0]
    key = ".".join(map(str, problem["loc"]))
    return (f"{key}: " if key else "") + problem["msg"].removeprefix("Value error, ")


def is_description(path: Path) -> bool:
    """Whether the name is that of a description."""
    return path.name.endswith(DESCRIPTION_SUFFIX)


def description_of(model: Path) -> Path:
    """Where the description of a model file is looked for: ``old.model.json`` next to ``old.onnx``."""
    return model.with_name(model.stem + DESCRIPTION_SUFFIX)


def write_description(path: Path, model: Path, reading: Reading, content: Path | None = None) -> None:
    """Keep what is stated of ``model``; ``content`` is where its bytes are while it does not have its name yet.

    Raises:
        ModelError: another kind of name, or it cannot be written.
    """
    if not is_description(path):
        raise ModelError(f"{path}: the name of a description ends with {DESCRIPTION_SUFFIX}")
    file = os.path.relpath(model.resolve(), path.resolve().parent)
    kept = Description(file=file, sha256=file_hash(content or model), **reading.model_dump())
    with replaced(path, ModelError) as partial:
        partial.write_text(json.dumps(kept.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")


def read_description(path: Path) -> tuple[Path, Reading]:
    """The model file that a description is of, and what it states.

    Raises:
        ModelError: damaged, of a file that does not exist, or of one that has changed since.
    """
    try:
        kept = Description.model_validate(read_json(path, ModelError))
    except pydantic.ValidationError as error:
        raise ModelError(f"{path}: no description of a model: {_first(error)}; see lce model describe") from None
    model = path.parent / kept.file
    if not model.is_file():
        raise ModelError(f"{path}: describes {model}, which does not exist")
    if file_hash(model) != kept.sha256:
        raise ModelError(
            f"{path}: describes another {model.name} (its SHA-256 differs); describe it anew: "
            f"`lce model describe {model} --write {path}`"
        )
    return model, kept.stated()


def with_description(path: Path, given: Reading) -> tuple[Path, Reading]:
    """The model file of ``path`` (which may be a description) and what is stated of it, ``given`` before what is kept.

    Raises:
        ModelError: a description that cannot be used.
    """
    if is_description(path):
        model, kept = read_description(path)
        return model, given.over(kept)
    description = description_of(path)
    if not description.is_file():
        return path, given
    model, kept = read_description(description)
    if model.resolve() != path.resolve():
        raise ModelError(f"{description}: describes {model}, not {path}; rename or remove it")
    return path, given.over(kept)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes. Raises :class:`ModelError`: it cannot be read."""
    digest = hashlib.sha256()
    with open_regular(path, ModelError) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def reading_hash(path: Path, *parts: object) -> str:
    """A model's hash: of its file and of how it is read, so that caches never mix two readings of one file."""
    return hashlib.sha256(f"{file_hash(path)} {parts!r}".encode()).hexdigest()[:16]
