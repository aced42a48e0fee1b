"""What is checked before anything is written: the inputs, the run folder, and that all ranks agree."""

import contextlib
import hashlib
import platform
import socket
import time
import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from trainer import __version__
from trainer.checkpoint_folder import Checkpoint
from trainer.compat.bank.matrices import Rows
from trainer.compat.methods.config import LceCrossConfig
from trainer.compat.methods.cross import open_cross
from trainer.compat.methods.inputs import Inputs, check_old, open_bank, open_old
from trainer.compat.methods.old_embeddings import SAMPLED_ROWS, ModelEmbeddings, OldEmbeddings
from trainer.compat.methods.registry import check_methods
from trainer.data import Dataset, open_dataset
from trainer.data.config import ImagesConfig, SyntheticConfig
from trainer.data.index import outside_allowed
from trainer.distributed import Ranks, agree, gather_objects, on_main
from trainer.errors import CheckpointError, ConfigError, DataError, LceError, check_ranks, named
from trainer.evaluation.periodic import open_periodic
from trainer.files import why_unwritable
from trainer.models.model import introduce
from trainer.networks import build_backbone
from trainer.networks.scale import usual_norm
from trainer.networks.weights import matching_weights
from trainer.run import zero
from trainer.run.arcface_start import head_rows
from trainer.run.config import Config, dump_config
from trainer.run.writers import check_writers

T = TypeVar("T")

SHARED_SECONDS = 15.0
"""How long a rank waits to see a file of rank 0's: network file systems take a moment."""


def prepare(config: Config, ranks: Ranks) -> Inputs:
    """Open and check everything a user can get wrong; all ranks call it and all raise when one does.

    Raises:
        LceError: the first problem of the lowest rank that has one: :class:`DataError` (missing, empty, labels out of
            range), :class:`CenterBankError` (another dimension or class count), :class:`ConfigError` (more ranks than
            classes, unknown backbone, run folder not writable or not shared, ranks that do not agree).
    """
    inputs = together(lambda: _open(config, ranks, ranks.is_main))
    check_agreement(identity(config, inputs))
    check_shared(config.run.dir, ranks)
    return inputs


def allowing_outside(config: Config) -> contextlib.AbstractContextManager[None]:
    """While a run opens its data sets, those it is evaluated on too."""
    return outside_allowed(isinstance(config.data, ImagesConfig) and config.data.allow_outside)


def check(config: Config, world_size: int, shown: bool = True) -> Inputs:
    """Open and check what :func:`prepare` does, and the evaluation sets, in this process alone, in host memory; nothing
    is written.

    Args:
        world_size: of the run that is to be.
        shown: log how foreign models are read.

    Raises:
        LceError: as :func:`prepare`.
    """
    with allowing_outside(config):
        inputs = _open(config, Ranks(world_size=world_size), shown)
        open_periodic(config.evaluate, inputs.image_size, Ranks(), inputs.dataset, shown)
        return inputs


def _check_share(world_size: int, classes: int) -> None:
    if classes < 2:
        raise DataError(f"{classes} class: there is nothing to tell apart; train on two classes or more")
    check_ranks(world_size, classes)


def together(action: Callable[[], T]) -> T:
    """Do something on every rank that may fail on some; all ranks raise the lowest such rank's :class:`LceError`."""
    result: list[T] = []
    problem: LceError | None = None
    try:
        result.append(action())
    except LceError as error:
        problem = error
    agree(problem)
    return result[0]


def _open(config: Config, ranks: Ranks, shown: bool) -> Inputs:
    check_writers(config.log)
    data = config.data
    dataset: Dataset | None = None
    if isinstance(data, SyntheticConfig):
        classes, size = data.synthetic_classes, (data.synthetic_size, data.synthetic_size)
    else:
        assert isinstance(data, ImagesConfig)
        with named(data__labels=data.labels, data__path=data.path):
            dataset = open_dataset(data.path, data.labels)
        classes, size = dataset.num_classes, dataset.info.image_size
        if len(dataset.kept) == 0:
            raise DataError(f"{dataset.path}: no record to train on (all labels are −1, or the data set is empty)")
    _check_share(ranks.world_size, classes)
    crossed = config.of(LceCrossConfig)
    if crossed is not None:
        cross = open_cross(crossed, dataset, ranks.device)
        _introduce((cross.new, cross.old), dataset, shown)
        if ranks.is_main:
            check_writable(config.run.dir)
        return Inputs(dataset, classes, size, None, None, cross)
    bank = open_bank(config.methods, classes, dataset)
    old = open_old(config.methods, data, dataset, ranks.device)
    _introduce((old,), dataset, shown)
    check_old(bank, old, config.methods)
    inputs = Inputs(dataset, classes, size, bank, old)
    check_methods(config.methods, config, inputs)
    with torch.device("meta"):
        backbone = build_backbone(config.backbone, size)
    zero.check(config)
    _check_sync(config, ranks.world_size)
    rows = None
    if config.head.weights is not None:
        with named(head__weights=config.head.weights):
            rows = head_rows(config.head.weights, classes, config.backbone.dim)
    weights = None
    if config.backbone.weights is not None:
        with named(backbone__weights=config.backbone.weights):
            weights = matching_weights(backbone, config.backbone.weights)
    _check_norms(config, usual_norm(backbone, weights))
    if ranks.is_main:
        check_writable(config.run.dir)
    return replace(inputs, start=_start_text(weights, rows))


def _start_text(weights: Mapping[str, Tensor] | None, rows: Rows | None) -> str:
    """What :attr:`Inputs.start` says: checksums of all of the backbone, and of some rows of the head, which may be of
    many gigabytes."""
    said = []
    if weights is not None:
        crc = 0
        for name, tensor in sorted(weights.items()):
            crc = zlib.crc32(_bytes(tensor), zlib.crc32(name.encode(), crc))
        said.append(f"backbone {crc:08x}")
    if rows is not None:
        numbers = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), SAMPLED_ROWS)).astype(np.int64))
        said.append(f"head {zlib.crc32(_bytes(rows.take(numbers))):08x}")
    return ", ".join(said) or "none"


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _introduce(sources: Sequence[OldEmbeddings | None], dataset: Dataset | None, shown: bool) -> None:
    """Say once how foreign models that run along are read, and refuse one that is fed wrongly."""
    for source in sources:
        if isinstance(source, ModelEmbeddings):
            introduce(source.old, dataset, shown)


def _check_norms(config: Config, norm: float | None) -> None:
    """Refuse MagFace where its terms have no gradient from the first update on, and so never get one."""
    margin = config.head.margin
    if margin.name != "magface" or norm is None or margin.lower_norm < norm < margin.upper_norm:
        return
    raise ConfigError(
        f"head.margin.lower_norm = {margin.lower_norm:g}, upper_norm = {margin.upper_norm:g}: embeddings of dimension "
        f"{config.backbone.dim} begin with norms of about {norm:.3g}, and outside of its range magface moves none; "
        f"take one around that, such as lower_norm={norm / 2.26:.2g} and upper_norm={norm * 4.86:.2g} (the paper's for "
        "D = 512, in proportion)"
    )


def _check_sync(config: Config, world_size: int) -> None:
    if not config.train.sync_batchnorm:
        return
    if not config.data.drop_last or config.data.batch_size < 2 * world_size:
        raise ConfigError(
            "train.sync_batchnorm: every rank must have two samples in every batch; set data.drop_last=true and "
            f"data.batch_size to at least {2 * world_size}"
        )


def check_writable(folder: Path) -> None:
    """Raise :class:`ConfigError` unless files can be made in ``folder`` (or it can be made); leaves nothing behind."""
    reason = why_unwritable(folder)
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:  # safetensors opens no such file, which the end of a run would be late to say
        reason = "has a name that is not UTF-8"
    if reason is not None:
        raise ConfigError(f"run.dir = {folder}: {reason}; choose another run.dir")


def check_shared(folder: Path, ranks: Ranks) -> None:
    """Raise :class:`ConfigError` on every rank unless all of them see what rank 0 writes in ``folder`` (or, where it is
    still to be made, in the folder that is there); leaves nothing behind."""
    if ranks.world_size == 1:
        return
    places = [folder.absolute(), *folder.absolute().parents]

    def write() -> tuple[int, str]:
        level = next(number for number, above in enumerate(places) if above.is_dir())
        name = f".shared-{uuid.uuid4().hex}"
        (places[level] / name).touch()
        return level, name

    level, name = on_main(write, ranks)
    mark = places[level] / name

    def wait_for_mark() -> None:
        end = time.monotonic() + SHARED_SECONDS
        while not mark.exists():
            if time.monotonic() > end:
                raise ConfigError(
                    f"run.dir = {folder}: rank {ranks.rank} on {socket.gethostname()} does not see what rank 0 writes "
                    "there; choose a folder on a file system that all machines share"
                )
            time.sleep(0.2)

    try:
        together(wait_for_mark)
    finally:
        if ranks.is_main:
            mark.unlink(missing_ok=True)


def identity(config: Config, inputs: Inputs) -> dict[str, str]:
    """What has to be the same on all ranks: configuration, data, code and versions, each as a short text."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(path.read_bytes())
    return {
        "configuration": hashlib.sha256(dump_config(config).encode()).hexdigest()[:16],
        "data set": inputs.dataset.fingerprint if inputs.dataset else _synthetic(config),
        "normalisation": repr((inputs.dataset.info.mean, inputs.dataset.info.std)) if inputs.dataset else "none",
        "centre bank": inputs.bank.fingerprint if inputs.bank else "none",
        "old embeddings": inputs.old.fingerprint if inputs.old else "none",
        "models": inputs.cross.fingerprint if inputs.cross else "none",
        "set of start weights": inputs.start,
        "trainer version": __version__,
        "trainer code": code.hexdigest()[:16],
        "torch version": torch.__version__,
        "python version": platform.python_version(),
    }


def check_origin(checkpoint: Checkpoint, config: Config, inputs: Inputs) -> None:
    """Raise :class:`CheckpointError` when a checkpoint was taken with other data."""
    before, now = checkpoint.seal["identity"], identity(config, inputs)
    for name in ("data set", "normalisation", "centre bank", "old embeddings", "models", "set of start weights"):
        if name in before and before[name] != now[name]:
            raise CheckpointError(
                f"{checkpoint.folder}: was taken with another {name} ({before[name]}, now {now[name]}); choose another "
                "run.dir"
            )


def check_goal(checkpoint: Checkpoint, steps: int) -> None:
    """Raise :class:`CheckpointError` when a checkpoint has made more updates than the run is to have."""
    if checkpoint.step > steps:
        raise CheckpointError(
            f"{checkpoint.folder}: has made {checkpoint.step} updates, and this run is to have {steps}: it would be of "
            "neither schedule; choose another run.dir, or more updates"
        )


def _synthetic(config: Config) -> str:
    data = config.data
    assert isinstance(data, SyntheticConfig)
    return f"synthetic {data.synthetic_records} of {data.synthetic_classes} classes, {data.synthetic_size} pixels"


def check_agreement(mine: dict[str, str]) -> None:
    """Raise :class:`ConfigError` on every rank when one differs from rank 0; names rank, host and both values."""
    everyone = gather_objects((socket.gethostname(), mine))
    first_host, first = everyone[0]
    for rank, (host, theirs) in enumerate(everyone):
        for key, value in first.items():
            if theirs.get(key) != value:
                raise ConfigError(
                    f"rank {rank} on {host} has another {key} ({theirs.get(key)}) than rank 0 on {first_host} "
                    f"({value}); "
                    "start all ranks from the same code, configuration and data"
                )
