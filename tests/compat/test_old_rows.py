"""Rows that stay: where the bank has a centre, from the first loss to the last checkpoint, whatever the optimizer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.compat.test_rivals import CLASSES, MASKED, make_old
from tests.ranks import run_ranks
from tests.runs import config, losses_of
from trainer.compat.bank.center_bank import CenterBank
from trainer.compat.methods import losses
from trainer.data import build_loader
from trainer.distributed import Ranks
from trainer.errors import ConfigError
from trainer.models.open import load_model
from trainer.run.config import Config
from trainer.run.engine import train
from trainer.run.optim import local_part
from trainer.run.startup import prepare
from trainer.run.task import TrainTask

STEADY = {"schedule__name": "constant", "schedule__warmup": 0.0, "checkpoint__every_steps": 4}


def settings(folder: Path, bank: str, **more: Any) -> Config:
    margin = {"name": "cosface", "scale": 8, "m": 0.2}
    return config(folder, compat__method="frozen", compat__bank=bank, head__margin=margin, **(STEADY | more))


def steps(ranks: Ranks, folder: Path, bank: str, more: dict[str, Any]) -> dict[str, Any]:
    """Five updates: this rank's rows before, after and as a checkpoint has them, and the losses."""
    torch.set_num_threads(1)
    chosen = settings(folder / "run", bank, **more)
    task = TrainTask(chosen, prepare(chosen, ranks), ranks)
    task.set_lr(0.5)
    loader = build_loader(chosen.data, chosen.run.seed, None, ranks)
    before, found = task.head.rows.clone(), []
    for number, batch in zip(range(5), loader.batches(), strict=False):
        out = task.compute(batch, number, True, torch.tensor(1.0))
        task.apply(out.finite)
        found.append(out.report["classification"].item())
    loader.close()
    after, saved = task.head.rows.clone(), local_part(task.head.shard_state()["rows"]).clone()
    return {"before": before, "after": after, "saved": saved, "losses": found}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"head__sample_rate": 0.5},
        {"head__optimizer": {"name": "adamw"}},
        {"head__update": "deferred"},
        {"head__impl": "reference"},
    ],
)
def test_rows_with_a_centre_stay_and_the_others_move(more: dict[str, Any], tmp_path: Path) -> None:
    bank = make_old(tmp_path)["compat__bank"]
    centers = torch.nn.functional.normalize(CenterBank.open(bank).rows(0, CLASSES).centers.double())
    known = torch.ones(CLASSES, dtype=torch.bool)
    known[list(MASKED)] = False
    alone = steps(Ranks(), tmp_path, bank, more)
    for rows in (alone["before"], alone["after"], alone["saved"]):
        assert torch.equal(rows[known], centers[known])
    assert (alone["after"] - alone["before"])[~known].abs().amax(1).gt(1e-4).all()
    many = run_ranks(steps, 3, tmp_path, bank, more)
    for key in ("after", "saved"):
        torch.testing.assert_close(torch.cat([one[key] for one in many]), alone[key], rtol=1e-7, atol=1e-9)
    assert torch.equal(torch.cat([one["saved"] for one in many])[known], centers[known])
    np.testing.assert_allclose(many[0]["losses"], alone["losses"], rtol=1e-7)


def test_the_loss_is_the_softmax_over_these_rows(tmp_path: Path) -> None:
    chosen = settings(tmp_path / "run", make_old(tmp_path)["compat__bank"])
    task = TrainTask(chosen, prepare(chosen, Ranks()), Ranks())
    loader = build_loader(chosen.data, chosen.run.seed, None, Ranks())
    batch = next(loader.batches())
    loader.close()
    rows, everyone = task.head.rows.clone(), torch.ones(CLASSES, dtype=torch.bool)
    expected = losses.bct(task.backbone(batch.images.double()), batch.labels, rows, everyone, 8, 0.2)
    got = task.compute(batch, 0, True, torch.tensor(1.0)).report["classification"]
    torch.testing.assert_close(got.double(), expected.detach(), rtol=1e-6, atol=1e-9)


def test_a_run_that_is_cut_in_two_is_the_same(tmp_path: Path) -> None:
    bank = make_old(tmp_path)["compat__bank"]
    train(settings(tmp_path / "1", bank), Ranks())
    train(settings(tmp_path / "cut", bank, train__steps=4), Ranks())
    train(settings(tmp_path / "cut", bank), Ranks())
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "1")
    assert load_model(tmp_path / "1").card.mode == "frozen"


def test_what_cannot_stay_is_refused(tmp_path: Path) -> None:
    bank = make_old(tmp_path)["compat__bank"]
    with pytest.raises(ConfigError, match="needs one row a class"):
        train(settings(tmp_path / "run", bank, head__sub_centers=2), Ranks())
    with pytest.raises(ConfigError, match=r"use backbone\.dim=6"):
        train(settings(tmp_path / "run", bank, backbone__dim=5), Ranks())
    assert not (tmp_path / "run").exists()
