"""Start by DeepSpeed's launcher: one node, or the hosts of a hostfile (``host slots=N``) over ssh."""

import os
import tempfile
from pathlib import Path

from launch.child import find_program, run_launcher
from launch.job import Job


def command(job: Job) -> list[str]:
    """The ``deepspeed`` command line of this job."""
    argv = ["deepspeed"]
    if job.hostfile is not None:
        argv += ["--hostfile", str(job.hostfile)]
    argv += ["--num_gpus", str(job.nproc)]
    if job.many_nodes:
        argv += ["--num_nodes", job.nnodes]
    if job.master:
        host, _, port = job.master.rpartition(":")
        argv += ["--master_addr", host, "--master_port", port]
    return [*argv, "--no_local_rank", "--module", "trainer", str(job.config), *job.overrides]


def run(job: Job) -> int:
    """Start all ranks and wait; returns the exit status (see :func:`launch.child.run_launcher`).

    Raises:
        ConfigError: no DeepSpeed.
    """
    name, *argv = command(job)
    remedy = "deepspeed is not installed: pip install torch, then DS_BUILD_OPS=0 pip install deepspeed"
    program = find_program(name, remedy)
    environment = job.environment | {"LOCAL_WORLD_SIZE": str(job.nproc)}
    with tempfile.TemporaryDirectory(prefix="lce-launch-") as folder:
        # To the other hosts DeepSpeed takes what this file names, and little else.
        carried = Path(folder, "environment")
        carried.write_text(_users_file() + "".join(f"{key}={value}\n" for key, value in environment.items()))
        return run_launcher([program, *argv], {**environment, "DS_ENV_FILE": str(carried)}, job.run_dir)


def _users_file() -> str:
    """What DeepSpeed would read instead: ``.deepspeed_env``, or as DS_ENV_FILE names it, at home and here."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    files = [folder / name for folder in (Path.home(), Path())]
    return "".join(file.read_text().rstrip("\n") + "\n" for file in dict.fromkeys(files) if file.is_file())
