"""What a run shows to people on standard error: a progress bar on a terminal, a line now and then in a log file."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

NOT_SHOWN = (
    "step",
    "samples_per_second",
    "step_seconds",
    "data_share",
    "communication_share",
    "memory_bytes",
    "seconds",
)
"""Figures of a logged step that a line shows in another form, or not at all."""


class Display:
    """Progress of ``steps`` updates on standard error.

    Args:
        steps: the run's updates in all.
        start: updates that are made already.
        line_seconds: least time between two lines where standard error is no terminal.
        console: where to write; for tests.
    """

    def __init__(self, steps: int, start: int, line_seconds: float, console: Console | None = None) -> None:
        self.steps, self.line_seconds = steps, line_seconds
        self._began, self._start, self._shown = time.perf_counter(), start, float("-inf")
        self._progress: Progress | None = None
        console = console or Console(stderr=True)
        self._file = console.file
        if console.is_terminal:
            self._progress = progress_columns(console)
            self._task = self._progress.add_task("", total=steps, completed=start, figures="")

    def start(self) -> None:
        """Begin to draw."""
        if self._progress is not None:
            self._progress.start()

    def stop(self) -> None:
        """End drawing; what was drawn last stays."""
        if self._progress is not None:
            self._progress.stop()

    def say(self, message: str) -> None:
        """A message of its own line, above the bar where there is one."""
        if self._progress is not None:
            self._progress.console.print(message, highlight=False, markup=False)
        else:
            print(message, file=self._file, flush=True)

    def advance(self, step: int) -> None:
        """``step`` updates are made."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def figures(self, line: Mapping[str, Any], evaluated: bool) -> None:
        """A logged step (see :data:`trainer.run.monitor.FIELDS`): shown by the bar; as a line when one is due, at the
        last step, and always when it holds figures of an evaluation (``evaluated``)."""
        if self._progress is not None:
            self._progress.update(self._task, figures=short_figures(line))
            return
        now = time.perf_counter()
        if evaluated or line["step"] >= self.steps or now - self._shown >= self.line_seconds:
            self._shown = now
            self.say(self._line(line, now))

    def _line(self, line: Mapping[str, Any], now: float) -> str:
        step = int(line["step"])
        left = (now - self._began) / max(1, step - self._start) * (self.steps - step)
        parts = [f"step {step}/{self.steps} ({step / self.steps:.0%})"]
        parts += [f"{name} {value:.4g}" for name, value in line.items() if name not in NOT_SHOWN]
        parts += [f"{line['samples_per_second']:.0f} samples/s", f"data wait {line['data_share']:.0%}"]
        parts += [f"memory {line['memory_bytes'] / 2**30:.2f} GiB", f"remaining {duration(left)}"]
        return "  ".join(parts)


def duration(seconds: float) -> str:
    """``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def short_figures(line: Mapping[str, Any]) -> str:
    """The figures next to the bar, the most wanted first: a narrow terminal cuts the last ones."""
    shown = [f"loss {line['loss']:.3f}"]
    shown += [
        f"{label} {line[name]:.3f}" for name, label in (("alignment", "align"), ("boundary", "bound")) if name in line
    ]
    shown += [f"lr {line['lr']:.3g}", f"epoch {line['epoch']:.2f}"]
    return " · ".join([*shown, f"{line['samples_per_second']:.0f} img/s", f"data {line['data_share']:.0%}"])


def progress_columns(console: Console) -> Progress:
    """Counter, elapsed and remaining time are never cut; the bar and the figures share what is left of the width."""
    whole = {"no_wrap": True, "overflow": "ignore"}
    return Progress(
        MofNCompleteColumn(table_column=Column(**whole)),  # type: ignore[arg-type]
        TimeElapsedColumn(table_column=Column(**whole)),  # type: ignore[arg-type]
        TimeRemainingColumn(table_column=Column(**whole)),  # type: ignore[arg-type]
        BarColumn(bar_width=None, table_column=Column(ratio=1)),
        TextColumn("{task.fields[figures]}", table_column=Column(ratio=4, no_wrap=True, overflow="ellipsis")),
        console=console,
        refresh_per_second=4,
        expand=True,
    )
