"""Bad input: one clear line, status 2, before any time is spent, and nothing half-written left behind."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests import forked
from tests.banks import write_bank
from tests.data.samples import packed
from tests.ranks import run_ranks
from tests.runs import config, log_of, tree
from trainer.compat.bank.center_bank import BankInfo, CenterBank
from trainer.compat.bank.convert import check_centers
from trainer.data import open_dataset
from trainer.data.index import seal_table
from trainer.data.listing import list_source
from trainer.data.packing import PackOptions, pack
from trainer.data.splitting import SplitOptions, save_tables, split
from trainer.distributed import Ranks
from trainer.errors import CenterBankError, ConfigError, DataError, ForeignRecordsError, LceError, ModelError
from trainer.models.open import load_model
from trainer.run import startup
from trainer.run.engine import train
from trainer.run.startup import check_agreement, check_shared, check_writable


def _bank(folder: Path, classes: int, dim: int, info: BankInfo | None = None) -> Path:
    centers = torch.nn.functional.normalize(
        torch.randn(classes, dim, generator=torch.Generator().manual_seed(0)), dim=1
    )
    write_bank(
        folder,
        centers=centers,
        boundaries=torch.full((classes,), 0.5),
        counts=torch.ones(classes, dtype=torch.int64),
        mask=torch.ones(classes, dtype=torch.bool),
        info=info or BankInfo(),
    )
    return folder


def _real(folder: Path, path: Path, **changes: Any) -> Any:
    base = {"data__loader": "torch", "data__workers": 0, "data__path": str(path), "train__steps": 30}
    return config(folder, **base | changes)


def _bad_input(name: str, folder: Path) -> tuple[dict[str, Any], type[LceError], str]:
    """Changes to a run on a real data set of 5 classes, the error that they must cause, and what it must say."""
    lce = {"compat__method": "lce", "compat__alignment_weight": 1.0}
    match name:
        case "missing data set":
            return {"data__path": str(folder / "nowhere")}, DataError, "nowhere"
        case "empty data set":
            (folder / "empty").mkdir()
            return {"data__path": str(folder / "empty")}, DataError, "empty"
        case "labels out of range":
            labels = np.arange(45) % 5
            labels[7] = -3
            np.save(folder / "labels.npy", labels)
            return {"data__labels": str(folder / "labels.npy")}, DataError, "record 7"
        case "bank of another dimension":
            return lce | {"compat__bank": str(_bank(folder / "bank", 5, 9))}, CenterBankError, "dimension 9"
        case "bank of another class count":
            return lce | {"compat__bank": str(_bank(folder / "bank", 4, 6))}, CenterBankError, "4 classes"
        case "run folder is below a file":
            (folder / "file").write_text("")
            return {"run__dir": str(folder / "file/run")}, ConfigError, "is a file"
        case "unknown backbone":
            return {"backbone__name": "resnet"}, ConfigError, "iresnet100"
        case "weights of another network":
            torch.save({"x": torch.zeros(1)}, folder / "w.pt")
            return {"backbone__weights": str(folder / "w.pt")}, ModelError, "not the weights"
        case "old embeddings that do not exist":
            absent = str(folder / "old.npy")
            return {"compat__method": "l2", "compat__old_embeddings": absent}, DataError, "no such file"
    raise AssertionError(name)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    "name",
    [
        "missing data set",
        "empty data set",
        "labels out of range",
        "bank of another dimension",
        "bank of another class count",
        "run folder is below a file",
        "unknown backbone",
        "weights of another network",
        "old embeddings that do not exist",
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(dataset: Path, tmp_path: Path, name: str) -> None:
    changes, error, words = _bad_input(name, tmp_path)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(error, match=words) as caught:
        train(_real(tmp_path / "run", dataset, **changes), Ranks())
    assert "\n" not in str(caught.value)
    assert set(tmp_path.rglob("*")) == before


def test_a_label_table_of_another_order_is_refused_in_training_and_while_it_is_measured(tmp_path: Path) -> None:
    folder = packed(tmp_path, 4, 4)
    pack(list_source(tmp_path / "source"), tmp_path / "packed2", PackOptions(seed=1))
    dataset = open_dataset(folder)
    save_tables(split(dataset, SplitOptions("open-class", share=0.5)), tmp_path, dataset, "")
    table = tmp_path / "new.npy"
    words = r"numbers the records of .*packed \(16 records, .*not those of .*packed2"
    with pytest.raises(ForeignRecordsError, match=words):
        train(_real(tmp_path / "run", tmp_path / "packed2", data__labels=str(table)), Ranks())
    measured = {"evaluate__every_steps": 1, "evaluate__sets": {"new": f"{tmp_path / 'packed2'}@{table}"}}
    with pytest.raises(ForeignRecordsError, match=words):
        train(_real(tmp_path / "run", folder, **measured), Ranks())


def test_a_bank_of_other_identities_is_refused(tmp_path: Path) -> None:
    """An open-class split into halves: the class counts are equal, the people are not."""
    folder = packed(tmp_path, 4, 4)
    dataset = open_dataset(folder)
    save_tables(split(dataset, SplitOptions("open-class", share=0.5)), tmp_path, dataset, "")
    old, new = (open_dataset(folder, tmp_path / f"{name}.npy") for name in ("old", "new"))
    given = {"compat__method": "lce", "train__steps": 1, "data__labels": str(tmp_path / "new.npy")}
    wrong = _bank(tmp_path / "wrong", 2, 6, BankInfo(dataset=old.named, numbering=old.numbering))
    with pytest.raises(CenterBankError, match=r"wrong: made for .*old\.npy, .*new\.npy; make the bank from this"):
        train(_real(tmp_path / "run", folder, compat__bank=str(wrong), **given), Ranks())
    with pytest.raises(CenterBankError, match="other identities"):
        check_centers(CenterBank.open(wrong), 2, 6, BankInfo(dataset=new.named, numbering=new.numbering))
    cleaned = np.array(new.labels)
    cleaned[np.flatnonzero(cleaned >= 0)[0]] = -1
    np.save(tmp_path / "new.npy", cleaned)
    seal_table(tmp_path / "new.npy", open_dataset(folder, tmp_path / "new.npy", verify=False))
    same = open_dataset(folder, tmp_path / "new.npy").fingerprint  # the very data, whatever its classes are called now
    infos = {"right": BankInfo(numbering=new.numbering), "unknown": BankInfo()}
    infos["renamed"] = BankInfo(numbering="names:others", dataset_fingerprint=same)
    for name, info in infos.items():
        bank = _bank(tmp_path / name, 2, 6, info)
        train(_real(tmp_path / f"run-{name}", folder, compat__bank=str(bank), **given), Ranks())


def test_a_good_run_on_the_same_data_set(dataset: Path, tmp_path: Path) -> None:
    """The control: real images, a bank that fits, a loss with alignment and boundary, a model that says what it is."""
    bank = _bank(tmp_path / "bank", 5, 6)
    changes = {"compat__method": "lce", "compat__bank": str(bank), "optimizer__lr": 0.05}
    train(_real(tmp_path / "run", dataset, **changes), Ranks())
    first, *_, last = log_of(tmp_path / "run")
    assert last["alignment"] < first["alignment"]
    assert first["alignment_mse"] == pytest.approx(first["alignment"] * 2 / 6)
    assert {"boundary", "classification", "target_cosine", "lr", "grad_norm", "data_share"} <= first.keys()
    card = load_model(tmp_path / "run").card
    assert (card.mode, card.classes, card.step, card.image_size) == ("direct", 5, 30, (32, 32))


def _refused_rank(ranks: Ranks, folder: Path) -> str:
    try:
        train(config(folder, data__synthetic_classes=2), ranks)
    except ConfigError as error:
        return str(error)
    return "accepted"


def test_more_ranks_than_classes(tmp_path: Path) -> None:
    answers = run_ranks(_refused_rank, 3, tmp_path / "run")
    assert len(set(answers)) == 1
    assert "3 ranks for 2 classes" in answers[0]
    assert not (tmp_path / "run").exists()


def _disagreeing_rank(ranks: Ranks) -> str:
    try:
        check_agreement({"configuration": "a", "torch version": "2.13" if ranks.rank < 2 else "2.12"})
    except ConfigError as error:
        return str(error)
    return "agreed"


def test_a_rank_with_another_version_is_named() -> None:
    answers = run_ranks(_disagreeing_rank, 3)
    assert len(set(answers)) == 1
    assert "rank 2 on" in answers[0]
    assert "another torch version (2.12)" in answers[0]


def _disk_rank(ranks: Ranks, folders: list[Path]) -> str:
    startup.SHARED_SECONDS = 0.5
    try:
        check_shared(folders[ranks.rank] / "runs" / "one", ranks)
    except ConfigError as error:
        return str(error)
    return "shared"


def test_a_run_folder_that_ranks_do_not_share_is_refused(tmp_path: Path) -> None:
    """A rank that looks into another folder is as one whose machine has a disk of its own."""
    disks = [tmp_path / "one", tmp_path / "two"]
    (disks[0] / "runs").mkdir(parents=True)
    disks[1].mkdir()
    answers = run_ranks(_disk_rank, 3, [disks[0], disks[0], disks[1]])
    assert len(set(answers)) == 1
    assert "rank 2 on " in answers[0]
    assert "a file system that all machines share" in answers[0]
    assert run_ranks(_disk_rank, 3, [disks[1]] * 3) == ["shared"] * 3
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["one", "runs", "two"]


def test_a_folder_whose_name_is_no_utf8_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.dir = .*has a name that is not UTF-8; choose another run\.dir"):
        train(config(tmp_path / "a\udcff" / "run"), Ranks())
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="cannot be written"):
        check_writable(tmp_path / "locked/run")


def test_read_only_file_system_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        check_writable(Path("/proc/run"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.device=cuda", "no usable CUDA device"),
        ("trian.steps=5", "did you mean train"),
        ("train.steps=x", "train.steps"),
        (f"run.dir={'n' * 300}", "File name too long"),
    ],
)
def test_command_line_status_is_2(tmp_path: Path, override: str, words: str) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree(tmp_path / "run", backbone__name="small")))
    done = forked.run(["-m", "trainer", str(tmp_path / "run.yaml"), override])
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
