"""Files named like our packages: none in the working folder is ever imported, and one that shadows ours is named."""

import os
import shutil
import subprocess
import sys
import tomllib
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


def lce(*words: object, folder: Path, path: str | Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The command as it is installed: without the working folder on the path."""
    environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [sys.executable, "-P", str(ROOT / "tools" / "lce"), *map(str, words)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def trapped(folder: Path) -> list[Path]:
    return sorted(folder.rglob("imported"))


def training(folder: Path) -> str:
    """The name of a configuration in the folder: two updates, images read by a process of their own."""
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
    return "run.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "mpirun", "deepspeed"])
def test_ranks_and_data_processes_take_nothing_from_the_working_folder(folder: Path, launcher: str) -> None:
    if launcher == "mpirun":
        pytest.importorskip("mpi4py", reason="needs mpi4py (extra `mpi`)")
    if launcher == "deepspeed":
        pytest.importorskip("deepspeed", reason="needs DeepSpeed (extra `deepspeed`)")
    done = lce("launch", training(folder), "--nproc", 2, "--with", launcher, folder=folder)
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


SLURM = {
    "sbatch": "export SLURM_JOB_ID=7 SLURM_NNODES=1 SLURM_NODEID=0 SLURM_JOB_NODELIST=here\n"
    'bash "$1" && echo "Submitted batch job 7"',
    "srun": 'while [[ "$1" == -* ]]; do shift; done\nexec "$@"',
    "scontrol": 'case "$1" in show) echo 127.0.0.1 ;; *) exit 1 ;; esac',
}
"""Stand-ins that run a job at once, on this machine, as one task of the sbatch file."""


@pytest.mark.slow
def test_the_sbatch_file_keeps_the_working_folder_out(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path_factory.mktemp("slurm")
    for name, text in SLURM.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join(map(str, (programs, Path(sys.executable).parent, os.environ["PATH"]))))
    config = training(folder)
    done = lce("launch", config, "--nproc", 2, "--with", "slurm", folder=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "run/model/model.json").is_file()
    assert not trapped(folder)


@pytest.mark.slow
def test_data_processes_of_a_clean_server_take_nothing_from_the_working_folder(folder: Path) -> None:
    """As after CUDA or DALI was used, from a program of the user's that lies elsewhere."""
    code = (
        "import sys, types\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "if __name__ == '__main__':\n"
        "    sys.modules['nvidia.dali'] = types.ModuleType('nvidia.dali')\n"
        "    from trainer.data.processes import worker_context\n"
        "    context = worker_context()\n"
        "    assert context.get_start_method() == 'forkserver'\n"
        "    with ProcessPoolExecutor(1, context) as pool:\n"
        "        print(pool.submit(len, 'abc').result())\n"
    )
    program = folder.parent / f"{folder.name}-program.py"
    program.write_text(code)
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"} | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr[-2000:]
    assert not trapped(folder)


def test_the_sbatch_file_and_every_launcher_keep_the_working_folder_out() -> None:
    job = Job(Path("x.yaml"))
    assert job.environment["PYTHONSAFEPATH"] == "1"
    assert "export PYTHONSAFEPATH=1" in slurm.script(job, slurm.Allocation())


@pytest.mark.parametrize(
    "file", ["trainer/__init__.py", "trainer.py", "launch/__init__.py", "tools/__init__.py", "tools.py"]
)
@pytest.mark.parametrize("ahead", [".", "{folder}"])
def test_a_package_of_our_name_first_on_the_path_is_named(tmp_path: Path, file: str, ahead: str) -> None:
    trap, name = tmp_path / file, file.partition("/")[0].removesuffix(".py")
    trap.parent.mkdir(exist_ok=True)
    trap.write_text(TRAP)
    done = lce("--version", folder=tmp_path, path=f"{ahead.format(folder=tmp_path)}{os.pathsep}{ROOT}")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert f"the package {name} of lce-trainer" in done.stderr
    assert f"is shadowed by {tmp_path}" in done.stderr
    assert file in done.stderr
    assert not trapped(tmp_path)


def test_the_command_is_installed_as_the_script_that_imports_nothing_by_name_first() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "lce" not in project["project"].get("scripts", {})
    assert project["tool"]["setuptools"]["script-files"] == ["tools/lce"]
    done = lce("--version", folder=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("lce-trainer ")


def test_without_the_package_the_command_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(ROOT / "tools" / "lce")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "shadowed by nothing (lce-trainer is not installed for this Python)" in done.stderr


@pytest.mark.parametrize("name", ["trainer", "tools"])
def test_files_that_another_distribution_overwrote_are_named(tmp_path: Path, name: str) -> None:
    for package in ("trainer", "launch", "tools"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / name / "__init__.py").write_text('"""Somebody else\'s."""\n')
    done = lce("--version", folder=tmp_path, path=tmp_path)
    assert done.returncode == 2
    assert "another distribution installed " in done.stderr
    assert str(tmp_path / name) in done.stderr
