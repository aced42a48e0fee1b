"""What is left when ranks are interrupted, killed, fail or hang: a checkpoint, the first reason, the same run."""

import json
import multiprocessing as mp
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from tests.ranks import _child, _context
from tests.runs import config, log_of, losses_of, train_rank, tree
from trainer.checkpoint_folder import list_checkpoints
from trainer.distributed import Ranks
from trainer.run.engine import train
from trainer.run.watch import Watch

ROOT = Path(__file__).parents[2]


def _start(
    folder: Path, fault: str = "none:0:0", slow: float = 0.0, ranks: int = 2, restarts: int = 0, **changes: object
) -> "subprocess.Popen[str]":
    """A launcher with ranks that fail as told (tests/faulty.py), in ``folder/run``."""
    settings = tree(folder / "run", **changes)
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    environment = os.environ | {
        "FAULT": fault,
        "SLOW": str(slow),
        "PYTHONPATH": str(ROOT),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    words = [sys.executable, "-m", "tests.faulty", str(folder / "run.yaml"), str(ranks), str(restarts)]
    return subprocess.Popen(
        words, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _wait_for_step(folder: Path, step: int, limit_seconds: float = 300.0) -> None:
    end = time.time() + limit_seconds
    log = folder / "run/log.jsonl"
    while time.time() < end:
        if log.exists() and len(log.read_text().splitlines()) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step} in {limit_seconds} s")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_saves_and_the_same_command_continues(tmp_path: Path, number: signal.Signals, status: int) -> None:
    started = _start(tmp_path, slow=0.1, train__steps=200)
    _wait_for_step(tmp_path, 3)
    started.send_signal(number)
    output, _ = started.communicate(timeout=300)
    assert started.returncode == status, output
    done = len(log_of(tmp_path / "run"))
    assert 3 <= done < 200
    assert [p.name for p in list_checkpoints(tmp_path / "run/checkpoints")] == [f"step-{done:08d}"]
    assert "Traceback" not in output
    train(config(tmp_path / "run", train__steps=done + 4), Ranks())
    assert [line["step"] for line in log_of(tmp_path / "run")] == list(range(1, done + 5))


def test_ranks_killed_before_they_saved_are_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "2")
    started = _start(tmp_path, "hang:1:4")
    _wait_for_step(tmp_path, 4)
    started.send_signal(signal.SIGTERM)
    output, _ = started.communicate(timeout=300)
    assert started.returncode == 70, output
    assert "ended before the checkpoint was complete; the same command continues from the one before" in output


def _waiting(folder: Path, asked: bool) -> None:
    """A rank whose main thread waits for the device, as it does on CUDA behind a broken collective."""
    from trainer.run import watch

    watch.BEAT_SECONDS, watch.STUCK_SECONDS, watch.SILENT_SECONDS = 0.2, 0.5, 1.5
    with watch.Watch(folder, Ranks(0, 2), 600) as mine:
        mine.at(4, "forward")
        if asked:
            watch.ask_to_stop(folder.parent, signal.SIGTERM)
        time.sleep(30)


@pytest.mark.parametrize("asked", [False, True])
def test_a_rank_that_waits_for_its_device_leaves_when_another_has_gone(
    tmp_path: Path, asked: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """Another one failed, and says so; or it was killed, and we are told to stop."""
    folder = tmp_path / "ranks"
    folder.mkdir()
    reason = None if asked else "ValueError: a defect"
    note = {"rank": 1, "step": 4, "phase": "data", "host": "h", "pid": 1, "time": time.time(), "echo": False}
    (folder / "rank-00001.json").write_text(json.dumps(note | {"reason": reason}))
    if not asked:
        (folder / "failed").touch()
    process = mp.get_context("fork").Process(target=_waiting, args=(folder, asked))
    process.start()
    process.join(300)
    assert process.exitcode == 71
    words = "rank 1 ended without a message" if asked else "stopped because rank 1 failed in step 4, data: ValueError"
    assert words in capfd.readouterr().err


def test_a_rank_does_not_take_itself_or_a_stalled_file_system_for_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.run.watch.SILENT_SECONDS", 0.0)
    alone = Watch(tmp_path, Ranks(0, 2), 600)
    alone.stop_signal = signal.SIGTERM
    alone._write()
    assert [alone._gone() for _ in range(3)] == [None] * 3
    other = Watch(tmp_path, Ranks(1, 2), 600)
    other._write()
    assert alone._gone() is None
    alone._looked -= 60  # it was itself kept from looking
    assert alone._gone() is None
    assert "rank 1 ended without a message" in (alone._gone() or "")


def _interrupted(folder: Path, second: signal.Signals) -> None:
    from trainer.run import watch

    watch.AGAIN_SECONDS = 0.2
    with watch.Watch(folder, Ranks(0, 1), 600) as mine:
        for step in range(2):  # an update takes 4 s: Ctrl-C leaves 12
            mine.at(step, "data")
            mine._since -= 4
        for number in (signal.SIGINT, second):
            os.kill(os.getpid(), number)
            time.sleep(0.5)
        time.sleep(600)


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])  # the latter is what torchrun makes of it
def test_a_second_interruption_ends_a_rank_at_once(
    tmp_path: Path, second: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    process = mp.get_context("fork").Process(target=_interrupted, args=(tmp_path / "ranks", second))
    process.start()
    process.join(300)
    assert process.exitcode == 130
    assert "interrupted twice" in capfd.readouterr().err


def test_a_killed_rank_is_started_again_from_the_checkpoint(tmp_path: Path) -> None:
    started = _start(tmp_path, "kill:1:6", restarts=1, checkpoint__every_steps=2, checkpoint__asynchronous=False)
    output, _ = started.communicate(timeout=400)
    assert started.returncode == 0, output
    assert "step 6 of 8" in output
    assert "rank 1 ended without a message" in output
    train(config(tmp_path / "whole"), Ranks())
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(tmp_path / "whole"), rel=1e-9)


def test_the_first_reason_reaches_every_rank(tmp_path: Path) -> None:
    started = _start(tmp_path, "raise:1:4", ranks=3)
    output, _ = started.communicate(timeout=400)
    assert started.returncode == 70, output
    assert output.count("stopped because rank 1 failed in step 4, data: ValueError: a defect for the test") == 2
    assert output.count("Traceback") == 1


def test_an_error_of_the_user_keeps_its_status(tmp_path: Path) -> None:
    started = _start(tmp_path, "data:1:2")
    output, _ = started.communicate(timeout=400)
    assert started.returncode == 2, output
    assert "trainer, rank 1: record 5 is damaged" in output
    assert "Traceback" not in output


def test_a_hang_ends_and_names_the_rank(tmp_path: Path) -> None:
    started = _start(tmp_path, "hang:1:4", run__timeout_seconds=3.0)
    output, _ = started.communicate(timeout=400)
    assert started.returncode == 70, output
    assert "rank 1 did not arrive: it is in step 4, data" in output


def _attempt(folder: Path, changes: dict[str, object], world: int, seconds: float | None) -> bool:
    """Two or more ranks; after ``seconds`` in the loop all are killed. Whether they came to the end."""
    with tempfile.TemporaryDirectory() as store:
        out = _context.Queue()
        processes = [
            _context.Process(
                target=_child, args=(train_rank, r, world, f"{store}/store", (folder, changes), out), daemon=True
            )
            for r in range(world)
        ]
        for process in processes:
            process.start()
        if seconds is not None:
            end = time.time() + 120
            while not (folder / "log.jsonl").exists() and time.time() < end:
                time.sleep(0.01)
            mp.connection.wait([p.sentinel for p in processes], timeout=seconds)
            for process in processes:
                process.kill()
        for process in processes:
            process.join(60)
        return all(p.exitcode == 0 for p in processes)


def test_killed_at_random_moments_it_is_still_the_same_run(tmp_path: Path) -> None:
    """Groups of 1 to 3 ranks killed at seeded random moments; the losses are those of an undisturbed run."""
    changes: dict[str, object] = {"train__steps": 60, "checkpoint__every_steps": 3, "head__sample_rate": 0.5}
    train(config(tmp_path / "whole", **changes), Ranks())
    moments = random.Random(5)
    kills = 0
    for _ in range(12):
        if _attempt(tmp_path / "run", changes, moments.randint(1, 3), moments.uniform(0.0, 0.4)):
            break
        kills += 1
    assert _attempt(tmp_path / "run", changes, 2, None)
    assert kills >= 3
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(tmp_path / "whole"), rel=1e-8)
