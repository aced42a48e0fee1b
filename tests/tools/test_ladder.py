"""``lce bench head --ladder``: what runs follows from what fits; others' figures are told apart from measured ones."""

import argparse
import json
import multiprocessing
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from tools.benchmarks import head, ladder
from tools.cli import main
from trainer.distributed import Ranks
from trainer.errors import ConfigError


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    head.add_arguments(parser)
    return parser.parse_args(["--ladder", *words])


def climbed(args: argparse.Namespace) -> tuple[dict[str, Any], list[tuple[int, str, str, bool]]]:
    """The ladder with a synthetic measurement; and what was asked to be measured: classes, rows, side, sequential."""
    asked = []

    def measure(case: argparse.Namespace) -> dict[str, Any]:
        asked.append((case.classes, case.rows, case.only, case.sequential))
        figures: dict[str, Any] = {"ours": {"seconds": 0.5, "peak_bytes": 2**30}}
        if case.only == "both":
            figures |= {"reference": {"seconds": 2.0, "peak_bytes": 2**31}, "ratio": 4.0}
        return figures

    return ladder.climb(args, measure), asked


def test_rungs_follow_from_the_memory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    args = arguments(
        "--memory", "13GiB", "--lce", "direct", "--centers", "mapped", "--markdown", str(tmp_path / "l.md")
    )
    figures, asked = climbed(args)
    assert [(classes, rows, only) for classes, rows, only, _ in asked] == [
        (125_000, "float32", "both"),
        (1_000_000, "float32", "ours"),
        (2_000_000, "float32", "ours"),
        (5_500_000, "bfloat16", "ours"),
    ]
    assert [rung["rows"] for rung in figures["rungs"]] == ["float32"] * 3 + ["bfloat16"] + [None] * 3
    text = (tmp_path / "l.md").read_text()
    assert "| 29,000,000 | – | – | does not fit" in text
    assert text in capsys.readouterr().out


def test_centres_count_as_they_are_stored() -> None:
    def need(where: str) -> int:
        args = arguments("--lce", "direct", "--centers", where)
        return ladder.needed_bytes(args, 1_000_000, "float32", "fused")

    centers = 1_000_000 * 512 * 4
    assert need("float32") - need("bfloat16") == pytest.approx(centers / 2, rel=0.01)
    assert need("bfloat16") - need("mapped") == pytest.approx(centers / 2, rel=0.01)


def test_both_sides_take_turns_only_where_they_fit_together() -> None:
    args = arguments("--memory", "19GiB", "--rungs", "1e5", "1e6", "--every-rows")
    _, asked = climbed(args)
    assert asked == [
        (100_000, "float32", "both", False),
        (100_000, "bfloat16", "both", False),
        (1_000_000, "float32", "both", True),
        (1_000_000, "bfloat16", "both", False),
    ]


def test_published_figures_are_marked() -> None:
    figures, _ = climbed(arguments("--memory", "13GiB"))
    text = ladder.as_markdown(figures)
    assert "Published by others, not measured here" in text
    row = next(line for line in text.splitlines() if line.startswith("| 1,000,000"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:6] == ["does not fit", "0.5 s, 1.00 GiB", "–", "256"]
    assert all(cell.startswith("*") and cell.endswith("*") for cell in cells[6:])
    assert not any("*" in cell for cell in cells[:6])


def test_a_small_ladder_really_runs(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--rungs", "1500", "--dim", "16", "--batch", "8", "--steps", "1", "--warmup", "1", "--json", "-"]
    assert main(["bench", "head", "--ladder", "--only", "ours", "--lce", "direct", "--centers", "mapped", *words]) == 0
    (rung,) = json.loads(capsys.readouterr().out)["rungs"]
    assert rung["measured"]["ours"]["seconds"] > 0
    assert rung["measured"]["ours"]["peak_bytes"] == pytest.approx(rung["planned_bytes"], rel=0.25)


@pytest.mark.parametrize("lce", ["direct", "both"])
def test_lce_against_no_lce(lce: str, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--classes", "300", "--dim", "16", "--batch", "8", "--steps", "1", "--warmup", "1", "--rate", "0.5"]
    assert main(["bench", "head", *sizes, "--lce", lce, "--against-no-lce", "--json", "-"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["bound_seconds"] == max(figures["products_seconds"], figures["memory_seconds"])
    assert figures["ratio"] == pytest.approx(figures["reference"]["seconds"] / figures["ours"]["seconds"])
    assert (figures["impl"], figures["against"]) == ("auto", "ours without LCE")


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_bound_of_the_memory_counts_every_table_and_changes_none(momentum: float) -> None:
    args = arguments("--classes", "300", "--dim", "16", "--batch", "8", "--rate", "0.5", "--lce", "direct")
    args.momentum, args.world_size, args.centers = momentum, 1, "float32"
    made = head._head("ours", args, Ranks())
    rows, version = made.rows.clone(), made.rows._version
    clock = iter([0.0, 1.0])  # the rows, 2 · 300 · 64 bytes, in a second
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head.time, "perf_counter", lambda: next(clock))
        seconds = head.memory_seconds(150, made, 0)
    passes = 3 + 2 * (momentum > 0) + 2  # rows read twice and written, the state read and written, centres read twice
    assert seconds == pytest.approx(passes * 150 / (2 * 300))
    assert torch.equal(made.rows, rows)
    assert made.rows._version == version


def test_maps_are_compiled_where_that_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    from trainer.networks.transform import ResidualBottleneck

    args = arguments("--classes", "300", "--dim", "16", "--lce", "both")
    args.world_size, args.centers = 1, "float32"
    for compiled in (False, True):
        args.compile_maps = compiled
        loss, _ = head._companion(args, Ranks())
        maps = next(cell.cell_contents for cell in loss.__closure__ if hasattr(cell.cell_contents, "maps")).maps()
        blocks = [one for module in maps.values() for one in module.modules() if isinstance(one, ResidualBottleneck)]
        assert len(blocks) == 8
        assert all((one._compiled_call_impl is not None) == compiled for one in blocks)
    assert main(["bench", "head", "--classes", "300", "--lce", "direct", "--compile-maps"]) == 2
    assert "--lce direct trains no map" in capsys.readouterr().err


def test_another_implementation_takes_the_same_rows_as_ours_and_the_reference_float32() -> None:
    args = arguments("--rows", "bfloat16", "--impl", "native", "--against", "fused")
    configs = [head._config(args, side) for side in ("ours", "reference")]
    assert [(one.impl, one.rows) for one in configs] == [("native", "bfloat16"), ("fused", "bfloat16")]
    assert head._config(arguments("--rows", "bfloat16"), "reference").rows == "float32"


def test_an_implementation_that_does_not_run_here_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    side, (ours, theirs) = head.Implementation.__new__(head.Implementation), multiprocessing.Pipe()
    side.pipes = [ours]
    ours.send("ready")
    args = arguments("--classes", "300", "--dim", "16", "--impl", "native", "--optimizer", "adamw")
    head._rank("ours", args, 0, str(tmp_path / "store"), theirs)
    with pytest.raises(ConfigError, match=r"the C\+\+ pass does not run here"):
        side._ask("step")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rate", "0"], "sample_rate = 0.0"),
        (["--rate", "2"], "sample_rate = 2.0"),
        (["--margin", "cosine"], "margin.name = 'cosine'"),
        (["--ladder", "--rungs", "1e5", "0"], "0 classes for 1 rank"),
        (["--batch", "1", "--world-size", "2"], "--batch 1: at least 2"),
        (["--steps", "0"], "--steps 0: at least 1"),
        (["--against-no-lce", "--against", "fused"], "--against is of no use"),
        pytest.param(
            ["--device", "cuda"],
            "0 usable CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA"),
        ),
    ],
)
def test_what_no_head_can_have_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "head", "--classes", "300", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_rank_that_ended_is_named() -> None:
    side, (ours, theirs) = head.Implementation.__new__(head.Implementation), multiprocessing.Pipe()
    side.pipes = [ours]
    theirs.close()
    with pytest.raises(RuntimeError, match="rank 0 ended without an answer"):
        side._ask("ready")


def test_the_memory_s_speed_on_cuda_is_that_of_a_gibibyte() -> None:
    """Less would stay in the cache, or take as long as its launch."""
    large, small = torch.empty(3_000_000, 1024, dtype=torch.uint8, device="meta"), torch.empty(7, 64, dtype=torch.uint8)
    for number in range(5):
        part, times = head.timed_part(large, number, "cuda")
        assert (len(part), times) == (1 << 20, 1)
    part, times = head.timed_part(small, 3, "cuda")
    assert len(part) == 7
    assert times * part.nbytes >= 1 << 30
    assert head.timed_part(small, 3, "cpu")[1] == 1


@pytest.mark.parametrize(("compute", "said"), [("tf32", "tf32"), ("float32", "ieee")])
def test_the_products_of_the_bound_are_the_head_s(compute: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args, met, multiply = arguments("--compute", compute, "--batch", "2", "--dim", "2"), set(), torch.mm

    def spy(*given: Any, **named: Any) -> Any:
        met.add(torch.backends.cuda.matmul.fp32_precision)
        return multiply(*given, **named)

    monkeypatch.setattr(torch, "mm", spy)
    assert head.products_seconds(10, args, torch.device("cpu")) > 0
    assert met == {said}


def test_labels_are_gathered_before_a_step_is_timed() -> None:
    module, x, labels = MagicMock(), torch.ones(1), torch.zeros(1)
    head._timed_step(module, x, labels, 3)
    module.gather_labels.assert_called_once_with(labels)
    module.assert_called_once_with(x, module.gather_labels.return_value, 3, None)
