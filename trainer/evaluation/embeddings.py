"""From models and data sets on disk to the embeddings that are evaluated; a cache keeps them for the next time."""

import hashlib
import threading
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from trainer.data.index import Dataset
from trainer.distributed import Ranks, on_main
from trainer.errors import DataError, ModelError
from trainer.evaluation.arrays import FloatArray, IntArray, check_unit, class_index
from trainer.evaluation.chain import carried, check_links, predicted_distance
from trainer.evaluation.compatibility import Spaces
from trainer.evaluation.overlap import Declared, Known, overlaps
from trainer.evaluation.results import NamedSet
from trainer.evaluation.templates import TemplateSet, pool
from trainer.files import cache_folder, is_own, replaced
from trainer.models.card import Color
from trainer.models.mapped import MappedModel, StoredModel
from trainer.models.model import EmbeddingModel, embed_dataset, resized
from trainer.reading import open_regular, parse_json, read_text

STORED = "embeddings"
"""The name of the set that embeddings on disk are."""

Progress = Callable[[str, int, int], None]
"""Told what is being embedded, how many images are done and how many there are."""


class EmbeddingCache:
    """Embeddings of a data set by (model hash, data set fingerprint), as .npy files in one folder; None keeps none."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def _file(self, model: EmbeddingModel, dataset: Dataset, records: IntArray, flip: bool, unit: bool) -> Path | None:
        if self.folder is None:
            return None
        settings = bytes([flip]) if unit else bytes([flip, 1])
        which = hashlib.sha256(str(dataset.path.resolve()).encode() + records.tobytes() + settings).hexdigest()
        return self.folder / f"{model.hash}-{dataset.fingerprint[:16]}-{which[:16]}.npy"

    def embed(
        self,
        model: EmbeddingModel,
        dataset: Dataset,
        records: IntArray,
        ranks: Ranks,
        progress: Callable[[int, int], None] | None = None,
        flip: bool = False,
        unit: bool = True,
    ) -> FloatArray:
        """Embeddings (n, D) float32 of ``records``, on every rank; from the cache where they are known.

        unit: made unit; else with the norms that the network gives them.
        """
        file = self._file(model, dataset, records, flip, unit)
        known = on_main(lambda: self._read(file, len(records), model.dim), ranks)
        if known is not None:
            return known
        made = embed_dataset(model, dataset, records, ranks=ranks, progress=progress, flip=flip, unit=unit)
        on_main(lambda: self._write(file, made), ranks)
        return made

    def _read(self, file: Path | None, images: int, dim: int) -> FloatArray | None:
        if file is None or not file.exists():
            return None
        if file.parent == default_cache() and not is_own(file):
            return None  # planted
        try:
            with open_regular(file, DataError) as stream:
                known = np.load(stream, allow_pickle=False)
                if stream.read() != _crc(known):
                    return None  # damaged, or of an earlier version: made anew and replaced
        except Exception:  # numpy fails as variously as a file can be damaged
            return None
        return known if known.shape == (images, dim) and known.dtype == np.float32 else None

    def _write(self, file: Path | None, embeddings: FloatArray) -> None:
        if file is None:
            return
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{file.parent}: cannot be made: {error.strerror}") from None
        with _WRITING, replaced(file, DataError) as partial, partial.open("wb") as stream:
            np.save(stream, embeddings)
            stream.write(_crc(embeddings))


_WRITING = threading.Lock()
"""Threads of one process may embed the same set: what they write has one name until it is whole."""


def _crc(embeddings: FloatArray) -> bytes:
    """What stands behind cached embeddings: their CRC-32, four bytes."""
    return zlib.crc32(np.ascontiguousarray(embeddings).data).to_bytes(4, "little")


def default_cache() -> Path:
    """``embeddings`` in the user's cache folder (:func:`trainer.files.cache_folder`)."""
    return cache_folder("embeddings")


def embed_spaces(
    name: str,
    models: Mapping[str, EmbeddingModel],
    dataset: Dataset,
    records: IntArray,
    cache: EmbeddingCache,
    ranks: Ranks,
    progress: Progress | None = None,
    flip: bool = False,
    norms: bool = False,
) -> Spaces:
    """Embed records (n,) under every model, T applied where a model has one. Every rank must call it.

    Args:
        norms: keep the embeddings' norms too.

    Raises:
        LceError: a record or a model cannot be used, or gives no norms.
    """
    native: dict[str, FloatArray] = {}
    sizes: dict[str, FloatArray] = {}
    for role, model in models.items():

        def report(done: int, total: int, role: str = role) -> None:
            if progress is not None:
                progress(f"{name}: {role} model", done, total)

        native[role] = cache.embed(model, dataset, records, ranks, report, flip, unit=not norms)
        if norms:
            sizes[role] = np.linalg.norm(native[role], axis=1)
            if np.all(np.abs(sizes[role] - 1) < 1e-4):
                raise ModelError(
                    f"{model.path}: gives unit embeddings, whose norms say nothing; take the model folder instead of "
                    "its export, or leave `norm_weights` out"
                )
            native[role] = native[role] / np.maximum(sizes[role], 1e-12)[:, None]
        check_unit(native[role], f"{name}, {role} model")
    return Spaces(native, carried(models, native), sizes, predicted_distance(models, native))


def embed_set(
    name: str,
    models: Mapping[str, EmbeddingModel],
    dataset: Dataset,
    cache: EmbeddingCache,
    ranks: Ranks,
    progress: Progress | None = None,
    flip: bool = False,
    declared: Declared | None = None,
) -> NamedSet:
    """Embed the labelled records of a set under every model, and find which of its identities they were trained on.
    Every rank must call it."""
    spaces = embed_spaces(name, models, dataset, dataset.kept, cache, ranks, progress, flip)
    known = overlaps(dataset, models, declared)
    return NamedSet(name, spaces, np.asarray(dataset.labels[dataset.kept]), dataset.kept, dataset.class_names, known)


def stored_set(
    files: Mapping[str, Path],
    rows: Mapping[str, FloatArray],
    labels: IntArray,
    maps: EmbeddingModel | None = None,
    declared: Declared | None = None,
) -> tuple[NamedSet, dict[str, EmbeddingModel]]:
    """Embeddings of the same n images by the two models as a set.

    Args:
        files: ``old``, ``new`` → where the rows were read, for messages.
        rows: ``old``, ``new`` → (n, D1), (n, D2), of any norm.
        labels: (n,) identities; −1 leaves an image out.
        maps: of the new embeddings, where there are some.
        declared: whether identities of the set were trained on, which numbers do not say.

    Returns:
        The set, and the two models that the files stand for (the new one with ``maps``).

    Raises:
        LceError: other lengths, rows without a direction, or embeddings that cannot be compared.
    """
    stand_in: EmbeddingModel = StoredModel(files["new"], rows["new"].shape[1])
    models: dict[str, EmbeddingModel] = {
        "old": StoredModel(files["old"], rows["old"].shape[1]),
        "new": stand_in if maps is None else MappedModel(stand_in, maps),
    }
    check_links(models)
    kept = np.flatnonzero(labels >= 0)
    native: dict[str, FloatArray] = {}
    for role, path in files.items():
        if len(rows[role]) != len(labels):
            raise DataError(f"{path}: {len(rows[role])} embeddings, but {len(labels)} labels")
        vectors = rows[role][kept]
        norms = np.linalg.norm(vectors, axis=1)
        wrong = np.flatnonzero(~((norms > 1e-12) & np.isfinite(norms)))
        if len(wrong):
            raise DataError(f"{path}, row {kept[wrong[0]]}: a vector of norm {norms[wrong[0]]:g} has no direction")
        native[role] = vectors / norms[:, None]
    identities = int(class_index(labels[kept], "the labels of the embeddings").max()) + 1
    known = Known(declared == "seen", identities, {}, declared == "unseen")
    spaces = Spaces(native, carried(models, native), distance=predicted_distance(models, native))
    return NamedSet(STORED, spaces, labels[kept], kept, known=known), models


def pool_spaces(
    spaces: Spaces, templates: TemplateSet, models: Mapping[str, EmbeddingModel], by_score: bool
) -> tuple[IntArray, Spaces]:
    """Image embeddings → template numbers (t,) and template embeddings under every model.

    T₂₁ has worked on the query's images; T₁₂ works on the pooled templates, because these are what a gallery keeps.
    Images are weighed by their detection score (``by_score``) and by the norms, where ``spaces`` has them.
    """

    def pooled(role: str, embeddings: FloatArray) -> tuple[IntArray, FloatArray]:
        weights = templates.score if by_score else np.ones(len(embeddings))
        return pool(embeddings, templates.template, templates.media, weights * spaces.norms.get(role, 1.0))

    numbers = pooled("old", spaces.native["old"])[0]
    native = {role: pooled(role, embeddings)[1] for role, embeddings in spaces.native.items()}
    mapped = carried(models, native)
    order = list(models).index
    for (role, space), embeddings in spaces.mapped.items():
        if order(role) > order(space) and embeddings is not spaces.native[role]:
            mapped[role, space] = pooled(role, embeddings)[1]
    return numbers, Spaces(native, mapped)


def check_colours(name: str, models: Mapping[str, EmbeddingModel], dataset: Dataset, identities: int = 40) -> None:
    """Refuse a set or a model whose colour order is declared wrongly, as far as the pictures show it.

    Two images of each of up to ``identities`` identities are compared as declared and with red and blue swapped, by the
    share of the others' images that score below the own one. Grey pictures show nothing, nor do fewer than 10
    identities.

    Raises:
        DataError: a model tells the identities apart clearly better (by 0.03 and four standard errors) when swapped.
    """
    kept, labels = dataset.kept, np.asarray(dataset.labels[dataset.kept])
    order = np.argsort(labels, kind="stable")
    _, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
    first = first[counts > 1][:: max(1, int((counts > 1).sum()) // identities)][:identities]
    if len(first) < 10:
        return
    records = kept[order[np.concatenate([first, first + 1])]]
    images = np.stack([dataset.decode(int(record)) for record in records])
    if np.array_equal(images, images[..., ::-1]):
        return
    swapped: dict[Color, Color] = {"RGB": "BGR", "BGR": "RGB"}
    for role, model in models.items():
        fitted = resized(images, model.card.image_size)
        given, other = (_told_apart(model.embed(fitted, c)) for c in (dataset.info.color, swapped[dataset.info.color]))
        gain = other - given
        if gain.mean() > max(0.03, 4 * float(gain.std(ddof=1)) / len(gain) ** 0.5):
            raise DataError(
                f"{name} ({dataset.path}): the {role} model {model.path} tells its identities apart better with red "
                f"and blue swapped ({other.mean():.3f} against {given.mean():.3f}): the colour order of the set "
                f"({dataset.info.color}) or of the model ({model.card.color}) is wrong; correct it, or give "
                "`no_colour_check`"
            )


def _told_apart(embeddings: FloatArray) -> FloatArray:
    """First and second images (2n, D) of n identities → the share of the others' second images below the own one."""
    half = len(embeddings) // 2
    cosines = embeddings[:half] @ embeddings[half:].T
    below = cosines < np.diag(cosines)[:, None]
    return np.asarray(below.sum(1) / (half - 1), np.float64)


def training_curves(
    run: Path, keys: tuple[str, ...] = ("loss", "alignment", "boundary")
) -> dict[str, list[tuple[float, float]]]:
    """A run's ``log.jsonl`` → {key: [(step, value), …]}. Raises :class:`DataError` without a readable log."""
    file = run / "log.jsonl"
    curves: dict[str, list[tuple[float, float]]] = {key: [] for key in keys}
    try:
        for line in read_text(file, DataError).splitlines():
            entry = parse_json(line, str(file), DataError)
            for key in keys:
                if isinstance(entry.get(key), (int, float)) and "step" in entry:
                    curves[key].append((float(entry["step"]), float(entry[key])))
    except (DataError, ValueError, AttributeError) as error:
        raise DataError(f"{file}: no readable training log ({error}); name run folders with `runs`") from None
    return {key: curve for key, curve in curves.items() if curve}
