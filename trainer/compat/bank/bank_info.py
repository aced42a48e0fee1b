"""What a centre bank looks like: counts, the spread of its boundaries, and centres so near that they may be one
identity."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from trainer.compat.bank.boundary import UNRESTRAINED
from trainer.compat.bank.center_bank import CenterBank
from trainer.compat.bank.convert import Progress

EXACT_CLASSES = 20_000
SAMPLE_PRODUCTS = 4e8
BINS = 20
_NEVER = -2.0


def summarise(bank: CenterBank) -> dict[str, Any]:
    """Counts and the spread of the boundaries (None when no class has one); reads the per-class values only."""
    values = bank.per_class()
    mask, boundaries, counts = (values[name].numpy() for name in ("mask", "boundaries", "counts"))
    known = boundaries[mask & (boundaries > UNRESTRAINED)]
    spread = None
    if len(known):
        low, middle, high = np.quantile(known, [0, 0.5, 1])
        spread = {"min": float(low), "median": float(middle), "max": float(high)}
    histogram, edges = np.histogram(known, BINS, (-1, 1))
    return {
        "classes": bank.num_classes,
        "dim": bank.dim,
        "storage": bank.storage,
        "largest_error": bank.largest_error,
        "masked": int((~mask).sum()),
        "single_image": int((counts == 1).sum()),
        "images": int(counts.sum()),
        "unrestrained": int((mask & (boundaries <= UNRESTRAINED)).sum()),
        "meaningless": _meaningless(bank, boundaries, mask, counts),
        "boundary": spread,
        "boundary_histogram": {"edges": edges.round(6).tolist(), "classes": histogram.tolist()},
        "made": bank.info.model_dump(),
    }


def _meaningless(bank: CenterBank, boundaries: np.ndarray, mask: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    """Classes whose boundary says nothing: one image, or so low (≤ 0: beyond 90°) that a wrong image must be among
    them."""
    low = np.flatnonzero(mask & (boundaries > UNRESTRAINED) & (boundaries <= 0))
    single = np.flatnonzero(mask & (counts == 1))
    return {
        "beyond_90_degrees": len(low),
        "single_image": len(single),
        "examples": low[np.argsort(boundaries[low])][:10].tolist(),
    }


def nearest_pairs(
    bank: CenterBank, count: int, progress: Progress | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """The pairs of centres with the largest cosine, nearest first: ``{"classes": [i, j], "cosine"}``.

    All centres are compared with all up to 20,000 classes; beyond that a seeded sample of them is compared with all,
    so that the work stays near 4·10⁸ products of rows. Memory: two blocks of 4,096 rows.
    """
    total, step, best = bank.num_classes, 4096, _Best(count)
    known = bank.per_class()["mask"]
    numbers = torch.arange(total)
    if total > EXACT_CLASSES:
        size = max(1, int(SAMPLE_PRODUCTS / total))
        numbers = torch.from_numpy(np.sort(np.random.default_rng(seed).choice(total, size, replace=False)))
    numbers = numbers[known[numbers]]
    asked = torch.zeros(total, dtype=torch.bool)
    asked[numbers] = True
    queries = torch.cat([bank.rows(int(n), int(n) + 1).centers for n in numbers]) if len(numbers) else None
    for start in range(0, total, step):
        stop = min(start + step, total)
        block = bank.rows(start, stop)
        columns = torch.arange(start, stop)
        for first in range(0, len(numbers), step):
            rows = numbers[first : first + step]
            cosines = cast(Tensor, queries)[first : first + step] @ block.centers.T
            # A pair of two queries is met twice and a query meets itself; only the meeting with the larger number
            # counts.
            cosines[(asked[start:stop] & (columns <= rows[:, None])) | ~block.mask] = _NEVER
            best.add(cosines, rows, start)
        if progress is not None:
            progress(stop, total)
    return best.pairs()


class _Best:
    """The ``count`` largest entries met so far."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._found: list[tuple[float, int, int]] = []

    def add(self, cosines: Tensor, numbers: Tensor, start: int) -> None:
        values, flat_indices = cosines.flatten().topk(min(self._count, cosines.numel()))
        for value, flat_index in zip(values.tolist(), flat_indices.tolist(), strict=True):
            if value > _NEVER:
                row, column = divmod(flat_index, cosines.shape[1])
                self._found.append((value, int(numbers[row]), start + column))
        self._found = sorted(self._found, reverse=True)[: self._count]

    def pairs(self) -> list[dict[str, Any]]:
        return [{"classes": sorted((i, j)), "cosine": round(value, 6)} for value, i, j in self._found]


def _origin(made: dict[str, Any]) -> str:
    """What a bank was made from, with the old model's name where that is known."""
    if made["made_from"] == "model":
        return f"model {made['model']} and the images of {made['source']}"
    return f"{made['made_from']} {made['source']}" + (f" of the model {made['model']}" if made["model"] else "")


def describe(path: Path, figures: dict[str, Any]) -> str:
    """The figures of :func:`summarise` and :func:`nearest_pairs` as text."""
    made, odd = figures["made"], figures["meaningless"]
    lines = [
        f"{path}: {figures['classes']} classes of dimension {figures['dim']}, stored as {figures['storage']}"
        + (f" (largest error {figures['largest_error']:.1e} in 1 − cos)" if figures["largest_error"] else ""),
        f"made from the {_origin(made)}, boundary: {made['boundary']}",
        f"{figures['images']} images; {figures['masked']} classes without a centre, {figures['single_image']} with one "
        f"image, {figures['unrestrained']} without a boundary",
    ]
    if figures["boundary"]:
        histogram = figures["boundary_histogram"]
        most = max(histogram["classes"])
        lines.append("boundaries (cosine):")
        for low, number in zip(histogram["edges"], histogram["classes"], strict=False):
            if number:
                lines.append(f"  {low:+.1f} … {low + 2 / BINS:+.1f}  {number:9d} {'█' * -(-40 * number // most)}")
    if odd["beyond_90_degrees"]:
        shown = ", ".join(map(str, odd.get("names", odd["examples"])))
        lines.append(
            f"{odd['beyond_90_degrees']} boundaries lie beyond 90° (mislabelled images? use `quantile` or `outliers`): "
            f"classes {shown}"
        )
    if figures["nearest_pairs"]:
        lines.append("nearest centres (duplicate identities?):")
        for pair in figures["nearest_pairs"]:
            one, other = pair.get("names", pair["classes"])
            lines.append(f"  {one} – {other}: cosine {pair['cosine']:.4f}")
    return "\n".join(lines)
