"""Where logged figures go besides ``log.jsonl``: TensorBoard, Weights & Biases, MLflow, and what other packages bring.

``log.monitors: {mlflow: {experiment: faces}}`` is known as it is. Another package registers a writer in its metadata,
and a run names it with its settings::

    [project.entry-points."lce_trainer.monitors"]
    mine = "package.module:MyWriter"

    log: {monitors: {mine: {address: "host:9000"}}}

It is called as ``MyWriter(folder, start, **settings)`` on rank 0: the run folder, which holds the resolved
``config.yaml``, and the step that the run continues from. Figures are named by group, such as ``train/loss``
(:func:`trainer.run.monitor.grouped`). A writer that also has ``histogram``, ``images`` or ``embeddings`` (see
:class:`TensorBoardWriter`) is given those as well; ``ended`` (see :class:`MlflowWriter`) hears, before ``close``, how
the run has ended. A writer that fails while training is dropped and named.

Weights & Biases and MLflow know a run by a random number in the run folder (:data:`IDENTITY`): a run that starts at
step 0 is a new one there, one that continues from a checkpoint goes on in the same one. Steps that the killed process
had logged after that checkpoint are there already, and are not logged twice.
"""

import importlib.util
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import yaml
from numpy.typing import NDArray

from trainer.errors import ConfigError
from trainer.files import write_text
from trainer.reading import read_text, read_yaml
from trainer.run.config import LogConfig
from trainer.run.folder import flat

GROUP = "lce_trainer.monitors"
IDENTITY = "monitors.id"
"""The file of the run folder with the number by which trackers of experiments know the run."""
Ending = Literal["finished", "stopped", "failed"]
"""How a run has ended: stopped by a signal; failed: diverged or met an error."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Of a distribution, for a writer that draws curves alone."""


class Writer(Protocol):
    """Takes the figures of logged steps."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The figures of one logged step."""

    def close(self) -> None:
        """The training has ended or failed."""


class TensorBoardWriter:
    """Scalars, distributions and pictures for TensorBoard in ``<run>/tensorboard``, with the run's configuration as
    text and, when it ends, as hyperparameters next to its last figures."""

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        text = (folder / "config.yaml").read_text()
        self._settings, self._last = flat(yaml.safe_load(text)), dict[str, float]()
        self._board.add_text("configuration", "".join(f"    {line}\n" for line in text.splitlines()), start)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Writer`."""
        self._last.update(values)
        for key, value in values.items():
            self._board.add_scalar(key, value, step)

    def histogram(self, name: str, step: int, values: NDArray[Any]) -> None:
        """The distribution of (n,) values at a logged step."""
        self._board.add_histogram(name, values, step)

    def images(self, name: str, step: int, images: NDArray[Any]) -> None:
        """(n, H, W, 3) uint8 RGB."""
        self._board.add_images(name, images, step, dataformats="NHWC")

    def embeddings(self, step: int, vectors: NDArray[Any], names: Sequence[str]) -> None:
        """(n, D) unit embeddings for the projector, with the identity's name of each."""
        self._board.add_embedding(vectors, metadata=list(names), global_step=step)

    def close(self) -> None:
        """See :class:`Writer`."""
        from torch.utils.tensorboard.summary import hparams

        kinds = (bool, int, float, str)
        known = {key: value if isinstance(value, kinds) else repr(value) for key, value in self._settings.items()}
        writer: Any = self._board._get_file_writer()
        for summary in hparams(known, dict(self._last)):
            writer.add_summary(summary)
        self._board.close()


class WandbWriter:
    """A run of Weights & Biases, named after the run folder; a continued run goes on in the same one.

    One that was stopped or failed is marked as failed there, by the exit status.
    """

    def __init__(self, folder: Path, start: int, project: str) -> None:
        import wandb

        settings = read_yaml(folder / "config.yaml", ConfigError)
        identity = run_identity(folder)
        self._run: Any = wandb.init(
            project=project, name=folder.name, id=identity, resume="allow", dir=str(folder), config=settings
        )
        self._status = _STATUS["failed"]
        self._there = self._run.step - 1 if self._run.resumed else -1
        _say_what_is_there("log.wandb", self._there, start)

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if step > self._there:
            self._run.log(values, step=step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Writer`."""
        self._log(step, dict(values))

    def histogram(self, name: str, step: int, values: NDArray[Any]) -> None:
        """See :class:`TensorBoardWriter`."""
        import wandb

        self._log(step, {name: wandb.Histogram(values)})

    def images(self, name: str, step: int, images: NDArray[Any]) -> None:
        """See :class:`TensorBoardWriter`."""
        import wandb

        self._log(step, {name: [wandb.Image(image) for image in images]})

    def embeddings(self, step: int, vectors: NDArray[Any], names: Sequence[str]) -> None:
        """A table, which the page of the run shows as a projection; see :class:`TensorBoardWriter`."""
        import wandb

        columns = ["identity", *(f"d{number}" for number in range(vectors.shape[1]))]
        rows = [[name, *vector.tolist()] for name, vector in zip(names, vectors, strict=True)]
        self._log(step, {"embeddings": wandb.Table(columns=columns, data=rows)})

    def close(self) -> None:
        """See :class:`Writer`."""
        self._run.finish(exit_code=self._status)

    def ended(self, how: Ending) -> None:
        """See :class:`MlflowWriter`."""
        self._status = _STATUS[how]


_STATUS: dict[Ending, int] = {"finished": 0, "stopped": 75, "failed": 70}
_MLFLOW: dict[Ending, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_TAG = "lce_run"
_REFUSED = re.compile(r"[^\w\-. /]", re.ASCII)
"""Characters that MLflow does not take in the name of a metric or parameter (releases differ in colons)."""
_LONGEST, _AT_ONCE = 500, 100
"""Characters of a parameter's value, and parameters of one call, that every release of MLflow takes."""


class MlflowWriter:
    """A run of MLflow, named after the run folder; a continued run goes on in the same one.

    Distributions become metrics of their quantiles; pictures and embeddings (for the projector of TensorBoard, two
    tables) become artifacts.

    Args:
        experiment: its name; made where it is not there.
        uri: of the tracking server or store; None: MLflow's own setting.
    """

    def __init__(self, folder: Path, start: int, experiment: str, uri: str | None = None) -> None:
        import mlflow

        identity = run_identity(folder)
        self._client: Any = mlflow.MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(experiment)
        number = self._client.create_experiment(experiment) if found is None else found.experiment_id
        runs = self._client.search_runs([number], f"tags.{_TAG} = '{identity}'")
        self._ending: Ending = "failed"
        self._there = -1
        if runs:
            self._run: str = runs[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            history = self._client.get_metric_history(self._run, "train/loss")
            self._there = max((metric.step for metric in history), default=-1)
            _say_what_is_there("log.monitors.mlflow", self._there, start)
        else:
            self._run = self._client.create_run(number, run_name=folder.name).info.run_id
            self._describe(flat(read_yaml(folder / "config.yaml", ConfigError)))
            self._client.set_tag(self._run, _TAG, identity)  # last: a run without its parameters is not continued
        self._client.log_artifact(self._run, str(folder / "config.yaml"))

    def _describe(self, settings: Mapping[str, Any]) -> None:
        """Keep the settings as parameters, long values cut."""
        from mlflow.entities import Param

        texts = {_REFUSED.sub("_", key): str(value) for key, value in settings.items()}
        params = [Param(k, v if len(v) <= _LONGEST else f"{v[: _LONGEST - 1]}…") for k, v in texts.items()]
        for start in range(0, len(params), _AT_ONCE):
            self._client.log_batch(self._run, params=params[start : start + _AT_ONCE])

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Writer`; characters of names that MLflow refuses become ``_``."""
        from mlflow.entities import Metric

        if step <= self._there:
            return
        now = int(time.time() * 1000)
        metrics = [Metric(_REFUSED.sub("_", key), value, now, step) for key, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def histogram(self, name: str, step: int, values: NDArray[Any]) -> None:
        """See :class:`TensorBoardWriter`: :data:`QUANTILES` as ``NAME.q05`` and so on."""
        found = np.quantile(values, QUANTILES).tolist()
        self.write(step, {f"{name}.q{round(100 * q):02d}": value for q, value in zip(QUANTILES, found, strict=True)})

    def images(self, name: str, step: int, images: NDArray[Any]) -> None:
        """See :class:`TensorBoardWriter`."""
        for number, image in enumerate(images):
            self._client.log_image(self._run, image, f"{name}/step-{step:08d}-{number:02d}.png")

    def embeddings(self, step: int, vectors: NDArray[Any], names: Sequence[str]) -> None:
        """See :class:`TensorBoardWriter`."""
        rows = "".join("\t".join(f"{x:.6g}" for x in vector) + "\n" for vector in vectors.tolist())
        self._client.log_text(self._run, rows, f"embeddings/step-{step:08d}/vectors.tsv")
        text = "".join(f"{name}\n" for name in names)
        self._client.log_text(self._run, text, f"embeddings/step-{step:08d}/names.tsv")

    def close(self) -> None:
        """See :class:`Writer`."""
        self._client.set_terminated(self._run, _MLFLOW[self._ending])

    def ended(self, how: Ending) -> None:
        """How the run has ended; called before :meth:`close`. Without it the run has failed."""
        self._ending = how


def run_identity(folder: Path) -> str:
    """The number of a run in :data:`IDENTITY`; made where there is none.

    Raises:
        ConfigError: the file holds something else.
    """
    file = folder / IDENTITY
    if not file.exists():
        write_text(file, f"{uuid.uuid4().hex}\n")
    identity = read_text(file, ConfigError).strip()
    if not re.fullmatch("[0-9a-f]{32}", identity):
        raise ConfigError(f"{file}: is no number of a run; remove it, and the run begins a new one where it is logged")
    return identity


def _say_what_is_there(name: str, last: int, start: int) -> None:
    if last > start:
        print(f"{name}: has the steps {start + 1} to {last} already; they are not logged again", file=sys.stderr)


OWN = {"mlflow": MlflowWriter}
"""What ``log.monitors`` may name without another package; an installed one of that name comes first."""


def check_writers(config: LogConfig) -> None:
    """Raise :class:`ConfigError` for a writer that is not installed or cannot be imported."""
    if config.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(f"log.wandb = {config.wandb}: wandb is not installed; pip install wandb, or remove log.wandb")
    for name in config.monitors:
        _factory(name)


def _factory(name: str) -> Callable[..., Writer]:
    found: dict[str, EntryPoint] = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in found:
        if name in OWN and importlib.util.find_spec(name) is None:
            raise ConfigError(f"log.monitors.{name}: {name} is not installed; pip install {name}, or remove it")
        if name in OWN:
            return OWN[name]
        known = ", ".join(sorted({*found, *OWN}))
        raise ConfigError(f"log.monitors.{name}: no installed package brings it (group {GROUP}; known: {known})")
    try:
        factory: Callable[..., Writer] = found[name].load()
    except Exception as error:
        raise ConfigError(f"log.monitors.{name}: {found[name].value} cannot be imported: {error}") from None
    return factory


def open_writers(config: LogConfig, folder: Path, start: int) -> Iterator[tuple[str, Writer]]:
    """(name, writer) of every writer that the configuration asks for. Raises :class:`ConfigError` where one refuses."""
    wanted: dict[str, Callable[[], Writer]] = {}
    if config.tensorboard:
        wanted["tensorboard"] = lambda: TensorBoardWriter(folder, start)
    if config.wandb is not None:
        project = config.wandb
        wanted["wandb"] = lambda: WandbWriter(folder, start, project)
    for name, settings in config.monitors.items():
        wanted[name] = lambda name=name, settings=settings: _factory(name)(folder, start, **settings)  # type: ignore[misc]
    if start == 0:
        (folder / IDENTITY).unlink(missing_ok=True)
    for name, make in wanted.items():
        try:
            yield name, make()
        except Exception as error:
            raise ConfigError(f"log: {name} cannot be started: {error}") from None
