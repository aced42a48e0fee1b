"""Upgrade of gallery files: same rows, same ids, killed at random moments, rolled back, refused."""

import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.evaluation.samples import identities
from tests.gallery.rotation import Rotation
from trainer.errors import DataError
from trainer.gallery.files import plan, rollback, status, upgrade, verify, work_folder
from trainer.gallery.formats import open_gallery

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


MAKERS = {
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


@pytest.mark.parametrize("name", MAKERS)
def test_every_kind_of_file_is_upgraded_and_rolled_back(tmp_path, name):
    path = tmp_path / name
    MAKERS[name](path)
    original, before = path.read_bytes(), open_gallery(path)
    expected = dict(zip(before.ids(0, 300).tolist(), Rotation()(before.ids(0, 300), before.read(0, 300)), strict=True))
    wanted = plan(path, Rotation())
    assert (wanted.rows, wanted.dim_in, wanted.dim_out) == (300, 16, 24)
    assert wanted.bytes_needed > 300 * 24 * 4
    seen = []
    state = upgrade(path, Rotation(), batch=64, progress=lambda done, total: seen.append((done, total)))
    assert (state.phase, state.done) == ("swapped", 300)
    assert seen[-1] == (300, 300)
    after = open_gallery(path)
    assert (after.rows, after.dim) == (300, 24)
    for number, vector in zip(after.ids(0, 300).tolist(), after.read(0, 300), strict=True):
        assert vector == pytest.approx(expected[number], abs=2e-3 if "half" in name else 1e-6)
    assert verify(path, Rotation(), sample=50).smallest_cosine > 0.9999
    assert upgrade(path, Rotation()).phase == "swapped"  # again: nothing to do
    rollback(path)
    assert path.read_bytes() == original
    assert status(path) is None
    assert not work_folder(path).exists()


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


@pytest.mark.parametrize("name", ["a.npy", "map.index"])
def test_killed_at_random_moments_no_row_is_lost(tmp_path, name):
    path, log = tmp_path / name, tmp_path / "log"
    MAKERS[name](path)
    before = open_gallery(path)
    expected = Rotation()(None, before.read(0, 300))
    generator, context, killed = random.Random(3), multiprocessing.get_context("fork"), 0
    while (state := status(path)) is None or state.phase != "swapped":
        process = context.Process(target=_slowly, args=(path, log))
        process.start()
        process.join(generator.uniform(0.05, 0.3) if killed < 6 else 60)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.join()
        assert open_gallery(path).rows == 300  # at every moment there is a whole gallery under the name
    assert killed > 0
    after = open_gallery(path)
    assert after.read(0, 300) == pytest.approx(expected, abs=1e-6)
    assert np.array_equal(after.ids(0, 300), before.ids(0, 300))
    converted = [int(line) for line in log.read_text().split()]
    assert len(converted) <= 300 + 4 * killed  # at most the batch under way is done again


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
    assert not list(tmp_path.glob("*.upgrade"))


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
