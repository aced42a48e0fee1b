"""The pages against the code: links, quoted messages, tables of typefaces and recipes, pictures."""

import ast
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.configs.test_recipes import load
from tests.docs.pages import PAGES, ROOT, anchors, links
from tools.cli import COMMANDS
from tools.pictures.typefaces import CATALOGUE

DOCS = ROOT / "docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}"


def test_the_index_names_every_page() -> None:
    named = set(links(DOCS / "README.md"))
    assert {page.name for page in DOCS.glob("*.md")} - {"README.md"} == named


def test_pictures_are_used_and_well_formed() -> None:
    used = {link for page in DOCS.glob("*.md") for link in links(page) if link.endswith((".svg", ".png"))}
    assert used == {f"pictures/{path.name}" for path in (DOCS / "pictures").iterdir()}
    for picture in (name for name in used if name.endswith(".svg")):
        root = ElementTree.parse(DOCS / picture).getroot()
        assert root.find("{http://www.w3.org/2000/svg}title") is not None


def texts() -> list[str]:
    """Every string in the source, formatted parts as a gap."""
    found = []
    for folder in ("trainer", "launch", "tools"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def missing_messages(messages: list[str], source: list[str]) -> list[str]:
    """The messages that no string of the source can give; ``…`` and formatted parts stand for anything."""
    gaps = [
        re.compile(".*".join(re.escape(part) for part in text.split("\0")), re.DOTALL)
        for text in source
        if len(text) > 20
    ]
    lost = []
    for message in messages:
        pattern = ".*".join(re.escape(part) for part in message.split("…"))
        solid = max(message.split("…"), key=len)
        given = any(solid in text and re.search(pattern, text.replace("\0", "…"), re.DOTALL) for text in source)
        if not (given or any(gap.fullmatch(message) for gap in gaps)):
            lost.append(message)
    return lost


def test_quoted_messages_are_what_the_code_says() -> None:
    messages = [
        line.removeprefix("### `").removesuffix("`")
        for line in (DOCS / "troubleshooting.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("### ")
    ]
    assert len(messages) > 25
    source = texts()
    assert missing_messages(messages, source) == []
    assert missing_messages(["…: no such thing was ever said by this code"], source) != []


def test_typefaces_of_the_page_are_those_of_the_code() -> None:
    page = (DOCS / "characters.md").read_text(encoding="utf-8")
    for face in CATALOGUE:
        assert f"| {face.name} | {face.scripts} | {face.package} | {face.licence} |" in page
    assert page.count("| fonts-") == len(CATALOGUE)


def test_recipes_of_the_page_are_those_of_the_files() -> None:
    rows = re.findall(
        r"`(vit-)?(\d+)\.yaml` \| ([\d,]+)(?: in (\d+) batches)? \| ([\d.]+)", (DOCS / "recipes.md").read_text()
    )
    assert len(rows) == 8
    for kind, gpus, images, batches, rate in rows:
        config = load("wf42m", "vit-b" if kind else "r50", int(gpus))
        assert config.data.batch_size * config.train.accumulate == int(images.replace(",", ""))
        assert config.train.accumulate == int(batches or 1)
        assert config.optimizer.lr == float(rate)


def test_the_readme_names_every_command_and_stays_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"`lce {command}" in text for command in COMMANDS)
    assert len(text.splitlines()) <= 120


def test_the_table_of_attacks_is_the_one_that_they_wrote() -> None:
    assert (ROOT / "tests/attack/table.md").read_text() in (DOCS / "reliability.md").read_text()
