"""The words of the repository: library messages name arguments and not options, and no house word is left."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tools.cli import build_parser, translated

ROOT = Path(__file__).parents[1]
COMMAND = re.compile(r"`+lce [^`]*`+|\b(?:docker run|pip install) [^;,]*")
OPTION = re.compile(r"(?<!var\()(?<![\w{;-])--[a-z][a-z-]*")  # --name: and var(--name) are variables of a style sheet


def strings(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of all string literals, docstrings too; the values in an f-string appear as …"""
    tree = ast.parse(source)
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield (
                node.lineno,
                "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values),
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.lineno, node.value


def options(source: str) -> list[tuple[int, str]]:
    """(line, option) of the options that string literals name outside of a whole command; an argument of a process
    is a literal of its own."""
    return [
        (line, option)
        for line, text in strings(source)
        if not re.fullmatch(r"--[\w=-]+", text)
        for option in OPTION.findall(COMMAND.sub("", text))
    ]


def test_the_library_names_arguments_and_no_options() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {option}"
        for path in sorted((ROOT / "trainer").rglob("*.py"))
        for line, option in options(path.read_text(encoding="utf-8"))
    ]
    assert found == []
    assert options('f"--quality {q}: from 1 to 100"') == [(1, "--quality")]
    assert options('"remove it (--force replaces it), or `lce check D --seal`"') == [(1, "--force")]
    assert options('run("git", "--version")') == []


def test_the_arguments_that_the_library_names_are_options_of_the_command() -> None:
    """A sample of messages, each as the command prints it that reaches it."""
    for command, said, printed in (
        ("pack", "`quality` 0, `mean`, `std`, `max_pixels` 5", "--quality 0, --mean, --std, --max-pixels 5"),
        ("centers", "`batch_size` 0; (`force` replaces it); `map`", "--batch-size 0; (--force replaces it); --map"),
        ("centers", "`key`, `layout` or `old_classes`; `ranks` 1", "--key, --layout or --old-classes; --ranks 1"),
        ("evaluate", "`no_colour_check`, `norm_weights`, `size` 1", "--no-colour-check, --norm-weights, --size 1"),
        ("plan", "`simulate`: train.parallel", "--simulate: train.parallel"),
        ("gallery", "`key`, `column`, `table`, `vector`", "--key, --column, --table, --vector"),
    ):
        parser = build_parser([command], arguments=True)
        assert translated(said, parser) == printed
