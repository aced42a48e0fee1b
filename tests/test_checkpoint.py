"""Checkpoints: whole or not there; damage is named; failed saves do no harm; nothing is unpickled freely."""

import json
import pickle
import random
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from tests.attack import tallied
from tests.ranks import run_ranks
from trainer.checkpoint import Checkpoints, load_tensors, read_index
from trainer.checkpoint_folder import CheckpointConfig, find_damage, list_checkpoints, read_seal
from trainer.distributed import Ranks, as_sharded, class_mesh
from trainer.errors import CheckpointError
from trainer.head.partition import class_range


def _state(value: float) -> dict[str, Tensor]:
    return {"a": torch.full((5, 3), value), "b": torch.tensor(int(value))}


def _written(folder: Path, *steps: int, **settings: Any) -> tuple[Checkpoints, list[str]]:
    said: list[str] = []
    checkpoints = Checkpoints(folder, CheckpointConfig(keep=3, **settings), Ranks(), said.append)
    for step in steps:
        checkpoints.save(_state(step), {"step": step})
    return checkpoints, said


def test_folders_of_other_names_are_a_users_own(tmp_path: Path) -> None:
    checkpoints, _ = _written(tmp_path, 3, 7, keep_every=2)
    for name in ("step-best", "step-00000003.bak", "step-"):
        shutil.copytree(tmp_path / "step-00000003", tmp_path / name)
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.step == 7
    for step in (8, 9, 10, 123456789):
        checkpoints.save(_state(step), {"step": step})
    assert [p.name for p in list_checkpoints(tmp_path)] == [f"step-{s:08d}" for s in (8, 9, 10, 123456789)]
    assert (tmp_path / "step-best").is_dir()


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    checkpoints, _ = _written(tmp_path, 3, 7)
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.step == 7
    state = _state(0)
    load_tensors(newest, state)
    assert all(torch.equal(state[k], v) for k, v in _state(7).items())
    assert find_damage(newest.folder, newest.seal["files"]) is None
    assert not list(tmp_path.glob(".*"))


class OnGpu(Tensor):
    """A tensor that claims to be on a GPU."""

    is_cuda = True


@pytest.mark.filterwarnings("ignore:Ignoring pin_memory")
def test_tensors_on_a_gpu_are_copied_to_memory_that_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    checkpoints, _ = _written(tmp_path)
    assert checkpoints._pinned_memory(_state(1)) is None
    state = _state(1)
    stager = checkpoints._pinned_memory({"a": state["a"].as_subclass(OnGpu)})
    assert stager is not None
    assert stager._config.use_pinned_memory
    assert stager is checkpoints._pinned_memory(state)
    staged = stager.stage(state)
    assert isinstance(staged, dict)
    first = staged["a"].clone()
    state["a"] += 1
    again = stager.stage(state)
    assert isinstance(again, dict)
    assert again["a"].data_ptr() == staged["a"].data_ptr() != state["a"].data_ptr()
    assert torch.equal(again["a"], first + 1)


def test_retention(tmp_path: Path) -> None:
    _written(tmp_path, *range(1, 9), keep_every=3)
    assert [p.name[-1] for p in list_checkpoints(tmp_path)] == ["3", "6", "7", "8"]


def _cut(folder: Path) -> None:
    file = next(folder.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])


def _flip(folder: Path) -> None:
    file = next(folder.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _unseal(folder: Path) -> None:
    (folder / "state.json").unlink()


def _garble_seal(folder: Path) -> None:
    (folder / "state.json").write_text('{"format": 1, "step"')


def _newer_format(folder: Path) -> None:
    seal = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(seal | {"format": 99}))


def _lose(folder: Path) -> None:
    next(folder.glob("*.distcp")).unlink()


@pytest.mark.parametrize("harm", [_cut, _flip, _unseal, _garble_seal, _newer_format, _lose])
def test_damage_is_named_and_the_one_before_is_used(tmp_path: Path, harm: Any) -> None:
    checkpoints, said = _written(tmp_path, 3, 7)
    harm(tmp_path / "step-00000007")
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.step == 3
    assert len(said) == 1
    assert "step-00000007" in said[0]
    with pytest.raises(CheckpointError, match="resume=exact"):
        _written(tmp_path, resume="exact")[0].newest()
    harm(tmp_path / "step-00000003")
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints is whole"):
        checkpoints.newest()


def test_cut_and_flipped_at_random(tmp_path: Path) -> None:
    """Forty seeded harms to any byte of any file: never taken for whole, and the one before is used."""
    moments = random.Random(7)
    checkpoints, said = _written(tmp_path, 3, 7)
    newest = tmp_path / "step-00000007"
    files = sorted(p for p in newest.iterdir() if p.name != "state.json")
    for _ in range(40):
        file = moments.choice(files)
        whole = file.read_bytes()
        at = moments.randrange(len(whole))
        cut = moments.random() < 0.5
        file.write_bytes(
            whole[:at] if cut else whole[:at] + bytes([whole[at] ^ 1 << moments.randrange(8)]) + whole[at + 1 :]
        )
        found = checkpoints.newest()
        assert found is not None
        assert found.step == 3, (file, at, cut)
        file.write_bytes(whole)
    assert len(said) == 40
    found = checkpoints.newest()
    assert found is not None
    assert found.step == 7


def _fill_at_random(ranks: Ranks, folder: Path, times: int) -> list[tuple[int, str]]:
    """Saves of which every second one meets a disk that is full after so many bytes, on a rank of its own choice."""
    moments, said = random.Random(11), list[str]()
    checkpoints = Checkpoints(folder, CheckpointConfig(keep=2), ranks, said.append)
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)
    found = []
    for step in range(1, 2 * times, 2):
        checkpoints.save(_sharded(ranks, step), {"step": step})
        checkpoints.settle()
        bytes_left, where = moments.randrange(1, 2500), moments.randrange(ranks.world_size)
        if ranks.rank == where:
            resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, whole[1]))
        try:
            checkpoints.save(_sharded(ranks, step + 1), {"step": step + 1})
            checkpoints.settle()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, whole)
        newest = checkpoints.newest()
        assert newest is not None
        state = _sharded(ranks, -1.0)
        load_tensors(newest, state)
        assert state["same"].tolist() == [newest.step] * 4
        found.append((newest.step - step, said.pop() if said else ""))
    return found


def test_filled_at_random(tmp_path: Path) -> None:
    """Twenty-five times, seeded: the last good one survives, a save that went through is whole, the reason is told."""
    found = run_ranks(_fill_at_random, 2, tmp_path, 25)[0]
    assert all((late == 0) == ("File too large" in said) for late, said in found)
    assert sum(late == 0 for late, _ in found) >= 15
    assert not list(tmp_path.glob(".*"))


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert _written(tmp_path)[0].newest() is None


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("unpickled",))


@tallied("hostile files: pickles", "refused")
def test_an_index_that_runs_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _written(tmp_path, 1)
    (tmp_path / "step-00000001/.metadata").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(CheckpointError, match="not the index"):
        read_index(tmp_path / "step-00000001")
    assert "unpickled" not in capsys.readouterr().out


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    newest = _written(tmp_path, 1)[0].newest()
    assert newest is not None
    with pytest.raises(CheckpointError, match=r"a is \(5, 3\), this run needs \(6, 3\)"):
        load_tensors(newest, {"a": torch.zeros(6, 3)})
    with pytest.raises(CheckpointError, match="has no c"):
        load_tensors(newest, {"c": torch.zeros(1)})


class _FullDisk:
    """Makes the writer fail as a full disk does, from now on and as often as told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
        self.left = times
        write = FileSystemWriter.write_data

        def failing(writer: Any, *args: Any) -> Any:
            if self.left > 0:
                self.left -= 1
                raise OSError(28, "No space left on device")
            return write(writer, *args)

        monkeypatch.setattr(FileSystemWriter, "write_data", failing)


def test_a_full_disk_is_survived_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, said = _written(tmp_path, 1)
    disk = _FullDisk(monkeypatch, 1)
    checkpoints.save(_state(2), {"step": 2})
    assert len(said) == 1
    assert "No space left" in said[0]
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    checkpoints.save(_state(3), {"step": 3})  # a success in between starts the count anew
    disk.left = 2
    checkpoints.save(_state(4), {"step": 4})
    with pytest.raises(CheckpointError, match="failed too"):
        checkpoints.save(_state(5), {"step": 5})
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.step == 3


def _sharded(ranks: Ranks, value: float) -> dict[str, Tensor]:
    mine = class_range(7, ranks.rank, ranks.world_size)
    rows = torch.arange(mine.start, mine.stop, dtype=torch.float64)[:, None].repeat(1, 2) + value
    return {"rows": as_sharded(rows, 7, class_mesh(ranks)), "same": torch.full((4,), value)}


def _save_in_background(ranks: Ranks, folder: Path) -> list[str]:
    said: list[str] = []
    checkpoints = Checkpoints(folder, CheckpointConfig(), ranks, said.append)
    state = _sharded(ranks, 0.0)
    checkpoints.save(state, {"step": 1})
    state["same"].fill_(99)  # training goes on while the copy is written
    checkpoints.settle()
    if ranks.rank == 1:
        _FullDisk(pytest.MonkeyPatch(), 1)
    checkpoints.save(_sharded(ranks, 5.0), {"step": 2})
    checkpoints.settle()
    return said


def _load_sharded(ranks: Ranks, folder: Path) -> tuple[int, Tensor, Tensor]:
    newest = Checkpoints(folder, CheckpointConfig(), ranks, print).newest()
    assert newest is not None
    state = _sharded(ranks, -1.0)
    load_tensors(newest, state)
    return newest.step, state["rows"].full_tensor()[:, 0], state["same"]  # type: ignore[attr-defined]


def test_sharded_in_the_background_and_loaded_by_another_number_of_ranks(tmp_path: Path) -> None:
    """Seven rows saved by two ranks, loaded by three; the second save fails on rank 1 alone and on all together."""
    said = run_ranks(_save_in_background, 2, tmp_path)
    assert "rank 1: OSError" in said[0][0]
    assert said[1] == []
    for step, rows, same in run_ranks(_load_sharded, 3, tmp_path):
        assert (step, rows.tolist(), same.tolist()) == (1, list(range(7)), [0.0] * 4)


def test_seal_lists_every_file(tmp_path: Path) -> None:
    _written(tmp_path, 1)
    folder = tmp_path / "step-00000001"
    assert {p.name for p in folder.iterdir()} == {*read_seal(folder)["files"], "state.json"}
