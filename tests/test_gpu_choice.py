"""Which GPU a rank takes, where launchers show each rank all of them or its own alone."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist

from trainer.distributed import _join, choose_device
from trainer.errors import ConfigError
from trainer.head.sizes import chunk_rows


@pytest.fixture(autouse=True)
def _one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    slurm = ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_GPU_BIND")
    for name in (*slurm, "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "CUDA_VISIBLE_DEVICES", "RANK"):
        monkeypatch.delenv(name, raising=False)


def test_a_rank_that_slurm_shows_one_gpu_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "1")
    assert choose_device("auto", 3) == torch.device("cuda", 0)


def test_two_ranks_of_torchrun_do_not_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    assert choose_device("auto", 0) == torch.device("cuda", 0)
    with pytest.raises(ConfigError, match="local rank 1 has no GPU of its own"):
        choose_device("auto", 1)


def test_without_a_launcher_s_word_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="local rank 1"):
        choose_device("cuda", 1)


def test_a_rank_that_has_a_list_of_one_gpu_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As mpirun's wrappers and pods give it; the launcher itself, which is no rank, still counts its GPUs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(ConfigError, match="local rank 3"):
        choose_device("cuda", 3)
    monkeypatch.setenv("RANK", "3")
    assert choose_device("cuda", 3) == torch.device("cuda", 0)
    for name, value in (("CUDA_VISIBLE_DEVICES", "0,1"), ("CUDA_VISIBLE_DEVICES", ""), ("TORCHELASTIC_RUN_ID", "a")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(ConfigError, match="local rank 3"):
                choose_device("cuda", 3)


def joined(world: int, gpus: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the ranks of a job, threads here, are told when they join with these GPUs; "": they made a group."""
    made = MagicMock()
    own = threading.local()
    store = dist.HashStore()
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, 0, world)]))
    monkeypatch.setattr(dist, "init_process_group", made)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: MagicMock(uuid=own.gpu))

    def join(rank: int) -> str:
        own.gpu = gpus[rank]
        try:
            _join("gloo", rank, world, timedelta(seconds=20), torch.device("cuda", 0))
        except ConfigError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(world) as pool:
        answers = list(pool.map(join, range(world)))
    assert made.call_count == answers.count("")
    return answers


def test_two_ranks_are_never_given_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a list of one that is the same for both; it is noticed before NCCL starts, on every rank."""
    assert joined(3, ["a", "b", "c"], monkeypatch) == ["", "", ""]
    answers = joined(3, ["a", "b", "a"], monkeypatch)
    assert len(set(answers)) == 1
    assert "ranks 0 and 2 have one GPU, a on" in answers[0]
    assert "CUDA_VISIBLE_DEVICES" in answers[0]


def test_a_chunk_s_logits_take_the_same_memory_whatever_the_batch() -> None:
    assert [chunk_rows(0, "cuda", batch) for batch in (512, 1024, 3000, 8192, 10**6)] == [
        131072,
        65536,
        20480,
        8192,
        4096,
    ]
    assert (chunk_rows(0, "cpu", 1024), chunk_rows(100, "cuda", 1024)) == (4096, 100)
