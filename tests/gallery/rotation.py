"""A converter for the tests: an isometry from 16 to 24 dimensions, as slow as asked."""

import time

import numpy as np


class Rotation:
    """Old vectors times a fixed matrix with orthonormal rows; ids that it saw are appended to ``log``, a line each."""

    dim_in, dim_out = 16, 24
    source, by_id = None, False

    def __init__(self, version="rotation-1", seconds=0.0, log=None):
        self.version, self._seconds, self._log = version, seconds, log
        self.matrix = np.linalg.qr(np.random.default_rng(7).normal(size=(24, 16)))[0].T.astype(np.float32)

    def __call__(self, ids, vectors):
        if self._log is not None:
            with open(self._log, "a") as file:  # noqa: PTH123
                file.write("".join(f"{i}\n" for i in ids))
        time.sleep(self._seconds)
        new = np.asarray(vectors, np.float32) @ self.matrix
        return new / np.linalg.norm(new, axis=1, keepdims=True)


class Cut(Rotation):
    """Interrupted at its third batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._calls = 0

    def __call__(self, ids, vectors):
        self._calls += 1
        if self._calls == 3:
            raise KeyboardInterrupt
        return super().__call__(ids, vectors)
