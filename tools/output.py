"""Figures of a command as JSON."""

import json
import sys
from pathlib import Path
from typing import Any


def write_json(figures: Any, target: str | Path | None) -> None:
    """Write figures as ``--json TARGET`` asks: to a file, to standard output (``-``), or (None) not at all.

    Raises:
        LceError: the file cannot be written.
    """
    from trainer.errors import LceError
    from trainer.files import replaced

    if target is None:
        return
    text = json.dumps(figures, indent=1, ensure_ascii=False) + "\n"
    if str(target) == "-":
        sys.stdout.write(text)
    else:
        with replaced(Path(target), LceError) as partial:
            partial.write_text(text, encoding="utf-8")
