"""The authors' terms where they are asked for: vectors are taken as they are, in every mode."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from tests.ranks import run_ranks
from tests.run.test_modes import bank, changes_for
from tests.runs import config, log_of, losses_of, train_rank
from tests.sections import variant
from trainer.compat.methods import losses
from trainer.compat.methods.config import AnyMethod
from trainer.compat.methods.lce import Pairs, TransformedCompat
from trainer.distributed import Labels, Ranks
from trainer.run.engine import train
from trainer.run.startup import prepare
from trainer.run.task import TrainTask


@pytest.mark.parametrize("mode", ["backward", "forward", "both"])
def test_transformed_terms_are_the_plain_ones(mode: str) -> None:
    generator = torch.Generator().manual_seed(0)
    settings = {"alignment_weight": 0.7, "boundary_weight": 1.3, "authors_formula": True}
    given = variant(AnyMethod, method="lce", mode=mode, bank="bank", transform={"name": "linear"}, **settings)
    compat = TransformedCompat(given, 6, 9).double()
    x, w = (torch.randn(n, 9, generator=generator, dtype=torch.float64) / 2 for n in (8, 4))
    o = normalize(torch.randn(4, 6, generator=generator, dtype=torch.float64))
    mask, place = torch.tensor([True, True, False, True]), torch.tensor([0, 3, -1, 1, 2, 0, 3, 1])
    b = torch.rand(4, generator=generator, dtype=torch.float64)
    got, report = compat(Pairs(torch.arange(4), w, o, b, mask, place), x)
    has = (place >= 0) & mask[place]
    maps: dict[str, Any] = {"t21": compat.t21, "t12": compat.t12}
    aligned = losses.alignment(w, o, mask, authors_formula=True, **maps)
    bound = losses.boundary(x, o[place], b[place], has, authors_formula=True, **maps)
    torch.testing.assert_close(got, 0.7 * aligned + 1.3 * bound, rtol=1e-12, atol=0)
    assert report["boundary"] > 0
    ours = losses.boundary(x, o[place], b[place], has, **maps)
    assert not torch.allclose(bound, ours), "the control"


def direct(tmp_path: Path, **more: Any) -> dict[str, Any]:
    weights = {"compat__alignment_weight": 0.5, "compat__boundary_weight": 2.0}
    return changes_for(bank(tmp_path / "bank", 6), "direct", "linear", **weights, **more)


def test_direct_boundary_is_the_plain_one(tmp_path: Path) -> None:
    settings = config(tmp_path / "run", **direct(tmp_path, compat__authors_formula=True))
    inputs = prepare(settings, Ranks())
    task = TrainTask(settings, inputs, Ranks())
    x = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).mul(0.4).requires_grad_()
    labels = torch.tensor([0, 1, 7, 4, 9, -1])
    assert task.method is not None
    assert inputs.bank is not None
    loss, report = task.method.loss(x, Labels(labels), x.new_empty(5, 6), 0)
    rows, known = inputs.bank.rows(0, 11), labels >= 0
    y = labels[known]
    of = (rows.centers[y].double(), rows.boundaries[y].double(), rows.mask[y])
    plain = losses.boundary(x[known], *of, authors_formula=True)
    torch.testing.assert_close(loss, 2 * plain)
    torch.testing.assert_close(report["boundary"], plain.detach())
    loss.backward()
    assert x.grad is not None
    assert x.grad.any(1).tolist()[2] is False  # class 7 has no centre
    assert x.grad.any()


def test_direct_runs_are_equal_on_many_ranks_and_differ_from_ours(tmp_path: Path) -> None:
    changes = direct(tmp_path, compat__authors_formula=True)
    train(config(tmp_path / "1", **changes), Ranks())
    expected = losses_of(tmp_path / "1")
    run_ranks(train_rank, 3, tmp_path / "3", changes)
    np.testing.assert_allclose(losses_of(tmp_path / "3"), expected, rtol=1e-8)
    train(config(tmp_path / "ours", **direct(tmp_path / "again")), Ranks())
    assert not np.allclose(losses_of(tmp_path / "ours"), expected, rtol=1e-4)
    first, ours = log_of(tmp_path / "1")[0], log_of(tmp_path / "ours")[0]
    assert first["alignment"] == pytest.approx(ours["alignment"])
    assert first["loss"] == pytest.approx(first["classification"] + 0.5 * first["alignment"] + 2 * first["boundary"])
