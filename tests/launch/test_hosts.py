"""Several hosts: network namespaces with addresses of their own, joined by a bridge, train together by torchrun."""

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.runs import losses_of, tree

ROOT = Path(__file__).parent.parent.parent
_NUMBER = itertools.count()
NETWORK = {"backbone__name": "small", "data__synthetic_size": 16}


def _ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0


@pytest.fixture
def hosts() -> Iterator[Callable[[int], list[str]]]:
    """Makes N namespaces 10.77.0.1 … N, each with an interface ``eth0`` on one bridge; removes them afterwards."""
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed")
    # A namespace goes away some time after it was deleted, and its links with it: no two tests use the same names.
    prefix, made = f"lce{os.getpid() % 100000}n{next(_NUMBER)}", []
    bridge = f"{prefix}b"

    def make(count: int) -> list[str]:
        if not _ip("link", "add", bridge, "type", "bridge"):
            pytest.skip("network namespaces are not permitted here")
        _ip("link", "set", bridge, "up")
        for number in range(1, count + 1):
            name, outer = f"{prefix}-{number}", f"{prefix}v{number}"
            if not _ip("netns", "add", name):
                pytest.skip("network namespaces are not permitted here")
            made.append(name)
            assert _ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", name)
            assert _ip("link", "set", outer, "master", bridge)
            assert _ip("link", "set", outer, "up")
            for words in (
                ["addr", "add", f"10.77.0.{number}/24", "dev", "eth0"],
                ["link", "set", "eth0", "up"],
                ["link", "set", "lo", "up"],
            ):
                assert _ip("-n", name, *words)
        return made

    yield make
    for number, name in enumerate(made, 1):
        _ip("link", "del", f"{prefix}v{number}")
        _ip("netns", "del", name)
    _ip("link", "del", bridge)


def _start(host: str, number: int, count: int, path: Path, *words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tools.cli", "launch", str(path), "--nproc", "1", "--nnodes", str(count)]
    command += ["--node-rank", str(number), "--master", "10.77.0.1:29500", "--interface", "eth0", *words]
    return subprocess.Popen(
        ["ip", "netns", "exec", host, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("count", [2, 3])
def test_hosts_train_together(hosts: Callable[[int], list[str]], tmp_path: Path, count: int) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree(tmp_path / "run", **NETWORK)))
    started = [_start(host, n, count, tmp_path / "run.yaml") for n, host in enumerate(hosts(count))]
    outputs = [process.communicate(timeout=200)[0] for process in started]
    assert [process.returncode for process in started] == [0] * count, outputs
    assert f"{count} ranks" in outputs[0]
    assert len(losses_of(tmp_path / "run")) == 8


def test_a_host_that_is_cut_off(hosts: Callable[[int], list[str]], tmp_path: Path) -> None:
    """The other one ends by the timeout and says which rank went silent; the checkpoint before is whole."""
    settings = tree(
        tmp_path / "run", run__timeout_seconds=5.0, train__steps=100000, checkpoint__every_steps=5, **NETWORK
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    first, second = hosts(2)
    started = [_start(host, n, 2, tmp_path / "run.yaml") for n, host in enumerate((first, second))]
    try:
        end = time.time() + 120
        while not list(tmp_path.glob("run/checkpoints/step-*")) and time.time() < end:
            time.sleep(0.2)
        assert _ip("-n", second, "link", "set", "eth0", "down")
        output, _ = started[0].communicate(timeout=400)
        assert started[0].returncode not in (0, 1, 2), output
        assert "no progress for" in output or "rank 1" in output, output
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert list(tmp_path.glob("run/checkpoints/step-*"))


@pytest.mark.slow
def test_training_goes_on_with_the_host_that_is_left(hosts: Callable[[int], list[str]], tmp_path: Path) -> None:
    steps = 1500
    settings = tree(tmp_path / "run", train__steps=steps, checkpoint__every_steps=10, **NETWORK)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    names = hosts(2)
    words = ["--nnodes", "1:2", "--rendezvous", "c10d", "--max-restarts", "2"]
    started = [_start(host, n, 2, tmp_path / "run.yaml", *words) for n, host in enumerate(names)]
    try:
        end = time.time() + 120
        while not list(tmp_path.glob("run/checkpoints/step-*")) and time.time() < end:
            time.sleep(0.2)
        inside = subprocess.run(["ip", "netns", "pids", names[1]], capture_output=True, text=True, check=True)
        for pid in map(int, inside.stdout.split()):
            os.kill(pid, signal.SIGKILL)
        output, _ = started[0].communicate(timeout=300)
        assert started[0].returncode == 0, output
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert "2 ranks" in output, output
    assert "1 rank" in output.split("2 ranks", 1)[1], output
    assert len(losses_of(tmp_path / "run")) == steps
