"""The Triton kernels without a GPU: in Triton's interpreter they equal float64, and they compile for GPUs."""

import importlib.util
import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.head.cases import Case, largest_difference, run_head
from tests.head.test_equality import config
from tests.ranks import run_ranks
from tests.sections import variant
from trainer.distributed import Ranks
from trainer.errors import ConfigError
from trainer.head import partial_fc, triton_pass
from trainer.head.config import AnyRowOptimizer, HeadConfig
from trainer.head.partial_fc import PartialFC

with_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton (extra `triton`): pip install 'lce-trainer[triton]'",
)
CASE = Case(classes=307, dim=40, batch=21, steps=3, compat=True)
"""Rows, samples and dimensions that fill no tile."""
NONE = variant(AnyRowOptimizer, momentum=0.0)
ADAFACE, FILTER = {"name": "adaface", "m": 0.3}, {"name": "cosface", "m": 0.2, "inter_class_filter": 0.3}
CASES: list[tuple[Case, dict[str, Any]]] = [
    (CASE, {}),
    (CASE, {"sample_rate": 0.4}),
    (CASE, {"sample_rate": 0.4, "sampling_correction": True, "margin": ADAFACE}),
    (CASE, {"sample_rate": 0.4, "margin": FILTER, "optimizer": NONE}),
    (replace(CASE, compat=False, batch=70, classes=130), {"margin": FILTER}),
    (replace(CASE, compat=False, dim=7, batch=1, classes=3), {"optimizer": NONE}),
    (replace(CASE, accumulate=2), {"sample_rate": ((0, 0.3), (2, 1.0))}),
]


def interpreted(ranks: Ranks, case: Case, changes: dict[str, Any], compute: torch.dtype | None) -> dict[str, Any]:
    """:func:`run_head` with the kernels in Triton's interpreter, of which it is made sure that they ran."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    calls = {"first": 0, "second": 0}

    class Spy(triton_pass.TritonSoftmax):
        def __init__(self, settings: Any, *rest: Any) -> None:
            super().__init__(settings if compute is None else replace(settings, compute=compute), *rest)

        def first_pass(self, inputs: Any, deferred: bool) -> Any:
            done = super().first_pass(inputs, deferred)
            calls["first"] += isinstance(done, triton_pass.TritonFirstPass)
            return done

        def _chunk_gradient(self, step: Any, *rest: Any) -> Any:
            calls["second"] += isinstance(step.first, triton_pass.TritonFirstPass)
            return super()._chunk_gradient(step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_pass, "TritonSoftmax", Spy)
        out = run_head(ranks, HeadConfig(**(changes | {"impl": "triton"})), case)
    steps = case.steps * case.accumulate
    assert calls["first"] == steps, calls
    assert calls["second"] >= steps, calls
    return out


def head_of(rows: str, changes: dict[str, Any]) -> dict[str, Any]:
    return dict(config("fused", chunk_rows=100, **(changes | {"rows": rows})))


@with_triton
@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_kernels_err_against_float64_as_torch_does(number: int) -> None:
    case, changes = CASES[number]
    exact = [run_head(Ranks(), HeadConfig(**head_of("float64", changes)), case)]
    theirs = largest_difference([run_head(Ranks(), HeadConfig(**head_of("float32", changes)), case)], exact)
    found = run_ranks(interpreted, 1, case, head_of("float32", changes), None)
    assert largest_difference(found, exact) <= 2 * theirs + 2e-6


@with_triton
@pytest.mark.slow
def test_two_ranks_of_which_one_hands_in_nothing() -> None:
    case, changes = replace(CASE, empty_rank=1), {"sample_rate": 0.4}
    exact = [run_head(Ranks(), HeadConfig(**head_of("float64", changes)), case)]
    assert largest_difference(run_ranks(interpreted, 2, case, head_of("float32", changes), None), exact) < 2e-5


@with_triton
@pytest.mark.slow
def test_products_in_half_precision() -> None:
    """In float16: the interpreter cannot multiply bfloat16. What is rounded to it are the products' inputs and Q."""
    exact = [run_head(Ranks(), HeadConfig(**head_of("float64", {})), CASE)]
    found = run_ranks(interpreted, 1, CASE, head_of("float32", {}), torch.float16)
    assert 1e-6 < largest_difference(found, exact) < 2e-2


def test_where_the_kernels_do_not_run_they_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(**changes: Any) -> PartialFC:
        return PartialFC(config("triton", rows="float32", **changes), 50, 8, Ranks(), seed=0)

    monkeypatch.setattr(triton_pass.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"the package triton is not installed .*; use head.impl=auto"):
        build()
    monkeypatch.setattr(triton_pass.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="its kernels run on CUDA, and the device is cpu"):
        build()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for changes, reason in (
        ({"sub_centers": 2}, "the kernels know sgd, one row a class"),
        ({"optimizer": variant(AnyRowOptimizer, name="adamw")}, "the kernels know sgd"),
    ):
        with pytest.raises(ConfigError, match=reason):
            build(**changes)


def test_what_is_chosen_by_name_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def kind(impl: str, **changes: Any) -> str:
        head = PartialFC(config(impl, rows="float32", **changes), 50, 8, Ranks(), seed=0)
        return type(head.softmax).__name__

    assert kind("auto") == kind("fused") == "FusedSoftmax"  # 50 rows are few
    assert kind("reference") == "ReferenceSoftmax"
    monkeypatch.setattr(partial_fc.native, "load", lambda: None)
    with pytest.raises(ConfigError, match=r"head\.impl = native: the C\+\+ pass does not run here"):
        kind("native")


@with_triton
@pytest.mark.slow
def test_kernels_compile_for_a_gpu_and_no_register_spills() -> None:
    """One of each pass; the whole table is benchmarks/triton.md."""
    from tools.benchmarks.triton import compiled

    for which, products, filtered in (("first", "float32", True), ("second", "bfloat16", False)):
        found = compiled(90, which, "float32", products, drawn=True, filtered=filtered)
        assert found["fits"], found
        assert found["registers"] <= 255
