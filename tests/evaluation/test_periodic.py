"""Evaluation while training: its figures are those of the finished model, at any world size; the best is kept."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.samples import encoded, packed
from tests.ranks import run_ranks
from tests.runs import config, log_of, train_all, train_rank
from trainer.checkpoint_folder import list_checkpoints, read_seal
from trainer.data import open_dataset
from trainer.distributed import Ranks
from trainer.errors import ConfigError, DataError, LceError
from trainer.evaluation.config import EvaluateConfig
from trainer.evaluation.pairs import pair_cosines, read_bin
from trainer.evaluation.periodic import PeriodicEvaluation, some_identities
from trainer.evaluation.verification import fold_accuracy, score_pairs
from trainer.models.model import embed_dataset
from trainer.models.open import load_model
from trainer.run.engine import train


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A .bin of 20 pairs and a data set of 5 × 9 images, 32 × 32."""
    folder = tmp_path_factory.mktemp("sets")
    images = [encoded(seed, (32, 32)) for pair in range(20) for seed in (pair, pair if pair % 2 else pair + 50)]
    (folder / "lfw.bin").write_bytes(pickle.dumps((images, [bool(pair % 2) for pair in range(20)])))
    return {"lfw": str(folder / "lfw.bin"), "unseen": str(packed(folder))}


def _changes(sets: dict[str, str], **more: Any) -> dict[str, Any]:
    base = {"data__synthetic_size": 32, "train__ema": 0.5, "log__every_steps": 3, "train__steps": 5}
    measured = {"evaluate__sets": sets, "evaluate__every_steps": 2, "evaluate__far": 0.05}
    return base | (measured if sets else {}) | more


def test_an_old_model_of_another_dimension_is_refused_before_training(sets: dict[str, str], tmp_path: Path) -> None:
    train(config(tmp_path / "old", **_changes({}, backbone__dim=9)), Ranks())
    with pytest.raises(
        ConfigError, match=r"evaluate\.old = .*: dimension 9, backbone\.dim is 6, and this run trains no"
    ):
        train(config(tmp_path / "new", **_changes(sets, evaluate__old=str(tmp_path / "old"))), Ranks())
    assert not (tmp_path / "new").exists()


def test_a_set_may_have_a_label_table(sets: dict[str, str], tmp_path: Path) -> None:
    labels = np.load(Path(sets["unseen"]) / "labels.npy").copy()
    labels[labels > 2] = -1
    np.save(tmp_path / "few.npy", labels)
    config = EvaluateConfig(every_steps=1, sets={"few": Path(f"{sets['unseen']}@{tmp_path / 'few.npy'}")})
    evaluation = PeriodicEvaluation(config, (32, 32), Ranks())
    assert len(evaluation.records["few"]) == (labels >= 0).sum()


def test_images_that_are_trained_on_are_told(sets: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    """By the images, not the folder's name; images that the training's label table leaves out are not trained on."""
    folder = Path(sets["unseen"])
    labels = np.load(folder / "labels.npy")
    copied, first, rest = (folder.parent / name for name in ("copied", "first.npy", "rest.npy"))
    shutil.copytree(folder, copied)
    np.save(first, np.where(labels < 3, labels, -1))
    np.save(rest, np.where(labels < 3, -1, labels - 3))
    for trained, path, said in (
        (open_dataset(folder), copied, f"{len(labels)} of its {len(labels)} images are trained on"),
        (open_dataset(folder, first), Path(f"{copied}@{first}"), f"{(labels < 3).sum()} of its"),
        (open_dataset(folder, first), Path(f"{copied}@{rest}"), ""),
        (open_dataset(packed(folder.parent / "others", size=(16, 16))), copied, ""),
    ):
        caplog.clear()
        config = EvaluateConfig(every_steps=1, sets={"x": path})
        PeriodicEvaluation(config, (32, 32), Ranks(), trained)
        assert said in caplog.text
        assert ("trained on" in caplog.text) == bool(said)


def test_figures_are_those_of_the_model(sets: dict[str, str], tmp_path: Path) -> None:
    """On two ranks; logged every 2 steps and at the end; the last ones are those of the exported model."""
    train(config(tmp_path / "old", **_changes({})), Ranks())
    changes = _changes(sets, evaluate__old=str(tmp_path / "old"))
    run_ranks(train_rank, 2, tmp_path / "two", changes)
    train(config(tmp_path / "one", **changes), Ranks())
    names = {"lfw.accuracy", "lfw.accuracy_to_old", "unseen.tar", "unseen.tar_to_old"}
    for run in ("one", "two"):
        lines = log_of(tmp_path / run)
        assert [line["step"] for line in lines if names <= line.keys()] == [2, 4, 5]
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    one, two = (log_of(tmp_path / run) for run in ("one", "two"))
    assert all(a[n] == pytest.approx(b[n], abs=0.06) for a, b in zip(one, two, strict=True) for n in names & a.keys())
    model, old = load_model(tmp_path / "two"), load_model(tmp_path / "old")
    dataset, pairs = open_dataset(Path(sets["unseen"])), read_bin(Path(sets["lfw"]), (32, 32))
    new = embed_dataset(model, dataset)
    labels = np.asarray(dataset.labels)
    assert two[-1]["unseen.tar"] == score_pairs(new, labels).tar_at(0.05)
    assert two[-1]["unseen.tar_to_old"] == score_pairs(new, labels, embed_dataset(old, dataset)).tar_at(0.05)
    new = embed_dataset(model, pairs.dataset)
    assert two[-1]["lfw.accuracy"] == fold_accuracy(pair_cosines(new, new, pairs.first, pairs.second), pairs.genuine)[0]
    assert 0 < two[-1]["unseen.tar"] <= 1


def test_it_changes_nothing(sets: dict[str, str], tmp_path: Path) -> None:
    given = {"with": _changes(sets, train__parallel="fsdp"), "without": _changes({}, train__parallel="fsdp")}
    run_ranks(train_all, 2, tmp_path, given)
    losses = [{line["step"]: line["loss"] for line in log_of(tmp_path / run)} for run in ("with", "without")]
    assert all(losses[0][step] == loss for step, loss in losses[1].items())


def test_the_best_checkpoint_is_kept(tmp_path: Path, sets: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Best at step 4 of 10, kept next to the newest; a continued run knows it still, and a better one replaces it."""
    by_step = {2: 0.5, 4: 0.9, 6: 0.7, 8: 0.9, 10: 0.6, 12: 0.95, 14: 0.1, 16: 0.2}

    def measure(self: Any, model: Any, beat: Any) -> dict[str, float]:
        return {"lfw.accuracy": by_step[int(model.hash.removeprefix("step-"))]}

    monkeypatch.setattr(PeriodicEvaluation, "measure", measure)
    best = {
        "checkpoint__asynchronous": False,
        "checkpoint__best": "lfw.accuracy",
        "checkpoint__every_steps": 2,
        "checkpoint__keep": 1,
    }
    for steps, kept in ((10, [4, 10]), (16, [12, 16])):
        train(config(tmp_path / "run", **_changes(sets, train__steps=steps) | best), Ranks())
        folders = list_checkpoints(tmp_path / "run/checkpoints")
        assert [int(p.name[5:]) for p in folders] == kept
    assert read_seal(folders[0])["figures"] == {"lfw.accuracy": 0.95}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"checkpoint__best": "lfw.tar"}, "evaluate.sets gives lfw.accuracy, unseen.tar"),
        ({"checkpoint__best": "cfp.accuracy"}, "not measured"),
        ({"checkpoint__best": "lfw.accuracy_to_old"}, "not measured"),
        ({"checkpoint__best": "lfw.accuracy", "checkpoint__every_steps": 3}, "no multiple"),
        ({"evaluate__sets": {"lfw": "missing.bin"}, "evaluate__far": 1e-3}, "missing.bin"),
        ({"data__synthetic_size": 16}, "images of"),
    ],
)
def test_refusals(sets: dict[str, str], tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(LceError, match=words):
        train(config(tmp_path / "run", **_changes(sets) | changes), Ranks())
    assert not (tmp_path / "run").exists()


def test_large_sets_are_cut_by_identity(tmp_path: Path) -> None:
    dataset = open_dataset(packed(tmp_path))
    records = some_identities(dataset, 20)
    counts = np.bincount(np.asarray(dataset.labels)[records], minlength=5)
    assert sorted(counts) == [0, 0, 0, 9, 9]
    alone = packed(tmp_path / "alone", images=1)
    with pytest.raises(DataError, match="nothing to find"):
        PeriodicEvaluation(EvaluateConfig(every_steps=1, sets={"x": alone}), (32, 32), Ranks())


def test_sets_too_small_to_score_are_refused_at_the_start(tmp_path: Path) -> None:
    images = [encoded(seed, (32, 32)) for seed in range(18)]
    (tmp_path / "nine.bin").write_bytes(pickle.dumps((images, [bool(pair % 2) for pair in range(9)])))
    lonely = packed(tmp_path / "lonely", classes=1)
    for path, reason in ((tmp_path / "nine.bin", "9 pairs are too few for 10 folds"), (lonely, "only one identity")):
        with pytest.raises(DataError, match=rf"evaluate\.sets\.x = .*{reason}"):
            PeriodicEvaluation(EvaluateConfig(every_steps=1, sets={"x": path}), (32, 32), Ranks())
