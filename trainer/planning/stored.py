"""The table of what the package's own networks need, whatever the batch: its entries, written and read.

The table (backbones.json) holds every network of the catalogue at dimension 512 and 112 × 112 pixels, so that a plan of
one of them needs no torch. ``python -m trainer.planning.activations`` writes it anew; a test counts again and compares.
What autograd keeps differs between releases of torch: the table says which one counted, and holds for that one alone.
"""

import json
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from trainer.files import write_text

TABLE = Path(__file__).with_name("backbones.json")
STORED_DIM, STORED_SIZE = 512, (112, 112)
STORED_PRECISIONS = ("float32", "bfloat16")
"""What the table holds; float16 keeps what bfloat16 keeps."""

Unit = tuple[tuple[tuple[int, ...], bool], ...]


def release(version: str) -> str:
    """Major and minor of a version, such as ``2.13``."""
    return ".".join(version.split(".")[:2])


def read_table(version: str) -> dict[str, Any]:
    """The lines of the table, network by network; none where another release of torch than ``version``'s counted."""
    if not TABLE.exists():
        return {}
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table["networks"] if release(str(table["torch"])) == release(version) else {}


def write_lines(version: str, networks: dict[str, Any]) -> None:
    """Write the table: a network a line, counted by torch ``version``."""
    lines = [f"{json.dumps(name)}: {json.dumps(line, separators=(',', ':'))}" for name, line in networks.items()]
    text = f'{{"torch": {json.dumps(version)}, "networks": {{\n' + ",\n".join(lines) + "\n}}\n"
    write_text(TABLE, text)


@dataclass(frozen=True)
class Kept:
    """What autograd keeps of a batch until the backward pass, each storage once, parameters left out.

    Attributes:
        fixed: bytes whatever the batch (copies of weights in another precision); image: bytes more for every image.
        largest: the tensors of which one is the largest, each as (fixed, image).
    """

    fixed: int
    image: int
    largest: tuple[tuple[int, int], ...]

    def total_bytes(self, batch: int) -> int:
        """Of all tensors."""
        return self.fixed + self.image * batch

    def largest_bytes(self, batch: int) -> int:
        """Of the largest tensor."""
        return max((fixed + image * batch for fixed, image in self.largest), default=0)


@dataclass(frozen=True)
class NetworkSizes:
    """Numbers of a network, whatever the batch.

    Attributes:
        parameters: numbers that are trained; fixed: parameters that are not.
        buffers: floating-point buffers (running statistics).
        units: the units in series that can be computed again; 0: none.
        unit_parameters: see :class:`trainer.planning.backbones.BackboneSizes`.
        kept: precision → (with all activations, with recomputation).
    """

    parameters: int
    fixed: int
    buffers: int
    units: int
    unit_parameters: tuple[Unit, ...]
    kept: dict[str, tuple[Kept, Kept]]


def as_json(sizes: NetworkSizes) -> dict[str, Any]:
    """A line of the table; units alike that follow each other stand once, with their number."""
    runs: list[list[Any]] = []
    for unit in sizes.unit_parameters:
        if runs and runs[-1][1] == unit:
            runs[-1][0] += 1
        else:
            runs.append([1, unit])
    kept = {name: [[one.fixed, one.image, one.largest] for one in both] for name, both in sizes.kept.items()}
    numbers = [sizes.parameters, sizes.fixed, sizes.buffers, sizes.units]
    return {"numbers": numbers, "unit_parameters": runs, "kept": kept}


def from_json(line: dict[str, Any]) -> NetworkSizes:
    """The inverse of :func:`as_json`."""
    units = chain.from_iterable(
        repeat(tuple((tuple(shape), learns) for shape, learns in unit), count)
        for count, unit in line["unit_parameters"]
    )

    def kept(fixed: int, image: int, largest: list[list[int]]) -> Kept:
        return Kept(fixed, image, tuple((f, i) for f, i in largest))

    both = {name: (kept(*whole), kept(*again)) for name, (whole, again) in line["kept"].items()}
    parameters, fixed, buffers, unit_count = line["numbers"]
    return NetworkSizes(parameters, fixed, buffers, unit_count, unit_parameters=tuple(units), kept=both)
