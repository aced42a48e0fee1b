"""Accumulated batches are one batch: the same update and the same figures, also where an epoch's last one is short."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.run.test_modes import bank, changes_for
from tests.runs import config, log_of
from trainer.distributed import Ranks
from trainer.models.model import TorchModel
from trainer.models.open import load_model
from trainer.run.engine import train

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "reference": {"head__impl": "reference"},
    "adamw": {"optimizer__name": "adamw", "optimizer__lr": 0.01, "head__optimizer": {"name": "adamw"}},
    "l2": {"compat__method": "l2"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_six_batches_are_one(tmp_path: Path, name: str) -> None:
    """41 records: five batches of 7 and one of 6, against one of 41."""
    more = {"train__steps": 3, **CASES[name]}
    if name == "l2":
        rows = np.random.default_rng(0).normal(size=(41, 6)).astype(np.float32)
        np.save(tmp_path / "old.npy", rows)
        more["compat__old_embeddings"] = str(tmp_path / "old.npy")
    train(config(tmp_path / "one", data__batch_size=41, **more), Ranks())
    train(config(tmp_path / "six", data__batch_size=7, train__accumulate=6, **more), Ranks())
    one, six = (log_of(tmp_path / folder) for folder in ("one", "six"))
    for key in ("loss", "grad_norm", "target_cosine", *(["l2"] if name == "l2" else [])):
        np.testing.assert_allclose([line[key] for line in six], [line[key] for line in one], rtol=1e-6, err_msg=key)
    models = [load_model(tmp_path / folder) for folder in ("one", "six")]
    first, second = (m.backbone.state_dict() for m in models if isinstance(m, TorchModel))
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_figure_that_only_some_batches_have_is_the_mean_of_those(tmp_path: Path) -> None:
    """Batches of two in which a class with a centre is rare: T's figures are there or not."""
    changes = changes_for(bank(tmp_path / "bank", 6), "backward", "linear", data__batch_size=2, train__accumulate=5)
    train(config(tmp_path / "run", **changes), Ranks())
    lines = log_of(tmp_path / "run")
    assert len(lines) == 8
    assert all(line["t21_norm"] > 0 for line in lines if "t21_norm" in line)
