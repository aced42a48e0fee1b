"""The words of the repository: library messages name arguments and not options, and no house word is left."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from tools.cli import build_parser, translated

ROOT = Path(__file__).parents[1]
COMMAND = re.compile(r"`+lce [^`]*`+|\b(?:docker run|pip install) [^;,]*|\(srun [^)]*")
OPTION = re.compile(r"(?<!var\()(?<![\w{;-])--[a-z][a-z-]*")  # --name: and var(--name) are variables of a style sheet

HOUSE_WORDS = {
    # what is not written → what is
    r"(has|have) not\b(?! (yet )?(been|begun|come|run|\w+ed)\b)": "does not have",
    r"made[- ]up\b": "synthetic",
    r"passed over|pass(es|ing)? over (them|damaged|bad|records)|to pass over": "skip",
    r"said once": "logged once",
    r"(dozens|thousands|verdict|faces) of people": "identities",
    r"(a|new|each|every|another|whole) training(?! (run|batch|set|image|task|checkpoint|step|loop|data|log)\w*)"
    r"(?=[,.;:)'’]| (with|on|in|by|for|from|that|which|is|failed|resumes)\b)": "training run",
    r"trainings": "training runs",
    r"how-?manieth": "which repetition",
    r"mend(s|ed|ing)?": "repair, correct",
    r"beside": "next to, besides",
    r"that (is|are) not there": "does not exist, simulated",
    r"other people's": "foreign",
}
ALLOWED = {
    # file: the words that it holds for a reason
    "tests/test_words.py": "the list itself",
}


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
        if not re.fullmatch(r"--[\w-]+(=\S*)?", text)
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


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of what people read in a file: all of a page; of Python the strings, docstrings and comments; of
    other files the comments. Names of code, in backquotes, are left out."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from strings(source)
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        yield from ((token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT)
    elif path.suffix in (".md", ".j2", ".html"):
        yield 1, source
    else:
        yield 1, "\n".join(line for line in source.splitlines() if re.search(r"(^|\s)(#|//|/?\*)", line))


def house_words(text: str) -> list[str]:
    """The house words in a text, with what is written instead."""
    plain = re.sub(r"`[^`\n]*`", "`…`", text)
    plain = re.sub(r"\s+(#|//)? *", " ", plain)
    return [
        f"{match[0]!r}: write {better}"
        for word, better in HOUSE_WORDS.items()
        for match in re.finditer(rf"\b(?:{word})(?!\w)", plain, re.IGNORECASE)
    ]


def test_no_house_word_is_left() -> None:
    folders = ("trainer", "launch", "tools", "tests", "docs", "configs", "benchmarks")
    kinds = {".py", ".md", ".cpp", ".yaml", ".j2", ".html", ".css"}
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*")) if path.suffix in kinds]
    paths += [*ROOT.glob("*.md"), ROOT / "Makefile", ROOT / "pyproject.toml"]
    assert len(paths) > 200
    found = [
        f"{path.relative_to(ROOT)}:{line}: {word}"
        for path in paths
        if str(path.relative_to(ROOT)) not in ALLOWED
        for line, text in prose(path)
        for word in house_words(text)
    ]
    assert found == []


NAMES_THAT_HIDE = {
    "study",
    "story",
    "lab",
    "told",
    "way",
    "words",
    "note",
    "place",
    "look",
    "beside",
    "Note",
    "Study",
    "Story",
    "Told",
    "Lab",
    "Way",
    "Side",
}
"""Words of a tale, as names of classes, functions and attributes."""
LOCAL_NAMES_THAT_HIDE = {"words", "place", "note", "told", "way", "look", "study", "story", "lab"}
"""As names of arguments and variables: what they hold has a name, such as overrides, index, file or status."""


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of the classes, functions and attributes that a source defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        if isinstance(node, ast.ClassDef):
            found = [part.target for part in node.body if isinstance(part, ast.AnnAssign)]
            yield from ((name.lineno, name.id) for name in found if isinstance(name, ast.Name))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def local_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of the arguments and variables of a source."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            yield node.lineno, node.arg
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id


def test_names_say_what_a_thing_is() -> None:
    found = []
    for folder in ("trainer", "launch", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for kind, hiding in ((names, NAMES_THAT_HIDE), (local_names, LOCAL_NAMES_THAT_HIDE)):
                found += [
                    f"{path.relative_to(ROOT)}:{line}: {name}" for line, name in kind(tree) if name.strip("_") in hiding
                ]
    assert found == []
    assert [name for _, name in local_names(ast.parse("def f(words): place = note = 1"))] == ["words", "place", "note"]
    assert {name for _, name in names(ast.parse("class Way:\n    words: str\n    def told(self): self.study = 1"))} == {
        "Way", "words", "told", "study"
    }  # fmt: skip


def test_the_list_knows_a_house_word_from_plain_english() -> None:
    for text in (
        "a card that this machine has not; see",
        "made-up images",
        "damaged records are passed\nover: 3",
        "# each with a\n# training, and take",
        "ranks of 512 that are not there",
        "beside it",
        "mend it",
    ):
        assert house_words(text), text
    for text in (
        "it has not finished",
        "one pass over the rows",
        "besides",
        "a training run on it",
        "`beside`",
        "recommended",
        "has not been read",
    ):
        assert not house_words(text), text
