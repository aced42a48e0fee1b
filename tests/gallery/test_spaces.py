"""Galleries in which vectors of two models are mixed are recognised in every store, by images and by a bank."""

import json

import numpy as np
import pytest
import torch

from tests.evaluation.samples import identities
from tests.evaluation.test_evaluate import model, pictures
from tests.gallery.servers import postgres
from tests.sections import variant
from tools import cli
from trainer.compat.bank.center_bank import BankInfo
from trainer.compat.bank.convert import bank_from_embeddings
from trainer.compat.bank.matrices import Rows
from trainer.data.index import open_dataset
from trainer.gallery.spaces import by_images
from trainer.models.card import ModelCard, TransformCard
from trainer.models.folder import save_model
from trainer.models.model import embed_dataset
from trainer.models.open import load_model
from trainer.networks import build_backbone
from trainer.networks.config import AnyTransform, BackboneConfig
from trainer.networks.transform import build_transform


@pytest.fixture(autouse=True)
def this_command_alone(monkeypatch):
    monkeypatch.setattr(cli, "COMMANDS", ("gallery",))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spaces")
    pictures(folder / "images", 20, 3, seed=1)
    model(folder / "old", 1)
    torch.manual_seed(2)  # the new model is of the same dimension, which tells nothing
    config, linear = BackboneConfig(name="small", dim=16), variant(AnyTransform, name="linear")
    module = build_transform(linear, 16, 16)
    for weight in module.parameters():
        torch.nn.init.orthogonal_(weight) if weight.ndim == 2 else torch.nn.init.zeros_(weight)
    cards = {"t12": TransformCard(config=linear, dim_in=16, dim_out=16)}
    card = ModelCard(backbone=config, dim=16, image_size=(32, 32), transforms=cards)
    save_model(folder / "new", build_backbone(config, (32, 32)), card, {"t12": module})
    return folder


@pytest.fixture(scope="module")
def mixed(place):
    """Sixty vectors, of which the first fifteen are T₁₂'s."""
    vectors = embed_dataset(load_model(place / "old"), open_dataset(place / "images"))
    return np.concatenate([load_model(place / "new").transform("t12", vectors[:15]), vectors[15:]])


def verify(capsys, store, place, *words):
    which = ("--model", place / "new", "--old", place / "old", "--images", place / "images", "--device", "cpu")
    status = cli.main(["gallery", "verify", *map(str, (store, *which, *words)), "--json", "-"])
    out, err = capsys.readouterr()
    return status, json.loads(out), err


def check(found):
    status, outcome, err = found
    assert status == 1
    assert outcome["spaces"] == {"rows": 60, "old": 0.75, "new": 0.25, "unclear": 0.0}
    assert "25.0% of the rows are in the new model's space, 75.0% in the old one's" in err


def test_a_mixed_file(place, mixed, tmp_path, capsys):
    np.save(tmp_path / "faces.npy", mixed)
    check(verify(capsys, tmp_path / "faces.npy", place))
    pure = embed_dataset(load_model(place / "old"), open_dataset(place / "images"))
    np.save(tmp_path / "faces.npy", pure)
    status, outcome, _ = verify(capsys, tmp_path / "faces.npy", place)
    assert (status, outcome["spaces"]["old"], outcome["verified"]) == (0, 1.0, True)
    words = [str(tmp_path / "faces.npy"), "--model", str(place / "new"), "--device", "cpu"]
    assert cli.main(["gallery", "upgrade", *words]) == 0
    capsys.readouterr()
    status, outcome, _ = verify(capsys, tmp_path / "faces.npy", place)
    assert (status, outcome["spaces"]["new"], outcome["smallest_cosine"] > 0.9999) == (0, 1.0, True)
    now = np.load(tmp_path / "faces.npy")
    now[:15] = pure[:15]  # enrolled by a client that still has the old model
    np.save(tmp_path / "faces.npy", now)
    status, _, err = verify(capsys, tmp_path / "faces.npy", place)
    assert status == 1
    assert "25.0% of the rows are in the old model's space" in err


@pytest.mark.slow
def test_a_mixed_table(place, mixed, capsys):
    psycopg = pytest.importorskip("psycopg", reason="needs the extra `gallery`")
    with postgres() as store:
        with psycopg.connect(store, autocommit=True) as connection:
            connection.execute("CREATE TABLE faces (id int PRIMARY KEY, embedding vector(16))")
            for i, vector in enumerate(mixed):
                connection.execute("INSERT INTO faces VALUES (%s, %s)", (i, str(vector.tolist())))
        check(verify(capsys, store, place))


def test_a_mixed_collection(place, mixed, tmp_path, capsys):
    qdrant_client = pytest.importorskip("qdrant_client", reason="needs qdrant-client (extra `gallery`)")
    models, client = qdrant_client.models, qdrant_client.QdrantClient(path=str(tmp_path))
    client.create_collection("v1", vectors_config=models.VectorParams(size=16, distance=models.Distance.COSINE))
    client.upsert("v1", [models.PointStruct(id=i, vector=v.tolist()) for i, v in enumerate(mixed)])
    alias = models.CreateAlias(collection_name="v1", alias_name="faces")
    client.update_collection_aliases([models.CreateAliasOperation(create_alias=alias)])
    client.close()
    check(verify(capsys, f"qdrant:{tmp_path}", place))


def test_by_a_bank_without_images(place, tmp_path, capsys):
    vectors, labels = identities(50, 6, dim=16, seed=1)[:2]
    labels = (labels - 3) // 7
    rows = Rows([torch.from_numpy(vectors.astype(np.float32))], ["vectors"])
    bank_from_embeddings(rows, labels, 50, tmp_path / "bank", BankInfo(source="a test"))
    new = load_model(place / "new")
    np.save(tmp_path / "faces.npy", np.concatenate([new.transform("t12", vectors[:90]), vectors[90:]]))
    words = [tmp_path / "faces.npy", "--model", place / "new", "--bank", tmp_path / "bank", "--device", "cpu"]
    assert cli.main(["gallery", "verify", *map(str, words), "--json", "-"]) == 1
    spaces = json.loads(capsys.readouterr().out)["spaces"]
    assert spaces["new"] == pytest.approx(0.3, abs=0.05)
    assert spaces["old"] == pytest.approx(0.7, abs=0.05)


def test_vectors_of_two_dimensions_are_told_apart(place):
    ids = np.arange(4)
    old, new = (load_model(place / name) for name in ("old", "new"))
    dataset = open_dataset(place / "images")
    vectors = [*embed_dataset(old, dataset, ids[:2]), np.ones(24, np.float32), np.zeros(16, np.float32)]
    found = by_images(ids, vectors, dataset, old, new)
    assert (found.old, found.new, found.unclear) == (0.5, 0.0, 0.5)
