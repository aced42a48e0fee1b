"""What the product writes carries checksums: no flipped bit gives another step, another map or other embeddings."""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.compat.test_center_bank import written
from tests.models.test_export import images, saved
from tools import cli
from trainer import seals
from trainer.checkpoint import Checkpoints
from trainer.checkpoint_folder import CheckpointConfig, read_seal
from trainer.compat.bank.center_bank import CenterBank, _read_manifest
from trainer.data import Dataset, open_dataset
from trainer.distributed import Ranks
from trainer.errors import CheckpointError, ConfigError, LceError, ModelError
from trainer.evaluation.embeddings import EmbeddingCache
from trainer.models.card import read_folder_card
from trainer.models.onnx import OnnxModel
from trainer.models.onnx_export import export_onnx
from trainer.models.open import load_model
from trainer.run.folder import read_summary
from trainer.seals import sealed, unsealed


def flips(file: Path, every: int = 1, first: int = 0, last: int | None = None) -> Iterator[tuple[int, int]]:
    """The file with one bit turned at a time, (byte, bit); whole again at the end."""
    whole = file.read_bytes()
    for number in range(first * 8, 8 * (len(whole) if last is None else last), every):
        data = bytearray(whole)
        data[number // 8] ^= 1 << number % 8
        file.write_bytes(data)
        yield divmod(number, 8)
    file.write_bytes(whole)


def never_silent(file: Path, read: Callable[[], Any], every: int = 1) -> int:
    """Read with every so many-th bit turned: refused by an LceError, or nothing but what was written. How many were
    refused."""
    right, refused = read(), 0
    for at in flips(file, every):
        try:
            assert read() == right, f"{file}: bit {at} gives something else"
        except LceError:
            refused += 1
    return refused


def checkpoint(folder: Path, step: int = 300) -> Path:
    """A checkpoint of one tensor."""
    checkpoints = Checkpoints(folder, CheckpointConfig(), Ranks(), print)
    loader = {"epoch": 2, "samples": 77}
    checkpoints.save({"a": torch.ones(3)}, {"step": step, "loader": loader, "config": {"lr": 0.1, "name": "zwölf"}})
    return folder / f"step-{step:08d}"


def test_no_flipped_bit_of_a_checkpoints_seal_is_believed(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    assert never_silent(folder / "state.json", lambda: read_seal(folder), 3) > 500


def test_a_checkpoint_of_another_step_than_its_folder_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="step 300, its folder step-00000200"):
        read_seal(folder.rename(tmp_path / "step-00000200"))
    copy = (tmp_path / "step-00000200").rename(tmp_path / "mine")
    assert read_seal(copy)["step"] == 300


@pytest.mark.parametrize("change", [{"step": 200}, {"loader": None}, {"loader": {"epoch": "two"}}, {"files": {"a": 1}}])
def test_earlier_checkpoints_open_with_a_word_and_are_looked_at(
    tmp_path: Path, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    folder = checkpoint(tmp_path)
    file = folder / "state.json"
    tree = {k: v for k, v in json.loads(file.read_text()).items() if k != "seal"} | {"format": 1}
    file.write_text(json.dumps(tree))
    seals._logged.clear()
    with caplog.at_level(logging.WARNING):
        assert read_seal(folder)["step"] == read_seal(folder)["step"] == 300
    assert sum("written without checksums" in line for line in caplog.messages) == 1
    file.write_text(json.dumps(tree | {"format": 2}))
    with pytest.raises(CheckpointError, match="its own checksum is missing"):
        read_seal(folder)
    file.write_text(json.dumps(tree | change))
    with pytest.raises(CheckpointError, match="damaged"):
        read_seal(folder)


def test_no_flipped_bit_of_a_banks_description_is_believed(tmp_path: Path) -> None:
    written(tmp_path / "bank")
    before = CenterBank.open(tmp_path / "bank").fingerprint
    assert never_silent(tmp_path / "bank" / "bank.json", lambda: _read_manifest(tmp_path / "bank"), 13) > 300
    tree = json.loads((tmp_path / "bank" / "bank.json").read_text())
    del tree["seal"]  # banks of before are the same banks: runs continue with them
    (tmp_path / "bank" / "bank.json").write_text(json.dumps(tree))
    assert CenterBank.open(tmp_path / "bank").fingerprint == before


def test_no_damage_of_a_model_folder_gives_other_embeddings(tmp_path: Path) -> None:
    model, some = saved(tmp_path / "model", "linear"), images(2)
    right = model.embed(some)
    assert never_silent(tmp_path / "model" / "model.json", lambda: read_folder_card(tmp_path / "model"), 3) > 500
    for name in ("backbone", "t21"):
        file = tmp_path / "model" / f"{name}.safetensors"
        for _ in flips(file, 8 * (file.stat().st_size // 10) + 3):
            with pytest.raises(ModelError, match="not what was written"):
                load_model(tmp_path / "model")
    tree = json.loads((tmp_path / "model" / "model.json").read_text())
    for key in ("seal", "files"):
        del tree[key]
    (tmp_path / "model" / "model.json").write_text(json.dumps(tree))
    assert np.array_equal(load_model(tmp_path / "model").embed(some), right)


def test_no_damage_of_an_onnx_file_gives_other_embeddings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import onnx

    some, file = images(2), tmp_path / "model.onnx"
    export_onnx(saved(tmp_path / "model"), file, some)
    right = OnnxModel.open(file).embed(some)
    size = file.stat().st_size
    for _ in flips(file, 8 * (size // 20) + 3):
        with pytest.raises(ModelError, match="not what was exported"):
            OnnxModel.open(file)
    for _ in flips(file, 11, size - 78):  # in the seal itself
        with contextlib.suppress(ModelError):
            assert np.array_equal(OnnxModel.open(file).embed(some), right)
    caplog.clear()
    seals._logged.clear()
    proto = onnx.load(file)
    proto.metadata_props.add(key="note", value="mine")
    onnx.save(proto, file)
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(OnnxModel.open(file).embed(some), right)
    assert "again by another tool" in caplog.text


def test_cached_embeddings_are_made_anew_when_damaged(tmp_path: Path, some_set: Dataset) -> None:
    model, cache = saved(tmp_path / "model"), EmbeddingCache(tmp_path / "cache")
    right = cache.embed(model, some_set, some_set.kept, Ranks())
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    for at in (3, 60, 200, len(whole) - 70, len(whole) - 1):
        data = bytearray(whole)
        data[at] ^= 16
        file.write_bytes(data)
        assert np.array_equal(cache.embed(model, some_set, some_set.kept, Ranks()), right)
        assert file.read_bytes() == whole


@pytest.fixture
def some_set(tmp_path: Path) -> Dataset:
    """Ten images of two people."""
    from tests.data.samples import identity_folders

    return open_dataset(identity_folders(tmp_path / "people", 2, 5))


def test_a_runs_summary_is_sealed(tmp_path: Path) -> None:
    tree = {"status": "finished", "signal": 0, "dir": "x", "step": 8, "steps": 8, "skipped_steps": 0, "seconds": 1.5}
    tree |= {"last": {"loss": float("nan")}}
    file = tmp_path / "summary.json"
    file.write_text(json.dumps(sealed(tree)))
    assert read_summary(tmp_path, 8) is not None
    file.write_text(file.read_text().replace('"step": 8', '"step": 9'))
    with pytest.raises(ConfigError, match="its checksum differs"):
        read_summary(tmp_path, 8)


def test_a_seal_survives_json_and_yaml_and_any_order_of_keys() -> None:
    tree = sealed({"b": (1, 2.5, 1e-30), "a": {"ü": None, "c": [True, "x\ud800"]}})
    for text in (json.loads(json.dumps(tree)), yaml.safe_load(yaml.safe_dump(sealed({"b": 1.0, "a": ["ü", 1e300]})))):
        assert unsealed(dict(reversed(text.items())), "test", LceError).keys() == {"a", "b"}
    assert unsealed(["no mapping"], "test", LceError) == ["no mapping"]


def test_lce_checkpoint_verify_sees_a_changed_seal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path)
    assert cli.main(["checkpoint", "verify", str(folder)]) == 0
    for old, new in (('"step": 300', '"step": 200'), ('"samples": 77', '"samples": 78')):
        whole = (folder / "state.json").read_text()
        (folder / "state.json").write_text(whole.replace(old, new))
        assert cli.main(["checkpoint", "verify", str(folder)]) == 1
        assert "its checksum differs" in capsys.readouterr().out
        (folder / "state.json").write_text(whole)
