"""Kubernetes: a TrainJob of Kubeflow Trainer v2, whose pods run ``lce launch``.

The controller numbers the pods and tells each of them where the first one is (``PET_NODE_RANK``, ``PET_MASTER_ADDR``,
``PET_MASTER_PORT``). The shell of the pod puts them into the command, once the first pod's name is known to it.
"""

import re
import shlex
from dataclasses import dataclass
from typing import Any

import yaml

from launch.job import Job
from trainer.config import is_layer
from trainer.errors import ConfigError

MANAGER = "lce-trainer.io/launch"
"""Whose patch of the runtime this is: Kubeflow asks each writer for a name of its own."""
GROUP = 1000
"""Of the image's user, who is not root: volumes are mounted for it to write."""
WAIT_SECONDS = 600
"""How long a pod waits for the first one to have an address."""
_JOB = re.compile(r"[a-z]([-a-z0-9]{0,43}[a-z0-9])?")
"""Short: the controllers append to it, and the pods' names may have 63 letters."""
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_IMAGE = re.compile(r"([A-Za-z0-9.-]+(:\d+)?/)?[a-z0-9._/-]+(:[\w.-]+)?(@sha256:[0-9a-f]{64})?")
_MOUNT = re.compile(r"/[^:]*")
_SIZE = re.compile(r"\d+(\.\d+)?([KMGTPE]i?|k|m)?")
_OBJECT = re.compile(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?")


@dataclass(frozen=True)
class Pods:
    """What the job's pods are made of.

    Attributes:
        image: of the container; launch/Dockerfile makes one.
        claim: the PersistentVolumeClaim with the data sets, the configuration and the run folder; every node writes to
            it (ReadWriteMany).
        mount: where it lies in the container, and the working folder: relative paths start there.
        gpus, cpus, mem: of a node; 0 or empty: not asked for.
        shared_memory: the most of the memory that may be shared between processes (Kubernetes gives 64 MiB).
        runtime: the ClusterTrainingRuntime. namespace: empty: the present one.
        grace_seconds: how long a pod that is told to end may take to save.
    """

    image: str
    claim: str
    mount: str = "/work"
    gpus: int = 0
    cpus: int = 0
    mem: str = ""
    shared_memory: str = "16Gi"
    runtime: str = "torch-distributed"
    namespace: str = ""
    grace_seconds: int = 600


def train_job(job: Job, pods: Pods) -> dict[str, Any]:
    """The TrainJob as a tree of plain values.

    Raises:
        ConfigError: no image or claim; a name that Kubernetes refuses; a configuration outside of the claim.
    """
    for option, value in (("--image", pods.image), ("--claim", pods.claim)):
        if not value:
            raise ConfigError(f"{option} is missing: a TrainJob needs an image (launch/Dockerfile) and a volume claim")
    if not _JOB.fullmatch(job.job_id):
        raise ConfigError(
            f"--job-id {job.job_id}: Kubernetes takes up to 45 small letters, digits and hyphens, a letter first"
        )
    for option, value, form, expected in (
        ("--claim", pods.claim, _OBJECT, "small letters, digits, hyphens and dots"),
        ("--runtime", pods.runtime, _OBJECT, "small letters, digits, hyphens and dots"),
        ("--image", pods.image, _IMAGE, "[HOST/]NAME[:TAG], NAME in small letters"),
        ("--mount", pods.mount, _MOUNT, "an absolute path"),
        ("--shared-memory", pods.shared_memory, _SIZE, "an amount, such as 16Gi"),
        ("--namespace", pods.namespace or "default", _NAMESPACE, "up to 63 small letters, digits and hyphens"),
    ):
        if not form.fullmatch(value):
            raise ConfigError(f"{option} {value}: Kubernetes takes {expected}")
    files = [str(job.config), *(word for word in job.overrides if is_layer(word))]
    outside = [file for file in files if _is_outside(file, pods)]
    if outside or any(".." in file.split("/") for file in files):
        raise ConfigError(
            f"{', '.join(outside or files)}: the pods see {pods.mount} alone, where the claim {pods.claim} lies; name "
            "configurations relative to it"
        )
    folder = next((w.partition("=")[2] for w in reversed(job.overrides) if w.startswith("run.dir=")), "")
    if _is_outside(folder, pods):
        raise ConfigError(
            f"run.dir={folder}: is not in the claim, which is at {pods.mount}; the run would be lost with its pods"
        )
    volumes = [
        {"name": "work", "persistentVolumeClaim": {"claimName": pods.claim}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": pods.shared_memory}},
    ]
    mounts = [{"name": "work", "mountPath": pods.mount}, {"name": "shared-memory", "mountPath": "/dev/shm"}]
    pod: dict[str, Any] = {
        "securityContext": {"fsGroup": GROUP},
        "terminationGracePeriodSeconds": pods.grace_seconds,
        "containers": [{"name": "node", "volumeMounts": mounts}],
        "volumes": volumes,
    }
    patch: dict[str, Any] = {"spec": {"template": {"spec": pod}}}
    spec = {"template": {"spec": {"replicatedJobs": [{"name": "node", "template": patch}]}}}
    trainer: dict[str, Any] = {
        "image": pods.image,
        "numNodes": int(job.nnodes),
        "numProcPerNode": job.nproc,
        "command": ["sh", "-c", f"cd {shlex.quote(pods.mount)} && {_command(job)}"],
    }
    resources = {"nvidia.com/gpu": str(pods.gpus or ""), "cpu": str(pods.cpus or ""), "memory": pods.mem}
    asked = {name: amount for name, amount in resources.items() if amount}
    if asked:
        trainer["resourcesPerNode"] = {"requests": dict(asked), "limits": dict(asked)}
    metadata = {"name": job.job_id} | ({"namespace": pods.namespace} if pods.namespace else {})
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": metadata,
        "spec": {
            "runtimeRef": {"name": pods.runtime},
            "trainer": trainer,
            "runtimePatches": [{"manager": MANAGER, "trainingRuntimeSpec": spec}],
        },
    }


def _is_outside(path: str, pods: Pods) -> bool:
    """Whether an absolute path leads out of the claim."""
    return path.startswith("/") and not path.startswith(f"{pods.mount.rstrip('/')}/")


def text(job: Job, pods: Pods) -> str:
    """The TrainJob as YAML, for ``kubectl create -f``. Raises :class:`ConfigError` as :func:`train_job` does."""
    return yaml.safe_dump(train_job(job, pods), sort_keys=False, width=1000)


def _command(job: Job) -> str:
    command = ["lce", "launch", str(job.config), *job.overrides, *job.node_options]
    if not job.many_nodes:
        return f"exec {shlex.join(command)}"
    # Pods start in any order, and the first one has no address before it does.
    known = f'for _ in $(seq {WAIT_SECONDS}); do getent hosts "$PET_MASTER_ADDR" && break; sleep 1; done'
    return (
        f'{known}; exec {shlex.join(command)} --node-rank "$PET_NODE_RANK" --master "$PET_MASTER_ADDR:$PET_MASTER_PORT"'
    )
