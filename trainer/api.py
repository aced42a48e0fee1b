"""What ``import trainer`` offers: the whole upgrade from Python, in one process.

Many processes, queues and clusters are the command's (``lce launch``). A path may stand wherever a model or a data set
is taken.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.compat.bank.center_bank import CenterBank
from trainer.compat.bank.from_model import bank_from_model
from trainer.data import Dataset, open_named
from trainer.distributed import process_group
from trainer.errors import ConfigError, ModelError
from trainer.evaluation.embeddings import EmbeddingCache, default_cache, embed_set
from trainer.evaluation.overlap import declarations
from trainer.evaluation.provenance import provenance
from trainer.evaluation.results import Options, measure_sets
from trainer.gallery import files
from trainer.gallery.convert import Forward, Reencode
from trainer.gallery.open import open_gallery
from trainer.models.graph import Parity, pick_images
from trainer.models.model import EmbeddingModel, TorchModel, check_distinct, embed_dataset
from trainer.models.onnx_export import export_onnx as write_onnx
from trainer.models.open import load_model
from trainer.reading import as_path, wrong_argument
from trainer.run.config import Config
from trainer.run.engine import train as train_on_ranks
from trainer.run.folder import RunSummary

AnyModel = str | Path | EmbeddingModel
AnyDataset = str | Path | Dataset


def train(config: Config) -> RunSummary:
    """Train as configured, in this process (or as one rank, where a launcher set RANK and WORLD_SIZE). An interrupted
    run continues from its newest checkpoint.

    Raises:
        LceError: the input is wrong (nothing was written then), checkpoints are damaged, or the loss diverges.
    """
    if not isinstance(config, Config):
        raise wrong_argument("config", config, "a configuration, as trainer.load_config(FILE) gives it")
    with process_group(config.run.device, config.run.timeout_seconds, config.run.threads) as ranks:
        return train_on_ranks(config, ranks)


def embed(model: AnyModel, dataset: AnyDataset, flip: bool = False) -> np.ndarray:
    """The embeddings of all N records of a data set: (N, D) float32 unit rows, in the order of the records.

    Args:
        flip: embed as the sum of the image and its mirror image.

    Raises:
        LceError: a damaged record, images that the model does not take, or embeddings that all but coincide.
    """
    model, dataset = _model(model), _dataset(dataset)
    check_distinct(model, dataset)
    return embed_dataset(model, dataset, flip=flip)


def make_bank(model: AnyModel, dataset: AnyDataset, path: str | Path, **options: Any) -> CenterBank:
    """The old model's centre bank of a data set, for ``compat.bank``.

    Args:
        dataset: the *new* training set, ``DATASET@LABELS.npy`` with its label table.
        options: of :func:`trainer.compat.bank.from_model.bank_from_model`.

    Raises:
        LceError: as that function; ``path`` exists already.
    """
    path = as_path(path, "path", "the folder of the bank to be")
    centers = options.get("centers")
    if not isinstance(centers, CenterBank | None):
        raise wrong_argument("centers", centers, "an open bank, trainer.compat.bank.center_bank.CenterBank(PATH)")
    return bank_from_model(_model(model), _dataset(dataset), path, **options)


def evaluate(
    old: AnyModel,
    new: AnyModel,
    data: Mapping[str, AnyDataset],
    *,
    paragon: AnyModel | None = None,
    fars: Sequence[float] = (1e-4, 1e-3, 1e-2),
    seen: Sequence[str] = (),
    unseen: Sequence[str] = (),
    report: str | Path | None = None,
) -> dict[str, Any]:
    """May the new model query the old one's gallery?

    Args:
        data: name → labelled images of identities that neither model was trained on.
        paragon: the new model trained without compatibility: gives update gain and cost.
        fars: false accept rates of interest.
        seen: names of sets whose identities may have been trained on; they do not make SAFE.
        unseen: names of sets of other people whose names happen to be those of training identities.
        report: an .html file to write.

    Returns:
        What ``lce evaluate --json`` writes: ``["verdict"]["answer"]`` is SAFE, NOT SAFE or NOT ENOUGH DATA.

    Raises:
        LceError: models that cannot be compared, or sets without pairs.
    """
    if not isinstance(data, Mapping):
        raise wrong_argument("data", data, "names and data sets, such as {'mine': 'packed@splits/unseen.npy'}")
    if not data:
        raise ConfigError("`data` is empty")
    stray = next((name for name in data if not isinstance(name, str)), None)
    if stray is not None:
        raise wrong_argument("data", data, f"texts as names of the sets, not {stray!r}")
    rates = _listed("fars", fars, float | int, "false accept rates such as [1e-3, 1e-2]")
    seen = _listed("seen", seen, str, "names of sets, such as ['mine']")
    unseen = _listed("unseen", unseen, str, "names of sets, such as ['mine']")
    if report is not None:
        report = as_path(report, "report", "the path of an .html file")
    declared = declarations(data, seen, unseen)
    models = {"old": _model(old), "new": _model(new)} | ({} if paragon is None else {"paragon": _model(paragon)})
    cache = EmbeddingCache(default_cache())
    with process_group("cpu") as ranks:
        sets = [
            embed_set(name, models, _dataset(dataset), cache, ranks, declared=declared.get(name))
            for name, dataset in data.items()
        ]
    result = measure_sets(sets, Options(fars=tuple(map(float, rates))))
    result["models"] = {role: {"path": str(model.path), "hash": model.hash} for role, model in models.items()}
    result |= {"settings": {}, "provenance": provenance(), "pair_sets": {}, "template_sets": {}}
    if report is not None:
        from trainer.evaluation.report import write_report  # matplotlib, which training does not need

        write_report(report, result)
    return result


def export_onnx(model: AnyModel, path: str | Path, dataset: AnyDataset, images: int = 16, **options: Any) -> Parity:
    """Write a model as ONNX and compare it with torch on ``images`` images of a data set.

    Args:
        options: of :func:`trainer.models.onnx_export.export_onnx`.

    Raises:
        ModelError: the difference is too large (then there is no file), or the model is no torch model.
    """
    path = as_path(path, "path", "the path of the .onnx file to be")
    if not isinstance(images, int) or isinstance(images, bool):
        raise wrong_argument("images", images, "how many images of the data set are compared, such as 16")
    model, dataset = _model(model), _dataset(dataset)
    if not isinstance(model, TorchModel):
        raise ModelError(f"{model.path}: is not a torch model, so it cannot be written as ONNX")
    return write_onnx(model, path, pick_images(model.card, dataset, images), **options)


def upgrade_gallery(gallery: str | Path, model: AnyModel, images: AnyDataset | None = None) -> files.State:
    """Convert a gallery file to the new model's space and swap the result in; the old one is kept until
    :func:`trainer.gallery.files.finish`.

    Args:
        gallery: .npy, .safetensors, a FAISS index, … (docs/gallery-upgrade.md).
        images: the images of the gallery's rows, to embed anew; None: the model's map T₁₂ converts the stored vectors.

    Raises:
        LceError: as :func:`trainer.gallery.files.upgrade`.
    """
    path = as_path(gallery, "gallery", "the path of a gallery file")
    model = _model(model)
    state = files.status(path)
    dim = open_gallery(path).dim if state is None else state.dim_in
    return files.upgrade(path, Forward(model) if images is None else Reencode(model, _dataset(images), dim))


def _model(model: AnyModel) -> EmbeddingModel:
    if isinstance(model, EmbeddingModel):
        return model
    return load_model(as_path(model, "model", "the path of a model, or what trainer.load_model gives"))


def _dataset(dataset: AnyDataset) -> Dataset:
    if isinstance(dataset, Dataset):
        return dataset
    return open_named(as_path(dataset, "dataset", "the path of a data set, or what trainer.open_dataset gives"))


def _listed(argument: str, values: object, kind: Any, expected: str) -> tuple[Any, ...]:
    """The values of a list. Raises :class:`ConfigError`: a single value, a text, or values of another type."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise wrong_argument(argument, values, expected)
    out = tuple(values)
    if not all(isinstance(value, kind) and not isinstance(value, bool) for value in out):
        raise wrong_argument(argument, values, expected)
    return out
