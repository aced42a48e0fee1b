"""NDPP (after Zhou et al., arXiv:2503.14824): the old centres, moved away from their near neighbours, judge the new
embeddings."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

from trainer.compat.bank.center_bank import CenterBank
from trainer.compat.methods.bct import Bct, bank_rows
from trainer.compat.methods.config import NdppConfig
from trainer.compat.methods.inputs import Inputs, Sections
from trainer.distributed import Ranks
from trainer.head.frozen import FrozenRows
from trainer.head.partition import ClassRange

ROWS, COLUMNS = 2048, 16384
"""Own classes by the bank's classes that are compared at a time: 128 MiB of cosines in float32."""


class Ndpp(Bct):
    """Neighbour-driven prototype perturbation: BCT with rows that keep apart what the old model has close together.

    The formula is :func:`trainer.compat.methods.losses.ndpp_prototypes`. Each rank moves its own classes' rows once, at
    the start: it reads the bank block by block and keeps the nearest of what has come by, so that no collective is
    needed and no rank holds more than its own rows, their sums, and one block. Time: C²/W products of length D.
    """

    def __init__(self, config: NdppConfig, run: Sections, inputs: Inputs, ranks: Ranks) -> None:
        self.config = config
        super().__init__(config, run, inputs, ranks)

    def rows(self, run: Sections, inputs: Inputs, classes: ClassRange) -> FrozenRows:
        """See :class:`Bct`."""
        assert inputs.bank is not None
        dtype = getattr(torch, run.head.frozen_rows)
        work = torch.promote_types(dtype, torch.float32)
        own = bank_rows(inputs.bank, classes, work)
        moved = move_apart(own, inputs.bank, self.config.neighbours, self.config.push, self.ranks.device)
        return FrozenRows(moved.to(dtype), own.mask, classes)


def move_apart(own: FrozenRows, bank: CenterBank, neighbours: int, push: float, device: torch.device) -> Tensor:
    """One rank's rows (k, D), each pushed away from its nearest among the centres of the whole bank."""
    rows, numbers = own.rows.to(device), own.mask.nonzero()[:, 0].to(device) + own.classes.start
    others = int(bank.per_class()["mask"].sum()) - 1
    count = min(neighbours, others)
    if count < 1 or not len(rows):
        return own.rows
    near = torch.full((len(rows), count), -torch.inf, dtype=rows.dtype, device=device)
    who = torch.full((len(rows), count), -1, dtype=torch.int64, device=device)
    for first, block, known in _blocks(bank, rows):
        for start in range(0, len(rows), ROWS):
            part = slice(start, start + ROWS)
            cosines = rows[part] @ block.T
            cosines[numbers[part, None] == first + known] = -torch.inf  # a class is no neighbour of itself
            whom = (first + known).expand(len(cosines), -1)
            best = torch.cat([near[part], cosines], 1).topk(count)
            near[part] = best.values
            who[part] = torch.cat([who[part], whom], 1).gather(1, best.indices)
    weights = near.clamp_min(0) / count
    pulled = torch.zeros_like(rows)
    for first, block, known in _blocks(bank, rows):
        places = torch.searchsorted(known, (who - first).clamp(0, COLUMNS))
        found = (who >= first) & (who < first + COLUMNS)
        row, column = found.nonzero(as_tuple=True)
        pulled.index_add_(0, row, weights[row, column, None] * block[places[row, column]])
    return normalize(rows + push * (weights.sum(1, keepdim=True) * rows - pulled)).to(own.rows.device)


def _blocks(bank: CenterBank, like: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first class, centres (k, D) of those that have one, which these are (k,) from the first on), block by block."""
    for first in range(0, bank.num_classes, COLUMNS):
        rows = bank.rows(first, min(first + COLUMNS, bank.num_classes))
        known = rows.mask.nonzero()[:, 0]
        if len(known):
            yield first, normalize(rows.centers[known].to(like)), known.to(like.device)
