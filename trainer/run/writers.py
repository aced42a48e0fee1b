"""Where logged figures go besides ``log.jsonl``: TensorBoard, Weights & Biases, MLflow, and what other packages bring.

``log.monitors: {mlflow: {experiment: faces}}`` is known as it is. Another package registers a writer in its metadata,
and a run names it with its settings::

    [project.entry-points."lce_trainer.monitors"]
    mine = "package.module:MyWriter"

    log: {monitors: {mine: {address: "host:9000"}}}

It is called as ``MyWriter(folder, start, **settings)`` on rank 0: the run folder, which holds the resolved
``config.yaml``, and the step that the run continues from. Figures are named by group, such as ``train/loss``
(:func:`trainer.run.monitor.grouped`). A writer that also has ``histogram``, ``images`` or ``embeddings`` (see
:class:`TensorBoardWriter`) is given those as well. A writer that fails while training is dropped and named.
"""

import hashlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml
from numpy.typing import NDArray

from trainer.errors import ConfigError
from trainer.reading import read_yaml
from trainer.run.config import LogConfig
from trainer.run.folder import flat

GROUP = "lce_trainer.monitors"
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
    """A run of Weights & Biases, named after the run folder; a continued run goes on in the same one."""

    def __init__(self, folder: Path, start: int, project: str) -> None:
        import wandb

        settings = read_yaml(folder / "config.yaml", ConfigError)
        identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        self._run: Any = wandb.init(
            project=project, name=folder.name, id=identity, resume="allow", dir=str(folder), config=settings
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Writer`."""
        self._run.log(dict(values), step=step)

    def histogram(self, name: str, step: int, values: NDArray[Any]) -> None:
        """See :class:`TensorBoardWriter`."""
        import wandb

        self._run.log({name: wandb.Histogram(values)}, step=step)

    def images(self, name: str, step: int, images: NDArray[Any]) -> None:
        """See :class:`TensorBoardWriter`."""
        import wandb

        self._run.log({name: [wandb.Image(image) for image in images]}, step=step)

    def embeddings(self, step: int, vectors: NDArray[Any], names: Sequence[str]) -> None:
        """A table, which the page of the run shows as a projection; see :class:`TensorBoardWriter`."""
        import wandb

        columns = ["identity", *(f"d{number}" for number in range(vectors.shape[1]))]
        rows = [[name, *vector.tolist()] for name, vector in zip(names, vectors, strict=True)]
        self._run.log({"embeddings": wandb.Table(columns=columns, data=rows)}, step=step)

    def close(self) -> None:
        """See :class:`Writer`."""
        self._run.finish()


class MlflowWriter:
    """A run of MLflow, named after the run folder; a continued run goes on in the same one.

    Distributions become metrics of their quantiles; pictures and embeddings (for the projector of TensorBoard, two
    tables) become artifacts.

    Args:
        experiment: its name; made where it is not there.
        uri: of the tracking server or store; None: MLflow's own setting.
    """

    def __init__(self, folder: Path, start: int, experiment: str, uri: str | None = None) -> None:
        del start
        import mlflow

        self._client: Any = mlflow.MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(experiment)
        number = self._client.create_experiment(experiment) if found is None else found.experiment_id
        identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        runs = self._client.search_runs([number], f"tags.lce_run_folder = '{identity}'")
        if runs:
            self._run: str = runs[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
        else:
            made = self._client.create_run(number, tags={"lce_run_folder": identity}, run_name=folder.name)
            self._run = made.info.run_id
            for key, value in flat(read_yaml(folder / "config.yaml", ConfigError)).items():
                self._client.log_param(self._run, key, value)
        self._client.log_artifact(self._run, str(folder / "config.yaml"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Writer`."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run, metrics=[Metric(key, value, now, step) for key, value in values.items()])

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
        self._client.set_terminated(self._run)


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
    for name, make in wanted.items():
        try:
            yield name, make()
        except Exception as error:
            raise ConfigError(f"log: {name} cannot be started: {error}") from None
