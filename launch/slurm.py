"""SLURM: an sbatch file that runs ``lce launch`` once a node and is queued again on pre-emption."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.job import Job, python
from trainer.config import is_layer
from trainer.errors import ConfigError

_FIXED = {
    "nodes": "--nnodes says how many machines",
    "ntasks-per-node": "a node has one task, whose ranks --nproc counts",
    "ntasks": "a node has one task, whose ranks --nproc counts",
    "array": "a run is one job; submit one file for each",
    "signal": "SIGTERM to the script is how a run saves before its time ends",
}
"""What ``--sbatch`` and ``--header`` cannot change, and why."""
_SWITCHES = {
    *("contiguous", "exclusive", "get-user-env", "hold", "ignore-pbs", "nice", "no-kill", "no-requeue", "overcommit"),
    *("oversubscribe", "parsable", "propagate", "quiet", "reboot", "requeue", "spread-job", "stepmgr", "test-only"),
    *("use-min-nodes", "verbose", "wait"),
}
"""The options of sbatch that go without a value."""
_SHORT = {"-N": "nodes", "-n": "ntasks", "-a": "array"}
LAST_SECONDS = 60
"""How long the other nodes may go on once the ranks of one have ended."""


@dataclass(frozen=True)
class Allocation:
    """What is asked of the queue. What is empty, 0 or False is left to the cluster.

    Attributes:
        gpus: per node; 0 for CPU nodes.
        cpus: per node, for all its ranks.
        time: limit as SLURM writes it (``2-00:00:00``).
        partition, account, qos, constraint: as named on the cluster. mem: per node, such as ``64G``.
        exclusive: no other job on the nodes, and all their cores.
        options: further options of sbatch, ``KEY=VALUE`` or ``KEY``.
        header: lines for the head of the script: ``#SBATCH`` lines, and shell lines that every node needs.
        modules: loaded by ``module load``.
        container: an image for ``srun --container-image`` (pyxis), in which ``lce`` is on the PATH.
        mounts: ``HOST:CONTAINER`` folders; none: the working folder alone.
        folder: the working folder of the job, which relative paths of the configuration start from.
        grace_seconds: how long before the end of its time the job is told to save (SIGTERM).
    """

    gpus: int = 0
    cpus: int = 0
    time: str = ""
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    mem: str = ""
    exclusive: bool = False
    options: tuple[str, ...] = ()
    header: str = ""
    modules: tuple[str, ...] = ()
    container: str = ""
    mounts: tuple[str, ...] = ()
    folder: Path = Path()
    grace_seconds: int = 120


def script(job: Job, allocation: Allocation) -> str:
    """The text of the sbatch file.

    One task a node runs ``lce launch`` with the interpreter of this process. SIGTERM (pre-emption, or the time limit
    drawing near) reaches the ranks, which save and end with status 75; the script then puts the job back into the
    queue, where the same command continues from the checkpoint. It sends the signal to the step alone: with ``scancel
    --full`` it would reach this script again, and srun, which kills the step.

    Raises:
        ConfigError: an option that is none of sbatch's form, or that the script depends on; a configuration that the
            container does not see.
    """
    directives, preamble = _header(job, allocation)
    if allocation.modules:
        preamble = [f"module load {shlex.join(allocation.modules)}", *preamble]
    # Ranks that have saved end with 75; --kill-on-bad-exit would kill those of a node that is a second later.
    srun = ["srun", "--kill-on-bad-exit=0", f"--wait={LAST_SECONDS}", *_container(job, allocation)]
    # A login shell knows `module`; the others inherit the environment that the job was submitted from.
    return f"""#!/bin/bash{" -l" if allocation.modules else ""}
{_lines(directives)}
{_lines(preamble)}export PYTHONSAFEPATH=1
export SRUN_CPUS_PER_TASK="${{SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}}"
master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

# shellcheck disable=SC2016 # it is the shell of each node that reads them
{shlex.join(srun)} bash -c 'exec "${{@:2}}" --node-rank "$SLURM_NODEID" --master "$1"' \\
    lce "$master:$port" {shlex.join(_command(job, allocation))} &
step=$!
asked=
trap 'trap "" TERM; asked=1; scancel --signal=TERM "$SLURM_JOB_ID"' TERM
wait "$step"
while kill -0 "$step" 2>/dev/null; do wait "$step"; done # a signal ends `wait`, not the step
wait "$step"
status=$?
if [ -n "$asked" ] && [ "$status" != 0 ]; then
    echo "lce launch: told to end, the ranks ended with status $status; job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def _header(job: Job, allocation: Allocation) -> tuple[list[str], list[str]]:
    """The ``#SBATCH`` lines, and the shell lines that follow them."""
    options = {
        "job-name": job.job_id,
        "nodes": job.nnodes,
        "ntasks-per-node": "1",
        "gpus-per-node": str(allocation.gpus or ""),
        "cpus-per-task": str(allocation.cpus or ""),
        "mem": allocation.mem,
        "time": allocation.time,
        "partition": allocation.partition,
        "account": allocation.account,
        "qos": allocation.qos,
        "constraint": allocation.constraint,
        "chdir": str(allocation.folder.absolute()),
        "signal": f"B:TERM@{allocation.grace_seconds}",
        "output": "%x-%j.out",
        "open-mode": "append",
    }
    settings = {key: f"--{key}={shlex.quote(value)}" for key, value in options.items() if value}
    own = {key for key in ("mem", "time", "partition", "account", "qos", "constraint") if options[key]}
    settings["requeue"] = "--requeue"
    if allocation.exclusive:
        settings["exclusive"] = "--exclusive"
    for option in allocation.options:
        key, equals, value = option.partition("=")
        key = key.removeprefix("--")
        if not re.fullmatch(r"[a-z][a-z0-9-]*", key) or "\n" in value:
            raise ConfigError(f"--sbatch {option!r}: expected KEY=VALUE, or the KEY of a switch, as sbatch has them")
        if key in _FIXED:
            raise ConfigError(f"--sbatch {option}: {_FIXED[key]}")
        if not value and key not in _SWITCHES:
            raise ConfigError(f"--sbatch {option}: sbatch takes a value there: --sbatch {key}=VALUE")
        if key in own:
            raise ConfigError(f"--sbatch {option}: --{key} {options[key]} is given too; one of them")
        settings.pop(key, None)
        settings[key] = f"--{key}{equals}{shlex.quote(value) if value else ''}"
    lines = allocation.header.splitlines()
    directives = [line for line in lines if line.startswith("#SBATCH")]
    for line in directives:
        for word in shlex.split(line.removeprefix("#SBATCH"), comments=True):
            key = _SHORT.get(word[:2]) or word.removeprefix("--").partition("=")[0]
            if word.startswith("-") and key in _FIXED:
                raise ConfigError(f"--header: {line}: {_FIXED[key]}")
    preamble = [line for line in lines if not line.startswith(("#SBATCH", "#!"))]
    return [*(f"#SBATCH {setting}" for setting in settings.values()), *directives], preamble


def _container(job: Job, allocation: Allocation) -> list[str]:
    if not allocation.container:
        return []
    folder = allocation.folder.absolute()
    mounts = list(allocation.mounts)
    places = [mount.split(":")[1] for mount in mounts]
    if not any(map(folder.is_relative_to, places)):
        mounts.insert(0, f"{folder}:{folder}")
        places.insert(0, str(folder))
    for file in (Path(word).absolute() for word in (str(job.config), *filter(is_layer, job.overrides))):
        if not any(map(file.is_relative_to, places)):
            raise ConfigError(
                f"{file}: the container sees {', '.join(places)} alone; add --bind {file.parent}:{file.parent}"
            )
    image = f"--container-image={allocation.container}"
    return [image, f"--container-mounts={','.join(mounts)}", f"--container-workdir={folder}"]


def _command(job: Job, allocation: Allocation) -> list[str]:
    """What each node runs, but for its number and the master's address; the configuration's files by absolute paths."""
    program = ["lce"] if allocation.container else [python(), "-m", "tools.cli"]
    layers = [str(Path(word).absolute()) if is_layer(word) else word for word in job.overrides]
    return [*program, "launch", str(job.config.absolute()), *layers, *job.node_options]


def _lines(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
