"""NDPP (after Zhou et al., arXiv:2503.14824): the old centres, moved away from their near neighbours, judge the new
embeddings."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from trainer.compat.bank.center_bank import CenterBank
from trainer.compat.methods.bct import Bct, bank_rows
from trainer.compat.methods.config import NdppConfig
from trainer.compat.methods.inputs import Inputs, Sections
from trainer.compat.methods.neighbours import blocks, nearest
from trainer.distributed import Ranks
from trainer.head.frozen import FrozenRows
from trainer.head.partition import ClassRange


class Ndpp(Bct):
    """Neighbour-driven prototype perturbation: BCT with rows that keep apart what the old model has close together.

    The formula is :func:`trainer.compat.methods.losses.ndpp_prototypes`. Each rank moves its own classes' rows once, at
    the start: it reads the bank block by block and keeps the nearest of what has come by, so that no collective is
    needed and no rank holds more than its own rows, their sums, and one block. Time: C²/W products of length D; for
    more than 131,072 centres on a CPU the search is approximate (:mod:`trainer.compat.methods.neighbours`).
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
    found = nearest(rows, numbers, bank, count)
    weights = found.near.clamp_min(0) / count
    pulled = torch.zeros_like(rows)
    for first, block, known in blocks(bank, rows):
        row, column = ((found.who >= first) & (found.who <= first + known[-1])).nonzero(as_tuple=True)
        places = torch.searchsorted(known, found.who - first)
        pulled.index_add_(0, row, weights[row, column, None] * block[places[row, column]])
    return normalize(rows + push * (weights.sum(1, keepdim=True) * rows - pulled)).to(own.rows.device)
