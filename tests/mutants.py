"""Deliberate mistakes, one at a time in a copy of the repository: for each of tests/mutants.yaml its test must fail.

Example:
  python -m tests.mutants                   # `make mutants`: all of them, some minutes
  python -m tests.mutants margin.py -j 1    # those of one file, one after the other

Exit status: 0 when every mistake is noticed; 1 when one survives; 2 when the list does not fit the code any more.
"""

import argparse
import itertools
import multiprocessing
import os
import queue
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_suffix(".yaml")
COPIED = ("trainer", "launch", "tools", "tests", "configs", "pyproject.toml")
TIMEOUT_SECONDS = 240
TIMES = itertools.count(1_000_000_000)
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed.checkpoint", "numpy", "pydantic", "pytest", "hypothesis"])


@dataclass(frozen=True)
class Mutant:
    """One mistake: in ``file``, ``old`` becomes ``new``, and ``test`` (a pytest id) must fail."""

    file: str
    old: str
    new: str
    test: str

    @property
    def name(self) -> str:
        """For people: the file and what is written in place of what."""
        return f"{self.file}: {' '.join(self.old.split())[:50]} → {' '.join(self.new.split())[:50]}"


def read_list(path: Path = LIST) -> list[Mutant]:
    """The list. Raises KeyError or TypeError for an entry that is none."""
    return [Mutant(**entry) for entry in yaml.safe_load(path.read_text(encoding="utf-8"))]


def misfit(mutant: Mutant, root: Path = ROOT) -> str | None:
    """Why a mutant does not fit the code, or None: its text must stand in the file once, and its test must be there."""
    text = (root / mutant.file).read_text(encoding="utf-8") if (root / mutant.file).is_file() else ""
    if text.count(mutant.old) != 1:
        return f"{mutant.file}: the text stands there {text.count(mutant.old)} times, not once: {mutant.old.strip()}"
    file, _, function = mutant.test.partition("::")
    function = function.partition("[")[0]
    if not (root / file).is_file() or f"def {function}(" not in (root / file).read_text(encoding="utf-8"):
        return f"{mutant.file}: there is no test {mutant.test}"
    return None


def copy_to(folder: Path) -> Path:
    """What tests need, copied to ``folder``."""
    for name in COPIED:
        source, ignored = ROOT / name, shutil.ignore_patterns("__pycache__", "*.so")
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy2(source, folder / name)
    return folder


def _in_copy(root: Path, tests: Sequence[str], log: Path) -> None:
    """Run pytest in a copy, in a child of the fork server: what we have imported from here is forgotten first."""
    for descriptor in (1, 2):
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    os.chdir(root)
    os.environ |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    ours = ("tests", "trainer", "launch", "tools")
    for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
        del sys.modules[name]
    sys.path[:] = [str(root), *(entry for entry in sys.path if entry not in ("", str(ROOT)))]
    sys.exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--durations=0", *tests])))


def run_tests(root: Path, tests: Sequence[str]) -> tuple[int, str]:
    """pytest's exit status in a copy (1: a test failed; −1: it took too long), and the end of its output."""
    log = root / "log"
    log.unlink(missing_ok=True)
    process = CONTEXT.Process(target=_in_copy, args=(root, list(tests), log))
    process.start()
    process.join(TIMEOUT_SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
        return -1, ""
    return process.exitcode, log.read_text(errors="replace")[-2500:] if log.is_file() else ""


def write(path: Path, text: str) -> None:
    """Write a source, with a time of its own: compiled modules are known by a file's size and whole seconds."""
    path.write_text(text, encoding="utf-8")
    os.utime(path, (next(TIMES),) * 2)


def outcome(root: Path, mutant: Mutant) -> str:
    """What happens with a mistake in a copy, which is repaired afterwards: ``killed``, ``survived``, or the problem."""
    path = root / mutant.file
    text = path.read_text(encoding="utf-8")
    try:
        write(path, text.replace(mutant.old, mutant.new))
        status, output = run_tests(root, [mutant.test])
    finally:
        write(path, text)
    if status in (1, -1):
        return "killed"
    return "survived" if status == 0 else f"the test could not run (pytest's exit status {status}): {output}"


def run(mutants: Sequence[Mutant], workers: int, say: Callable[[str], None]) -> dict[str, str]:
    """Make every mistake in one of ``workers`` copies: name → what happened, of those that were not killed.

    The tests must pass without mistakes first.
    """
    lost = {mutant.name: problem for mutant in mutants if (problem := misfit(mutant))}
    if lost:
        return lost
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(workers) as pool:
        copies: queue.Queue[Path] = queue.Queue()
        for number in range(workers):
            copies.put(copy_to(Path(folder) / str(number)))
        status, output = run_tests(Path(folder) / "0", sorted({mutant.test for mutant in mutants}))
        if status != 0:
            return {"without any mistake": f"the tests do not pass: {output}"}

        def one(mutant: Mutant) -> str:
            root = copies.get()
            try:
                return outcome(root, mutant)
            finally:
                copies.put(root)

        results: dict[str, str] = {}
        start = time.monotonic()
        for number, (mutant, result) in enumerate(zip(mutants, pool.map(one, mutants), strict=True), 1):
            say(f"{number}/{len(mutants)} {time.monotonic() - start:4.0f} s  {result.splitlines()[0]}  {mutant.name}")
            if result != "killed":
                results[mutant.name] = f"{result} ({mutant.test})"
        return results


def main() -> int:
    """Run the list, or a part of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="", help="only mutants whose file's path holds this")
    parser.add_argument("-j", "--workers", type=int, default=min(4, len(os.sched_getaffinity(0))), help="at a time")
    args = parser.parse_args()
    chosen = [mutant for mutant in read_list() if args.part in mutant.file]
    if not chosen:
        print(f"{LIST.name} names no file with {args.part}", file=sys.stderr)
        return 2
    wrong = run(chosen, args.workers, lambda line: print(line, flush=True))
    for name, problem in wrong.items():
        print(f"{name}\n  {problem}", file=sys.stderr)
    print(f"{len(chosen)} deliberate mistakes, {len(wrong)} not noticed or not made")
    return 0 if not wrong else 1 if all(p.startswith("survived") for p in wrong.values()) else 2


if __name__ == "__main__":
    sys.exit(main())
