"""Every method of compatible training by its name in ``compat.method``.

Each rival is a :class:`trainer.compat.methods.method.CompatMethod` in a file of its own; the formulas, their papers and
what was left out of them are in :mod:`trainer.compat.methods.losses`. What involves all classes is sharded as the head
is. What involves the images of a batch is computed on every rank from the same gathered tensors, so that trained
modules (AdvBCT's discriminator, FCT's map) get equal gradients without an all-reduce.
"""

from collections.abc import Sequence

from trainer.compat.methods.advbct import AdvBct
from trainer.compat.methods.bct import Bct
from trainer.compat.methods.bt2 import Bt2
from trainer.compat.methods.config import (
    AdvBctConfig,
    BctConfig,
    Bt2Config,
    FctConfig,
    FrozenConfig,
    L2Config,
    LceDirectConfig,
    LceTransformedConfig,
    MethodConfig,
    MixBctConfig,
    NdppConfig,
    UniBctConfig,
)
from trainer.compat.methods.fct import Fct
from trainer.compat.methods.inputs import Inputs, Sections
from trainer.compat.methods.l2 import L2
from trainer.compat.methods.lce import DirectLce, TransformedLce
from trainer.compat.methods.method import CompatMethod
from trainer.compat.methods.mixbct import MixBct
from trainer.compat.methods.ndpp import Ndpp
from trainer.compat.methods.old_rows import OldRows
from trainer.compat.methods.together import Together
from trainer.compat.methods.unibct import UniBct
from trainer.distributed import Ranks

METHODS: dict[type[MethodConfig], type[CompatMethod]] = {
    LceDirectConfig: DirectLce,
    LceTransformedConfig: TransformedLce,
    L2Config: L2,
    BctConfig: Bct,
    UniBctConfig: UniBct,
    NdppConfig: Ndpp,
    Bt2Config: Bt2,
    FrozenConfig: OldRows,
    AdvBctConfig: AdvBct,
    MixBctConfig: MixBct,
    FctConfig: Fct,
}
"""The kind of section → what it configures. (Cross-model LCE is a task of its own.)"""


def check_methods(configs: Sequence[MethodConfig], run: Sections, inputs: Inputs) -> None:
    """Refuse inputs that a method cannot work on. Raises :class:`LceError`; see :meth:`CompatMethod.check`."""
    for config in configs:
        METHODS[type(config)].check(config, run, inputs)


def build_method(config: MethodConfig, run: Sections, inputs: Inputs, ranks: Ranks) -> CompatMethod:
    """One method.

    Modules come in float32 on the CPU; they are the same on all ranks when torch is seeded alike.

    Args:
        config: the method. run: the other sections.
    """
    return METHODS[type(config)](config, run, inputs, ranks)


def build_methods(configs: Sequence[MethodConfig], run: Sections, inputs: Inputs, ranks: Ranks) -> Together | None:
    """All methods of a run as one; None: there is none. See :func:`build_method`."""
    made = {config.method: build_method(config, run, inputs, ranks) for config in configs}
    return Together(made) if made else None
