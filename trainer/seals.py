"""Checksums of what is written: of files, and of descriptions (JSON, YAML), which carry one of themselves.

A seal tells damage and unnoticed changes, not forgery. What was written before there were seals opens with a word,
logged once.
"""

import json
import logging
import multiprocessing
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.errors import LceError
from trainer.files import checksum

SEAL_KEY = "seal"

log = logging.getLogger(__name__)
_logged: set[str] = set()


def find_change(path: Path, size: int, crc: int) -> str | None:
    """What has changed of a file of ``size`` bytes and that CRC-32 since it was written, in words; None: nothing."""
    try:
        found = path.stat().st_size
        if found != size:
            return f"{path}: {found} bytes, {size} were written"
        if checksum(path)[1] != crc:
            return f"{path}: content changed since it was written (CRC-32 differs)"
    except OSError as error:
        return f"{path}: {error.strerror or error}"
    return None


def sealed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A description with the checksum of its own content under ``seal``, its first key: a YAML file that is cut short
    loses what stands last."""
    content = json.loads(json.dumps({key: value for key, value in tree.items() if key != SEAL_KEY}))
    return {SEAL_KEY: _crc(content), **content}


def unsealed(tree: Any, source: str | Path, error_type: type[LceError], what: str | None = None) -> Any:
    """The content of a description without its seal, which is compared.

    Args:
        tree: what the file holds; anything but a mapping is handed back.
        source: the file, for messages.
        what: what it describes, for the word on one without a seal; None: no word.

    Raises:
        LceError: of ``error_type``, when the content is not what was sealed.
    """
    if not isinstance(tree, dict):
        return tree
    content = {key: value for key, value in tree.items() if key != SEAL_KEY}
    if SEAL_KEY not in tree:
        if what is not None:
            warn_once(f"{source}: this {what} was written without checksums; damage in it would not be noticed")
    elif tree[SEAL_KEY] != _crc(content):
        raise error_type(
            f"{source}: was changed since it was written (its checksum differs): restore it; if the change is meant, "
            f"remove its line `{SEAL_KEY}`"
        )
    return content


def _crc(content: Mapping[Any, Any]) -> str:
    text = json.dumps({str(key): value for key, value in content.items()}, sort_keys=True, default=str)
    return f"{zlib.crc32(text.encode()):08x}"


def warn_once(text: str) -> None:
    """Log a warning, once in a process and on the first rank alone."""
    child = multiprocessing.parent_process() is not None
    if text not in _logged and not child and os.environ.get("RANK", "0") == "0":
        _logged.add(text)
        log.warning("%s", text)
