"""How jobs are started: what every launcher would run, and real runs under those that are here."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launch import slurm
from launch.job import Job
from launch.torchrun import _status
from tests.runs import tree
from tools.cli import main
from trainer.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def path(tmp_path: Path) -> Path:
    settings = tree(tmp_path / "run", backbone__name="small", data__synthetic_size=16)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "run.yaml"


def _shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["launch", *words, "--dry-run"]) == 0
    return capsys.readouterr().out


def test_dry_runs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(path)
    one = _shown(capsys, config, "--nproc", "2", "train.steps=9")
    assert f"torchrun --standalone --nproc-per-node=2 --max-restarts=0 -m trainer {config} train.steps=9" in one
    many = _shown(
        capsys,
        config,
        "--nproc",
        "4",
        "--nnodes",
        "2",
        "--node-rank",
        "1",
        "--master",
        "h0:29500",
        "--interface",
        "eth0",
    )
    assert "--nnodes=2 --node-rank=1 --master-addr=h0 --master-port=29500 --rdzv-conf=timeout=600 " in many
    assert "GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0" in many
    elastic = _shown(
        capsys, config, "--nnodes", "1:4", "--rendezvous", "c10d", "--master", "h0:1", "--max-restarts", "3"
    )
    assert "--nnodes=1:4 --rdzv-backend=c10d --rdzv-endpoint=h0:1 --rdzv-id=lce" in elastic
    assert "--max-restarts=3" in elastic
    mpi = _shown(capsys, config, "--nproc", "3", "--with", "mpirun", "train.steps=9")
    assert "mpirun -n 3" in mpi
    assert f"-m launch.mpirun {config} train.steps=9" in mpi
    deepspeed = _shown(capsys, config, "--nproc", "2", "--with", "deepspeed", "--hostfile", "hosts")
    assert f"deepspeed --hostfile hosts --num_gpus 2 --no_local_rank --module trainer {config}" in deepspeed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nnodes", "2"], "--master HOST:PORT"),
        (["--nnodes", "two", "--master", "h:1"], "--nnodes two: a number of machines"),
        (["--nnodes", "0"], "--nnodes 0: a number of machines"),
        (["--nnodes", "2", "--with", "mpirun"], "--nnodes 2: mpirun needs --hostfile"),
        (["--nnodes", "2:4", "--with", "mpirun"], "with torchrun and --rendezvous c10d alone"),
        (["--nnodes", "2:4", "--with", "slurm"], "with torchrun and --rendezvous c10d alone"),
        (["trian.steps=3"], "did you mean train"),
        (["precision=fp16"], "did you mean train.precision?"),
        (["train.precision=fp16"], "did you mean float16?"),
        (["train.precision=bf16"], "did you mean bfloat16?"),
    ],
)
def test_wrong_use(path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(["launch", str(path), *words]) == 2
    assert message in capsys.readouterr().err


def test_sbatch_file(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--with", "slurm", "--nproc", "8", "--nnodes", "4", "--gpus", "8", "--time", "1-00:00:00"]
    text = _shown(capsys, str(path), *words, "data.synthetic_classes=64")
    for line in (
        "--nodes=4",
        "--gpus-per-node=8",
        "--ntasks-per-node=1",
        "--time=1-00:00:00",
        "--requeue",
        "--signal=B:TERM@120",
    ):
        assert f"#SBATCH {line}\n" in text
    assert "partition" not in text
    (tmp_path / "job.sh").write_text(text)
    assert subprocess.run(["bash", "-n", str(tmp_path / "job.sh")], check=False).returncode == 0


@pytest.mark.parametrize("line", ["--nodes=2", "-N 2", "-n4", "--array 1-3", "--mem=1G --signal=INT@5"])
def test_a_header_cannot_change_what_the_script_depends_on(line: str) -> None:
    with pytest.raises(ConfigError, match=rf"--header: #SBATCH {line}: "):
        slurm.script(Job(Path("run.yaml")), slurm.Allocation(header=f"#SBATCH {line}\n"))
    allowed = "#SBATCH --comment=-N -p night # --nodes=2"
    assert allowed in slurm.script(Job(Path("run.yaml")), slurm.Allocation(header=f"{allowed}\n"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "8"], "--gpus: has no effect with torchrun; it belongs to --with slurm and --with kubernetes"),
        (["--time", "1:00"], "--time: has no effect with torchrun; it belongs to --with slurm"),
        (["--with", "slurm", "--image", "i"], "--image: has no effect with slurm; it belongs to --with kubernetes"),
        (["--with", "slurm", "--node-rank", "1"], "--node-rank: has no effect with slurm"),
        (["--with", "mpirun", "--max-restarts", "1"], "--max-restarts: has no effect with mpirun"),
        (["--hostfile", "hosts"], "--hostfile: has no effect with torchrun"),
        (["--nnodes", "2", "--master", "n:1", "--node-rank", "2"], "--node-rank 2: 2 machines have the numbers from 0"),
        (["--nnodes", "4:2", "--rendezvous", "c10d", "--master", "n:1"], "--nnodes 4:2: at least 4 and at most 2"),
        (
            ["--with", "slurm", "--time", "2:00", "--sbatch", "time=1:00"],
            "--sbatch time=1:00: --time 2:00 is given",
        ),
        (["--check", "--no-check"], "--check --no-check: one of them"),
        (["--nnodes", "2", "--master", "node0:99999"], "--master node0:99999: expected HOST:PORT with a port"),
        (["--nnodes", "2", "--master", "node0"], "--master node0: expected HOST:PORT"),
        (["--with", "slurm", "--mem", "400Gi"], "--mem 400Gi: slurm takes an amount such as 64G"),
        (["--with", "kubernetes", "--mem", "64GB"], "--mem 64GB: kubernetes takes an amount such as 64Gi"),
        (["--with", "slurm", "--time", "tomorrow"], "--time tomorrow: sbatch takes minutes"),
        (["--with", "slurm", "--sbatch", "reservation"], "--sbatch reservation: sbatch takes a value there"),
        (["--with", "slurm", "--container", "i", "--bind", "/data"], "--bind /data: expected HOST:FOLDER"),
        (["--with", "slurm", "--script", "/no/such/job"], "--script /no/such/job: the folder /no/such does not exist"),
    ],
)
def test_options_that_would_fail_later_or_do_nothing_are_refused(
    path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", str(path), *words, "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_sbatch_file_passes_the_linter(path: Path, tmp_path: Path) -> None:
    linter = shutil.which("shellcheck")
    if linter is None:
        pytest.skip("shellcheck is not installed (make queue-extras)")
    every = slurm.Allocation(
        modules=("cuda/12",), container="site/lce:1", mounts=("/:/",), options=("comment=two words",), cpus=4
    )
    for number, allocation in enumerate((slurm.Allocation(), every)):
        (tmp_path / f"{number}.sh").write_text(slurm.script(Job(path, ("a.b=1 2",), nnodes="2"), allocation))
    done = subprocess.run([linter, *map(str, tmp_path.glob("*.sh"))], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


FAKES = {
    "scontrol": 'if [ "$1" = show ]; then echo node0; echo node1; else echo "$@" >> "$FAKE_LOG"; fi',
    "srun": 'shift 2; SLURM_NODEID=0 exec "$@"',
    "scancel": "true",
    "python": 'echo "python $*" >> "$FAKE_LOG"; exit 75',
}


def test_sbatch_file_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script itself, under bash, with stand-ins for SLURM's commands: the words that a node runs."""
    monkeypatch.setattr("launch.slurm.python", lambda: str(tmp_path / "python"))
    (tmp_path / "more.yaml").touch()
    monkeypatch.chdir(tmp_path)
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = Job(Path("run.yaml"), ("more.yaml", "a.b=1 2"), nproc=2, nnodes="2", max_restarts=1, interface="ib0")
    (tmp_path / "job.sh").write_text(slurm.script(job, slurm.Allocation()))
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "FAKE_LOG": str(tmp_path / "log"),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_NNODES": "2",
    }
    done = subprocess.run(["bash", str(tmp_path / "job.sh")], env=environment, check=False, timeout=300)
    assert done.returncode == 75
    words = (tmp_path / "log").read_text()
    assert f"python -m tools.cli launch {path} {tmp_path / 'more.yaml'} a.b=1 2 --nproc 2 --nnodes 2 " in words
    assert "--max-restarts 1 --interface ib0 --node-rank 0 --master node0:20007\n" in words
    assert "requeue" not in words


def test_sbatch_file_is_queued_again_after_a_save(path: Path, tmp_path: Path) -> None:
    """Told to stop, the script passes it to the step once, waits for the save and queues the job again."""
    body = {
        "scancel": 'echo "scancel $*" >> "$FAKE_LOG"; pkill -TERM -f "$FAKE_STEP"; [ "$2" != --full ] || kill $PPID',
        "srun": 'exec -a "$FAKE_STEP" bash -c \'trap "sleep 1; echo saved >> $FAKE_LOG; exit 75" TERM; '
        'touch "$FAKE_LOG"; while true; do sleep 0.1; done\'',
    }
    for name, text in (FAKES | body).items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "job.sh").write_text(slurm.script(Job(path, nproc=2, nnodes="2"), slurm.Allocation(cpus=4)))
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "FAKE_LOG": str(tmp_path / "log"),
        "FAKE_STEP": f"step-{tmp_path.name}-{os.getpid()}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_NNODES": "2",
        "SLURM_CPUS_PER_TASK": "4",
    }
    started = subprocess.Popen(["bash", str(tmp_path / "job.sh")], env=environment)
    end = time.time() + 120
    while not (tmp_path / "log").exists() and time.time() < end:
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    assert started.wait(20) == 75
    assert (tmp_path / "log").read_text().splitlines() == ["scancel --signal=TERM 7", "saved", "requeue 7"]


def test_a_queue_starts_a_process_for_each_gpu(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = "data.synthetic_classes=100"  # at least one for each of 32 ranks
    text = _shown(capsys, str(path), "--with", "slurm", "--nnodes", "4", "--gpus", "8", classes)
    assert "--nproc 8 --nnodes 4" in text
    assert "#SBATCH --cpus-per-task=16\n" in text  # two for each rank; synthetic data are not decoded
    assert "cpus-per-task" not in _shown(
        capsys, str(path), "--with", "slurm", "--gpus", "8", "--exclusive", "--nnodes", "1", classes
    )


def test_what_a_cluster_wants_is_passed_through(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "header").write_text("#!/bin/bash\n#SBATCH --reservation=night\nsource /opt/site.sh\n")
    words = ["--qos", "high", "--constraint", "h100", "--mem", "64G", "--exclusive", "--module", "cuda/12", "--module"]
    words += ["gcc", "--sbatch", "comment=two words", "--sbatch", "output=logs/%j", "--sbatch", "nice"]
    text = _shown(capsys, str(path), "--with", "slurm", *words, "--header", str(tmp_path / "header"))
    lines = text.splitlines()
    for option in ("--qos=high", "--constraint=h100", "--mem=64G", "--exclusive", "--comment='two words'", "--nice"):
        assert f"#SBATCH {option}" in lines
    assert [line for line in lines if "--output" in line] == ["#SBATCH --output=logs/%j"]
    commands = [line for line in lines if not line.startswith("#")]
    assert commands[1:3] == ["module load cuda/12 gcc", "source /opt/site.sh"]
    assert lines.index("#SBATCH --reservation=night") < lines.index("module load cuda/12 gcc")
    words = ["--with", "slurm", "--container", "site/lce:1", "--bind", "/data:/data"]
    here, bound = Path.cwd(), f"{tmp_path}:{tmp_path}"
    text = _shown(capsys, str(path), *words, "--bind", bound)
    image = f"--container-image=site/lce:1 --container-mounts={here}:{here},/data:/data,{bound}"
    assert f"srun --kill-on-bad-exit=0 --wait=60 {image} --container-workdir={here}" in text
    assert main(["launch", str(path), *words, "--dry-run"]) == 2
    assert f"{path}: the container sees {here}, /data alone; add --bind {bound}" in capsys.readouterr().err
    text = _shown(capsys, str(path), "--with", "slurm", "--container", "i", "--bind", "/:/")
    assert f"--container-mounts=/:/ --container-workdir={here}" in text
    assert '"$master:$port" lce launch ' in text
    for wrong in ("nodes=3", "signal=USR1", "no such=1", "x=1\n#SBATCH --y"):
        assert main(["launch", str(path), "--with", "slurm", "--sbatch", wrong, "--dry-run"]) == 2
    assert "--nnodes says how many machines" in capsys.readouterr().err
    assert main(["launch", str(path), "--with", "slurm", "--header", str(tmp_path / "none"), "--dry-run"]) == 2


@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_a_master_that_does_not_answer_is_said_by_name(
    path: Path, rendezvous: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{probe.getsockname()[1]}"
    words = ["--nnodes", "2", "--node-rank", "1", "--master", place, "--rendezvous", rendezvous]
    assert main(["launch", str(path), *words, "run.timeout_seconds=2"]) == 2
    said = capsys.readouterr().err
    assert f"meeting 2 machines at {place}" in said
    assert f"--master {place}: not all of 2 machines met there, given up after" in said


def test_status_of_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert _status({0: 71, 1: 2}) == 2
    assert _status({0: 71, 1: 70}) == 70
    assert _status({0: 75, 1: 75}) == 75
    assert _status({0: 71, 1: -9}) == 70
    assert "rank 1 by SIGKILL" in capsys.readouterr().out


def _heed_interrupts() -> None:
    """A test run in the background has SIGINT ignored, and its children with it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _stop(path: Path, launcher: str, number: signal.Signals, status: int, *options: str) -> None:
    """A signal to `lce launch` makes the ranks save, and the same command continue."""
    words = [sys.executable, "-m", "tools.cli", "launch", str(path), "--nproc", "2", "--with", launcher]
    words += ["--interface", "lo", *options, "train.steps=100000", "checkpoint.every_steps=0", "log.every_steps=1"]
    with (path.parent / "output").open("w") as output:
        started = subprocess.Popen(
            words,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_heed_interrupts,
        )
    try:
        log, end = path.parent / "run/log.jsonl", time.time() + 150
        while not (log.exists() and len(log.read_bytes().splitlines()) > 3) and time.time() < end:
            time.sleep(0.1)
        started.send_signal(number)
        assert started.wait(100) == status, (path.parent / "output").read_text()
    finally:
        if started.poll() is None:
            started.terminate()
            started.wait(60)
    [checkpoint] = (path.parent / "run/checkpoints").iterdir()
    assert not list((path.parent / "run/ranks").glob("rank-*"))
    assert int(checkpoint.name.removeprefix("step-")) > 3
    lines = log.read_bytes()
    time.sleep(1)
    assert log.read_bytes() == lines  # nobody trains on


def _train(path: Path, launcher: str, *options: str) -> None:
    command = [sys.executable, "-m", "tools.cli", "launch", str(path), "--nproc", "2", "--with", launcher]
    done = subprocess.run(
        [*command, "--interface", "lo", *options, "train.steps=2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2 ranks" in done.stderr
    assert json.loads((path.parent / "run/summary.json").read_text())["step"] == 2


def test_deepspeed(path: Path) -> None:
    """Two ranks under DeepSpeed's own launcher."""
    pytest.importorskip("deepspeed", reason="needs DeepSpeed (extra `deepspeed`)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    _train(path, "deepspeed", "--master", f"127.0.0.1:{port}")


def test_deepspeed_is_stopped(path: Path) -> None:
    pytest.importorskip("deepspeed", reason="needs DeepSpeed (extra `deepspeed`)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    _stop(path, "deepspeed", signal.SIGTERM, 75, "--master", f"127.0.0.1:{port}")


@pytest.mark.skipif(
    not (Path(sys.executable).parent / "mpirun").exists() and not shutil.which("mpirun"), reason="no mpirun"
)
def test_mpirun(path: Path) -> None:
    """Two ranks under a real mpirun: mpi4py tells them who they are, gloo joins them."""
    pytest.importorskip("mpi4py", reason="needs mpi4py (extra `mpi`)")
    _train(path, "mpirun")


@pytest.mark.skipif(
    not (Path(sys.executable).parent / "mpirun").exists() and not shutil.which("mpirun"), reason="no mpirun"
)
def test_mpirun_is_stopped(path: Path) -> None:
    pytest.importorskip("mpi4py", reason="needs mpi4py (extra `mpi`)")
    _stop(path, "mpirun", signal.SIGINT, 130)
