"""`lce bench input` measures what it says, on synthetic images and on a data set."""

import argparse
import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from tests.data.samples import identity_folders, packed, unsealed
from tools.benchmarks import input as bench
from trainer.data import open_dataset
from trainer.data.checksums import change_sum
from trainer.errors import ConfigError, DataError


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args([*words, "--batch", "8", "--steps", "2", "--rounds", "1", "--threads", "1"])


@pytest.mark.parametrize("augment", ["flip", "full"])
def test_figures(augment: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--images", "40", "--size", "32", "--augment", augment, "--no-torch", "--json", "-")
    assert bench.run(arguments(*words)) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["bench"], figures["images"], figures["augment"]) == ("input", 40, augment)
    for side in ("reference", "ours"):
        assert figures[side]["images_per_second"] == pytest.approx(16 / figures[side]["seconds"])
    assert figures["ratio"] > 0
    found = figures["checksums"]
    more = found["microseconds"] - found["microseconds_without"]
    assert figures["checksums_cost"] == pytest.approx(more * 16 / 1e6 / figures["ours"]["processor_seconds"])


def test_only_one_side_compares_checksums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The synthetic images have checksums, and a damaged one is noticed by ours alone."""
    folder = bench._make_images(tmp_path, 8, 32)
    crcs = np.load(folder / "train.crc.npy")
    np.save(folder / "train.crc.npy", crcs ^ 1)
    change_sum(folder, "train.crc.npy")
    compared: list[str] = []
    find = zlib.crc32
    sound = open_dataset(folder)
    monkeypatch.setattr("trainer.data.store.zlib.crc32", lambda *a: compared.append("crc") or find(*a))
    bare = open_dataset(folder, verify=False)
    assert not bare.checksummed
    assert bare.read(3)
    assert compared == []
    assert sound.checksummed
    with pytest.raises(DataError, match="its bytes changed"):
        sound.read(3)


def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = packed(tmp_path)
    assert bench.run(arguments("--data", str(folder), "--no-torch")) == 0
    assert "checksums of the records, by zlib" in capsys.readouterr().out
    assert bench.run(arguments("--data", str(unsealed(folder)), "--no-torch")) == 0
    assert "checksums" not in capsys.readouterr().out


def test_a_data_set_of_ones_own(tmp_path: Path) -> None:
    assert bench.measure(arguments("--data", str(packed(tmp_path)), "--no-torch"))["images"] == 45
    with pytest.raises(ConfigError, match="pack the images first"):
        bench.measure(arguments("--data", str(identity_folders(tmp_path / "people")), "--no-torch"))


def test_both_orders_from_cold_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "--data",
        str(packed(tmp_path)),
        "--cold",
        "--block-bytes",
        "4000",
        "--buffer-bytes",
        "12000",
        "--json",
        "-",
    )
    assert bench.run(arguments(*words)) == 0
    figures = json.loads(capsys.readouterr().out)
    one, other = figures["global"], figures["blocks"]
    assert one["reads"] == 16  # two batches of eight, record by record
    assert 1 <= other["reads"] < 16  # ranges of neighbours
    for order in (one, other):
        assert order["images_per_second"] == pytest.approx(16 / order["seconds"])
        assert order["image_bytes"] > 0
        assert order["storage_bytes"] >= 0
    assert bench.run(arguments(*words[:-2])) == 0
    assert "mixing of classes" in capsys.readouterr().out
