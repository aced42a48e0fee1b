"""Centre banks that fit in memory, for tests."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.compat.bank.center_bank import BankInfo, BankWriter, CenterBank


def write_bank(
    path: str | Path,
    *,
    centers: Tensor,
    boundaries: Tensor,
    counts: Tensor,
    mask: Tensor,
    info: BankInfo,
    class_ids: Tensor | None = None,
    **options: Any,
) -> CenterBank:
    """Write a bank that fits in memory: centers (C, D1) unit, the others (C,). ``options`` go to :class:`BankWriter`.

    Raises:
        CenterBankError: see :class:`BankWriter`.
    """
    with BankWriter(path, len(centers), centers.shape[1], info, **options) as writer:
        writer.append(torch.where(mask[:, None], centers, torch.zeros((), dtype=centers.dtype)))
        writer.finish(boundaries, counts, mask, class_ids)
    return CenterBank.open(path)
