"""How this package starts its worker processes."""

import multiprocessing as mp
from multiprocessing.context import ForkServerContext


def worker_context() -> ForkServerContext:
    """Processes forked from a clean server, never from this one.

    A process that has run DALI (or CUDA) must not be forked: the child inherits its pipelines without their threads and
    hangs when it throws them away.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["trainer.data.torch_loader", "trainer.data.packing", "trainer.data.checking"])
    return context
