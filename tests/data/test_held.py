"""DALI's batches on a GPU live until what reads them is over."""

import gc
import weakref
from typing import Any

import pytest
import torch

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
