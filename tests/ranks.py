"""Run a function on 1..N real gloo processes: the one spawning helper of the tests."""

import datetime
import multiprocessing as mp
import os
import pickle
import queue
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.distributed import Ranks

_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed.tensor", "trainer.run.engine", "tests.ranks"])


def _child(function: Callable[..., Any], rank: int, world: int, store: str, args: tuple[Any, ...], out: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60)
        )
        # plain pickle carries a tensor's data; the queue's own would share memory that ends with this process
        out.put((rank, True, pickle.dumps(function(Ranks(rank, world, rank, torch.device("cpu")), *args))))
        dist.destroy_process_group()
    except BaseException:
        out.put((rank, False, traceback.format_exc()))
        out.close()
        out.join_thread()
        os._exit(1)


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """``function(ranks, *args)`` on ``world_size`` processes joined by gloo; the results in rank order.

    ``function`` must be importable (top level of a test module) and its arguments and result picklable (tensors are
    fine). One rank's exception fails the call with that rank's traceback; so does a hang, after ``timeout``.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = _context.Queue()
        store = str(Path(folder) / "store")
        processes = [
            _context.Process(target=_child, args=(function, r, world_size, store, args, out), daemon=True)
            for r in range(world_size)
        ]
        for process in processes:
            process.start()
        results: dict[int, Any] = {}
        try:
            for _ in processes:
                rank, good, value = out.get(timeout=timeout)
                if not good:
                    raise AssertionError(f"rank {rank} of {world_size} failed:\n{value}")
                results[rank] = pickle.loads(value)
        except queue.Empty:
            raise AssertionError(f"only ranks {sorted(results)} of {world_size} answered in {timeout:.0f} s") from None
        finally:
            for process in processes:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()
                    process.join()
        return [results[r] for r in range(world_size)]
