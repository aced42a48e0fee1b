"""Models in use: images in, unit embeddings out, whatever kind of file the model came from
(:func:`trainer.models.open.load_model`)."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from trainer.data.identities import Identities
from trainer.distributed import Ranks, agree, all_gather_rows
from trainer.errors import LceError, ModelError
from trainer.models.card import Color, Direction, ModelCard
from trainer.networks.transform import expected_distances, transform_vectors

if TYPE_CHECKING:
    from trainer.data.index import Dataset

Progress = Callable[[int, int], None]

log = logging.getLogger(__name__)


class EmbeddingModel(ABC):
    """A model for use: images in, unit embeddings out, with its transformations.

    Attributes:
        card: what is known of it. path: where it was loaded from. hash: of its weights and preprocessing, for caches
        and checks. identities: which it was trained on; None: not known.
        foreign: without a card of ours: how images enter it was read, stated or assumed. reading: which, in words.
        allow_collapsed: :func:`check_distinct` lets it pass.
    """

    foreign = False
    allow_collapsed = False
    reading = ""

    def __init__(self, card: ModelCard, path: Path, content_hash: str) -> None:
        self.card, self.path, self.hash = card, path, content_hash
        self.identities: Identities | None = None

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

    @property
    def predicts_distance(self) -> bool:
        """Whether :meth:`distance` can be called."""
        return False

    def distance(self, vectors: np.ndarray) -> np.ndarray:
        """How far T₁₂ of old embeddings (n, D_in) is expected to be from the new ones: (n,) float32, 1 − cos.

        Raises:
            ModelError: the model does not predict it, or vectors of another dimension.
        """
        raise ModelError(
            f"{self.path}: does not predict how far T₁₂ errs; train its maps with compat.mode = cross-model and "
            "compat.distance = true, and give the run or its model folder"
        )


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
        distance: nn.Module | None = None,
    ) -> None:
        super().__init__(card, path, content_hash)
        self.device = torch.device(device)
        self.backbone = backbone.eval().requires_grad_(False).to(self.device)
        self.transforms = {d: t.eval().requires_grad_(False).to(self.device) for d, t in transforms.items()}
        self.distance_head = None if distance is None else distance.eval().requires_grad_(False).to(self.device)
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
        with torch.no_grad():
            return transform_vectors(self.transforms[direction], self._given(direction, vectors)).cpu().numpy()

    def _given(self, direction: Direction, vectors: np.ndarray) -> Tensor:
        """The map's input on the model's device. Raises :class:`ModelError`: of another dimension."""
        wanted = self.card.transforms[direction].dim_in
        if vectors.ndim != 2 or vectors.shape[1] != wanted:
            raise ModelError(f"{self.path}: {direction} takes vectors (n, {wanted}), given are {vectors.shape}")
        return torch.from_numpy(np.ascontiguousarray(vectors, np.float32)).to(self.device)

    @property
    def predicts_distance(self) -> bool:
        """See :class:`EmbeddingModel`."""
        return self.distance_head is not None

    def distance(self, vectors: np.ndarray) -> np.ndarray:
        """See :class:`EmbeddingModel`."""
        if self.distance_head is None:
            return super().distance(vectors)
        with torch.no_grad():
            return expected_distances(self.distance_head, self._given("t12", vectors)).cpu().numpy()


COLLAPSED = 0.98
"""Mean cosine of different images above which a model is taken to be fed wrongly."""
_PAIRS = 64


def check_distinct(model: EmbeddingModel, dataset: "Dataset") -> None:
    """Refuse a foreign model whose embeddings of different images all but coincide: it is fed what it does not take.

    Raises:
        ModelError: the mean cosine of 64 pairs of images, spread over the set, is above :data:`COLLAPSED`.
    """
    if not model.foreign or model.allow_collapsed:
        return
    kept = np.flatnonzero(dataset.sound_labels >= 0)
    chosen = kept[np.unique(np.linspace(0, len(kept) - 1, min(len(kept), 2 * _PAIRS)).astype(int))]
    half = len(chosen) // 2
    images = np.stack([dataset.decode(int(record)) for record in chosen[: 2 * half]]) if half else np.empty((0, 1))
    images = resized(images, model.card.image_size) if half else images
    differ = np.array([not np.array_equal(*pair) for pair in zip(images[:half], images[half:], strict=True)], bool)
    if not differ.any():
        return
    vectors = np.concatenate([model.embed(part, dataset.info.color) for part in np.array_split(images, 8)])
    if not np.isfinite(vectors).all():
        raise ModelError(
            f"{model.path}: its embeddings are not finite (NaN or infinite) on {dataset.path}: its weights are "
            "damaged, or its training run diverged"
        )
    cosine = float((vectors[:half] * vectors[half:]).sum(1)[differ].mean())
    if not cosine <= COLLAPSED:
        raise ModelError(
            f"{model.path}: embeddings of different images all but coincide (mean cosine {cosine:.4f} of "
            f"{int(differ.sum())} pairs of {dataset.path}), so it is probably fed what it does not take "
            f"({model.reading}); state `pixels`, `color`, `mean` and `std`, or `allow_collapsed` if it is right"
        )


def resizing(model: EmbeddingModel, dataset: "Dataset") -> str:
    """What is to be said where a set's images are of another size than the model's; "" where they are not."""
    stored, taken = dataset.info.image_size, model.card.image_size
    if tuple(stored) == tuple(taken):
        return ""
    return (
        f"{dataset.path}: its images of {stored[0]} × {stored[1]} are resized to {taken[0]} × {taken[1]}, which "
        f"{model.path} takes"
    )


def introduce(model: EmbeddingModel, dataset: "Dataset | None", shown: bool) -> None:
    """Log how a foreign model is read and that images are resized for it (where ``shown``), and refuse one that
    :func:`check_distinct` refuses. Raises :class:`ModelError`."""
    for line in (model.reading, "" if dataset is None else resizing(model, dataset)) if shown else ():
        if line:
            log.warning("%s", line)
    if dataset is not None:
        check_distinct(model, dataset)


def resized(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(b, H, W, 3) uint8 in another size (H', W'), bilinear with antialiasing; as they are where the size is that."""
    if images.shape[1:3] == tuple(size):
        return images
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    out = nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
    return out.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


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
        LceError: on every rank, the first rank's problem, such as a damaged record.
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
    the model works on this one. Images of another size than the model's are resized (:func:`resized`).

    Raises:
        LceError: a damaged record.
    """
    batches = [records[i : i + batch_size] for i in range(0, len(records), batch_size)]
    with ThreadPoolExecutor(max_workers=2) as pool:
        waiting = [pool.submit(dataset.decode, int(record)) for record in batches[0]] if batches else []
        for number, batch in enumerate(batches):
            following = batches[number + 1] if number + 1 < len(batches) else batch[:0]
            current, waiting = waiting, [pool.submit(dataset.decode, int(record)) for record in following]
            images = resized(np.stack([future.result() for future in current]), model.card.image_size)
            yield batch, model.embed(images, dataset.info.color, flip, unit)
