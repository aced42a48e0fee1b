"""Where logged figures go beside ``log.jsonl``: TensorBoard, Weights & Biases, and writers that other packages bring.

Another package registers a writer in its metadata, and a run names it with its settings::

    [project.entry-points."lce_trainer.monitors"]
    mine = "package.module:MyWriter"

    log: {monitors: {mine: {address: "host:9000"}}}

It is called as ``MyWriter(folder, start, **settings)`` on rank 0: the run folder, which holds the resolved
``config.yaml``, and the step that the run continues from. A writer that fails while training is dropped and named.
"""

import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol

import yaml

from trainer.config import LogConfig
from trainer.errors import ConfigError

GROUP = "lce_trainer.monitors"


class Writer(Protocol):
    """Takes the figures of logged steps."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The figures of one logged step."""

    def close(self) -> None:
        """The training has ended or failed."""


class TensorBoardWriter:
    """Scalars for TensorBoard in ``<run>/tensorboard``."""

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Writer`."""
        for key, value in values.items():
            self._board.add_scalar(key, value, step)

    def close(self) -> None:
        """See :class:`Writer`."""
        self._board.close()


class WandbWriter:
    """A run of Weights & Biases, named after the run folder; a continued run goes on in the same one."""

    def __init__(self, folder: Path, start: int, project: str) -> None:
        import wandb

        settings = yaml.safe_load((folder / "config.yaml").read_text())
        identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        self._run: Any = wandb.init(
            project=project, name=folder.name, id=identity, resume="allow", dir=str(folder), config=settings
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Writer`."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """See :class:`Writer`."""
        self._run.finish()


def check_writers(config: LogConfig) -> None:
    """Raise :class:`ConfigError` for a writer that is not installed or cannot be imported."""
    if config.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(f"log.wandb = {config.wandb}: wandb is not installed; pip install wandb, or remove log.wandb")
    for name in config.monitors:
        _factory(name)


def _factory(name: str) -> Callable[..., Writer]:
    found: dict[str, EntryPoint] = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in found:
        known = ", ".join(sorted(found)) or "none"
        raise ConfigError(f"log.monitors.{name}: no installed package brings it (group {GROUP}; installed: {known})")
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
