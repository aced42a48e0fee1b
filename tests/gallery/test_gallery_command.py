"""`lce gallery` on a file and on a real database, with a real model's T₁₂ and with its images."""

import json
import warnings

import numpy as np
import pytest

from tests.evaluation.test_evaluate import model, pictures
from tools import cli
from trainer.data.index import open_dataset
from trainer.models.model import embed_dataset
from trainer.models.open import load_model


@pytest.fixture(autouse=True)
def this_command_alone(monkeypatch):
    monkeypatch.setattr(cli, "COMMANDS", ("gallery",))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gallery")
    pictures(folder / "images", 10, 3, seed=1)
    model(folder / "old", 1)
    model(folder / "new", 2, dim=24, transforms={"t12": (16, 24)})
    model(folder / "plain", 3, dim=24)
    return folder


@pytest.fixture
def vectors(place):
    return embed_dataset(load_model(place / "old"), open_dataset(place / "images"))


def lce(capsys, *words):
    status = cli.main(["gallery", *map(str, words), "--json", "-"])
    out, err = capsys.readouterr()
    return status, json.loads(out) if out else err


def test_a_file_goes_through_every_action(place, vectors, tmp_path, capsys):
    path, new = tmp_path / "faces.npy", load_model(place / "new")
    np.save(path, vectors)
    which = ("--model", place / "new", "--device", "cpu")
    assert lce(capsys, "status", path)[1]["phase"] == "none"
    assert lce(capsys, "plan", path, *which)[1]["dim_out"] == 24
    status, done = lce(capsys, "upgrade", path, *which)
    assert (status, done["phase"], done["done"]) == (0, "swapped", 30)
    assert np.load(path) == pytest.approx(new.transform("t12", vectors), abs=1e-6)
    assert lce(capsys, "verify", path, *which)[0] == 0
    assert lce(capsys, "verify", path, *which, "--least-cosine", "1.5")[0] == 1
    status, error = lce(capsys, "upgrade", path, *which, "--images", place / "images")
    assert status == 2
    assert "roll it back before" in error
    assert lce(capsys, "rollback", path)[0] == 0
    assert np.array_equal(np.load(path), vectors)
    images = ("--images", place / "images", "--order", "confidence")
    assert lce(capsys, "upgrade", path, *which, *images)[0] == 0
    assert np.load(path) == pytest.approx(embed_dataset(new, open_dataset(place / "images")), abs=1e-5)


def test_wrong_use(place, vectors, tmp_path, capsys):
    path = tmp_path / "faces.npy"
    np.save(path, vectors)
    for words, message in (
        (("upgrade", path), "give the new model"),
        (("upgrade", path, "--model", place / "plain"), "has no T₁₂"),
        (("upgrade", tmp_path / "none.npy", "--model", place / "new"), "no such gallery"),
        (("upgrade", path, "--model", place / "new", "--batch", "0"), "must be positive"),
        (("upgrade", path, "--model", place / "new", "--order", "best"), "expected stored, random"),
        (("finish", path), "nothing to finish"),
    ):
        status, error = lce(capsys, *words)
        assert status == 2
        assert message in error
        assert len(error.strip().splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["faces.npy"]


def test_a_table_goes_through_every_action(place, vectors, tmp_path, capsys):
    psycopg = pytest.importorskip("psycopg", reason="needs the extra `gallery`")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pgserver = pytest.importorskip("pgserver", reason="needs PostgreSQL from PyPI's pgserver")
    server = pgserver.get_server(tmp_path / "pg", cleanup_mode="stop")
    try:
        store = server.get_uri()
        with psycopg.connect(store, autocommit=True) as connection:
            connection.execute("CREATE EXTENSION vector")
            connection.execute("CREATE TABLE people (number bigint PRIMARY KEY, face vector(16))")
            for i, vector in enumerate(vectors):
                connection.execute("INSERT INTO people VALUES (%s, %s)", (i, str(vector.tolist())))
        which = ("--table", "people", "--column", "face", "--key", "number")
        using = (*which, "--model", place / "new", "--device", "cpu")
        assert lce(capsys, "plan", store, *using)[1]["rows"] == 30
        status, done = lce(capsys, "upgrade", store, *using, "--no-swap")
        assert (status, done["phase"], done["left"], done["converted_here"]) == (0, "converting", 0, 30)
        assert lce(capsys, "upgrade", store, *using)[1]["phase"] == "swapped"
        again = lce(capsys, "upgrade", store, *using)[1]
        assert (again["phase"], again["converted_here"], again["version"]) == ("swapped", 0, done["version"])
        assert lce(capsys, "verify", store, *using)[1]["smallest_cosine"] > 0.9999
        assert lce(capsys, "verify", store, *using, "--least-recall", "1.5")[0] == 1
        assert lce(capsys, "rollback", store, *which)[1]["phase"] == "none"
        assert lce(capsys, "upgrade", store, *using, "--order", "random", "--index", "none")[1]["phase"] == "swapped"
        assert lce(capsys, "finish", store, *which)[1]["phase"] == "none"
        with psycopg.connect(store) as connection:
            assert connection.execute("SELECT vector_dims(face) FROM people LIMIT 1").fetchone() == (24,)
    finally:
        server.cleanup()
