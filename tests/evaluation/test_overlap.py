"""Sets with identities that a model was trained on are found, named, and judged apart."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.samples import identity_folders, packed
from tests.evaluation.test_verdict import OPTIONS, upgrade
from tools import cli
from trainer.data import Dataset, open_dataset
from trainer.data.identities import identities, named_identities
from trainer.data.splitting import SplitOptions, save_tables, split
from trainer.errors import DataError
from trainer.evaluation.overlap import Known, Overlap, overlaps, unknown_words
from trainer.evaluation.results import measure_sets
from trainer.models.card import ModelCard
from trainer.models.folder import save_model
from trainer.models.model import EmbeddingModel, TorchModel
from trainer.models.open import load_model
from trainer.networks import build_backbone
from trainer.networks.config import BackboneConfig

SEEN = Known(False, 60, {"old": Overlap(3, ["ann", "bob", "eve"]), "new": Overlap(0)})


def model(folder: Path, data: Dataset | None, complete: bool = True) -> TorchModel:
    """A network with random weights, as if trained on a data set."""
    torch.manual_seed(1)
    config = BackboneConfig(name="small", dim=16)
    known = identities(data)
    known = None if known is None else dataclasses.replace(known, complete=complete)
    card = ModelCard(backbone=config, dim=16, image_size=(32, 32))
    save_model(folder, build_backbone(config, (32, 32)), card, identities=known)
    opened = load_model(folder)
    assert isinstance(opened, TorchModel)
    return opened


def found(data: Dataset, one: EmbeddingModel) -> Overlap:
    return overlaps(data, {"new": one}).models["new"]


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """A data set of 10 people, split: ``old.npy``, ``new.npy``, ``unseen.npy``."""
    dataset = open_dataset(packed(tmp_path, 10, 4))
    save_tables(split(dataset, SplitOptions(share=0.5, unseen=0.4)), tmp_path, dataset, "")
    return tmp_path


def test_tables_of_one_data_set(tables: Path) -> None:
    old, new, unseen = (open_dataset(tables / "packed", tables / f"{n}.npy") for n in ("old", "new", "unseen"))
    trained = model(tables / "model", new)
    assert found(unseen, trained) == Overlap(0)
    assert found(old, trained).shared == old.num_classes == 3
    whole = found(open_dataset(tables / "packed"), trained)
    assert whole.shared == 6
    assert set(whole.names) <= set(new.class_names or [])
    np.save(
        tables / "mine.npy", np.where(unseen.labels < 0, -1, np.asarray(unseen.labels) * 7 + 3)
    )  # other numbers, no names
    assert found(open_dataset(tables / "packed", tables / "mine.npy"), trained) == Overlap(0)
    assert found(open_dataset(tables / "source"), trained).by_name  # the same people as files


def test_other_people_of_the_same_names_are_declared(tables: Path) -> None:
    """Generic names (person1) are in many data sets; the same records are the same people whatever is declared."""
    trained = model(tables / "model", open_dataset(tables / "packed", tables / "new.npy"))
    files = overlaps(open_dataset(tables / "source"), {"new": trained})
    assert files.seen
    assert "if these are other people of the same names, declare the set unseen" in files.sentence
    declared = overlaps(open_dataset(tables / "source"), {"new": trained}, "unseen")
    assert not declared.seen
    assert declared.sentence == ""
    line = unknown_words({"files": declared})
    assert line.startswith(
        "Declared to be other people under names that were trained on: files: 6 of its 10 by the new"
    )
    records = overlaps(open_dataset(tables / "packed"), {"new": trained}, "unseen")
    assert records.seen
    assert "other people" not in records.sentence
    assert overlaps(open_dataset(tables / "source"), {"new": trained}, "seen").seen


def test_names_of_digits_and_numbers_tell_within_one_data_set_only(tmp_path: Path) -> None:
    people = identity_folders(tmp_path / "people", 3, 4)
    for number, folder in enumerate(sorted(people.iterdir())):
        folder.rename(people / f"{number:04d}")
    digits = open_dataset(people)
    trained = model(tmp_path / "model", digits)
    assert found(digits, trained).shared == 3
    (people / "0001" / "0.jpeg").unlink()  # another data set now
    assert "do not tell identities apart" in found(open_dataset(people), trained).why
    assert named_identities(digits) is not None


def test_what_is_not_known_is_said(tables: Path) -> None:
    unseen = open_dataset(tables / "packed", tables / "unseen.npy")
    new = open_dataset(tables / "packed", tables / "new.npy")
    silent = model(tables / "silent", None)
    assert found(unseen, silent).shared is None
    started = model(tables / "started", new, complete=False)
    assert "weights that do not say" in found(unseen, started).why
    assert found(new, started).shared == 6
    known = overlaps(unseen, {"old": silent, "new": model(tables / "m", new), "paragon": silent})
    line = unknown_words({"unseen": known})
    assert line == "Not known is whether identities were trained on: unseen by the old model (the model does not say)."


def test_onnx_files_keep_the_hashes_beside_them(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = open_dataset(tables / "packed", tables / "new.npy")
    model(tables / "model", new)
    data = ["--dataset", str(tables / "packed"), "--images", "2"]
    assert cli.main(["export", str(tables / "model"), str(tables / "m.onnx"), *data]) == 0
    assert f"{tables / 'm.identities.npy'}: hashes of the training identities" in capsys.readouterr().out
    assert found(new, load_model(tables / "m.onnx")).shared == 6
    beside = tables / "m.identities.npy"
    whole = beside.read_bytes()
    beside.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataError, match="is not what was written with the model"):
        load_model(tables / "m.onnx")
    beside.unlink()
    assert found(new, load_model(tables / "m.onnx")).shared is None


def test_an_earlier_models_run_tells(tables: Path) -> None:
    """A model folder without hashes: its run folder names data set and table."""
    new = open_dataset(tables / "packed", tables / "new.npy")
    run = tables / "run"
    model(run / "model", None)
    (run / "config.yaml").write_text(
        f"data: {{path: {tables / 'packed'}, labels: {tables / 'new.npy'}}}\nbackbone: {{weights: null}}\n"
    )
    assert found(new, load_model(run)).shared == 6
    shutil.rmtree(tables / "packed")
    assert load_model(run).identities is None


def test_a_set_of_known_identities_neither_makes_nor_blocks_the_verdict() -> None:
    good, bad = upgrade(1.0), upgrade(0.0, noise=1.5)
    seen = dataclasses.replace(bad, name="seen", known=SEEN)
    verdict = measure_sets([dataclasses.replace(good, known=Known(False, 60, {})), seen], OPTIONS)["verdict"]
    assert verdict["answer"] == "SAFE"
    words = (
        "seen is not part of this answer: its identities were trained on: 3 of its 60 by the old model (ann, bob, eve)."
    )
    assert words in verdict["paragraph"].split("On unseen")[0]
    assert "On seen (60 identities" in verdict["paragraph"]
    alone = measure_sets([dataclasses.replace(good, known=SEEN)], OPTIONS)["verdict"]
    assert alone["answer"] == "NOT ENOUGH DATA"
    assert "No set of identities that nobody was trained on was given" in alone["paragraph"]
    declared = dataclasses.replace(good, known=Known(True, 60, {}))
    assert measure_sets([declared], OPTIONS)["verdict"]["answer"] == "NOT ENOUGH DATA"


def test_the_command_names_them_on_top_of_the_report(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = open_dataset(tables / "packed", tables / "new.npy")
    model(tables / "a", new)
    words = ["evaluate", "--old", str(tables / "a"), "--new", str(tables / "a"), "--cache", "none", "--fars", "1e-1"]
    words += [
        "--replicates",
        "100",
        "--data",
        f"all={tables / 'packed'}",
        f"fresh={tables / 'packed'}@{tables / 'unseen.npy'}",
    ]
    report = tables / "report.html"
    assert cli.main([*words, "--report", str(report), "--json", str(tables / "out.json")]) == 0
    assert "all is not part of this answer" in " ".join(capsys.readouterr().out.split())
    panel = report.read_text().partition('<div class="verdict')[2].partition("</div>")[0]
    assert "6 of its 10 by the old model (person" in panel
    result = json.loads((tables / "out.json").read_text())
    assert result["trained_on"]["fresh"]["models"]["new"]["shared"] == 0
    assert [one["seen"] != "" for one in result["verdict"]["sets"]] == [True, False]
    assert cli.main([*words, "--seen", "fresh", "--fail-unsafe"]) == 1
    assert cli.main([*words, "--seen", "nobody"]) == 2
    assert "no labelled set has this name; there are: all, fresh" in capsys.readouterr().err
    assert cli.main([*words, "--seen", "fresh", "--unseen", "fresh"]) == 2
    assert "stands in --seen and in --unseen" in capsys.readouterr().err
