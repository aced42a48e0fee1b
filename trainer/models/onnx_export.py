"""Write models as ONNX files and compare them with torch on real images before they get their name.

The graphs have one input with a free batch size and one output of unit rows. Image graphs take RGB in (b, 3, H, W),
either pixels of 0 … 255 (normalisation inside, its first nodes named ``Sub…`` and ``Mul…``, by which InsightFace's
clients know to feed pixels) or normalised images (clients of InsightFace then feed (pixel − 127.5) / 127.5, which is
right for mean and std 0.5).
"""

import logging
import tempfile
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from trainer.data.identities import save_identities
from trainer.errors import ModelError
from trainer.files import replaced
from trainer.models.card import IDENTITIES, Direction
from trainer.models.graph import ImageGraph, Normalisation, Parity, compare, graph_card, plain_copy
from trainer.models.model import TorchModel
from trainer.models.onnx import (
    CARD_KEY,
    IMAGES_INSIDE,
    IMAGES_OUTSIDE,
    INPUT_KEY,
    VECTORS,
    OnnxModel,
    OnnxTransform,
    seal_onnx,
)
from trainer.owner import owned

OPSET = 18

Precision = Literal["float32", "float16", "int8"]

SMALLEST_COSINES: dict[str, float] = {"float16": 0.999, "int8": 0.98}
"""How far an embedding of a smaller variant may turn away from the float32 one unless told otherwise."""


class _VectorGraph(nn.Module):
    """(n, D_in) → unit (n, D_out)."""

    def __init__(self, transform: nn.Module) -> None:
        super().__init__()
        self.transform = plain_copy(transform)

    def forward(self, vectors: Tensor) -> Tensor:
        return normalize(self.transform(normalize(vectors)))


def export_onnx(
    model: TorchModel,
    path: str | Path,
    images: np.ndarray,
    *,
    normalisation: Normalisation = "inside",
    direction: Direction | None = None,
    bound: float = 1e-4,
    precision: Precision = "float32",
    smallest_cosine: float | None = None,
) -> Parity:
    """Write the model as ONNX and compare it with torch (float32) on ``images``.

    Hashes of the identities that it was trained on, where known, stand next to it in NAME.identities.npy: for
    ``lce evaluate``, not for clients.

    Args:
        path: the file to be (.onnx); an existing one is replaced only by one that passed.
        images: (n, H, W, 3) uint8 RGB, real ones, n ≥ 1.
        direction: ``t21`` appends that transformation (backward mode: the file then gives old-compatible embeddings).
        bound: largest difference allowed in any component of the unit embeddings, for float32.
        precision: ``float16``: weights and arithmetic, float32 at both ends; ``int8``: weights per channel, activations
            quantised on the fly (dynamic).
        smallest_cosine: allowed for the smaller precisions (default :data:`SMALLEST_COSINES`).

    Raises:
        ModelError: no such transformation, no image, or a difference beyond the bound: then there is no file.
    """
    path = Path(path)
    reduced = None if precision == "float32" else smallest_cosine or SMALLEST_COSINES[precision]
    if not len(images):
        raise ModelError(f"{path}: an export is compared on real images; none were given")
    expected = model.embed(images)
    if direction is not None:
        expected = model.transform(direction, expected)
    card = graph_card(model.card, direction)
    graph = ImageGraph(model, normalisation, direction)
    metadata = {
        INPUT_KEY: IMAGES_INSIDE if normalisation == "inside" else IMAGES_OUTSIDE,
    }
    example = torch.rand(2, 3, *card.image_size) * (255 if normalisation == "inside" else 1)
    with ExitStack() as files:
        files.enter_context(owned(path, ModelError))  # the model and its identities are two files
        partial, seen = files.enter_context(replaced(path, ModelError)), None
        if model.identities is not None:
            table = files.enter_context(replaced(path.with_suffix(f".{IDENTITIES}"), ModelError))
            seen = save_identities(model.identities, table)
        card = card.model_copy(update={"identities": seen})
        write_graph(graph, example, partial, "data", {CARD_KEY: card.model_dump_json(), **metadata}, precision)

        return compare(
            OnnxModel.open(partial).rows, images, expected, path, partial, None if reduced else bound, reduced
        )


def export_transform(
    model: TorchModel, direction: Direction, path: str | Path, vectors: np.ndarray, *, bound: float = 1e-4
) -> Parity:
    """Write one transformation alone as ONNX (vectors in, unit vectors out) and compare it on real ``vectors`` (n,
    D_in).

    Raises:
        ModelError: no such transformation, no vector, or a difference above ``bound``: then there is no file.
    """
    path = Path(path)
    expected = model.transform(direction, vectors)
    if not len(vectors):
        raise ModelError(f"{path}: an export is compared on real embeddings; none were given")
    metadata = {CARD_KEY: model.card.model_dump_json(), INPUT_KEY: VECTORS, "lce_direction": direction}
    with owned(path, ModelError), replaced(path, ModelError) as partial:
        example = torch.randn(2, vectors.shape[1])
        write_graph(_VectorGraph(model.transforms[direction]), example, partial, "vectors", metadata)
        return compare(lambda part: OnnxTransform(partial)(part), vectors, expected, path, partial, bound)


def write_graph(
    graph: nn.Module,
    example: Tensor,
    path: Path,
    input_name: str,
    metadata: dict[str, str],
    precision: Precision = "float32",
) -> None:
    """Export with a free batch axis to one self-contained, sealed file; the normalising nodes have names that clients
    know."""
    import onnx

    batch = torch.export.Dim("batch")
    with _quiet():
        program: Any = torch.onnx.export(
            graph.eval(),
            (example,),
            dynamo=True,
            input_names=[input_name],
            output_names=["embedding"],
            dynamic_shapes=({0: batch},),
            opset_version=OPSET,
            verbose=False,
        )
        proto: onnx.ModelProto = program.model_proto
        _name_preprocessing(proto, metadata[INPUT_KEY] == IMAGES_INSIDE)
        proto = _reduced(proto, precision)
    _put_preprocessing_first(proto)
    proto.producer_name = "lce-trainer"
    for key, value in {**metadata, "lce_precision": precision}.items():
        proto.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(proto)
    onnx.save(proto, path)
    seal_onnx(path)


def _reduced(proto: Any, precision: Precision) -> Any:
    """The graph in another arithmetic, by ONNX Runtime's own tools."""
    if precision == "float32":
        return proto
    del proto.graph.value_info[:]  # the exporter's notes on inner shapes trip the quantiser
    if precision == "float16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        half = convert_float_to_float16(proto, keep_io_types=True, node_block_list=_normalising(proto))
        _tidy_casts(half)
        return half
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        whole, small = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        onnx.save(proto, whole)
        quantize_dynamic(whole, small, per_channel=True, weight_type=QuantType.QInt8)
        return onnx.load(small)


def _normalising(proto: Any) -> list[str]:
    """The nodes that make rows unit, from the norm to the division: float32 in every precision, because a norm may be
    above float16's 65,504 where no component is."""
    names, values = [], set[str]()
    for node in proto.graph.node:  # in topological order
        if node.op_type == "ReduceL2" or values.intersection(node.input):
            names.append(node.name)
            values |= set() if node.op_type == "Div" else set(node.output)
    return names


def _tidy_casts(proto: Any) -> None:
    """Make of the casts that the converter puts around each blocked node for itself what was meant: none between two
    such nodes, each once, and each before the nodes that take from it."""
    from onnx import TensorProto

    nodes = list({tuple(node.output): node for node in proto.graph.node}.values())
    made = {name: number for number, node in enumerate(nodes) for name in node.output}

    def casts(number: int | None, dtype: int) -> bool:
        return number is not None and nodes[number].op_type == "Cast" and nodes[number].attribute[0].i == dtype

    for number, node in enumerate(nodes):
        before = made.get(node.input[0]) if node.input else None
        if before is not None and casts(number, TensorProto.FLOAT) and casts(before, TensorProto.FLOAT16):
            node.op_type, node.input[0] = "Identity", nodes[before].input[0]
            del node.attribute[:]
    order = dict[int, None]()
    stack = [made[value.name] for value in proto.graph.output]
    while stack:
        missing = [n for name in nodes[stack[-1]].input if (n := made.get(name)) is not None and n not in order]
        stack += missing
        if not missing:
            order[stack.pop()] = None
    del proto.graph.node[:]
    proto.graph.node.extend(nodes[number] for number in order)


def _name_preprocessing(proto: Any, inside: bool) -> None:
    """Name the normalising Sub and Mul as clients look for them; no other node may look like them."""
    wanted = ["Sub", "Mul"] if inside else []
    for node in proto.graph.node:
        if node.op_type in wanted:
            wanted.remove(node.op_type)
            node.name = f"{node.op_type}_preprocessing"
        elif node.name.startswith(("Sub", "Mul", "_minus", "_mul")):
            node.name = f"node_{node.name}"


def _put_preprocessing_first(proto: Any) -> None:
    """Clients look at the first eight nodes only; the normalising ones depend on nothing but the input and constants.

    In float16 a cast of the input comes before them.
    """
    nodes = list(proto.graph.node)
    made = {name: node for node in nodes for name in node.output}
    front: list[Any] = []

    def add(node: Any) -> None:
        for name in node.input:
            if name in made and not any(made[name] is other for other in front):
                add(made[name])
        front.append(node)

    for node in nodes:
        if node.name.endswith("_preprocessing") and not any(node is other for other in front):
            add(node)
    rest = [node for node in nodes if not any(node is other for other in front)]
    del proto.graph.node[:]
    proto.graph.node.extend([*front, *rest])


class _quiet(warnings.catch_warnings):
    """The exporter's notes to its own developers are kept from the user's screen."""

    def __enter__(self) -> Any:
        self._levels = {name: logging.getLogger(name).level for name in ("root", "torch.onnx", "onnxscript", "onnx_ir")}
        for name in self._levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        entered = super().__enter__()
        warnings.simplefilter("ignore")
        return entered

    def __exit__(self, *error: Any) -> None:
        for name, level in self._levels.items():
            logging.getLogger(name).setLevel(level)
        super().__exit__(*error)
