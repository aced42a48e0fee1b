"""SLURM: an sbatch file that starts torchrun once a node and is queued again on pre-emption."""

import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from launch.job import Job
from trainer.errors import ConfigError


@dataclass(frozen=True)
class Allocation:
    """What is asked of the queue.

    Attributes:
        gpus: per node; 0 for CPU nodes.
        time: limit as SLURM writes it (``2-00:00:00``); empty: the partition's.
        partition, account: as named on the cluster; empty: its defaults.
        cpus: per node; 0: the cluster's default.
        grace_seconds: how long before the end of its time the job is told to save (SIGTERM).
    """

    gpus: int = 0
    time: str = ""
    partition: str = ""
    account: str = ""
    cpus: int = 0
    grace_seconds: int = 120


def script(job: Job, allocation: Allocation) -> str:
    """The text of the sbatch file.

    One task a node runs torchrun. SIGTERM (pre-emption, or the time limit drawing near) reaches the ranks, which save
    and end with status 75; the script then puts the job back into the queue, where the same command continues from the
    checkpoint. It sends the signal to the step alone: with ``scancel --full`` it would reach this script again, and
    srun, which kills the step.
    """
    options = {
        "job-name": job.job_id,
        "nodes": job.nnodes,
        "ntasks-per-node": "1",
        "gpus-per-node": str(allocation.gpus or ""),
        "cpus-per-task": str(allocation.cpus or ""),
        "time": allocation.time,
        "partition": allocation.partition,
        "account": allocation.account,
        "signal": f"B:TERM@{allocation.grace_seconds}",
        "output": "%x-%j.out",
        "open-mode": "append",
    }
    header = "\n".join(f"#SBATCH --{key}={value}" for key, value in options.items() if value)
    # The ranks take their share of the node's cores themselves, of which this machine need not have the same number.
    settings = {**job.environment, "OMP_NUM_THREADS": "1"}
    exports = "\n".join(f"export {key}={shlex.quote(value)}" for key, value in settings.items())
    rank = shlex.join(job.program)
    return f"""#!/bin/bash
{header}
#SBATCH --requeue

{exports}
[ -n "$SLURM_CPUS_PER_TASK" ] && export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

srun --kill-on-bad-exit=1 bash -c 'exec torchrun \\
    --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" --nproc-per-node={job.nproc} \\
    --master-addr="$1" --master-port="$2" --max-restarts={job.max_restarts} "${{@:3}}"' \\
    lce "$master" "$port" {rank} &
step=$!
trap 'trap "" TERM; asked=1; scancel --signal=TERM "$SLURM_JOB_ID"' TERM
wait "$step"
status=$?
if [ -n "$asked" ]; then
    wait "$step"
    status=$?
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def submit(text: str, path: Path) -> str:
    """Write the sbatch file and hand it to the queue; what it answers. Raises :class:`ConfigError` without SLURM."""
    path.write_text(text)
    if shutil.which("sbatch") is None:
        raise ConfigError(f"sbatch is not on the PATH: this is no SLURM login node; the script is in {path}")
    done = subprocess.run(["sbatch", str(path)], check=False, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"sbatch refused {path}: {done.stderr.strip()}")
    return done.stdout.strip()
