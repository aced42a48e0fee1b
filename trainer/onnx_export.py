"""Write models as ONNX files and compare them with torch on real images before they get their name.

The graphs have one input with a free batch size and one output of unit rows. Image graphs take RGB in (b, 3, H, W),
either pixels of 0 … 255 (normalisation inside, its first nodes named ``Sub…`` and ``Mul…``, by which InsightFace's
clients know to feed pixels) or normalised images (clients of InsightFace then feed (pixel − 127.5) / 127.5, which is
right for mean and std 0.5).
"""

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from trainer.compat.transform import Orthogonal
from trainer.errors import ModelError
from trainer.export import Direction, ModelCard, TorchModel
from trainer.files import replaced
from trainer.onnx_model import CARD_KEY, IMAGES_INSIDE, IMAGES_OUTSIDE, INPUT_KEY, VECTORS, OnnxModel, OnnxTransform

OPSET = 18

Normalisation = Literal["inside", "outside"]
Precision = Literal["float32", "float16", "int8"]

SMALLEST_COSINES: dict[str, float] = {"float16": 0.999, "int8": 0.98}
"""How far an embedding of a smaller variant may turn away from the float32 one unless told otherwise."""


@dataclass(frozen=True)
class Parity:
    """How an exported file compares with torch.

    Attributes:
        images: how many real images (or vectors) were compared.
        largest_difference: largest absolute difference of a component of the unit embeddings.
        smallest_cosine: smallest cosine between the two embeddings of one image.
        bound: what ``largest_difference`` was allowed to be; None: only the cosine was bounded.
        cosine_bound: what ``smallest_cosine`` had to be at least; None: only the difference was bounded.
        size_bytes: of the file.
    """

    images: int
    largest_difference: float
    smallest_cosine: float
    bound: float | None
    cosine_bound: float | None
    size_bytes: int

    def as_dict(self) -> dict[str, float | None]:
        """For JSON."""
        return asdict(self)


class ImageGraph(nn.Module):
    """What is exported: (b, 3, H, W) RGB → unit (b, D) float32, through T₂₁ where asked."""

    def __init__(self, model: TorchModel, normalisation: Normalisation, direction: Direction | None) -> None:
        super().__init__()
        self.backbone = plain_copy(model.backbone)
        self.transform = plain_copy(model.transforms[direction]) if direction is not None else None
        self.inside = normalisation == "inside"
        self.bgr = model.card.color == "BGR"
        order = slice(None, None, -1 if self.bgr else 1)
        mean = torch.tensor(model.card.mean[order]).view(1, 3, 1, 1)
        std = torch.tensor(model.card.std[order]).view(1, 3, 1, 1)
        self.register_buffer("shift", 255 * mean)
        self.register_buffer("factor", 1 / (255 * std))

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, height, width) float32 of 0 … 255, or normalised already → embeddings (n, D)."""
        if self.inside:
            images = (images - self.get_buffer("shift")) * self.get_buffer("factor")
        if self.bgr:
            images = images[:, [2, 1, 0]]
        unit = normalize(self.backbone(images))
        return unit if self.transform is None else normalize(self.transform(unit))


class _VectorGraph(nn.Module):
    """(n, D_in) → unit (n, D_out)."""

    def __init__(self, transform: nn.Module) -> None:
        super().__init__()
        self.transform = plain_copy(transform)

    def forward(self, vectors: Tensor) -> Tensor:
        return normalize(self.transform(normalize(vectors)))


def graph_card(card: ModelCard, direction: Direction | None) -> ModelCard:
    """The card of a graph from images to embeddings, through ``direction`` where given: of what comes out of it, and
    without transformations, of which such a graph has none to call."""
    if direction is not None:
        return card.model_copy(update={"dim": card.transforms[direction].dim_out, "transforms": {}})
    return card.model_copy(update={"transforms": {}, "left_out": tuple(card.transforms)})


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy on the CPU for inference, the orthogonal map as an ordinary linear layer."""
    module = module.plain() if isinstance(module, Orthogonal) else copy.deepcopy(module)
    return module.cpu().eval().requires_grad_(False)


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
        CARD_KEY: card.model_dump_json(),
        INPUT_KEY: IMAGES_INSIDE if normalisation == "inside" else IMAGES_OUTSIDE,
    }
    example = torch.rand(2, 3, *card.image_size) * (255 if normalisation == "inside" else 1)
    with replaced(path, ModelError) as partial:
        write_graph(graph, example, partial, "data", metadata, precision)

        def run(part: np.ndarray) -> np.ndarray:
            return OnnxModel.open(partial).embed(part)

        return compare(run, images, expected, path, partial, None if reduced else bound, reduced)


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
    with replaced(path, ModelError) as partial:
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
    """Export with a free batch axis to one self-contained file, with client-known names of the normalising nodes."""
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


def _reduced(proto: Any, precision: Precision) -> Any:
    """The graph in another arithmetic, by ONNX Runtime's own tools."""
    if precision == "float32":
        return proto
    del proto.graph.value_info[:]  # the exporter's notes on inner shapes trip the quantiser
    if precision == "float16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        return convert_float_to_float16(proto, keep_io_types=True)
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        whole, small = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        onnx.save(proto, whole)
        quantize_dynamic(whole, small, per_channel=True, weight_type=QuantType.QInt8)
        return onnx.load(small)


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


def compare(
    run: Callable[[np.ndarray], np.ndarray],
    inputs: np.ndarray,
    expected: np.ndarray,
    path: Path,
    written: Path,
    bound: float | None,
    cosine_bound: float | None = None,
) -> Parity:
    """Run what was written on one input alone and on all together, and compare with torch.

    Raises:
        ModelError: a difference above ``bound``, or a cosine below ``cosine_bound``.
    """
    got, alone = run(inputs), run(inputs[:1])
    # An int8 graph takes one scale for a whole batch, so one input alone may differ from itself among others a little.
    difference = float(max(np.abs(got - expected).max(), np.abs(alone - expected[:1]).max()))
    pairs = np.concatenate([got, alone]).astype(np.float64) * np.concatenate([expected, expected[:1]])
    cosine = float(pairs.sum(1).min())
    if (bound is not None and not difference <= bound) or (cosine_bound is not None and not cosine >= cosine_bound):
        limit = f"difference {bound:.2g}" if bound is not None else f"smallest cosine {cosine_bound:.7g}"
        raise ModelError(
            f"{path}: the exported file differs from torch by {difference:.2g}, smallest cosine {cosine:.7f} (allowed: "
            f"{limit}) on {len(inputs)} real inputs; it was not kept"
        )
    size = sum(f.stat().st_size for f in written.rglob("*")) if written.is_dir() else written.stat().st_size
    return Parity(len(inputs), difference, cosine, bound, cosine_bound, size)


def pick_images(card: ModelCard, dataset: Any, count: int) -> np.ndarray:
    """``count`` images spread evenly over a data set, (n, H, W, 3) uint8 RGB.

    Raises:
        ModelError: the data set's images are not of the model's size, or none are asked for.
    """
    if count < 1:
        raise ModelError(f"{count} images: an export is compared on real images, at least one")
    if tuple(dataset.info.image_size) != tuple(card.image_size):
        raise ModelError(f"the data set's images are {dataset.info.image_size}, the model takes {card.image_size}")
    chosen = np.unique(np.linspace(0, len(dataset) - 1, count).astype(int))
    images = np.stack([dataset.decode(int(record)) for record in chosen])
    return images if dataset.info.color == "RGB" else np.ascontiguousarray(images[..., ::-1])
