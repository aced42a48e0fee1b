"""Whatever stands in a user's file, or under its name, ends in one line of the caller's error, at once."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.attack import tallied
from tests.data.samples import packed
from tests.models.test_export import saved
from trainer.checkpoint_folder import read_seal
from trainer.compat.bank.center_bank import CenterBank
from trainer.compat.bank.class_map import ClassMap
from trainer.compat.bank.matrices import open_arrays
from trainer.data.index import open_dataset
from trainer.data.listing import list_source
from trainer.data.packing import PackOptions, pack
from trainer.errors import DataError, LceError, ModelError
from trainer.evaluation.pairs import read_bin
from trainer.evaluation.templates import read_templates
from trainer.gallery.open import open_gallery
from trainer.gallery.orders import order_rows
from trainer.models.open import load_model
from trainer.networks.weights import read_weights
from trainer.reading import open_regular, parse_json, read_array, read_json, read_text, read_yaml
from trainer.run.config import load_config
from trainer.run.folder import read_summary

YAMLS = {
    "a date that does not exist": "a: 2024-02-31",
    "a number of 5,000 digits": "a: " + "1" * 5000,
    "deep lists": "[" * 900,
    "deep mappings": "{a: " * 3000,
    "no timestamp": "a: !!timestamp nonsense",
    "an object": "a: !!python/object/apply:os.system [true]",
    "itself": "a: &a [*a]",
    "a key twice": "a: {b: 1}\na: {c: 2}",
    "a thousand million laughs": "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    + "\n".join(f"{n}: &{n} [" + ",".join([f"*{m}"] * 10) + "]" for m, n in zip("abcdefgh", "bcdefghi", strict=True)),
    "bytes": "\udcff",
}
JSONS = {
    "deep lists": "[" * 5000,
    "deep mappings": '{"a":' * 200 + "1" + "}" * 200,
    "a number of 5,000 digits": '{"a": ' + "1" * 5000 + "}",
    "half a character": '{"a": "\\ud800"}',
    "cut": '{"a": ',
    "bytes": '{"a": "\udcff"}',
}


def _write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    return path


@pytest.mark.parametrize("kind", YAMLS)
@tallied("hostile files: YAML, JSON and .npy", "refused")
def test_yaml_ends_in_one_line(tmp_path: Path, kind: str) -> None:
    file = _write(tmp_path / "x.yaml", YAMLS[kind])
    with pytest.raises(DataError, match=r"x\.yaml: ") as problem:
        read_yaml(file, DataError)
    assert "\n" not in str(problem.value)
    assert len(str(problem.value)) < 600


def test_a_key_twice_is_named_and_a_merged_one_may_be_given_again(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2: head is given twice"):
        read_yaml(_write(tmp_path / "x.yaml", "head: {a: 1}\nhead: {b: 2}"), DataError)
    file = _write(tmp_path / "y.yaml", "a: &a {k: 1}\nb: &b {<<: *a, k: 2}\nc: {<<: *b, l: 3}")
    assert read_yaml(file, DataError)["c"] == {"k": 2, "l": 3}


@pytest.mark.parametrize("kind", JSONS)
@tallied("hostile files: YAML, JSON and .npy", "refused")
def test_json_ends_in_one_line(tmp_path: Path, kind: str) -> None:
    file = _write(tmp_path / "x.json", JSONS[kind])
    with pytest.raises(DataError, match=r"x\.json: ") as problem:
        read_json(file, DataError)
    assert "\n" not in str(problem.value)


def test_a_file_name_of_any_bytes_may_stand_in_json() -> None:
    assert parse_json('["a\\udcff"]', "x", DataError) == ["a\udcff"]


def test_every_flipped_bit_of_an_npy_header_ends_in_one_line_or_in_an_array(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(100))
    sound = (tmp_path / "x.npy").read_bytes()
    refused = sound_ones = 0
    for bit in random.Random(0).sample(range(8 * 128), 300):
        data = bytearray(sound)
        data[bit // 8] ^= 1 << bit % 8
        (tmp_path / "y.npy").write_bytes(data)
        try:
            read_array(tmp_path / "y.npy", DataError)
        except DataError as error:
            refused += "\n" not in str(error)
        else:
            sound_ones += 1
    assert refused > 100
    assert refused + sound_ones == 300


@pytest.mark.parametrize("header", ["(1 << 62,)", "(-1,)", "(2**40, 2**40)", "(4611686018427387904,)", "((3,),)"])
@tallied("hostile files: YAML, JSON and .npy", "refused")
def test_an_array_that_is_larger_than_its_file_is_refused(tmp_path: Path, header: str) -> None:
    np.save(tmp_path / "x.npy", np.arange(3))
    data = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(data.replace(b"(3,), }" + b" " * len(header), f"{header}, }}".encode() + b" " * 4))
    with pytest.raises(DataError, match=r"x\.npy: is no readable"):
        read_array(tmp_path / "x.npy", DataError)


NOT_FILES: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "zero": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "nothing": lambda path: None,
}


def _dataset(file: str) -> Callable[[Path, Callable[[Path], object]], Any]:
    def read(folder: Path, put: Callable[[Path], object]) -> Any:
        data = packed(folder, 2, 2)
        (data / "checksums.json").unlink()  # which would tell that the file is gone, before it is opened
        (data / "pack.json").unlink()  # and that its packing is not finished
        (data / file).unlink(missing_ok=True)
        if file == "train.idx":
            (data / "train.offsets.npy").unlink()
            (data / "dataset.yaml").unlink()
        put(data / file)
        return open_dataset(data).read(0)

    return read


def _labels(folder: Path, put: Callable[[Path], object]) -> Any:
    put(folder / "table.npy")
    return open_dataset(packed(folder, 2, 2), folder / "table.npy")


def _image(folder: Path, put: Callable[[Path], object]) -> Any:
    (folder / "im/a").mkdir(parents=True)
    put(folder / "im/a/0.png")
    return pack(list_source(folder / "im"), folder / "out", PackOptions())


def _one(name: str, read: Callable[[Path], Any]) -> Callable[[Path, Callable[[Path], object]], Any]:
    def call(folder: Path, put: Callable[[Path], object]) -> Any:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        put(folder / name)
        return read(folder)

    return call


def _ordered(folder: Path) -> Any:
    np.save(folder / "g.npy", np.eye(3, dtype=np.float32))
    return order_rows(f"highest:{folder / 'x.npy'}", folder / "g.npy")


def _with_templates(folder: Path) -> Any:
    (folder / "meta/x_face_tid_mid.txt").write_text("0.jpg 1 1\n")
    (folder / "meta/x_name_5pts_score.txt").write_text(f"0.jpg {' 1' * 10} 0.9\n")
    (folder / "meta/x_1N_probe_mixed.csv").write_text("template,subject\n1,1\n")
    return read_templates(folder)


READERS: dict[str, Callable[[Path, Callable[[Path], object]], Any]] = {
    "dataset.yaml": _dataset("dataset.yaml"),
    "labels.npy": _dataset("labels.npy"),
    "offsets": _dataset("train.offsets.npy"),
    "rec": _dataset("train.rec"),
    "idx": _dataset("train.idx"),
    "label table": _labels,
    "image": _image,
    "list": _one("x.csv", lambda folder: list_source(folder / "x.csv")),
    "tar": _one("x.tar", lambda folder: list_source(folder / "x.tar")),
    "config": _one("x.yaml", lambda folder: load_config(folder / "x.yaml")),
    "model": _one("model.json", load_model),
    "onnx": _one("x.onnx", lambda folder: load_model(folder / "x.onnx")),
    "weights": _one("x.pt", lambda folder: read_weights(folder / "x.pt")),
    "safetensors": _one("x.safetensors", lambda folder: read_weights(folder / "x.safetensors")),
    "bank": _one("bank.json", CenterBank.open),
    "matrix": _one("x.npy", lambda folder: open_arrays(folder / "x.npy")),
    "seal": _one("state.json", read_seal),
    "summary": _one("summary.json", lambda folder: read_summary(folder, 1)),
    "pairs": _one("x.bin", lambda folder: read_bin(folder / "x.bin", (8, 8))),
    **{
        f"gallery.{kind}": _one(f"g.{kind}", lambda folder, kind=kind: open_gallery(folder / f"g.{kind}"))
        for kind in ("npy", "npz", "safetensors", "parquet", "index")
    },
    "shard of a gallery": _one("g/0.safetensors", lambda folder: open_gallery(folder / "g")),
    "order of a gallery": _one("x.npy", _ordered),
    "templates": _one("meta/x_face_tid_mid.txt", read_templates),
    "pairs of templates": _one("meta/x_template_pair_label.txt", _with_templates),
    "gallery of templates": _one("meta/x_1N_gallery_1.csv", _with_templates),
    "map": _one("x.csv", lambda folder: ClassMap.from_file(folder / "x.csv", None, None)),
}
FINDS_ANOTHER = {("summary", "nothing"), ("offsets", "nothing"), ("dataset.yaml", "nothing"), ("idx", "nothing")}
"""Where a missing file is no error."""


@pytest.mark.parametrize("kind", NOT_FILES)
@pytest.mark.parametrize("reader", READERS)
@tallied("hostile files: pipes, devices and folders", "refused")
def test_what_is_not_a_file_is_refused_at_once(tmp_path: Path, reader: str, kind: str) -> None:
    if (reader, kind) in FINDS_ANOTHER:
        READERS[reader](tmp_path, NOT_FILES[kind])
        return
    with pytest.raises(LceError) as problem:
        READERS[reader](tmp_path, NOT_FILES[kind])
    assert "\n" not in str(problem.value)


def test_a_file_that_is_too_large_to_be_a_text_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match="larger than"):
        read_text(tmp_path / "x", DataError)
    with open_regular(tmp_path / "x", DataError) as opened:
        assert opened.read(1) == b"\0"


@pytest.mark.parametrize("key", ["dim", "width", "hidden"])
@tallied("hostile files: YAML, JSON and .npy", "refused")
def test_a_model_card_of_two_thousand_million_dimensions_is_refused(tmp_path: Path, key: str) -> None:
    saved(tmp_path / "m", "mlp")
    card = json.loads((tmp_path / "m/model.json").read_text())
    places = {"dim": card["backbone"], "width": card["backbone"], "hidden": card["transforms"]["t21"]["config"]}
    assert key in places[key]
    places[key][key] = 2147483648
    (tmp_path / "m/model.json").write_text(json.dumps(card))
    with pytest.raises(ModelError, match=r"model\.json: "):
        load_model(tmp_path / "m")
