"""LCE through learned transformations in a whole run: every mode, D1 = D2 and D1 ≠ D2, on one rank and on many."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.banks import write_bank
from tests.ranks import run_ranks
from tests.runs import config, log_of, losses_of, train_rank
from tests.sections import variant
from trainer.compat.bank.center_bank import BankInfo
from trainer.compat.methods.config import AnyMethod
from trainer.distributed import Labels, Ranks
from trainer.errors import CenterBankError, ConfigError
from trainer.models.open import load_model
from trainer.networks.config import AnyTransform
from trainer.run.engine import train
from trainer.run.startup import prepare
from trainer.run.task import TrainTask

CLASSES = 11


def bank(folder: Path, dim: int, info: BankInfo | None = None) -> Path:
    """Random unit centres of the runs' 11 classes, two of them masked."""
    generator = torch.Generator().manual_seed(dim)
    centers = torch.nn.functional.normalize(torch.randn(CLASSES, dim, generator=generator))
    mask = torch.ones(CLASSES, dtype=torch.bool)
    mask[[2, 7]] = False
    counts = torch.full((CLASSES,), 4)
    write_bank(
        folder,
        centers=centers,
        boundaries=torch.full((CLASSES,), 0.3),
        counts=counts,
        mask=mask,
        info=info or BankInfo(),
    )
    return folder


def changes_for(path: Path, mode: str, transform: str, **more: Any) -> dict[str, Any]:
    own = variant(AnyTransform, name=transform, blocks=1, paths=2)
    compat = variant(AnyMethod, method="lce", mode=mode, bank=str(path), transform=own).model_dump(mode="json")
    return {f"compat__{key}": value for key, value in compat.items()} | {"head__sample_rate": 0.5} | more


CASES = [
    ("backward", 6, "rbt"),
    ("backward", 9, "linear"),
    ("forward", 6, "mlp"),
    ("forward", 3, "orthogonal"),
    ("both", 6, "orthogonal"),
    ("both", 9, "rbt"),
]


@pytest.mark.parametrize(("mode", "old_dim", "transform"), CASES)
def test_ranks_do_not_change_the_run(tmp_path: Path, mode: str, old_dim: int, transform: str) -> None:
    changes = changes_for(bank(tmp_path / "bank", old_dim), mode, transform, optimizer__lr=0.02)
    train(config(tmp_path / "1", **changes), Ranks())
    expected = losses_of(tmp_path / "1")
    world = 2 if transform in ("rbt", "mlp") else 3
    run_ranks(train_rank, world, tmp_path / str(world), changes)
    np.testing.assert_allclose(losses_of(tmp_path / str(world)), expected, rtol=1e-8)
    train(config(tmp_path / "reference", head__impl="reference", **changes), Ranks())
    np.testing.assert_allclose(losses_of(tmp_path / "reference"), expected, rtol=1e-8)
    one, many = load_model(tmp_path / "1"), load_model(tmp_path / str(world))
    directions = {"backward": {"t21"}, "forward": {"t12"}, "both": {"t21", "t12"}}[mode]
    assert set(one.card.transforms) == directions
    for direction in directions:
        for a, b in zip(
            one.transforms[direction].state_dict().values(),  # type: ignore[attr-defined]
            many.transforms[direction].state_dict().values(),  # type: ignore[attr-defined]
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["backward", "forward", "both"])
def test_alignment_falls_and_the_transformation_learns(tmp_path: Path, mode: str) -> None:
    changes = changes_for(bank(tmp_path / "bank", 9), mode, "linear", train__steps=200)
    train(config(tmp_path / "run", **changes), Ranks())
    values = [line["alignment"] for line in log_of(tmp_path / "run")]
    assert np.mean(values[-5:]) < 0.5 * np.mean(values[:5])


def test_the_factor_falls_on_the_transformation_alone(tmp_path: Path) -> None:
    """Loss scale and accumulation: T's gradient is multiplied; those of embeddings and rows are the head's to scale."""
    changes = changes_for(bank(tmp_path / "bank", 9), "both", "linear")
    settings = config(tmp_path / "run", **changes)
    task = TrainTask(settings, prepare(settings, Ranks()), Ranks())
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1, 1, 4, 9, -1])
    found = []
    for factor in (1.0, 0.25):
        embeddings = torch.randn(6, 6, generator=generator.manual_seed(1), dtype=torch.float64).requires_grad_()
        rows = torch.randn(4, 6, generator=generator, dtype=torch.float64).requires_grad_()
        companion = task._companion(torch.tensor(factor), 0)
        assert companion is not None
        companion(embeddings, Labels(labels), rows)[0].backward()
        weights = [p.grad for d in ("t21", "t12") for p in task.modules()[d].parameters()]
        found.append((embeddings.grad, rows.grad, weights))
        for direction in ("t21", "t12"):
            task.modules()[direction].zero_grad()
    whole, quarter = found
    torch.testing.assert_close(whole[0], quarter[0])
    torch.testing.assert_close(whole[1], quarter[1])
    assert whole[1] is not None
    assert whole[1].abs().max() > 0
    for a, b in zip(whole[2], quarter[2], strict=True):
        torch.testing.assert_close(a * 0.25, b)


@pytest.mark.parametrize(
    ("rows", "precision"), [("float64", "float32"), ("float32", "float64"), ("bfloat16", "bfloat16")]
)
@pytest.mark.parametrize("mode", ["backward", "forward", "both"])
def test_rows_of_another_dtype_than_the_maps(tmp_path: Path, mode: str, rows: str, precision: str) -> None:
    changes = changes_for(bank(tmp_path / "bank", 9), mode, "linear", head__rows=rows, train__precision=precision)
    train(config(tmp_path / "run", train__steps=2, **changes), Ranks())
    assert np.isfinite(losses_of(tmp_path / "run")).all()


def test_refusals(tmp_path: Path) -> None:
    path = bank(tmp_path / "bank", 9)
    with pytest.raises(CenterBankError, match=r"direct mode needs backbone\.dim=9"):
        train(config(tmp_path / "a", compat__method="lce", compat__bank=str(path)), Ranks())
    with pytest.raises(ConfigError, match=r"sub_centers"):
        train(config(tmp_path / "b", head__sub_centers=2, **changes_for(path, "backward", "linear")), Ranks())
    with pytest.raises(ConfigError, match=r"head\.rows=bfloat16 needs stochastic rounding"):
        config(tmp_path / "b", head__impl="reference", head__rows="bfloat16")
    with pytest.raises(ConfigError, match=r"compress_gradients: not with train\.parallel fsdp"):
        config(tmp_path / "b", train__compress_gradients=True, train__parallel="fsdp")
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()
