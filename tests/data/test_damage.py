"""Damage: a clear error or the right label, never another image's label, a crash or silence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.samples import encoded, loader_of, mxnet_copy, packed, take, unsealed
from tests.ranks import run_ranks
from trainer.data import Dataset, open_dataset, recordio, store
from trainer.data.checking import check
from trainer.data.index import load_description, save_description
from trainer.distributed import Ranks
from trainer.errors import DataError
from trainer.run.config import parse_config
from trainer.run.engine import train

KINDS = ("dali", "torch")


def overwrite(dataset: Dataset, record: int, change: Callable[[bytes], bytes]) -> None:
    """Change the image bytes of a record in place; ``change`` must keep their number."""
    assert isinstance(dataset.store, store.RecordStore)
    part = dataset.store.parts[0]
    start = int(part.offsets[record]) + 32
    image = dataset.read(record)
    changed = change(image)
    assert len(changed) == len(image)
    with part.path.open("r+b") as file:
        file.seek(start)
        file.write(changed)


def spoil(image: bytes) -> bytes:
    """Beginning and end stay; what lies between no decoder accepts."""
    return image[:8] + bytes(len(image) - 24) + image[-16:]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return open_dataset(unsealed(packed(tmp_path)))  # checksums would find the damage before a decoder sees it


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [spoil, lambda image: b"\0" * len(image), lambda image: image[:-40] + b"\0" * 40])
def test_a_record_that_does_not_decode_stops_training_and_is_named(
    dataset: Dataset, kind: str, change: Callable[[bytes], bytes]
) -> None:
    overwrite(dataset, 17, change)
    loader = loader_of(dataset, kind)
    with pytest.raises(DataError, match=r"train\.rec: record 17.*max_bad_records allows 0.*lce check --deep"):
        take(loader, 6)
    loader.close()


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_records_are_passed_over_and_labels_stay(dataset: Dataset, kind: str) -> None:
    clean = take(loader_of(dataset, kind), 12)
    overwrite(dataset, 17, spoil)
    overwrite(dataset, 18, lambda image: bytes(len(image)))
    overwrite(dataset, 44, spoil)
    seen = []
    for _ in range(2):
        loader = loader_of(dataset, kind, max_bad_records=3)
        seen.append(take(loader, 12))
        assert sorted(loader.bad_records) == [17, 18, 44]
        loader.close()
    stand_in = {17: 19, 18: 19, 44: 0}
    for batch, again, before in zip(*seen, clean, strict=True):
        expected = [stand_in.get(record, record) for record in before.records.tolist()]
        assert batch.records.tolist() == again.records.tolist() == expected
        assert batch.labels.tolist() == dataset.labels[np.array(expected)].tolist()
        for image, record in zip(batch.images, expected, strict=True):
            pixels = np.asarray(dataset.decode(record), np.float32).transpose(2, 0, 1)
            np.testing.assert_allclose(image.numpy(), (pixels / 255 - 0.5) / 0.5, atol=1e-5)
    with pytest.raises(DataError, match="max_bad_records allows 2"):
        take(loader_of(dataset, kind, max_bad_records=2), 12)


def test_both_loaders_pass_over_the_same(dataset: Dataset) -> None:
    overwrite(dataset, 3, spoil)
    overwrite(dataset, 30, lambda image: image[:-60] + bytes(60))
    found = []
    for kind in KINDS:
        loader = loader_of(dataset, kind, max_bad_records=5)
        take(loader, 6)
        found.append(sorted(loader.bad_records))
    assert found == [[3, 30], [3, 30]]


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_of_another_size_is_damage_where_all_are_equal(dataset: Dataset, kind: str) -> None:
    small = encoded(5, (16, 16))
    record = next(r for r in range(45) if len(dataset.read(r)) > len(small) and dataset.read(r)[:2] == b"\xff\xd8")
    overwrite(dataset, record, lambda image: small[:-2] + bytes(len(image) - len(small)) + small[-2:])
    with pytest.raises(DataError, match=rf"record {record} .*16x16, not 32x32"):
        take(loader_of(dataset, kind), 6)


def test_the_list_of_bad_records_counts_from_the_start(dataset: Dataset) -> None:
    np.save(dataset.path / "bad_records.npy", np.array([2, 40]))
    dataset = open_dataset(dataset.path)
    with pytest.raises(DataError, match=r"record 40 is listed in bad_records\.npy"):
        loader_of(dataset, "torch", max_bad_records=1)
    loader = loader_of(dataset, "torch", max_bad_records=2)
    seen = {r for b in take(loader, 6) for r in b.records.tolist()}
    assert not {2, 40} & seen


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_cut_while_open(dataset: Dataset, kind: str) -> None:
    loader = loader_of(dataset, kind)
    batches = loader.batches()
    next(batches)
    rec = dataset.path / "train.rec"
    with rec.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError, match=r"train\.rec: record \d+ at byte \d+ is damaged"):
        [next(batches) for _ in range(12)]
    with pytest.raises(DataError, match=r"has 100 bytes but had \d+ when it was packed; it was cut short"):
        open_dataset(dataset.path)
    with rec.open("r+b") as file:
        file.truncate(10**6)
    with pytest.raises(DataError, match="it was grown"):
        open_dataset(dataset.path)


def test_a_file_that_vanishes(dataset: Dataset) -> None:
    dataset.read(0)
    (dataset.path / "train.rec").unlink()
    assert dataset.read(1)  # still open
    dataset.close()
    with pytest.raises(DataError, match=r"train\.rec: record 1 .*no such file"):
        dataset.read(1)
    with pytest.raises(DataError, match=r"train\.rec: [Nn]o such file"):
        open_dataset(dataset.path)


def test_offsets_of_another_file_are_found_out(dataset: Dataset) -> None:
    """Two swapped offset tables: every record is intact, but it is not the one its number says."""
    path = dataset.path / "train.offsets.npy"
    offsets = np.load(path)
    np.save(path, np.delete(offsets, 5))
    with pytest.raises(DataError, match="44 records are indexed"):
        open_dataset(dataset.path)
    shifted = np.concatenate([[0], offsets[2:], offsets[-1:] + 4])
    np.save(path, shifted)
    with pytest.raises(DataError, match="its offsets do not fit"):
        open_dataset(dataset.path)
    info = load_description(dataset.path)
    part = info.parts[0].model_copy(update={"first_id": 7})
    np.save(path, offsets)
    save_description(dataset.path, info.model_copy(update={"parts": (part,)}))
    with pytest.raises(DataError, match="says it is number 0, not 7"):
        open_dataset(dataset.path).read(0)


def damage(data: bytes, random: np.random.Generator) -> bytes:
    """Flip bits, overwrite, cut, remove or insert some bytes."""
    changed = bytearray(data)
    at = int(random.integers(len(changed)))
    some = int(random.integers(1, 9))
    match int(random.integers(5)):
        case 0:
            for place in random.integers(len(changed), size=some):
                changed[place] ^= 1 << int(random.integers(8))
        case 1:
            changed[at : at + some] = random.bytes(some)
        case 2:
            del changed[at:]
        case 3:
            del changed[at : at + some]
        case _:
            changed[at:at] = random.bytes(some)
    return bytes(changed)


def attempt(action: Callable[[], Any]) -> tuple[Any, str]:
    """What an action gives, or None and its error's message."""
    try:
        return action(), ""
    except DataError as error:
        return None, str(error)


def outcome(folder: Path, labels: list[int], images: list[bytes], trust_headers: bool) -> str:
    """Read everything; a record that comes through must have its own label and must not show another record's image."""
    dataset, reason = attempt(lambda: open_dataset(folder))
    if dataset is None:
        assert str(folder) in reason
        return "refused"
    if trust_headers and check(dataset).damage:
        return "refused"
    assert len(dataset) == len(labels)
    result = "read"
    for record, (label, image) in enumerate(zip(labels, images, strict=True)):
        assert dataset.labels[record] == label
        found, reason = attempt(lambda record=record: dataset.read(record))
        if found is not None and found != image:
            assert not any(other in found for other in images if other != image)
            _, reason = attempt(lambda record=record: dataset.decode(record))
        if reason:
            assert f"record {record}" in reason
            result = "named"
    dataset.close()
    return result


@pytest.mark.parametrize("layout", ["packed", "packed, no offsets", "insightface"])
def test_fuzz(layout: str, tmp_path: Path) -> None:
    """A thousand damaged files in all; the counts show that each outcome is really met."""
    source = mxnet_copy("insightface", tmp_path) if layout == "insightface" else packed(tmp_path, 4, 5)
    original = open_dataset(source)
    labels = original.labels.tolist()
    images = [original.read(record) for record in range(len(original))]
    if layout == "packed, no offsets":
        (unsealed(source) / "train.offsets.npy").unlink()
    rounds = {"packed": 400, "packed, no offsets": 450, "insightface": 150}[layout]
    random = np.random.default_rng(rounds)
    counts = {"refused": 0, "named": 0, "read": 0}
    for round_number in range(rounds):
        folder = tmp_path / "damaged"
        shutil.copytree(source, folder)
        file = folder / ("train.idx" if round_number % 3 == 0 else "train.rec")
        file.write_bytes(damage(file.read_bytes(), random))
        counts[outcome(folder, labels, images, layout == "insightface")] += 1
        shutil.rmtree(folder)
    assert min(counts["refused"], counts["read"]) > 0, counts
    assert counts["named"] > 0 or layout == "insightface", counts


def test_dali_survives_fuzzed_images(tmp_path: Path) -> None:
    """300 records with flipped bits through DALI: each is used or counted, none takes the process with it."""
    random = np.random.default_rng(0)
    writer = recordio.RecordWriter(tmp_path / "train.rec")
    for k in range(300):
        image = bytearray(encoded(k, kind="PNG" if k % 4 == 0 else "JPEG"))
        for place in random.integers(2, len(image) - 2, size=2):
            image[place] ^= 1 << int(random.integers(8))
        writer.write(k, recordio.encode_record(bytes(image), float(k % 7), k))
    writer.close()
    dataset = open_dataset(tmp_path)
    loader = loader_of(dataset, "dali", batch_size=32, max_bad_records=299)
    for batch in take(loader, loader.steps_per_epoch):
        assert batch.labels.tolist() == (batch.records % 7).tolist()
        assert not set(batch.records.tolist()) & set(loader.bad_records)
    assert 50 < len(loader.bad_records) < 250
    loader.close()


def _train_on(ranks: Ranks, path: Path, folder: Path) -> int:
    tree = {
        "run": {"dir": str(folder), "device": "cpu", "threads": 1},
        "data": {"path": str(path), "loader": "torch", "workers": 0, "batch_size": 8, "max_bad_records": 4},
        "backbone": {"name": "small", "dim": 8},
        "train": {"epochs": 1},
        "checkpoint": {"every_steps": 0},
        "log": {"tensorboard": False, "progress": False},
    }
    return train(parse_config(tree, "test"), ranks).bad_records


def test_a_run_says_what_it_passed_over(dataset: Dataset, tmp_path: Path) -> None:
    np.save(dataset.path / "bad_records.npy", np.array([2, 40]))
    assert run_ranks(_train_on, 2, dataset.path, tmp_path / "run") == [2, 2]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["bad_records"] == 2
