"""Files and folders that take the place of others whole, and what is left when that fails."""

import os
import socket
import zlib
from pathlib import Path

import numpy as np
import pytest

from trainer.errors import DataError
from trainer.files import checksum, replaced, write_array, write_text


def _folder(path: Path, text: str) -> None:
    path.mkdir()
    (path / "content").write_text(text)


def test_a_folder_is_kept_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    _folder(target, "old")
    rename = Path.rename

    def refuse(self: Path, to: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError(5, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with (
        pytest.raises(DataError, match="model: cannot be written: Input/output error"),
        replaced(target, DataError) as partial,
    ):
        _folder(partial, "new")
    assert (target / "content").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    monkeypatch.undo()
    with replaced(target, DataError) as partial:
        _folder(partial, "new")
    assert (target / "content").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_a_kill_between_the_two_renames_left_is_put_back(tmp_path: Path) -> None:
    target, host = tmp_path / "model", socket.gethostname()
    _folder(tmp_path / f".model.{host}-4194305.old", "old")
    with pytest.raises(RuntimeError), replaced(target, DataError):
        raise RuntimeError("before anything was written")
    assert (target / "content").read_text() == "old"
    _folder(tmp_path / f".model.{host}-4194306.old", "older still")
    _folder(tmp_path / f"..model.{host}-4194305.partial.{host}-4194305.partial", "begun within one that was killed")
    _folder(tmp_path / f".model.{host}-{os.getppid()}.partial", "of a process that works on it")
    with replaced(target, DataError) as partial:
        _folder(partial, "new")
    assert (target / "content").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == [f".model.{host}-{os.getppid()}.partial", "model"]


def test_a_file_does_not_replace_a_folder(tmp_path: Path) -> None:
    _folder(tmp_path / "model", "old")
    with pytest.raises(DataError, match="is a folder"), replaced(tmp_path / "model", DataError) as partial:
        partial.write_text("a file")
    assert (tmp_path / "model/content").read_text() == "old"


def test_a_folder_does_not_replace_a_file(tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("of a user")
    with pytest.raises(DataError, match="Not a directory"), replaced(tmp_path / "letter", DataError) as partial:
        _folder(partial, "new")
    assert (tmp_path / "letter").read_text() == "of a user"
    assert [p.name for p in tmp_path.iterdir()] == ["letter"]


def test_a_text_and_an_array_appear_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a.txt", "né \udcff")
    assert (tmp_path / "a.txt").read_bytes() == "né ".encode() + b"\xff"
    write_array(tmp_path / "a.npy", np.arange(3))
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 2]

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "a.txt", "new")
    with pytest.raises(OSError, match="No space left"):
        write_array(tmp_path / "a.npy", np.arange(4))
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path, "new")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8", errors="surrogateescape") == "né \udcff"
    assert len(np.load(tmp_path / "a.npy")) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npy", "a.txt"]


def test_a_checksum_is_of_the_whole_file(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes((1 << 22) + 5)  # more than one block
    (tmp_path / "data").write_bytes(data)
    assert checksum(tmp_path / "data") == (len(data), zlib.crc32(data))
