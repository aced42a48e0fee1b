"""Upgrade of a Qdrant collection in the client's local mode: ids and payloads kept, killed, rolled back, refused."""

import contextlib
import functools
import shutil
import uuid
from types import SimpleNamespace

import numpy as np
import pytest

from tests.evaluation.samples import identities
from tests.gallery.rotation import Cut, Rotation
from trainer.errors import DataError

qdrant_client = pytest.importorskip("qdrant_client", reason="needs qdrant-client (extra `gallery`)")

from trainer.gallery.qdrant import QdrantGallery  # noqa: E402

models = qdrant_client.models
VECTORS = identities(20, 3, dim=16, seed=1)[0]
NEW = Rotation()(None, VECTORS)
IDS = [i if i % 2 else str(uuid.UUID(int=i + 1)) for i in range(60)]


def named(vector, name):
    return {name: vector} if name else vector


@pytest.fixture(params=["", "face"])
def store(tmp_path, request):
    """A folder with the collection v1 under the alias faces, and the name of its vector."""
    client, name = qdrant_client.QdrantClient(path=str(tmp_path)), request.param
    client.create_collection(
        "v1", vectors_config=named(models.VectorParams(size=16, distance=models.Distance.COSINE), name)
    )
    points = [
        models.PointStruct(id=i, vector=named(v.tolist(), name), payload={"who": f"p{at // 3}", "tags": [at, None]})
        for at, (i, v) in enumerate(zip(IDS, VECTORS, strict=True))
    ]
    client.upsert("v1", points)
    alias = models.CreateAlias(collection_name="v1", alias_name="faces")
    client.update_collection_aliases([models.CreateAliasOperation(create_alias=alias)])
    client.close()
    return str(tmp_path), name


def content(store):
    """Of the alias: id → (vector, payload)."""
    client = qdrant_client.QdrantClient(path=store[0])
    records = client.scroll("faces", limit=1000, with_vectors=True)[0]
    client.close()
    return {r.id: (r.vector[store[1]] if store[1] else r.vector, r.payload) for r in records}


def opened(store, action):
    gallery = QdrantGallery(store[0], "faces", store[1])
    try:
        return action(gallery)
    finally:
        gallery.close()


def check_new(store):
    found = content(store)
    assert list(map(str, sorted(found, key=str))) == sorted(map(str, IDS))
    for at, number in enumerate(IDS):
        assert found[number][0] == pytest.approx(NEW[at], abs=1e-5)
        assert found[number][1] == {"who": f"p{at // 3}", "tags": [at, None]}


def test_a_collection_is_upgraded_verified_rolled_back_and_finished(store):
    before = content(store)
    seen = []
    state = opened(store, lambda g: g.upgrade(Rotation(), batch=16, progress=lambda a, b: seen.append((a, b))))
    assert (state.phase, state.done, seen[-1]) == ("swapped", 60, (60, 60))
    check_new(store)
    check = opened(store, lambda g: g.verify(Rotation(), sample=40))
    assert (check.rows, check.rows_before, check.rows_now, check.missing) == (40, 60, 60, 0)
    assert check.smallest_cosine > 0.9999
    assert opened(store, lambda g: g.upgrade(Rotation())).phase == "swapped"
    opened(store, lambda g: g.rollback())
    assert content(store) == before
    assert opened(store, lambda g: g.status()).phase == "none"
    opened(store, lambda g: g.upgrade(Rotation()))
    opened(store, lambda g: g.finish())
    check_new(store)
    with pytest.raises(DataError, match="was converted to rotation-1 already"):
        opened(store, lambda g: g.upgrade(Rotation()))


def test_an_interrupted_upgrade_goes_on_and_takes_what_changed_meanwhile(store, tmp_path):
    log = tmp_path / "log"

    with pytest.raises(KeyboardInterrupt):
        opened(store, lambda g: g.upgrade(Cut(log=log), batch=16))
    state = opened(store, lambda g: g.status())
    assert (state.phase, state.done) == ("converting", 32)
    first = log.read_text().split()
    client = qdrant_client.QdrantClient(path=store[0])
    gone, changed, added = first[0], first[1], 1001
    as_id = int if first[0].isdigit() else str
    client.delete("v1", points_selector=models.PointIdsList(points=[as_id(gone)]))
    kept = IDS.index(int(changed) if changed.isdigit() else changed)
    vector = named(VECTORS[0].tolist(), store[1])
    client.upsert("v1", [models.PointStruct(id=IDS[kept], vector=vector, payload={"who": "other"})])
    client.upsert("v1", [models.PointStruct(id=added, vector=vector, payload={})])
    client.close()
    opened(store, lambda g: g.upgrade(Rotation(), batch=16))
    found = content(store)
    assert len(found) == 60
    assert added in found
    assert as_id(gone) not in found
    assert found[IDS[kept]] == (pytest.approx(NEW[0], abs=1e-5), {"who": "other"})
    client = qdrant_client.QdrantClient(path=store[0])
    client.upsert("faces", [models.PointStruct(id=2002, vector=named(NEW[0].tolist(), store[1]), payload={})])
    client.close()
    with pytest.raises(DataError, match=r"points were enrolled after the swap \(2002 and 0 more\)"):
        opened(store, lambda g: g.rollback())


WRITES = ("create_collection", "delete_collection", "upsert", "delete", "update_collection_aliases")


def cut(store, action, writes):
    """The action, ended before a write as a kill would; whether it came to its end."""

    def call(real, *args, **kwargs):
        nonlocal writes
        writes -= 1
        if writes < 0:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    def limited(gallery):
        for name in WRITES:
            setattr(gallery._client, name, functools.partial(call, getattr(gallery._client, name)))
        action(gallery)

    with contextlib.suppress(KeyboardInterrupt):
        opened(store, limited)
        return True
    return False


@pytest.mark.parametrize("store", ["face"], indirect=True)
@pytest.mark.parametrize("what", ["upgrade", "rollback"])
def test_a_call_that_is_killed_before_any_of_its_writes_is_finished_by_the_next(store, tmp_path_factory, what):
    """And a face that was enrolled in between, wherever the alias pointed, is not lost."""
    actions = {"upgrade": lambda g: g.upgrade(Rotation(), batch=64), "rollback": lambda g: g.rollback()}
    if what == "rollback":
        opened(store, actions["upgrade"])
    for writes in range(100):
        copy = str(tmp_path_factory.mktemp("copy") / "store"), store[1]
        shutil.copytree(store[0], copy[0])
        if cut(copy, actions[what], writes):
            break
        client = qdrant_client.QdrantClient(path=copy[0])
        alias = client.get_aliases().aliases[0].collection_name
        face = named((VECTORS if alias == "v1" else NEW)[0].tolist(), store[1])
        client.upsert("faces", [models.PointStruct(id=5001, vector=face, payload={})])
        client.close()
        if what == "rollback" and alias != "v1":
            with pytest.raises(DataError, match="points were enrolled after the swap"):
                opened(copy, actions[what])
        else:
            phase = opened(copy, lambda g: (actions[what](g), g.status().phase)[1])
            assert phase == ("swapped" if what == "upgrade" else "none")
        found = content(copy)
        assert len(found) == 61, f"killed before write {writes + 1}"
        new = what == "upgrade" or alias != "v1"
        assert found[5001][0] == pytest.approx((NEW if new else VECTORS)[0], abs=1e-5)
    assert writes >= 3


def test_payload_indexes_are_made_by_the_next_call_too(store):
    """Of a call that was killed when it had made the collection and not yet its indexes."""
    asked = []

    def indexed(gallery, action):
        real = gallery._client.get_collection

        def described(name):
            info = real(name)
            if name == "v1":
                info.payload_schema = {"who": SimpleNamespace(params=None, data_type="keyword")}
            return info

        gallery._client.get_collection = described
        gallery._client.create_payload_index = lambda *words, **more: asked.append((*words, more["field_schema"]))
        action(gallery)

    with pytest.raises(KeyboardInterrupt):
        opened(store, lambda g: g.upgrade(Cut(), batch=16))
    opened(store, lambda g: indexed(g, lambda g: g.upgrade(Rotation())))
    assert [words[1:] for words in asked] == [("who", "keyword")]


def test_points_that_come_faster_than_they_are_read_end_the_upgrade_with_a_message(store):
    class Followed(Rotation):
        """As many points are appended as are converted."""

        def __call__(self, ids, vectors):
            first = 10**6 + gallery._client.count("v1").count
            points = [
                models.PointStruct(id=first + at, vector=named(VECTORS[at].tolist(), store[1]))
                for at in range(len(vectors))
            ]
            gallery._client.upsert("v1", points)
            return super().__call__(ids, vectors)

    def attempt(opened_gallery):
        nonlocal gallery
        gallery = opened_gallery
        with pytest.raises(DataError, match="points come faster than they are read; stop writers, run again"):
            gallery.upgrade(Followed(), batch=8)
        return gallery.upgrade(Rotation(), batch=8).phase

    gallery = None
    assert opened(store, attempt) == "swapped"


def test_refusals(store, tmp_path):
    with pytest.raises(DataError, match="v1: is a collection itself; make an alias"):
        QdrantGallery(store[0], "v1", store[1])
    with pytest.raises(DataError, match=r"nobody: no such alias in Qdrant; there are \['faces'\]"):
        QdrantGallery(store[0], "nobody", store[1])
    with pytest.raises(DataError, match="name the vector with `vector`"):
        QdrantGallery(store[0], "faces", "other")
    with pytest.raises(DataError, match="no folder of Qdrant's local mode"):
        QdrantGallery(str(tmp_path / "none"), "faces")
    with pytest.raises(DataError, match="run again to continue"):
        QdrantGallery("http://127.0.0.1:1", "faces")
    wide = Rotation()
    wide.dim_in = 32
    with pytest.raises(DataError, match="takes 32"):
        opened(store, lambda g: g.upgrade(wide))
    for action in ("rollback", "finish"):
        with pytest.raises(DataError, match=r"no upgrade|nothing to finish"):
            opened(store, lambda g, action=action: getattr(g, action)())
    images = Rotation("images-1")
    images.by_id = True
    with pytest.raises(DataError, match="some are no numbers"):
        opened(store, lambda g: g.upgrade(images))
    assert np.array_equal(sorted(map(str, content(store))), sorted(map(str, IDS)))
