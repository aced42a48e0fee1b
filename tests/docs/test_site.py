"""The site of `make docs`: every page has text, every link leads somewhere, the search knows all of it."""

import html
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.docs.pages import ROOT
from tools.cli import COMMANDS

SCRIPT = ROOT / "docs/build_site.py"
pytest.importorskip("pdoc", reason="needs pdoc (extra `docs`)")


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_site", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def broken(site: Path, outside: str = "") -> list[str]:
    """Links and pictures of the pages that lead nowhere; those into a folder that is not built are left out."""
    texts = {page: page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    lost = []
    for page, text in texts.items():
        for link in re.findall(r'(?:href|src)="([^"]+)"', re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)):
            name, _, anchor = html.unescape(link).partition("#")
            if re.match(r"[a-z]+:", name) or (outside and name.startswith(outside)):
                continue
            target = (page.parent / name).resolve() if name else page
            there = target.is_file() and (not anchor or target not in texts or f'id="{anchor}"' in texts[target])
            if not there:
                lost.append(f"{page.relative_to(site)}: {link}")
    return lost


def blank(site: Path) -> list[str]:
    """Pages with next to no text, and no list of further pages."""
    pages = {page: page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    main = {page: re.findall(r"<main.*</main>", text, re.DOTALL) for page, text in pages.items()}
    text = {page: re.sub(r"<[^>]*>|\s", "", found[0]) for page, found in main.items() if found}
    return [str(page) for page in text if len(text[page]) < 150 and "<li><a" not in main[page][0]]


def test_guides_and_commands_of_the_site(builder: ModuleType, tmp_path: Path) -> None:
    builder.guides(tmp_path)
    builder.search(tmp_path)
    assert broken(tmp_path, outside="api/") == []
    assert blank(tmp_path) == []
    names = {page.stem for page in tmp_path.glob("*.html")}
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} - {"README"} <= names
    start = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "pictures/space.svg" in start
    assert "make demo" in start
    assert "not-run" not in start
    commands = (tmp_path / "commands.html").read_text(encoding="utf-8")
    assert all(f'<h2 id="{name}">' in commands for name in COMMANDS)
    assert '<h3 id="gallery-upgrade">' in commands
    script = (tmp_path / "search.js").read_text(encoding="utf-8")
    entries = json.loads(script[len("const ENTRIES = ") : script.index("];") + 1])
    assert any(entry["url"] == "commands.html#plan" and "--memory" in entry["text"] for entry in entries)
    assert "prefers-color-scheme: dark" in (tmp_path / "style.css").read_text()
    (tmp_path / "index.html").write_text('<main><a href="no.html">x</a><a href="slurm.html#no">y</a></main>')
    assert len(broken(tmp_path, outside="api/")) == 2
    assert len(blank(tmp_path)) == 1


@pytest.mark.slow
def test_the_whole_site_builds_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not done.stderr
    site = tmp_path / "site"
    assert "PartialFC" in (site / "api/trainer/head/partial_fc.html").read_text(encoding="utf-8")
    assert not any("PydanticUndefined" in page.read_text(encoding="utf-8") for page in site.rglob("*.[hj][ts]*"))
    assert "trainer/head/partial_fc.html#PartialFC" in (site / "search.js").read_text(encoding="utf-8")
    assert broken(site) == []
    assert blank(site) == []
