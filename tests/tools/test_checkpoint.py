"""`lce checkpoint`: what is in it, damage as status 1, weights taken out."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import config
from tests.tools.test_cli import imported
from tools.checkpoint import _shown
from tools.cli import main
from trainer.distributed import Ranks
from trainer.run.engine import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    train(config(folder, checkpoint__every_steps=4, train__ema=0.5), Ranks())
    return folder


def test_info(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "info", str(run), "--json", str(tmp_path / "info.json")]) == 0
    four, eight = json.loads((tmp_path / "info.json").read_text())
    assert (four["step"], eight["step"], eight["steps"], eight["classes"], eight["dim"]) == (4, 8, 8, 11, 6)
    assert four["bytes"] > 8 * four["numbers"] * 0.9
    assert not {"torch", "sympy"} & imported("checkpoint", "info", str(run))
    capsys.readouterr()
    assert main(["checkpoint", "info", str(run)]) == 0
    out = capsys.readouterr().out
    assert "\n  ranks: 1\n" in out
    assert "KiB\n" in out
    assert _shown("normalisation", "((0.5, 0.4), (0.3, 1.0))") == "mean 0.5, 0.4; std 0.3, 1.0"
    assert not {"{", "none"} & set(out.split())


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


def test_info_names_what_is_not_whole_and_lists_the_rest(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/checkpoints/step-00000004/state.json").unlink()
    assert main(["checkpoint", "info", str(tmp_path / "run"), "--json", str(tmp_path / "info.json")]) == 1
    four, eight = json.loads((tmp_path / "info.json").read_text())
    assert "step-00000004" in four["damage"]
    assert eight["step"] == 8


def test_extract_takes_nothing_damaged(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, tmp_path / "run")
    file = next((tmp_path / "run/checkpoints/step-00000008").glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(data)
    assert main(["checkpoint", "extract", str(tmp_path / "run"), str(tmp_path / "b.safetensors")]) == 2
    assert "content changed" in capsys.readouterr().err
    assert main(["checkpoint", "extract", str(run), str(tmp_path / "nowhere/b.safetensors")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


def test_no_run(tmp_path: Path) -> None:
    assert main(["checkpoint", "info", str(tmp_path)]) == 2
