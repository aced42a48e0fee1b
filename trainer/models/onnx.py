"""ONNX files as models: our own exports and foreign ones, run by ONNX Runtime."""

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from trainer.data.identities import load_identities
from trainer.errors import ModelError
from trainer.models.card import IDENTITIES, Color, Direction, ModelCard, read_card
from trainer.models.description import Pixels, Reading, Triple, reading_hash
from trainer.models.model import EmbeddingModel
from trainer.models.preprocessing import Beginning, read_beginning
from trainer.reading import regular, why_unreadable
from trainer.seals import warn_once

CARD_KEY = "lce_model_card"
INPUT_KEY = "lce_input"

InputKind = Literal["pixels", "normalised", "vectors"]
IMAGES_INSIDE: InputKind = "pixels"
IMAGES_OUTSIDE: InputKind = "normalised"
VECTORS: InputKind = "vectors"

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
_CUDA = "CUDAExecutionProvider"
_SILENT = 4  # ONNX Runtime prints what it also raises

_SEAL_KEY = b"lce_seal"
_SEAL_BYTES = 64
# The last entry of the file, a metadata entry as protobuf writes it: field 14 of the model, a message of key and value.
_SEAL_HEAD = bytes([14 << 3 | 2, 4 + len(_SEAL_KEY) + _SEAL_BYTES, 10, len(_SEAL_KEY)]) + _SEAL_KEY + b"\x12\x40"


def seal_onnx(path: Path) -> None:
    """Append the SHA-256 of an ONNX file to it, as one more entry of its metadata."""
    with path.open("r+b") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0, 2)
        file.write(_SEAL_HEAD + digest.encode())


def check_seal(path: Path) -> bool:
    """Whether an ONNX file ends with a seal. Raises :class:`ModelError` when the file is not what was sealed."""
    tail = len(_SEAL_HEAD) + _SEAL_BYTES
    try:
        left = path.stat().st_size - tail
        if left < 0:
            return False
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while left and (data := file.read(min(left, 1 << 22))):
                digest.update(data)
                left -= len(data)
            end = file.read(tail)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from None
    if not end.startswith(_SEAL_HEAD):
        return False
    if end[len(_SEAL_HEAD) :] != digest.hexdigest().encode():
        raise ModelError(f"{path}: is not what was exported (its checksum differs); copy or export it again")
    return True


def open_session(path: Path, device: str | torch.device = "cpu") -> Any:
    """An ``onnxruntime.InferenceSession``, on this CUDA device where ONNX Runtime can, else on the CPU. Raises
    :class:`ModelError` when the file is missing or no ONNX graph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    whole = check_seal(path)
    wanted = providers(device)
    try:
        session = _session(path, options, wanted)
        metadata = session.get_modelmeta().custom_metadata_map
    except Exception as error:
        raise ModelError(f"{path}: {_why_unloadable(path, error)}") from None
    if torch.device(device).type == "cuda" and session.get_providers()[0] != _CUDA:
        missing = "its CUDA provider did not start" if len(wanted) > 1 else "it has no CUDA provider"
        warn_once(f"{path}: ONNX Runtime runs it on the CPU: {missing} (pip install onnxruntime-gpu)")
    if not whole and CARD_KEY in metadata:
        why = "was saved again by another tool" if _SEAL_KEY.decode() in metadata else "was written without a checksum"
        warn_once(f"{path}: {why}; damage in it would not be noticed")
    return session


def _session(path: Path, options: Any, wanted: list[Any]) -> Any:
    """A session by the first provider that starts: drivers and libraries may be missing where one is built in."""
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(str(path), options, providers=wanted)
    except Exception:
        if len(wanted) == 1:
            raise
        return onnxruntime.InferenceSession(str(path), options, providers=wanted[1:])


def _why_unloadable(path: Path, error: Exception) -> str:
    """Why ONNX Runtime does not load a file, in plain words where they are known."""
    if shown := why_unreadable(path):
        return shown
    if lost := _missing_data(path):
        return lost
    text = _line(error)
    if "INVALID_PROTOBUF" in text or "Protobuf parsing failed" in text:
        return "is cut short or damaged, or no ONNX file: no whole graph is in it; copy it again"
    return f"ONNX Runtime cannot load it: {text}"


def _missing_data(path: Path) -> str:
    """What is the matter with the files next to a graph that hold its weights; empty: nothing."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo

    try:
        tensors = onnx.load(path, load_external_data=False).graph.initializer
    except Exception:  # no graph
        return ""
    for info in (ExternalDataInfo(t) for t in tensors if t.data_location == onnx.TensorProto.EXTERNAL):
        file = path.parent / info.location
        if not file.is_file():
            return f"its weights are in {info.location}, which is not next to it; copy both files"
        size, wanted = file.stat().st_size, int(info.offset or 0) + int(info.length or 0)
        if size < wanted:
            reason = why_unreadable(file) or f"is cut short ({size:,} of at least {wanted:,} bytes)"
            return f"its weights are in {info.location}, which {reason}; copy it again"
    return ""


def providers(device: str | torch.device) -> list[Any]:
    """What ONNX Runtime is to run on, in order of preference: CUDA's provider for a CUDA device, where it is built in.

    The CPU stays behind it, for operators that CUDA's provider lacks.
    """
    import onnxruntime

    device = torch.device(device)
    if device.type == "cuda" and _CUDA in onnxruntime.get_available_providers():
        return [(_CUDA, {"device_id": device.index or 0}), "CPUExecutionProvider"]
    return ["CPUExecutionProvider"]


_CODE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ")


def _line(error: Exception) -> str:
    return _CODE.sub("", str(error).splitlines()[0]) if str(error) else type(error).__name__


def check_shapes(session: Any, path: Path, rank: int) -> None:
    """Refuse a graph that is not: one input with a free batch size and ``rank`` axes, one output (batch, D).

    Raises:
        ModelError: naming what is wrong and how to export instead.
    """
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1:
        raise ModelError(f"{path}: {len(inputs)} inputs and {len(outputs)} outputs; needed is one of each")
    given, out = inputs[0].shape, outputs[0].shape
    if len(given) != rank or len(out) != 2:
        raise ModelError(
            f"{path}: maps {given} to {out}; needed is a batch of {rank - 1}-dimensional inputs to (batch, D)"
        )
    if isinstance(given[0], int):
        raise ModelError(f"{path}: its batch size is fixed at {given[0]}; export it with a dynamic batch")
    if any(not isinstance(size, int) for size in given[1:]):
        raise ModelError(f"{path}: its input {given} has free axes besides the batch; export it with a static size")


@dataclass(frozen=True)
class GraphInput:
    """How images enter a graph and embeddings leave it.

    Attributes:
        name, output: of the graph's input and of the output that is used.
        color: what the graph takes, (pixel / 255 − mean) / std of it, mean and std in this order; None: raw pixels.
        normalise: (mean, std). dtype: of the input. channels_last: (b, H, W, 3) instead of (b, 3, H, W).
        group: images at a time, exactly so many; None: any number.
    """

    name: str
    output: str
    color: Color
    normalise: tuple[Triple, Triple] | None
    dtype: Any = np.float32
    channels_last: bool = False
    group: int | None = None

    def feed(self, images: np.ndarray) -> np.ndarray:
        """(b, H, W, 3) uint8 in the graph's colour order → the graph's input."""
        if self.normalise is None:
            values = images if self.dtype == np.uint8 else images.astype(np.float32)
        else:
            mean, std = (np.array(value, np.float32) for value in self.normalise)
            values = (images.astype(np.float32) / 255 - mean) / std
        if not self.channels_last:
            values = values.transpose(0, 3, 1, 2)
        return np.ascontiguousarray(values, self.dtype)

    def run(self, session: Any, images: np.ndarray) -> np.ndarray:
        """(b, H, W, 3) uint8 → (b, D) float32, in groups where the graph asks for them."""
        if self.group is None:
            return self._run(session, images)
        parts = []
        for start in range(0, len(images), self.group):
            part = images[start : start + self.group]
            full = np.concatenate([part, np.repeat(part[-1:], self.group - len(part), 0)])
            parts.append(self._run(session, full)[: len(part)])
        return np.concatenate(parts)

    def _run(self, session: Any, images: np.ndarray) -> np.ndarray:
        found = session.run([self.output], {self.name: self.feed(images)})[0]
        rows = embedding_rows(found, len(images))
        if rows is None:
            raise ValueError(f"the output {self.output!r} is {np.shape(found)} for {len(images)} images")
        return rows


def embedding_rows(found: Any, count: int) -> np.ndarray | None:
    """(b, D), or with axes of 1 behind or between, → (b, D) float32; None: not one vector for each of ``count``."""
    shape = np.shape(found)
    inner = [size for size in shape[1:] if size != 1]
    if len(shape) < 2 or shape[0] != count or len(inner) != 1:
        return None
    return np.asarray(found, np.float32).reshape(count, inner[0])


class OnnxModel(EmbeddingModel):
    """An image model in an ONNX file: one of our exports, or a foreign one.

    Foreign graphs are read by what they do to their input first (:mod:`trainer.models.preprocessing`), unless it is
    stated; one that does nothing to it is fed (pixel − 127.5) / 127.5 of RGB, as InsightFace's clients do.
    """

    def __init__(self, card: ModelCard, path: Path, content_hash: str, session: Any, graph_input: GraphInput) -> None:
        super().__init__(card, path, content_hash)
        self.graph_input, self._session = graph_input, session

    @staticmethod
    def open(path: Path, device: str | torch.device = "cpu", reading: Reading | None = None) -> "OnnxModel":
        """Open a file. Raises :class:`ModelError` for a graph that does not map images to one embedding each.

        Args:
            device: where ONNX Runtime has CUDA's provider, a CUDA device is used; else the CPU.
            reading: what is stated of a foreign graph; our exports carry a card, which counts instead.
        """
        session = open_session(regular(path, ModelError), device)
        metadata = session.get_modelmeta().custom_metadata_map
        if metadata.get(INPUT_KEY) == VECTORS:
            raise ModelError(f"{path}: a transformation of embeddings, not a model of images")
        if CARD_KEY not in metadata:
            return _open_foreign(session, path, reading or Reading())
        check_shapes(session, path, 4)
        card = read_card(metadata[CARD_KEY], str(path))
        shape = session.get_inputs()[0].shape
        if list(shape[1:]) != [3, *card.image_size]:
            raise ModelError(f"{path}: its input is {shape}, its model card says images of {card.image_size}")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        order = slice(None) if card.color == "RGB" else slice(None, None, -1)  # the graph takes RGB always
        outside = metadata.get(INPUT_KEY) == IMAGES_OUTSIDE
        graph_input = GraphInput(
            session.get_inputs()[0].name,
            session.get_outputs()[0].name,
            "RGB",
            (card.mean[order], card.std[order]) if outside else None,  # type: ignore[arg-type]
        )
        model = OnnxModel(card, path, digest, session, graph_input)
        model.identities = load_identities(card.identities, path.with_suffix(f".{IDENTITIES}"))
        return model

    def embed(self, images: np.ndarray, color: Any = "RGB", flip: bool = False, unit: bool = True) -> np.ndarray:
        """As :meth:`EmbeddingModel.embed`; the graph's order counts, whatever the network inside was trained on."""
        same = color == self.graph_input.color
        return super().embed(images if same else images[..., ::-1], self.card.color, flip, unit)

    def rows(self, images: np.ndarray) -> np.ndarray:
        """(b, H, W, 3) uint8 RGB → (b, D) float32 as the graph gives them, not made unit."""
        return self._embed(images)

    def _embed(self, images: np.ndarray) -> np.ndarray:
        if not len(images):
            return np.empty((0, self.dim), np.float32)
        try:
            return self.graph_input.run(self._session, images)
        except Exception as error:
            raise ModelError(f"{self.path}: fails on {len(images)} images: {_line(error)}") from None

    def transform(self, direction: Direction, vectors: np.ndarray) -> np.ndarray:
        """An ONNX file holds one graph: transformations are files of their own. Always raises :class:`ModelError`."""
        raise ModelError(
            f"{self.path}: an ONNX file carries no transformation; use the model folder, or the map's own file"
        )


def _open_foreign(session: Any, path: Path, stated: Reading) -> OnnxModel:
    """A graph without a card: its input is described, its output found by running it on two black images."""
    dtype, channels_last, size = _input_axes(session, path, stated)
    beginning = read_beginning(path, session.get_inputs()[0].name, 3 if channels_last else 1)
    pixels, why = _pixels(path, beginning, dtype, stated)
    said = stated.model_copy(update={"pixels": pixels}) if stated.preprocessing() is None else stated
    mean, std = said.preprocessing() or ((0.5,) * 3, (0.5,) * 3)
    batch = session.get_inputs()[0].shape[0]
    fixed = isinstance(batch, int) and batch > 0
    color: Color = stated.color or ("BGR" if beginning.reversed else "RGB")
    graph_input = GraphInput(
        session.get_inputs()[0].name,
        stated.output or "",
        color,
        None if pixels == "0..255" else (mean, std),
        dtype,
        channels_last,
        batch if fixed else None,
    )
    notes = [f"embeddings are made in groups of {batch}, its fixed batch size"] if fixed else []
    graph_input, dim, more = _find_output(session, path, graph_input, size, stated.output)
    card = ModelCard(
        dim=dim, image_size=size, color=color, mean=mean, std=std, notes="an ONNX file without a model card"
    )
    content = reading_hash(path, graph_input.output, pixels, color, mean, std, size)
    model = OnnxModel(card, path, content, session, graph_input)
    model.foreign, model.allow_collapsed = True, stated.allow_collapsed
    ranges = {"0..255": "pixels 0 … 255", "0..1": "pixels 0 … 1"}
    fed = ranges.get(pixels, f"pixels normalised by mean {_short(mean)} and std {_short(std)} (of pixel / 255)")
    why_color = " (the graph reverses the colours first; state it with `color`)" if beginning.reversed else " (assumed)"
    assumed = "" if stated.color else why_color
    axes = " channels last," if channels_last else ""
    kind = "" if dtype == np.float32 else f" {np.dtype(dtype).name},"
    model.reading = "; ".join(
        [
            f"{path}: fed {fed} ({why}), {color}{assumed},{axes}{kind} {size[0]} × {size[1]}",
            f"dimension {dim} from the output {graph_input.output!r}",
            *notes,
            *more,
        ]
    )
    return model


def _short(values: Any) -> str:
    return f"{values[0]:g}" if len(set(values)) == 1 else "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _input_axes(session: Any, path: Path, stated: Reading) -> tuple[Any, bool, tuple[int, int]]:
    """dtype of the input, whether channels come last, (H, W)."""
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise ModelError(
            f"{path}: {len(inputs)} inputs ({', '.join(i.name for i in inputs)}); needed is one, of images"
        )
    shape = inputs[0].shape
    if inputs[0].type not in _TYPES:
        raise ModelError(f"{path}: its input is {inputs[0].type}; taken are float32, float16 and uint8")
    if len(shape) != 4 or 3 not in (shape[1], shape[3]):
        raise ModelError(f"{path}: its input is {shape}; needed is (batch, 3, H, W) or (batch, H, W, 3)")
    channels_last = shape[1] != 3
    sides = shape[1:3] if channels_last else shape[2:]
    static = [side if isinstance(side, int) and side > 0 else None for side in sides]
    size = stated.size or (static[0], static[1])
    if size[0] is None or size[1] is None:
        raise ModelError(f"{path}: its input {shape} leaves height and width free; state them: `size` 112 (or 112x96)")
    if any(known not in (None, side) for known, side in zip(static, size, strict=True)):
        raise ModelError(f"{path}: its input is {shape}, `size` says {size[0]} × {size[1]}")
    return _TYPES[inputs[0].type], channels_last, (size[0], size[1])


def _pixels(path: Path, beginning: Beginning, dtype: Any, stated: Reading) -> tuple[Pixels, str]:
    """The range that the graph is fed, and why. Raises :class:`ModelError`: the graph prepares its input in a form that
    cannot be read."""
    if dtype == np.uint8:
        if stated.preprocessing() is not None and stated.pixels != "0..255":
            raise ModelError(f"{path}: its input is uint8, which is pixels 0..255; leave `pixels`, `mean`, `std` out")
        return "0..255", "its input is uint8"
    if stated.preprocessing() is not None:
        return stated.pixels or "normalised", "as stated"
    if beginning.pixels is not None:
        return beginning.pixels, f"the graph begins with {', '.join(beginning.seen)}"
    if beginning.unclear:
        raise ModelError(
            f"{path}: begins with {beginning.unclear}: what it takes cannot be read from that; state it with `pixels` "
            "(0..255, 0..1 or normalised, then `mean` and `std`) and `color`"
        )
    return "normalised", "assumed: the graph does not begin with constants that say; state it with `pixels`"


def _find_output(
    session: Any, path: Path, graph_input: GraphInput, size: tuple[int, int], named: str | None
) -> tuple[GraphInput, int, list[str]]:
    """The graph's input with its output and group settled, D, and what is to be said of it."""
    names = [output.name for output in session.get_outputs()]
    if named is not None and named not in names:
        raise ModelError(f"{path}: has no output {named!r}; it has {', '.join(names)}")
    count, notes = graph_input.group or 2, []
    try:
        found = _outputs(session, graph_input, names, size, count)
    except Exception as error:
        if graph_input.group is not None:
            raise ModelError(f"{path}: fails on {count} images: {_line(error)}") from None
        found, notes = {}, [_line(error)]
    if graph_input.group is None and not _candidates(found, count):
        try:
            alone = _outputs(session, graph_input, names, size, 1)
        except Exception as error:
            raise ModelError(f"{path}: fails on one image: {_line(error)}") from None
        reason = notes[0] if notes else f"two give {', '.join(str(np.shape(v)) for v in found.values())}"
        found, count, graph_input = alone, 1, replace(graph_input, group=1)
        notes = [f"one image at a time, for the graph does not work on several ({reason[:160]})"]
    candidates = _candidates(found, count)
    if named is not None and named not in candidates:
        raise ModelError(f"{path}: its output {named!r} is {np.shape(found[named])}, no embedding (batch, D)")
    if not candidates:
        shapes = ", ".join(f"{name} {np.shape(value)}" for name, value in found.items())
        raise ModelError(f"{path}: for {count} images its outputs are {shapes}; needed is (batch, D)")
    chosen = named or next(iter(candidates))
    if named is None and len(names) > 1:
        notes.append(f"the first of its outputs that is an embedding, of {', '.join(names)} (another with `output`)")
    return replace(graph_input, output=chosen), candidates[chosen], notes


def _outputs(
    session: Any, graph_input: GraphInput, names: list[str], size: tuple[int, int], count: int
) -> dict[str, Any]:
    black = np.zeros((count, *size, 3), np.uint8)
    return dict(zip(names, session.run(names, {graph_input.name: graph_input.feed(black)}), strict=True))


def _candidates(found: dict[str, Any], count: int) -> dict[str, int]:
    """Output → D, of those that are an embedding."""
    rows = {name: embedding_rows(value, count) for name, value in found.items()}
    return {name: value.shape[1] for name, value in rows.items() if value is not None}


class OnnxTransform:
    """A transformation in an ONNX file: vectors (n, D_in) in, unit vectors (n, D_out) out."""

    def __init__(self, path: str | Path) -> None:
        """Raises :class:`ModelError` for a graph that does not map vectors to vectors."""
        self.path = Path(path)
        self._session = open_session(self.path)
        check_shapes(self._session, self.path, 2)
        self.dim_in = int(self._session.get_inputs()[0].shape[1])
        self.dim_out = int(self._session.get_outputs()[0].shape[1])
        self._input = self._session.get_inputs()[0].name

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """(n, D_in) → (n, D_out) float32 unit rows. Raises :class:`ModelError` for another dimension."""
        if vectors.ndim != 2 or vectors.shape[1] != self.dim_in:
            raise ModelError(f"{self.path}: takes vectors (n, {self.dim_in}), given are {vectors.shape}")
        if not len(vectors):
            return np.empty((0, self.dim_out), np.float32)
        given = np.ascontiguousarray(vectors, np.float32)
        return np.asarray(self._session.run(None, {self._input: given})[0], np.float32)
