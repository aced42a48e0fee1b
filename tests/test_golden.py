"""The golden runs have not moved (see tests/golden.py)."""

import numpy as np
import pytest

from tests.golden import RELATIVE_TOLERANCE, RUNS, make, read


@pytest.mark.parametrize("name", RUNS)
def test_losses_have_not_moved(name: str) -> None:
    np.testing.assert_allclose(make(name), read(name), rtol=RELATIVE_TOLERANCE)
    assert np.isfinite(read(name)).all()
    assert read(name)[-1] < read(name)[0]
