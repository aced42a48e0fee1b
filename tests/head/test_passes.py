"""How often a step passes over the rows on the path that CUDA takes, counted by operators; norms that are kept."""

from typing import Any

import pytest
import torch

from tests.head.test_equality import config
from tools.passes import counting
from trainer.distributed import Ranks
from trainer.head.partial_fc import PartialFC
from trainer.head.products import matmul_precision

ROWS, DIM, BATCH, CHUNK = 16384, 40, 6, 4096


def passes(steps: int = 2, **changes: Any) -> float:
    """Passes over the step's rows, in float32 rows, of the last of some steps."""
    rate = changes.get("sample_rate", 1.0)
    head = PartialFC(config(chunk_rows=CHUNK, **changes), ROWS, DIM, Ranks(), seed=0)
    head.set_lr(0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        x = torch.randn(BATCH, DIM, generator=generator).requires_grad_()
        if step < steps - 1:
            head(x, torch.arange(BATCH), step).loss.backward()
            continue
        with counting(head, DIM, CHUNK // 4) as counted:
            head(x, torch.arange(BATCH), step).loss.backward()
    product = 2 * round(rate * ROWS) * DIM * BATCH
    assert sum(one.flops for one in counted.found.values()) >= 3 * product  # 4 where the first pass's are not kept
    return counted.row_passes(round(rate * ROWS))


def test_an_update_passes_over_the_rows_nine_times() -> None:
    """Three products read them, one writes their move; the update reads three and writes two."""
    assert passes(rows="float32") == pytest.approx(9.0, abs=0.01)


def test_the_first_step_also_reads_the_norms() -> None:
    assert passes(steps=1, rows="float32") == pytest.approx(10.0, abs=0.01)


def test_bfloat16_rows_move_less_than_float32_ones() -> None:
    assert passes(rows="bfloat16", compute="bfloat16") == pytest.approx(5.5, abs=0.1)


def test_drawn_rows_are_also_gathered() -> None:
    """Gathering reads rows and momentum and writes the rows, their norms are read; the update gathers the momentum."""
    assert passes(rows="float32", sample_rate=0.5) <= 13.1


def test_drawn_bfloat16_rows_are_rounded_where_they_are_updated() -> None:
    """One kernel gathers the momentum, moves, rounds and scatters; products in bfloat16 convert the rows besides."""
    assert passes(rows="bfloat16", sample_rate=0.5) == pytest.approx(11.0, abs=0.1)
    assert passes(rows="bfloat16", compute="bfloat16", sample_rate=0.5) == pytest.approx(12.5, abs=0.1)


def test_norms_kept_are_not_used_where_the_rows_were_changed() -> None:
    """From outside, by a loaded checkpoint or by the C++ pass: the loss is that of the rows as they are."""

    def loss(change: bool) -> float:
        head = PartialFC(config(rows="float32", optimizer={"name": "sgd"}), 50, 8, Ranks(), seed=0)
        head.set_lr(0.1)
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
        if change:
            head(x.clone().requires_grad_(), torch.arange(6), 0).loss.backward()
        head.rows.copy_(torch.linspace(-3, 5, 400).view(50, 8))
        head.load_shard_state()
        return head(x, torch.arange(6), 1).loss.item()

    assert loss(True) == loss(False)


def test_the_precision_of_products_is_set_around_them_alone() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    for tf32, said in ((True, "tf32"), (False, "ieee")):
        with matmul_precision(tf32):
            assert torch.backends.cuda.matmul.fp32_precision == said
        assert torch.backends.cuda.matmul.fp32_precision == before
