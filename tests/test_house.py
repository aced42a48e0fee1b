"""The rooms and their order: who may import whom, held by a walk over every import, those inside functions too."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ROOMS = (
    ("trainer",),  # the ground: the files of this folder that have no line of their own
    ("trainer.data",),
    ("trainer.networks",),
    ("trainer.head",),
    ("trainer.checkpoint",),
    ("trainer.models",),
    ("trainer.compat", "trainer.compat.bank"),
    ("trainer.compat.methods",),
    ("trainer.evaluation",),
    ("trainer.gallery",),
    ("trainer.run",),
    ("trainer.planning",),
    ("trainer.api",),
    ("trainer.__main__",),
    ("launch",),
    ("tools",),
    ("tools.pictures",),
    ("tools.demo",),
    ("tools.benchmarks",),
    ("tools.results",),
)
"""From bottom to top: a file imports from its own room and from those that stand above it in this list. Several names
in one line are one room. Only ``import trainer`` itself (the version, the API for users) is free."""

FORBIDDEN = (
    ("trainer.head", "trainer.checkpoint"),
    ("trainer.evaluation", "trainer.compat"),
    ("trainer.gallery", "trainer.compat"),
    ("tools.benchmarks", "tools.demo"),
    ("tools.results", "tools.demo"),
    ("tools.benchmarks", "tools.pictures"),
)
"""What the order would allow and the design does not: (who, whom)."""

KNOWN_CIRCLES: tuple[tuple[str, str], ...] = ()

Arrows = Mapping[str, set[str]]


def modules() -> dict[str, Path]:
    """Every module of the packages, by its dotted name; a package goes by its folder's name."""
    found = {}
    for top in ("trainer", "launch", "tools"):
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, names: Iterable[str]) -> set[str]:
    """The modules among ``names`` that a source imports: at the top, inside functions, for type checking alone."""
    known, found = set(names), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in known else node.module)
    return found & known


def arrows() -> dict[str, set[str]]:
    """Module → the modules of ours that it imports. ``trainer/__init__.py`` is the API for users and is exempt."""
    found = modules()
    return {
        name: imports(path.read_text(encoding="utf-8"), found) - {"trainer"}
        for name, path in found.items()
        if name != "trainer"
    }


def floor(module: str) -> int:
    """The index in :data:`ROOMS` of the room with the longest name that the module's begins with."""
    lengths = [
        (len(room), index)
        for index, rooms in enumerate(ROOMS)
        for room in rooms
        if f"{module}.".startswith(f"{room}.") and (index > 0 or (ROOT / f"{module.replace('.', '/')}.py").is_file())
    ]
    assert lengths, f"{module} lies in no room: add it to ROOMS in {Path(__file__).name}, or move it"
    return max(lengths)[1]


def circles(graph: Arrows) -> list[set[str]]:
    """The groups of nodes that reach each other, and the nodes that reach themselves (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph.get(node, ())):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = set(stack[stack.index(node) :])
            del stack[stack.index(node) :]
            if len(group) > 1 or node in graph.get(node, ()):
                found.append(group)

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def by_room(graph: Arrows) -> dict[str, set[str]]:
    """The same arrows between rooms."""
    found = defaultdict(set)
    for module, targets in graph.items():
        for target in targets:
            if floor(module) != floor(target):
                found[ROOMS[floor(module)][-1]].add(ROOMS[floor(target)][-1])
    return found


def upward(graph: Arrows) -> list[str]:
    """The imports that go against the order, or that are forbidden."""
    found = []
    for module, targets in sorted(graph.items()):
        for target in sorted(targets):
            wrong = floor(target) > floor(module)
            wrong |= any(module.startswith(who) and target.startswith(whom) for who, whom in FORBIDDEN)
            if wrong:
                found.append(f"{module} imports {target}")
    return found


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return arrows()


def test_no_import_goes_up(graph: Arrows) -> None:
    assert upward(graph) == []
    assert circles(by_room(graph)) == []


def test_no_circle_between_files(graph: Arrows) -> None:
    without = {name: {t for t in targets if (name, t) not in KNOWN_CIRCLES} for name, targets in graph.items()}
    assert circles(without) == []


def test_every_room_is_there(graph: Arrows) -> None:
    used = {floor(module) for module in graph}
    assert [rooms for index, rooms in enumerate(ROOMS) if index not in used] == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("trainer.head.margin", "import trainer.compat.bank.boundary"),
        ("trainer.models.card", "def f():\n    from trainer.compat.bank import center_bank"),
        ("trainer.run.task", "from tools.output import write_json"),
        ("trainer.data.order", "if TYPE_CHECKING:\n    from launch.job import Job"),
        ("tools.plan", "from tools.benchmarks import head"),
        ("tools.benchmarks.head", "from tools.demo.upgrade import PLANS"),
    ],
)
def test_a_wrong_import_is_noticed(graph: Arrows, module: str, line: str) -> None:
    added = imports(line, modules())
    assert added
    assert upward({**graph, module: graph[module] | added})


WRITTEN_ONCE = {
    r"0x9E3779B97F4A7C15": {"trainer/randomness.py"},  # SplitMix64
    r"/proc/cpuinfo": {"trainer/machine.py"},
    r"rev-parse": {"trainer/machine.py"},
    r"from rich.progress import": {"trainer/run/display.py", "tools/progress.py"},  # a run's own bar, and the command's
    r"autoescape": {"trainer/evaluation/report.py"},
    r"\bload_exported\b|\bEXIT_NO\b|def write_bank\b|def mixbct\b|\.wait_seconds\b": set(),  # dead
}


@pytest.mark.parametrize("pattern", WRITTEN_ONCE)
def test_what_has_one_place_stands_there_alone(pattern: str) -> None:
    found = {
        str(path.relative_to(ROOT))
        for path in modules().values()
        if re.search(pattern, path.read_text(encoding="utf-8"), re.IGNORECASE)
    }
    assert found == WRITTEN_ONCE[pattern]


def test_threads_that_tests_start_do_not_keep_pytest_from_ending() -> None:
    """Python waits for all but daemons, and what a failed test's thread waits for may never come."""
    waited = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        and ast.unparse(call.func) in ("threading.Thread", "Thread")
        and not any(word.arg == "daemon" for word in call.keywords)
    ]
    assert waited == []


def test_a_circle_is_noticed() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}]
    assert circles({"a": {"b"}, "b": set()}) == []
    with pytest.raises(AssertionError, match="no room"):
        floor("trainer.corridor.door")


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_files_that_a_page_names_are_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:trainer|tests|tools|launch|configs|docs)/[\w./]+)`", text))
    assert len(named) > 5
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_page_lists_the_rooms_in_their_order() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `((?:trainer|launch|tools)[\w./*]*)` \|", text, re.MULTILINE)
    rooms = [("trainer", "*.py"), *(rooms[-1].split(".") for rooms in ROOMS[1:] if rooms[-1] != "trainer.__main__")]
    assert [name.removesuffix(".py") for name in listed] == ["/".join(room).removesuffix(".py") for room in rooms]


def bodies() -> dict[str, list[str]]:
    """What a function of more than one statement does, without docstring and types → where it is written."""
    found = defaultdict(list)
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                if len(body) > 1:
                    arguments = ", ".join(word.arg for word in ast.walk(node.args) if isinstance(word, ast.arg))
                    text = "\n".join(map(ast.unparse, body))
                    found[f"{arguments}:\n{text}"].append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


def test_no_function_is_written_twice() -> None:
    assert [found for found in bodies().values() if len(found) > 1] == []
