"""The documentation's blocks: those that can run here do, in the order in which a reader meets them; all are parsed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import forked
from tests.docs.pages import PAGES, ROOT, Block, blocks, words_of
from tools import cli

STORY = ("quick-start", "python", "upgrades", "gallery-upgrade")  # each goes on in the folder of the one before
SINGLE = tuple(page.stem for page in PAGES if page.parent.name == "docs" and page.stem not in STORY)
FIXTURE = ROOT / "tests" / "data" / "mxnet" / "insightface"
NOT_OURS = ("apt-get", "docker", "make", "npm", "pip", "tar", ".venv/bin/python", "torchrun")
ORIGINS = ROOT / "tests" / "models" / "origins"


def run_page(name: str, folder: Path) -> None:
    """Run the blocks of a page in a folder, which is the working folder."""
    for block in blocks(ROOT / "docs" / f"{name}.md"):
        if block.language == "yaml":
            first, _, rest = block.text.partition("\n")
            (folder / first.removeprefix("# ")).write_text(rest, encoding="utf-8")
        elif block.runs and block.language == "python":
            run_python(["-c", block.text], folder)
        elif block.runs and block.language == "bash":
            for command in block.commands:
                run_line(command, folder)


def run_line(line: str, folder: Path) -> None:
    """Run a line of a bash block; commands of ours that start no process in this one, which is quicker."""
    words = words_of(line)
    if words[:1] == ["lce"] and words[1] != "launch":
        assert cli.main(words[1:]) == 0, line
    elif words[:1] == ["lce"]:
        run_python(["-m", "tools.cli", *words[1:]], folder)
    else:
        run(["bash", "-euc", f'lce() {{ "{sys.executable}" -m tools.cli "$@"; }}\n{line}'], folder)


def environment() -> dict[str, str]:
    """Of the commands: a reader's, with the checkout installed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": path}


def run(command: list[str], folder: Path) -> None:
    """Run a command as a reader would, and fail with what it printed."""
    judge(subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300))


def run_python(words: list[str], folder: Path) -> None:
    """``python WORDS``, without the time that Python needs to start."""
    judge(forked.run(words, cwd=folder, env=environment()))


def judge(done: "subprocess.CompletedProcess[str]") -> None:
    """Fail with what a command printed."""
    assert done.returncode == 0, f"{done.args[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def at_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a folder the working folder of a reader with a checkout."""
    torch.set_num_threads(1)
    (folder / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / ".cache"))


@pytest.mark.slow
def test_the_story_runs_from_pictures_to_an_upgraded_gallery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_home(tmp_path, monkeypatch)
    for name in STORY:
        run_page(name, tmp_path)
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert (tmp_path / "new.onnx").is_file()
    assert (tmp_path / "old-space.onnx").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SINGLE if any(b.runs for b in blocks(ROOT / "docs" / f"{name}.md"))])
def test_a_page_of_its_own_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_home(tmp_path, monkeypatch)
    shutil.copytree(FIXTURE, tmp_path / "insightface")
    shutil.copytree(ORIGINS, tmp_path / "origins")
    run_page(name, tmp_path)


@pytest.mark.parametrize(
    ("page", "block"),
    [
        pytest.param(page, block, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, block in enumerate(blocks(page))
        if block.language == "bash"
    ],
)
def test_every_command_parses(page: Path, block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for command in block.commands:
        words = words_of(command)
        if words[0] == "lce":
            check(words[1:], dry=not block.runs)
        elif not block.runs:
            assert words[0] in NOT_OURS, command


def check(words: list[str], dry: bool) -> None:
    """Parse a command of ours; a launch of files that exist is shown as well, if it is not run anyway."""
    if "--help" in words or "…" in words:
        return
    args = cli.parse(words)
    if dry and words[0] == "launch" and Path(args.config).is_file():
        assert cli.main([*words, "--dry-run", "run.device=cpu"]) == 0


def test_other_blocks_are_marked() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert block.language in ("bash", "python", "yaml", "text"), f"{page}: {block}"
            assert block.language != "yaml" or block.text.startswith("# "), f"{page}: a yaml block names its file"
