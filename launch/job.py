"""A job as asked for on the command line, whatever starts it."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from trainer.machine import threads_of_a_rank


@dataclass(frozen=True)
class Job:
    """What is to run and on what.

    Attributes:
        config: the YAML file; overrides: ``key=value`` strings behind it.
        nproc: processes per node. nnodes: ``N``, or ``MIN:MAX`` for an elastic torchrun.
        node_rank: this node's number, for the static rendezvous.
        master: ``host:port`` where the ranks meet; empty on one node.
        rendezvous: ``static`` (numbered nodes) or ``c10d`` (nodes may come and go).
        job_id: names the rendezvous.
        max_restarts: how often the group is started again after a failure.
        interface: network interface for gloo and NCCL; empty: chosen by them.
        hostfile: lines ``host slots=N``, for mpirun and DeepSpeed.
        run_dir: the run folder, where the ranks say how they are; None: they are not looked at.
        join_seconds: how long the machines wait for each other.
    """

    config: Path
    overrides: tuple[str, ...] = ()
    nproc: int = 1
    nnodes: str = "1"
    node_rank: int = 0
    master: str = ""
    rendezvous: str = "static"
    job_id: str = "lce"
    max_restarts: int = 0
    interface: str = ""
    hostfile: Path | None = None
    run_dir: Path | None = None
    join_seconds: float = 900.0

    @property
    def program(self) -> list[str]:
        """The arguments of ``python`` that start one rank."""
        return ["-m", "trainer", str(self.config), *self.overrides]

    @property
    def node_options(self) -> list[str]:
        """The options of ``lce launch`` on each node of a queue's job, but for its number and the master's address."""
        options = ["--nproc", str(self.nproc), "--nnodes", self.nnodes]
        options += ["--max-restarts", str(self.max_restarts)] if self.max_restarts else []
        return options + (["--interface", self.interface] if self.interface else [])

    @property
    def many_nodes(self) -> bool:
        """Whether more than this machine takes part."""
        return self.nnodes not in ("1", "1:1")

    @property
    def environment(self) -> dict[str, str]:
        """Variables that every rank needs."""
        names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
        out = dict.fromkeys(names, self.interface) if self.interface else {}
        # How long ranks that were told to stop may take to save; torchrun's default is 30 s.
        out["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
        out["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else a restarted group finds the addresses of dead ranks
        if "OMP_NUM_THREADS" not in os.environ:  # else torchrun sets 1, with a warning
            out["OMP_NUM_THREADS"] = str(threads_of_a_rank(self.nproc))
        out["LCE_LAUNCHED"] = "1"  # the ranks end when their launcher has died
        out["PYTHONSAFEPATH"] = "1"  # a trainer.py or tools/ in the working folder is not taken for ours
        return out


def python() -> str:
    """The interpreter that the ranks run: the present one."""
    return sys.executable
