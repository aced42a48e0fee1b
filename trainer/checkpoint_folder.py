"""The folders of checkpoints and what their seals say; the tensors in them are :mod:`trainer.checkpoint`'s."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from trainer.config import Section, unit
from trainer.errors import CheckpointError
from trainer.reading import read_json
from trainer.seals import SEAL_KEY, find_change, unsealed

INDEX = ".metadata"
"""torch's index of the tensors."""
SEAL = "state.json"
FORMAT = 2
"""Of the seal; 1 had no checksum of itself."""


class CheckpointConfig(Section):
    """The section ``checkpoint``: checkpoints under <run>/checkpoints."""

    every_steps: int = Field(
        1000,
        ge=0,
        description="updates between two checkpoints; 0: only at the end and when asked to stop",
        json_schema_extra=unit("updates"),
    )
    keep: int = Field(2, ge=1, description="how many of the newest are kept")
    keep_every: int = Field(0, ge=0, description="checkpoints of steps divisible by this are kept for good; 0 is off")
    best: str | None = Field(
        None, description="also keep the one with the highest figure of this name, such as lfw.accuracy (see evaluate)"
    )
    asynchronous: bool = Field(True, description="write from a copy in memory while training goes on")
    resume: Literal["auto", "exact", "never"] = Field(
        "auto",
        description="auto: newest complete one; exact: exit 2 if the newest is damaged; never: refuse a used folder",
    )


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk: its folder and what its seal says."""

    folder: Path
    seal: dict[str, Any]

    @property
    def step(self) -> int:
        """The number of updates made when it was taken."""
        return int(self.seal["step"])


def read_seal(folder: Path) -> dict[str, Any]:
    """What ``state.json`` of a checkpoint says.

    Raises:
        CheckpointError: there is none, it is damaged, of another format, or of another step than its folder's name.
    """
    path = folder / SEAL
    if not path.exists():
        raise CheckpointError(f"{folder}: no complete checkpoint ({SEAL} is missing)")
    try:
        tree = read_json(path, CheckpointError)
        if tree["format"] not in (1, FORMAT):
            raise CheckpointError(f"{path}: format {tree['format']}, this version reads {FORMAT}")
        if tree["format"] == FORMAT and SEAL_KEY not in tree:
            raise ValueError("its own checksum is missing")
        seal = unsealed(tree, path, CheckpointError, "checkpoint")
        if not isinstance(seal["files"], dict) or not isinstance(seal["step"], int):
            raise ValueError("files or step missing")
        numbers = [*seal["files"].values(), list(seal.get("loader", {}).values())]
        if not all(isinstance(known, list) and all(type(n) is int and n >= 0 for n in known) for known in numbers):
            raise ValueError("files or loader hold something else than numbers")
        named = re.fullmatch(r"step-(\d+)", folder.name)
        if named is not None and int(named[1]) != seal["step"]:
            raise ValueError(f"it says step {seal['step']}, its folder {folder.name}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    return dict(seal)


def find_damage(folder: Path, files: dict[str, list[int]]) -> str | None:
    """The first of ``files`` (name → [bytes, CRC-32]) that is missing or changed, in words; None when all are whole."""
    return next((change for name, known in files.items() if (change := find_change(folder / name, *known))), None)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders in a run's ``checkpoints`` folder, oldest first, whole or not; others (a user's copy,
    say) are not looked at."""
    found = [p for p in folder.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def best_checkpoint(folders: list[Path], figure: str) -> Path | None:
    """The checkpoint whose seal has the highest ``figure``, the earliest of equal ones; None when none has it."""
    best: tuple[float, Path] | None = None
    for folder in folders:
        try:
            value = read_seal(folder).get("figures", {}).get(figure)
        except CheckpointError:
            continue
        if value is not None and (best is None or value > best[0]):
            best = value, folder
    return None if best is None else best[1]
