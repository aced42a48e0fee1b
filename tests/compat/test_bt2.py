"""BT²: the plain float64 formula on any number of ranks, a whole run, and what the exported map is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.compat.test_rivals import (
    CLASSES,
    DIM,
    LABELS,
    NUMBERS,
    UNKNOWN,
    global_batch,
    make_old,
    one_step,
    own_keys,
)
from tests.data.samples import packed
from tests.ranks import run_ranks
from tests.runs import config, losses_of, train_rank
from tools.cli import main
from trainer.compat.bank.center_bank import CenterBank
from trainer.compat.methods import losses
from trainer.data import open_dataset
from trainer.distributed import Ranks
from trainer.errors import ConfigError
from trainer.evaluation.verification import score_pairs
from trainer.models.model import embed_dataset
from trainer.models.open import load_model
from trainer.networks.config import OrthogonalConfig
from trainer.networks.transform import build_transform
from trainer.run.engine import train

pytestmark = pytest.mark.slow
OLD_DIM = 4


def plain(folder: Path, scale: float) -> dict[str, Tensor]:
    rows = CenterBank.open(folder / "bank").rows(0, CLASSES)
    old = torch.from_numpy(np.load(folder / "old.npy")).double()[NUMBERS]
    x, valid = global_batch().requires_grad_(), LABELS >= 0
    torch.manual_seed(1)
    basis = build_transform(OrthogonalConfig(name="orthogonal"), DIM, OLD_DIM).double()
    known = valid & (NUMBERS != UNKNOWN)
    mapped = basis(torch.nn.functional.normalize(x))
    loss = 0.7 * losses.bt2(
        mapped, old, known, LABELS.clamp_min(0), valid, rows.centers.double(), rows.mask, scale, margin=0.1
    )
    loss.backward()
    assert x.grad is not None
    named = {f"t21 {k}": p.grad for k, p in basis.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "x": x.grad, **named}


def step(ranks: Ranks, folder: Path) -> dict[str, Any]:
    return one_step(ranks, folder, "bt2", {})


@pytest.mark.parametrize("world", [1, 2])
def test_any_number_of_ranks_is_the_plain_formula(world: int, tmp_path: Path) -> None:
    make_old(tmp_path, OLD_DIM)
    each = [step(Ranks(), tmp_path)] if world == 1 else run_ranks(step, world, tmp_path)
    expected = plain(tmp_path, config(tmp_path / "run").head.margin.scale)
    assert len(expected) == 3
    assert expected["t21 linear.parametrizations.weight.original"].abs().max() > 1e-3
    for name, value in expected.items():
        got = torch.cat([one["x"] for one in each]) if name == "x" else each[0][name]
        torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-12, msg=lambda m: f"{name}: {m}")  # noqa: B023
        assert name == "x" or all(torch.equal(one[name], each[0][name]) for one in each)


def test_a_whole_run_exports_the_old_part(tmp_path: Path) -> None:
    old = make_old(tmp_path, OLD_DIM)
    given = own_keys("bt2", {"compat__method": "bt2", "compat__weight": 2.0, "data__batch_size": 8, **old})
    train(config(tmp_path / "1", **given), Ranks())
    run_ranks(train_rank, 2, tmp_path / "2", given)
    np.testing.assert_allclose(losses_of(tmp_path / "2"), losses_of(tmp_path / "1"), rtol=1e-7)
    model = load_model(tmp_path / "1")
    assert (model.card.mode, set(model.card.transforms), model.dim) == ("bt2", {"t21"}, DIM)
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    whole, axes = model.embed(images), np.eye(DIM)
    part = model.transform("t21", whole)
    assert part.shape == (5, OLD_DIM)
    np.testing.assert_allclose(np.linalg.norm(part, axis=1), 1, atol=1e-6)
    basis = torch.nn.Module.get_submodule(model.transforms["t21"], "linear").weight.detach().numpy()  # type: ignore[attr-defined]
    np.testing.assert_allclose(basis @ basis.T, np.eye(OLD_DIM), atol=1e-5)
    assert np.abs(basis - axes[:OLD_DIM]).max() > 1e-4, "it was trained"


def test_evaluate_and_onnx_carry_the_old_part(tmp_path: Path) -> None:
    """From the trained run and from its ONNX file `lce evaluate` finds the same in the old gallery, and that is what
    the run's map finds there."""
    data = packed(tmp_path / "data")
    given = {"data__loader": "torch", "data__path": str(data), "data__workers": 0, "data__batch_size": 9}
    train(config(tmp_path / "old", **given, backbone__dim=OLD_DIM), Ranks())
    files = {"bank": str(tmp_path / "bank"), "old_embeddings": str(tmp_path / "old.npy")}
    words = ["centers", "from-model", str(tmp_path / "old"), str(data), files["bank"]]
    assert main([*words, "--embeddings", files["old_embeddings"]]) == 0
    method = {"compat__method": "bt2", **{f"compat__{key}": path for key, path in files.items()}}
    train(config(tmp_path / "new", **given, **method), Ranks())
    graph = str(tmp_path / "new.onnx")
    assert main(["export", str(tmp_path / "new"), graph, "--dataset", str(data), "--transform", "t21"]) == 0
    found = []
    for new in (str(tmp_path / "new"), graph):
        words = ["evaluate", "--old", str(tmp_path / "old"), "--new", new, "--data", f"x={data}", "--fars", "1e-1"]
        assert main([*words, "--replicates", "100", "--cache", "none", "--json", str(tmp_path / "found.json")]) == 0
        found.append(json.loads((tmp_path / "found.json").read_text())["sets"]["x"]["cells"]["new->old"])
    assert [one["title"] for one in found] == ["T₂₁(new) → old", "new → old"]
    model, dataset = load_model(tmp_path / "new"), open_dataset(data)
    queries = model.transform("t21", embed_dataset(model, dataset))
    expected = score_pairs(queries, np.asarray(dataset.labels), np.load(files["old_embeddings"])).tar_at(0.1)
    for one in found:
        np.testing.assert_allclose(one["tar"][0]["value"], expected, atol=1e-9)


def test_it_needs_more_dimensions(tmp_path: Path) -> None:
    old = make_old(tmp_path)
    with pytest.raises(ConfigError, match=r"backbone.dim is 6, the old model's dimension is 6.*use backbone.dim=9"):
        train(config(tmp_path / "run", **own_keys("bt2", {"compat__method": "bt2", **old})), Ranks())
    assert not (tmp_path / "run").exists()
