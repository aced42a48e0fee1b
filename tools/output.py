"""Figures of a command: as JSON, and as tables."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


_NUMBERS = re.compile(r"\[\n\s*([-+.\deE]+(?:,\n\s*[-+.\deE]+)*)\n\s*\]")


def table_console(target: str | Path | None, width: int) -> "Console":
    """Where tables go: standard error if the JSON (``--json TARGET``) takes standard output, and ``width`` columns
    if it is no terminal."""
    from rich.console import Console

    console = Console(stderr=str(target) == "-", highlight=False)
    if not console.is_terminal:
        console.width = width
    return console


def write_json(figures: Any, target: str | Path | None) -> None:
    """Write figures as ``--json TARGET`` asks: to a file, to standard output (``-``), or (None) not at all. A list of
    numbers takes one line.

    Raises:
        LceError: the file cannot be written.
    """
    from trainer.errors import LceError
    from trainer.files import replaced

    if target is None:
        return
    text = json.dumps(figures, indent=1, ensure_ascii=False) + "\n"
    text = _NUMBERS.sub(lambda found: "[" + re.sub(r"\n\s*", " ", found[1]) + "]", text)
    if str(target) == "-":
        print(text, end="")
    else:
        with replaced(Path(target), LceError) as partial:
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def check_writable(option: str, target: Path) -> None:
    """Refuse a file that cannot be written, before the work whose outcome it is to hold.

    Raises:
        LceError: with the option.
    """
    from trainer.errors import LceError
    from trainer.files import why_unwritable

    if target.is_dir():
        raise LceError(f"{option} {target}: is a folder; name a file in it")
    folder = target.absolute().parent
    reason = why_unwritable(folder)
    if reason is not None:
        raise LceError(f"{option} {target}: {folder}: {reason}")


def size_text(size: float) -> str:
    """Bytes for people, such as ``1.50 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")
