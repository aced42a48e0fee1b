"""What is wrong with the network is said by name: an interface, a master that is unknown, one that does not answer."""

import socket

import pytest

from trainer.distributed import process_group
from trainer.errors import ConfigError

HOST = socket.gethostname()


@pytest.fixture(autouse=True)
def _second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    settings = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)


def refusal(seconds: float = 2.0) -> str:
    with pytest.raises(ConfigError) as caught, process_group("cpu", seconds):
        pass
    return str(caught.value)


def test_an_interface_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    said = refusal(600)
    assert f"GLOO_SOCKET_IFNAME=nosuch0: {HOST} has no such network interface" in said
    assert all(name in said for _, name in socket.if_nameindex())


def test_an_unknown_master(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    assert f"MASTER_ADDR=no-such-host.invalid: unknown on {HOST}" in refusal(600)


def test_a_master_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    # An interface that is there, several names and a leading sign are no reason.
    present = socket.if_nameindex()[0][1]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", f"nosuch0,{present}")
    said = refusal()
    assert f"rank 1 on {HOST}: no group of 2 ranks by the master 127.0.0.1:" in said
    assert "within 2 s" in said
