"""A second named vector in the points of a Qdrant collection, in the client's local mode."""

import numpy as np
import pytest

from tests.gallery.rotation import Cut, Rotation
from tests.gallery.test_qdrant import IDS, NEW, VECTORS, models, opened, qdrant_client, store
from trainer.errors import DataError
from trainer.gallery.qdrant import QdrantGallery
from trainer.gallery.qdrant_vector import SecondVector, open_points

pytestmark = pytest.mark.parametrize("store", ["face"], indirect=True)
__all__ = ["store"]


@pytest.fixture
def place(store):
    """The folder of a collection whose vector is called face, and that name."""
    return store


def act(place, action, new="face2", vector="face"):
    gallery = open_points(place[0], "faces", vector, new)
    try:
        return action(gallery)
    finally:
        gallery.close()


def change(place, action):
    client = qdrant_client.QdrantClient(path=place[0])
    try:
        return action(client)
    finally:
        client.close()


def content(place):
    """Id → (vectors, payload)."""
    records = change(place, lambda client: client.scroll("faces", limit=1000, with_vectors=True)[0])
    return {record.id: (record.vector, record.payload) for record in records}


def enrol(place, number, **vectors):
    point = models.PointStruct(id=number, vector={name: row.tolist() for name, row in vectors.items()})
    change(place, lambda client: client.upsert("faces", [point]))


def check_both(place):
    found = content(place)
    for at, number in enumerate(IDS):
        vectors, payload = found[number]
        assert vectors["face"] == pytest.approx(VECTORS[at] / np.linalg.norm(VECTORS[at]), abs=1e-5)
        assert vectors["face2"] == pytest.approx(NEW[at], abs=1e-5)
        assert payload == {"who": f"p{at // 3}", "tags": [at, None]}


def test_a_second_vector_is_filled_verified_rolled_back_and_finished(place):
    before, seen = content(place), []
    plan = act(place, lambda g: g.plan(Rotation()))
    assert (plan["rows"], plan["dim_out"], content(place)) == (60, 24, before)
    state = act(place, lambda g: g.upgrade(Rotation(), batch=16, progress=lambda *done: seen.append(done)))
    assert (state.phase, state.done, seen[-1]) == ("swapped", 60, (60, 60))
    check_both(place)
    check = act(place, lambda g: g.verify(Rotation(), sample=40), new="")
    assert (check.rows, check.rows_before, check.rows_now, check.missing) == (40, 60, 60, 0)
    assert check.smallest_cosine > 0.9999
    ids, rows = act(place, lambda g: g.sample(5), new="")
    assert (len(ids), {len(row) for row in rows}) == (5, {24})
    act(place, lambda g: g.rollback(), new="")
    assert content(place) == before
    assert act(place, lambda g: g.status(), new="").phase == "none"
    act(place, lambda g: g.upgrade(Rotation()))
    act(place, lambda g: g.finish(), new="")
    assert {tuple(vectors) for vectors, _ in content(place).values()} == {("face2",)}
    back = Rotation("rotation-1")
    back.dim_in = 24
    for vector in ("", "face9"):
        with pytest.raises(DataError, match=f"face2: was converted to {back.version} already"):
            act(place, lambda g: g.upgrade(back), new=vector, vector="face2")


def test_a_rerun_fills_only_points_that_lack_the_new_vector(place, tmp_path):
    log = tmp_path / "log"

    with pytest.raises(KeyboardInterrupt):
        act(place, lambda g: g.upgrade(Cut(log=log), batch=16))
    state = act(place, lambda g: g.status(), new="")
    assert (state.phase, state.done, state.new_vector) == ("converting", 32, "face2")
    act(place, lambda g: g.upgrade(Rotation(log=log), batch=16), new="")
    assert sorted(log.read_text().split()) == sorted(map(str, IDS))
    check_both(place)
    enrol(place, 1001, face=VECTORS[0])
    check = act(place, lambda g: g.verify(Rotation()), new="")
    assert (check.missing, check.rows_before, check.rows_now) == (1, 61, 60)
    with pytest.raises(DataError, match="1 points have no vector face2 yet; run the upgrade again"):
        act(place, lambda g: g.finish(), new="")
    log.unlink()
    assert act(place, lambda g: g.upgrade(Rotation(log=log)), new="").done == 61
    assert log.read_text().split() == ["1001"]


def test_a_rollback_keeps_points_that_have_the_new_vector_only(place):
    act(place, lambda g: g.upgrade(Rotation()))
    enrol(place, 1001, face2=NEW[0])
    held = content(place)
    with pytest.raises(DataError, match=r"1 points have the vector face2 only \(1001 is one\)"):
        act(place, lambda g: g.rollback(), new="")
    assert content(place) == held
    change(place, lambda client: client.delete("faces", points_selector=models.PointIdsList(points=[1001])))
    act(place, lambda g: g.rollback(), new="")
    assert {tuple(vectors) for vectors, _ in content(place).values()} == {("face",)}


def test_a_finish_that_is_cut_is_finished_by_the_next(place, monkeypatch):
    act(place, lambda g: g.upgrade(Rotation()))

    def cut(gallery):
        monkeypatch.setattr(gallery._client, "delete_vector_name", lambda *_: 1 / 0)
        gallery.finish()

    with pytest.raises(ZeroDivisionError):
        act(place, cut, new="")
    assert act(place, lambda g: g.status(), new="").phase == "finished"
    with pytest.raises(DataError, match="`finish` was interrupted; run it again"):
        act(place, lambda g: g.upgrade(Rotation("rotation-2")), new="")
    act(place, lambda g: g.finish(), new="")
    assert {tuple(vectors) for vectors, _ in content(place).values()} == {("face2",)}
    assert act(place, lambda g: g.status(), new="", vector="face2").applied == ()


def test_refusals_of_a_second_vector(place, monkeypatch):
    act(place, lambda g: g.upgrade(Rotation()))
    for new, vector, said in (
        ("face3", "face", "an upgrade to the vector face2 is swapped"),
        ("face3", "face2", "is being made of face; name that one"),
    ):
        with pytest.raises(DataError, match=said):
            act(place, lambda g: g.status(), new, vector)
    with pytest.raises(DataError, match="an upgrade to rotation-1 is swapped"):
        act(place, lambda g: g.upgrade(Rotation("rotation-2")), new="")
    act(place, lambda g: g.rollback(), new="")
    enrol(place, 1001, face=VECTORS[0])
    with pytest.raises(DataError, match="has a vector face; give `new_vector` another name"):
        act(place, lambda g: g.upgrade(Rotation()), new="face")

    def old_server(gallery):
        def refuse(*_):
            raise ValueError("Unexpected Response: 404 (Not Found)")

        monkeypatch.setattr(gallery._client, "create_vector_name", refuse)
        gallery.upgrade(Rotation())

    with pytest.raises(DataError, match=r"face2 could not be added \(servers before 1\.18 cannot do it"):
        act(place, old_server)
    assert opened(place, lambda g: g.status()).phase == "none"
    opened(place, lambda g: g.upgrade(Rotation()))
    with pytest.raises(DataError, match="an upgrade by a second collection is swapped"):
        act(place, lambda g: g.status())


def test_a_vector_without_a_name_or_of_several_rows_is_refused(place, tmp_path):
    params = models.VectorParams(size=16, distance=models.Distance.COSINE)
    several = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)

    def add(client):
        client.create_collection("plain", vectors_config=params)
        client.create_collection("many", vectors_config=params.model_copy(update={"multivector_config": several}))
        for name in ("plain", "many"):
            alias = models.CreateAlias(collection_name=name, alias_name=f"of_{name}")
            client.update_collection_aliases([models.CreateAliasOperation(create_alias=alias)])

    change(place, add)
    gallery = SecondVector(place[0], "of_plain", "", "face2")
    with pytest.raises(DataError, match="the collection's vector has no name"):
        gallery.upgrade(Rotation())
    gallery.close()
    with pytest.raises(DataError, match="points have several vectors each"):
        QdrantGallery(place[0], "of_many")


def test_finish_after_a_rollback_of_the_second_upgrade_deletes_nothing(place):
    opened(place, lambda g: g.upgrade(Rotation()))
    opened(place, lambda g: g.finish())
    held = content(place)
    again = Rotation("rotation-2")
    again.dim_in, again.matrix = 24, np.eye(24, dtype=np.float32)
    opened(place, lambda g: g.upgrade(again))
    opened(place, lambda g: g.rollback())
    opened(place, lambda g: g.finish())
    assert content(place) == held
