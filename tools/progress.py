"""Progress bars on standard error: the one place where the command draws them (a training run's own bar, which shows
figures and becomes lines in a log file, is trainer/run/display.py)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Bars:
    """Several bars below each other, each made when it is first updated."""

    def __init__(self, show: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=Console(stderr=True), disable=not show)
        self._tasks = {}  # type: ignore[var-annotated]  # rich's type, imported when it is needed

    def update(self, key: str, done: int, total: int | None, title: str | None = None) -> None:
        """Move the bar named ``key``, whose title is ``title`` or else its name."""
        if key not in self._tasks:
            self._tasks[key] = self.progress.add_task(title or key, total=total)
        self.progress.update(self._tasks[key], completed=done, total=total, description=title or key)


@contextmanager
def progress_bars(show: bool = True) -> Iterator[Bars]:
    """Bars by name, for work of several kinds."""
    bars = Bars(show)
    with bars.progress:
        yield bars


@contextmanager
def progress_bar(title: str, show: bool = True) -> Iterator[Callable[[int, int], None] | None]:
    """A bar as a callback ``(done, total)``; None (no bar) where ``show`` is False."""
    if not show:
        yield None
        return
    with progress_bars() as bars:
        bars.update(title, 0, None)
        yield lambda done, total: bars.update(title, done, total)
