"""Every map T in every mode under both optimizers, with and without weight decay: trained some hundred updates by the
product's own loop, it must beat its start and stay what it is."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from tests.data.samples import packed
from tests.run.test_modes import changes_for
from tests.runs import config, log_of
from tests.sections import variant
from trainer.compat.bank.center_bank import BankInfo
from trainer.compat.bank.convert import bank_from_embeddings
from trainer.compat.bank.matrices import open_rows
from trainer.data import open_dataset
from trainer.distributed import Ranks
from trainer.errors import TrainingError
from trainer.models.model import TorchModel
from trainer.models.open import load_model
from trainer.networks.transform import Orthogonal
from trainer.run.config import AnyOptimizer, SgdConfig
from trainer.run.engine import train
from trainer.run.optim import Updater, undecayed

CLASSES, IMAGES, OLD, NEW = 11, 8, 9, 6
RATES = {"sgd": 0.05, "adamw": 3e-3}
DECAYS = (0.0, SgdConfig().weight_decay)
MODES = ("backward", "forward", "both", "cross-model")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of noise by class, its old embeddings (D1 = 9) and new ones (D2 = 6), linear views of one hidden
    space, and the old bank."""
    folder = tmp_path_factory.mktemp("maps")
    dataset = open_dataset(packed(folder, CLASSES, IMAGES, (8, 8)))
    labels, rng = np.asarray(dataset.labels), np.random.default_rng(0)
    hidden = rng.normal(size=(CLASSES, NEW))[labels] + 0.2 * rng.normal(size=(len(labels), NEW))
    turn = np.linalg.qr(rng.normal(size=(OLD, OLD)))[0][:NEW]
    for name, view in (("old", hidden @ turn), ("new", hidden)):
        np.save(folder / f"{name}.npy", (view / np.linalg.norm(view, axis=1, keepdims=True)).astype(np.float32))
    bank_from_embeddings(open_rows([folder / "old.npy"]), labels, CLASSES, folder / "bank", BankInfo(model="old"))
    return folder


def settings(scene: Path, transform: str, mode: str, optimizer: str, decay: float) -> dict[str, Any]:
    """A run of 200 updates in float32, as users have it, on the synthetic data or on the scene's embeddings."""
    more: dict[str, Any] = {
        "optimizer__name": optimizer,
        "optimizer__lr": RATES[optimizer],
        "optimizer__weight_decay": decay,
        "train__steps": 200,
        "train__precision": "float32",
        "head__rows": "float32",
        "data__batch_size": 22,
    }
    if mode == "cross-model":
        more |= {"data__loader": "torch", "data__workers": 0, "data__path": str(scene / "packed")}
        more |= {f"compat__{name}_embeddings": str(scene / f"{name}.npy") for name in ("old", "new")}
    return changes_for(scene / "bank", mode, transform, **more)


def check(folder: Path, mode: str, transform: str) -> None:
    """The run in ``folder`` beat its start; its maps give unit vectors, and an orthogonal one is orthogonal."""
    lines = log_of(folder)
    start, end = lines[0]["alignment"], np.mean([line["alignment"] for line in lines[-20:]])
    assert end < 0.75 * start, (folder.name, start, end)
    model = load_model(folder)
    assert isinstance(model, TorchModel)
    assert set(model.transforms) == {"backward": {"t21"}, "forward": {"t12"}}.get(mode, {"t21", "t12"})
    for direction, module in model.transforms.items():
        card = model.card.transforms[direction]
        vectors = normalize(torch.randn(5, card.dim_in, generator=torch.Generator().manual_seed(0))).numpy()
        np.testing.assert_allclose(np.linalg.norm(model.transform(direction, vectors), axis=1), 1, atol=1e-5)
        if transform == "orthogonal":
            q = module.linear.weight.detach()  # type: ignore[union-attr]
            gram = q.T @ q if card.dim_out >= card.dim_in else q @ q.T
            torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-5)


ALL = [*itertools.product(MODES, RATES, DECAYS)]
SHARE = [("backward", "sgd", DECAYS[1]), ("both", "adamw", DECAYS[1]), ("cross-model", "sgd", DECAYS[1])]


@pytest.mark.slow
@pytest.mark.parametrize("cases", [SHARE, pytest.param(ALL, marks=pytest.mark.attack)], ids=["share", "all"])
@pytest.mark.parametrize("transform", ["rbt", "linear", "orthogonal", "mlp"])
def test_every_map_beats_its_start(
    scene: Path, tmp_path: Path, transform: str, cases: list[tuple[str, str, float]]
) -> None:
    for mode, optimizer, decay in cases:
        folder = tmp_path / f"{mode}-{optimizer}-{decay:g}"
        train(config(folder, **settings(scene, transform, mode, optimizer, decay)), Ranks())
        check(folder, mode, transform)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize(("dim_in", "dim_out"), [(24, 16), (16, 24), (8, 8)])
def test_decay_leaves_an_orthogonal_map_alone(name: Any, dim_in: int, dim_out: int) -> None:
    module, yes = Orthogonal(dim_in, dim_out), torch.tensor(True)
    updater = Updater({"t21": module}, variant(AnyOptimizer, name=name, lr=0.1, weight_decay=5e-4))
    assert undecayed(module) == [key for key, _ in module.named_parameters()]
    for step in range(3):
        x = torch.randn(5, dim_in, generator=torch.Generator().manual_seed(step))
        updater.zero_grad()
        module(x).sum().backward()
        updater.step(0.1, updater.gradient_norm(), yes, torch.tensor(1.0))
    q = module.linear.weight.detach()
    gram = q.T @ q if dim_out >= dim_in else q @ q.T
    torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["both", "cross-model"])
def test_a_map_that_dies_ends_the_run(scene: Path, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.run.optim.undecayed", lambda module: [])  # as it was: decay kills the map
    changes = settings(scene, "orthogonal", mode, "sgd", 5e-4)
    with pytest.raises(TrainingError, match=r"compat.transform.name = orthogonal: T.. gives vectors of norm 0 at step"):
        train(config(tmp_path / "run", **changes), Ranks())
    assert not (tmp_path / "run" / "model").exists()
