"""Splits by group of images (cameras, typefaces): which groups the old model gets, and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from tests.data.samples import packed
from tools import cli
from trainer.data import open_dataset
from trainer.data.splitting import SplitOptions, split
from trainer.errors import DataError


@pytest.mark.parametrize("kind", ["extended-group", "open-group"])
@pytest.mark.parametrize(("share", "old_groups"), [(0.01, 1), (0.5, 2), (1.0, 3)])
def test_the_old_model_gets_whole_groups(tmp_path: Path, kind: str, share: float, old_groups: int) -> None:
    dataset = open_dataset(packed(tmp_path))
    groups = np.arange(len(dataset)) % 4
    groups[dataset.labels == 2] = 3  # a class that only one group shows
    tables = split(dataset, SplitOptions(kind, share), groups)  # type: ignore[arg-type]
    old, new = (tables[name].labels >= 0 for name in ("old", "new"))
    assert len(np.unique(groups[old])) == old_groups
    assert (np.isin(groups, groups[old]) == old).all()
    assert (new == (np.ones(len(new), bool) if kind.startswith("extended") else ~old)).all()
    for table in tables.values():
        used = table.labels >= 0
        assert (table.classes[table.labels[used]] == dataset.labels[used]).all()
        assert np.unique(table.labels[used]).tolist() == list(range(len(table.classes)))


def test_groups_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = packed(tmp_path)
    dataset = open_dataset(folder)
    for groups, message in (
        (None, "none are given"),
        (np.zeros(3, np.int64), r"found the shape \(3,\)"),
        (np.zeros(len(dataset), np.int64), "all records are in one"),
    ):
        with pytest.raises(DataError, match=message):
            split(dataset, SplitOptions("open-group"), groups)
    np.save(tmp_path / "real.npy", np.zeros(len(dataset)))
    np.save(tmp_path / "groups.npy", np.arange(len(dataset), dtype=np.int32) % 3)
    words = ["split", str(folder), str(tmp_path / "out"), "--kind", "open-group", "--groups"]
    assert cli.main([*words, str(tmp_path / "real.npy")]) == cli.EXIT_USAGE
    assert "expected a whole number per record" in capsys.readouterr().err
    (tmp_path / "empty.npy").touch()
    np.savez(tmp_path / "x.npz", np.zeros(len(dataset), np.int64))
    for name in ("missing.npy", "empty.npy", "x.npz"):
        assert cli.main([*words, str(tmp_path / name)]) == cli.EXIT_USAGE
    with pytest.raises(SystemExit, match="2"):
        cli.main(["split", str(folder), str(tmp_path / "out"), "--seed", "-1"])
    assert not (tmp_path / "out").exists()
    assert cli.main([*words, str(tmp_path / "groups.npy")]) == 0
    assert (tmp_path / "out" / "old.npy").is_file()
