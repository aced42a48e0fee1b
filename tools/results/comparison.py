"""The compared training runs: for each seed pictures, an old model and its centres, new models, and their figures.

Every piece is made once and kept in a folder with a stamp (:class:`tools.steps.Steps`), so that a killed
benchmark continues where it was. Training runs are processes of the real trainer, one thread each, several at a time.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tools.steps import CONFIGS, CROSS_MODEL, Steps, end_group, without_network
from trainer.errors import ConfigError, LceError
from trainer.files import checksum

if TYPE_CHECKING:
    from trainer.evaluation.results import NamedSet
    from trainer.run.config import Config

T = TypeVar("T")

FAR = 1e-4
QUIET = ("run.threads=1", "data.workers=1", "log.progress=false", "log.tensorboard=false")
SETS = ("old", "train", "validation", "unseen")
OLD_LABELS = Path("splits", "extended-class", "old.npy")
TIMED_ROUNDS, TIMED_STEPS = 5, 100


class TrainingFailed(LceError):
    """A training of the benchmark ended with an error; the text is its last line."""


@dataclass(frozen=True)
class Source:
    """Pictures to train and judge on, made for every seed or there.

    Attributes:
        write: lays them out as ``folder/SET/CLASS/*.png`` for each of :data:`SETS`, from (folder, seed, classes of the
            new model, classes of the old model).
        config: the recipes are ``configs/CONFIG-old.yaml`` and ``configs/CONFIG-paragon.yaml``.
        folder: instead of ``write``: data sets ``train``, ``validation`` and ``unseen``, the same for every seed, and
            the old model's labels in :data:`OLD_LABELS`, as `lce characters` writes them.
    """

    write: Callable[[Path, int, int, int], None] | None
    config: str
    folder: Path | None = None

    def counts(self) -> tuple[int, int]:
        """Classes of the new and of the old model in ``folder``. Raises :class:`ConfigError`: not such a folder, or one
        whose summary cannot be read."""
        import numpy as np

        from trainer.data import open_dataset

        assert self.folder is not None
        self.typefaces()
        labels = self.folder / OLD_LABELS
        if not labels.is_file():
            raise ConfigError(f"--data {self.folder}: {OLD_LABELS} is missing; lce characters makes such a folder")
        for name in SETS[2:]:
            open_dataset(self.folder / name)
        known = np.unique(np.load(labels, mmap_mode="r", allow_pickle=False))
        return open_dataset(self.folder / "train").num_classes, int((known >= 0).sum())

    def typefaces(self) -> list[str]:
        """What the training pictures of ``folder`` were drawn in, as `lce characters` wrote it down; else empty."""
        from tools.pictures.building import SUMMARY

        summary = self.folder / SUMMARY if self.folder else None
        if summary is None or not summary.is_file():
            return []
        try:
            return [one["name"] for one in json.loads(summary.read_text())["typefaces"] if not one["held"]]
        except (ValueError, TypeError, KeyError):
            raise ConfigError(f"{summary}: not what lce characters writes; make the folder again") from None


def _characters(folder: Path, seed: int, classes: int, old_classes: int) -> None:
    from tools.pictures.sources import Split, write_characters
    from trainer import files

    write_characters(folder, seed, files.cache_folder(), Split(train=classes, old=old_classes, seen=min(classes, 5)))


SOURCES = {"characters": Source(_characters, "demo-characters")}


def source_of(text: str) -> Source:
    """What ``--data`` names: one of :data:`SOURCES`, or a folder. Raises :class:`ConfigError`: neither."""
    if text in SOURCES:
        return SOURCES[text]
    if not Path(text).is_dir():
        raise ConfigError(f"--data {text}: neither {', '.join(SOURCES)} nor a folder made by lce characters")
    return Source(None, "demo-characters", Path(text).absolute())


class Children:
    """The processes that are running, so that an interruption can end them all."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, command: Sequence[str], log: Path) -> int:
        """Run a command with one thread, its output to ``log``; returns its exit status (130 after :meth:`end`)."""
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with log.open("wb") as stream:
            with self._lock:
                if self._stopped:
                    return 130
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
                self._running.add(child)
            status = child.wait()
        with self._lock:
            self._running.discard(child)
        return status

    def end(self) -> None:
        """End what runs and start nothing more."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        for child in running:
            end_group(child)


@dataclass
class Comparison:
    """All pieces of one benchmark; the methods that make one may be called from several threads, one piece a thread.

    Attributes:
        out: folder of everything. source: see there.
        classes, old_classes: training identities of the new model and, among them, of the old one.
        steps, old_steps: updates of every new model and of the old one.
        settings: further overrides of all training runs (``backbone.width=4``).
        parallel: training runs at a time.
    """

    out: Path
    source: Source
    classes: int
    old_classes: int
    steps: int
    old_steps: int
    settings: tuple[str, ...] = ()
    parallel: int = 2
    children: Children = field(default_factory=Children)

    def check(self) -> None:
        """Refuse what would fail only after a while. Raises :class:`ConfigError`."""
        from trainer.run.config import load_config

        if min(self.classes, self.old_classes, self.steps, self.old_steps, self.parallel) < 1:
            raise ConfigError("classes, steps and parallel runs: each at least 1")
        if self.old_classes > self.classes:
            raise ConfigError(f"{self.old_classes} classes of the old model: more than the new model's {self.classes}")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {self.out}: cannot be written: {error.strerror}") from None
        for name in ("old", "paragon"):
            load_config(CONFIGS / f"{self.source.config}-{name}.yaml", self.settings)

    def each(self, action: Callable[[T], Any], items: Iterable[T]) -> dict[T, LceError | None]:
        """``action`` for every item, ``parallel`` at a time; the problem of each that had one.

        An interruption ends the training runs in progress first.
        """
        problems: dict[T, LceError | None] = {}
        with ThreadPoolExecutor(self.parallel) as pool:
            waiting = {pool.submit(action, item): item for item in items}
            try:
                for future in as_completed(waiting):
                    problem = future.exception()
                    if problem is not None and not isinstance(problem, LceError):
                        raise problem
                    problems[waiting[future]] = problem
            except BaseException:
                self.children.end()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return problems

    def folder(self, seed: int) -> Path:
        """Where a seed's pieces are."""
        return self.out / f"seed-{seed}"

    def dataset(self, seed: int, part: str) -> Path:
        """Where one of a seed's data sets is."""
        return (self.source.folder or self.folder(seed) / "data") / part

    def typefaces(self, seed: int) -> Path:
        """Where it stands in which typeface each record of a seed's training set is drawn, (N,) int64."""
        return (
            self.source.folder / "train" / "typefaces.npy"
            if self.source.folder
            else self.folder(seed) / "typefaces.npy"
        )

    def pictures(self, seed: int) -> None:
        """Make the data sets of a seed, unless they are there for all."""
        folder, write = self.folder(seed), self.source.write
        folder.mkdir(parents=True, exist_ok=True)
        if write is None:
            return

        def action() -> None:
            import numpy as np

            from trainer.data.listing import list_source
            from trainer.data.packing import PackOptions, pack, packed_order
            from trainer.files import write_array

            with tempfile.TemporaryDirectory(prefix="pictures-", dir=folder) as temporary:
                write(Path(temporary), seed, self.classes, self.old_classes)
                for name in SETS:
                    listing = list_source(Path(temporary) / name)
                    pack(listing, self.dataset(seed, name), PackOptions())
                    if name == "train":
                        order = packed_order(listing, PackOptions())
                        write_array(self.typefaces(seed), np.array([int(Path(listing.files[k]).stem) for k in order]))

        sets = [*(self.dataset(seed, name) for name in SETS), self.typefaces(seed)]
        Steps(folder / "stamps" / "pictures", _silent).run("pictures", "", self._pictures_key(seed), sets, action)

    def _pictures_key(self, seed: int) -> list[str]:
        if self.source.folder:
            from trainer.data import open_dataset

            return [open_dataset(self.source.folder / "train").fingerprint]
        return [self.source.config, str(seed), str(self.classes), str(self.old_classes)]

    def train(self, seed: int, name: str, recipe: str, overrides: Sequence[str], old_model: str | None = None) -> Path:
        """Train a model in ``seed-N/NAME``, or find that it is there.

        Args:
            recipe: ``old``, ``paragon`` or ``cross-model``. overrides: of it, after those that every run here has.
            old_model: the training whose centres or embeddings the overrides name; with another one it is trained anew,
                as with other content of a label table or centre bank that the overrides name.

        Raises:
            TrainingFailed: the trainer ended with an error.
        """
        from trainer.run.config import dump_config, load_config

        run = self.folder(seed) / name
        config, settings = self._recipe(seed, recipe, run)
        settings += overrides
        loaded = load_config(config, settings)
        key = [dump_config(loaded).replace(str(self.out), "lab"), *self._pictures_key(seed), *_contents(loaded)]
        if old_model is not None:
            key.append(self._hash(self.folder(seed) / old_model))

        def action() -> None:
            self._run(seed, name, config, settings)

        Steps(self.folder(seed) / "stamps" / name, _silent).run("train", "", key, [run], action, continues=True)
        return run

    def _recipe(self, seed: int, recipe: str, run: Path) -> tuple[Path, list[str]]:
        """The configuration of a training run in the run folder ``run``, and its overrides."""
        old, known = recipe == "old", self.source.folder
        overrides = [f"data.path={self.dataset(seed, 'old' if old and not known else 'train')}"]
        overrides += [f"data.labels={known / OLD_LABELS}"] if old and known else []
        overrides += [f"run.dir={run}", f"run.seed={seed}"]
        if recipe == "cross-model":  # trains no network, and as long as its recipe says
            return CROSS_MODEL, [*overrides, *QUIET, *without_network(self.settings)]
        overrides.append(f"train.steps={self.old_steps if old else self.steps}")
        return CONFIGS / f"{self.source.config}-{recipe}.yaml", [*overrides, *QUIET, *self.settings]

    def _run(self, seed: int, name: str, config: Path, overrides: Sequence[str]) -> None:
        log = self.folder(seed) / "output" / f"{name}.txt"
        status = self.children.run([sys.executable, "-m", "trainer", str(config), *overrides], log)
        if status:
            where = f"exit status {status}; all of it: {log.relative_to(self.out)} in --out"
            raise TrainingFailed(f"{name}, seed {seed}: {_last_line(log)} ({where})")

    def bank(self, seed: int, old: str, labels: Path | None = None, called: str | None = None) -> tuple[Path, Path]:
        """The old model's centre bank ``OLD-bank`` and embeddings ``OLD.npy`` by record of the training set.

        Args:
            labels: a table of other labels than the set's own. called: instead of ``OLD``.
        """
        folder, called = self.folder(seed), called or old
        bank, embeddings = folder / f"{called}-bank", folder / f"{called}.npy"

        def action() -> None:
            from trainer.compat.bank.from_model import bank_from_model
            from trainer.data import open_dataset
            from trainer.models.open import load_model

            dataset = open_dataset(self.dataset(seed, "train"), labels)
            bank_from_model(load_model(folder / old), dataset, bank, keep_embeddings=embeddings)

        key = [self._hash(folder / old), *([] if labels is None else [str(checksum(labels)[1])])]
        Steps(folder / "stamps" / f"{called}-bank", _silent).run("bank", "", key, [bank, embeddings], action)
        return bank, embeddings

    def measure(self, seed: int, part: str, old: str, new: str, paragon: str | None = None) -> dict[str, Any]:
        """What a new model finds in the old gallery; kept as ``figures/PART/NEW.json``.

        Args:
            part: ``validation`` or ``unseen``. old, new, paragon: names of training runs.

        Returns:
            ``cells``: "query->gallery" → {metric: value}; with a paragon also ``update_gain`` and ``cost`` (metric →
            value, None where not defined), and ``replicates`` of the cells that these are made of (see
            :mod:`tools.results.paired`).
        """
        folder = self.folder(seed)
        names = {"old": old, "new": new} | ({"paragon": paragon} if paragon else {})
        hashes = [self._hash(folder / name) for name in names.values()]
        file = folder / "figures" / part / f"{new}.json"
        if file.is_file():
            known = json.loads(file.read_text())
            whole = paragon is None or "replicates" in known["figures"]  # older ones have none
            if known["models"] == hashes and whole:
                return dict(known["figures"])
        figures = self._figures(seed, part, names)
        file.parent.mkdir(parents=True, exist_ok=True)
        from trainer.files import write_text

        write_text(file, json.dumps({"models": hashes, "figures": figures}, indent=1))
        return figures

    def _figures(self, seed: int, part: str, names: dict[str, str]) -> dict[str, Any]:
        from tools.results.paired import REPLICATES
        from trainer.evaluation.compatibility import gain
        from trainer.evaluation.results import Options, measure_cells, plain

        one, full = self.embedded(seed, part, names), "paragon" in names
        cells = measure_cells(one, Options(fars=(FAR,), replicates=REPLICATES if full else 2), lambda stage: None)
        figures: dict[str, Any] = {"cells": {f"{q}->{g}": cell.value for (q, g), cell in cells.items()}}
        for metric in cells["old", "old"].value:
            found = gain(cells, metric)
            if found is not None:
                figures.setdefault("update_gain", {})[metric] = found.update_gain.value
                figures.setdefault("cost", {})[metric] = found.cost.value
        if full:
            figures["replicates"] = {
                f"{q}->{g}": {metric: values.round(4) for metric, values in cells[q, g].replicates.items()}
                for q, g in (("old", "old"), ("new", "old"), ("paragon", "paragon"))
            }
        return dict(plain(figures))

    def embedded(self, seed: int, part: str, names: dict[str, str]) -> "NamedSet":
        """A seed's set under the models that ``names`` gives for each role."""
        from trainer.data import open_dataset
        from trainer.distributed import Ranks
        from trainer.evaluation.chain import check_links
        from trainer.evaluation.embeddings import EmbeddingCache, embed_set
        from trainer.models.open import load_model

        folder = self.folder(seed)
        models = {role: load_model(folder / name) for role, name in names.items()}
        dataset = open_dataset(self.dataset(seed, part))
        check_links(models)
        return embed_set(part, models, dataset, EmbeddingCache(folder / "embeddings"), Ranks())

    def centre_queries(self, seed: int, part: str, old: str) -> dict[str, float]:
        """What queries at the old model's own centres find in its gallery (see
        :func:`trainer.evaluation.compatibility.centre_queries`): metric → value."""
        from trainer.evaluation.compatibility import centre_queries

        one = self.embedded(seed, part, {"old": old})
        return centre_queries(one.spaces.native["old"], one.labels, (FAR,))

    def update_seconds(
        self, overrides: Mapping[str, Sequence[str]], count: Callable[[], None]
    ) -> dict[str, list[float]]:
        """The time of an update of each way to train the new model of seed 0: short training runs, one at a time and in
        turns, so that what else the machine does meets all of them; a median for each turn.

        Args:
            overrides: by the run's name, as :meth:`train` takes them. count: called after each run, of which there
                are :data:`TIMED_ROUNDS` of each.

        Raises:
            TrainingFailed: the trainer ended with an error.
        """
        found: dict[str, list[float]] = {name: [] for name in overrides}
        for _ in range(TIMED_ROUNDS):
            for name, own in overrides.items():
                with tempfile.TemporaryDirectory(prefix="timed-", dir=self.folder(0)) as folder:
                    config, common = self._recipe(0, "paragon", Path(folder, name))
                    self._run(0, f"timed-{name}", config, [*common, *own, f"train.steps={TIMED_STEPS}"])
                    lines = Path(folder, name, "log.jsonl").read_text().splitlines()
                later = [json.loads(line)["step_seconds"] for line in lines[2:]]  # without the first 20 updates
                found[name].append(statistics.median(later))
                count()
        return found

    def _hash(self, model: Path) -> str:
        from trainer.models.open import load_model

        return load_model(model).hash


def _contents(config: "Config") -> list[str]:
    """What the files hold that a configuration names by path and that a benchmark may write anew: the checksum of the
    label table and the fingerprint of each centre bank."""
    from trainer.compat.bank.center_bank import CenterBank

    labels: Path | None = getattr(config.data, "labels", None)
    banks = [bank for method in config.methods if (bank := getattr(method, "bank", None)) is not None]
    # What does not exist the trainer names.
    found = [str(checksum(labels)[1])] if labels is not None and labels.is_file() else []
    return found + [CenterBank.open(bank).fingerprint for bank in banks if bank.is_dir()]


def _silent(line: str) -> None:
    """What the steps would say; the benchmark has a progress bar instead."""


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("trainer: ") if lines else "it said nothing"
