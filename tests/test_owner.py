"""One owner at a time: held here, gone, on another machine, without locks, with partners."""

import fcntl
import json
import multiprocessing as mp
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from trainer import owner
from trainer.errors import DataError
from trainer.owner import Launcher, Owner, OwnerInfo, owned, started

HOLD = """
import sys, time
from pathlib import Path
from trainer.errors import DataError
from trainer.owner import owned
with owned(Path(sys.argv[1]), DataError, partners=sys.argv[2]):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(target: Path, partners: str = "") -> Iterator["subprocess.Popen[str]"]:
    """Another process that owns ``target``."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(target), partners], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(owner, "BEAT_SECONDS", 0.1)
    return tmp_path / "bank"


def lock_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.owner")


def test_a_second_owner_is_refused_by_the_first_ones_name(target: Path) -> None:
    with holder(target) as process, pytest.raises(DataError, match=rf"in use by .*process {process.pid} of .* on "):
        owned(target, DataError).__enter__()


def test_what_a_killed_owner_leaves_is_taken_over_and_nothing_stays(target: Path) -> None:
    with holder(target) as process:
        process.kill()
        process.wait()
        assert lock_of(target).exists()
        with owned(target, DataError):
            assert json.loads(lock_of(target).read_text())["pid"] == os.getpid()
            with owned(target, DataError):  # again, in the same thread
                pass
            assert lock_of(target).exists()
        assert not lock_of(target).exists()


def test_a_stopped_owner_is_still_the_owner(target: Path) -> None:
    with holder(target) as process:
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.5)  # more than three beats
        with pytest.raises(DataError, match="in use by"):
            owned(target, DataError).__enter__()


def test_another_thread_is_another_owner(target: Path) -> None:
    problems: list[Exception] = []

    def other() -> None:
        try:
            owned(target, DataError).__enter__()
        except DataError as error:
            problems.append(error)

    with owned(target, DataError):
        thread = threading.Thread(target=other, daemon=True)
        thread.start()
        thread.join()
    assert "in use by" in str(problems[0])


def test_partners_share_and_exclude_all_others(target: Path) -> None:
    with holder(target, "pack in 3 parts"):
        with owned(target, DataError, partners="pack in 3 parts"):
            assert lock_of(target).exists()
        assert lock_of(target).exists()  # the other one still holds it
        for others in ("", "pack in 4 parts"):
            with pytest.raises(DataError, match="in use by"):
                owned(target, DataError, partners=others).__enter__()
    with owned(target, DataError):
        pass
    assert not lock_of(target).exists()


def test_a_forked_child_does_not_keep_the_lock(target: Path) -> None:
    context = mp.get_context("fork")
    with owned(target, DataError):
        child = context.Process(target=time.sleep, args=(30,))
        child.start()
    try:
        with owned(target, DataError):
            pass
    finally:
        child.kill()
        child.join()


def _elsewhere(target: Path) -> None:
    lock_of(target).write_text(json.dumps(asdict(replace(OwnerInfo.mine(), host="elsewhere"))))


@contextmanager
def beating(target: Path) -> Iterator[None]:
    """An owner on another machine that renews the file's time."""
    end = threading.Event()

    def beat() -> None:
        while not end.wait(0.05):
            os.utime(lock_of(target))

    _elsewhere(target)
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


@pytest.mark.parametrize("locks", ["local", "none", "kept by the server"])
def test_an_owner_elsewhere_counts_while_it_beats(target: Path, locks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where locks do not reach other machines, do not exist, or outlive a machine."""
    server: list[object] = []
    if locks == "none":

        def refuse(*_: object) -> None:
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr("fcntl.flock", refuse)
    _elsewhere(target)
    if locks == "kept by the server":
        import fcntl

        file = lock_of(target).open("rb")
        fcntl.flock(file, fcntl.LOCK_EX)
        server.append(file)
    with beating(target), pytest.raises(DataError, match="on elsewhere"):
        owned(target, DataError).__enter__()
    with owned(target, DataError):  # three beats later it is gone
        assert json.loads(lock_of(target).read_text())["pid"] == os.getpid()


def test_no_locks_are_printed_and_a_live_process_here_is_the_owner(
    target: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    with holder(target):
        monkeypatch.setattr("fcntl.flock", refuse)
        with pytest.raises(DataError, match="in use by"):
            owned(target, DataError).__enter__()
        assert "this file system has no locks" in capsys.readouterr().err


def test_an_owner_that_was_taken_over_ends(target: Path) -> None:
    code = HOLD.replace("with owned", "import trainer.owner; trainer.owner.BEAT_SECONDS = 0.1\nwith owned")
    words = [sys.executable, "-c", code, str(target), ""]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    lock_of(target).unlink()
    _, problem = process.communicate(timeout=300)
    assert process.returncode == 70
    assert "taken over while this process was silent" in problem


def test_a_process_number_that_is_used_again_is_not_the_owner(target: Path) -> None:
    assert OwnerInfo.mine().lives
    assert not replace(OwnerInfo.mine(), started="another boot:1").lives
    lock_of(target).write_text(json.dumps(asdict(replace(OwnerInfo.mine(), started="another boot:1"))))
    with owned(target, DataError):
        pass


@pytest.mark.parametrize("kind", ["fifo", "folder", "link", "junk"])
def test_something_else_under_the_locks_name_is_an_error_or_nothing(target: Path, kind: str) -> None:
    lock, victim = lock_of(target), target.with_name("victim")
    if kind == "junk":
        lock.write_bytes(b"\xff[[[")
        with owned(target, DataError):
            return
    victim.write_text("precious")
    {"fifo": lambda: os.mkfifo(lock), "folder": lock.mkdir, "link": lambda: lock.symlink_to(victim)}[kind]()
    with pytest.raises(DataError, match="cannot be written"):
        owned(target, DataError).__enter__()
    assert victim.read_text() == "precious"


def test_an_owner_ends_with_the_command_behind_its_launcher() -> None:
    """DeepSpeed's own processes outlive the ``lce launch`` that started them."""
    first = subprocess.Popen(["sleep", "60"])
    launcher = Launcher(os.getppid(), f"{first.pid}:{started(first.pid)}")
    info = OwnerInfo.mine(launcher=launcher)
    assert launcher.lives(os.getpid())
    assert info.lives
    assert not info.ending
    first.kill()
    first.wait()
    assert not launcher.lives(os.getpid())
    assert info.ending
    assert not Launcher(os.getppid(), f"{os.getpid()}:another start").lives(os.getpid())
    assert not OwnerInfo.mine().ending


def test_a_partner_that_comes_while_another_holds_the_lock_alone_for_a_moment_is_taken_in(tmp_path: Path) -> None:
    """Two jobs of one packing that start together: the first takes the lock alone before it shares it."""
    lock = tmp_path / ".owner"
    first = Owner(tmp_path, lock, OwnerInfo.mine("plan in 2 parts"), DataError)
    first.take()
    fcntl.flock(first._descriptor, fcntl.LOCK_EX)
    moment = threading.Timer(0.3, fcntl.flock, (first._descriptor, fcntl.LOCK_SH))
    moment.start()
    try:
        with owned(tmp_path, DataError, lock=lock, partners="plan in 2 parts"):
            moment.join()
        with pytest.raises(DataError, match="in use by"), owned(tmp_path, DataError, lock=lock, partners="another"):
            pass
    finally:
        moment.join()
        first.release()
