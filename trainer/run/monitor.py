"""What is shown and written while training, on rank 0: progress, ``log.jsonl`` and writers such as TensorBoard.

``log.jsonl`` holds one JSON object a logged step; :data:`FIELDS` says what the numbers are. A continued run drops the
lines after the checkpoint that it continues from, so that every step is there once.
"""

import errno
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.profiler import profile

from trainer.data import Batch, Dataset
from trainer.distributed import COMMUNICATION, Ranks, peak_memory_bytes
from trainer.errors import ConfigError
from trainer.files import replaced
from trainer.head.kernels import why_eager
from trainer.run.config import LogConfig
from trainer.run.display import Display
from trainer.run.writers import Ending, Writer, open_writers

FIELDS = {
    "step": "updates made so far",
    "epoch": "passes over the data so far",
    "loss": "the whole loss of the step's (last) batch, mean over the global batch",
    "classification": "margin softmax loss",
    "alignment": "mean of 1 − cos(w_j, o_j) over the classes with an old centre",
    "alignment_mse": "the same in the paper's unit, mean over the D dimensions: 2 · alignment / D",
    "boundary": "boundary loss",
    "contrastive": "cross-model: supervised contrastive loss of the mapped embeddings",
    "orthogonality": "cross-model: how far T₂₁ is from orthogonal, ‖Gram matrix − 1‖_F",
    "distance": "cross-model: negative log-likelihood of the distances that the head predicts",
    "gradient_classification": "2-norm of the head's own gradient with respect to the (last) batch's embeddings",
    "gradient_METHOD": "the same of each method of compat, weighted",
    "row_gradient_METHOD": "of LCE, which acts on classifier rows: with respect to those of the batch's classes",
    "target_cosine": "mean cosine of the samples with their own class",
    "lr": "learning rate of the backbone",
    "grad_norm": "2-norm of the modules' gradients, before clipping",
    "loss_scale": "float16's factor on gradients",
    "skipped_steps": "updates left out so far because loss or gradients were not finite",
    "head_eager": "1: torch.compile failed on rank 0, and the head's work runs uncompiled; otherwise not there",
    "samples_per_second": "over all ranks, since the line before",
    "step_seconds": "mean time of an update since the line before",
    "data_share": "share of that time in which rank 0 waited for data",
    "SET.metric": "what the section ``evaluate`` asks for; see trainer/evaluation/periodic.py",
    "communication_share": "share of that time in collectives outside the backbone's own, waiting for others included",
    "memory_bytes": "largest so far on rank 0: device memory on CUDA, resident memory on the CPU",
    "seconds": "since the start of this process's training",
}

SHOWN_IMAGES = 16
NEWLINE = b"\n"
GROUPS = {
    "alignment": "compat",
    "alignment_mse": "compat",
    "boundary": "compat",
    "contrastive": "compat",
    "orthogonality": "compat",
    "distance": "compat",
    "center_cosines": "compat",
    "boundary_slack": "compat",
    "epoch": "data",
    "samples_per_second": "data",
    "data_share": "data",
    "step_seconds": "system",
    "communication_share": "system",
    "memory_bytes": "system",
}
"""The group under which a writer shows a figure; figures with a dot belong to ``evaluate``, all others to ``train``."""


def grouped(name: str) -> str:
    """A figure's name as writers get it, such as ``train/loss`` or ``evaluate/unseen.rank1``."""
    pull = name.startswith(("gradient_", "row_gradient_"))
    return f"{'evaluate' if '.' in name else 'compat' if pull else GROUPS.get(name, 'train')}/{name}"


class Monitor:
    """Progress, JSONL and further writers on rank 0; on every other rank it does nothing.

    Args:
        folder: the run folder (exists).
        config: which of them, and how often.
        ranks: who we are.
        steps: the run's updates in all.
        start: the step the run continues from; later lines of an earlier attempt are dropped.

    Attributes:
        ending: how the run has ended, for writers that keep it; ``failed`` unless the run says otherwise.

    Raises:
        ConfigError: the log or another writer's files cannot be opened.
    """

    def __init__(self, folder: Path, config: LogConfig, ranks: Ranks, steps: int, start: int) -> None:
        self.config, self.ranks, self.steps = config, ranks, steps
        self.last: dict[str, Any] = {}
        self.ending: Ending = "failed"
        self._began = self._mark = time.perf_counter()
        self._mark_step, self._samples, self._waited = start, 0, 0.0
        COMMUNICATION.reset()
        self.folder = folder
        self._profile: profile | None = None
        self._log: BinaryIO | None = None
        self._unwritten, self._refused = b"", False
        self._writers: dict[str, Writer] = {}
        self._display: Display | None = None
        if not ranks.is_main:
            return
        try:
            truncate_log(folder / "log.jsonl", start)
            self._log = (folder / "log.jsonl").open("ab", buffering=0)
            self._writers = dict(open_writers(config, folder, start))
        except OSError as error:
            raise ConfigError(f"{error.filename or folder}: cannot be written: {error.strerror or error}") from None
        if config.progress:
            self._display = Display(steps, start, config.line_seconds)

    def __enter__(self) -> "Monitor":
        if self._display is not None:
            self._display.start()
        if self.config.profile is not None:
            self._trace(self._mark_step, *self.config.profile)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._display is not None:
            self._display.stop()
        if self._profile is not None:  # the run ended before the last update that was to be traced
            self._export_trace(self._profile)
        if self._log is not None:
            self.flush()
            self._log.close()
            if self._unwritten:
                self.say(f"log.jsonl lacks the last {self._unwritten.count(NEWLINE)} line(s), which it did not take")
        if kind is not None:
            self.ending = "stopped" if issubclass(kind, KeyboardInterrupt) else "failed"
        self._give("ended", self.ending)
        for name in list(self._writers):
            self._try(name, lambda writer: writer.close())

    def _try(self, name: str, action: Callable[[Writer], None]) -> None:
        """A failure in a writer must not end the run: the writer is named and dropped."""
        try:
            action(self._writers[name])
        except Exception as error:
            del self._writers[name]
            self.say(f"log: {name} failed and gets no further figures: {error}")

    def say(self, message: str) -> None:
        """A line for people, on standard error (rank 0 only)."""
        with suppress(OSError):  # a closed terminal, or a reader that has gone away, must not end the run
            if self._display is not None:
                self._display.say(message)
            elif self.ranks.is_main:
                print(message, file=sys.stderr, flush=True)

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around the fetching of a batch: its time counts as data wait."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Exclude the enclosed time from step time and throughput."""
        start, communicated = time.perf_counter(), COMMUNICATION.take()
        yield
        self._mark += time.perf_counter() - start
        COMMUNICATION.reset(communicated)

    def count(self, samples: int) -> None:
        """Samples that this rank has been given."""
        self._samples += samples

    def due(self, step: int) -> bool:
        """Whether the update that ends at ``step`` is logged: the first, every n-th and the last."""
        return step == 1 or step % self.config.every_steps == 0 or step == self.steps

    def advance(self, step: int) -> None:
        """Move the progress bar, and begin or end the trace of ``log.profile``."""
        if self.config.profile is not None:
            self._trace(step, *self.config.profile)
        if self._display is not None:
            self._display.advance(step)

    def _trace(self, step: int, first: int, last: int) -> None:
        if self._profile is None and first <= step + 1 <= last:
            self._profile = profile(record_shapes=True)
            self._profile.start()
        elif self._profile is not None and step >= last:
            self._export_trace(self._profile)

    def _export_trace(self, trace: profile) -> None:
        self._profile = None
        trace.stop()
        file = self.folder / "profile" / f"rank-{self.ranks.rank:05d}.json"
        try:
            file.parent.mkdir(exist_ok=True)
            trace.export_chrome_trace(str(file))
        except (OSError, RuntimeError) as error:
            self.say(f"log.profile: {file} cannot be written: {error}")

    def log(self, step: int, values: dict[str, float | Tensor]) -> dict[str, Any]:
        """Write one line; the tensors among ``values`` are read here, which waits for the device. Those that hold many
        numbers, (n,), go to the writers alone, as distributions.

        Returns:
            The line, as written (also on the ranks that write nothing).
        """
        many = {k: v for k, v in values.items() if isinstance(v, Tensor) and v.dim()}
        numbers = {k: v.item() if isinstance(v, Tensor) else v for k, v in values.items() if k not in many}
        now = time.perf_counter()
        elapsed, updates = now - self._mark, max(1, step - self._mark_step)
        line: dict[str, Any] = {
            "step": step,
            **numbers,
            "samples_per_second": round(self._samples * self.ranks.world_size / max(elapsed, 1e-9), 1),
            "step_seconds": round(elapsed / updates, 6),
            "data_share": round(min(1.0, self._waited / max(elapsed, 1e-9)), 4),
            "communication_share": round(min(1.0, COMMUNICATION.take() / max(elapsed, 1e-9)), 4),
            "memory_bytes": peak_memory_bytes(self.ranks.device),
            "seconds": round(now - self._began, 3),
            **({} if why_eager() is None else {"head_eager": 1}),
        }
        self._mark, self._mark_step, self._samples, self._waited = now, step, 0, 0.0
        self.last = line
        self._write_log(json.dumps(line) + "\n")
        figures = {grouped(key): value for key, value in line.items() if key not in ("step", "seconds")}
        for name in list(self._writers):
            self._try(name, lambda writer: writer.write(step, figures))
        for key, distribution in many.items() if self.takes("histogram") else ():
            found = distribution.detach().float().cpu().numpy()
            if len(found := found[np.isfinite(found)]):  # NaN: a sample without a class, or without an old centre
                self._give("histogram", grouped(key), step, found)
        if self._display is not None:
            self._display.figures(line, evaluated=any("." in key for key in line))
        return line

    def show_images(self, step: int, batch: Batch, dataset: Dataset | None) -> None:
        """Give the writers that take pictures the first images of a batch as training sees them (``log.images``).

        A run on stored embeddings has batches without pixels, and shows none.
        """
        if not self.config.images or dataset is None or not batch.images.numel() or not self.takes("images"):
            return
        info = dataset.info
        mean, std = (np.array(values, np.float32) for values in (info.mean, info.std))
        pixels = batch.images[:SHOWN_IMAGES].detach().float().cpu().numpy().transpose(0, 2, 3, 1)
        pixels = ((pixels * std + mean) * 255).round().clip(0, 255).astype(np.uint8)
        self._give("images", "data/first_batch", step, pixels if info.color == "RGB" else pixels[..., ::-1])

    def takes(self, method: str) -> bool:
        """Whether a writer of this rank has ``method``."""
        return any(hasattr(writer, method) for writer in self._writers.values())

    def show_embeddings(self, step: int, vectors: NDArray[Any], names: Sequence[str]) -> None:
        """Give the writers that take them (n, D) embeddings with the identity's name of each."""
        self._give("embeddings", step, vectors, names)

    def _give(self, method: str, *arguments: Any) -> None:
        for name in list(self._writers):
            if hasattr(self._writers[name], method):
                self._try(name, lambda writer: getattr(writer, method)(*arguments))

    def _write_log(self, text: str) -> None:
        """Append to ``log.jsonl``; what a full disk refuses is kept and tried again, see :meth:`flush`."""
        if self._log is None:
            return
        self._unwritten += text.encode()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._log.write(self._unwritten) :]
            self._refused = False
        except OSError as error:
            if not self._refused:
                self.say(f"log.jsonl cannot be written: {error.strerror}; its lines are kept and tried again")
            self._refused = True

    def flush(self) -> None:
        """Write what was refused so far, and wait until the disk has the lines."""
        self._write_log("")
        if self._log is None or self._unwritten:
            return
        try:
            os.fsync(self._log.fileno())
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that knows no fsync
                self.say(f"log.jsonl may lose lines if the machine fails: {error.strerror}")


def truncate_log(path: Path, last_step: int) -> None:
    """Keep the lines of ``log.jsonl`` up to ``last_step``; a torn last line goes too."""
    if not path.exists():
        return
    kept = []
    for text in path.read_text().splitlines():
        try:
            if json.loads(text)["step"] <= last_step:
                kept.append(text + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    with replaced(path, ConfigError) as partial:
        partial.write_text("".join(kept))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``log.jsonl``."""
    return [json.loads(text) for text in path.read_text().splitlines()]
