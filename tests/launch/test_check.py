"""What is opened in one process before ranks start: by `lce launch --check`, which starts none, and by every launch."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.job import Job
from tests.data.samples import packed
from tools.cli import main
from trainer.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.slow


@pytest.fixture
def configured(tmp_path: Path) -> Path:
    settings: dict[str, Any] = {
        "run": {"dir": str(tmp_path / "run"), "device": "cpu"},
        "data": {"path": str(packed(tmp_path / "faces", classes=4, images=5, size=(16, 16))), "batch_size": 4},
        "backbone": {"name": "small", "width": 4, "dim": 4},
        "train": {"epochs": 2},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "run.yaml"


def test_a_run_that_can_start_is_described(configured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", str(configured), "--nproc", "2", "--check"]) == 0
    out = capsys.readouterr().out
    assert "20 images of 4 classes" in out
    assert "ranks: 2, updates: 10" in out
    assert "memory of a rank" in out
    assert "free" in out
    assert "torchrun" not in out
    assert main(["launch", str(configured), "--nproc", "2", "--check", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.index("20 images of 4 classes") < out.index("--nproc-per-node=2")
    assert main(["launch", str(configured), "--check", "--dry-run", "data.path=nowhere"]) == 2
    assert "torchrun" not in capsys.readouterr().out
    assert not (configured.parent / "run").exists()


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("data.path=nowhere", "data.path = nowhere: no such data set folder"),
        ("backbone.name=resnet50", "known"),
        ("backbone.weights=nowhere.pt", "backbone.weights = nowhere.pt: no such file"),
        (
            "compat.method=lce",
            "compat.bank is missing and has no default: centre bank of the old model (`lce centers …`)",
        ),
        ("data.labels=nowhere.npy", "data.labels = nowhere.npy: no such file"),
        ("compat.method=lce compat.bank=nowhere", "compat.bank = nowhere: no such folder"),
        ("compat.method=l2 compat.old_embeddings=nowhere", "compat.old_embeddings = nowhere: no such file"),
        ("compat.method=l2 compat.old_model=nowhere", "compat.old_model = nowhere: no such file or folder"),
        ("head.weights=nowhere", "launch: head.weights = nowhere: no such file"),
        ("evaluate.every_steps=1 evaluate.sets.unseen=nowhere", "evaluate.sets.unseen = nowhere: no such data set"),
        ("evaluate.every_steps=1 evaluate.sets.unseen=here@nowhere.npy", "launch: evaluate.sets.unseen: "),
        ("data.path=README.md", "data.path = README.md: is a file; give the data set's folder"),
        ("data.labels=README.md", "data.labels = README.md: is no .npy file"),
        ("--node-rank 2 --nnodes 2 --master localhost:29500", "--node-rank 2: 2 machines have the numbers from 0 on"),
        ("--with slurm --nproc 4 --gpus 2", "--nproc 4 --gpus 2: each rank needs a GPU of its own"),
        ("--nnodes 2:1 --rendezvous c10d --master localhost:29500", "--nnodes 2:1: at least 2 and at most 1"),
        ("run.dir=/proc/x", "run.dir"),
        ("--interface nothere0", "--interface nothere0: this machine has no such network interface; it has lo"),
    ],
)
def test_what_training_would_refuse_is_refused(
    configured: Path, word: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", str(configured), "--check", *word.split()]) == 2
    err = capsys.readouterr().err
    assert reason in err
    assert len(err.splitlines()) == 1
    assert not (configured.parent / "run").exists()


def test_a_bank_is_named(configured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    np.save(configured.parent / "old.npy", np.eye(4, dtype=np.float32)[np.arange(20) % 4])
    words = ["centers", "from-embeddings", str(configured.parent / "old.npy"), str(configured.parent / "bank")]
    data = yaml.safe_load(configured.read_text())["data"]["path"]
    assert main([*words, "--dataset", data, "--allow-collapsed"]) == 0
    bank = f"compat.bank={configured.parent / 'bank'}"
    assert main(["launch", str(configured), "--check", "compat.method=lce", bank]) == 0
    assert "centre bank: of the model" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("node0 slots=2\nmachines of the lab", "line 2: 'machines of the lab'; it has a line `host slots=N`"),
        ("# none\n", "names no machine"),
        ("node0 slots=0\nnode1", "line 1: 'node0 slots=0'; it has a line"),
        ("-x slots=2\nnode1", "line 1: '-x slots=2'; it has a line"),
        ("node0\nnode1\nnode0", "line 3: node0 stands there twice"),
        ("node0 slots=4", "names 1 machine(s), 1 of them with 1 or more slots; --nnodes 2 --nproc 1 needs 2"),
        (None, "is a folder, not a file; it has a line `host slots=N`"),
    ],
)
def test_a_host_file_is_read(
    configured: Path, text: str | None, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hosts = configured.parent / "hosts"
    words = ["launch", str(configured), "--with", "mpirun", "--nnodes", "2", "--hostfile", str(hosts), "--check"]
    hosts.write_text("node0 slots=2 max_slots=4 # the first\nnode1\n")
    assert main(words) == 0
    hosts.unlink()
    hosts.mkdir() if text is None else hosts.write_text(text)
    assert main(words) == 2
    assert f"--hostfile {hosts}: {reason}" in capsys.readouterr().err


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs whose ranks would have been started."""
    jobs: list[Job] = []

    def start(job: Job) -> int:
        jobs.append(job)
        return 0

    for launcher in ("torchrun", "mpirun", "deepspeed"):
        monkeypatch.setattr(f"launch.{launcher}.run", start)
    return jobs


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun", "deepspeed", "slurm"])
@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("data.path=nowhere", "nowhere: no such data set folder"),
        ("compat.method=lce compat.bank=nowhere", "nowhere"),
        ("backbone.weights=nowhere.pt", "nowhere.pt: no such file"),
        ("--nproc 64", "64 ranks for 4 classes: a rank would own none; start at most 4"),
    ],
)
def test_what_is_wrong_costs_one_line_and_no_rank(
    configured: Path, launcher: str, words: str, reason: str, started: list[Job], capsys: pytest.CaptureFixture[str]
) -> None:
    script = ["--nproc", "1", "--script", str(configured.parent / "job.sh")] if launcher == "slurm" else []
    assert main(["launch", str(configured), "--with", launcher, *script, *words.split()]) == 2
    err = capsys.readouterr().err
    assert reason in err
    assert len(err.splitlines()) == 1
    assert not started
    assert not (configured.parent / "run").exists()


def test_a_right_configuration_starts(configured: Path, started: list[Job]) -> None:
    assert main(["launch", str(configured), "--nproc", "2"]) == 0
    assert [job.nproc for job in started] == [2]


def test_data_that_only_the_computing_machines_have(configured: Path, started: list[Job]) -> None:
    assert main(["launch", str(configured), "data.path=nowhere", "--no-check"]) == 0
    assert len(started) == 1


def test_no_rank_is_none_to_start(configured: Path, started: list[Job], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["launch", str(configured), "--nproc", "0"])
    assert ended.value.code == 2
    assert "--nproc" in capsys.readouterr().err.splitlines()[-1]
    assert not started


def test_a_file_within_a_data_set_is_named_with_the_key_of_the_set(
    configured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = Path(yaml.safe_load(configured.read_text())["data"]["path"]) / "labels.npy"
    labels.unlink()
    assert main(["launch", str(configured), "--check"]) == 2
    assert f"launch: data.path: {labels}: " in capsys.readouterr().err


def test_the_state_of_the_run_folder_is_told(configured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from trainer.distributed import Ranks
    from trainer.run.config import load_config
    from trainer.run.engine import train

    words = ["data.loader=torch", "data.workers=0", "log.tensorboard=false", "data.augment.flip=0"]
    train(load_config(configured, words), Ranks())
    capsys.readouterr()
    assert main(["launch", str(configured), *words, "--check"]) == 0
    assert "run folder: finished already; there is nothing to do" in capsys.readouterr().out
    assert main(["launch", str(configured), *words, "--check", "optimizer.lr=0.3"]) == 2
    assert "finished already, with other settings (optimizer.lr" in capsys.readouterr().err
    assert main(["launch", str(configured), *words, "--check", "train.epochs=3"]) == 0
    assert "run folder: continues from step-00000010" in capsys.readouterr().out
    assert main(["launch", str(configured), *words, "--check", "train.epochs=3", "checkpoint.resume=never"]) == 2
    assert "was used before, and checkpoint.resume=never" in capsys.readouterr().err
    assert main(["launch", str(configured), *words, "--check", "checkpoint.resume=never"]) == 2
    assert "was used before, and checkpoint.resume=never" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"was used before, and checkpoint\.resume=never"):
        train(load_config(configured, [*words, "checkpoint.resume=never"]), Ranks())
    assert main(["launch", str(configured), *words, "--check", "train.epochs=3", "backbone.dim=6"]) == 2
    assert "module.backbone.embed.weight is (4, 32), this run needs (6, 32)" in capsys.readouterr().err
    assert main(["launch", str(configured), *words, "--check", "train.epochs=3", "optimizer.lr=0.3"]) == 0
    assert "changed since then: optimizer.lr: 0.1 → 0.3" in capsys.readouterr().out
    (configured.parent / "run" / "summary.json").unlink()
    fewer = [*words, "train.steps=7"]
    assert main(["launch", str(configured), *fewer, "--check"]) == 2
    said = "step-00000010: has made 10 updates, and this run is to have 7: "
    assert said in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=said):
        train(load_config(configured, fewer), Ranks())
    other = f"data.path={packed(configured.parent / 'other', classes=4, images=6, size=(16, 16))}"
    assert main(["launch", str(configured), *words, "--check", "train.epochs=3", other]) == 2
    assert "was taken with another data set" in capsys.readouterr().err


def test_cross_model_training_gets_no_figures_of_a_network(
    configured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    rows = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    for name in ("old", "new"):
        np.save(configured.parent / f"{name}.npy", rows)
    settings = yaml.safe_load(configured.read_text())
    del settings["backbone"]
    files = {f"{name}_embeddings": str(configured.parent / f"{name}.npy") for name in ("old", "new")}
    settings["compat"] = {"method": "lce", "mode": "cross-model", **files}
    configured.write_text(yaml.safe_dump(settings))
    assert main(["launch", str(configured), "--check"]) == 0
    out = capsys.readouterr().out
    assert "maps alone" in out
    assert "lce plan" not in out
