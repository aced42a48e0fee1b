"""Names stay inside their folder, nothing is written next to foreign files, and a cache is believed when it is ours."""

import multiprocessing as mp
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.attack import tallied
from tests.data.samples import mxnet_copy, packed
from tests.runs import config
from tools.cli import main
from trainer.data import store
from trainer.data.index import open_dataset
from trainer.errors import DataError
from trainer.files import cache_folder, is_own
from trainer.run.startup import check


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """What a folder holds, with sizes and times."""
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("key", ["rec", "labels", "class_names", "label_map"])
@tallied("hostile files: names outside the folder", "refused")
def test_a_description_names_nothing_outside_its_folder(
    tmp_path: Path, key: str, absolute: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """F3: merely checking it overwrote the tables next to any .rec that the user can write."""
    data = packed(tmp_path, 2, 3)
    victim, evil = tmp_path / "victim", tmp_path / "evil"
    for folder in (victim, evil):
        folder.mkdir()
        shutil.copy(data / "train.rec", folder)
    (victim / "train.labels.npy").write_text("precious")
    (victim / "train.offsets.npy").write_text("precious")
    before = listing(victim)
    names = {"rec": "train.rec", "labels": "train.labels.npy", "class_names": "train.rec", "label_map": "train.rec"}
    outside = str(victim / names[key]) if absolute else f"../victim/{names[key]}"
    part = {"rec": "rec", "label_map": "label_map"}.get(key)
    rest = "" if part else f"{key}: {outside}\n"
    inner = f"rec: {outside}" if key == "rec" else f"rec: train.rec{f', label_map: {outside}' if part else ''}"
    (evil / "dataset.yaml").write_text(f"format: lce-dataset-1\nimage_size: [32, 32]\nparts: [{{{inner}}}]\n{rest}")
    with pytest.raises(DataError, match="which is outside its folder; if you trust it, allow it: data"):
        open_dataset(evil)
    assert listing(victim) == before
    if key == "rec":
        assert main(["check", str(evil)]) == 2
        assert "in a training configuration, --allow-outside elsewhere" in capsys.readouterr().err
        assert main(["check", str(evil), "--allow-outside"]) == 0
        changes = {"data__loader": "torch", "data__path": str(evil), "data__workers": 0, "backbone__name": "small"}
        with pytest.raises(DataError, match=r"data\.allow_outside=true"):
            check(config(tmp_path / "run", **changes), 1)
        assert check(config(tmp_path / "run", **changes, data__allow_outside=True), 1).num_classes == 2
        with pytest.raises(DataError, match="outside its folder"):  # allowed once, it is not for good
            open_dataset(evil)
        assert listing(victim) == before


@tallied("hostile files: names outside the folder", "refused")
def test_a_table_names_no_classes_outside_its_folder(tmp_path: Path) -> None:
    data = packed(tmp_path, 2, 3)
    np.save(tmp_path / "t.npy", np.array(open_dataset(data).labels))
    (tmp_path / "t.yaml").write_text("num_classes: 2\nrecords: 6\nclasses: ../x.npy\n")
    with pytest.raises(DataError, match="outside the table's folder"):
        open_dataset(data, tmp_path / "t.npy")


def _open(folder: Path, out: "mp.Queue[int]") -> None:
    found = 0
    find = store.find_images

    def counted(rec: Path) -> store.Found:
        nonlocal found
        found += 1
        return find(rec)

    store.find_images = counted
    assert len(open_dataset(folder)) == 60
    out.put(found)


def test_an_index_of_foreign_files_is_built_once_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = mxnet_copy("plain", tmp_path)
    before = listing(folder)
    context = mp.get_context("fork")
    out: mp.Queue[int] = context.Queue()
    processes = [context.Process(target=_open, args=(folder, out)) for _ in range(4)]
    for process in processes:
        process.start()
    assert sum(out.get(timeout=60) for _ in processes) == 1
    for process in processes:
        process.join()
    assert listing(folder) == before
    shutil.rmtree(folder)
    other = mxnet_copy("insightface", tmp_path)
    open_dataset(other)  # what is kept of the lost one is removed
    assert len(list((tmp_path / "cache/lce-trainer/indexes").glob("*.json"))) == 1


@tallied("hostile files: planted in a cache", "handled")
def test_a_planted_index_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = mxnet_copy("plain", tmp_path)
    open_dataset(folder)
    (labels,) = (tmp_path / "cache/lce-trainer/indexes").glob("*.labels.npy")
    labels.chmod(0o666)
    searched: list[Path] = []
    find = store.find_images
    monkeypatch.setattr(store, "find_images", lambda rec: searched.append(rec) or find(rec))
    open_dataset(folder)
    assert searched


@tallied("hostile files: planted in a cache", "handled")
def test_a_cache_that_others_can_write_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F4: a library planted in a world-writable cache ran in our process."""
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(temporary))
    home.mkdir()
    temporary.mkdir()
    assert cache_folder("x") == home / "lce-trainer/x"
    assert (home / "lce-trainer").stat().st_mode & 0o777 == 0o700
    home.chmod(0o777)
    assert cache_folder("x") == temporary / f"lce-trainer-{os.geteuid()}/x"
    home.chmod(0o1777)  # sticky: others cannot exchange what is in it
    assert cache_folder("x") == home / "lce-trainer/x"
    home.chmod(0o755)
    (home / "lce-trainer").chmod(0o777)
    assert cache_folder("x") == home / "lce-trainer/x"  # ours: closed again
    assert (home / "lce-trainer").stat().st_mode & 0o022 == 0
    if os.geteuid() == 0:
        os.chown(home / "lce-trainer", 65534, 65534)
        assert cache_folder("x") == temporary / f"lce-trainer-{os.geteuid()}/x"
    shutil.rmtree(home / "lce-trainer")
    (home / "lce-trainer").symlink_to(tmp_path)
    assert cache_folder("x") == temporary / f"lce-trainer-{os.geteuid()}/x"
    temporary.chmod(0o777)
    assert cache_folder("x").parent.name.startswith("lce-trainer-")
    assert is_own(Path(shutil.copy(__file__, cache_folder()))) is True


@tallied("hostile files: planted in a cache", "handled")
def test_a_planted_library_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.head import native

    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler (g++)")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("subprocess.run", _no_compiler(tmp_path))
    own = cache_folder()
    with pytest.raises(ZeroDivisionError):  # there is none: it would be built
        native._built()
    name = next(iter(_names))
    (own / name).write_bytes(b"planted")
    (own / name).chmod(0o777)
    with pytest.raises(ZeroDivisionError):  # there is one that anybody may have written
        native._built()
    (own / name).chmod(0o700)
    assert native._built() == own / name


_names: set[str] = set()


def _no_compiler(folder: Path):  # type: ignore[no-untyped-def]
    class Version:
        stdout = "1"

    def run(words: list[str], **options: object) -> Version:
        if "--version" in words:
            return Version()
        _names.add(Path(words[-1]).name)
        raise ZeroDivisionError

    return run
