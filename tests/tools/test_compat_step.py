"""`lce bench compat-step`: what it reports, on a small file."""

import json
from pathlib import Path

import pytest

from tools.benchmarks import compat_step
from tools.cli import main

SMALL = ["--classes", "40", "--records", "600", "--dim", "8", "--batch", "6", "--steps", "2", "--turns", "1"]


@pytest.mark.parametrize("method", compat_step.METHODS)
def test_every_way_is_measured(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "compat-step", "--method", method, *SMALL, "--out", str(tmp_path), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["bench"], found["method"], found["records"]) == ("compat-step", method, 600)
    for mode in compat_step.MODES:
        one = found[mode]
        assert 0 < one["reading_seconds"] < one["update_seconds"]
        assert one["share"] == pytest.approx(one["reading_seconds"] / one["update_seconds"])
    assert not list(tmp_path.iterdir()), "the file of vectors is removed"


def test_rows_are_asked_for_in_one_way_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.compat.methods.old_embeddings import StoredEmbeddings

    asked, every = list[int](), list[int]()
    monkeypatch.setattr(StoredEmbeddings, "will_need", lambda self, records: asked.append(len(records)))
    read = StoredEmbeddings.read
    monkeypatch.setattr(StoredEmbeddings, "read", lambda self, rows: every.append(len(rows)) or read(self, rows))
    assert main(["bench", "compat-step", *SMALL, "--out", str(tmp_path)]) == 0
    assert len(asked) == 7, "four batches before the first of seven updates, at each of them one more"
    assert every.count(6) == 3 * 7 + 7, "each update's batch, and those of one mode once before"
