"""Build the site into a folder: start page, guides, results, commands from their parsers, API from the docstrings.

A search covers all of it; it is light or dark as the reader's system is. Any warning is an error.

Example:
  python docs/build_site.py build/docs
"""

import argparse
import html
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import markdown2
import pdoc
from pdoc import docstrings, render
from pygments.formatters import HtmlFormatter

from tools.cli import COMMANDS, build_parser

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# Ours: what other projects import. launch/ and tools/ are commands, which have --help.
PACKAGES = ("trainer",)
_ROLE = re.compile(r":(?:class|func|mod|meth|attr|data|exc):`~?([^`]+)`")
_MISSING = re.compile(r"\s*=\s*<span class=\"default_value\">PydanticUndefined</span>|\s*=\s*PydanticUndefined")
_LIGHT = """--pdoc-background: #fff; --text: #212529; --muted: #5d656d; --link: #1058ad; --link-hover: #0a3d7a;
--code: #f6f7f8; --active: #fff3cd; --accent: #eef0f2; --accent2: #c1c6cb; --nav-hover: #e5e7ea; --name: #0058ad;
--def: #007020; --annotation: #006f87;"""
_DARK = """--pdoc-background: #16181b; --text: #e3e5e8; --muted: #a2a9b0; --link: #7db8ff; --link-hover: #b3d6ff;
--code: #23272b; --active: #4a4320; --accent: #2a2e33; --accent2: #565d64; --nav-hover: #33383e; --name: #84bdff;
--def: #7fd18b; --annotation: #66c7d9; color-scheme: dark;"""
_THEME = f":root {{ {_LIGHT} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}\n"
_STYLE = """
body { margin: 0; display: flex; font: 16px/1.6 system-ui, sans-serif;
  background: var(--pdoc-background); color: var(--text) }
nav { flex: 0 0 15rem; height: 100vh; position: sticky; top: 0; overflow: auto; box-sizing: border-box; padding: 1rem;
  background: var(--accent) }
nav a { display: block; padding: .15rem 0 }
main { flex: 1; min-width: 0; max-width: 60rem; padding: 1rem 2rem 4rem }
a { color: var(--link) } a:hover { color: var(--link-hover) }
img { max-width: 100%; background: #fff; border-radius: 6px }
pre { overflow: auto; padding: .8rem; border-radius: 6px } pre, code { background: var(--code) }
table { border-collapse: collapse; display: block; overflow: auto }
td, th { border: 1px solid var(--accent2); padding: .3rem .6rem; text-align: left; vertical-align: top }
input { width: 100%; box-sizing: border-box; padding: .4rem; font: inherit }
small { color: var(--muted) }
@media (max-width: 50rem) { body { display: block } nav { height: auto; position: static } main { padding: 1rem } }
"""
_SEARCH = """
const field = document.querySelector("#search"), main = document.querySelector("main"), page = main.innerHTML;
field.addEventListener("input", () => {
  const words = field.value.toLowerCase().split(/\\s+/).filter(Boolean);
  if (!words.length) { main.innerHTML = page; return; }
  const rank = entry => words.every(word => entry.title.toLowerCase().includes(word)) ? 0 : 1;
  const all = entry => (entry.title + " " + entry.text).toLowerCase();
  const found = ENTRIES.filter(entry => words.every(word => all(entry).includes(word)));
  main.replaceChildren(...found.sort((a, b) => rank(a) - rank(b)).slice(0, 60).map(entry => {
    const link = Object.assign(document.createElement("a"), { href: entry.url, textContent: entry.title });
    const at = Math.max(0, entry.text.toLowerCase().indexOf(words[0]) - 60);
    const shown = Object.assign(document.createElement("small"), { textContent: entry.text.slice(at, at + 200) });
    const line = document.createElement("p");
    line.append(link, document.createElement("br"), shown);
    return line;
  }), ...(found.length ? [] : ["Nothing found."]));
});
"""


def guides(out: Path) -> None:
    """Write the start page, the guides and the command reference."""
    shutil.copytree(DOCS / "pictures", out / "pictures", dirs_exist_ok=True)
    (out / "style.css").write_text(_THEME + _STYLE, encoding="utf-8")
    pages = [*sorted(DOCS.glob("*.md")), ROOT / "CONTRIBUTING.md"]
    texts = {page.stem: page.read_text(encoding="utf-8") for page in pages if page.stem != "README"}
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    order = list(dict.fromkeys(re.findall(r"\]\(([\w-]+)\.md\)", index)))
    titles = {"index": "Start", **{name: texts[name].splitlines()[0].removeprefix("# ") for name in order}}
    titles |= {"CONTRIBUTING": "Contributing", "commands": "Commands"}
    links = "".join(f'<a href="{name}.html">{html.escape(title)}</a>' for name, title in titles.items())
    links += '<a href="api/index.html">Python API</a>'
    for name, text in {"index": _start(index), **texts}.items():
        _write(out / f"{name}.html", titles[name], _html(text), links)
    _write(out / "commands.html", "Commands", _commands(), links)


def _start(index: str) -> str:
    """The start page: what it is, the picture and the two commands, as README.md has them, and the index."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    intro, fence, rest = readme.partition("```bash")
    commands = fence + rest.partition("```\n")[0] + "```\n"
    picture = "![The old space, a new one, and a new one that is compatible](pictures/space.svg)"
    return f"{intro}{picture}\n\n{commands}\n{index.partition('API reference:')[0].replace('# Doc', '## Doc', 1)}"


def _html(text: str) -> str:
    """A page's Markdown as HTML, its links those of the site, its headings with GitHub's anchors."""
    text = re.sub(r"^```\w.*$", "```", text, flags=re.MULTILINE)  # language and not-run are for the tests
    text = re.sub(r"\]\((?:\.\./|docs/)?(README|[\w-]+)\.md(#[\w-]+)?\)", _page, text)
    text = re.sub(r"\[([^\]]+)\]\(\.\./([^)]+)\)", r"\1 (`\2`)", text)  # what lies in a checkout alone
    body = str(markdown2.markdown(text, extras=["tables", "fenced-code-blocks", "cuddled-lists"]))
    return re.sub(r"<(h[1-4])>(.*?)</\1>", _heading, body, flags=re.DOTALL)


def _page(link: re.Match[str]) -> str:
    name = "index" if link[1] == "README" else link[1]
    return f"]({name}.html{link[2] or ''})"


def _heading(heading: re.Match[str]) -> str:
    plain = html.unescape(re.sub(r"<.*?>", "", heading[2]))
    anchor = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
    return f'<{heading[1]} id="{html.escape(anchor)}">{heading[2]}</{heading[1]}>'


def _commands() -> str:
    """``--help`` of every command and of its own subcommands."""
    parts = ["<h1>Commands</h1><p>What <code>lce COMMAND --help</code> prints.</p>"]
    os.environ["COLUMNS"] = "110"
    (commands,) = _subparsers(build_parser(COMMANDS))
    for name, parser in commands.choices.items():
        parts.append(f'<h2 id="{name}">lce {name}</h2><pre>{html.escape(parser.format_help())}</pre>')
        for actions in _subparsers(parser):
            for action, own in actions.choices.items():
                parts.append(f'<h3 id="{name}-{action}">lce {name} {action}</h3>')
                parts.append(f"<pre>{html.escape(own.format_help())}</pre>")
    return "".join(parts)


def _subparsers(parser: argparse.ArgumentParser) -> list["argparse._SubParsersAction[argparse.ArgumentParser]"]:
    return [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]


def _write(path: Path, title: str, body: str, links: str) -> None:
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)} · lce-trainer</title>"
        f'<link rel="stylesheet" href="style.css"><body><nav><input id="search" type="search" placeholder="Search" '
        f'aria-label="Search">{links}</nav><main>{body}</main><script src="search.js"></script></body></html>\n',
        encoding="utf-8",
    )


def api(out: Path) -> None:
    """Write the pages of :data:`PACKAGES`."""
    google = docstrings.google
    docstrings.google = lambda text: google(_ROLE.sub(r"`\1`", text))  # roles name what pdoc links by itself
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        (Path(folder) / "theme.css").write_text(_THEME, encoding="utf-8")
        dark = HtmlFormatter(style="github-dark").get_style_defs(".pdoc-code")
        light = HtmlFormatter(style="default").get_style_defs(".pdoc-code")
        styles = (
            f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}\n.pdoc-code {{ background: var(--code) }}\n"
        )
        (Path(folder) / "syntax-highlighting.css").write_text(styles, encoding="utf-8")
        render.configure(docformat="google", footer_text="lce-trainer", search=True, template_directory=Path(folder))
        pdoc.pdoc(*PACKAGES, output_directory=out)
    index = out / "search.js"
    index.write_text(index.read_text(encoding="utf-8").replace("PydanticUndefined", "…"), encoding="utf-8")
    pages = {page: page.read_text(encoding="utf-8") for page in sorted(out.rglob("*.html"))}
    for page, text in pages.items():
        start = os.path.relpath(out.parent / "index.html", page.parent)
        link = f'<nav class="pdoc"><a href="{start}" style="padding: 1rem">← Documentation</a>'
        ids = set(re.findall(r'id="([^"]+)"', text))  # what is private is linked to, but not shown
        text = re.sub(r'<a href="#([^"]+)"[^>]*>(.*?)</a>', lambda a, ids=ids: a[0] if a[1] in ids else a[2], text)
        text = _MISSING.sub("", text).replace('<nav class="pdoc">', link, 1)
        page.write_text(text.replace("</main>", f"{_modules(page, pages)}</main>"), encoding="utf-8")


def _modules(page: Path, pages: dict[Path, str]) -> str:
    """What the modules of a package are for: without it a package's page has little but its name."""
    items = []
    for module in (module for module in pages if module.parent == page.with_suffix("")):
        first = re.search(r'<div class="docstring"><p>(.*?)</p>', pages[module], re.DOTALL)
        plain = re.sub(r"<[^>]*>", "", first[1]) if first else ""
        items.append(f'<li><a href="{page.stem}/{module.name}">{module.stem}</a> {plain}</li>')
    return f'<section style="padding: 0 2rem"><ul>{"".join(items)}</ul></section>' if items else ""


def search(out: Path) -> None:
    """Write the index of all pages, by sections, and the script that looks into it."""
    entries = []
    for page in sorted(out.rglob("*.html")):
        text = page.read_text(encoding="utf-8")
        title = re.sub(r" ·.*| API documentation", "", (re.findall("<title>(.*?)</title>", text) or [page.stem])[0])
        body = re.sub(
            r"<(script|style|nav|details).*?</\1>|<div class=\"pdoc-code.*?</div>", " ", text, flags=re.DOTALL
        )
        parts = re.split(r'<(?:section|h[1-3]) id="([^"]+)"', body)
        for anchor, part in zip(["", *parts[1::2]], parts[::2], strict=True):
            words = " ".join(html.unescape(re.sub(r"<[^>]*>", " ", f"<{part}")).split())
            url = page.relative_to(out).as_posix() + (f"#{anchor}" if anchor else "")
            name = f"{html.unescape(title)} – {anchor}" if anchor else html.unescape(title)
            entries.append({"title": name, "url": url, "text": words[: 300 if url.startswith("api/") else 2000]})
    (out / "search.js").write_text(
        f"const ENTRIES = {json.dumps(entries, ensure_ascii=False)};{_SEARCH}", encoding="utf-8"
    )


def build(out: Path) -> None:
    """Write the whole site."""
    out.mkdir(parents=True, exist_ok=True)
    guides(out)
    api(out / "api")
    search(out)


if __name__ == "__main__":
    build(Path(sys.argv[1] if len(sys.argv) > 1 else "build/docs"))
