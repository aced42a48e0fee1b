"""Files named like our packages: none in the working folder is ever imported, and one that shadows ours is named."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch import slurm
from launch.job import Job
from tests.data.samples import packed

ROOT = Path(__file__).parents[2]
TRAP = "import pathlib\npathlib.Path(__file__).with_name('imported').touch()\nraise SystemExit(0)\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with files and folders of our names, as repositories for face recognition have them."""
    (tmp_path / "trainer.py").write_text(TRAP)
    for name in ("tools", "launch"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(TRAP)
    return tmp_path


def lce(*words: object, folder: Path, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The command as its console script starts it: without the working folder on the path."""
    environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [sys.executable, "-P", "-c", "import sys; from tools.cli import main; sys.exit(main())", *map(str, words)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def trapped(folder: Path) -> list[Path]:
    return sorted(folder.rglob("imported"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "mpirun", "deepspeed"])
def test_ranks_and_data_processes_take_nothing_from_the_working_folder(folder: Path, launcher: str) -> None:
    if launcher == "mpirun":
        pytest.importorskip("mpi4py")
    if launcher == "deepspeed":
        pytest.importorskip("deepspeed")
    data = packed(folder / "data", classes=4, images=4, size=(8, 8))
    settings = {
        "run": {"dir": str(folder / "run"), "device": "cpu", "threads": 1},
        "data": {"path": str(data), "loader": "torch", "workers": 1, "batch_size": 4},
        "backbone": {"name": "small", "width": 4, "dim": 4},
        "head": {"margin": {"scale": 8.0}},
        "train": {"steps": 2},
        "log": {"tensorboard": False, "progress": False},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    done = lce("launch", "run.yaml", "--nproc", 2, "--with", launcher, folder=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "run/model/model.json").is_file()
    assert not trapped(folder)


@pytest.mark.slow
def test_a_command_on_several_processes_takes_nothing_from_the_working_folder(folder: Path) -> None:
    data = packed(folder / "data", classes=4, images=4, size=(8, 8))
    model = folder / "model"
    code = (
        "import sys, torch; from trainer.models.card import ModelCard; from trainer.models.folder import save_model;"
        "from trainer.networks import build_backbone; from trainer.networks.config import BackboneConfig;"
        "c = BackboneConfig(name='small', width=4, dim=4); torch.manual_seed(0);"
        "save_model(sys.argv[1], build_backbone(c, (8, 8)), ModelCard(backbone=c, dim=4, image_size=(8, 8)))"
    )
    subprocess.run(
        [sys.executable, "-P", "-c", code, str(model)], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True
    )
    words = (
        "centers",
        "from-model",
        model,
        data,
        folder / "bank",
        "--nproc",
        2,
        "--device",
        "cpu",
        "--allow-collapsed",
    )
    done = lce(*words, folder=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not trapped(folder)


def test_the_sbatch_file_and_every_launcher_keep_the_working_folder_out() -> None:
    job = Job(Path("x.yaml"))
    assert job.environment["PYTHONSAFEPATH"] == "1"
    assert "export PYTHONSAFEPATH=1" in slurm.script(job, slurm.Allocation())


@pytest.mark.parametrize("name", ["trainer", "launch"])
def test_a_package_of_our_name_first_on_the_path_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text(TRAP)
    done = lce("--version", folder=tmp_path, path=Path(f"{tmp_path}{os.pathsep}{ROOT}"))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert f"the package {name} of lce-trainer" in done.stderr
    assert f"is shadowed by {tmp_path / name / '__init__.py'}" in done.stderr
    assert not trapped(tmp_path)


@pytest.mark.parametrize("name", ["trainer", "tools"])
def test_files_that_another_distribution_overwrote_are_named(tmp_path: Path, name: str) -> None:
    for package in ("trainer", "launch", "tools"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / name / "__init__.py").write_text('"""Somebody else\'s."""\n')
    done = lce("--version", folder=tmp_path, path=tmp_path)
    assert done.returncode == 2
    assert "another distribution installed a package" in done.stderr
    assert str(tmp_path / name) in done.stderr
