"""One node or many by torch's elastic launcher: numbered nodes (static), or nodes that may come and go (c10d)."""

import logging
import os
import signal
import socket
import sys
import time

from launch.job import Job
from trainer.errors import (
    EXIT_CRASH,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_PEER,
    EXIT_TERMINATED,
    EXIT_USAGE,
    ConfigError,
)

_OWN_CODES = (EXIT_USAGE, EXIT_INTERRUPTED, EXIT_TERMINATED, EXIT_CRASH)


def arguments(job: Job) -> list[str]:
    """The arguments of ``torchrun`` for this job."""
    argv = [f"--nproc-per-node={job.nproc}", f"--max-restarts={job.max_restarts}"]
    wait = f"timeout={job.join_seconds:.0f}"
    if not job.many_nodes:
        argv = ["--standalone", *argv]
    elif job.rendezvous == "c10d":
        argv = [
            f"--nnodes={job.nnodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={job.master}",
            f"--rdzv-id={job.job_id}",
            *_rendezvous_address(job.master, f"{wait},join_{wait}"),
            *argv,
        ]
    else:
        host, _, port = job.master.rpartition(":")
        argv = [
            f"--nnodes={job.nnodes}",
            f"--node-rank={job.node_rank}",
            f"--master-addr={host}",
            f"--master-port={port}",
            f"--rdzv-conf={wait}",
            *argv,
        ]
    return [*argv, *job.program]


def _rendezvous_address(master: str, settings: str) -> list[str]:
    """The rendezvous' settings, with whether this machine is the master, and by which address it reaches it (torch goes
    by host names, which need not lead to the network that the master's address is in). Both are left out where the
    master's address cannot be resolved."""
    host, _, port = master.rpartition(":")
    try:
        family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing: only the route is looked up
            own = probe.getsockname()[0]
    except (OSError, ValueError):
        return [f"--rdzv-conf={settings}"]
    return [f"--local-addr={own}", f"--rdzv-conf={settings}{',is_host=1' if own == address[0] else ''}"]


def run(job: Job) -> int:
    """Start the ranks of this node and wait for them.

    Returns:
        The exit status: that of the rank that failed first, where the ranks agree on what it means (2, 70, 75, 130); 70
        when a rank was killed.

    Raises:
        ConfigError: the machines did not find each other in time.
    """
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as run_torchrun

    from launch.child import stopped_status, stuck_ranks_ended
    from trainer.run.watch import ranks_left

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # the ranks say themselves what is wrong
    os.environ.update(job.environment)
    began = time.time()
    if job.many_nodes:
        print(f"lce launch: meeting {job.nnodes} machines at {job.master} …", file=sys.stderr, flush=True)
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # by nohup; torch would take a handler of its own
    argv = ["--signals-to-handle=SIGTERM,SIGINT,SIGQUIT"] if ignored else []
    try:
        with stuck_ranks_ended(job.run_dir, began):
            run_torchrun(parse_args([*argv, *arguments(job)]))
    except ChildFailedError as error:
        return _status({rank: failure.exitcode for rank, failure in error.failures.items()})
    except SignalException as stop:
        return stopped_status(stop.sigval, job.run_dir, began)
    except (dist.DistError, RendezvousError) as error:
        detail = f"{type(error).__name__}: {error}".strip().splitlines()[0][:160]
        if job.run_dir is not None and ranks_left(job.run_dir, began):
            print(
                f"lce launch: the machine at {job.master}, which keeps the list of all, is gone ({detail})", flush=True
            )
            return EXIT_CRASH
        raise ConfigError(
            f"--master {job.master}: not all of {job.nnodes} machines met there, given up after "
            f"{time.time() - began:.0f} s ({detail}). Is the address the first machine's, is the port open and "
            "free, and does the same command run on every machine?"
        ) from None
    return EXIT_DONE


def _status(codes: dict[int, int]) -> int:
    """One status for the group: one that a rank chose itself, else a crash; ranks that were killed are named."""
    killed = [f"rank {rank} by {signal.Signals(-code).name}" for rank, code in codes.items() if code < 0]
    if killed and not any(code in _OWN_CODES for code in codes.values()):
        print(f"lce launch: killed: {', '.join(killed)}", flush=True)
    ended = [code for code in codes.values() if code in _OWN_CODES]
    if ended:
        return next((code for code in _OWN_CODES if code in ended), EXIT_CRASH)
    return EXIT_CRASH if any(code != EXIT_PEER for code in codes.values()) or codes else EXIT_DONE
