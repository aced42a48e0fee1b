"""A command that writes is killed before each of its operations on the file system. What it leaves is what was there,
or the whole of what it makes, or refused by name; the same command then makes the whole."""

import contextlib
import functools
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests import forked
from tests.attack import amounts, tally
from tests.data.samples import identity_folders, packed
from tests.models.test_export import SIZE, saved
from tools.cli import main
from trainer.compat.bank.center_bank import CenterBank
from trainer.data.checksums import CHECKSUMS
from trainer.data.index import open_dataset
from trainer.errors import LceError
from trainer.models.open import load_model

pytestmark = pytest.mark.slow

KILLED = """
import os, signal, sys
left = int(sys.argv[1])
def counted(name):
    real = getattr(os, name)
    def call(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(os, name, call)
for name in ("rename", "replace", "unlink", "mkdir", "rmdir", "link", "fsync", "ftruncate"):
    counted(name)
from tools.cli import main
status = main(sys.argv[2:])
print("operations left", left)
sys.exit(status)
"""
MANY = 10**6
GRAPH = Path(__file__).parents[1] / "models/origins/faceres/model.json"

Found = object
"""What a reader gets from an output; None: it is refused, or not there."""


@dataclass
class Case:
    """A command, an earlier one over whose output it writes, and who reads what they make."""

    words: list[object]
    readers: list[Callable[[], Found]]
    earlier: list[object] | None = None
    prepare: Callable[[], object] = lambda: None

    def found(self) -> list[Found]:
        return [read(reader) for reader in self.readers]


def read(reader: Callable[[], Found]) -> Found:
    with contextlib.suppress(LceError):
        return reader()
    return None


def table(data: Path, path: Path) -> Found:
    dataset = open_dataset(data, path)
    return dataset.num_classes, dataset.labels.tobytes()


def records(path: Path) -> Found:
    dataset = open_dataset(path)
    return len(dataset), b"".join(dataset.decode(k).tobytes() for k in range(len(dataset)))


def sealed(path: Path) -> Found:
    return (path / CHECKSUMS).exists(), records(path)


def bank(path: Path) -> Found:
    opened = CenterBank.open(path)
    opened.verify()
    return opened.fingerprint


def model(path: Path) -> Found:
    opened = load_model(path)
    return opened.hash, opened.reading, opened.card


def stored(path: Path) -> Found:
    return np.load(path).tobytes()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    packed(folder, 6, 8, SIZE)
    identity_folders(folder / "faces", 4, 6)
    saved(folder / "model", "linear", "t12")
    draw = np.random.default_rng(0)
    np.save(folder / "gallery.npy", draw.normal(size=(300, 24)).astype(np.float32))
    np.save(folder / "rows.npy", draw.normal(size=(300, 8)).astype(np.float32))
    np.save(folder / "classes.npy", np.arange(300) % 7)
    return folder


def cases(base: Path, out: Path) -> dict[str, Case]:
    data, made, tables = base / "packed", out / "made", ("old", "new", "unseen")
    split = ["split", data, made, "--unseen", "0.3", "--share"]
    centers = ["centers", "from-embeddings", base / "rows.npy", made, "--labels", base / "classes.npy"]
    export = ["export", base / "model", made, "--dataset", data, "--licence"]
    convert = ["model", "convert", GRAPH, "--write", made.with_suffix(".onnx"), "--force", "--output", "embedding"]
    gallery = made.with_suffix(".npy")
    return {
        "split": Case(
            [*split, "0.5", "--seed", "1"],
            [functools.partial(table, data, made / f"{name}.npy") for name in tables],
            [*split, "0.3"],
        ),
        "pack": Case(
            ["pack", base / "faces", made, "--part-records", "7", "--processes", "1", "--size", "64"],
            [lambda: records(made)],
        ),
        "check --seal": Case(
            ["check", made, "--seal", "--processes", "1"],
            [lambda: sealed(made)],
            prepare=lambda: shutil.copytree(data, made, ignore=shutil.ignore_patterns(CHECKSUMS, "*.crc.npy")),
        ),
        "centers": Case([*centers, "--force"], [lambda: bank(made)], [*centers, "--storage", "int8"]),
        "export": Case([*export, "b"], [lambda: model(made)], [*export, "a"]),
        "model convert": Case(
            [*convert, "--pixels", "0..255"], [lambda: model(made.with_suffix(".onnx"))], [*convert, "--pixels", "0..1"]
        ),
        "gallery upgrade": Case(
            ["gallery", "upgrade", gallery, "--model", base / "model", "--batch", "100"],
            [lambda: stored(gallery)],
            prepare=lambda: shutil.copy(base / "gallery.npy", gallery),
        ),
    }


NAMES = list(cases(Path(), Path()))


@pytest.mark.parametrize("name", NAMES)
@amounts(1, 12, 60)
def test_a_killed_command_leaves_nothing_half_made(base: Path, tmp_path: Path, amount: int, name: str) -> None:
    case, out = cases(base, tmp_path / "out")[name], tmp_path / "out"

    def begin(earlier: bool) -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        case.prepare()
        if earlier and case.earlier is not None:
            assert main(list(map(str, case.earlier))) == 0

    def attempt(operations: int) -> tuple[int, str]:
        done = forked.run(["-c", KILLED, str(operations), *map(str, case.words)])
        return done.returncode, done.stdout

    begin(False)
    status, output = attempt(MANY)
    assert status == 0, output
    count, after = MANY - int(output.split()[-1]), case.found()
    assert None not in after
    draw = random.Random(amount)
    moments = sorted(draw.sample(range(count), min(amount, count)))
    for moment in moments:
        begin(earlier := draw.random() < 0.5 or amount == 1)
        before = case.found()
        assert attempt(moment)[0] == -9
        found, where = case.found(), f"killed before operation {moment + 1} of {count}, over an earlier one: {earlier}"
        kinds = {
            "before" if one == old else "after" if one == new else "neither"
            for one, old, new in zip(found, before, after, strict=True)
            if one is not None and old != new
        }
        tally(f"killed: lce {name}", "handled" if kinds in (set(), {"before"}, {"after"}) else "silent")
        assert kinds in (set(), {"before"}, {"after"}), where
        assert attempt(MANY)[0] == 0, where
        assert case.found() == after, where
        assert not [file.name for file in out.rglob(".*.partial*")], where
