"""Start by DeepSpeed's launcher: one node, or the hosts of a hostfile (``host slots=N``) over ssh."""

import os
import shutil
import subprocess
from pathlib import Path

from launch.job import Job, python
from trainer.errors import ConfigError


def command(job: Job) -> list[str]:
    """The ``deepspeed`` command line of this job."""
    words = ["deepspeed"]
    if job.hostfile is not None:
        words += ["--hostfile", str(job.hostfile)]
    words += ["--num_gpus", str(job.nproc)]
    if job.many_nodes:
        words += ["--num_nodes", job.nnodes]
    if job.master:
        host, _, port = job.master.rpartition(":")
        words += ["--master_addr", host, "--master_port", port]
    return [*words, "--no_local_rank", *job.extra, "--module", "trainer", str(job.config), *job.overrides]


def run(job: Job) -> int:
    """Start all ranks and wait; returns the launcher's exit status. Raises :class:`ConfigError` without DeepSpeed."""
    words = command(job)
    program = shutil.which(words[0]) or shutil.which(words[0], path=str(Path(python()).parent))
    if program is None:
        raise ConfigError("deepspeed is not installed: pip install torch, then DS_BUILD_OPS=0 pip install deepspeed")
    return subprocess.run(
        [program, *words[1:]], env=os.environ | job.environment | {"LOCAL_WORLD_SIZE": str(job.nproc)}, check=False
    ).returncode
