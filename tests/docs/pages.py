"""What the tests read out of the documentation: its pages, their blocks, links and headings."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
_BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, whether it is marked ``not-run``, and its text."""

    language: str
    runs: bool
    text: str

    @property
    def commands(self) -> list[str]:
        """The command lines of a bash block, comments and continuations resolved."""
        joined = self.text.replace("\\\n", " ")
        lines = (line.strip() for line in joined.splitlines())
        return [line for line in lines if line and not line.startswith("#")]


def blocks(page: Path) -> list[Block]:
    """The blocks of a page."""
    found = []
    for label, text in _BLOCK.findall(page.read_text(encoding="utf-8")):
        words = label.split()
        found.append(Block(words[0] if words else "", "not-run" not in words, text))
    return found


def words_of(command: str) -> list[str]:
    """The words of a command line, without its trailing comment."""
    return shlex.split(command, comments=True)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    """The targets of a page's links and pictures."""
    text = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    return re.findall(r"\]\(([^)\s]+)\)", text)
