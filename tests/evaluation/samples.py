"""Constructed embedding spaces for the evaluation's tests."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


def unit(x: npt.NDArray[np.floating]) -> Floats:
    """Rows divided by their norm, float32."""
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def identities(classes: int, images: int, dim: int = 32, noise: float = 1.0, seed: int = 0) -> tuple[Floats, Labels]:
    """Unit embeddings (classes · images, dim) around random centres, shuffled, with labels that are not 0 … C−1."""
    generator = np.random.default_rng(seed)
    centres = unit(generator.normal(size=(classes, dim)))
    labels = np.repeat(np.arange(classes), images)
    x = unit(centres[labels] + noise * generator.normal(size=(len(labels), dim)) / np.sqrt(dim))
    order = generator.permutation(len(labels))
    return x[order], labels[order].astype(np.int64) * 7 + 3
