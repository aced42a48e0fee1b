"""Figures of a command as JSON."""

import json
import sys
from pathlib import Path
from typing import Any

from trainer.errors import LceError
from trainer.files import replaced


def write_json(target: str | None, figures: Any) -> None:
    """Write figures as ``--json TARGET`` asks: to a file, to standard output (``-``), or (None) not at all.

    Raises:
        LceError: the file cannot be written.
    """
    if not target:
        return
    text = json.dumps(figures, indent=1, ensure_ascii=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        with replaced(Path(target), LceError) as partial:
            partial.write_text(text, encoding="utf-8")
