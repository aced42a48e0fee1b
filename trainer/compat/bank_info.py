"""What a centre bank looks like, in figures."""

from typing import Any

import numpy as np

from trainer.compat.boundary import UNRESTRAINED
from trainer.compat.center_bank import CenterBank


def summarise(bank: CenterBank) -> dict[str, Any]:
    """Counts and the spread of the boundaries (None when no class has one); reads the per-class values only."""
    values = bank.per_class()
    mask, boundaries, counts = (values[name].numpy() for name in ("mask", "boundaries", "counts"))
    known = boundaries[mask & (boundaries > UNRESTRAINED)]
    spread = None
    if len(known):
        spread = {
            name: float(v) for name, v in zip(("min", "median", "max"), np.quantile(known, [0, 0.5, 1]), strict=True)
        }
    return {
        "classes": bank.num_classes,
        "dim": bank.dim,
        "storage": bank.storage,
        "largest_error": bank.largest_error,
        "masked": int((~mask).sum()),
        "single_image": int((counts == 1).sum()),
        "images": int(counts.sum()),
        "unrestrained": int((mask & (boundaries <= UNRESTRAINED)).sum()),
        "boundary": spread,
        "made": bank.info.model_dump(),
    }
