"""The loaders: one order and the same augmentations, whatever the loader, the world size and the point of resuming."""

import contextlib
import io
import itertools
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.samples import ALL_AUGMENTATIONS, MXNET, encoded, loader_of, mxnet_copy, packed, take
from tools import cli
from trainer.data import Batch, Dataset, Loader, dali, open_dataset, recordio
from trainer.data.checking import check
from trainer.data.config import AugmentConfig, BlocksConfig
from trainer.data.dali import DaliLoader
from trainer.data.loader import READ_AHEAD
from trainer.data.order import Order
from trainer.distributed import Ranks
from trainer.errors import BrokenRunError, ConfigError, DataError

KINDS = ("dali", "torch")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(packed(tmp_path_factory.mktemp("set")))


def joined(parts: list[list[Batch]]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Global batches from every rank's batches."""
    return [
        (torch.cat([b.images for b in row]), torch.cat([b.labels for b in row]), torch.cat([b.records for b in row]))
        for row in zip(*parts, strict=True)
    ]


def world_of(
    dataset: Dataset, kind: str, world: int, count: int, state: dict[str, int] | None = None, **data: Any
) -> Any:
    """``count`` global batches at a world size, and the state after them (the same on every rank)."""
    parts, states = [], []
    for rank in range(world):
        loader = loader_of(dataset, kind, Ranks(rank, world), **data)
        if state is not None:
            loader.load_state_dict(state)
        parts.append(take(loader, count))
        states.append(loader.state_dict())
        loader.close()
    assert all(s == states[0] for s in states)
    return joined(parts), states[0]


def assert_equal(one: Any, other: Any) -> None:
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_batches_hold_the_records_they_say(dataset: Dataset, kind: str) -> None:
    loader = loader_of(dataset, kind)
    batches = take(loader, loader.steps_per_epoch)
    assert [len(b.records) for b in batches] == [8, 8, 8, 8, 8, 5]
    assert sorted(r for b in batches for r in b.records.tolist()) == list(range(45))
    for batch in batches:
        assert (batch.images.dtype, batch.labels.dtype, batch.records.dtype) == (
            torch.float32,
            torch.int64,
            torch.int64,
        )
        assert batch.labels.tolist() == dataset.labels[batch.records.numpy()].tolist()
        for image, record in zip(batch.images, batch.records.tolist(), strict=True):
            pixels = torch.from_numpy(dataset.decode(record).copy()).permute(2, 0, 1)
            torch.testing.assert_close(image, (pixels / 255 - 0.5) / 0.5, rtol=0, atol=1e-5)
    assert loader.state_dict() == {"epoch": 1, "samples": 0}
    loader.close()


@pytest.mark.parametrize("kind", KINDS)
def test_resume_at_any_world_size_gives_exactly_the_rest(dataset: Dataset, kind: str) -> None:
    settings = {"augment": ALL_AUGMENTATIONS, "batch_size": 7}
    whole, _ = world_of(dataset, kind, 1, 9, **settings)
    for world, done in ((2, 3), (3, 6), (1, 8)):
        first, state = world_of(dataset, kind, 2, done, **settings)
        assert_equal(first, whole[:done])
        rest, _ = world_of(dataset, kind, world, 9 - done, state, **settings)
        assert_equal(rest, whole[done:])
    other, _ = world_of(dataset, kind, 1, 9, seed=4, **settings)
    assert not torch.equal(other[0][2], whole[0][2])


def test_augmentations_differ_between_epochs_seeds_and_copies(dataset: Dataset) -> None:
    loader = loader_of(dataset, "torch", augment=ALL_AUGMENTATIONS, workers=0, repeat=2)
    first, second = (
        {
            (r, k): i
            for b in take(loader, loader.steps_per_epoch)
            for k, (r, i) in enumerate(zip(b.records.tolist(), b.images, strict=True))
        }
        for _ in range(2)
    )
    by_record: dict[int, list[torch.Tensor]] = {}
    for (record, _), image in [*first.items(), *second.items()]:
        by_record.setdefault(record, []).append(image)
    several = [images for images in by_record.values() if len(images) > 1]
    assert several
    for images in several:
        assert all(not torch.equal(a, b) for a, b in itertools.combinations(images, 2))


STEPS: dict[str, tuple[AugmentConfig, float]] = {
    # augmentation, and the largest difference allowed, in grey levels of 255: one per rounding step
    "decode": (AugmentConfig(flip=0), 0.001),
    "flip": (AugmentConfig(flip=0.5), 0.001),
    "warp": (AugmentConfig(flip=0, rotate_degrees=8, scale=0.2, translate=0.1), 1.001),
    "low_resolution": (AugmentConfig(flip=0, low_resolution=0.7), 1.001),
    "blur": (AugmentConfig(flip=0, blur=0.7), 1.001),
    "occlusion": (AugmentConfig(flip=0, occlusion=0.7), 0.001),
    "colour": (AugmentConfig(flip=0, contrast=0.3, brightness=0.1, saturation=0.5), 1.001),
    "noise": (AugmentConfig(flip=0, noise=0.05), 0.001),
    "all": (ALL_AUGMENTATIONS, 6.001),
}


@pytest.mark.parametrize("step", STEPS)
def test_dali_and_torch_give_the_same_pixels(dataset: Dataset, step: str) -> None:
    augment, bound = STEPS[step]
    dali, other = (take(loader_of(dataset, kind, augment=augment, workers=0), 6) for kind in KINDS)
    plain = take(loader_of(dataset, "dali"), 6)
    differs = False
    for a, b, unchanged in zip(dali, other, plain, strict=True):
        assert torch.equal(a.records, b.records)
        assert torch.equal(a.labels, b.labels)
        difference = (a.images - b.images).abs() * 127.5
        assert difference.max() <= bound
        assert difference.mean() <= 0.01
        differs |= bool((a.images - unchanged.images).abs().max() * 127.5 > 3)
    assert differs == (step != "decode")  # every step does something


@pytest.mark.parametrize("color", ["RGB", "BGR"])
def test_images_of_other_sizes_and_colour_orders(tmp_path: Path, color: str) -> None:
    folder = packed(tmp_path, 2, 5, (40, 52), color=color, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    described = folder / "dataset.yaml"
    text = described.read_text().replace("[40, 52]", "[24, 30]").replace("uniform: true", "uniform: false")
    described.write_text(text)
    (folder / "checksums.json").unlink()
    dataset = open_dataset(folder)
    mean, std = torch.tensor([0.4, 0.5, 0.6])[:, None, None], torch.tensor([0.2, 0.25, 0.3])[:, None, None]
    for kind in KINDS:
        (batch,) = take(loader_of(dataset, kind, workers=0), 1)
        assert batch.images.shape == (8, 3, 24, 30)
        for image, record in zip(batch.images, batch.records.tolist(), strict=True):
            pixels = torch.from_numpy(dataset.decode(record).copy()).permute(2, 0, 1)
            torch.testing.assert_close(image, (pixels / 255 - mean) / std, rtol=0, atol=1.01 / 255 / 0.2)


@pytest.mark.parametrize("kind", [*KINDS, "synthetic"])
def test_slices_may_be_empty(dataset: Dataset, kind: str) -> None:
    settings = {"batch_size": 3, "synthetic_records": 7, "synthetic_size": 32, "synthetic_classes": 4}
    used = None if kind == "synthetic" else dataset
    whole, _ = world_of(used, kind, 1, 4, **settings)  # type: ignore[arg-type]
    parted, _ = world_of(used, kind, 4, 4, **settings)  # type: ignore[arg-type]
    assert_equal(parted, whole)
    loader = loader_of(used, kind, Ranks(3, 4), **settings)
    assert [b.images.shape for b in take(loader, 3)] == [(0, 3, 32, 32)] * 3
    loader.close()


def test_batches_stay_valid_while_the_loader_runs_on(dataset: Dataset) -> None:
    loader = loader_of(dataset, "dali")
    batches = loader.batches()
    kept = [next(batches).images for _ in range(20)]
    copies = [images.clone() for images in kept]
    for _ in range(20):
        next(batches)
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
    loader.close()


def test_same_pixels_as_dalis_own_reader_of_mxnets_file(tmp_path: Path) -> None:
    from nvidia.dali import Pipeline, fn, types

    pipeline = Pipeline(60, 1, None)
    with pipeline:
        rec, idx = (str(MXNET / "plain" / f"train.{end}") for end in ("rec", "idx"))
        encoded, labels = fn.readers.mxnet(path=[rec], index_path=[idx])
        images = fn.decoders.image(encoded, output_type=types.RGB)
        pipeline.set_outputs(images, labels)
    theirs, their_labels = pipeline.run()
    dataset = open_dataset(mxnet_copy("plain", tmp_path))
    (batch,) = take(loader_of(dataset, "dali", batch_size=60), 1)
    for image, label, record in zip(batch.images, batch.labels.tolist(), batch.records.tolist(), strict=True):
        own = torch.from_numpy(np.array(theirs[record])).permute(2, 0, 1)
        torch.testing.assert_close(image, (own / 255 - 0.5) / 0.5, rtol=0, atol=1e-5)
        assert label == int(np.array(their_labels[record])[0])


def test_position_counts_what_was_handed_out_not_what_was_prefetched(dataset: Dataset) -> None:
    loader = loader_of(dataset, "dali")
    batches = loader.batches()
    assert loader.state_dict() == {"epoch": 0, "samples": 0}
    next(batches)
    assert loader.state_dict() == {"epoch": 0, "samples": 8}
    loader.load_state_dict({"epoch": 2, "samples": 40})
    assert list(itertools.islice(batches, 1)) == []  # an iterator from before ends
    (last,) = take(loader, 1)
    assert len(last.records) == 5
    assert loader.state_dict() == {"epoch": 3, "samples": 0}
    with pytest.raises(DataError, match="cannot continue at epoch 0, sample 99"):
        loader.load_state_dict({"epoch": 0, "samples": 99})


def test_class_balanced_sampling_reaches_the_batches(tmp_path: Path) -> None:
    dataset = open_dataset(packed(tmp_path, 3, 4))
    table = np.where(np.arange(12) % 4 == 0, dataset.labels, 0)
    np.save(tmp_path / "labels.npy", table)
    dataset = open_dataset(dataset.path, tmp_path / "labels.npy")
    loader = loader_of(dataset, "torch", workers=0, batch_size=12, sampling="class_balanced")
    counts = torch.bincount(take(loader, 1)[0].labels)
    present = np.unique(table)
    assert counts[present].max() - counts[present].min() <= 1


def test_dropped_records_are_never_seen(dataset: Dataset, tmp_path: Path) -> None:
    table = np.array(dataset.labels)
    table[::3] = -1
    np.save(tmp_path / "some.npy", table)
    some = open_dataset(dataset.path, tmp_path / "some.npy")
    loader = loader_of(some, "torch", workers=0)
    seen = [r for b in take(loader, loader.steps_per_epoch) for r in b.records.tolist()]
    assert sorted(seen) == np.flatnonzero(np.arange(45) % 3).tolist()


def test_a_worker_that_dies_ends_the_run_with_its_reason(dataset: Dataset) -> None:
    loader = loader_of(dataset, "torch", workers=1, batch_size=2)
    batches = loader.batches()
    next(batches)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(BrokenRunError, match="a data worker died"):
        list(itertools.islice(batches, 100))


def test_the_choice_of_the_loader(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(loader_of(dataset, "auto"), DaliLoader)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert loader_of(dataset, "auto").name == "torch"
    with pytest.raises(ConfigError, match="DALI is not installed"):
        loader_of(dataset, "dali")
    with pytest.raises(ConfigError, match="needs a data set"):
        loader_of(None, "torch")


def test_the_torch_loader_runs_without_dali(dataset: Dataset) -> None:
    """In a process of its own, in which DALI cannot be imported."""
    import subprocess
    import sys

    program = f"""
import sys
sys.modules["nvidia"] = sys.modules["nvidia.dali"] = None
from tests.data.samples import loader_of, take
from trainer.data import open_dataset
loader = loader_of(open_dataset({str(dataset.path)!r}), "auto", workers=0)
print(loader.name, take(loader, 1)[0].images.shape)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "torch torch.Size([8, 3, 32, 32])", done.stderr


@pytest.mark.parametrize("kind", [*KINDS, "records", "synthetic"])
@pytest.mark.parametrize("rank", [0, 1])
def test_followers_are_told_of_batches_before_they_come(
    dataset: Dataset, kind: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, told, drawn = Ranks(rank, 2), list[list[int]](), list[int]()
    draw = Order._draw
    monkeypatch.setattr(Order, "_draw", lambda self, epoch: drawn.append(epoch) or draw(self, epoch))
    if kind == "synthetic":
        loader = loader_of(None, kind, ranks, synthetic_classes=5, synthetic_records=45, synthetic_size=8)
    elif kind == "records":
        loader = loader_of(dataset, "torch", ranks, images=False)
    else:
        loader = loader_of(dataset, kind, ranks)
    loader.load_state_dict({"epoch": 0, "samples": 16})
    loader.follow(lambda records: told.append(records.tolist()))
    came = []
    for number, batch in enumerate(loader.batches()):
        came.append(batch.records.tolist())
        if kind in KINDS:  # these make batches in advance too
            assert len(told) >= number + READ_AHEAD
        else:
            assert len(told) == number + READ_AHEAD
        if number == 9:  # an epoch has six
            break
    loader.close()
    assert told[:10] == came
    assert drawn == list(range(len(drawn))), "an epoch's permutation is drawn once"


def test_synthetic_images_are_separable_and_any_number_of_classes() -> None:
    loader = loader_of(None, "synthetic", synthetic_classes=10**7, synthetic_records=2 * 10**6, synthetic_size=32)
    (batch,) = take(loader, 1)
    assert batch.images.shape == (8, 3, 32, 32)
    assert batch.labels.max() > 10**5
    assert 0.5 < batch.images.std() < 2
    loader: Loader = loader_of(None, "synthetic", synthetic_classes=5, synthetic_records=40, synthetic_size=32)
    batches = take(loader, 5)
    images, labels = torch.cat([b.images for b in batches]).flatten(1), torch.cat([b.labels for b in batches])
    centres = torch.stack([images[labels == k].mean(0) for k in range(5)])
    assert (torch.cdist(images, centres).argmin(1) == labels).all()


@pytest.mark.parametrize("kind", ["dali", "torch"])
@pytest.mark.parametrize("raw", [False, True])
def test_blocks_are_read_ahead(kind: str, raw: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each record is asked for before it is read; batches are those of the order, whatever the rank count."""
    folder = packed(tmp_path)
    dataset = open_dataset(tmp_path / "source" if raw else folder)
    asked: set[int] = set()
    will_need, read = dataset.store.will_need, dataset.store.read

    def note(records: np.ndarray) -> int:
        asked.update(records.tolist())
        return will_need(records)

    def check(record: int) -> bytes:
        assert record in asked
        return read(record)

    monkeypatch.setattr(dataset.store, "will_need", note)
    monkeypatch.setattr(dataset.store, "read", check)
    blocks = {"order": "blocks", "block_bytes": 3000, "buffer_bytes": 9000, "workers": 0}
    halves = [
        take(loader_of(dataset, kind, Ranks(rank, 2), **blocks), 6)  # 45 records in batches of 8: one epoch
        for rank in range(2)
    ]
    records = np.concatenate([half.records for pair in zip(*halves, strict=True) for half in pair])
    assert sorted(records.tolist()) == list(range(45))
    assert asked == set(range(45))
    asked.clear()
    whole = take(loader_of(dataset, kind, **blocks), 6)
    assert np.array_equal(np.concatenate([batch.records for batch in whole]), records)


def test_blocks_and_balanced_classes_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="sampling"):
        BlocksConfig(loader="torch", path="x", sampling="class_balanced")
    with pytest.raises(ValueError, match="buffer_bytes = 10 is smaller than a block"):
        BlocksConfig(loader="torch", path="x", buffer_bytes=10)


def odd_people(folder: Path, size: tuple[int, int] = (32, 32)) -> Path:
    """Ordinary JPEGs, and among them a GIF, an AVIF and an ICO that are called .jpg, and a TIFF in LAB colours."""
    for label in range(3):
        (folder / f"p{label}").mkdir(parents=True)
        for k in range(4):
            (folder / f"p{label}" / f"{k}.jpg").write_bytes(encoded(10 * label + k, size))
    for label, kind in enumerate(("GIF", "AVIF", "ICO")):
        (folder / f"p{label}" / "x.jpg").write_bytes(encoded(50 + label, size, kind))
    Image.open(io.BytesIO(encoded(60, size))).convert("LAB").save(folder / "p0" / "lab.tif")
    return folder


@pytest.mark.parametrize("packed_first", [False, True])
def test_what_dali_does_not_decode_is_read_by_pillow(
    packed_first: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Raw files and records alike; the torch loader makes the same of them."""
    dataset = open_dataset(odd_people(tmp_path / "people"))
    if packed_first:  # a .rec of another tool, which keeps the bytes
        writer = recordio.RecordWriter(tmp_path / "train.rec")
        for k in range(len(dataset)):
            writer.write(k, recordio.encode_record(dataset.read(k), float(dataset.labels[k]), k))
        writer.close()
        (tmp_path / "rec").mkdir()
        for name in ("train.rec", "train.idx"):
            (tmp_path / name).rename(tmp_path / "rec" / name)
        dataset = open_dataset(tmp_path / "rec")
    odd = [k for k in range(len(dataset)) if dataset.read(k)[:2] != b"\xff\xd8" and b"II*" not in dataset.read(k)[:4]]
    assert len(odd) == 3
    with caplog.at_level("WARNING"):
        batches = {kind: take(loader_of(dataset, kind, batch_size=16, workers=1), 1)[0] for kind in KINDS}
    assert "1 record(s) that DALI does not decode are read by Pillow" in caplog.text
    rows = [batches["dali"].records.tolist().index(record) for record in odd]
    assert torch.equal(batches["dali"].records, batches["torch"].records)
    torch.testing.assert_close(batches["dali"].images[rows], batches["torch"].images[rows], rtol=0, atol=1e-6)
    report = check(dataset, deep=True)
    assert not report.damage
    assert not report.bad
    assert sorted(report.by_pillow) == odd
    assert set(report.by_pillow.values()) == {"a format that it does not know, or no image"}
    (lab,) = report.decoders_differ
    assert report.decoders_differ[lab][1] > 20
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert cli.main(["check", str(dataset.path), "--deep", "--processes", "1"]) == 0
    assert "DALI does not decode 3 record(s), which training reads by Pillow instead" in text.getvalue()
    assert "make different pixels of 1 record(s)" in text.getvalue()


def test_a_known_format_that_dali_refuses_is_read_by_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline fails, the record is found, and the run goes on with all of its records."""
    monkeypatch.setattr(dali, "_KNOWN", (*dali._KNOWN, b"GIF8"))
    dataset = open_dataset(odd_people(tmp_path / "people"))
    gif = next(k for k in range(len(dataset)) if dataset.read(k)[:4] == b"GIF8")
    loader = loader_of(dataset, "dali", batch_size=16)
    (batch,) = take(loader, 1)
    assert isinstance(loader, DaliLoader)
    assert not loader.bad_records
    assert loader.by_pillow[gif] == "a format that it does not know, or no image"
    row = batch.records.tolist().index(gif)
    expected = (dataset.decode(gif).transpose(2, 0, 1) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(batch.images[row].numpy(), expected, atol=1e-5)


def test_a_damaged_record_that_neither_decodes_is_named_with_the_decoders_reason(tmp_path: Path) -> None:
    folder = odd_people(tmp_path / "people")
    (folder / "p0" / "x.jpg").write_bytes(encoded(50, kind="GIF")[:-200])
    with pytest.raises(DataError, match=r"x\.jpg does not decode: the image is damaged \(.*\); 1 damaged record"):
        take(loader_of(open_dataset(folder), "dali", batch_size=16), 1)
