"""Upgrade of gallery files: same rows, same ids, killed at random moments, rolled back, refused."""

import errno
import importlib
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
from trainer.gallery.open import open_gallery
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


def parquet(path, fixed=-1):
    """A table as a service would write it: person, picture, vector, in two row groups."""
    arrow = pytest.importorskip("pyarrow", reason="needs pyarrow (extra `gallery`)")
    import pyarrow.parquet

    vectors = arrow.array(VECTORS.astype(np.float16 if fixed < 0 else np.float32).tolist())
    vectors = vectors.cast(arrow.list_(arrow.float16() if fixed < 0 else arrow.float32(), fixed))
    table = arrow.table({"id": IDS, "file": [f"{i}.jpg" for i in IDS], "face": vectors, "person": IDS // 7})
    table = table.replace_schema_metadata({"made": "by a test"})
    pyarrow.parquet.write_table(table, path, row_group_size=200, compression="ZSTD")


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
    "named.npz": lambda path: np.savez(path, vectors=VECTORS, ids=IDS, label=IDS // 7, names=IDS.astype(str)),
    "packed.npz": lambda path: np.savez_compressed(path, faces=VECTORS.astype(np.float16)),
    "a.parquet": lambda path: parquet(path),
    "fixed.parquet": lambda path: parquet(path, 16),
    "map1.faiss": lambda path: faiss.write_index(mapped(faiss.IndexHNSWFlat(16, 8), faiss.IndexIDMap), str(path)),
}


HALVES = ("half.npy", "packed.npz", "a.parquet")


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
        assert vector == pytest.approx(expected[number], abs=2e-3 if name in HALVES else 1e-6)
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
            left = [] if action is rollback else ["state.json"]
            assert [p.name for p in tmp_path.glob("*.upgrade/*")] == left
            shutil.rmtree(work_folder(path), ignore_errors=True)
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
    np.save(tmp_path / "empty.npy", VECTORS[:0])
    with pytest.raises(DataError, match="expected float vectors"):
        upgrade(tmp_path / "empty.npy", Rotation())
    shards(tmp_path / "twice")
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
    assert content(work_folder(path)).keys() == {"state.json"}
    upgrade(path, Back())
    assert open_gallery(path).read(slice(0, 300)) == pytest.approx(VECTORS, abs=1e-5)
    rollback(path)
    assert (status(path).phase, status(path).through) == ("finished", ("rotation-1",))


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
        ("distance", "needs the new model"),
        (f"lowest:{tmp_path / 'none.npy'}", "none.npy: no such file"),
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


class Meanwhile(Rotation):
    """Does something once, when the conversion is half done."""

    def __init__(self, action):
        super().__init__()
        self._action, self._calls = action, 0

    def __call__(self, ids, vectors):
        self._calls += 1
        if self._calls == 3:
            self._action()
        return super().__call__(ids, vectors)


def _append(path):
    np.save(path.with_suffix(".partial.npy"), np.concatenate([VECTORS, VECTORS[:50]]))
    path.with_suffix(".partial.npy").rename(path)


def _write(path):
    array = np.load(path, mmap_mode="r+")
    array[10:20] = array[20:30]
    array.flush()


CHANGES = {
    "replaced by a longer one": _append,
    "replaced by one as long": lambda path: np.save(path, VECTORS[::-1]),
    "written in place": _write,
    "cut short": lambda path: os.truncate(path, 1000),
    "removed": lambda path: path.unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("order", ["stored", "random"])
def test_a_gallery_that_changes_while_its_upgrade_runs_is_not_swapped(tmp_path, change, order):
    path = tmp_path / "a.npy"
    MAKERS["a.npy"](path)
    with pytest.raises(DataError, match=r"cut short|was written to, replaced or removed"):
        upgrade(path, Meanwhile(lambda: CHANGES[change](path)), batch=50, order=order_rows(order, path))
    if change in ("cut short", "removed"):
        return
    now = path.read_bytes()
    with pytest.raises(DataError, match="changed since its upgrade began; roll back"):
        upgrade(path, Rotation())
    rollback(path)
    assert path.read_bytes() == now
    assert upgrade(path, Rotation()).rows == (350 if "longer" in change else 300)


@pytest.mark.parametrize("name", ["map.index", "shards", "named.npz"])
def test_a_gallery_of_another_kind_that_changes_meanwhile_is_not_swapped(tmp_path, name):
    path = tmp_path / name
    MAKERS[name](path)
    part = path / "part-1.safetensors" if path.is_dir() else path
    with pytest.raises(DataError, match="was written to, replaced or removed"):
        upgrade(path, Meanwhile(lambda: part.write_bytes(part.read_bytes() + b" ")), batch=50)
    assert (status(path).phase, _before_names(path)) == ("converting", [])


def _before_names(path):
    return [found.name for found in work_folder(path).glob("before*")]


@pytest.mark.parametrize("name", ["a.npy", "shards"])
def test_what_is_written_at_the_very_swap_is_kept(tmp_path, name, monkeypatch):
    path, rename = tmp_path / name, pathlib.Path.rename
    MAKERS[name](path)
    part = path / "part-1.safetensors" if path.is_dir() else path
    with part.open("r+b") as writer:  # a process that has it open

        def late(self, target):
            if self.name.startswith("new"):
                writer.seek(0, 2)
                writer.write(b"late")
                writer.flush()
            return rename(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(pathlib.Path, "rename", late)
            with pytest.raises(DataError, match="was written to, replaced or removed"):
                upgrade(path, Rotation())
    assert part.read_bytes().endswith(b"late")  # the old gallery has its name again
    assert _before_names(path) == []


def test_what_is_written_to_the_old_file_after_the_swap_is_not_dropped(tmp_path):
    path = tmp_path / "a.npy"
    MAKERS["a.npy"](path)
    old = np.load(path, mmap_mode="r+")
    upgrade(path, Rotation())
    old[5] = old[6]
    old.flush()
    with pytest.raises(DataError, match=r"before\.npy: was written to after the swap"):
        finish(path)


def test_what_is_enrolled_after_the_swap_is_kept_by_a_rollback(tmp_path):
    path = tmp_path / "a.npy"
    MAKERS["a.npy"](path)
    upgrade(path, Rotation())
    enrolled = np.concatenate([np.load(path), np.eye(2, 24, dtype=np.float32)])
    np.save(path, enrolled)
    check = verify(path, Rotation())
    assert (check.rows_before, check.rows_now, check.missing) == (300, 302, 0)
    assert check.smallest_cosine > 0.9999
    assert np.array_equal(np.load(rollback(path)), enrolled)
    assert open_gallery(path).rows == 300


def test_verify_counts_rows_that_are_gone(tmp_path):
    path = tmp_path / "map.index"
    MAKERS["map.index"](path)
    upgrade(path, Rotation())
    index = faiss.read_index(str(path))
    index.remove_ids(IDS[:30])
    faiss.write_index(index, str(path))
    check = verify(path, Rotation())
    assert (check.rows, check.rows_before, check.rows_now, check.missing) == (270, 300, 270, 30)
    assert check.smallest_cosine > 0.9999  # found by their ids


def test_two_upgrades_of_one_gallery_at_once(tmp_path):
    path, log = tmp_path / "a.npy", tmp_path / "log"
    MAKERS["a.npy"](path)
    first = multiprocessing.get_context("fork").Process(target=_slowly, args=(path, log))
    first.start()
    while not log.exists():
        first.join(0.01)
    for action in (lambda: upgrade(path, Rotation()), lambda: rollback(path), lambda: finish(path)):
        with pytest.raises(DataError, match=rf"a\.npy: in use by .*process {first.pid}"):
            action()
    first.join(60)
    assert (first.exitcode, status(path).phase) == (0, "swapped")
    assert verify(path, Rotation()).smallest_cosine > 0.9999


class Same(Rotation):
    """From 16 dimensions to 16, which the dimension does not tell apart."""

    dim_out = 16

    def __init__(self, version="t12-new", source=None):
        super().__init__(version)
        self.matrix, self.source = np.eye(16, dtype=np.float32)[::-1], source


@pytest.mark.parametrize("name", ["a.npy", "a.safetensors", "shards", "named.npz", "a.parquet", "map.index"])
def test_a_finished_upgrade_is_not_done_again(tmp_path, name):
    path = tmp_path / name
    MAKERS[name](path)
    upgrade(path, Same())
    finish(path)
    before = content(path)
    with pytest.raises(DataError, match="was converted to t12-new already, and converting it again would spoil it"):
        upgrade(path, Same())
    with pytest.raises(DataError, match="was converted to t12-new already"):
        plan(path, Same())
    with pytest.raises(DataError, match="are in the space of t12-new, and t12-third converts those of model other"):
        upgrade(path, Same("t12-third", "other"))
    assert content(path) == before
    if name not in ("a.npy", "map.index"):  # a copy says so itself
        shutil.rmtree(work_folder(path))
        with pytest.raises(DataError, match="was converted to t12-new already"):
            upgrade(path, Same())
    images = Same("images-new")
    images.by_id = True
    upgrade(path, images)  # whatever is stored
    finish(path)
    assert upgrade(path, Same("t12-third", "new")).applied[-2:] == ("t12-new", "images-new")


def test_a_gallery_that_was_replaced_by_an_old_one_is_upgraded_again(tmp_path):
    path = tmp_path / "a.npy"
    for _ in range(2):
        MAKERS["a.npy"](path)
        upgrade(path, Rotation())
        finish(path)
    assert open_gallery(path).dim == 24


def several():
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(16))
    index.add_with_ids(VECTORS, np.arange(300) // 3)
    return index


def made(text, metric=faiss.METRIC_INNER_PRODUCT):
    index = faiss.index_factory(16, text, metric)
    index.train(VECTORS)
    index.add_with_ids(VECTORS, IDS) if text.startswith("IDMap") else index.add(VECTORS)
    return index


@pytest.mark.parametrize(
    "text",
    [
        *(
            "L2norm,Flat",
            "IDMap2,L2norm,Flat",
            "IVF8,PQ8x4,RFlat",
            "NSG16,Flat",
            "SQfp16",
            "IVF16_HNSW8,Flat",
            "people",
        ),
        *("IVF8,SQfp16", "HNSW8,SQfp16", "IVF16_HNSW8,SQfp16"),
    ],
)
def test_more_indexes_that_hold_whole_vectors(tmp_path, text):
    path, old = tmp_path / "a.index", several() if text == "people" else made(text)
    faiss.write_index(old, str(path))
    ids = open_gallery(path).ids(slice(0, 300))
    upgrade(path, Rotation())
    gallery, new = open_gallery(path), faiss.read_index(str(path))
    assert type(faiss.downcast_index(new)) is type(faiss.downcast_index(faiss.read_index(str(_before(path)))))
    assert np.array_equal(gallery.ids(slice(0, 300)), ids)
    assert gallery.read(slice(0, 300)) == pytest.approx(Rotation()(None, VECTORS), abs=2e-3)
    check = verify(path, Rotation())
    assert check.smallest_cosine > 0.9999
    assert check.recall > check.recall_before - 0.1
    if text.startswith("IDMap"):
        assert new.search(Rotation()(None, VECTORS[:5]) * 7, 1)[0] == pytest.approx(1, abs=1e-5)  # normalised in front
    if "IVF16_HNSW8" in text:
        coarse = faiss.downcast_index(faiss.downcast_index(new).quantizer)
        assert (type(coarse).__name__, coarse.hnsw.nb_neighbors(1)) == ("IndexHNSWFlat", 8)


def _before(path):
    return work_folder(path) / f"before{path.suffix}"


@pytest.mark.parametrize("kind", [faiss.DirectMap.Array, faiss.DirectMap.Hashtable])
def test_an_index_with_a_direct_map_still_gives_vectors_by_id(tmp_path, kind):
    index = ivf(None if kind == faiss.DirectMap.Array else IDS)
    index.set_direct_map_type(kind)
    path, number = tmp_path / "a.index", 17 if kind == faiss.DirectMap.Array else int(IDS[17])
    faiss.write_index(index, str(path))
    upgrade(path, Rotation())
    found = faiss.read_index(str(path)).reconstruct(number)
    assert found == pytest.approx(Rotation()(None, VECTORS[17:18])[0], abs=1e-6)


def test_an_index_with_fewer_vectors_than_lists(tmp_path):
    path = tmp_path / "a.index"
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(16), 16, 64, faiss.METRIC_INNER_PRODUCT)
    index.train(VECTORS)
    index.add_with_ids(VECTORS, IDS)
    index.remove_ids(IDS[40:])
    index.nprobe = 8
    faiss.write_index(index, str(path))
    assert plan(path, Rotation()).not_kept == ["its 64 lists become 40: there are no more vectors to train them on"]
    upgrade(path, Rotation())
    new = faiss.downcast_index(faiss.read_index(str(path)))
    assert (new.nlist, new.nprobe, new.ntotal) == (40, 8, 40)
    assert verify(path, Rotation()).smallest_cosine > 0.9999


def test_indexes_that_cannot_be_rebuilt_say_why_before_a_row_is_converted(tmp_path):
    path = tmp_path / "a.index"
    once = faiss.IndexIVFFlatDedup(faiss.IndexFlatIP(16), 16, 8, faiss.METRIC_INNER_PRODUCT)
    once.train(VECTORS)
    once.add_with_ids(np.concatenate([VECTORS[:100], VECTORS[:9]]), np.arange(109))
    for index, message in (
        (made("PCA8,Flat"), "a PCAMatrix changes the vectors before they are stored"),
        (made("PQ16x4,RFlat"), "its base PQ16x4 cannot be built for dimension 24"),
        (made("IVF8,SQ8"), "IndexIVFScalarQuantizer keeps compressed codes"),
        (once, "keeps equal vectors once and hides whose they are"),
    ):
        faiss.write_index(index, str(path))
        with pytest.raises(DataError, match=message):
            upgrade(path, Rotation())
        assert not work_folder(path).exists()
    small = faiss.IndexNSGFlat(16, 8)
    small.add(VECTORS)
    faiss.write_index(small, str(path))
    gallery = open_gallery(path)
    gallery.rows = 60
    with pytest.raises(DataError, match="builds no NSG graph of fewer than 101 vectors"):
        gallery.changes(24)


def test_images_need_an_id_of_their_own_for_every_vector(tmp_path):
    path, images = tmp_path / "a.index", Rotation("images-new")
    images.by_id = True
    faiss.write_index(several(), str(path))
    with pytest.raises(DataError, match="3 vectors have the id 0, so that it names no picture"):
        upgrade(path, images)


def test_files_of_other_kinds_are_refused_with_what_is_taken(tmp_path):
    import pickle

    arrow = pytest.importorskip("pyarrow", reason="needs pyarrow (extra `gallery`)")
    import pyarrow.parquet

    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"p1": VECTORS[0]}))
    (tmp_path / "unnamed").write_bytes(pickle.dumps({"p1": VECTORS[0]}))
    np.savez(tmp_path / "two.npz", a=VECTORS, b=VECTORS)
    np.savez(tmp_path / "objects.npz", a=np.array([{}], object))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "two.npz").read_bytes()[:-100])
    uneven = arrow.table({"face": [[1.0, 2.0], [1.0]]})
    pyarrow.parquet.write_table(uneven, tmp_path / "uneven.parquet")
    pyarrow.parquet.write_table(arrow.table({"face": [[1.0], None]}), tmp_path / "null.parquet")
    pyarrow.parquet.write_table(arrow.table({"n": [1]}), tmp_path / "none.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "none.parquet").read_bytes()[:-9])
    (tmp_path / "a.csv").write_text("1,2")
    for name, message in (
        ("a.pkl", r"a \.pkl file is not taken \(nothing is unpickled\); taken are \.npy, \.npz"),
        ("unnamed", "a pickled file is not taken"),
        ("a.csv", r"a \.csv file is not taken"),
        ("two.npz", "expected one float matrix"),
        ("objects.npz", "is no .npz of plain arrays"),
        ("cut.npz", "is cut short or damaged"),
        ("uneven.parquet", "the lists of face have 1 to 2 numbers"),
        ("null.parquet", "a row of face has no vector"),
        ("none.parquet", "expected one column of float lists"),
        ("cut.parquet", "is cut short or damaged"),
    ):
        with pytest.raises(DataError, match=message):
            open_gallery(tmp_path / name)


def test_parquet_and_npz_keep_what_else_is_in_them(tmp_path):
    pytest.importorskip("pyarrow", reason="needs pyarrow (extra `gallery`)")
    import pyarrow.parquet

    for name in ("a.parquet", "fixed.parquet"):
        path = tmp_path / name
        MAKERS[name](path)
        old = pyarrow.parquet.read_table(path)
        upgrade(path, Rotation())
        new = pyarrow.parquet.read_table(path)
        assert new.schema.names == old.schema.names
        assert new.drop(["face"]).equals(old.drop(["face"]))
        assert new.schema.field("face").type.value_type == old.schema.field("face").type.value_type
        assert new.schema.metadata == {b"made": b"by a test", b"lce_converted": b"rotation-1"}
    MAKERS["named.npz"](tmp_path / "named.npz")
    upgrade(tmp_path / "named.npz", Rotation())
    with np.load(tmp_path / "named.npz") as file:
        assert set(file.files) == {"vectors", "ids", "label", "names"}
        assert np.array_equal(file["names"], IDS.astype(str))


def test_a_new_gallery_that_is_damaged_or_gone_does_not_keep_the_old_one_from_coming_back(tmp_path):
    for spoil in (lambda path: os.truncate(path, 500), lambda path: path.unlink()):
        path = tmp_path / "a.npy"
        MAKERS["a.npy"](path)
        original = path.read_bytes()
        upgrade(path, Rotation())
        spoil(path)
        with pytest.raises(DataError, match=r"is cut short|no such gallery file"):
            verify(path, Rotation())
        rollback(path)
        assert path.read_bytes() == original
    upgrade(path, Rotation())
    (work_folder(path) / "state.json").write_text("[1]")
    with pytest.raises(DataError, match="damaged"):
        status(path)


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.safetensors", "a.parquet", "a.index"])
def test_galleries_that_are_cut_short_or_elsewhere_say_so(tmp_path, name):
    vectors, path = np.random.default_rng(0).normal(size=(100, 16)).astype(np.float32), tmp_path / name
    if name == "a.npz":
        np.savez(path, vectors=vectors)
    elif name == "a.npy":
        np.save(path, vectors)
    elif name == "a.safetensors":
        save_file({"vectors": vectors}, path)
    elif name == "a.parquet":
        arrow = pytest.importorskip("pyarrow", reason="needs pyarrow (extra `gallery`)")
        importlib.import_module("pyarrow.parquet").write_table(arrow.table({"v": list(vectors)}), path)
    else:
        index = faiss.IndexFlat(16)
        index.add(vectors)
        faiss.write_index(index, str(path))
    whole = path.read_bytes()
    assert open_gallery(path).rows == 100
    for kept in (len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(DataError, match=f"{name}: is cut short") as caught:
            open_gallery(path)
        assert "Error" not in str(caught.value)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n")
    with pytest.raises(DataError, match=f"{name}: is a Git LFS pointer"):
        open_gallery(path)
