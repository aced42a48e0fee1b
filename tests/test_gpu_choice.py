"""Which GPU a rank takes, where launchers show each rank all of them or its own alone."""

import pytest
import torch

from trainer.distributed import choose_device
from trainer.errors import ConfigError
from trainer.head.sizes import chunk_rows


@pytest.fixture(autouse=True)
def _one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_GPU_BIND", "TORCHELASTIC_RUN_ID"):
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


def test_a_chunk_s_logits_take_the_same_memory_whatever_the_batch() -> None:
    assert [chunk_rows(0, "cuda", batch) for batch in (512, 1024, 3000, 8192, 10**6)] == [
        131072,
        65536,
        20480,
        8192,
        4096,
    ]
    assert (chunk_rows(0, "cpu", 1024), chunk_rows(100, "cuda", 1024)) == (4096, 100)
