"""The TrainJob, held against Kubeflow's own models; the image's Dockerfile."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import kubernetes
from launch.job import Job
from launch.kubernetes import Pods
from tools.cli import main
from trainer.errors import ConfigError

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "launch/Dockerfile"
WORDS = ["--with", "kubernetes", "--nnodes", "2", "--gpus", "4", "--image", "registry/lce:1", "--claim", "faces"]
WORDS += ["--mem", "64Gi", "--namespace", "team", "--job-id", "night", "--max-restarts", "1"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    settings = {
        "run": {"dir": "run", "device": "cpu"},
        "data": {"loader": "synthetic", "batch_size": 8, "synthetic_classes": 11, "synthetic_size": 8},
        "backbone": {"name": "small", "width": 4, "dim": 6},
        "train": {"steps": 3},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "more.yaml").write_text("train: {steps: 4}\n")
    return tmp_path


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["launch", *words, "--dry-run"]) == 0
    tree: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return tree


def test_the_train_job_is_one_of_kubeflow_s(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their models keep all of it: they drop fields that they do not know, and refuse values of another type."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow_trainer_api is not installed")
    tree = shown(capsys, "run.yaml", "more.yaml", "run.seed=4", *WORDS)
    assert models.TrainerV1alpha1TrainJob.from_dict(tree).to_dict() == tree
    one = shown(capsys, "run.yaml", "--with", "kubernetes", "--image", "lce", "--claim", "faces")
    assert models.TrainerV1alpha1TrainJob.from_dict(one).to_dict() == one


def test_what_the_pods_get(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = shown(capsys, "run.yaml", "more.yaml", "run.seed=4", *WORDS, "--shared-memory", "8Gi", "--mount", "/faces")
    assert tree["metadata"] == {"name": "night", "namespace": "team"}
    trainer = tree["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"], trainer["image"]) == (2, 4, "registry/lce:1")
    asked = {"nvidia.com/gpu": "4", "cpu": "8", "memory": "64Gi"}
    assert trainer["resourcesPerNode"] == {"requests": asked, "limits": asked}
    spec = tree["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]
    pod = spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["volumes"] == [
        {"name": "work", "persistentVolumeClaim": {"claimName": "faces"}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}},
    ]
    mounts = pod["containers"][0]["volumeMounts"]
    assert {mount["name"]: mount["mountPath"] for mount in mounts} == {"work": "/faces", "shared-memory": "/dev/shm"}
    assert pod["terminationGracePeriodSeconds"] == 600


def test_the_command_of_a_pod_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Under a real shell, with what Kubeflow sets: the first pod's name is waited for, then come number and address."""
    fakes = {
        "lce": 'echo "lce $*"',
        "getent": "test -e known || { touch known; exit 2; }",  # known at the second try
        "sleep": 'echo "sleep $*"',
    }
    for name, body in fakes.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    tree = shown(capsys, "run.yaml", "more.yaml", "run.seed=4", *WORDS, "--mount", str(folder))
    settings = {"PET_NODE_RANK": "1", "PET_MASTER_ADDR": "night-node-0-0.night", "PET_MASTER_PORT": "29500"}
    command = tree["spec"]["trainer"]["command"]
    path = f"{folder}:/usr/bin:/bin"
    done = subprocess.run(
        command, env=settings | {"PATH": path}, capture_output=True, text=True, timeout=30, check=True, cwd="/"
    )
    assert done.stdout.splitlines() == [
        "sleep 1",
        "lce launch run.yaml more.yaml run.seed=4 --nproc 4 --nnodes 2 --max-restarts 1 --node-rank 1 "
        "--master night-node-0-0.night:29500",
    ]
    tree = shown(capsys, "run.yaml", "--with", "kubernetes", "--image", "lce", "--claim", "faces")
    assert tree["spec"]["trainer"]["command"][-1] == "cd /work && exec lce launch run.yaml --nproc 1 --nnodes 1"


@pytest.mark.parametrize(
    ("job", "pods", "message"),
    [
        (Job(Path("run.yaml")), Pods("", "faces"), "--image is missing"),
        (Job(Path("run.yaml")), Pods("lce", ""), "--claim is missing"),
        (Job(Path("run.yaml"), job_id="Night_1"), Pods("lce", "faces"), "--job-id Night_1: Kubernetes takes"),
        (Job(Path("run.yaml"), job_id="n" * 46), Pods("lce", "faces"), "takes up to 45 small letters"),
        (Job(Path("run.yaml")), Pods("lce", "Faces"), "--claim Faces: Kubernetes takes small letters"),
        (Job(Path("run.yaml")), Pods("Lce", "faces"), "--image Lce: Kubernetes takes [HOST/]NAME[:TAG]"),
        (Job(Path("run.yaml")), Pods("lce", "faces", mount="work"), "--mount work: Kubernetes takes an absolute path"),
        (Job(Path("run.yaml")), Pods("lce", "faces", shared_memory="1x"), "--shared-memory 1x: Kubernetes takes"),
        (Job(Path("run.yaml")), Pods("lce", "faces", namespace="A_b"), "--namespace A_b: Kubernetes takes up to 63"),
        (Job(Path("/home/me/run.yaml")), Pods("lce", "faces"), "/home/me/run.yaml: the pods see /work alone"),
        (Job(Path("../run.yaml")), Pods("lce", "faces"), "../run.yaml: the pods see /work alone"),
        (Job(Path("run.yaml"), ("run.dir=/elsewhere/k",)), Pods("lce", "faces"), "run.dir=/elsewhere/k: is not in the"),
    ],
)
def test_what_no_pod_could_run_is_refused(job: Job, pods: Pods, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        kubernetes.train_job(job, pods)


def test_a_job_is_handed_to_kubectl(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(folder))
    words = ["launch", "run.yaml", "--with", "kubernetes", "--image", "lce", "--claim", "faces"]
    assert main(words) == 2
    assert "kubectl is not on the PATH" in capsys.readouterr().err
    (folder / "kubectl").write_text('#!/bin/sh\necho "$@"\n')
    (folder / "kubectl").chmod(0o755)
    assert main(words) == 0
    assert capsys.readouterr().out == "create -f lce.trainjob.yaml\n"
    assert yaml.safe_load((folder / "lce.trainjob.yaml").read_text())["kind"] == "TrainJob"


def test_the_image_holds_what_it_copies_and_is_not_root_s() -> None:
    text = DOCKERFILE.read_text()
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for word in line.split()]
    assert {"trainer", "launch", "tools", "configs", "constraints.txt"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    assert "--constraint constraints.txt" in text
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == [f"1000:{kubernetes.GROUP}"]


def test_the_dockerfile_passes_the_linter() -> None:
    linter = shutil.which("hadolint") or shutil.which("hadolint", path=str(ROOT / ".venv/bin"))
    if linter is None:
        pytest.skip("hadolint is not installed (make queue-extras)")
    done = subprocess.run([linter, str(DOCKERFILE)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
