"""Models as files, and models from files: what training hands over and what every user of a model opens.

A model folder holds ``model.json`` (:class:`ModelCard`), ``backbone.safetensors`` and, where there are any, the
transformations ``t21.safetensors`` (new → old) and ``t12.safetensors`` (old → new). :func:`load_model` opens such a
folder, a run folder (its ``model/``) or an ONNX file, and gives one :class:`EmbeddingModel` for all of them.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pydantic
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer import __version__
from trainer.backbones import build_backbone
from trainer.compat.transform import build_transform, transform_vectors
from trainer.config import BackboneConfig, TransformConfig
from trainer.distributed import Ranks, agree, all_gather_rows
from trainer.errors import ConfigError, LceError, ModelError
from trainer.files import replaced, save_tensors

if TYPE_CHECKING:
    from trainer.data.index import Dataset

Color = Literal["RGB", "BGR"]
Direction = Literal["t21", "t12"]
Progress = Callable[[int, int], None]

CARD_FILE = "model.json"


class TransformCard(BaseModel):
    """One transformation of a model: what to build and between which dimensions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: TransformConfig
    dim_in: int = Field(ge=1)
    dim_out: int = Field(ge=1)


class ModelCard(BaseModel):
    """What a user must know of a model; everything that preprocessing and compatibility depend on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["lce-model-1"] = "lce-model-1"
    backbone: BackboneConfig | None = Field(None, description="None: the network is known as an ONNX graph only")
    dim: int = Field(ge=1, description="embedding dimension D")
    image_size: tuple[int, int] = Field(description="(H, W) in pixels")
    color: Color = "RGB"
    mean: tuple[float, float, float] = Field((0.5, 0.5, 0.5), description="of pixel / 255, in the order of color")
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    transforms: dict[Direction, TransformCard] = Field(default_factory=dict)
    left_out: tuple[Direction, ...] = Field(
        (), description="transformations that the model has beside this graph, which holds none of them"
    )
    mode: str = Field(
        "", description="how it was made compatible: direct, backward, forward, both, cross-model or nothing"
    )
    compatible_with: str | None = Field(None, description="the old model")
    compatible_with_hash: str | None = None
    step: int = Field(0, ge=0, description="updates that it was trained for")
    trained_on: str = ""
    classes: int = Field(0, ge=0, description="identities that it was trained on")
    figures: dict[str, float] = Field(default_factory=dict, description="measured figures, by name")
    licence: str = ""
    notes: str = ""
    version: str = Field(__version__, description="the lce-trainer that wrote it")


def save_model(
    folder: str | Path,
    backbone: nn.Module | None,
    card: ModelCard,
    transforms: Mapping[Direction, nn.Module] | None = None,
) -> None:
    """Write a model folder, atomically; an earlier model folder of that name is replaced.

    Args:
        backbone: the plain network (not wrapped for training); its state dict is copied to the CPU. None: the folder
            holds maps alone, and the card names no backbone.
        transforms: the modules that ``card.transforms`` describes.

    Raises:
        ModelError: the card and the modules do not fit each other, or the folder cannot be written.
    """
    folder = Path(folder)
    modules: dict[str, nn.Module] = {} if backbone is None else {"backbone": backbone}
    modules.update((str(name), module) for name, module in (transforms or {}).items())
    network = set() if card.backbone is None else {"backbone"}
    if not modules or set(modules) != network | set(card.transforms):
        raise ModelError(f"{folder}: the model card describes {sorted(card.transforms)}, given are {sorted(modules)}")
    refuse_foreign(folder)
    if card.backbone is not None:
        card = card.model_copy(update={"backbone": card.backbone.model_copy(update={"weights": None})})
    with replaced(folder, ModelError) as partial:
        partial.mkdir(parents=True)
        for name, module in modules.items():
            state = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
            save_tensors(state, partial / f"{name}.safetensors")
        (partial / CARD_FILE).write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")


def refuse_foreign(folder: Path) -> None:
    """Raise :class:`ModelError` where a folder exists that is neither empty nor a model folder: it is not replaced."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CARD_FILE).is_file():
        raise ModelError(f"{folder}: exists and is no model folder; nothing was replaced")


class EmbeddingModel(ABC):
    """A model for use: images in, unit embeddings out, with its transformations.

    Attributes:
        card: what is known of it. path: where it was loaded from. hash: of its weights and preprocessing, for caches
        and checks.
    """

    def __init__(self, card: ModelCard, path: Path, content_hash: str) -> None:
        self.card, self.path, self.hash = card, path, content_hash

    @property
    def dim(self) -> int:
        """D."""
        return self.card.dim

    def embed(self, images: np.ndarray, color: Color = "RGB", flip: bool = False, unit: bool = True) -> np.ndarray:
        """Embed a batch.

        Args:
            images: (b, H, W, 3) uint8 of the card's image size.
            color: the order of the images' colours; the model's own order is restored from it.
            flip: add the unit embedding of the mirrored image before normalising ("flip-sum").
            unit: False leaves the embeddings the norms that the network gives them (with ``flip`` the mean of both).

        Returns:
            (b, D) float32, unit rows unless ``unit`` is False.

        Raises:
            ModelError: images of another size or kind.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (*self.card.image_size, 3):
            height, width = self.card.image_size
            raise ModelError(
                f"{self.path}: needs uint8 images (b, {height}, {width}, 3), given are {images.dtype} {images.shape}"
            )
        if color != self.card.color:
            images = images[..., ::-1]
        vectors, norms = _unit_and_norm(self._embed(images))
        if flip:
            mirrored, others = _unit_and_norm(self._embed(images[:, :, ::-1]))
            vectors, norms = _unit_and_norm(vectors + mirrored)[0], (norms + others) / 2
        return vectors if unit else vectors * norms

    @abstractmethod
    def _embed(self, images: np.ndarray) -> np.ndarray:
        """Images in the model's own colour order → (b, D) float32, as the network gives them."""

    @abstractmethod
    def transform(self, direction: Direction, vectors: np.ndarray) -> np.ndarray:
        """n(T(n(v))): (n, D_in) → (n, D_out) float32 unit rows.

        Raises:
            ModelError: the model has no such transformation, or vectors of another dimension.
        """


def _unit_and_norm(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(norms, 1e-12), norms


class NoNetwork(nn.Module):
    """Stands for the network of a folder that holds maps alone: embeddings can be mapped, images not embedded."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def forward(self, images: Tensor) -> Tensor:
        """Raises :class:`ModelError`."""
        raise ModelError(f"{self.path}: holds maps between embeddings and no network; name the model itself for images")


class TorchModel(EmbeddingModel):
    """A model folder, run by torch in float32 without gradients."""

    def __init__(
        self,
        card: ModelCard,
        path: Path,
        content_hash: str,
        backbone: nn.Module,
        transforms: Mapping[Direction, nn.Module],
        device: str | torch.device,
    ) -> None:
        super().__init__(card, path, content_hash)
        self.device = torch.device(device)
        self.backbone = backbone.eval().requires_grad_(False).to(self.device)
        self.transforms = {d: t.eval().requires_grad_(False).to(self.device) for d, t in transforms.items()}
        self._mean = torch.tensor(card.mean, device=self.device).view(3, 1, 1)
        self._std = torch.tensor(card.std, device=self.device).view(3, 1, 1)

    def prepare(self, images: np.ndarray) -> Tensor:
        """(b, H, W, 3) uint8 in the model's colour order → (b, 3, H, W) float32, normalised, on the model's device."""
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self.device).permute(0, 3, 1, 2).float()
        return (pixels / 255 - self._mean) / self._std

    def _embed(self, images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.backbone(self.prepare(images)).float().cpu().numpy()

    def transform(self, direction: Direction, vectors: np.ndarray) -> np.ndarray:
        if direction not in self.transforms:
            raise ModelError(
                f"{self.path}: has no transformation {direction}; it has {sorted(self.transforms) or 'none'}"
            )
        if vectors.ndim != 2 or vectors.shape[1] != self.card.transforms[direction].dim_in:
            wanted = self.card.transforms[direction].dim_in
            raise ModelError(f"{self.path}: {direction} takes vectors (n, {wanted}), given are {vectors.shape}")
        with torch.no_grad():
            given = torch.from_numpy(np.ascontiguousarray(vectors, np.float32)).to(self.device)
            return transform_vectors(self.transforms[direction], given).cpu().numpy()


def load_model(path: str | Path, device: str | torch.device = "cpu") -> EmbeddingModel:
    """Open a model folder, a run folder (its ``model/``, else its newest checkpoint), a checkpoint or an ONNX file.

    Raises:
        ModelError: nothing there, an unfinished run, damaged files, weights that do not fit the card, or an ONNX graph
            that does not map a batch of images to one embedding each.
    """
    path = Path(path)
    if path.suffix == ".onnx":
        from trainer.onnx_model import OnnxModel  # onnxruntime takes a second to import

        return OnnxModel.open(path)
    folder = path if (path / CARD_FILE).is_file() else path / "model"
    if not (folder / CARD_FILE).is_file():
        from trainer.checkpoint_model import is_checkpointed, open_checkpoint

        if is_checkpointed(path):
            return open_checkpoint(path, device)
        reason = "the run has no checkpoint yet" if (path / "checkpoints").is_dir() else f"no {CARD_FILE} in it"
        raise ModelError(
            f"{path}: no model ({reason}); give a model folder, a run folder, a checkpoint or an .onnx file"
        )
    card = read_card((folder / CARD_FILE).read_bytes(), str(folder / CARD_FILE))
    if card.backbone is None and not card.transforms:
        raise ModelError(f"{folder / CARD_FILE}: names no backbone")
    try:
        backbone = NoNetwork(path) if card.backbone is None else build_backbone(card.backbone, card.image_size)
    except ConfigError as error:
        raise ModelError(f"{folder / CARD_FILE}: {error}") from None
    digest = hashlib.sha256(card.model_dump_json(include={"backbone", "image_size", "color", "mean", "std"}).encode())
    if card.backbone is not None:
        _load_state(backbone, folder / "backbone.safetensors", digest.update)
    transforms: dict[Direction, nn.Module] = {}
    for direction, part in card.transforms.items():
        transforms[direction] = build_transform(part.config, part.dim_in, part.dim_out)
        _load_state(transforms[direction], folder / f"{direction}.safetensors", digest.update)
    return TorchModel(card, path, digest.hexdigest()[:16], backbone, transforms, device)


load_exported = load_model
"""For users of exported files: folders and ONNX."""


def read_card(data: bytes | str, source: str) -> ModelCard:
    """Parse a model card. Raises :class:`ModelError` naming ``source`` and the key."""
    try:
        return ModelCard.model_validate_json(data)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        raise ModelError(f"{source}: {'.'.join(map(str, problem['loc'])) or 'content'}: {problem['msg']}") from None


def _load_state(module: nn.Module, path: Path, update: Callable[[bytes], None]) -> None:
    try:
        with path.open("rb") as file:
            while data := file.read(2**22):
                update(data)
        module.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{path}: missing, damaged or not of the network in {CARD_FILE}: {reason}") from None


def embed_dataset(
    model: EmbeddingModel,
    dataset: "Dataset",
    indices: Sequence[int] | np.ndarray | None = None,
    batch_size: int = 256,
    ranks: Ranks = Ranks(),  # noqa: B008  (frozen)
    progress: Progress | None = None,
    flip: bool = False,
    unit: bool = True,
) -> np.ndarray:
    """Embed records of a data set, the work shared among the ranks; every rank must call it.

    Args:
        indices: record numbers, default all N.
        progress: called on every rank with its own (done, total).
        flip, unit: as of :meth:`EmbeddingModel.embed`.

    Returns:
        (n, D) float32 rows in the order of ``indices``, on every rank.

    Raises:
        LceError: on every rank, the first rank's problem: a damaged record, or images of another size than the model's.
    """
    records = np.arange(len(dataset)) if indices is None else np.asarray(indices, np.int64)
    parts = np.array_split(records, ranks.world_size)
    out = np.empty((len(parts[ranks.rank]), model.dim), np.float32)
    problem: LceError | None = None
    done = 0
    try:
        for part, vectors in embed_batches(model, dataset, parts[ranks.rank], batch_size, flip, unit):
            out[done : done + len(part)] = vectors
            done += len(part)
            if progress is not None:
                progress(done, len(out))
    except LceError as error:
        problem = error
    agree(problem)
    return all_gather_rows(torch.from_numpy(out), [len(part) for part in parts]).numpy()


def embed_batches(
    model: EmbeddingModel,
    dataset: "Dataset",
    records: np.ndarray,
    batch_size: int = 256,
    flip: bool = False,
    unit: bool = True,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of (record numbers (b,), embeddings (b, D), unit unless said otherwise); the next batch is decoded while
    the model works on this one.

    Raises:
        LceError: a damaged record, or images of another size than the model's.
    """
    batches = [records[i : i + batch_size] for i in range(0, len(records), batch_size)]
    with ThreadPoolExecutor(max_workers=2) as pool:
        waiting = [pool.submit(dataset.decode, int(record)) for record in batches[0]] if batches else []
        for number, batch in enumerate(batches):
            following = batches[number + 1] if number + 1 < len(batches) else batch[:0]
            current, waiting = waiting, [pool.submit(dataset.decode, int(record)) for record in following]
            images = np.stack([future.result() for future in current])
            yield batch, model.embed(images, dataset.info.color, flip, unit)
