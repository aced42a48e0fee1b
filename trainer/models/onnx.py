"""ONNX files as models: our own exports and other people's, run by ONNX Runtime."""

import hashlib
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trainer.data.identities import load_identities
from trainer.errors import ModelError
from trainer.models.card import IDENTITIES, Direction, ModelCard, read_card
from trainer.models.model import EmbeddingModel
from trainer.reading import regular
from trainer.seals import warn_once

CARD_KEY = "lce_model_card"
INPUT_KEY = "lce_input"

InputKind = Literal["pixels", "normalised", "vectors"]
IMAGES_INSIDE: InputKind = "pixels"
IMAGES_OUTSIDE: InputKind = "normalised"
VECTORS: InputKind = "vectors"


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


def open_session(path: Path) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU. Raises :class:`ModelError` when the file is missing or no ONNX
    graph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    whole = check_seal(path)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        metadata = session.get_modelmeta().custom_metadata_map
    except Exception as error:
        raise ModelError(f"{path}: ONNX Runtime cannot load it: {str(error).splitlines()[0]}") from None
    if not whole and CARD_KEY in metadata:
        why = "was saved again by another tool" if _SEAL_KEY.decode() in metadata else "was written without a checksum"
        warn_once(f"{path}: {why}; damage in it would not be noticed")
    return session


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
        raise ModelError(f"{path}: its input {given} has free axes beside the batch; export it with a static size")


class OnnxModel(EmbeddingModel):
    """An image model in an ONNX file.

    Files without our model card are read as InsightFace's clients read them: RGB; graphs that subtract and multiply
    first take pixels of 0 … 255, others (pixel − 127.5) / 127.5.
    """

    def __init__(self, card: ModelCard, path: Path, content_hash: str, session: Any, input_kind: InputKind) -> None:
        super().__init__(card, path, content_hash)
        self.input_kind = input_kind
        self._session, self._input = session, session.get_inputs()[0].name

    @staticmethod
    def open(path: Path) -> "OnnxModel":
        """Open a file. Raises :class:`ModelError` for a graph that does not map a batch of images to one embedding
        each."""
        session = open_session(regular(path, ModelError))
        metadata = session.get_modelmeta().custom_metadata_map
        if metadata.get(INPUT_KEY) == VECTORS:
            raise ModelError(f"{path}: a transformation of embeddings, not a model of images")
        check_shapes(session, path, 4)
        if CARD_KEY in metadata:
            card = read_card(metadata[CARD_KEY], str(path))
            kind: InputKind = IMAGES_OUTSIDE if metadata.get(INPUT_KEY) == IMAGES_OUTSIDE else IMAGES_INSIDE
        else:
            card, kind = _foreign_card(session, path)
        shape = session.get_inputs()[0].shape
        if list(shape[1:]) != [3, *card.image_size]:
            raise ModelError(f"{path}: its input is {shape}, its model card says images of {card.image_size}")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        model = OnnxModel(card, path, digest, session, kind)
        model.identities = load_identities(card.identities, path.with_suffix(f".{IDENTITIES}"))
        return model

    def embed(self, images: np.ndarray, color: Any = "RGB", flip: bool = False, unit: bool = True) -> np.ndarray:
        """As :meth:`EmbeddingModel.embed`; graphs take RGB always, whatever the network inside was trained on."""
        return super().embed(images if color == "RGB" else images[..., ::-1], self.card.color, flip, unit)

    def feed(self, images: np.ndarray) -> np.ndarray:
        """(b, H, W, 3) uint8 RGB → the graph's input (b, 3, H, W) float32."""
        pixels = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).astype(np.float32)
        if self.input_kind == IMAGES_INSIDE:
            return pixels
        order = slice(None) if self.card.color == "RGB" else slice(None, None, -1)
        mean = np.array(self.card.mean[order], np.float32).reshape(3, 1, 1)
        std = np.array(self.card.std[order], np.float32).reshape(3, 1, 1)
        return (pixels / 255 - mean) / std

    def rows(self, images: np.ndarray) -> np.ndarray:
        """(b, H, W, 3) uint8 RGB → (b, D) float32 as the graph gives them, not made unit."""
        return self._embed(images)

    def _embed(self, images: np.ndarray) -> np.ndarray:
        if not len(images):
            return np.empty((0, self.dim), np.float32)
        return np.asarray(self._session.run(None, {self._input: self.feed(images)})[0], np.float32)

    def transform(self, direction: Direction, vectors: np.ndarray) -> np.ndarray:
        """An ONNX file holds one graph: transformations are files of their own. Always raises :class:`ModelError`."""
        raise ModelError(
            f"{self.path}: an ONNX file carries no transformation; use the model folder, or the map's own file"
        )


def _foreign_card(session: Any, path: Path) -> tuple[ModelCard, InputKind]:
    import onnx

    first = [node.name for node in onnx.load(path, load_external_data=False).graph.node[:8]]
    inside = any(n.startswith(("Sub", "_minus")) for n in first) and any(n.startswith(("Mul", "_mul")) for n in first)
    inside = inside or "bn_data" in first[:3]
    shape, dim = session.get_inputs()[0].shape, session.get_outputs()[0].shape[1]
    if shape[1] != 3 or not isinstance(dim, int):
        raise ModelError(f"{path}: maps {shape} to dimension {dim}; needed is (batch, 3, H, W) to a fixed dimension")
    card = ModelCard(dim=dim, image_size=(shape[2], shape[3]), notes="an ONNX file without a model card")
    return card, IMAGES_INSIDE if inside else IMAGES_OUTSIDE


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
