"""Run the old model over the new training set on all ranks and make the centre bank of what it says.

The embeddings are written block by block to a working folder next to the bank, with one byte per finished block, so
that a killed run continues where it was, on any number of ranks. Several machines need one shared file system.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.compat.bank.boundary import MINIMUM, BoundaryRule
from trainer.compat.bank.center_bank import BankInfo, CenterBank
from trainer.compat.bank.convert import Progress, bank_from_embeddings, check_centers
from trainer.compat.bank.matrices import open_rows
from trainer.data.index import Dataset, RowsInfo, check_description, describe_rows
from trainer.distributed import Ranks, agree, barrier, on_main
from trainer.errors import CenterBankError, ConfigError, LceError, ModelError
from trainer.files import why_unwritable, write_text
from trainer.models.model import EmbeddingModel, check_distinct, embed_batches
from trainer.owner import owned
from trainer.reading import read_json

BLOCK_RECORDS = 2048


@dataclass(frozen=True)
class _Work:
    """The working folder: job.json, embeddings.npy (N, D1) float32 by record, done.bin (a byte per block)."""

    folder: Path
    records: int
    dim: int
    job: dict[str, Any]

    @property
    def embeddings(self) -> Path:
        return self.folder / "embeddings.npy"

    @property
    def done(self) -> Path:
        return self.folder / "done.bin"

    @property
    def blocks(self) -> int:
        return -(-self.records // BLOCK_RECORDS)

    def prepare(self) -> list[int]:
        """Make the folder, or check that the one there is of the same job; the blocks that are still to do."""
        job_file = self.folder / "job.json"
        if not job_file.is_file():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                array = np.lib.format.open_memmap(self.embeddings, "w+", np.float32, (self.records, self.dim))
                del array
                self.done.write_bytes(bytes(self.blocks))
                write_text(job_file, json.dumps(self.job, indent=1))
            except OSError as error:
                raise CenterBankError(f"{self.folder}: cannot be written: {error.strerror}") from None
        known = read_json(job_file, CenterBankError)
        if known != self.job:
            raise CenterBankError(
                f"{self.folder}: unfinished work of another model, data set or setting; finish or remove it"
            )
        return [block for block, state in enumerate(self.done.read_bytes()) if not state]

    def offset(self) -> int:
        """Where the rows begin in embeddings.npy, in bytes."""
        return int(np.load(self.embeddings, mmap_mode="r").offset)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def embed_by_record(
    model: EmbeddingModel,
    dataset: Dataset,
    labels: np.ndarray,
    work_folder: Path,
    *,
    flip: bool = False,
    batch_size: int = 256,
    ranks: Ranks = Ranks(),  # noqa: B008  (frozen)
    progress: Progress | None = None,
) -> Path:
    """Embed every record with a label ≥ 0; all ranks call it, and find the whole array when it returns.

    Args:
        labels: (N,) int64. Records of label −1 get zero rows.
        work_folder: on a file system that all ranks share; kept until the caller removes it.
        progress: called with this rank's (done, total) records.

    Returns:
        The .npy file (N, D1) float32 in record order.

    Raises:
        ConfigError: ``batch_size`` < 1.
        LceError: on every rank, the first problem of any: a damaged record, another image size, unfinished work of
        another job.
    """
    if batch_size < 1:
        raise ConfigError(f"`batch_size` {batch_size}: at least 1")
    job = {
        "model": model.hash,
        "dataset": dataset.fingerprint,
        "records": len(dataset),
        "dim": model.dim,
        "flip": flip,
        "block_records": BLOCK_RECORDS,
    }
    work = _Work(work_folder, len(dataset), model.dim, job)
    mine = on_main(work.prepare, ranks)[ranks.rank :: ranks.world_size]
    problem: LceError | None = None
    try:
        _embed_blocks(model, dataset, labels, work, mine, flip, batch_size, progress)
    except OSError as error:
        problem = CenterBankError(f"{work.folder}: {error.strerror}; all ranks need one shared file system with room")
    except LceError as error:
        problem = error
    agree(problem)
    return work.embeddings


def _embed_blocks(
    model: EmbeddingModel,
    dataset: Dataset,
    labels: np.ndarray,
    work: _Work,
    blocks: list[int],
    flip: bool,
    batch_size: int,
    progress: Progress | None,
) -> None:
    row_bytes, finished = 4 * work.dim, 0
    total = sum(min(BLOCK_RECORDS, work.records - block * BLOCK_RECORDS) for block in blocks)
    with _opened(work.embeddings) as rows, _opened(work.done) as done:
        offset = work.offset()
        for block in blocks:
            start = block * BLOCK_RECORDS
            stop = min(start + BLOCK_RECORDS, work.records)
            out = np.zeros((stop - start, work.dim), np.float32)
            wanted = start + np.flatnonzero(labels[start:stop] >= 0)
            embedded = 0
            for batch, unit in embed_batches(model, dataset, wanted, batch_size, flip):
                _check_rows(model, dataset, batch, unit)
                out[batch - start] = unit
                embedded += len(batch)
                if progress is not None:
                    progress(finished + int(batch[-1]) + 1 - start, total)
            if embedded != len(wanted):
                raise RuntimeError(f"block {block}: {embedded} of its {len(wanted)} records were embedded")
            data = out.tobytes()
            at = offset + start * row_bytes
            while data:
                written = os.pwrite(rows, data, at)
                data, at = data[written:], at + written
            os.pwrite(done, b"\1", block)
            finished += stop - start


def _check_rows(model: EmbeddingModel, dataset: Dataset, records: np.ndarray, vectors: np.ndarray) -> None:
    """Raise :class:`ModelError` naming the first image whose embedding is zero or not finite."""
    norms = np.linalg.norm(vectors, axis=1)
    wrong = np.flatnonzero(~(np.isfinite(norms) & (norms > 0.5)))
    if len(wrong):
        what = "zero" if np.isfinite(norms[wrong[0]]) else "not finite (NaN or infinite)"
        raise ModelError(
            f"{dataset.where(int(records[wrong[0]]))}: the embedding that {model.path} makes of this image is {what}: "
            "its weights are damaged, or it is fed what it does not take (`lce model describe`)"
        )


def bank_from_model(
    model: EmbeddingModel,
    dataset: Dataset,
    path: str | Path,
    *,
    rule: BoundaryRule = MINIMUM,
    centers: CenterBank | None = None,
    flip: bool = False,
    batch_size: int = 256,
    keep_embeddings: str | Path | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008  (frozen)
    embed_progress: Progress | None = None,
    bank_progress: Progress | None = None,
    **options: Any,
) -> CenterBank:
    """The old model's bank of a data set; all ranks call it. Records that ``lce check`` found damaged are left out.

    Args:
        path: the bank's folder; the working folder is ``.NAME.work`` next to it.
        centers: keep the centres of this bank (old classifier rows) and measure boundaries only.
        flip: embed as the sum of the image and its mirror image.
        keep_embeddings: put the embeddings by record there (.npy), for the methods that need them per image; a file
            that exists is refused like an existing bank.
        options: of :class:`trainer.compat.bank.center_bank.BankWriter` (storage, overwrite).

    Raises:
        LceError: on every rank.
    """
    path, keep_embeddings = Path(path), None if keep_embeddings is None else Path(keep_embeddings)
    labels = dataset.sound_labels
    work = path.with_name(f".{path.name}.work")
    info = BankInfo(
        made_from="model",
        source=str(dataset.path),
        model=str(model.path),
        model_hash=model.hash,
        dataset=dataset.named,
        dataset_fingerprint=dataset.fingerprint,
        numbering=on_main(lambda: dataset.numbering, ranks),
        boundary=rule.text() + (", flip-sum" if flip else ""),
    )

    def check() -> None:
        check_distinct(model, dataset)
        _check_targets(path, keep_embeddings, bool(options.get("overwrite")))
        if centers is not None:
            check_centers(centers, dataset.num_classes, model.dim, info)

    with ExitStack() as own:
        on_main(lambda: own.enter_context(owned(path, CenterBankError)) and None, ranks)
        on_main(check, ranks)
        file = embed_by_record(
            model, dataset, labels, work, flip=flip, batch_size=batch_size, ranks=ranks, progress=embed_progress
        )

        def convert() -> None:
            bank_from_embeddings(
                open_rows([file]),
                labels,
                dataset.num_classes,
                path,
                info,
                rule=rule,
                centers=centers,
                progress=bank_progress,
                allow_collapsed=model.allow_collapsed or not model.foreign,
                **options,
            )
            if keep_embeddings is not None:
                rows = RowsInfo(
                    records=len(dataset),
                    dim=model.dim,
                    model=str(model.path),
                    model_hash=model.hash,
                    dataset=str(dataset.path),
                    fingerprint=dataset.records_fingerprint,
                )
                try:
                    keep_embeddings.parent.mkdir(parents=True, exist_ok=True)
                    keep_embeddings.with_suffix(".yaml").unlink(missing_ok=True)  # of those that are replaced
                    shutil.move(file, keep_embeddings)
                    describe_rows(keep_embeddings, rows)
                except OSError as error:
                    raise CenterBankError(f"{keep_embeddings}: cannot be written: {error.strerror}") from None
            shutil.rmtree(work)

        on_main(convert, ranks)
        barrier()
    return CenterBank.open(path)


def _check_targets(path: Path, embeddings: Path | None, overwrite: bool) -> None:
    """Raise :class:`CenterBankError` unless the bank and the kept embeddings can be put where they are to go."""
    if embeddings is not None and (embeddings.is_dir() or embeddings == path):
        raise CenterBankError(f"{embeddings}: is a folder; name the .npy file that is to keep the embeddings")
    if embeddings is not None:
        check_description(embeddings)
    for target in (path, embeddings):
        if target is not None and target.exists() and not overwrite:
            raise CenterBankError(f"{target}: exists already; remove it or choose another place (`force` replaces it)")
    reason = None if embeddings is None else why_unwritable(embeddings.parent)
    if reason is not None:
        raise CenterBankError(f"{embeddings}: {reason}; choose another place for the embeddings")
