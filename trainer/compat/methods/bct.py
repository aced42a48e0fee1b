"""BCT (Shen et al., CVPR 2020): the old classifier judges the new embeddings as well."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from trainer.compat.bank.center_bank import CenterBank
from trainer.compat.methods.config import BctConfig, Bt2Config, NdppConfig, UniBctConfig
from trainer.compat.methods.inputs import Inputs, Sections
from trainer.compat.methods.method import CompatMethod
from trainer.distributed import Labels, Ranks, scale_gradient
from trainer.head.frozen import FrozenClassifier, FrozenRows
from trainer.head.kernels import Kernels
from trainer.head.partition import ClassRange, class_range
from trainer.head.sizes import COMPILE_FROM_ROWS, chunk_rows

BANK_BLOCK = 65536


class Bct(CompatMethod):
    """BCT (Shen et al., CVPR 2020): the old classifier, frozen and sharded, classifies the new embeddings as well.

    Its rows are the bank's centres, float32 (bfloat16 with ``head.rows`` bfloat16 or float8, in half the memory);
    scale, sample rate and draw are the head's, the margin is ``compat.old_margin``. One collective a step, the
    all-reduce of :class:`trainer.head.frozen.FrozenClassifier`. Left out: see
    :func:`trainer.compat.methods.losses.bct`.
    """

    def __init__(
        self, config: BctConfig | UniBctConfig | NdppConfig | Bt2Config, run: Sections, inputs: Inputs, ranks: Ranks
    ) -> None:
        self.weight, self.ranks = config.weight, ranks
        head = run.head
        known = self.rows(run, inputs, class_range(inputs.num_classes, ranks.rank, ranks.world_size))
        chunk = chunk_rows(head.chunk_rows, ranks.device.type, run.data.batch_size)
        self.classifier = FrozenClassifier(
            FrozenRows(known.rows.to(ranks.device), known.mask.to(ranks.device), known.classes),
            scale=head.margin.scale,
            margin=config.old_margin,
            kernels=Kernels(chunk, compiled=len(known.rows) >= COMPILE_FROM_ROWS),
            compute=torch.bfloat16 if head.compute == "bfloat16" else torch.float32,
            tf32=head.compute == "tf32",
            sample_rate=lambda step: head.rate_at(step // run.accumulate),
            seed=run.seed,
        )

    def rows(self, run: Sections, inputs: Inputs, classes: ClassRange) -> FrozenRows:
        """The old rows of this rank's classes."""
        assert inputs.bank is not None
        return bank_rows(inputs.bank, classes, getattr(torch, run.head.frozen_rows))

    def loss(self, embeddings: Tensor, labels: Labels, rows: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`CompatMethod`: ``influence`` is BCT's loss."""
        del rows
        # The rank's part of the gradient, W times: the head takes the mean over the ranks, which makes it the sum.
        mine = scale_gradient(embeddings, self.ranks.world_size)
        value, _ = self.classifier.loss(mine, labels.device, step)
        return self.weight * value, {"influence": value.detach()}


def bank_rows(bank: CenterBank, classes: ClassRange, dtype: torch.dtype) -> FrozenRows:
    """The centres that a bank has of ``classes``, read block by block."""
    mask = bank.per_class(classes.start, classes.stop)["mask"]
    out = torch.empty(int(mask.sum()), bank.dim, dtype=dtype)
    filled = 0
    for start in range(classes.start, classes.stop, BANK_BLOCK):
        block = bank.rows(start, min(start + BANK_BLOCK, classes.stop))
        centers = block.centers[block.mask]
        out[filled : filled + len(centers)] = normalize(centers.to(torch.promote_types(dtype, torch.float32)))
        filled += len(centers)
    return FrozenRows(out, mask, classes)
