"""The old rows stay: the new classifier's rows of classes with an old centre are that centre, from beginning to end."""

import torch

from trainer.compat.methods.bct import bank_rows
from trainer.compat.methods.config import FrozenConfig
from trainer.compat.methods.inputs import Inputs, Sections
from trainer.compat.methods.method import CompatMethod
from trainer.distributed import Ranks
from trainer.errors import ConfigError
from trainer.head.frozen import FrozenRows
from trainer.head.partition import class_range


class OldRows(CompatMethod):
    """The classifier's rows of the classes that have an old centre start there and stay; the others are trained.

    It is LCE's alignment with a weight beyond all measure, and no loss of its own: the margin softmax itself draws the
    embeddings to the old centres. (Fixed classifiers of this kind: Biondi et al., "CoReS", TPAMI 2023, where the rows
    are a simplex; here they are the old model's.) No collective; a step writes the rank's fixed rows once more.
    """

    adds_loss = False

    def __init__(self, config: FrozenConfig, run: Sections, inputs: Inputs, ranks: Ranks) -> None:
        del config
        assert inputs.bank is not None
        mine = class_range(inputs.num_classes, ranks.rank, ranks.world_size)
        known = bank_rows(inputs.bank, mine, getattr(torch, run.head.rows))
        self.held = FrozenRows(known.rows.to(ranks.device), known.mask, mine)

    @classmethod
    def check(cls, config: FrozenConfig, run: Sections, inputs: Inputs) -> None:
        """See :class:`CompatMethod`; needs one row a class, in a dtype that holds a centre as it is."""
        super().check(config, run, inputs)
        if run.head.rows == "float8" or run.head.sub_centers > 1:
            raise ConfigError(
                "compat.method = frozen: needs one row a class and rows that hold a centre as it is; use "
                "head.sub_centers=1 and head.rows float32 or bfloat16"
            )
