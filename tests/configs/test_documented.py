"""Every configuration that a documented command names is accepted, with the words behind it."""

import re
import shlex
from pathlib import Path

import pytest

from trainer.config import is_layer
from trainer.run.config import load_config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "configs").rglob("*.yaml"))]


def commands(text: str) -> list[list[str]]:
    """The words of every command with a file of configs/, continuation lines joined."""
    text = re.sub(r"\\\n#?\s*", " ", text)
    found = []
    for line in text.splitlines():
        if not re.search(r"(lce (launch|plan|config)|-m trainer) .*configs/\S+\.yaml", line):
            continue
        words = shlex.split(line.lstrip("# `").split("`")[0], comments=True)
        found.append([word for word in words if is_layer(word) or re.match(r"[a-z_]+\.[a-z_.]+=[^…]*$", word)])
    return found


EVERY = {tuple(words) for page in PAGES for words in commands(page.read_text(encoding="utf-8")) if words}
FOUND = sorted(words for words in EVERY if (ROOT / words[0]).exists())
"""The others stand for a file of the user's."""


def test_there_are_some() -> None:
    assert len(FOUND) > 10


@pytest.mark.parametrize("words", FOUND, ids=" ".join)
def test_a_documented_command_is_accepted(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    first, *rest = words
    load_config(first, [*rest, "run.dir=runs/x"])
