"""`make gpu-check` on a CPU: every stage runs to its end, scaled down."""

import json
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools.benchmarks import gpu_check
from tools.benchmarks.gpu_check import Stage, stages
from tools.cli import main


@pytest.mark.slow
def test_stages_run_to_their_end_on_a_cpu(tmp_path: Path) -> None:
    names = ["head-4000-0.1-bfloat16"]
    words = [
        "bench",
        "gpu_check",
        "--device",
        "cpu",
        "--small",
        "--out",
        str(tmp_path),
        "--stages",
        ",".join(names),
    ]
    assert main(words) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    states = {stage["name"]: stage["state"] for stage in summary["stages"]}
    assert states == dict.fromkeys(names, "done")
    assert json.loads((tmp_path / "head-4000-0.1-bfloat16.json").read_text())["ours"]["seconds"] > 0
    for stage in stages("cpu", True, tmp_path):  # two more, without a process each
        if stage.name in ("lce-direct", "trace"):
            assert stage.argv[0] == "tools.cli"
            assert main(list(stage.argv[1:])) == 0


def test_triton_comes_after_equality_next_to_the_fused_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    every = stages("cuda", False, tmp_path)
    assert [stage.name for stage in every][:4] == [
        "equality",
        "triton-equality",
        "triton-1000000-1.0",
        "triton-1000000-0.1",
    ]
    assert {stage.skipped for stage in every[1:4]} == {"the package triton is not installed"}
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: object())
    every = stages("cuda", False, tmp_path)
    assert not any(stage.skipped for stage in every)
    assert " ".join(every[2].argv).endswith(
        f"--impl triton --against fused --json {tmp_path / 'triton-1000000-1.0.json'}"
    )


def test_all_stages_together_end_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would take longer is ended, and what comes after is not started: the status says that it was not all."""
    waits = Stage("waits", ("http.server", "--bind", "127.0.0.1", "0"), 60)
    monkeypatch.setattr(gpu_check, "stages", lambda *arguments: [waits, replace(waits, name="more")])
    clock = map(float, count())
    monkeypatch.setattr(gpu_check, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert main(["bench", "gpu_check", "--device", "cpu", "--out", str(tmp_path), "--seconds", "2"]) == 1
    ended = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert [stage["state"] for stage in ended] == ["too long", "no time left"]


def test_a_stage_that_was_asked_for_and_skipped_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = ["triton-equality", "triton-4000-1.0", "triton-4000-0.1"]
    every = [stage for stage in stages("cpu", True, tmp_path) if stage.skipped]
    assert [stage.name for stage in every] == triton
    monkeypatch.setattr(gpu_check, "stages", lambda *arguments: every)
    words = ["bench", "gpu_check", "--device", "cpu", "--small", "--out", str(tmp_path)]
    for more, status in (([], 0), (["--stages", ",".join(triton)], 1)):
        assert main([*words, *more]) == status
        ended = json.loads((tmp_path / "summary.json").read_text())["stages"]
        assert {stage["state"] for stage in ended} == {"skipped: only a GPU runs Triton's kernels"}


def test_the_stages_have_names_of_their_own(tmp_path: Path) -> None:
    every = stages("cuda", False, tmp_path)
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
