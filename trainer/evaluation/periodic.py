"""Evaluation while training: verification sets measured every so many updates, the work shared by all ranks.

The network as it is (its moving average, where one is kept) is copied, every rank embeds its share of each set's
images, and each set is scored on one rank. Figures are named ``SET.metric``: ``accuracy`` (10-fold, of a .bin) or
``tar`` (of all pairs of a labelled set, at ``evaluate.far``); with ``evaluate.old`` also ``accuracy_to_old`` and
``tar_to_old``, the new model's queries against the old model's gallery.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from trainer.data import Dataset, open_named
from trainer.data.index import same_records
from trainer.distributed import Ranks, gather_objects
from trainer.errors import ConfigError, DataError, LceError, named
from trainer.evaluation.arrays import FloatArray, IntArray
from trainer.evaluation.compatibility import Spaces
from trainer.evaluation.config import EvaluateConfig
from trainer.evaluation.pairs import PairSet, pair_cosines, read_bin
from trainer.evaluation.verification import FOLDS, fold_accuracy, score_pairs
from trainer.models.model import EmbeddingModel, embed_dataset, introduce
from trainer.models.open import load_model

log = logging.getLogger(__name__)


class PeriodicEvaluation:
    """The sets of a run's ``evaluate`` section, opened and checked.

    Args:
        config: the section.
        image_size: (H, W) that the network takes.
        ranks: who we are.
        trained: the training set; a set that shows its images is said to.
        shown: log that, and how a foreign old model is read.

    Raises:
        LceError: a set or the old model is missing, damaged, or of another image size.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        image_size: tuple[int, int],
        ranks: Ranks,
        trained: Dataset | None = None,
        shown: bool = True,
    ) -> None:
        self.config, self.ranks = config, ranks
        with named(evaluate__old=config.old):
            self.old = None if config.old is None else load_model(config.old, ranks.device)
        self.pairs: dict[str, PairSet] = {}
        self.records: dict[str, IntArray] = {}
        self.datasets: dict[str, Dataset] = {}
        for name, path in config.sets.items():
            with named(**{f"evaluate.sets.{name}": path}):
                self._open(name, path, image_size)
            if self.old is not None:
                introduce(self.old, self.datasets[name], shown)
            if trained is None or not shown:
                continue
            if known := trained_images(self.datasets[name], self.records[name], trained):
                log.warning(
                    "evaluate.sets.%s = %s: %s of its %s images are trained on; it says little about other people",
                    *(name, path, f"{known:,}", f"{len(self.records[name]):,}"),
                )
        self._old: dict[str, FloatArray] = {}

    def _open(self, name: str, path: Path, image_size: tuple[int, int]) -> None:
        if path.suffix == ".bin":
            self.pairs[name] = read_bin(path, image_size)
            self.datasets[name] = self.pairs[name].dataset
            self.records[name] = np.arange(len(self.datasets[name]))
            genuine = self.pairs[name].genuine
            if len(genuine) < FOLDS:
                raise DataError(f"evaluate.sets.{name} = {path}: {len(genuine)} pairs are too few for {FOLDS} folds")
            return
        dataset = open_named(path)
        if tuple(dataset.info.image_size) != tuple(image_size):
            raise DataError(f"evaluate.sets.{name} = {path}: images of {dataset.info.image_size}, not {image_size}")
        self.datasets[name] = dataset
        self.records[name] = some_identities(dataset, self.config.max_images)
        identities = len(np.unique(dataset.labels[self.records[name]]))
        if identities < 2:
            raise DataError(f"evaluate.sets.{name} = {path}: only one identity; there are no impostors")
        if identities == len(self.records[name]):
            raise DataError(f"evaluate.sets.{name} = {path}: no identity with two images; there is nothing to find")

    def measure(self, model: EmbeddingModel, beat: Callable[[], None]) -> dict[str, float]:
        """All figures of ``model``, on every rank. Collective.

        Args:
            beat: called again and again, to say that the rank is alive.
        """
        mine: dict[str, float] = {}
        problem: LceError | None = None
        for number, name in enumerate(self.datasets):
            spaces = self._embed(name, model, beat)
            if number % self.ranks.world_size != self.ranks.rank:
                continue
            for gallery in spaces.native:
                view = spaces.view("new", gallery)
                if view is None:
                    problem = ConfigError("evaluate.old: of another dimension, and this run trains no map between them")
                    break
                mine[self._key(name, gallery)] = self._figure(name, view[0], view[1])
            beat()
        everyone = gather_objects((mine, problem))
        for figures, wrong in everyone:
            if wrong is not None:
                raise wrong
            mine = mine | figures
        return {key: mine[key] for key in sorted(mine)}

    def _embed(self, name: str, model: EmbeddingModel, beat: Callable[[], None]) -> Spaces:
        def embedded(by: EmbeddingModel) -> FloatArray:
            dataset, records = self.datasets[name], self.records[name]
            return embed_dataset(by, dataset, records, ranks=self.ranks, progress=lambda done, total: beat())

        native = {"new": embedded(model)}
        if self.old is None:
            return Spaces(native)
        if name not in self._old:
            self._old[name] = embedded(self.old)
        native["old"] = self._old[name]
        mapped: dict[tuple[str, str], FloatArray] = {}
        if "t21" in model.card.transforms:
            mapped["new", "old"] = model.transform("t21", native["new"])
        if "t12" in model.card.transforms:
            mapped["old", "new"] = model.transform("t12", native["old"])
        return Spaces(native, mapped)

    def _key(self, name: str, gallery: str) -> str:
        metric = "accuracy" if name in self.pairs else "tar"
        return f"{name}.{metric}" + ("_to_old" if gallery == "old" else "")

    def _figure(self, name: str, queries: FloatArray, gallery: FloatArray | None) -> float:
        if name in self.pairs:
            pairs = self.pairs[name]
            cosines = pair_cosines(queries, queries if gallery is None else gallery, pairs.first, pairs.second)
            return fold_accuracy(cosines, pairs.genuine)[0]
        labels = np.asarray(self.datasets[name].labels[self.records[name]])
        return score_pairs(queries, labels, gallery, keep_far=0.0, keep=1).tar_at(self.config.far)


def some_identities(dataset: Dataset, limit: int) -> IntArray:
    """The labelled records, or about ``limit`` of them: all images of identities, drawn alike in every run."""
    records = np.asarray(dataset.kept)
    if len(records) <= limit:
        return records
    labels = np.asarray(dataset.labels[records])
    identities, sizes = np.unique(labels, return_counts=True)
    order = np.random.default_rng(0).permutation(len(identities))
    taken = order[: max(2, int(np.searchsorted(np.cumsum(sizes[order]), limit, side="right")))]
    return records[np.isin(labels, identities[taken])]


def trained_images(dataset: Dataset, records: IntArray, trained: Dataset) -> int:
    """How many of a set's ``records`` are records of the training set that have a class there."""
    if len(dataset.store) != len(trained.store):
        return 0
    if dataset.path.resolve() != trained.path.resolve() and not same_records(
        dataset.records_fingerprint, trained.records_fingerprint
    ):
        return 0
    return int((np.asarray(trained.labels[records]) >= 0).sum())


def open_periodic(
    config: EvaluateConfig,
    image_size: tuple[int, int],
    ranks: Ranks,
    trained: Dataset | None = None,
    shown: bool = True,
) -> PeriodicEvaluation | None:
    """The evaluation that a run asks for, if any; arguments and errors are those of :class:`PeriodicEvaluation`."""
    wanted = config.every_steps and config.sets
    return PeriodicEvaluation(config, image_size, ranks, trained, shown) if wanted else None
