"""Every method of compatible training by its name in ``compat.method``.

Each rival is a :class:`trainer.compat.methods.method.CompatMethod` in a file of its own; the formulas, their papers and
what was left out of them are in :mod:`trainer.compat.methods.losses`. What involves all classes is sharded as the head
is. What involves the images of a batch is computed on every rank from the same gathered tensors, so that trained
modules (AdvBCT's discriminator, FCT's map) get equal gradients without an all-reduce.
"""

from collections.abc import Callable

from trainer.compat.methods.advbct import AdvBct
from trainer.compat.methods.bct import Bct
from trainer.compat.methods.fct import Fct
from trainer.compat.methods.inputs import Inputs
from trainer.compat.methods.l2 import L2
from trainer.compat.methods.lce import AuthorsBoundary, TransformedLce
from trainer.compat.methods.method import CompatMethod
from trainer.compat.methods.mixbct import MixBct
from trainer.compat.methods.unibct import UniBct
from trainer.config import Config
from trainer.distributed import Ranks


def build_method(config: Config, inputs: Inputs, ranks: Ranks) -> CompatMethod | None:
    """What ``compat.method`` adds beside the head: None for ``none`` and for LCE's direct mode, which is fused into it
    (but for the authors' boundary).

    Modules come in float32 on the CPU; they are the same on all ranks when torch is seeded alike.
    """
    method, mode = config.compat.method, config.compat.mode
    if method == "lce" and mode == "direct" and config.compat.authors_formula:
        return AuthorsBoundary(config, inputs, ranks)
    if method == "none" or (method == "lce" and mode == "direct"):
        return None
    kinds: dict[str, Callable[[Config, Inputs, Ranks], CompatMethod]] = {
        "lce": TransformedLce,
        "l2": L2,
        "bct": Bct,
        "unibct": UniBct,
        "advbct": AdvBct,
        "mixbct": MixBct,
        "fct": Fct,
    }
    return kinds[method](config, inputs, ranks)
