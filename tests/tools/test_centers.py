"""``lce centers`` and ``lce export`` as a user runs them: on ranks, continued after a kill, and refused with one
line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests import forked
from tests.models.test_export import images, saved
from tests.ranks import run_ranks
from tools.cli import main
from trainer.compat.bank import from_model
from trainer.compat.bank.bank_info import describe, summarise
from trainer.compat.bank.center_bank import CenterBank
from trainer.compat.bank.from_model import bank_from_model
from trainer.data.index import open_dataset
from trainer.data.listing import list_source
from trainer.data.packing import PackOptions, pack
from trainer.distributed import Ranks
from trainer.errors import CenterBankError, ConfigError, DataError
from trainer.models.card import read_card
from trainer.models.open import load_model

PEOPLE, IMAGES = 13, 60


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a small packed data set of coloured blobs."""
    folder = tmp_path_factory.mktemp("stage")
    for number, picture in enumerate(images(IMAGES)):
        path = folder / "pictures" / f"person{number % PEOPLE:02d}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    pack(list_source(folder / "pictures"), folder / "data", PackOptions(size=(32, 32), seed=1))
    saved(folder / "model")
    return folder


def expected_centers(stage: Path) -> tuple[np.ndarray, np.ndarray]:
    """Centres and smallest cosines, class by class, straight from the definition."""
    dataset, model = open_dataset(stage / "data"), load_model(stage / "model")
    unit = model.embed(np.stack([dataset.decode(i) for i in range(len(dataset))])).astype(np.float64)
    centers, boundaries = [], []
    for j in range(PEOPLE):
        own = unit[np.asarray(dataset.labels) == j]
        center = own.mean(0) / np.linalg.norm(own.mean(0))
        centers.append(center)
        boundaries.append((own @ center).min())
    return np.stack(centers), np.array(boundaries)


def assert_right(stage: Path, bank: CenterBank) -> None:
    centers, boundaries = expected_centers(stage)
    rows = bank.rows(0, PEOPLE)
    np.testing.assert_allclose(rows.centers, centers, atol=1e-5)
    np.testing.assert_allclose(rows.boundaries, boundaries, atol=1e-5)


def on_ranks(ranks: Ranks, stage: str, out: str) -> str:
    from_model.BLOCK_RECORDS = 7
    folder = Path(stage)
    model, dataset = load_model(folder / "model"), open_dataset(folder / "data")
    return bank_from_model(model, dataset, Path(out), batch_size=4, ranks=ranks).fingerprint


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_world_size_gives_the_same_bank(stage: Path, tmp_path: Path, world: int) -> None:
    results = run_ranks(on_ranks, world, str(stage), str(tmp_path / "bank"))
    assert len(set(results)) == 1
    assert_right(stage, CenterBank.open(tmp_path / "bank"))
    assert [p.name for p in tmp_path.iterdir()] == ["bank"]


def test_a_broken_off_run_continues_and_another_job_is_refused(
    stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(from_model, "BLOCK_RECORDS", 7)
    model, dataset = load_model(stage / "model"), open_dataset(stage / "data")
    decode = dataset.decode
    seen: list[int] = []

    def failing(record: int) -> Any:
        if record == 30 and len(seen) < 100:
            raise DataError("record 30 is damaged")
        seen.append(record)
        return decode(record)

    monkeypatch.setattr(dataset, "decode", failing)
    with pytest.raises(DataError, match="record 30"):
        bank_from_model(model, dataset, tmp_path / "bank", batch_size=4)
    assert [p.name for p in tmp_path.iterdir()] == [".bank.work"]
    with pytest.raises(Exception, match="unfinished work of another"):
        bank_from_model(model, dataset, tmp_path / "bank", flip=True)
    before = set(seen)
    seen[:] = range(100)
    bank_from_model(model, dataset, tmp_path / "bank", batch_size=4, keep_embeddings=tmp_path / "e.npy")
    assert min(seen[100:]) == 28, "four whole blocks of seven were done"
    assert before >= set(range(28))
    assert_right(stage, CenterBank.open(tmp_path / "bank"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bank", "e.npy", "e.yaml"]
    assert np.load(tmp_path / "e.npy").shape == (IMAGES, model.dim)
    assert (
        main(
            [
                "centers",
                "from-embeddings",
                str(tmp_path / "e.npy"),
                str(tmp_path / "again"),
                "--dataset",
                str(stage / "data"),
            ]
        )
        == 0
    )
    again, first = CenterBank.open(tmp_path / "again"), CenterBank.open(tmp_path / "bank")
    assert torch.equal(again.rows(0, PEOPLE).centers, first.rows(0, PEOPLE).centers)


def test_a_batch_size_that_is_none_leaves_no_work(stage: Path, tmp_path: Path) -> None:
    model, dataset = load_model(stage / "model"), open_dataset(stage / "data")
    for size in (0, -3):
        with pytest.raises(ConfigError, match=f"`batch_size` {size}: at least 1"):
            bank_from_model(model, dataset, tmp_path / "bank", batch_size=size)
    assert not list(tmp_path.iterdir())


def test_a_block_without_all_its_rows_is_not_done(stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(from_model, "embed_batches", lambda *given: iter(()))
    with pytest.raises(RuntimeError, match="0 of its 60 records"):
        bank_from_model(load_model(stage / "model"), open_dataset(stage / "data"), tmp_path / "bank")
    assert (tmp_path / ".bank.work" / "done.bin").read_bytes() == b"\0"


def test_kept_embeddings_are_refused_a_bad_place_at_once(stage: Path, tmp_path: Path) -> None:
    model, dataset = load_model(stage / "model"), open_dataset(stage / "data")
    (tmp_path / "mine.npy").write_text("mine")
    (tmp_path / "folder").mkdir()
    for name, reason in (("mine.npy", "exists already"), ("folder", "is a folder"), ("mine.npy/e.npy", "is a file")):
        with pytest.raises(CenterBankError, match=reason):
            bank_from_model(model, dataset, tmp_path / "bank", keep_embeddings=tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "mine.npy"]
    bank_from_model(model, dataset, tmp_path / "bank", keep_embeddings=tmp_path / "mine.npy", overwrite=True)
    assert np.load(tmp_path / "mine.npy").shape == (IMAGES, model.dim)


def test_a_configuration_next_to_kept_embeddings_stays(stage: Path, tmp_path: Path) -> None:
    """`--embeddings old.npy` describes itself in old.yaml, which may be the old model's configuration."""
    model, dataset = load_model(stage / "model"), open_dataset(stage / "data")
    (tmp_path / "old.yaml").write_text("run: {dir: runs/old}\n")
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"old\.yaml: exists and describes no array"):
            bank_from_model(
                model, dataset, tmp_path / "bank", keep_embeddings=tmp_path / "old.npy", overwrite=overwrite
            )
    assert (tmp_path / "old.yaml").read_text() == "run: {dir: runs/old}\n"
    assert not (tmp_path / "bank").exists()
    for overwrite in (False, True):  # a description of ours is replaced
        bank_from_model(model, dataset, tmp_path / "bank", keep_embeddings=tmp_path / "e.npy", overwrite=overwrite)


def test_the_products_own_embeddings_fit_a_set_with_bad_records(stage: Path, tmp_path: Path) -> None:
    data, kept = Path(shutil.copytree(stage / "data", tmp_path / "data")), tmp_path / "e.npy"
    np.save(data / "bad_records.npy", np.array([3, 10]))
    first = bank_from_model(load_model(stage / "model"), open_dataset(data), tmp_path / "first", keep_embeddings=kept)
    assert not np.load(kept)[[3, 10]].any()
    assert main(["centers", "from-embeddings", str(kept), str(tmp_path / "again"), "--dataset", str(data)]) == 0
    again = CenterBank.open(tmp_path / "again")
    assert torch.equal(again.rows(0, PEOPLE).boundaries, first.rows(0, PEOPLE).boundaries)
    assert again.info.numbering == first.info.numbering == open_dataset(stage / "data").numbering


def test_class_counts_come_from_what_describes_them(stage: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", np.eye(4, 16, dtype=np.float32))
    np.save(tmp_path / "tab.npy", np.array([0, 1, 2, -1]))
    (tmp_path / "tab.yaml").write_text("num_classes: 7\nrecords: 4\n")
    words = ["centers", "from-embeddings", str(tmp_path / "e.npy"), str(tmp_path / "bank"), "--force"]
    words += ["--labels", str(tmp_path / "tab.npy")]
    for more, classes in (([], 7), (["--classes", "9"], 9)):
        assert main([*words, *more]) == 0
        assert CenterBank.open(tmp_path / "bank").num_classes == classes
    (tmp_path / "map.csv").write_text("0,3\n1,2\n")
    words = ["centers", "from-classifier", str(tmp_path / "e.npy"), str(tmp_path / "mapped"), "--layout", "rows"]
    assert main([*words, "--map", str(tmp_path / "map.csv"), "--new-dataset", str(stage / "data")]) == 0
    mapped = CenterBank.open(tmp_path / "mapped")
    assert mapped.rows(0, PEOPLE).mask.tolist() == [True] * 2 + [False] * (PEOPLE - 2)
    assert mapped.info.numbering == open_dataset(stage / "data").numbering


def test_the_command_on_two_processes(stage: Path, tmp_path: Path) -> None:
    words = ["centers", "from-model", str(stage / "model"), str(stage / "data"), str(tmp_path / "bank")]
    run = forked.run(["-m", "tools.cli", *words, "--nproc", "2", "--json", str(tmp_path / "f.json")])
    assert run.returncode == 0, run.stderr
    figures = json.loads((tmp_path / "f.json").read_text())
    assert (figures["classes"], figures["images"], figures["masked"]) == (PEOPLE, IMAGES, 0)
    assert_right(stage, CenterBank.open(tmp_path / "bank"))
    assert f"made from the model {stage / 'model'} and the images of {stage / 'data'}," in describe(
        tmp_path / "bank", summarise(CenterBank.open(tmp_path / "bank")) | {"nearest_pairs": []}
    )
    again = forked.run(["-m", "tools.cli", *words, "--nproc", "2"])
    assert again.returncode == 2
    assert again.stderr.count("exists already") == 1, "one rank speaks"


def test_killed_processes_leave_work_that_the_next_run_finishes(stage: Path, tmp_path: Path) -> None:
    """SIGKILL after the first finished block; the second run does only the rest."""
    code = (
        "import sys, time; from trainer.compat.bank import from_model; from trainer.data.index import Dataset;"
        "from_model.BLOCK_RECORDS = 7; real = Dataset.decode;"
        "Dataset.decode = lambda self, i: (time.sleep(0.05), real(self, i))[1];"
        "from tests.tools.test_centers import on_ranks; from trainer.distributed import Ranks;"
        "on_ranks(Ranks(), sys.argv[1], sys.argv[2])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(stage), str(tmp_path / "bank")])
    done = tmp_path / ".bank.work" / "done.bin"
    deadline = time.monotonic() + 300
    while not (done.is_file() and 1 in done.read_bytes()):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "bank").exists()
    finished = done.read_bytes().count(1)
    assert 0 < finished < 9
    assert run_ranks(on_ranks, 2, str(stage), str(tmp_path / "bank"))
    assert_right(stage, CenterBank.open(tmp_path / "bank"))


def test_classifiers_maps_and_info_on_the_command_line(
    stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weight = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    torch.save({"weight": weight}, tmp_path / "head.pt")
    (tmp_path / "map.csv").write_text("new,old\n0,3\n1,3\n4,7\n4,8\n")
    head, bank = str(tmp_path / "head.pt"), str(tmp_path / "bank")
    base = ["centers", "from-classifier", head, bank, "--layout", "rows"]
    assert main([*base, "--map", str(tmp_path / "map.csv")]) == 0
    out = capsys.readouterr()
    assert "'weight' read as classes × dimension: 20 classes of dimension 16" in out.err
    assert "3 of 5 classes have an old one, 1 of them merged" in out.err
    assert main(["centers", "info", bank, "--json", "-", "--pairs", "2", "--verify"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["classes"], figures["masked"], figures["unrestrained"]) == (5, 2, 3)
    assert figures["nearest_pairs"][0] == {"classes": [0, 1], "cosine": 1.0}
    assert main(["centers", "info", bank]) == 0
    assert "2 classes without a centre" in capsys.readouterr().out
    assert main([*base, "--new-dataset", str(stage / "data"), "--old-dataset", str(stage / "data"), "--force"]) == 0
    assert CenterBank.open(bank).rows(0, PEOPLE).class_ids.tolist() == list(range(PEOPLE))
    names = open_dataset(stage / "data").class_names
    assert names is not None
    capsys.readouterr()
    assert main(["centers", "info", bank, "--json", "-", "--pairs", "2"]) == 0  # the set it was made for is still there
    (pair, _) = json.loads(capsys.readouterr().out)["nearest_pairs"]
    assert pair["names"] == [names[k] for k in pair["classes"]]
    assert main(["centers", "info", bank, "--pairs", "2"]) == 0
    assert f"  {pair['names'][0]} – {pair['names'][1]}: cosine" in capsys.readouterr().out
    assert main(["centers", "info", bank, "--dataset", str(tmp_path / "absent")]) == 2


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["from-model", "MODEL", "DATA", "OUT", "--quantile", "2"], "quantile is in"),
        (["from-model", "absent", "DATA", "OUT"], "no such file or folder"),
        (["from-model", "MODEL", "absent", "OUT"], "absent"),
        (["from-embeddings", "E", "OUT"], "--labels FILE or --dataset FOLDER"),
        (["from-embeddings", "E", "OUT", "--dataset", "DATA"], "3 embeddings but 60 labels"),
        (["from-classifier", "E", "OUT", "--old-classes", "9"], "9 classes"),
        (["from-classifier", "E", "OUT", "--map", "absent.csv"], "absent.csv"),
        (["from-classifier", "E", "OUT", "--new-dataset", "DATA"], "both --new-dataset and --old-dataset"),
        (["from-classifier", "E", "OUT", "--layout", "rows", "--map", "L", "--new-dataset", "DATA"], "maps 3 classes"),
        (
            ["from-embeddings", "E", "OUT", "--labels", "Z"],
            "is no .npy file but an archive of arrays; needed are labels",
        ),
        (["from-embeddings", "E", "OUT", "--labels", "L"], "1000000000000 classes; more than"),
        (["info", "MODEL"], "no centre bank"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(
    stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], reason: str
) -> None:
    np.save(tmp_path / "e.npy", np.ones((3, 64), np.float32))
    np.savez(tmp_path / "l.npz", np.zeros(3, np.int64))
    np.save(tmp_path / "l.npy", np.array([0, 1, 999_999_999_999]))
    places = {"MODEL": stage / "model", "DATA": stage / "data", "OUT": tmp_path / "out", "E": tmp_path / "e.npy"}
    places |= {"L": tmp_path / "l.npy", "Z": tmp_path / "l.npz"}
    assert main(["centers", *(str(places.get(word, word)) for word in words)]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lce centers:")]
    assert len(said) == 1
    assert reason in said[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.npy", "l.npy", "l.npz"]


@pytest.mark.parametrize(
    "words",
    [
        ["info", "bank", "--pairs", "-1"],
        ["from-embeddings", "e.npy", "bank", "--classes", "0"],
        ["from-model", "model", "data", "bank", "--batch-size", "0"],
    ],
)
def test_numbers_out_of_range_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["centers", *words])
    assert "expected a whole number of at least" in capsys.readouterr().err


def test_export_on_the_command_line(stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.onnx"
    words = ["export", str(stage / "model"), str(out), "--dataset", str(stage / "data"), "--images", "9"]
    assert main([*words, "--json", "-"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["images"] == 9
    assert figures["largest_difference"] < 1e-5
    pictures = images()
    np.testing.assert_allclose(load_model(out).embed(pictures), load_model(stage / "model").embed(pictures), atol=1e-5)
    assert main([*words[:2], str(tmp_path / "n.onnx"), *words[3:], "--bound", "0"]) == 2
    assert "differs from torch" in capsys.readouterr().err
    assert main(["export", str(out), str(tmp_path / "x.onnx"), "--dataset", str(stage / "data")]) == 2
    (tmp_path / "figures.json").write_text('{"tar": 0.5, "name": "x"}')
    more = ["--licence", "MIT", "--figures", str(tmp_path / "figures.json"), "--images", "5"]
    assert main(["export", str(stage / "model"), str(tmp_path / "folder"), *words[3:5], *more]) == 0
    assert load_model(tmp_path / "folder").card.figures == {"tar": 0.5}
    cell = {
        "rank": {"1": {"value": 0.9}},
        "tar": [{"far": f, "value": 0.5, "resolved": f > 1e-3} for f in (1e-3, 1e-2)],
    }
    (tmp_path / "figures.json").write_text(
        json.dumps({"verdict": {}, "sets": {"unseen": {"cells": {"new->old": cell}}}})
    )
    assert main(["export", str(stage / "model"), str(tmp_path / "folder"), *words[3:5], *more]) == 0
    found = load_model(tmp_path / "folder").card.figures
    assert found == {"unseen new->old rank-1": 0.9, "unseen new->old TAR@FAR=0.01": 0.5}
    (tmp_path / "figures.json").write_text('{"name": "x"}')
    assert main(["export", str(stage / "model"), str(tmp_path / "other"), *words[3:5], *more]) == 2
    assert "holds no number" in capsys.readouterr().err
    assert main([*words[:2], str(tmp_path / "m.h5"), *words[3:]]) == 2
    assert "known forms are .onnx, .pt2" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figures.json", "folder", "m.onnx"]
    for images_asked in ("0", "-3"):
        with pytest.raises(SystemExit):
            main([*words[:5], "--images", images_asked])
        assert "at least 1" in capsys.readouterr().err


def test_every_form_of_export_carries_the_card_that_was_asked_for(stage: Path, tmp_path: Path) -> None:
    (tmp_path / "figures.json").write_text('{"tar": 0.5, "nothing": NaN}')
    asked = [
        "--licence",
        "MIT",
        "--notes",
        "hi",
        "--compatible-with",
        "v1",
        "--figures",
        str(tmp_path / "figures.json"),
    ]
    for name in ("m.onnx", "m.pt2", "folder"):
        words = [
            "export",
            str(stage / "model"),
            str(tmp_path / name),
            "--dataset",
            str(stage / "data"),
            "--images",
            "3",
        ]
        assert main([*words, *asked]) == 0
    program = {"model.json": ""}
    torch.export.load(tmp_path / "m.pt2", extra_files=program)
    cards = [load_model(tmp_path / name).card for name in ("m.onnx", "folder")]
    for card in (*cards, read_card(program["model.json"], "m.pt2")):
        assert (card.licence, card.notes, card.compatible_with, card.figures) == ("MIT", "hi", "v1", {"tar": 0.5})
