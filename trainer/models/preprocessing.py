"""The preprocessing inside a foreign ONNX graph, read by its operators: what stands between the input and the network.

From the input on, operators are followed as long as each result has one use: Sub, Div, Mul, Add and BatchNormalization
with constants (given or computed from constants) are put together to a·x + b per colour; Clip says which values are
expected; Gather, Slice or Split may reverse the colours; Cast, Transpose, Resize and Pad change no values. Names of
nodes mean nothing. What computes with the pixels in any other form is not guessed: it is :attr:`Beginning.unread`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainer.models.description import Pixels

_UNCHANGED = ("Cast", "Transpose", "Identity", "Resize", "Upsample", "Dropout")
_COMBINING = ("Sub", "Add", "Mul", "Div")
_ARITHMETIC = {*_COMBINING, "Pow", "Sqrt", "Exp", "Log", "Neg", "Abs", "Reciprocal", "Floor", "Ceil", "Round", "Mod"}
_ARITHMETIC |= {"Min", "Max", "Mean", "Sum", "Clip", "Where", "Gather", "GatherND", "GatherElements", "Slice", "Split"}
_ARITHMETIC |= {"Concat", "Pad", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum", "ReduceL2", "LpNormalization"}
"""What prepares pixels rather than being a network's first layer."""
_COMPUTED = {*_COMBINING, "Sqrt", "Pow", "Reciprocal", "Neg", "Exp", "Log", "Abs", "Cast", "Identity", "Unsqueeze"}
_COMPUTED |= {"Squeeze", "Reshape", "Concat", "Transpose", "Gather", "Slice", "ConstantOfShape"}
"""Operators that make a constant of constants."""
_SMALL = 4096  # numbers that go into such an operator
_LARGEST = 3 << 20  # numbers of a constant: a mean image of 1,024 × 1,024
_DEEPEST = 16
_WIDEST_NORMALISED = 8.0
"""A divisor from here on belongs to pixels of 0 … 255; below, to 0 … 1 or to what is normalised already."""
_LEAST_MEAN = 0.1
"""A mean from here on belongs to pixels of 0 … 1; below, to what is normalised already."""
_LARGEST_UNIT_MEAN = 2.0
"""A mean above this belongs to pixels of 0 … 255, whatever scale follows later in the graph."""


@dataclass
class Beginning:
    """What a graph does to its input x first.

    Attributes:
        scale, shift: ``scale`` · x + ``shift``, each (3,) in the order of the input's colours, or (1,).
        steps: the arithmetic in words. seen: all that was read, in words.
        reversed: the colours are put into the opposite order.
        limits: smallest and largest x that a Clip lets through.
        unread: what comes next and computes with pixels in a form that is not known here.
        channels: the axis of the colours at the point that is reached.
    """

    scale: np.ndarray = field(default_factory=lambda: np.ones(1))
    shift: np.ndarray = field(default_factory=lambda: np.zeros(1))
    steps: list[str] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    reversed: bool = False
    limits: tuple[float, float] | None = None
    unread: str = ""
    channels: int = 1

    def _then(self, scale: np.ndarray | float, shift: np.ndarray | float, step: str) -> None:
        scale, shift = (np.asarray(v)[::-1] if self.reversed and np.ndim(v) else v for v in (scale, shift))
        self.scale, self.shift = self.scale * scale, self.shift * scale + shift
        self.steps.append(step)
        self.seen.append(step)

    def _clip(self, low: float, high: float) -> None:
        """Limits of a·x + b, as limits of x."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ends = np.stack([(low - self.shift) / self.scale, (high - self.shift) / self.scale])
        if np.isfinite(ends).all():
            self.limits = float(ends.min()), float(ends.max())
        self.seen.append(f"Clip to {low:g} … {high:g}")

    @property
    def pixels(self) -> Pixels | None:
        """The range of x that this makes zero-centred numbers of size one, or that a Clip expects; None: neither says.

        A subtraction and a multiplication that change nothing are InsightFace's mark of graphs that take pixels.
        """
        by_steps, by_limits = self._by_steps(), self._by_limits()
        if by_limits is None or by_steps == by_limits:
            return by_steps
        return by_limits if by_steps in (None, "normalised") else None

    def _by_steps(self) -> Pixels | None:
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

    def _by_limits(self) -> Pixels | None:
        ranges: dict[tuple[float, float], Pixels] = {(0, 255): "0..255", (0, 1): "0..1", (-1, 1): "normalised"}
        return next(
            (p for ends, p in ranges.items() if self.limits and np.allclose(self.limits, ends, atol=0.02)), None
        )

    @property
    def unclear(self) -> str:
        """Why the range cannot be known, in words; empty: it is known, or the network's first layer follows at once."""
        if self.pixels is not None:
            return ""
        if self._by_limits() is not None and self._by_steps() is not None:
            return f"{', '.join(self.seen)}, which do not agree"
        return ", then ".join([*self.seen, self.unread]) if self.unread else ""


def read_beginning(path: Path, input_name: str, channels: int = 1) -> Beginning:
    """What the graph in ``path`` does first to its input ``input_name``, whose colours lie along axis ``channels``."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    graph, found, here = model.graph, Beginning(channels=channels), input_name
    constants = _Constants(graph, path.parent, model.opset_import)
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in set(node.input) if node.op_type not in ("Shape", "Size") else ():
            users.setdefault(name, []).append(node)
    outputs = {output.name for output in graph.output}
    while here not in outputs:
        nodes = users.get(here, [])
        after = _apply(found, nodes[0], here, constants, users) if len(nodes) == 1 else None
        if after is None:
            found.unread = _described(found, nodes, here, constants)
            break
        here = after
    return found


def _described(found: Beginning, nodes: list[Any], here: str, constants: "_Constants") -> str:
    """Operators that compute with the pixels and could not be read; empty: there is none."""
    odd = [node for node in nodes if node.op_type in _ARITHMETIC and not _is_crop(found, node, constants)]
    names = []
    for node in odd:
        others = [constants.array(name) for name in node.input if name and name != here]
        known = [other for other in others if other is not None]
        if node.op_type not in _COMBINING:
            names.append(node.op_type)
        elif len(known) < max(1, len(others)):
            names.append(f"{node.op_type} by what is no constant")
        elif all(np.isfinite(other).all() for other in known):  # else the model is damaged, and its embeddings show it
            names.append(f"{node.op_type} by a constant of shape {known[0].shape}")
    return " and ".join(dict.fromkeys(names))


def _apply(found: Beginning, node: Any, here: str, constants: "_Constants", users: dict[str, list[Any]]) -> str | None:
    """Put one operator to those before it; what to follow next. None: it is none that is understood here."""
    if node.op_type in ("BatchNormalization", *_COMBINING):
        return node.output[0] if _arithmetic(found, node, here, constants) else None
    if not node.input or node.input[0] != here:
        return None
    if node.op_type == "Split":
        return _split(found, node, users)
    if node.op_type == "Clip":
        ends = [_attribute(node, name) for name in ("min", "max")]
        ends = [constants.array(name) if name else None for name in node.input[1:3]] if None in ends else ends
        if len(ends) != 2 or any(end is None or np.size(end) != 1 for end in ends):
            return None
        found._clip(*(float(np.asarray(end).ravel()[0]) for end in ends))
    elif node.op_type == "Pad":
        pads = _attribute(node, "pads")
        pads = constants.array(node.input[1]) if pads is None and len(node.input) > 1 else pads
        if pads is None or np.size(pads) != 8 or np.reshape(pads, (2, 4))[:, [0, found.channels]].any():
            return None
        found.seen.append("Pad")
    elif node.op_type in ("Gather", "GatherND", "Slice"):
        if _reverses(found, node, constants):
            found.reversed = not found.reversed
            found.seen.append("reversed colours")
        elif not _is_crop(found, node, constants):
            return None
    elif node.op_type not in _UNCHANGED:
        return None
    if node.op_type == "Transpose":
        order = _attribute(node, "perm")
        found.channels = list(order).index(found.channels) if order is not None else 3 - found.channels
    return str(node.output[0])


def _split(found: Beginning, node: Any, users: dict[str, list[Any]]) -> str | None:
    """The colours taken apart and put together again at once, as they were or reversed."""
    after = {id(user): user for name in node.output for user in users.get(name, [])}
    (joined,) = after.values() if len(after) == 1 else (None,)
    if (_attribute(node, "axis") or 0) % 4 != found.channels or joined is None or joined.op_type != "Concat":
        return None
    colours = list(node.output)
    if len(colours) != 3 or list(joined.input) not in (colours, colours[::-1]):
        return None
    if list(joined.input) != colours:
        found.reversed = not found.reversed
        found.seen.append("reversed colours")
    return str(joined.output[0])


def _reverses(found: Beginning, node: Any, constants: "_Constants") -> bool:
    if node.op_type == "Slice":
        return _cut(node, constants) in ({found.channels: (-1, -1)}, {found.channels: (2, -1)})
    indices = constants.array(node.input[1])
    axis = (_attribute(node, "axis") or 0) % 4 if node.op_type == "Gather" else int(_attribute(node, "batch_dims") or 0)
    return axis == found.channels and indices is not None and indices.ravel().tolist() == [2, 1, 0]


def _is_crop(found: Beginning, node: Any, constants: "_Constants") -> bool:
    """A Slice that leaves the colours alone."""
    cut = _cut(node, constants) if node.op_type == "Slice" else None
    return cut is not None and found.channels not in cut


def _cut(node: Any, constants: "_Constants") -> dict[int, tuple[int, int]] | None:
    """Axis → (start, step) of a Slice by constants."""
    given = [constants.array(name) if name else None for name in node.input[1:5]]
    if len(given) < 2:  # before opset 10
        given = [_attribute(node, name) for name in ("starts", "ends", "axes")]
    starts = given[0]
    if starts is None:
        return None
    axes = given[2] if len(given) > 2 and given[2] is not None else range(len(starts))
    steps = given[3] if len(given) > 3 and given[3] is not None else [1] * len(starts)
    return {int(a) % 4: (int(s), int(t)) for a, s, t in zip(axes, starts, steps, strict=True)}


def _attribute(node: Any, name: str) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), None)


def _arithmetic(found: Beginning, node: Any, here: str, constants: "_Constants") -> bool:
    """Put one operator to those before it; False: it is none that only shifts and scales by constants."""
    if node.op_type == "BatchNormalization":
        values = [constants.of(name) for name in node.input[1:5]] if node.input[0] == here else [None]
        if any(value is None for value in values):
            return False
        gamma, beta, mean, variance = (np.asarray(value) for value in values)
        epsilon = _attribute(node, "epsilon")
        scale = gamma / np.sqrt(variance + (1e-5 if epsilon is None else epsilon))
        found._then(
            scale, beta - mean * scale, f"BatchNormalization of mean {_shown(mean)}, variance {_shown(variance)}"
        )
        return True
    first = node.input[0] == here
    value = constants.of(node.input[1 if first else 0]) if len(node.input) == 2 else None
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
    """The constants of a graph by name: initialisers, Constant nodes, and what is computed from them alone."""

    def __init__(self, graph: Any, folder: Path, opsets: Any) -> None:
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._made = {name: node for node in graph.node for name in node.output}
        self._folder, self._opsets = folder, opsets

    def of(self, name: str) -> np.ndarray | None:
        """One number, or one a colour (of a mean image, each colour's mean), as float64 (1,) or (3,); None: no such
        constant."""
        found = self.array(name)
        if found is None or found.dtype.kind not in "fiu" or not np.isfinite(found).all():
            return None
        value = found.astype(np.float64)
        if value.size in (1, 3):
            return value.ravel()
        value = value.reshape([size for size in value.shape if size != 1])
        if value.ndim == 3 and 3 in (value.shape[0], value.shape[-1]):
            return np.asarray(value.mean((1, 2) if value.shape[0] == 3 else (0, 1)))
        return None

    def array(self, name: str, depth: int = 0) -> np.ndarray | None:
        """The constant of that name; None: there is none, it is too large, or the image goes into it."""
        from onnx import numpy_helper

        tensor, node = self._tensors.get(name), self._made.get(name)
        if tensor is None and node is not None and node.op_type == "Constant":
            value = _attribute(node, node.attribute[0].name)
            if node.attribute[0].name != "value":
                return np.asarray(value) if node.attribute[0].name.startswith(("value_f", "value_i")) else None
            tensor = value
        if tensor is not None:
            if int(np.prod(tensor.dims)) > _LARGEST:
                return None
            try:
                return np.asarray(numpy_helper.to_array(tensor, str(self._folder)))
            except (ValueError, TypeError, OSError, RuntimeError):
                return None
        if node is None or node.op_type not in _COMPUTED or depth == _DEEPEST:
            return None
        given: dict[str, np.ndarray] = {}
        for part in node.input:
            value = self.array(part, depth + 1) if part else None
            if part and (value is None or value.size > _SMALL):
                return None
            if value is not None:
                given[part] = value
        if node.op_type == "ConstantOfShape" and float(np.prod([float(n) for n in given[node.input[0]]])) > _SMALL:
            return None
        return self._computed(node, given)

    def _computed(self, node: Any, given: dict[str, Any]) -> np.ndarray | None:
        from onnx import TypeProto, ValueInfoProto, helper
        from onnx.reference import ReferenceEvaluator

        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in given.items()
        ]
        output = ValueInfoProto(name=node.output[0], type=TypeProto())
        try:
            graph = helper.make_graph([node], "constant", inputs, [output])
            with np.errstate(all="ignore"):
                model = helper.make_model(graph, opset_imports=list(self._opsets))
                return np.asarray(ReferenceEvaluator(model).run(None, given)[0])
        except Exception:  # operators fail as variously as graphs can be wrong
            return None
