"""The preprocessing inside a foreign ONNX graph, read by its operators: what stands between the input and the network.

From the input on, operators are followed as long as each result has one use: Sub, Div, Mul, Add and BatchNormalization
with constants are put together to a·x + b per colour; Cast, Transpose, Resize and Identity change no values. Names of
nodes mean nothing.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainer.models.description import Pixels

_UNCHANGED = ("Cast", "Transpose", "Identity", "Resize", "Upsample", "Dropout")
_RESHAPED = ("Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape")
_WIDEST_NORMALISED = 8.0
"""A divisor from here on belongs to pixels of 0 … 255; below, to 0 … 1 or to what is normalised already."""
_LEAST_MEAN = 0.1
"""A mean from here on belongs to pixels of 0 … 1; below, to what is normalised already."""
_LARGEST_UNIT_MEAN = 2.0
"""A mean above this belongs to pixels of 0 … 255, whatever scale follows later in the graph."""


@dataclass
class Beginning:
    """What a graph does to its input x first: ``scale`` · x + ``shift``, each (3,) or (1,); ``steps`` in words."""

    scale: np.ndarray = field(default_factory=lambda: np.ones(1))
    shift: np.ndarray = field(default_factory=lambda: np.zeros(1))
    steps: list[str] = field(default_factory=list)

    def _then(self, scale: np.ndarray | float, shift: np.ndarray | float, step: str) -> None:
        self.scale, self.shift = self.scale * scale, self.shift * scale + shift
        self.steps.append(step)

    @property
    def pixels(self) -> Pixels | None:
        """The range of x that this makes zero-centred numbers of size one; None: it does nothing to it.

        A subtraction and a multiplication that change nothing are InsightFace's mark of graphs that take pixels.
        """
        if not self.steps:
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            mean, spread = -self.shift / self.scale, np.abs(1 / self.scale)
        if not (np.isfinite(mean).all() and np.isfinite(spread).all()):
            return None
        if np.allclose(mean, 0) and np.allclose(spread, 1):
            return "0..255" if len(self.steps) > 1 else None
        if spread.max() >= _WIDEST_NORMALISED or mean.max() > _LARGEST_UNIT_MEAN:
            return "0..255"
        return "0..1" if mean.max() >= _LEAST_MEAN else "normalised"


def read_beginning(path: Path, input_name: str) -> Beginning:
    """What the graph in ``path`` does first to its input ``input_name``."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    found, here = Beginning(), input_name
    constants = _Constants(graph, path.parent)
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in set(node.input):
            users.setdefault(name, []).append(node)
    while len(users.get(here, [])) == 1 and here not in {output.name for output in graph.output}:
        node = users[here][0]
        if node.op_type not in _UNCHANGED and not _apply(found, node, here, constants):
            break
        here = node.output[0]
    return found


def _apply(found: Beginning, node: Any, here: str, constants: "_Constants") -> bool:
    """Put one operator to those before it; False: it is none that only shifts and scales by constants."""
    if node.op_type == "BatchNormalization" and node.input[0] == here:
        values = [constants.of(name) for name in node.input[1:5]]
        if any(value is None for value in values):
            return False
        gamma, beta, mean, variance = (np.asarray(value) for value in values)
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        scale = gamma / np.sqrt(variance + epsilon)
        found._then(
            scale, beta - mean * scale, f"BatchNormalization of mean {_shown(mean)}, variance {_shown(variance)}"
        )
        return True
    if node.op_type not in ("Sub", "Add", "Mul", "Div") or len(node.input) != 2:
        return False
    first = node.input[0] == here
    value = constants.of(node.input[1 if first else 0])
    if value is None or (node.op_type == "Div" and (not first or not value.all())):
        return False
    table: dict[str, tuple[np.ndarray | float, np.ndarray | float]] = {
        "Sub": (1.0, -value) if first else (-1.0, value),
        "Add": (1.0, value),
        "Mul": (value, 0.0),
        "Div": (1 / np.where(value == 0, 1, value), 0.0),
    }
    found._then(*table[node.op_type], f"{node.op_type} {_shown(value)}")
    return True


def _shown(value: np.ndarray) -> str:
    return f"{value[0]:.6g}" if (value == value[0]).all() else "(" + ", ".join(f"{v:.6g}" for v in value) + ")"


class _Constants:
    """The small constants of a graph by name: initialisers, Constant nodes, and what only reshapes one."""

    def __init__(self, graph: Any, folder: Path) -> None:
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._made = {name: node for node in graph.node for name in node.output}
        self._folder = folder

    def of(self, name: str) -> np.ndarray | None:
        """One number, or one a colour, as float64 (1,) or (3,); None: no such constant."""
        from onnx import numpy_helper

        node = self._made.get(name)
        for _ in range(8):
            if node is None or node.op_type not in _RESHAPED:
                break
            name = node.input[0]
            node = self._made.get(name)
        tensor = self._tensors.get(name)
        if node is not None and node.op_type == "Constant":
            attribute = node.attribute[0]
            if attribute.name == "value_float":
                return np.array([attribute.f], np.float64)
            tensor = attribute.t if attribute.name == "value" else None
        if tensor is None or int(np.prod(tensor.dims)) not in (1, 3):
            return None
        try:
            value = np.asarray(numpy_helper.to_array(tensor, str(self._folder)), np.float64).ravel()
        except (ValueError, TypeError, OSError, RuntimeError):
            return None
        return value if np.isfinite(value).all() else None
