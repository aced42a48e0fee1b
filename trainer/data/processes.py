"""How this package starts its worker processes."""

import multiprocessing as mp
import sys
from multiprocessing.context import BaseContext


def worker_context() -> BaseContext:
    """Forked from this process where that is safe, since that is quick; else forked from a clean server.

    A process that has run DALI or CUDA must not be forked: the child inherits pipelines without their threads, and
    hangs when it throws them away.
    """
    torch = sys.modules.get("torch")
    if "nvidia.dali" not in sys.modules and not (torch and torch.cuda.is_initialized()):
        return mp.get_context("fork")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["trainer.data.torch_loader", "trainer.data.packing", "trainer.data.checking"])
    return context
