"""Upgrade of gallery files: same rows, same ids, killed at random moments, rolled back, refused."""

import errno
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.evaluation.samples import identities
from tests.gallery.rotation import Rotation
from trainer.errors import DataError
from trainer.gallery.files import finish, plan, rollback, search, status, upgrade, verify, work_folder
from trainer.gallery.formats import open_gallery
from trainer.gallery.orders import order_rows

faiss = pytest.importorskip("faiss", reason="needs FAISS (extra `gallery`)")

VECTORS = identities(50, 6, dim=16, seed=1)[0]
IDS = np.random.default_rng(0).permutation(10_000)[: len(VECTORS)].astype(np.int64)


def flat(metric=faiss.METRIC_INNER_PRODUCT):
    index = faiss.IndexFlat(16, metric)
    index.add(VECTORS)
    return index


def ivf(ids=None):
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(16), 16, 8, faiss.METRIC_INNER_PRODUCT)
    index.train(VECTORS)
    index.nprobe = 5
    index.add_with_ids(VECTORS, np.arange(len(VECTORS)) if ids is None else ids)
    return index


def hnsw():
    index = faiss.IndexHNSWFlat(16, 12, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efSearch = 77
    index.add(VECTORS)
    return index


def mapped(inner, kind=faiss.IndexIDMap2):
    index = kind(inner)
    index.add_with_ids(VECTORS, IDS)
    return index


def shards(path, ids=True):
    path.mkdir()
    for at, part in enumerate((slice(0, 120), slice(120, 121), slice(121, 300))):
        tensors = {"vectors": VECTORS[part]} | ({"ids": IDS[part]} if ids else {})
        save_file(tensors, path / f"part-{at}.safetensors", {"part": str(at)})
    (path / "about.txt").write_text("people")


MAKERS = {
    "shards": shards,
    "numbered": lambda path: shards(path, ids=False),
    "a.npy": lambda path: np.save(path, VECTORS),
    "half.npy": lambda path: np.save(path, VECTORS.astype(np.float16)),
    "a.safetensors": lambda path: save_file({"vectors": VECTORS, "ids": IDS}, path, {"made": "by a test"}),
    "flat.index": lambda path: faiss.write_index(flat(), str(path)),
    "l2.index": lambda path: faiss.write_index(flat(faiss.METRIC_L2), str(path)),
    "ivf.index": lambda path: faiss.write_index(ivf(IDS), str(path)),
    "hnsw.index": lambda path: faiss.write_index(hnsw(), str(path)),
    "map.index": lambda path: faiss.write_index(mapped(faiss.IndexFlatIP(16)), str(path)),
    "map1.faiss": lambda path: faiss.write_index(mapped(faiss.IndexHNSWFlat(16, 8), faiss.IndexIDMap), str(path)),
}


def content(path):
    return {p.name: p.read_bytes() for p in (path.iterdir() if path.is_dir() else [path])}


@pytest.mark.parametrize("name", MAKERS)
def test_every_kind_of_file_is_upgraded_and_rolled_back(tmp_path, name):
    path = tmp_path / name
    MAKERS[name](path)
    parts = [path, *(path.glob("*.safetensors") if path.is_dir() else ())]
    for part in parts:
        part.chmod(0o775 if part.is_dir() else 0o664)
    original, before = content(path), open_gallery(path)
    expected = dict(
        zip(
            before.ids(slice(0, 300)).tolist(),
            Rotation()(before.ids(slice(0, 300)), before.read(slice(0, 300))),
            strict=True,
        )
    )
    wanted = plan(path, Rotation())
    assert (wanted.rows, wanted.dim_in, wanted.dim_out) == (300, 16, 24)
    assert wanted.bytes_needed > 300 * 24 * 4
    seen = []
    state = upgrade(path, Rotation(), batch=64, progress=lambda done, total: seen.append((done, total)))
    assert (state.phase, state.done) == ("swapped", 300)
    assert seen[-1] == (300, 300)
    assert [oct(part.stat().st_mode & 0o777) for part in parts] == [oct(0o775 if p.is_dir() else 0o664) for p in parts]
    after = open_gallery(path)
    assert (after.rows, after.dim) == (300, 24)
    for number, vector in zip(after.ids(slice(0, 300)).tolist(), after.read(slice(0, 300)), strict=True):
        assert vector == pytest.approx(expected[number], abs=2e-3 if "half" in name else 1e-6)
    assert verify(path, Rotation(), sample=50).smallest_cosine > 0.9999
    assert upgrade(path, Rotation()).phase == "swapped"  # again: nothing to do
    rollback(path)
    assert content(path) == original
    assert status(path) is None
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_search_results_and_parameters_survive(tmp_path):
    path = tmp_path / "ivf.index"
    MAKERS["ivf.index"](path)
    queries = VECTORS[:20]
    before = faiss.read_index(str(path)).search(queries, 5)[1]
    upgrade(path, Rotation())
    index = faiss.read_index(str(path))
    assert (index.nlist, index.nprobe) == (8, 5)
    index.nprobe = 8
    found = index.search(Rotation()(None, queries), 5)[1]
    exact = mapped(faiss.IndexFlatIP(16)).search(queries, 5)[1]
    assert np.array_equal(found, exact)  # an isometry: the same neighbours
    assert before.shape == found.shape
    MAKERS["hnsw.index"](tmp_path / "h.index")
    upgrade(tmp_path / "h.index", Rotation())
    upgraded = faiss.read_index(str(tmp_path / "h.index"))
    graph = upgraded.hnsw
    assert (graph.nb_neighbors(1), graph.efSearch) == (12, 77)


def test_safetensors_keep_ids_and_metadata(tmp_path):
    path = tmp_path / "a.safetensors"
    MAKERS["a.safetensors"](path)
    upgrade(path, Rotation())
    tensors = load_file(path)
    assert set(tensors) == {"vectors", "ids"}
    assert np.array_equal(tensors["ids"], IDS)
    assert tensors["vectors"].shape == (300, 24)


def _slowly(path, log):
    upgrade(path, Rotation(seconds=0.002, log=log), batch=4)


@pytest.mark.parametrize("name", ["a.npy", "map.index", "shards"])
def test_killed_at_random_moments_no_row_is_lost(tmp_path, name):
    path, log = tmp_path / name, tmp_path / "log"
    MAKERS[name](path)
    before = open_gallery(path)
    expected = Rotation()(None, before.read(slice(0, 300)))
    generator, context, killed = random.Random(3), multiprocessing.get_context("fork"), 0
    while (state := status(path)) is None or state.phase != "swapped":
        process = context.Process(target=_slowly, args=(path, log))
        process.start()
        process.join(generator.uniform(0.05, 0.3) if killed < 6 else 60)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.join()
        if not (name == "shards" and status(path).phase == "swapping"):  # a folder is missing for a moment
            assert open_gallery(path).rows == 300  # at every moment there is a whole gallery under the name
    assert killed > 0
    after = open_gallery(path)
    assert after.read(slice(0, 300)) == pytest.approx(expected, abs=1e-6)
    assert np.array_equal(after.ids(slice(0, 300)), before.ids(slice(0, 300)))
    converted = [int(line) for line in log.read_text().split()]
    assert len(converted) <= 300 + 4 * killed  # at most the batch under way is done again


@pytest.mark.parametrize("name", ["a.npy", "shards"])
def test_rollback_and_finish_cut_off_go_on(tmp_path, name, monkeypatch):
    path = tmp_path / name

    def cut_at(number, action):
        """Run it until its rename of that number, as a kill would end it; whether it got so far."""
        count, rename = 0, pathlib.Path.rename

        def counted(self, target):
            nonlocal count
            count += 1
            if count == number:
                raise KeyboardInterrupt
            return rename(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(pathlib.Path, "rename", counted)
            try:
                action(path)
            except KeyboardInterrupt:
                return True
        return False

    for action, wanted in ((rollback, 16), (finish, 24)):
        for number in range(1, 6):
            MAKERS[name](path)
            upgrade(path, Rotation())
            if cut_at(number, action):
                assert status(path).phase == ("rolling back" if number > 1 and action is rollback else "swapped")
                if status(path).phase == "rolling back":
                    with pytest.raises(DataError, match="run the rollback again"):
                        upgrade(path, Rotation())
                action(path)
            assert open_gallery(path).dim == wanted
            assert [p.name for p in tmp_path.iterdir()] == [name]
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_without_the_old_file_there_is_no_way_back(tmp_path):
    path = tmp_path / "a.npy"
    MAKERS["a.npy"](path)
    upgrade(path, Rotation())
    (work_folder(path) / "before.npy").unlink()
    with pytest.raises(DataError, match=r"before\.npy: the old gallery is gone"):
        rollback(path)
    assert open_gallery(path).dim == 24


def test_an_old_gallery_without_its_state_is_kept(tmp_path):
    path = tmp_path / "a.npy"
    MAKERS["a.npy"](path)
    upgrade(path, Rotation())
    (work_folder(path) / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"move .*before\.npy, the old gallery, to safety"):
        status(path)
    (work_folder(path) / "state.json").unlink()
    np.save(path, VECTORS)
    with pytest.raises(DataError, match="an upgrade without its state; move it away first"):
        upgrade(path, Rotation())


def test_a_link_stands_for_the_gallery_that_it_names(tmp_path):
    store, link = tmp_path / "store", tmp_path / "current.npy"
    store.mkdir()
    MAKERS["a.npy"](store / "v1.npy")
    link.symlink_to("store/v1.npy")
    MAKERS["a.npy"](store / "b.npy")
    (store / "b.npy").rename(store / "sha256-ab")
    (tmp_path / "b.npy").symlink_to("store/sha256-ab")
    assert upgrade(tmp_path / "b.npy", Rotation()).phase == "swapped"
    assert verify(tmp_path / "b.npy", Rotation()).smallest_cosine > 0.9999
    rollback(tmp_path / "b.npy")
    (store / "sha256-ab").unlink()
    upgrade(link, Rotation())
    assert (open_gallery(link).dim, link.is_symlink()) == (24, True)
    assert verify(link, Rotation()).smallest_cosine > 0.9999
    rollback(link)
    assert (open_gallery(link).dim, link.is_symlink()) == (16, True)
    assert [p.name for p in store.iterdir()] == ["v1.npy"]


@pytest.mark.parametrize("value", [np.nan, 0.0, np.inf])
def test_verify_sees_vectors_that_are_spoiled(tmp_path, value):
    path = tmp_path / "a.npy"
    MAKERS["a.npy"](path)
    upgrade(path, Rotation())
    array = np.load(path, mmap_mode="r+")
    array[17] = value
    array.flush()
    assert verify(path, Rotation()).smallest_cosine == -1


@pytest.mark.parametrize("dtype", [np.int32, np.uint64, np.int64])
def test_ids_of_every_integer_type_are_kept(tmp_path, dtype):
    path = tmp_path / "a.safetensors"
    save_file({"vectors": VECTORS, "person": IDS.astype(dtype)}, path)
    assert np.array_equal(open_gallery(path).ids(slice(0, 300)), IDS)
    upgrade(path, Rotation())
    assert load_file(path)["person"].dtype == dtype


def test_vectors_in_bfloat16_are_refused(tmp_path):
    import torch
    from safetensors.torch import save_file as save_tensors

    save_tensors({"vectors": torch.ones(3, 16, dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
    with pytest.raises(DataError, match="store the vectors as float16 or float32"):
        open_gallery(tmp_path / "a.safetensors")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
    path = tmp_path / "a.npy"
    MAKERS["a.npy"](path)
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(DataError, match="Permission denied; the gallery is whole"):
            upgrade(path, Rotation())
    finally:
        tmp_path.chmod(0o755)


def test_a_disk_that_is_full_is_one_clear_error(tmp_path, monkeypatch):
    path = tmp_path / "a.npy"
    MAKERS["a.npy"](path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match="No space left on device; the gallery is whole"):
            upgrade(path, Rotation())
    assert upgrade(path, Rotation()).phase == "swapped"


def test_a_pace_is_kept(tmp_path):
    path = tmp_path / "a.npy"
    MAKERS["a.npy"](path)
    start = time.perf_counter()
    upgrade(path, Rotation(), batch=30, rows_per_second=600)
    assert time.perf_counter() - start >= 0.5


def test_what_cannot_be_upgraded_is_refused(tmp_path):
    path = tmp_path / "pq.index"
    index = faiss.IndexPQ(16, 4, 4)
    index.train(VECTORS)
    index.add(VECTORS)
    faiss.write_index(index, str(path))
    with pytest.raises(DataError, match="IndexPQ keeps compressed codes"):
        upgrade(path, Rotation())
    double = faiss.IndexIDMap2(faiss.IndexFlatIP(16))
    double.add_with_ids(VECTORS[:3], np.array([1, 2, 1]))
    faiss.write_index(double, str(path))
    with pytest.raises(DataError, match="id 1 occurs 2 times"):
        upgrade(path, Rotation())
    faiss.write_index(faiss.IndexFlatIP(16), str(path))
    with pytest.raises(DataError, match="empty"):
        upgrade(path, Rotation())
    path.write_bytes(b"nothing")
    with pytest.raises(DataError, match="no FAISS index"):
        upgrade(path, Rotation())
    np.save(tmp_path / "wide.npy", np.ones((4, 32), np.float32))
    with pytest.raises(DataError, match="dimension 32"):
        upgrade(tmp_path / "wide.npy", Rotation())
    np.save(tmp_path / "int.npy", np.ones((4, 16), np.int64))
    with pytest.raises(DataError, match="expected float vectors"):
        upgrade(tmp_path / "int.npy", Rotation())
    with pytest.raises(DataError, match="no such gallery"):
        upgrade(tmp_path / "none.npy", Rotation())
    with pytest.raises(DataError, match="no upgrade"):
        rollback(tmp_path / "wide.npy")
    save_file({"vectors": VECTORS[:3], "ids": np.array([4, 5, 4])}, tmp_path / "double.safetensors")
    with pytest.raises(DataError, match="id 4 occurs 2 times"):
        upgrade(tmp_path / "double.safetensors", Rotation())
    np.save(tmp_path / "empty.npy", VECTORS[:0])
    with pytest.raises(DataError, match="expected float vectors"):
        upgrade(tmp_path / "empty.npy", Rotation())
    shards(tmp_path / "twice")
    save_file({"vectors": VECTORS[:1], "ids": IDS[299:]}, tmp_path / "twice" / "part-4.safetensors")
    with pytest.raises(DataError, match=f"id {IDS[299]} occurs 2 times"):
        upgrade(tmp_path / "twice", Rotation())
    save_file({"vectors": np.ones((2, 8), np.float32), "ids": IDS[:2]}, tmp_path / "twice" / "part-4.safetensors")
    with pytest.raises(DataError, match=r"part-4.safetensors: dimension 8"):
        upgrade(tmp_path / "twice", Rotation())
    with pytest.raises(DataError, match="nothing to finish"):
        finish(tmp_path / "wide.npy")
    assert not list(tmp_path.glob("*.upgrade"))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_vectors_that_are_none_stop_the_upgrade_by_their_id(tmp_path, bad):
    path = tmp_path / "a.safetensors"
    vectors = VECTORS.copy()
    vectors[77] = bad
    save_file({"vectors": vectors, "ids": IDS}, path)
    before = path.read_bytes()
    with pytest.raises(DataError, match=f"id {IDS[77]} is zero or not finite"):
        upgrade(path, Rotation(), batch=50)
    assert (status(path).phase, status(path).done) == ("converting", 50)
    assert path.read_bytes() == before


def test_a_chain_of_upgrades(tmp_path):
    path = tmp_path / "flat.index"
    MAKERS["flat.index"](path)
    upgrade(path, Rotation())

    class Back(Rotation):
        dim_in, dim_out, version = 24, 16, "back"

        def __init__(self):
            super().__init__("back")
            self.matrix = self.matrix.T

    with pytest.raises(DataError, match="finish it or roll it back"):
        upgrade(path, Back())
    finish(path)
    assert [p.name for p in tmp_path.iterdir()] == ["flat.index"]
    upgrade(path, Back())
    assert open_gallery(path).read(slice(0, 300)) == pytest.approx(VECTORS, abs=1e-5)


@pytest.mark.parametrize("name", ["a.npy", "map.index", "shards"])
@pytest.mark.parametrize("order", ["stored", "random"])
def test_a_mixed_gallery_is_searched_rightly(tmp_path, name, order):
    path, query = tmp_path / name, VECTORS[7]
    MAKERS[name](path)
    ids = open_gallery(path).ids(slice(0, 300))
    exact = ids[np.argsort(-(VECTORS @ query))[:10]].tolist()
    as_new = Rotation()(None, query[None])[0]
    seen = []

    class Half(Rotation):
        def __call__(self, ids, vectors):
            if len(seen) == 3:
                raise KeyboardInterrupt
            seen.append(ids)
            return super().__call__(ids, vectors)

    def found(as_old=query):
        return [key for key, _ in search(path, as_old, as_new, 10)]

    assert found() == exact
    with pytest.raises(KeyboardInterrupt):
        upgrade(path, Half(), batch=50, order=order_rows(order, path))
    assert (status(path).done, len(np.unique(np.concatenate(seen)))) == (150, 150)
    assert (np.concatenate(seen).tolist() == ids[:150].tolist()) == (order == "stored")
    assert found() == exact  # an isometry: the same cosines in both spaces
    with pytest.raises(DataError, match="holds old rows"):
        found(None)
    upgrade(path, Rotation(), batch=64)  # continues in the order that it began with
    assert found(None) == exact
    assert open_gallery(path).read(slice(0, 300)) == pytest.approx(Rotation()(None, VECTORS), abs=1e-6)


def test_what_is_searched_most_and_what_is_least_certain_come_first(tmp_path):
    path = tmp_path / "a.npy"
    MAKERS["a.npy"](path)
    numbers = np.random.default_rng(0).permutation(300)
    np.save(tmp_path / "hits.npy", numbers)
    highest, lowest = (order_rows(f"{kind}:{tmp_path / 'hits.npy'}", path) for kind in ("highest", "lowest"))
    assert numbers[highest].tolist() == list(range(299, -1, -1))
    assert highest.tolist() == lowest.tolist()[::-1]
    log = tmp_path / "log"
    upgrade(path, Rotation(log=log), batch=7, order=highest)
    assert numbers[[int(line) for line in log.read_text().split()]].tolist() == list(range(299, -1, -1))
    for text, message in (
        ("best", "expected stored, random"),
        ("highest", "expected stored, random"),
        ("random:x", "expected stored, random"),
        ("confidence", "needs the images' identities"),
        (f"lowest:{tmp_path / 'none.npy'}", "is no .npy"),
    ):
        with pytest.raises(DataError, match=message):
            order_rows(text, path)
    np.save(tmp_path / "hits.npy", numbers[:-1])
    with pytest.raises(DataError, match="one finite number for each of 300 rows"):
        order_rows(f"lowest:{tmp_path / 'hits.npy'}", path)
    rollback(path)
    with pytest.raises(DataError, match="each of the 300 rows once"):
        upgrade(path, Rotation(), order=np.zeros(300, np.int64))
    assert not work_folder(path).exists()


def test_recall_of_an_index_is_measured_against_exact_search(tmp_path):
    for name, low, high in (("flat.index", 1.0, 1.0), ("ivf.index", 0.7, 0.999), ("a.npy", None, None)):
        MAKERS[name](tmp_path / name)
        upgrade(tmp_path / name, Rotation())
        check = verify(tmp_path / name, Rotation())
        if low is None:
            assert check.recall is None
            continue
        assert low <= check.recall <= high
        assert low <= check.recall_before <= high
    index = faiss.read_index(str(tmp_path / "ivf.index"))
    index.nprobe = 1
    faiss.write_index(index, str(tmp_path / "ivf.index"))
    check = verify(tmp_path / "ivf.index", Rotation())
    assert check.recall < check.recall_before  # the old index still looks into five lists


def test_another_version_or_a_changed_file_is_refused(tmp_path):
    path = tmp_path / "a.npy"
    MAKERS["a.npy"](path)

    class Interrupted(Rotation):
        def __call__(self, ids, vectors):
            if ids[0] >= 100:
                raise KeyboardInterrupt
            return super().__call__(ids, vectors)

    with pytest.raises(KeyboardInterrupt):
        upgrade(path, Interrupted(), batch=50)
    assert (status(path).done, status(path).phase) == (100, "converting")
    with pytest.raises(DataError, match="an upgrade to rotation-1 is converting"):
        upgrade(path, Rotation("rotation-2"))
    with pytest.raises(DataError, match="not upgraded"):
        verify(path, Rotation())
    np.save(path, VECTORS[::-1])
    with pytest.raises(DataError, match="changed since"):
        upgrade(path, Rotation())
    rollback(path)
    assert upgrade(path, Rotation("rotation-2")).phase == "swapped"
