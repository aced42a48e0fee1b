"""`lce gallery` on a file and on a real database, with a real model's T₁₂ and with its images."""

import json

import numpy as np
import pytest

from tests.evaluation.test_evaluate import model, pictures
from tests.gallery.servers import postgres
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
    with postgres() as store:
        with psycopg.connect(store, autocommit=True) as connection:
            connection.execute("CREATE TABLE people (number bigint PRIMARY KEY, face vector(16))")
            for i, vector in enumerate(vectors):
                connection.execute("INSERT INTO people VALUES (%s, %s)", (i, str(vector.tolist())))
        which = ("--table", "people", "--column", "face", "--key", "number")
        using = (*which, "--model", place / "new", "--device", "cpu")
        assert lce(capsys, "plan", store, *using)[1]["rows"] == 30
        status, done = lce(capsys, "upgrade", store, *using, "--no-swap")
        assert (status, done["phase"], done["left"], done["converted_here"]) == (0, "converting", 0, 30)
        assert lce(capsys, "upgrade", store, *using, "--index", "hnsw")[1]["phase"] == "swapped"
        again = lce(capsys, "upgrade", store, *using)[1]
        assert (again["phase"], again["converted_here"], again["version"]) == ("swapped", 0, done["version"])
        assert lce(capsys, "verify", store, *using)[1]["smallest_cosine"] > 0.9999
        assert lce(capsys, "verify", store, *using, "--least-recall", "1.5")[0] == 1
        assert lce(capsys, "rollback", store, *which)[1]["phase"] == "none"
        assert lce(capsys, "upgrade", store, *using, "--order", "random", "--index", "none")[1]["phase"] == "swapped"
        assert lce(capsys, "finish", store, *which)[1]["phase"] == "finished"
        with psycopg.connect(store) as connection:
            assert connection.execute("SELECT vector_dims(face) FROM people LIMIT 1").fetchone() == (24,)


def test_what_people_read(place, vectors, tmp_path, capsys):
    path, which = tmp_path / "faces.npy", ("--model", str(place / "new"), "--device", "cpu")
    np.save(path, vectors)

    def said(*words):
        status = cli.main(["gallery", *map(str, words)])
        return status, capsys.readouterr().out.splitlines()

    lines = said("upgrade", path, *which)[1]
    assert lines[0].startswith("conversion: t12-")
    assert lines[1:] == [
        "rows: 30", "dimension before: 16", "dimension after: 24", "rows converted: 30", "phase: swapped"
    ]  # fmt: skip
    status, lines = said("verify", path, *which)
    assert status == 0
    assert lines == ["verified: 30 rows re-computed, smallest cosine 1.000000", "rows: 30, 30 before"]
    np.save(path, np.load(path)[:20])
    assert cli.main(["gallery", "verify", str(path), *which]) == 1
    out, err = capsys.readouterr()
    assert "verified" not in out
    assert "NOT verified: there were 30 rows and there are 20" in err


@pytest.mark.parametrize("action", ["plan", "upgrade", "verify", "status", "rollback", "finish"])
def test_each_action_has_its_own_help(capsys, action):
    with pytest.raises(SystemExit):
        cli.main(["gallery", action, "--help"])
    said = capsys.readouterr().out
    assert f"Example: lce gallery {action} " in " ".join(said.split())
    assert ("--rate" in said) == (action == "upgrade")
    assert ("--least-cosine" in said) == (action == "verify")
    assert ("--model" in said) == (action in ("plan", "upgrade", "verify"))


def test_a_table_that_cannot_be_swapped_now_ends_with_75_and_what_to_do(place, vectors, capsys, monkeypatch):
    psycopg = pytest.importorskip("psycopg", reason="needs the extra `gallery`")
    from trainer.gallery.postgres import PostgresGallery

    monkeypatch.setattr(PostgresGallery.swap, "__defaults__", (None, 0, 0.0))
    using = ("--model", place / "new", "--device", "cpu")
    with postgres() as store, psycopg.connect(store, autocommit=True) as connection:
        connection.execute("CREATE TABLE faces (id bigint PRIMARY KEY, embedding vector(16))")
        for i, vector in enumerate(vectors):
            connection.execute("INSERT INTO faces VALUES (%s, %s)", (i, str(vector.tolist())))
        assert lce(capsys, "upgrade", store, *using, "--no-swap")[1]["left"] == 0
        with psycopg.connect(store) as holder:
            holder.execute("SELECT FROM faces")
            assert cli.main(["gallery", "upgrade", store, *map(str, using)]) == 75
        said = capsys.readouterr().err
        assert "not finished: faces.embedding: not swapped, because process" in said
        assert "run the upgrade again" in said
        assert lce(capsys, "upgrade", store, *using)[1]["phase"] == "swapped"


def test_a_collection_goes_through_every_action(place, vectors, tmp_path, capsys):
    qdrant_client = pytest.importorskip("qdrant_client", reason="needs qdrant-client (extra `gallery`)")
    models, client = qdrant_client.models, qdrant_client.QdrantClient(path=str(tmp_path))
    client.create_collection("v1", vectors_config=models.VectorParams(size=16, distance=models.Distance.COSINE))
    client.upsert("v1", [models.PointStruct(id=i, vector=v.tolist()) for i, v in enumerate(vectors)])
    alias = models.CreateAlias(collection_name="v1", alias_name="people")
    client.update_collection_aliases([models.CreateAliasOperation(create_alias=alias)])
    client.close()
    store, which = f"qdrant:{tmp_path}", ("--alias", "people")
    using = (*which, "--model", place / "new", "--device", "cpu")
    assert lce(capsys, "status", store, *which)[1]["phase"] == "none"
    assert lce(capsys, "plan", store, *using)[1]["dim_out"] == 24
    assert lce(capsys, "upgrade", store, *using)[1]["done"] == 30
    assert lce(capsys, "verify", store, *using)[0] == 0
    assert lce(capsys, "rollback", store, *which)[1]["phase"] == "none"
    assert lce(capsys, "upgrade", store, *using)[1]["phase"] == "swapped"
    assert lce(capsys, "finish", store, *which)[1]["phase"] == "finished"
    assert "was converted to" in lce(capsys, "upgrade", store, *using)[1]
