"""The boundary b_j of each class: how far (as a cosine) old embeddings of a class lie from its centre.

The paper takes the smallest cosine. One mislabelled image makes that meaningless, so a low quantile and two outlier
rules are offered: 1.5 interquartile ranges of the angle (as AdvBCT, Pan et al., CVPR 2023, does) and the nearest share
(as MixBCT, Liang et al., 2023, keeps 90 %).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

UNRESTRAINED = -1.0


@dataclass(frozen=True)
class BoundaryRule:
    """How boundaries are taken.

    Attributes:
        quantile: the share of a class's images that may lie outside; 0 is the minimum cosine.
        outliers: which images are left out before that: ``none``; ``iqr``: angles above Q3 + 1.5 (Q3 − Q1);
            ``nearest``: all but the ``nearest_share`` that is nearest to the centre.
        nearest_share: for ``nearest``, in (0, 1].
        single: the boundary of a class with one image, whose cosine with its own centre says nothing. None takes the
            median boundary of the classes with more images (and restrains nothing where there are none).
    """

    quantile: float = 0.0
    outliers: Literal["none", "iqr", "nearest"] = "none"
    nearest_share: float = 0.9
    single: float | None = None

    def __post_init__(self) -> None:
        """Raises :class:`ValueError` for a value out of its range."""
        if not 0 <= self.quantile < 1 or not 0 < self.nearest_share <= 1 or not -1 <= (self.single or 0) <= 1:
            raise ValueError("quantile is in [0, 1), nearest_share in (0, 1], single in [−1, 1]")

    def text(self) -> str:
        """The rule for people."""
        text = "minimum cosine" if self.quantile == 0 else f"{self.quantile:g} quantile of the cosines"
        if self.outliers == "iqr":
            text += ", without angles above Q3 + 1.5 IQR"
        if self.outliers == "nearest":
            text += f", of the nearest {self.nearest_share:.0%}"
        return text

    def of_groups(self, cosines: np.ndarray, groups: np.ndarray, num_groups: int) -> np.ndarray:
        """The boundary of every group: (num_groups,) float32; groups without images get −1, which restrains nothing.

        Args:
            cosines: (n,) of the images with their own centre. groups: (n,) int64 in [0, num_groups), in any order.
        """
        order = np.lexsort((cosines, groups))
        values = np.clip(cosines[order].astype(np.float64), -1, 1)
        counts = np.bincount(groups, minlength=num_groups)
        starts = np.cumsum(counts) - counts
        dropped = self._dropped(values, groups[order], starts, counts)
        result = np.full(num_groups, UNRESTRAINED, np.float32)
        present = counts > 0
        kept_starts, kept = (starts + dropped)[present], (counts - dropped)[present]
        result[present] = _quantile(values, kept_starts, kept, self.quantile)
        return result

    def _dropped(self, values: np.ndarray, groups: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """How many of each group's smallest cosines are left out: (num_groups,) int64."""
        if self.outliers == "nearest":
            return counts - np.ceil(self.nearest_share * counts - 1e-9).astype(np.int64)
        if self.outliers == "none":
            return np.zeros_like(counts)
        # Cosines ascend, so angles descend: the angle's upper quartile is at the lower quartile's place.
        angles = np.arccos(values)
        present = np.flatnonzero(counts)
        limit = np.full(len(counts), np.inf)
        upper = _quantile(angles, starts[present], counts[present], 0.25)
        lower = _quantile(angles, starts[present], counts[present], 0.75)
        limit[present] = upper + 1.5 * (upper - lower)
        return np.bincount(groups[angles > limit[groups] + 1e-9], minlength=len(counts))


MINIMUM = BoundaryRule()
"""The paper's rule: the smallest cosine."""


def _quantile(values: np.ndarray, starts: np.ndarray, counts: np.ndarray, q: float) -> np.ndarray:
    """Linear-interpolated quantile q of each sorted run values[start : start + count]: numpy's default rule."""
    position = q * (counts - 1)
    low = np.floor(position).astype(np.int64)
    high = np.minimum(low + 1, counts - 1)
    share = position - low
    return values[starts + low] * (1 - share) + values[starts + high] * share
