"""`make gpu-check` on a CPU: every stage runs to its end, scaled down."""

import json
from pathlib import Path

import pytest

from tools.benchmarks.gpu_check import stages
from tools.cli import main


@pytest.mark.slow
def test_stages_run_to_their_end_on_a_cpu(tmp_path: Path) -> None:
    name = "head-4000-0.1-bfloat16"
    words = ["bench", "gpu_check", "--device", "cpu", "--small", "--out", str(tmp_path), "--stages", name]
    assert main(words) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {stage["name"]: stage["state"] for stage in summary["stages"]} == {name: "done"}
    assert json.loads((tmp_path / f"{name}.json").read_text())["ours"]["seconds"] > 0
    for stage in stages("cpu", True, tmp_path):  # two more, without a process each
        if stage.name in ("lce-direct", "trace"):
            assert stage.argv[0] == "tools.cli"
            assert main(list(stage.argv[1:])) == 0
            assert (tmp_path / f"{stage.name}.json").is_file()


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
