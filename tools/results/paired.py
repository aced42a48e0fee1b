"""Differences of two methods on the same unseen identities, with intervals over identities and seeds.

Every method of a seed meets the same old model and the same unseen identities, and the bootstrap draws the same of
them for each (:mod:`trainer.evaluation.bootstrap`). So the difference of two methods' figures in one replicate is a
replicate of their difference, in which what an identity adds to both falls away.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.evaluation.bootstrap import Interval

REPLICATES = 200
"""Of each cell, kept in a benchmark's JSON with four digits."""

# Student's t at 97.5 %, by degrees of freedom from 1 on.
_T = (12.71, 4.30, 3.18, 2.78, 2.57)
_Z = 1.96

Seeds = Sequence[Mapping[str, Any]]
"""What a method found with each seed: ``seed``, ``cells`` and, of newer runs, ``replicates`` (cell → metric → list)."""


def difference(ours: Seeds, theirs: Seeds, metric: str, cell: str = "new->old") -> "Interval | None":
    """Ours less theirs in a cell's metric, the mean over the n seeds that both have, with its 95 % interval.

    One seed: the percentiles of the replicates, over identities alone; it knows nothing of how another training run
    would have ended. More: the mean ± √(z² v + t² s² / n). Here v is the variance over the replicates of the mean over
    seeds (identities), s² the variance between seeds (training runs), z = 1.96, and t is Student's quantile for n − 1
    degrees of freedom, because s is known from so few. Seeds that have identities of their own count these in s too,
    so that the interval is then rather too wide. Drawing two or three seeds with replacement instead covers the true
    difference in 66 and 80 % of cases where training runs differ five times as much as identities do in the mean.

    None where no seed is in both, or replicates are missing or of different numbers, so that they are not the same
    draws.
    """
    import numpy as np

    from trainer.evaluation.bootstrap import Interval, interval

    pairs = common(ours, theirs)
    counts = {len(_replicates(one, cell, metric)) for pair in pairs for one in pair}
    if len(counts) != 1 or 0 in counts:
        return None
    first, second = (np.array([_replicates(pair[at], cell, metric) for pair in pairs]) for at in (0, 1))
    apart = first - second  # (seeds, r)
    values = [a["cells"][cell][metric] - b["cells"][cell][metric] for a, b in pairs]
    if len(values) == 1:
        return interval(values[0], apart[0])
    value = statistics.fmean(values)
    reach = math.hypot(_Z * float(apart.mean(0).std(ddof=1)), _between_seeds(values))
    return Interval(value, value - reach, value + reach)


def over_runs(ours: Seeds, theirs: Seeds, metric: str, cell: str = "new->old") -> "Interval | None":
    """:func:`difference` where no replicates were kept: the mean of n ≥ 2 common seeds ± t s / √n. It is over training
    runs alone: identities that all seeds share add nothing to s. None for a single seed."""
    values = [a["cells"][cell][metric] - b["cells"][cell][metric] for a, b in common(ours, theirs)]
    return _around(values) if len(values) > 1 else None


def common(ours: Seeds, theirs: Seeds) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """What both found, for each seed that both have."""
    other = {one["seed"]: one for one in theirs}
    return [(one, other[one["seed"]]) for one in ours if one["seed"] in other]


def _around(values: Sequence[float]) -> "Interval":
    """The mean over seeds with its 95 % interval."""
    from trainer.evaluation.bootstrap import Interval

    mean, reach = statistics.fmean(values), _between_seeds(values)
    return Interval(mean, mean - reach, mean + reach)


def _between_seeds(values: Sequence[float]) -> float:
    """Half the 95 % interval of a mean over seeds, by Student's t."""
    return _T[min(len(values) - 1, len(_T)) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def _replicates(one: Mapping[str, Any], cell: str, metric: str) -> list[float]:
    found: list[float] = one.get("replicates", {}).get(cell, {}).get(metric, [])
    return found


def room(figures: Mapping[str, Any], metric: str) -> "Interval | None":
    """What the paragon is above the old model, the denominator of the update gain, with its 95 % interval: over the
    seeds, or over the identities of a single one. None where the figures do not tell."""
    import numpy as np

    from trainer.evaluation.bootstrap import interval

    seeds: Seeds = next((one["seeds"] for one in figures["methods"].values() if one["seeds"]), ())
    found = [one["cells"]["paragon->paragon"][metric] - one["cells"]["old->old"][metric] for one in seeds]
    if len(found) > 1:
        return _around(found)
    alone: Seeds = figures.get("alone", ())
    if len(found) == len(alone) == 1:
        paragon, old = (_replicates(alone[0], cell, metric) for cell in ("paragon->paragon", "old->old"))
        return interval(found[0], np.subtract(paragon, old))
    return None


def text(found: "Interval") -> str:
    """``+0.021 [+0.004, +0.038]``."""
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
