"""`make gpu-check` on a CPU: every stage runs to its end, scaled down."""

import json
from pathlib import Path

import pytest

from tools.benchmarks.gpu_check import stages
from tools.cli import main


@pytest.mark.slow
def test_stages_run_to_their_end_on_a_cpu(tmp_path: Path) -> None:
    names = ["head-4000-0.1-bfloat16", "lce-direct", "trace"]
    words = ["bench", "gpu_check", "--device", "cpu", "--small", "--out", str(tmp_path), "--stages", ",".join(names)]
    assert main(words) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {stage["name"]: stage["state"] for stage in summary["stages"]} == dict.fromkeys(names, "done")
    assert json.loads((tmp_path / "head-4000-0.1-bfloat16.json").read_text())["ours"]["seconds"] > 0


def test_the_budgets_fit_into_nine_minutes_but_for_the_ladder(tmp_path: Path) -> None:
    every = stages("cuda", False, tmp_path)
    assert every[0].name == "equality"
    assert len({stage.name for stage in every}) == len(every)


def test_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    words = ["bench", "gpu_check", "--out", str(tmp_path / "out")]
    assert main([*words, "--device", "cpu", "--stages", "nothing"]) == 2
    assert "--stages: no stage nothing; there are equality" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(words) == 2
        assert "no usable GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_the_gpu_tests_pass_where_they_can_run_on_a_cpu(tmp_path: Path) -> None:
    words = ["bench", "gpu_check", "--device", "cpu", "--small", "--out", str(tmp_path), "--stages", "equality"]
    assert main(words) == 0, (tmp_path / "equality.log").read_text()[-3000:]
