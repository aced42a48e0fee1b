"""From models and data sets on disk to the embeddings that are evaluated; a cache keeps them for the next time."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from trainer.data.index import Dataset
from trainer.distributed import Ranks, on_main
from trainer.errors import DataError, ModelError
from trainer.evaluation.arrays import FloatArray, IntArray
from trainer.evaluation.compatibility import Spaces
from trainer.evaluation.study import NamedSet
from trainer.evaluation.templates import TemplateSet, pool
from trainer.export import Direction, EmbeddingModel, embed_dataset
from trainer.files import replaced

Progress = Callable[[str, int, int], None]
"""Told what is being embedded, how many images are done and how many there are."""


class EmbeddingCache:
    """Embeddings of a data set by (model hash, data set fingerprint), as .npy files in one folder; None keeps none."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def _file(self, model: EmbeddingModel, dataset: Dataset, records: IntArray, flip: bool) -> Path | None:
        if self.folder is None:
            return None
        which = hashlib.sha256(str(dataset.path.resolve()).encode() + records.tobytes() + bytes([flip])).hexdigest()[
            :16
        ]
        return self.folder / f"{model.hash}-{dataset.fingerprint[:16]}-{which}.npy"

    def embed(
        self,
        model: EmbeddingModel,
        dataset: Dataset,
        records: IntArray,
        ranks: Ranks,
        progress: Callable[[int, int], None] | None = None,
        flip: bool = False,
    ) -> FloatArray:
        """Embeddings (n, D) float32 of ``records``, on every rank; from the cache where they are known."""
        file = self._file(model, dataset, records, flip)
        known = on_main(lambda: self._read(file, len(records), model.dim), ranks)
        if known is not None:
            return known
        made = embed_dataset(model, dataset, records, ranks=ranks, progress=progress, flip=flip)
        on_main(lambda: self._write(file, made), ranks)
        return made

    def _read(self, file: Path | None, images: int, dim: int) -> FloatArray | None:
        if file is None or not file.exists():
            return None
        try:
            known = np.load(file, allow_pickle=False)
        except (OSError, ValueError):
            return None  # damaged: made anew and replaced
        return known if known.shape == (images, dim) and known.dtype == np.float32 else None

    def _write(self, file: Path | None, embeddings: FloatArray) -> None:
        if file is None:
            return
        with replaced(file, DataError) as partial, partial.open("wb") as stream:
            np.save(stream, embeddings)


def default_cache() -> Path:
    """``lce-trainer/embeddings`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lce-trainer" / "embeddings"


def check_models(models: Mapping[str, EmbeddingModel], datasets: Mapping[str, Dataset]) -> None:
    """Refuse, before anything is embedded, models that cannot be compared or cannot read the images.

    Raises:
        ModelError: old and new of other dimensions without a transformation.
        DataError: images of another size.
    """
    old, new = models["old"], models["new"]
    if old.dim != new.dim and not _directions(new):
        raise ModelError(
            f"{new.path}: dimension {new.dim} against {old.dim} of {old.path}, and no transformation between them in "
            "the new model; train with compat.mode backward, forward, both or cross-model"
        )
    for direction in _directions(new):
        part = new.card.transforms[direction]
        expected = (new.dim, old.dim) if direction == "t21" else (old.dim, new.dim)
        if (part.dim_in, part.dim_out) != expected:
            raise ModelError(
                f"{new.path}: its {direction} maps dimension {part.dim_in} to {part.dim_out}, needed is {expected[0]} "
                f"to {expected[1]}; was it trained against another old model?"
            )
    for name, dataset in datasets.items():
        for role, model in models.items():
            if tuple(model.card.image_size) != tuple(dataset.info.image_size):
                raise DataError(
                    f"{name} ({dataset.path}): images of {_size(dataset.info.image_size)}, the {role} model "
                    f"{model.path} takes {_size(model.card.image_size)}; pack the set in that size"
                )


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]}"


def _directions(new: EmbeddingModel) -> list[Direction]:
    return list(new.card.transforms)


def embed_spaces(
    name: str,
    models: Mapping[str, EmbeddingModel],
    dataset: Dataset,
    records: IntArray,
    cache: EmbeddingCache,
    ranks: Ranks,
    progress: Progress | None = None,
    flip: bool = False,
) -> Spaces:
    """Embed records (n,) under every model, T applied where the new model has one. Every rank must call it.

    Raises:
        LceError: a record or a model cannot be used.
    """
    native: dict[str, FloatArray] = {}
    for role, model in models.items():

        def report(done: int, total: int, role: str = role) -> None:
            if progress is not None:
                progress(f"{name}: {role} model", done, total)

        native[role] = cache.embed(model, dataset, records, ranks, report, flip)
    mapped: dict[tuple[str, str], FloatArray] = {}
    for direction in _directions(models["new"]):
        query, space = ("new", "old") if direction == "t21" else ("old", "new")
        mapped[query, space] = models["new"].transform(direction, native[query])
    return Spaces(native, mapped)


def embed_set(
    name: str,
    models: Mapping[str, EmbeddingModel],
    dataset: Dataset,
    cache: EmbeddingCache,
    ranks: Ranks,
    progress: Progress | None = None,
    flip: bool = False,
) -> NamedSet:
    """Embed the labelled records of a set under every model. Every rank must call it."""
    spaces = embed_spaces(name, models, dataset, dataset.kept, cache, ranks, progress, flip)
    return NamedSet(name, spaces, np.asarray(dataset.labels[dataset.kept]), dataset.kept, dataset.class_names)


def pool_spaces(
    spaces: Spaces, templates: TemplateSet, model: EmbeddingModel, by_score: bool
) -> tuple[IntArray, Spaces]:
    """Image embeddings → template numbers (t,) and template embeddings under every model.

    T₂₁ has worked on the query's images; T₁₂ works on the pooled templates, because these are what a gallery keeps.
    """
    weights = templates.score if by_score else None

    def pooled(embeddings: FloatArray) -> tuple[IntArray, FloatArray]:
        return pool(embeddings, templates.template, templates.media, weights)

    native = {role: pooled(embeddings)[1] for role, embeddings in spaces.native.items()}
    mapped = {key: pooled(embeddings)[1] for key, embeddings in spaces.mapped.items()}
    if ("old", "new") in mapped:
        mapped["old", "new"] = model.transform("t12", native["old"])
    return pooled(spaces.native["old"])[0], Spaces(native, mapped)


def training_curves(
    run: Path, keys: tuple[str, ...] = ("loss", "alignment", "boundary")
) -> dict[str, list[tuple[float, float]]]:
    """A run's ``log.jsonl`` → {key: [(step, value), …]}. Raises :class:`DataError` without a readable log."""
    file = run / "log.jsonl"
    curves: dict[str, list[tuple[float, float]]] = {key: [] for key in keys}
    try:
        for line in file.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            for key in keys:
                if isinstance(entry.get(key), (int, float)) and "step" in entry:
                    curves[key].append((float(entry["step"]), float(entry[key])))
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{file}: no readable training log ({error}); name run folders with --runs") from None
    return {key: curve for key, curve in curves.items() if curve}
