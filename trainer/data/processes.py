"""How this package starts its worker processes."""

import multiprocessing as mp
import os
import sys
from multiprocessing import forkserver
from multiprocessing.context import BaseContext

_SAFE = "PYTHONSAFEPATH"


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
    _start_server()
    return context


def _start_server() -> None:
    """Start the server, if it does not run yet, where it takes no modules from the working folder: a trainer.py there
    would be imported in place of ours."""
    before = os.environ.get(_SAFE)
    os.environ[_SAFE] = "1"
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ[_SAFE]
        else:
            os.environ[_SAFE] = before
