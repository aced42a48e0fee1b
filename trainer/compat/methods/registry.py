"""Every method of compatible training by its name in ``compat.method``.

Each rival is a :class:`trainer.compat.methods.method.CompatMethod` in a file of its own; the formulas, their papers and
what was left out of them are in :mod:`trainer.compat.methods.losses`. What involves all classes is sharded as the head
is. What involves the images of a batch is computed on every rank from the same gathered tensors, so that trained
modules (AdvBCT's discriminator, FCT's map) get equal gradients without an all-reduce.
"""

from trainer.compat.methods.advbct import AdvBct
from trainer.compat.methods.bct import Bct
from trainer.compat.methods.config import (
    AdvBctConfig,
    BctConfig,
    FctConfig,
    L2Config,
    LceDirectConfig,
    LceTransformedConfig,
    MethodConfig,
    MixBctConfig,
    UniBctConfig,
)
from trainer.compat.methods.fct import Fct
from trainer.compat.methods.inputs import Inputs, Sections
from trainer.compat.methods.l2 import L2
from trainer.compat.methods.lce import AuthorsBoundary, TransformedLce
from trainer.compat.methods.method import CompatMethod
from trainer.compat.methods.mixbct import MixBct
from trainer.compat.methods.unibct import UniBct
from trainer.distributed import Ranks


def build_method(config: MethodConfig | None, run: Sections, inputs: Inputs, ranks: Ranks) -> CompatMethod | None:
    """What a method adds besides the head: None for none and for LCE's direct mode, which is fused into it (but for the
    authors' boundary).

    Modules come in float32 on the CPU; they are the same on all ranks when torch is seeded alike.

    Args:
        config: the method. run: the other sections.
    """
    match config:
        case None:
            return None
        case LceDirectConfig():
            return AuthorsBoundary(config, inputs, ranks) if config.authors_formula else None
        case LceTransformedConfig():
            return TransformedLce(config, run, inputs, ranks)
        case L2Config():
            return L2(config, run, inputs, ranks)
        case BctConfig():
            return Bct(config, run, inputs, ranks)
        case UniBctConfig():
            return UniBct(config, run, inputs, ranks)
        case AdvBctConfig():
            return AdvBct(config, run, inputs, ranks)
        case MixBctConfig():
            return MixBct(config, run, inputs, ranks)
        case FctConfig():
            return Fct(config, run, inputs, ranks)
    raise AssertionError(config.method)
