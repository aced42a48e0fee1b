"""`lce checkpoint`: what is in it, damage as status 1, weights taken out."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import config
from tools.cli import main
from trainer.distributed import Ranks
from trainer.engine import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    train(config(folder, checkpoint__every_steps=4, train__ema=0.5), Ranks())
    return folder


def test_info(run: Path, tmp_path: Path) -> None:
    assert main(["checkpoint", "info", str(run), "--json", str(tmp_path / "info.json")]) == 0
    four, eight = json.loads((tmp_path / "info.json").read_text())
    assert (four["step"], eight["step"], eight["steps"], eight["classes"], eight["dim"]) == (4, 8, 8, 11, 6)
    assert four["bytes"] > 8 * four["numbers"] * 0.9


def test_extract(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "b.safetensors"
    assert main(["checkpoint", "extract", str(run), str(out)]) == 0
    assert main(["checkpoint", "extract", str(run), str(tmp_path / "a.safetensors"), "--average"]) == 0
    average = load_file(tmp_path / "a.safetensors")
    exported = load_file(run / "model/backbone.safetensors")  # the export takes the moving average where there is one
    assert all(torch.equal(average[k], v) for k, v in exported.items())
    assert not torch.equal(load_file(out)["layers.1.weight"], average["layers.1.weight"])
    assert main(["checkpoint", "extract", str(run)]) == 2


def test_verify(run: Path, tmp_path: Path) -> None:
    assert main(["checkpoint", "verify", str(run)]) == 0
    file = next((run / "checkpoints/step-00000004").glob("*.distcp"))
    data = file.read_bytes()
    file.write_bytes(data[:-7] + b"x" + data[-6:])
    try:
        assert main(["checkpoint", "verify", str(run), "--json", str(tmp_path / "damage.json")]) == 1
    finally:
        file.write_bytes(data)
    four, eight = json.loads((tmp_path / "damage.json").read_text())
    assert "content changed" in four["damage"]
    assert eight["damage"] is None


def test_no_run(tmp_path: Path) -> None:
    assert main(["checkpoint", "info", str(tmp_path)]) == 2
