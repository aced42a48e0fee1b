"""The golden runs have not moved (see tests/golden.py)."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests import golden


@pytest.mark.parametrize("name", golden.RUNS)
def test_losses_have_not_moved(name: str) -> None:
    np.testing.assert_allclose(golden.make(name), golden.read(name), rtol=golden.tolerance())
    assert np.isfinite(golden.read(name)).all()
    assert golden.read(name)[-1] < golden.read(name)[0]


def test_the_machine_that_made_them_repeats_them_closely(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for made_on, expected in ((golden.machine(), 1e-9), ({"processor": "another", "torch": "1.0"}, 1e-4)):
        (tmp_path / "made-on.json").write_text(json.dumps(made_on))
        monkeypatch.setattr(golden, "MADE_ON", tmp_path / "made-on.json")
        assert golden.tolerance() == expected
