"""The C++ pass equals the torch pass and the float64 reference, and steps aside where it does not fit."""

import contextlib
import ctypes
import platform
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.head.cases import Case, largest_difference, run_head
from tests.head.test_equality import config
from tests.ranks import run_ranks
from tests.sections import variant
from trainer.distributed import Ranks, one_thread, worker_threads
from trainer.errors import DataError
from trainer.head import fused, native, old_centers, partial_fc
from trainer.head.config import AnyRowOptimizer, HeadConfig
from trainer.head.kernels import Kernels
from trainer.head.old_centers import StepCenters
from trainer.head.partial_fc import PartialFC
from trainer.head.products import bfloat16_gemm

pytestmark = pytest.mark.skipif(native.load() is None, reason="no C++ compiler or no sgemm in torch's BLAS")

WIDE = Case(classes=1003, dim=48, batch=37, compat=True)
"""Four blocks, the last one incomplete, and dimensions that fill no vector register."""


def as_if_large(patch: pytest.MonkeyPatch) -> None:
    """Small heads get what large ones do, without the time that torch.compile takes."""
    patch.setattr(partial_fc, "COMPILE_FROM_ROWS", 0)
    patch.setattr(partial_fc, "Kernels", lambda chunk, compiled: Kernels(chunk, compiled=False))


def run_native(ranks: Ranks, head: HeadConfig, case: Case, expected: bool = True) -> dict[str, Any]:
    """:func:`run_head` with the C++ pass allowed at any size; fails unless it was used as ``expected``."""
    used = []

    class Spy(native.Native):
        def second(self, fields: native.StepFields) -> None:
            used.append(True)
            super().second(fields)

    with pytest.MonkeyPatch.context() as patch:
        as_if_large(patch)
        if library := native.load():
            patch.setattr(native, "load", lambda: Spy(library.library, library.gemm, library.bfloat16_gemm))
        out = run_head(ranks, head, case)
    assert bool(used) == expected, "the C++ pass was used" if used else "the C++ pass was not used"
    return out


def check(case: Case, **changes: Any) -> None:
    """The C++ pass errs against float64 about as much as torch in float32 does, by the reference or the fused pass."""
    exact = [run_head(Ranks(), config("reference", **changes), case)]
    largest = max(float(exact[0][name].abs().max()) for name in exact[0].keys() & {"rows", "momentum"})
    short = {"rows": "float32"} | changes
    theirs = max(
        largest_difference([run_head(Ranks(), config(impl, **short), case)], exact) for impl in ("reference", "fused")
    )
    ours = largest_difference([run_native(Ranks(), config(**short), case)], exact)
    assert ours <= 3 * theirs + 2e-6 * max(1, largest), (ours, theirs, largest)


@pytest.mark.parametrize("rate", [1.0, 0.3, 0.05])
@pytest.mark.parametrize("margin", ["cosface", "arcface", "magface"])
def test_errors_are_of_the_reference_s_own_size(rate: float, margin: str) -> None:
    check(WIDE, sample_rate=rate, margin={"name": margin})


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_with_correction_and_without_lce(rate: float) -> None:
    check(Case(classes=700, dim=31, batch=8), sample_rate=rate, sampling_correction=rate < 1)


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_without_momentum(rate: float) -> None:
    check(WIDE, sample_rate=rate, optimizer=variant(AnyRowOptimizer, momentum=0.0))


@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize(("rows", "compute"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16",) * 2])
def test_bfloat16_errs_as_torch_does(rows: str, compute: str, rate: float) -> None:
    """Rows and products rounded to bfloat16, in C++ and in torch, against float64."""
    if compute == "bfloat16" and bfloat16_gemm() is None:
        pytest.skip("this processor or torch's BLAS has no product of bfloat16 matrices")
    changes = {"sample_rate": rate, "margin": {"name": "arcface"}}
    exact = [run_head(Ranks(), config("reference", **changes), WIDE)]
    changes |= {"rows": rows, "compute": compute}
    theirs = largest_difference([run_head(Ranks(), config(**changes), WIDE)], exact)
    ours = largest_difference([run_native(Ranks(), config(**changes), WIDE)], exact)
    assert ours <= 1.5 * theirs, (ours, theirs)


def test_bfloat16_rows_are_rounded_without_bias_and_alike_in_a_repeated_run() -> None:
    """A thousand updates far below a bfloat16 step arrive in the mean; rounding to nearest would lose them."""
    with pytest.MonkeyPatch.context() as patch:
        as_if_large(patch)
        found = []
        for _ in range(2):
            optimizer = variant(AnyRowOptimizer, momentum=0.0, weight_decay=0.001)
            head = PartialFC(config(rows="bfloat16", optimizer=optimizer), 700, 40, Ranks(), seed=0)
            assert isinstance(head.softmax, native.NativeSoftmax)
            head.rows.fill_(1.0)
            head.set_lr(0.1)  # a step is 1e-4 of the row; one of bfloat16 below 1 is 3.9e-3
            for step in range(1000):
                head(torch.ones(1, 40).requires_grad_(), torch.tensor([-1]), step).loss.backward()
            found.append(head.rows.clone())
    assert torch.equal(*found)
    assert found[0].float().mean().item() == pytest.approx((1 - 1e-4) ** 1000, abs=2e-3)


def test_products_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "KEEP_SHARE", 10.0)
    check(WIDE, sample_rate=0.3)
    check(WIDE)


@settings(max_examples=25, deadline=None)
@given(
    classes=st.integers(1, 600),
    dim=st.integers(2, 40),
    batch=st.integers(1, 20),
    rate=st.sampled_from([1.0, 0.5, 0.1]),
    compat=st.booleans(),
)
def test_any_shape(classes: int, dim: int, batch: int, rate: float, compat: bool) -> None:
    check(Case(classes=classes, dim=dim, batch=batch, steps=2, compat=compat, ignored=batch > 1), sample_rate=rate)


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_ranks_equal_one_process(rate: float) -> None:
    head = config(rows="float32", sample_rate=rate)
    case = Case(classes=603, dim=24, batch=11, compat=True, empty_rank=1)
    parts = run_ranks(run_native, 3, head, case)
    assert largest_difference(parts, [run_native(Ranks(), head, case)]) < 2e-4


def test_a_run_repeats_itself_to_the_last_bit() -> None:
    head = config(rows="float32", sample_rate=0.3)
    assert largest_difference([run_native(Ranks(), head, WIDE)], [run_native(Ranks(), head, WIDE)]) == 0


def test_negative_control_other_weights_differ() -> None:
    a = run_native(Ranks(), config(rows="float32"), WIDE)
    b = run_native(Ranks(), config(rows="float32"), Case(classes=1003, dim=48, batch=37))
    assert largest_difference([a | {"report": []}], [b | {"report": []}]) > 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": "float64"},
        {"rows": "float32", "sub_centers": 2},
        {"rows": "float32", "optimizer": variant(AnyRowOptimizer, name="adamw")},
        {"rows": "float32", "margin": {"name": "curricular"}},
        {"rows": "float32", "margin": {"inter_class_filter": 0.5}},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_steps_aside(changes: dict[str, Any]) -> None:
    run_native(Ranks(), config(**changes), Case(steps=1), expected=False)


def test_a_forward_in_between_does_not_disturb_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    as_if_large(monkeypatch)

    def rows(disturb: bool) -> torch.Tensor:
        head = PartialFC(config(rows="float32", sample_rate=0.3), 500, 16, Ranks(), seed=0)
        head.set_lr(0.1)
        generator = torch.Generator().manual_seed(1)
        for step in range(3):
            x = torch.randn(8, 16, generator=generator).requires_grad_()
            loss = head(x, torch.arange(8), step).loss
            if disturb:
                head(-x.detach(), torch.arange(8) + 100, step + 50)
            loss.backward()
        head.shard_state()
        return head.rows.clone()

    assert (rows(False) - rows(True)).abs().max() < 1e-3  # the rows are about 3


@pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("objdump") is None, reason="no objdump of x86-64 code"
)
def test_exponentials_are_taken_by_vectors() -> None:
    """A loop over the samples that the compiler leaves scalar costs a step up to a fifth of its time, and no number."""
    command = ["objdump", "--disassemble", "--no-show-raw-insn", str(native._built())]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rounded = (r"\bvrndscaless\b|\bv?roundss\b", r"\bvrndscaleps\b|\bv?roundps\b")
    scalar, packed = (
        {part.split(">", 1)[0] for part in code.split("\n\n") if re.search(pattern, part)} for pattern in rounded
    )
    assert packed
    assert scalar <= packed, "these functions take exponentials one by one"


def test_without_a_compiler_torch_runs_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'no such flag' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    native.library_of_this_machine.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"C\+\+ kernels cannot be built here.*no such flag"):
            run_native(Ranks(), config(rows="float32"), Case(steps=1), expected=False)
        assert not list(tmp_path.glob("lce-trainer/*.so")), "nothing half-built is left"
    finally:
        native.library_of_this_machine.cache_clear()


def test_a_step_in_cpp_makes_norms_that_torch_has_kept_invalid() -> None:
    """Deferred steps are torch's: one before and one after a step in C++, which changes the rows unseen by torch."""
    with pytest.MonkeyPatch.context() as patch:
        as_if_large(patch)
        quick = PartialFC(config(rows="float32"), 700, 24, Ranks(), seed=0)
    plain = PartialFC(config(rows="float32"), 700, 24, Ranks(), seed=0)
    assert isinstance(quick.softmax, native.NativeSoftmax)
    losses: list[list[float]] = [[], []]
    for head, found in zip((quick, plain), losses, strict=True):
        head.set_lr(0.5)
        generator = torch.Generator().manual_seed(1)
        for step in range(6):
            x = torch.randn(8, 24, generator=generator).requires_grad_()
            with head.deferred() if step % 2 == 0 else contextlib.nullcontext():
                loss = head(x, torch.arange(8), step).loss
                loss.backward()
            head.apply_update()
            found.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_library_whose_struct_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A field added on one side only would make C++ read another tensor's address."""

    class Longer(native.StepFields):
        _fields_ = (("further", ctypes.c_int64),)

    monkeypatch.setattr(native, "StepFields", Longer)
    native.library_of_this_machine.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"native.cpp: Step has \d+ bytes, its mirror in native.py \d+"):
            assert native.load() is None
    finally:
        native.library_of_this_machine.cache_clear()


def test_a_thread_that_is_born_meanwhile_has_all_threads() -> None:
    """Such as the one that gathers old centres for a GPU: torch's new threads take the number that was set last."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with one_thread():
            pool = worker_threads(1, "gathers")
            pool.submit(lambda: None).result()
            torch.set_num_threads(1)
            assert pool.submit(torch.get_num_threads).result() == 3
            assert torch.get_num_threads() == 1
            pool.shutdown()
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """Streams that do nothing, by name: (memory taken, where), (used, by whom), (wait, who)."""
    log: list[tuple[str, str]] = []
    current = ["compute"]

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = name if name == "compute" else "copy"

        def wait_stream(self, other: "Stream") -> None:
            log.append(("wait", self.name))

        def wait_event(self, event: Any) -> None:
            log.append(("wait", self.name))

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        current.append(stream.name)
        yield
        current.pop()

    empty = torch.empty

    def taken(*size: Any, pin_memory: bool = False, **named: Any) -> torch.Tensor:
        if not pin_memory and threading.current_thread() is threading.main_thread():
            log.append(("taken", current[-1]))
        return empty(*size, **named)

    changes = {"Stream": Stream, "Event": MagicMock, "stream": on, "current_stream": lambda _: Stream("compute")}
    for name, value in changes.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "empty", taken)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, stream: log.append(("used", stream.name)))
    old_centers._copy_stream.cache_clear()
    yield log
    old_centers._copy_stream.cache_clear()


def test_old_centers_are_gathered_by_all_threads(
    monkeypatch: pytest.MonkeyPatch, streams: list[tuple[str, str]]
) -> None:
    counts: list[int] = []

    def send(self: StepCenters, start: int) -> MagicMock:
        counts.append(torch.get_num_threads())
        return MagicMock()

    monkeypatch.setattr(StepCenters, "_send", send)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with one_thread():
            centers = StepCenters(torch.ones(6, 4), lambda: torch.arange(5), 5, torch.device("cpu"), 2)
            [arriving.result() for arriving in centers._arriving]
    finally:
        torch.set_num_threads(before)
    assert counts == [3, 3, 3]


def test_old_centers_are_copied_while_the_device_is_busy(streams: list[tuple[str, str]]) -> None:
    """Their memory is the copying stream's, which waits for nothing; the computing one waits for each block."""
    table, threads = torch.randn(9, 4), []

    def index() -> torch.Tensor:
        threads.append(threading.current_thread().name)
        return torch.tensor([8, 1, 1, 0, 5, 7, 2])

    centers = StepCenters(table, index, 7, torch.device("cpu"), 2)
    assert torch.equal(centers.rows(2, 6), table[[1, 0, 5, 7]])
    centers.rows(0, 7)
    assert torch.equal(centers.out, table[[8, 1, 1, 0, 5, 7, 2]])
    assert streams == [("taken", "copy"), ("used", "compute"), *[("wait", "compute")] * 6]
    assert threads == ["old centres_0"]


@pytest.mark.parametrize("cpp", [True, False])
def test_what_is_small_runs_on_one_thread(cpp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Next to a busy process threads that share a little work wait for each other; the passes take all of them."""
    small, large = [], []

    class Spy(native.Native):
        def first(self, fields: native.StepFields) -> None:
            large.append(fields.threads)
            super().first(fields)

    def spy(owner: Any, name: str, found: list[int]) -> None:
        inner = getattr(owner, name)

        def counted(*arguments: Any, **words: Any) -> Any:
            found.append(torch.get_num_threads())
            return inner(*arguments, **words)

        monkeypatch.setattr(owner, name, counted)

    as_if_large(monkeypatch)
    library = native.load()
    assert library is not None
    here = Spy(library.library, library.gemm, library.bfloat16_gemm)
    monkeypatch.setattr(native, "load", lambda: here if cpp else None)
    head = PartialFC(config(rows="float32", sample_rate=0.3), 700, 24, Ranks(), seed=0)
    head.set_lr(0.1)
    before = torch.get_num_threads()
    spy(partial_fc, "draw_rows", small)
    spy(head.softmax.margin, "target", small)
    spy(head.softmax.optimizer, "finish", small)
    if not cpp:
        spy(fused, "product", large)
    torch.set_num_threads(3)
    try:
        head(torch.randn(8, 24).requires_grad_(), torch.arange(8), 0).loss.backward()
        with pytest.raises(DataError, match="label 707"):
            head(torch.randn(8, 24), torch.arange(8) + 700, 1)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(small) == {1}
    assert len(small) == 3
    assert set(large) == {3}
