"""Methods together: the sum of the plain float64 terms, the pull of each, any number of ranks, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.compat.test_rivals import CLASSES, DIM, make_old
from tests.ranks import run_ranks
from tests.runs import log_of, train_rank, tree
from trainer.compat.bank.center_bank import CenterBank
from trainer.compat.methods import losses
from trainer.data import build_loader
from trainer.distributed import Ranks
from trainer.errors import ConfigError
from trainer.models.open import load_model
from trainer.run.config import Config, dump_config, load_config, parse_config
from trainer.run.engine import train
from trainer.run.startup import prepare
from trainer.run.task import TrainTask

WEIGHTS = {"alignment_weight": 0.7, "boundary_weight": 3.0}
COSFACE = {"margin": {"name": "cosface", "scale": 8, "m": 0.2}, "rows": "float64", "init_std": 0.3}


def methods(old: dict[str, Any], *names: str, **more: Any) -> list[dict[str, Any]]:
    """Sections of these methods, all for the old model of :func:`make_old`."""
    bank, stored = {"bank": old["compat__bank"]}, {"old_embeddings": old["compat__old_embeddings"]}
    known: dict[str, dict[str, Any]] = {
        "lce": {**bank, **WEIGHTS},
        "bct": {**bank, "weight": 0.6, "old_margin": 0.1},
        "unibct": {**stored, "weight": 0.5},
        "l2": {**stored, "weight": 2.0},
        "advbct": {**bank, **stored, "boundary_weight": 1.5},
        "mixbct": {**bank, **stored},
        "fct": {**stored, "transform": {"name": "linear"}},
    }
    return [{"method": name, **known[name], **more.get(name, {})} for name in names]


def with_list(folder: Path, compat: list[dict[str, Any]], **more: Any) -> Config:
    return parse_config(tree(folder, **more) | {"compat": compat}, "test")


def settings(folder: Path, compat: list[dict[str, Any]]) -> Config:
    return with_list(folder / "run", compat, data__batch_size=13, **{f"head__{k}": v for k, v in COSFACE.items()})


def one_batch(ranks: Ranks, folder: Path, compat: list[dict[str, Any]]) -> dict[str, Tensor]:
    """What a task reports of the first batch, and its backbone's gradient."""
    torch.set_num_threads(1)
    chosen = settings(folder, compat)
    inputs = prepare(chosen, ranks)
    task = TrainTask(chosen, inputs, ranks)
    task.set_lr(0.0)
    loader = build_loader(chosen.data, chosen.seed, None, ranks)
    out = task.compute(next(loader.batches()), 0, True, torch.tensor(1.0), 1.0, True).report
    loader.close()
    return out | {f"gradient of {name}": p.grad for name, p in task.backbone.named_parameters() if p.grad is not None}


def plain(folder: Path, compat: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The same of ``lce``, ``bct`` and ``l2`` in direct mode, by the formulas."""
    chosen = settings(folder, compat)
    task = TrainTask(chosen, prepare(chosen, Ranks()), Ranks())
    loader = build_loader(chosen.data, chosen.seed, None, Ranks())
    batch = next(loader.batches())
    loader.close()
    bank = CenterBank.open(folder / "bank").rows(0, CLASSES)
    o, b, mask, y = bank.centers.double(), bank.boundaries.double(), bank.mask, batch.labels
    old = torch.from_numpy(np.load(folder / "old.npy")).double()[batch.records]
    known = old.any(1)
    x, rows = task.backbone(batch.images.double()), task.head.rows.detach().clone().requires_grad_()
    everyone, scale = torch.ones(CLASSES, dtype=torch.bool), chosen.head.margin.scale
    terms = {"classification": losses.bct(x, y, rows.detach(), everyone, scale, 0.2)}
    for one in compat:
        if one["method"] == "lce":
            aligned = one["alignment_weight"] * losses.alignment(rows, o, mask)
            terms["lce"] = aligned + one["boundary_weight"] * losses.boundary(x, o[y], b[y], mask[y])
        elif one["method"] == "bct":
            terms["bct"] = one["weight"] * losses.bct(x, y, o, mask, scale, one["old_margin"])
        else:
            terms["l2"] = one["weight"] * losses.l2(x[known], old[known])
    out = {}
    for name, value in terms.items():
        (gradient,) = torch.autograd.grad(value, x, retain_graph=True)
        out[f"gradient_{name}"] = gradient.norm()
    if "lce" in terms:
        of_rows = torch.autograd.grad(terms["lce"], rows, retain_graph=True)[0]
        out["row_gradient_lce"] = of_rows[y.unique()].norm()
    total = torch.stack(list(terms.values())).sum()
    total.backward()
    out["loss"] = total.detach()
    return out | {f"gradient of {name}": p.grad for name, p in task.backbone.named_parameters() if p.grad is not None}


PLAIN = (("lce", "bct"), ("lce", "l2"), ("bct", "l2"), ("l2", "lce", "bct"), ("lce",))


def all_plain(ranks: Ranks, folder: Path) -> list[dict[str, Tensor]]:
    old = {"compat__bank": str(folder / "bank"), "compat__old_embeddings": str(folder / "old.npy")}
    return [one_batch(ranks, folder, methods(old, *names)) for names in PLAIN]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_list_is_the_sum_of_its_terms(world: int, tmp_path: Path) -> None:
    old = make_old(tmp_path)
    results = [all_plain(Ranks(), tmp_path)] if world == 1 else run_ranks(all_plain, world, tmp_path)
    for number, names in enumerate(PLAIN):
        expected = plain(tmp_path, methods(old, *names))
        assert set(expected) >= {f"gradient_{name}" for name in ("classification", *names)}
        for each in results:
            for key, value in expected.items():
                assert value.norm() > 1e-3, (names, key)
                got = each[number][key].double()
                apart = float((got - value).abs().max())
                assert torch.allclose(got, value, rtol=1e-6, atol=1e-7), (names, key, apart)


@pytest.mark.parametrize(
    ("names", "more"),
    [
        (("lce", "bct", "l2", "advbct"), {}),
        (("unibct", "lce"), {"head__sample_rate": 0.6}),
        (("lce", "mixbct"), {"train__accumulate": 2}),
        (("lce", "fct"), {"mode": "backward"}),
    ],
)
def test_whole_runs(names: tuple[str, ...], more: dict[str, Any], tmp_path: Path) -> None:
    """The same losses and pulls on three ranks; a run that is cut in two repeats them to the last bit."""
    old = make_old(tmp_path)
    through = {"lce": {"mode": "backward", "transform": {"name": "linear"}}} if "mode" in more else {}
    compat = methods(old, *names, **through)
    rest = {key: value for key, value in more.items() if key != "mode"}
    steady = {"schedule__name": "constant", "schedule__warmup": 0.0, "checkpoint__every_steps": 4, **rest}
    train(with_list(tmp_path / "1", compat, **steady), Ranks())
    expected = figures_of(tmp_path / "1")
    run_ranks(train_list, 3, tmp_path / "3", compat, steady)
    for line, other in zip(expected, figures_of(tmp_path / "3"), strict=True):
        assert line.keys() == other.keys()
        np.testing.assert_allclose(list(other.values()), list(line.values()), rtol=1e-6, atol=1e-9)
    train(with_list(tmp_path / "cut", compat, **steady, train__steps=4), Ranks())
    train(with_list(tmp_path / "cut", compat, **steady), Ranks())
    assert figures_of(tmp_path / "cut") == expected
    assert {f"gradient_{name}" for name in ("classification", *names)} <= expected[0].keys()
    if "advbct" in names:
        assert {"boundary", "advbct_boundary", "influence", "l2"} <= expected[0].keys()
    labels = [("backward" if through else "direct") if name == "lce" else name for name in names]
    card = load_model(tmp_path / "1").card
    assert card.mode == "+".join(labels)
    assert set(card.transforms) == ({"t21", "t12"} if through else set())


def train_list(ranks: Ranks, folder: Path, compat: list[dict[str, Any]], more: dict[str, Any]) -> str:
    torch.set_num_threads(1)
    return train(with_list(folder, compat, **more), ranks).status


def figures_of(folder: Path) -> list[dict[str, float]]:
    """The lines of a log without what depends on the machine."""
    apart = ("samples_per_second", "step_seconds", "data_share", "communication_share", "memory_bytes", "seconds")
    return [{k: v for k, v in line.items() if k not in apart} for line in log_of(folder)]


def test_measuring_changes_nothing(tmp_path: Path) -> None:
    """A run that logs, and so measures, each step ends at the same loss as one that logs the last alone."""
    compat = methods(make_old(tmp_path), "lce", "bct", "advbct")
    ends = []
    for every in (1, 8):
        train(with_list(tmp_path / str(every), compat, log__every_steps=every), Ranks())
        ends.append(figures_of(tmp_path / str(every))[-1])
    assert ends[0] == ends[1]


LCE, CROSS = {"method": "lce", "bank": "b"}, {"method": "lce", "mode": "cross-model"}
OTHER = {"method": "unibct", "old_embeddings": "other.npy"}


@pytest.mark.parametrize(
    ("compat", "message"),
    [
        ([LCE, LCE], "method lce is given more than once"),
        ([LCE, {"method": "none"}], "method none stands next to others"),
        ([LCE, {"method": "bct", "bank": "c"}], "one old model.*lce has bank = b; bct has bank = c"),
        ([{"method": "l2", "old_embeddings": "o"}, OTHER], "one old model.*old_embeddings = o;.*other.npy"),
        ([{"method": "l2", "old_model": "m"}, OTHER], "old_model = m; unibct has old_embeddings = other.npy"),
        ([CROSS, {"method": "bct", "bank": "b"}], "cross-model trains no network, on which bct could act"),
        ([LCE | {"mode": "both"}, {"method": "fct", "old_model": "m"}], "lce and fct train the same map T₁₂"),
        ([LCE | {"mode": "backward"}, {"method": "bct", "bank": "b"}], "bct compares .* as they are, backward through"),
        ([LCE, {"method": "fct", "old_model": "m"}], "direct compares .* as they are, fct through maps"),
        (
            [{"method": "mixbct", "bank": "b", "old_model": "m"}, {"method": "l2", "old_model": "m"}],
            "mixbct puts old embeddings in place of new ones, and l2",
        ),
    ],
)
def test_senseless_pairs_are_refused(compat: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        with_list(tmp_path / "run", compat)
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    wide = make_old(tmp_path, 9)
    with pytest.raises(ConfigError, match=r"compat.method = l2: the old model's dimension is 9, backbone.dim is 6"):
        train(with_list(tmp_path / "run", methods(wide, "l2", "unibct")), Ranks())
    assert not (tmp_path / "run").exists()


def test_a_list_is_dumped_and_read_back(tmp_path: Path) -> None:
    made = with_list(tmp_path / "run", methods(make_old(tmp_path), "lce", "bct"))
    (tmp_path / "again.yaml").write_text(dump_config(made))
    assert load_config(tmp_path / "again.yaml") == made
    assert [one.method for one in made.methods] == ["lce", "bct"]


def test_a_single_run_logs_its_pull_too(tmp_path: Path) -> None:
    old = make_old(tmp_path)
    train_rank(Ranks(), tmp_path / "run", {"compat__method": "lce", "compat__bank": old["compat__bank"]})
    line = log_of(tmp_path / "run")[0]
    assert {"gradient_classification", "gradient_lce", "row_gradient_lce"} <= line.keys()
    assert line["row_gradient_lce"] > 0
    assert DIM == 6
