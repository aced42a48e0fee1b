"""Launchers that are programs of their own: what signals do to them, and what is said of their ranks."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from launch.child import run_launcher, submit
from launch.deepspeed import _users_file
from trainer.errors import ConfigError
from trainer.run.folder import RunSummary
from trainer.run.watch import ranks_lost
from trainer.seals import sealed


def _note(run: Path, rank: int, pid: int, host: str = "") -> Path:
    path = run / "ranks" / f"rank-{rank:05d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    note = {"rank": rank, "pid": pid, "host": host or socket.gethostname(), "time": time.time()}
    path.write_text(json.dumps(note))
    return path


def _dead() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def _soon(number: signal.Signals) -> None:
    threading.Timer(0.5, os.kill, (os.getpid(), number)).start()


def test_ranks_that_still_save_are_waited_for(tmp_path: Path) -> None:
    began = time.time() - 1
    assert ranks_lost(tmp_path, began) == []
    _note(tmp_path, 1, _dead())
    assert ranks_lost(tmp_path, began) == [1]
    mine, other = _note(tmp_path, 0, os.getpid()), _note(tmp_path, 2, 1, "elsewhere")
    for path in (mine, other, tmp_path / "ranks/rank-00001.json"):
        threading.Timer(0.6, path.unlink).start()
    assert ranks_lost(tmp_path, began) == []
    assert ranks_lost(tmp_path, time.time() + 60) == []


def test_without_a_rank_in_the_loop_the_launcher_is_ended(tmp_path: Path) -> None:
    _soon(signal.SIGTERM)
    assert run_launcher(["sleep", "60"], {}, tmp_path) == 75


def test_ranks_that_cannot_be_asked_are_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = threading.Timer(0.2, _note, (tmp_path, 0, _dead()))
    began.start()
    (tmp_path / "ranks/stop").mkdir(parents=True)
    _soon(signal.SIGTERM)
    assert run_launcher(["sleep", "60"], {}, tmp_path) == 70
    said = capsys.readouterr().out
    assert "the ranks cannot be asked to save" in said
    assert "rank 0 ended before the checkpoint was complete" in said


@pytest.mark.parametrize(
    ("script", "status", "said"),
    [
        ("exit 137", 70, "lce launch: killed: a rank by SIGKILL\n"),
        (
            "kill -9 $$",
            70,
            "lce launch: bash was killed by SIGKILL before the run had ended; the same command continues\n",
        ),
        ("exit 130", 130, ""),
        ("exit 75", 75, ""),
        ("exit 1", 1, ""),
    ],
)
def test_a_rank_or_a_launcher_that_was_killed_is_70_where_nothing_was_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], script: str, status: int, said: str
) -> None:
    assert run_launcher(["bash", "-c", script], {}, tmp_path) == status
    assert capsys.readouterr().out == said


def test_a_status_of_0_is_believed_where_the_run_has_come_to_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DeepSpeed's own says 0 when the process that started the ranks was killed."""

    def status(script: str = "exit 0") -> int:
        return run_launcher(["bash", "-c", script], {}, tmp_path)

    assert status() == 70  # nothing was saved
    assert "bash ended before the run had ended; the same command continues" in capsys.readouterr().out
    summary = RunSummary("finished", 0, str(tmp_path), 8, 8, 0, 1.0, {})
    (tmp_path / "summary.json").write_text(json.dumps(sealed(asdict(summary))))
    assert status() == 0
    assert capsys.readouterr().out == ""
    (tmp_path / "checkpoints/step-00000008").mkdir(parents=True)
    assert status() == 0
    later = tmp_path / "checkpoints/step-00000009"  # continued for more updates, and saved
    assert status(f"mkdir {later}") == 75
    assert status(f"touch {later}; kill -9 $$") == 75
    assert "bash was killed by SIGKILL" in capsys.readouterr().out
    os.utime(later, (time.time() - 60, time.time() - 60))  # of an earlier start
    assert status() == 70
    later.rmdir()
    note = _note(tmp_path, 0, _dead())
    note.write_text(json.dumps(json.loads(note.read_text()) | {"time": time.time() + 60}))
    assert status() == 70
    assert "rank 0 ended before the checkpoint was complete" in capsys.readouterr().out


def test_what_nohup_ignores_stays_ignored(tmp_path: Path) -> None:
    kept = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        _soon(signal.SIGHUP)
        assert run_launcher(["sleep", "1"], {}, None) == 0
    finally:
        signal.signal(signal.SIGHUP, kept)


def test_the_users_environment_for_deepspeed_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DS_ENV_FILE", raising=False)
    assert _users_file() == ""
    (tmp_path / ".deepspeed_env").write_text("NCCL_DEBUG=INFO")
    assert "NCCL_DEBUG=INFO\n" in _users_file()


def test_a_job_file_replaces_no_other_file(tmp_path: Path) -> None:
    mine = tmp_path / "lce.yaml"
    mine.write_text("run: { dir: runs/x }\n")
    with pytest.raises(ConfigError, match=r"lce\.yaml: exists and is no job file of lce launch; name another with"):
        submit("kind: TrainJob\n", mine, ["true"])
    assert mine.read_text() == "run: { dir: runs/x }\n"
    for text in ("kind: TrainJob\n", "#!/bin/bash\n#SBATCH --requeue\n"):
        path = tmp_path / f"job-{len(text)}"
        for _ in range(2):  # its own file is replaced
            submit(text, path, ["true"])
        lines = path.read_text().splitlines()
        assert [line for line in lines if line != "# written by lce launch"] == text.splitlines()
        assert lines[0].startswith("#!") == text.startswith("#!")
    with pytest.raises(ConfigError, match=r"--script .*nowhere/x: cannot be written: No such file"):
        submit("text", tmp_path / "nowhere" / "x", ["true"])
