"""DALI's batches on a GPU live until what reads them is over."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.samples import loader_of, packed, take, unsealed
from tests.data.test_damage import overwrite, spoil
from trainer.data import open_dataset
from trainer.data.dali import _Held


class Images:
    """A batch on a simulated GPU."""

    is_cuda = True


def test_a_batch_lives_until_its_event_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []

    class Event:
        over = False

        def record(self) -> None:
            events.append(self)

        def query(self) -> bool:
            return self.over

    monkeypatch.setattr(torch.cuda, "Event", Event)
    held, batches = _Held(), []
    for number in range(4):
        images = Images()
        batches.append(weakref.ref(images))
        held.hold(images)  # type: ignore[arg-type]
        del images
        if number == 2:
            events[0].over = True
    gc.collect()
    assert [batch() is not None for batch in batches] == [False, True, True, True]
    held.hold(torch.empty(1))
    assert len(held.kept) == 3


def test_batches_are_held_when_dali_fails_and_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is queued on a GPU still reads the last batches of the pipeline that failed."""
    keepers: list[_Held] = []
    monkeypatch.setattr(_Held, "hold", lambda self, images: keepers.append(self))
    dataset = open_dataset(unsealed(packed(tmp_path)))
    overwrite(dataset, 17, spoil)
    loader = loader_of(dataset, "dali", max_bad_records=1)
    take(loader, 12)
    assert list(loader.bad_records) == [17]
    assert len(keepers) > 8
    assert len({id(one) for one in keepers}) == 1
