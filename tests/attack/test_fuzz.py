"""Files with seeded damage: every reader gives what was written, or refuses in one line; nothing is silently wrong.

Flipped bits, cut ends, rolled, zeroed, inserted and repeated bytes, empty files, in every kind of file that the product
writes or reads. A configuration is the user's own and has no checksum: it is read or refused.
"""

import json
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.attack import amounts, tally
from tests.compat.test_center_bank import written
from tests.data.samples import identity_folders, packed
from tests.models.test_export import images, saved
from tests.runs import tree
from tests.test_seals import checkpoint
from trainer.checkpoint import load_tensors
from trainer.checkpoint_folder import Checkpoint, find_damage, read_seal
from trainer.compat.bank.center_bank import CenterBank
from trainer.compat.methods.old_embeddings import StoredEmbeddings
from trainer.data import open_dataset
from trainer.data.identities import identities
from trainer.data.index import RowsInfo, describe_rows, seal_dataset
from trainer.data.splitting import SplitOptions, save_tables, split
from trainer.distributed import Ranks
from trainer.errors import CheckpointError, LceError
from trainer.evaluation.embeddings import EmbeddingCache
from trainer.models.folder import save_model
from trainer.models.onnx_export import export_onnx
from trainer.models.open import load_model
from trainer.run.config import dump_config, load_config, parse_config
from trainer.run.folder import read_summary
from trainer.seals import sealed

HANG_SECONDS = 60


@dataclass(frozen=True)
class Target:
    """A kind of thing on disk: its files, and how it is read in earnest. ``free``: without a checksum of its own."""

    name: str
    files: list[Path]
    read: Callable[[], Any]
    free: bool = False


def contents(folder: Path, labels: Path | None = None) -> Any:
    dataset = open_dataset(folder, labels)
    pixels = [dataset.read(record) for record in range(len(dataset))]
    return dataset.info, dataset.num_classes, dataset.class_names, dataset.labels.tolist(), pixels


def data_targets(place: Path) -> Iterator[Target]:
    """A packed data set in parts, a sealed foreign one, a sealed folder of images, a label table, stored embeddings."""
    ours = packed(place, 3, 4, part_records=6)
    yield Target("data set", sorted(ours.iterdir()), lambda: contents(ours))
    foreign = packed(place / "other", 2, 4, layout="insightface")
    for name in ("dataset.yaml", "labels.npy", "train.offsets.npy", "pack.json", "checksums.json", "train.crc.npy"):
        (foreign / name).unlink()
    seal_dataset(open_dataset(foreign))
    yield Target("foreign data set", sorted(foreign.iterdir()), lambda: contents(foreign))
    people = identity_folders(place / "people", 2, 3)
    seal_dataset(open_dataset(people))
    yield Target("folder of images", sorted(p for p in people.rglob("*") if p.is_file()), lambda: contents(people))
    whole = open_dataset(ours)
    save_tables(split(whole, SplitOptions(share=0.5)), place / "tables", whole, "made by a test")
    table = place / "tables" / "old.npy"
    yield Target("label table", sorted((place / "tables").glob("old*")), lambda: contents(ours, table))
    rows, array = place / "rows.npy", np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    np.save(rows, array)
    about = RowsInfo(records=12, dim=4, model="m", model_hash="h", dataset="d", fingerprint=whole.records_fingerprint)
    describe_rows(rows, about)
    read = lambda: np.array(StoredEmbeddings(rows, 12, dataset=whole).rows).tolist()  # noqa: E731
    yield Target("embeddings by record", [rows, rows.with_suffix(".yaml")], read)


def resumed(folder: Path) -> Any:
    """What a run continues from: the steps of Checkpoints.newest and of RunState.load."""
    seal = read_seal(folder)
    damage = find_damage(folder, seal["files"])
    if damage is not None:
        raise CheckpointError(damage)
    state = {"a": torch.zeros(3)}
    load_tensors(Checkpoint(folder, seal), state)
    return seal, state["a"].tolist()


def model_targets(place: Path) -> Iterator[Target]:
    """A centre bank, a checkpoint, a model folder, an ONNX export, cached embeddings, a summary, a configuration."""
    written(place / "bank")

    def rows() -> Any:
        bank = CenterBank.open(place / "bank")
        return bank.fingerprint, [part.tolist() for part in vars(bank.rows(0, bank.num_classes)).values()]

    yield Target("centre bank", sorted((place / "bank").iterdir()), rows)
    step = checkpoint(place / "checkpoints")
    yield Target("checkpoint", sorted(step.iterdir()), lambda: resumed(step))
    people = open_dataset(place / "people")
    folder, some = place / "model", images(2)
    plain = saved(place / "plain", "linear")
    save_model(folder, plain.backbone, plain.card, plain.transforms, identities(people))

    def embedded(path: Path) -> Any:
        model = load_model(path)
        vectors = model.embed(some)
        mapped = model.transform("t21", vectors).tolist() if model.card.transforms else None
        known = None if model.identities is None else model.identities.keys.tolist()
        return model.hash, vectors.tolist(), mapped, known, model.card

    yield Target("model folder", sorted(folder.iterdir()), lambda: embedded(folder))
    export_onnx(load_model(folder), place / "m.onnx", some)  # type: ignore[arg-type]

    def exported() -> Any:
        return embedded(place / "m.onnx")[1:]  # the hash is of the whole file, its seal too

    yield Target("ONNX file", [place / "m.onnx", place / "m.identities.npy"], exported)
    cache = EmbeddingCache(place / "cache")
    read = lambda: cache.embed(plain, people, people.kept, Ranks()).tolist()  # noqa: E731
    read()
    yield Target("cached embeddings", sorted((place / "cache").iterdir()), read)
    summary = {"status": "finished", "signal": 0, "dir": "x", "step": 8, "steps": 8, "skipped_steps": 0}
    (place / "summary.json").write_text(json.dumps(sealed({**summary, "seconds": 1.5, "last": {}})))
    yield Target("summary of a run", [place / "summary.json"], lambda: read_summary(place, 8))
    (place / "run.yaml").write_text(dump_config(parse_config(tree(place / "run"), "test")))
    yield Target("configuration", [place / "run.yaml"], lambda: load_config(place / "run.yaml"), free=True)


def damaged(data: bytes, random: np.random.Generator) -> bytes:
    """The bytes with one seeded damage."""
    n = len(data)
    at, length = int(random.integers(max(n, 1))), int(random.integers(1, 65))
    part = data[at : at + length]
    kind = random.choice(["bit", "bit", "bits", "cut", "roll", "zero", "insert", "repeat", "lose", "empty"])
    if kind in ("bit", "bits"):
        changed = bytearray(data)
        for where in random.integers(n, size=1 if kind == "bit" else 8) if n else []:
            changed[where] ^= 1 << int(random.integers(8))
        return bytes(changed)
    middle = {
        "cut": None,
        "roll": part[1:] + part[:1],
        "zero": bytes(len(part)),
        "insert": random.bytes(length) + part,
        "repeat": part + part,
        "lose": b"",
        "empty": None,
    }[str(kind)]
    if middle is None:
        return b"" if kind == "empty" else data[:at]
    return data[:at] + middle + data[at + length :]


@contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """Raise :class:`TimeoutError` in what takes longer."""

    def late(number: int, frame: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(target: Target, right: Any) -> tuple[str, str]:
    """How reading ended, as :data:`tests.attack.OUTCOMES` has it, and what is to be known of it."""
    try:
        with alarm(HANG_SECONDS):
            found = target.read()
    except LceError as error:
        one_line = "\n" not in str(error) or target.free
        return ("refused", str(error)) if one_line else ("traceback", f"several lines: {error}")
    except TimeoutError:
        return "hang", ""
    except Exception:
        return "traceback", traceback.format_exc()
    if repr(found) == repr(right):
        return "equal", ""
    return ("handled", "") if target.free else ("silent", "it reads as something else")


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> list[Target]:
    place = tmp_path_factory.mktemp("fuzz")
    return [*data_targets(place), *model_targets(place)]


@amounts(24, 300, 1000)
def test_damaged_files(targets: list[Target], amount: int) -> None:
    right = [target.read() for target in targets]
    failed = []
    for number in range(amount):
        random = np.random.default_rng(number)
        which = number % len(targets)
        target = targets[which]
        file = target.files[int(random.integers(len(target.files)))]
        whole = file.read_bytes()
        stamp = file.stat()
        file.write_bytes(damaged(whole, random))
        found, reason = outcome(target, right[which])
        if file.exists() and file.read_bytes() != whole:
            file.write_bytes(whole)
        os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        tally(f"damaged: {target.name}", found)
        if found in ("silent", "traceback", "hang"):
            failed.append(f"{number}: {target.name}, {file.name}: {found}: {reason}")
    assert not failed, "\n".join(failed)
