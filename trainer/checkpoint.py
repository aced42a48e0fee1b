"""Checkpoints: torch.distributed.checkpoint directories that are complete or not there.

A save is written to ``.step-XXXXXXXX.partial`` by all ranks, sealed by rank 0 with ``state.json`` (counters, loader
position, resolved configuration, the size and CRC-32 of every file, and a checksum of itself) and renamed to
``step-XXXXXXXX``. Replicated tensors are written once, sharded ones (DTensors) by their owners, so that any number of
ranks can load it. Nothing in it is unpickled freely: tensors are read with ``weights_only``, the index with an
unpickler that knows torch's own index classes alone.
"""

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as load_in_place
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as save_now

from trainer.checkpoint_folder import (
    FORMAT,
    INDEX,
    SEAL,
    Checkpoint,
    CheckpointConfig,
    best_checkpoint,
    find_damage,
    list_checkpoints,
    read_seal,
)
from trainer.distributed import Ranks, barrier, broadcast_object, gather_objects
from trainer.errors import CheckpointError
from trainer.files import checksum, sync
from trainer.reading import open_regular
from trainer.seals import sealed

warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")  # one process is fine

_SAVE_ERRORS = (Exception, CheckpointException)  # torch derives its own from BaseException
_INDEX_CLASSES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _INDEX_CLASSES or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint's index")


class SafeReader(FileSystemReader):
    """torch's reader of checkpoint directories, with the index read by an unpickler that builds index classes only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checkpoint's index. Raises :class:`CheckpointError` when it is none."""
        metadata = read_index(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def read_index(folder: Path) -> Metadata:
    """The index of a checkpoint folder: names, shapes and places of its tensors.

    Raises:
        CheckpointError: missing, damaged, or holding anything but an index.
    """
    try:
        with open_regular(folder / INDEX, CheckpointError) as file:
            metadata = _IndexUnpickler(file).load()
    except Exception as error:
        raise CheckpointError(f"{folder / INDEX}: not the index of a checkpoint: {error}") from None
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{folder / INDEX}: not the index of a checkpoint: it holds a {type(metadata).__name__}")
    for info in metadata.storage_data.values():
        if Path(info.relative_path).name != info.relative_path:
            raise CheckpointError(f"{folder / INDEX}: points outside its folder: {info.relative_path}")
    return metadata


def check_shapes(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> None:
    """Compare names and shapes of tensors (on any device) with those of a checkpoint.

    Raises:
        CheckpointError: it lacks one of the tensors, or has it with another shape; or its index cannot be read.
    """
    index = read_index(checkpoint.folder).state_dict_metadata
    for name, tensor in state.items():
        entry = index.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{checkpoint.folder}: has no {name}; was the model or the optimizer changed?")
        if tuple(entry.size) != tuple(tensor.shape):
            raise CheckpointError(
                f"{checkpoint.folder}: {name} is {tuple(entry.size)}, this run needs {tuple(tensor.shape)}; "
                "use another run folder for another model or data set"
            )


def load_tensors(checkpoint: Checkpoint, state: dict[str, Tensor]) -> None:
    """Read a checkpoint into the tensors of ``state``, in place. All ranks call it.

    Raises:
        CheckpointError: it lacks one of the tensors, has it with another shape, or cannot be read on some rank.
    """
    check_shapes(checkpoint, state)
    # Saved dtypes may differ (float32 weights into a float64 run): torch's reader copies element by element.
    try:
        load_in_place(dict(state), storage_reader=SafeReader(checkpoint.folder), no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise CheckpointError(f"{checkpoint.folder}: cannot be read: {_first_line(error)}") from None


@dataclass
class _Saving:
    step: int
    partial: Path
    seal: dict[str, Any]
    files: "Future[dict[str, tuple[int, int]]]"


class Checkpoints:
    """The checkpoints of one run: save (in the background), seal, keep the newest, find the newest whole one.

    Every method but :attr:`idle` is collective: all ranks call it at the same point. One failed save is reported and
    survived; a second one in a row ends the run with :class:`CheckpointError`. A failed save never touches an earlier
    checkpoint.

    Args:
        folder: ``<run>/checkpoints``.
        config: how many are kept, and whether the step waits for the disk.
        ranks: who we are.
        notify: told about damaged checkpoints and failed saves (on rank 0 only).
    """

    def __init__(self, folder: Path, config: CheckpointConfig, ranks: Ranks, notify: Callable[[str], None]) -> None:
        self.folder, self.config, self.ranks, self.notify = folder, config, ranks, notify
        self.failures = 0
        self._saving: _Saving | None = None
        self._stager: DefaultStager | None = None
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None

    @property
    def idle(self) -> bool:
        """Whether this rank has nothing to wait for: no save begun, or its part is on disk."""
        return self._saving is None or self._saving.files.done()

    @property
    def saving(self) -> bool:
        """Whether a save was begun and not settled (equal on all ranks)."""
        return self._saving is not None

    def save(self, state: dict[str, Tensor], seal: dict[str, Any]) -> None:
        """Begin a save: copy the tensors to host memory, then write while training goes on (or at once, if configured).

        Args:
            state: name → tensor; the same names on all ranks; replicated tensors plain, sharded ones as DTensors.
            seal: further JSON values to keep, at least ``step``.
        """
        self.settle()
        step = int(seal["step"])
        partial = self.folder / f".step-{step:08d}.partial"
        problem = broadcast_object(_fresh(partial) if self.ranks.is_main else None)
        if problem is not None:
            self._failed(step, problem)
            return
        files: Future[dict[str, tuple[int, int]]] = Future()
        self._saving = _Saving(step, partial, seal, files)
        writer = FileSystemWriter(partial)
        if self.config.asynchronous and self._group is not None:
            stager = self._pinned_memory(state)
            upload = async_save(state, storage_writer=writer, process_group=self._group, async_stager=stager)
            assert isinstance(upload, Future)
            upload.add_done_callback(lambda done: _resolve(files, done.result, partial, self.ranks.rank))
            return
        no_dist = self._group is None
        _resolve(
            files,
            lambda: save_now(state, storage_writer=writer, process_group=self._group, no_dist=no_dist),
            partial,
            self.ranks.rank,
        )
        self.settle()

    def _pinned_memory(self, state: dict[str, Tensor]) -> DefaultStager | None:
        """For tensors on a GPU, pinned host memory that is kept from save to save: the step waits for this copy, and a
        copy to pageable memory goes through a buffer of the driver. None: torch's own copies.
        """
        if self._stager is None and any(tensor.is_cuda for tensor in state.values()):
            pinned = StagingOptions(use_shared_memory=False, use_async_staging=False)
            self._stager = DefaultStager(pinned)
        return self._stager

    def settle(self) -> None:
        """Wait for a save under way, seal it, and remove what retention no longer keeps.

        Raises:
            CheckpointError: the second save in a row has failed.
        """
        saving, self._saving = self._saving, None
        if saving is None:
            return
        outcome: dict[str, tuple[int, int]] | str
        try:
            outcome = saving.files.result()
        except _SAVE_ERRORS as error:
            outcome = _first_line(error)
        outcomes = gather_objects(outcome)
        problem = next((o for o in outcomes if isinstance(o, str)), None)
        if problem is None and self.ranks.is_main:
            parts = {name: list(value) for o in outcomes if isinstance(o, dict) for name, value in o.items()}
            problem = self._seal(saving, parts)
        problem = broadcast_object(problem)
        if problem is not None:
            if self.ranks.is_main:
                shutil.rmtree(saving.partial, ignore_errors=True)
            self._failed(saving.step, problem)
            return
        self.failures = 0

    def _seal(self, saving: _Saving, files: dict[str, list[int]]) -> str | None:
        target = self.folder / saving.partial.name.removeprefix(".").removesuffix(".partial")
        try:
            files[INDEX] = list(checksum(saving.partial / INDEX))
            saved = read_index(saving.partial).state_dict_metadata.values()
            sizes = [entry.size.numel() for entry in saved if isinstance(entry, TensorStorageMetadata)]
            with (saving.partial / SEAL).open("w") as file:
                json.dump(
                    sealed({"format": FORMAT, **saving.seal, "tensors": [len(sizes), sum(sizes)], "files": files}),
                    file,
                    indent=1,
                )
                file.flush()
                os.fsync(file.fileno())
            shutil.rmtree(target, ignore_errors=True)
            saving.partial.rename(target)
            sync(self.folder)
            self._retain()
        except (OSError, CheckpointError) as error:
            return _first_line(error)
        return None

    def _retain(self) -> None:
        every = self.config.keep_every
        folders = list_checkpoints(self.folder)
        best = None if self.config.best is None else best_checkpoint(folders, self.config.best)
        for old in folders[: -self.config.keep]:
            if old != best and not (every and int(old.name.removeprefix("step-")) % every == 0):
                shutil.rmtree(old, ignore_errors=True)

    def _failed(self, step: int, problem: str) -> None:
        self.failures += 1
        message = f"checkpoint at step {step} failed: {problem}"
        if self.failures > 1:
            raise CheckpointError(
                f"{message}; the one before failed too, so the run stops. Free disk space or repair {self.folder}"
            )
        if self.ranks.is_main:
            self.notify(f"{message}; training goes on and tries again at the next one")

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint; damaged ones are named and skipped. None when the run has none at all.

        Raises:
            CheckpointError: there are checkpoints but none is whole; or the newest is damaged and ``resume`` is
                ``exact``.
        """
        folders = broadcast_object(list_checkpoints(self.folder) if self.ranks.is_main else [])
        for folder in reversed(folders):
            found, problem = self._examine(folder)
            if found is not None:
                return found
            if self.config.resume == "exact":
                raise CheckpointError(f"{problem}; checkpoint.resume=exact takes no older one")
            if self.ranks.is_main:
                self.notify(f"{problem}; trying the checkpoint before it")
        if folders:
            raise CheckpointError(
                f"{self.folder}: none of its {len(folders)} checkpoints is whole; remove them to start over"
            )
        return None

    def _examine(self, folder: Path) -> tuple[Checkpoint | None, str | None]:
        """The checkpoint when whole, else what is wrong with it; the ranks share the reading."""
        seal: dict[str, Any] | None = None
        problem: str | None = None
        if self.ranks.is_main:
            try:
                seal = read_seal(folder)
                read_index(folder)
            except CheckpointError as error:
                problem = str(error)
        seal, problem = broadcast_object((seal, problem))
        if problem is None and seal is not None:
            names = sorted(seal["files"])[self.ranks.rank :: self.ranks.world_size]
            mine = find_damage(folder, {name: seal["files"][name] for name in names})
            problem = next((p for p in gather_objects(mine) if p is not None), None)
        return (Checkpoint(folder, seal) if problem is None and seal is not None else None), problem

    def clean(self) -> None:
        """Remove what killed runs left half-written."""
        if self.ranks.is_main:
            for partial in self.folder.glob(".step-*.partial"):
                shutil.rmtree(partial, ignore_errors=True)
        barrier()


def _fresh(folder: Path) -> str | None:
    """Make an empty folder; what went wrong, or None."""
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        return _first_line(error)
    return None


def _resolve(files: "Future[dict[str, tuple[int, int]]]", write: Callable[[], object], folder: Path, rank: int) -> None:
    """Run the write, then set the sizes and checksums of the rank's own files, or the failure."""
    try:
        write()
        files.set_result({path.name: checksum(path) for path in sorted(folder.glob(f"__{rank}_*"))})
    except _SAVE_ERRORS as error:
        files.set_exception(error)


def _first_line(error: BaseException) -> str:
    """The innermost reason in one line; torch wraps the ranks' own errors into one that lists them."""
    failures = getattr(error, "failures", None)
    if failures:
        rank, (inner, _) = next(iter(failures.items()))
        return f"rank {rank}: {_first_line(inner)}"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
