"""Array types of the evaluation, and the check that every entry point makes of its embeddings and labels."""

import numpy as np
import numpy.typing as npt

from trainer.errors import DataError, ModelError

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


def check_unit(embeddings: FloatArray, what: str) -> None:
    """Raise :class:`ModelError`, naming ``what``, unless the embeddings (n, D) are finite unit vectors."""
    if embeddings.ndim != 2:
        raise ModelError(f"{what}: expected embeddings of shape (n, D), found {embeddings.shape}")
    norms = np.linalg.norm(embeddings, axis=1)
    bad = np.flatnonzero(~np.isfinite(norms))
    if len(bad):
        raise ModelError(f"{what}: {len(bad)} of {len(norms)} embeddings are not finite, the first is image {bad[0]}")
    bad = np.flatnonzero(np.abs(norms - 1) > 1e-3)
    if len(bad):
        raise ModelError(f"{what}: embedding {bad[0]} has norm {norms[bad[0]]:.4g}, not 1; divide each one by its norm")


def class_index(labels: IntArray, what: str) -> IntArray:
    """Labels (n,) → class numbers 0 … C−1 (n,). Raises :class:`DataError` where there are no pairs to compare."""
    if len(labels) == 0:
        raise DataError(f"{what}: no images; an evaluation needs at least two identities")
    names, index, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    if len(names) < 2:
        raise DataError(f"{what}: all {len(labels)} images are of one identity; without another there are no impostors")
    if sizes.max() < 2:
        raise DataError(f"{what}: each of the {len(names)} identities has a single image; there are no genuine pairs")
    return index.astype(np.int64)
