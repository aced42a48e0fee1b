"""The loop: one rank and many give the same run; a continued run is the uninterrupted one; bad steps change nothing."""

import errno
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import trainer.run.engine
import trainer.run.task
from tests.banks import write_bank
from tests.data.samples import packed
from tests.ranks import run_ranks
from tests.runs import config, log_of, losses_of, train_rank, tree
from trainer import owner
from trainer.__main__ import main
from trainer.checkpoint import Checkpoints, load_tensors, read_index
from trainer.checkpoint_folder import Checkpoint, list_checkpoints, read_seal
from trainer.compat.bank.center_bank import BankInfo
from trainer.data import Batch
from trainer.distributed import Ranks
from trainer.errors import CheckpointError, ConfigError, TrainingError
from trainer.models.open import load_model
from trainer.owner import OwnerInfo
from trainer.run.engine import train
from trainer.run.monitor import Monitor

SAMPLED = {"head__sample_rate": 0.5}
BATCH_NORM = {
    "backbone__name": "small",
    "train__precision": "float32",
    "head__rows": "float32",
    "data__synthetic_size": 16,
}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's newest checkpoint."""
    newest = list_checkpoints(folder / "checkpoints")[-1]
    index = read_index(newest).state_dict_metadata
    state = {
        name: torch.zeros(entry.size, dtype=entry.properties.dtype)
        for name, entry in index.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load_tensors(Checkpoint(newest, read_seal(newest)), state)
    return state


class Stopped(Exception):
    """Stands for the death of a process."""


def _train_until(ranks: Ranks, folder: Path, changes: dict[str, Any], last: int) -> None:
    """A rank that dies when it asks for batch number ``last``."""
    build, made = trainer.run.engine.build_loader, list[Checkpoints]()

    class Kept(Checkpoints):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    def build_dying(*args: Any) -> Any:
        loader = build(*args)
        whole = loader.batches

        def batches() -> Iterator[Batch]:
            for number, batch in enumerate(whole()):
                if number == last:
                    raise Stopped
                end = time.monotonic() + 120
                while number == 4 and not made[0].idle and time.monotonic() < end:
                    time.sleep(0.05)  # until the checkpoint of step 4 is written; it is sealed after step 6
                yield batch

        loader.batches = batches  # type: ignore[method-assign]
        return loader

    trainer.run.engine.build_loader, trainer.run.engine.Checkpoints = build_dying, Kept  # type: ignore[misc]
    try:
        with pytest.raises(Stopped):
            train_rank(ranks, folder, changes)
    finally:
        trainer.run.engine.build_loader, trainer.run.engine.Checkpoints = build, Checkpoints  # type: ignore[misc]


def _unscaled_rank(ranks: Ranks, folder: Path, changes: dict[str, Any]) -> None:
    trainer.run.task.scale_gradient = lambda x, factor: x
    train_rank(ranks, folder, changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        SAMPLED | {"optimizer__name": "adamw", "optimizer__lr": 0.01, "optimizer__clip_norm": 0.5},
        {"data__batch_size": 5, "train__accumulate": 2, "train__ema": 0.9},
    ],
    ids=["plain", "sampled-adamw-clip", "accumulate-ema"],
)
def test_ranks_do_not_change_the_run(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Losses of 8 updates at W = 2 and 3 (uneven slices, one of them empty at times) equal those of one process."""
    changes = {
        "data__synthetic_records": 36,
        **changes,
    }  # 36 = 5·7 + 1: the epoch's last batch leaves ranks without a sample
    train(config(tmp_path / "1", **changes), Ranks())
    expected = losses_of(tmp_path / "1")
    assert expected[-1] < expected[0]
    for world in (2, 3):
        run_ranks(train_rank, world, tmp_path / str(world), changes)
        np.testing.assert_allclose(losses_of(tmp_path / str(world)), expected, rtol=1e-9)


def test_scaling_by_world_size_matters(tmp_path: Path) -> None:
    """Negative control: without the factor W the ranks' mean is taken instead of the sum, and the run differs."""
    train(config(tmp_path / "1"), Ranks())
    run_ranks(_unscaled_rank, 2, tmp_path / "2", {})
    assert abs(losses_of(tmp_path / "2")[-1] / losses_of(tmp_path / "1")[-1] - 1) > 1e-3


FLOAT8: dict[str, Any] = {"head__rows": "float8", "head__optimizer": {"momentum": 0.0}}


@pytest.mark.parametrize(
    "rows",
    [
        {},
        FLOAT8,
        FLOAT8 | {"head__rows_residual": True, "head__sample_rate": [[0, 0.3], [3, 0.6], [6, 1.0]]},
    ],
    ids=["float32", "float8", "float8-residual-schedule"],
)
def test_continued_run_is_the_same_to_the_last_bit(tmp_path: Path, rows: dict[str, Any]) -> None:
    """Two ranks, batch norm, drawn classes, momentum, moving average: killed in step 7, continued from step 4."""
    changes = BATCH_NORM | SAMPLED | {"checkpoint__every_steps": 4, "train__ema": 0.9} | rows
    run_ranks(train_rank, 2, tmp_path / "whole", changes)
    run_ranks(_train_until, 2, tmp_path / "cut", changes, 7)
    assert [p.name for p in list_checkpoints(tmp_path / "cut/checkpoints")] == ["step-00000004"]
    run_ranks(train_rank, 2, tmp_path / "cut", changes)
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole")
    whole, cut = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert {name.split(".")[0] for name in whole} == {
        "module",
        "average",
        "optimizer",
        "task",
        "scale",
        "skipped",
        "streak",
    }
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


RESUMED = SAMPLED | {"checkpoint__every_steps": 4, "checkpoint__asynchronous": False}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``whole``: 8 steps of one process; ``cut``: begun on two ranks, killed after 5, with a checkpoint of step 4."""
    folder = tmp_path_factory.mktemp("begun")
    train(config(folder / "whole", **RESUMED), Ranks())
    run_ranks(_train_until, 2, folder / "cut", RESUMED, 5)
    return folder


@pytest.mark.parametrize("world", [1, 3, 4])
def test_continued_on_another_number_of_ranks(begun: Path, tmp_path: Path, world: int) -> None:
    """Begun on two ranks, continued on 1, 3 or 4: the same samples and the same losses."""
    run = tmp_path / "run"
    shutil.copytree(begun / "cut", run)
    if world == 1:
        train(config(run, **RESUMED), Ranks())
    else:
        run_ranks(train_rank, world, run, RESUMED)
    np.testing.assert_allclose(losses_of(run), losses_of(begun / "whole"), rtol=1e-9)


def test_blocks_of_records_are_continued_on_another_number_of_ranks(tmp_path: Path) -> None:
    """``data.order: blocks``, begun on two ranks and continued on three, twice over an epoch's end: the losses of one
    process, and others than in the global order."""
    files = {"data__loader": "torch", "data__path": str(packed(tmp_path, 11, 3)), "data__workers": 0}
    blocks = {"data__order": "blocks", "data__block_bytes": 3000, "data__buffer_bytes": 9000}
    train(config(tmp_path / "global", **RESUMED, **files), Ranks())
    changes = RESUMED | files | blocks
    train(config(tmp_path / "whole", **changes), Ranks())
    run_ranks(_train_until, 2, tmp_path / "run", changes, 5)
    run_ranks(train_rank, 3, tmp_path / "run", changes)
    expected = losses_of(tmp_path / "whole")
    np.testing.assert_allclose(losses_of(tmp_path / "run"), expected, rtol=1e-9)
    assert not np.allclose(losses_of(tmp_path / "global"), expected, rtol=1e-3)


def test_batch_norm_over_all_ranks_continues_on_another_number_of_them(tmp_path: Path) -> None:
    """Begun on two ranks, continued on three: the losses of one process, which batch norm by rank does not have."""
    changes = RESUMED | {"backbone__name": "small", "data__synthetic_size": 16, "data__batch_size": 8}
    synced = changes | {"data__drop_last": True, "train__sync_batchnorm": True}
    train(config(tmp_path / "whole", **synced), Ranks())
    run_ranks(_train_until, 2, tmp_path / "run", synced, 5)
    run_ranks(train_rank, 3, tmp_path / "run", synced)
    expected = losses_of(tmp_path / "whole")
    np.testing.assert_allclose(losses_of(tmp_path / "run"), expected, rtol=1e-9)
    one, two = (load_file(tmp_path / name / "model/backbone.safetensors") for name in ("whole", "run"))
    for name, value in one.items():  # its running statistics too
        torch.testing.assert_close(two[name], value, rtol=1e-6, atol=1e-8)
    run_ranks(train_rank, 2, tmp_path / "apart", synced | {"train__sync_batchnorm": False})
    assert np.abs(np.divide(losses_of(tmp_path / "apart"), expected) - 1).max() > 1e-3


def test_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A finished run has a model that loads and a summary; starting it again does nothing; more steps continue it."""
    done = train(config(tmp_path / "run"), Ranks())
    assert (done.status, done.step, done.steps, done.skipped_steps) == ("finished", 8, 8, 0)
    assert load_model(tmp_path / "run").dim == 6
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    capsys.readouterr()
    assert train(config(tmp_path / "run"), Ranks()) == done
    said = capsys.readouterr().err
    assert "finished already" in said
    assert "another setting" not in said
    with pytest.raises(ConfigError, match=r"with other settings \(optimizer.lr: 0.1 → 0.3\); choose another run.dir"):
        train(config(tmp_path / "run", optimizer__lr=0.3), Ranks())
    assert train(config(tmp_path / "run", log__every_steps=3), Ranks()) == done
    assert "made with another setting, log.every_steps: 1 → 3" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"with another data set .*; choose another run\.dir"):
        train(config(tmp_path / "run", data__synthetic_records=50), Ranks())
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before
    assert train(config(tmp_path / "run", train__steps=10), Ranks()).step == 10
    assert [line["step"] for line in log_of(tmp_path / "run")] == list(range(1, 11))


def test_a_finished_run_is_compared_with_all_that_it_was_made_from(tmp_path: Path) -> None:
    """Under the same names stand another bank, other old embeddings, other data: that is not "nothing to do"."""

    def write(seed: int) -> None:
        rows = torch.nn.functional.normalize(torch.randn(41, 6, generator=torch.Generator().manual_seed(seed)))
        np.save(tmp_path / "old.npy", rows.numpy())
        every = torch.ones(11, dtype=torch.int64)
        info = BankInfo(made_from="embeddings", source="x")
        shutil.rmtree(tmp_path / "bank", ignore_errors=True)
        write_bank(
            tmp_path / "bank", centers=rows[:11], boundaries=every * 0.0, counts=every, mask=every > 0, info=info
        )

    runs = {
        "centre bank": {"compat__method": "lce", "compat__bank": str(tmp_path / "bank")},
        "old embeddings": {"compat__method": "l2", "compat__old_embeddings": str(tmp_path / "old.npy")},
    }
    write(0)
    for changes in runs.values():
        folder = tmp_path / changes["compat__method"]
        assert train(config(folder, train__steps=2, **changes), Ranks()).status == "finished"
    write(0)
    for changes in runs.values():
        train(config(tmp_path / changes["compat__method"], train__steps=2, **changes), Ranks())
    write(1)
    for what, changes in runs.items():
        with pytest.raises(CheckpointError, match=rf"with another {what} .*; choose another run\.dir"):
            train(config(tmp_path / changes["compat__method"], train__steps=2, **changes), Ranks())


def test_an_uncompiled_head_stands_in_every_line_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(config(tmp_path / "run", train__steps=2), Ranks()).head == ""
    assert not any("head_eager" in line for line in log_of(tmp_path / "run"))
    monkeypatch.setattr("trainer.head.kernels._problems", ["no compiler at all"])
    log = {"log__tensorboard": True, "log__progress": True}
    assert train(config(tmp_path / "eager", train__steps=2, **log), Ranks()).head == "eager"
    assert [line["head_eager"] for line in log_of(tmp_path / "eager")] == [1, 1]
    assert "head_eager 1" in capsys.readouterr().err


def test_a_requeued_job_takes_its_folder_over_from_the_host_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue started it again elsewhere; while the first host lives, its note counts."""
    train(config(tmp_path / "run", train__steps=4), Ranks())
    lock = tmp_path / "run/.owner"
    lock.write_text(json.dumps(asdict(replace(OwnerInfo.mine(), host="node-7"))))
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.02):
            os.utime(lock)

    beats = threading.Thread(target=beat, daemon=True)
    beats.start()
    try:  # with the usual period: a thread may come late while another computes
        with pytest.raises(ConfigError, match=r"in use by .* on node-7"):
            train(config(tmp_path / "run"), Ranks())
    finally:
        ended.set()
        beats.join()
    monkeypatch.setattr(owner, "BEAT_SECONDS", 0.2)
    assert train(config(tmp_path / "run"), Ranks()).step == 8
    assert [line["step"] for line in log_of(tmp_path / "run")] == list(range(1, 9))
    assert not lock.exists()


def _on_its_host(ranks: Ranks, folder: Path) -> tuple[str, str]:
    socket.gethostname = lambda: f"node-{ranks.rank}"
    owners: list[str] = []
    monitor = Monitor.advance

    def advance(self: Monitor, step: int) -> None:
        owners.append(json.loads((folder / ".owner").read_text())["host"])
        monitor(self, step)

    Monitor.advance = advance  # type: ignore[method-assign]
    return train_rank(ranks, folder, {}), owners[-1]


def test_ranks_of_many_hosts_are_one_owner(tmp_path: Path) -> None:
    """Rank 0 holds the lock for all of them."""
    assert run_ranks(_on_its_host, 2, tmp_path / "run") == [("finished", "node-0")] * 2
    assert not (tmp_path / "run/.owner").exists()


def test_a_trace_and_changed_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config(tmp_path / "run", log__profile=(3, 4)), Ranks())
    trace = json.loads((tmp_path / "run/profile/rank-00000.json").read_text())
    assert any("addmm" in str(event.get("name")) for event in trace["traceEvents"])
    train(config(tmp_path / "run", train__steps=9), Ranks())
    said = capsys.readouterr().err
    assert "changed since the last start: train.steps: 8 → 9" in said
    assert "optimizer" not in said


def test_settings_are_compared_with_the_checkpoint_whatever_config_yaml_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """config.yaml has no seal: who starts a run from a damaged or edited one is told what it changes."""
    train(config(tmp_path / "run", checkpoint__every_steps=8), Ranks())
    file = tmp_path / "run/config.yaml"
    text = file.read_text()
    assert "  lr: 0.1\n" in text
    file.write_text(text.replace("  lr: 0.1\n", "  lr: 0.3\n"))
    train(config(tmp_path / "run", train__steps=9, optimizer__lr=0.3), Ranks())
    said = capsys.readouterr().err
    assert "continuing from" in said
    assert "optimizer.lr: 0.1 → 0.3" in said


@pytest.mark.parametrize("updates", [(1, 2), (7, 20)])
def test_a_trace_from_the_first_and_beyond_the_last_update(tmp_path: Path, updates: tuple[int, int]) -> None:
    train(config(tmp_path / "run", log__profile=updates), Ranks())
    trace = json.loads((tmp_path / "run/profile/rank-00000.json").read_text())
    products = sum(event.get("name") == "aten::addmm" for event in trace["traceEvents"])
    assert products == 2 * 2  # two updates of a network with two layers


def test_a_trace_of_a_run_in_epochs_counts_its_updates(tmp_path: Path) -> None:
    """Ten images in batches of four are three updates an epoch, or two where the last one is dropped."""
    epochs = {"train__steps": None, "train__epochs": 2.0, "data__synthetic_records": 10, "data__batch_size": 4}
    one = config(tmp_path / "one", **epochs, log__profile=(1, 1))
    updates = train(one, Ranks()).step
    train(config(tmp_path / "run", **epochs, log__profile=(updates, updates + 5)), Ranks())
    assert (tmp_path / "run/profile/rank-00000.json").is_file()
    beyond = config(tmp_path / "beyond", **epochs, log__profile=(updates + 1, updates + 1))
    with pytest.raises(
        ConfigError, match=rf"log\.profile = .*the run ends after {updates} updates; trace earlier ones"
    ):
        train(beyond, Ranks())
    assert not [path for path in (tmp_path / "beyond").rglob("*") if path.is_file()]


def test_an_update_that_is_no_update_is_not_traced(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1 ≤ first ≤ last"):
        config(tmp_path / "run", log__profile=(5, 3))


def test_a_last_checkpoint_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, failures = Checkpoints.save, [None]

    def save(self: Checkpoints, state: Any, seal: Any) -> None:
        if failures:
            failures.pop()
            self._failed(int(seal["step"]), "OSError: no room, for the test")
        else:
            whole(self, state, seal)

    monkeypatch.setattr(Checkpoints, "save", save)
    assert train(config(tmp_path / "run"), Ranks()).status == "finished"
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000008"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match="failed too"):
        train(config(tmp_path / "other"), Ranks())
    assert not (tmp_path / "other/summary.json").exists()


def test_a_full_disk_at_the_log_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Disk:
        """Takes 30 bytes at a time; from the fifth on it is full for a while."""

        def __init__(self, file: Any) -> None:
            self.file, self.calls = file, 0

        def write(self, data: bytes) -> int:
            self.calls += 1
            if 5 <= self.calls < 9:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return int(self.file.write(data[:30]))

        def fileno(self) -> int:
            return int(self.file.fileno())

        def close(self) -> None:
            self.file.close()

    enter = Monitor.__enter__

    def with_disk(self: Monitor) -> Monitor:
        self._log = Disk(self._log)  # type: ignore[assignment]
        return enter(self)

    monkeypatch.setattr(Monitor, "__enter__", with_disk)
    train(config(tmp_path / "run"), Ranks())
    assert [line["step"] for line in log_of(tmp_path / "run")] == list(range(1, 9))
    said = capsys.readouterr().err
    assert said.count("log.jsonl cannot be written: No space left on device") == 1
    assert "log.jsonl lacks" not in said


class _RefusingDisk:
    """Refuses what it is given once, or from a time on always."""

    def __init__(self, file: Any, for_good: int | None) -> None:
        self.file, self.for_good, self.seen, self.written = file, for_good, b"", 0

    def write(self, data: bytes) -> int:
        if data != self.seen or (self.for_good is not None and self.written >= self.for_good):
            self.seen = data
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.written += 1
        return int(self.file.write(data))

    def fileno(self) -> int:
        return int(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def _with_disk(monkeypatch: pytest.MonkeyPatch, for_good: int | None) -> None:
    enter = Monitor.__enter__

    def with_disk(self: Monitor) -> Monitor:
        self._log = _RefusingDisk(self._log, for_good)  # type: ignore[assignment]
        return enter(self)

    monkeypatch.setattr(Monitor, "__enter__", with_disk)


def test_the_log_is_on_the_disk_before_a_checkpoint_and_the_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line that the disk refused once: a run that goes on from the checkpoint would never write it again."""
    found: list[tuple[int, int]] = []
    synced: list[int] = []
    save, finish, fsync = Checkpoints.save, trainer.run.engine._finish, os.fsync

    def last_line(step: int) -> None:
        log = tmp_path / "run/log.jsonl"
        assert log.stat().st_ino in synced, "not waited for"
        found.append((step, log_of(tmp_path / "run")[-1]["step"]))
        synced.clear()

    def saving(self: Checkpoints, tensors: Any, seal: dict[str, Any]) -> None:
        last_line(seal["step"])
        save(self, tensors, seal)

    def finishing(engine: Any, summary: Any) -> None:
        last_line(summary.step)
        finish(engine, summary)

    def syncing(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    _with_disk(monkeypatch, None)
    monkeypatch.setattr(Checkpoints, "save", saving)
    monkeypatch.setattr(trainer.run.engine, "_finish", finishing)
    monkeypatch.setattr(os, "fsync", syncing)
    train(config(tmp_path / "run", checkpoint__every_steps=3), Ranks())
    assert found == [(3, 3), (6, 6), (8, 8), (8, 8)]
    assert "log.jsonl lacks" not in capsys.readouterr().err


def test_lines_that_are_lost_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _with_disk(monkeypatch, 0)
    train(config(tmp_path / "run"), Ranks())
    assert "log.jsonl lacks the last 8 line(s), which it did not take" in capsys.readouterr().err


def test_a_deterministic_run_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tree(tmp_path / "run", run__deterministic=True)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings).replace("test_linear", "small"))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # what the user has set stays
    short = ["data.synthetic_size=16", "train.steps=2"]
    try:
        assert main([str(tmp_path / "run.yaml"), *short]) == 0
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        assert (
            main([str(tmp_path / "run.yaml"), f"run.dir={tmp_path / 'other'}", "run.deterministic=false", *short]) == 0
        )
        assert torch.backends.cudnn.benchmark  # its quickest kernels, chosen by trying them
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False
    changes = {"backbone__name": "small", "data__synthetic_size": 16, "train__steps": 2}
    train(config(tmp_path / "plain", **changes), Ranks())
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "plain")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"data__synthetic_records": 50}, CheckpointError, "another data set"),
        ({"backbone__dim": 7}, CheckpointError, "this run needs"),
        ({"train__steps": None, "train__epochs": 9, "data__batch_size": 14}, CheckpointError, "batch_size=7, now 14"),
        ({"train__steps": None, "train__epochs": 9, "train__accumulate": 2}, CheckpointError, "accumulate=1, now 2"),
        ({"checkpoint__resume": "never"}, ConfigError, "resume=never"),
    ],
)
def test_a_folder_of_another_run_is_left_alone(
    begun: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(begun / "cut", run)
    before = (run / "config.yaml").read_text()
    with pytest.raises(error, match=words):
        train(config(run, **RESUMED | changes), Ranks())
    assert (run / "config.yaml").read_text() == before


def test_what_is_wrong_on_one_rank_alone_is_told_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*_: Any) -> Any:
        raise CheckpointError("its part of a file is damaged")

    monkeypatch.setattr(trainer.run.engine, "TrainTask", damaged)
    with pytest.raises(CheckpointError) as caught:
        train(config(tmp_path / "run"), Ranks())
    assert caught.value.__notes__ == ["while rank 0 prepared its classes"]  # by which trainer.__main__ knows


def test_a_log_that_cannot_be_opened_ends_all_ranks_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "run/log.jsonl").mkdir(parents=True)
    answers = run_ranks(_refused_rank, 2, tmp_path / "run", {})
    assert len(set(answers)) == 1
    assert answers[0].endswith("log.jsonl: cannot be written: Is a directory")


def _refused_rank(ranks: Ranks, folder: Path, changes: dict[str, Any]) -> str:
    try:
        return train_rank(ranks, folder, changes)
    except ConfigError as error:
        return str(error)


class _Poison:
    """Wraps a loader; its images are not a number in the given batches."""

    def __init__(self, loader: Any, bad: set[int]) -> None:
        self.loader, self.bad = loader, bad

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def batches(self) -> Iterator[Batch]:
        for number, batch in enumerate(self.loader.batches()):
            images = batch.images * float("nan") if number in self.bad else batch.images
            yield Batch(images, batch.labels, batch.records)


def _poisoned_rank(ranks: Ranks, folder: Path, changes: dict[str, Any], bad: set[int], where: int) -> None:
    build = trainer.run.engine.build_loader
    trainer.run.engine.build_loader = lambda *args: _Poison(build(*args), bad if ranks.rank == where else set())
    train_rank(ranks, folder, changes)


def test_a_step_that_is_not_finite_changes_nothing_anywhere(tmp_path: Path) -> None:
    """Bad images on rank 1 in the last two of five steps: all ranks keep everything as it was after three."""
    changes = BATCH_NORM | {"schedule__name": "constant", "schedule__warmup": 0.0, "train__ema": 0.5}
    run_ranks(train_rank, 2, tmp_path / "three", changes | {"train__steps": 3})
    run_ranks(_poisoned_rank, 2, tmp_path / "five", changes | {"train__steps": 5}, {3, 4}, 1)
    three, five = tensors_of(tmp_path / "three"), tensors_of(tmp_path / "five")
    moved = {n for n in three if not torch.equal(three[n], five[n])}
    assert {n for n in moved if "average" not in n and "num_batches" not in n} == {"skipped", "streak"}
    assert (int(five["skipped"]), int(five["streak"])) == (2, 2)


@pytest.mark.parametrize("update", ["fused", "deferred"])
def test_a_gradient_that_overflows_inside_the_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update: str
) -> None:
    """Behind a finite loss: the backbone skips the step; the rows have made it when fused, and not when deferred."""
    changes = {"schedule__name": "constant", "schedule__warmup": 0.0, "head__update": update}
    train(config(tmp_path / "three", **changes, train__steps=3), Ranks())
    backward, calls = trainer.run.task.scale_gradient, []

    def overflowing(x: torch.Tensor, factor: Any) -> torch.Tensor:
        calls.append(None)
        return backward(x, float("inf") if len(calls) == 4 else factor)

    monkeypatch.setattr(trainer.run.task, "scale_gradient", overflowing)
    train(config(tmp_path / "four", **changes, train__steps=4), Ranks())
    three, four = tensors_of(tmp_path / "three"), tensors_of(tmp_path / "four")
    moved = {n for n in three if not torch.equal(three[n], four[n])}
    assert moved == {"skipped", "streak"} | ({"task.rows", "task.momentum"} if update == "fused" else set())


def test_too_many_bad_steps_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = trainer.run.engine.build_loader
    monkeypatch.setattr(trainer.run.engine, "build_loader", lambda *args: _Poison(build(*args), set(range(2, 99))))
    with pytest.raises(TrainingError, match=r"4 updates in a row .* step 6"):
        train(config(tmp_path / "run", train__max_nonfinite_steps=3), Ranks())


def test_a_short_run_without_a_finite_update_hands_over_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer updates than train.max_nonfinite_steps forgives."""
    build = trainer.run.engine.build_loader
    monkeypatch.setattr(trainer.run.engine, "build_loader", lambda *args: _Poison(build(*args), set(range(99))))
    with pytest.raises(TrainingError, match="none of the 4 updates was finite"):
        train(config(tmp_path / "run", train__steps=4), Ranks())
    assert not (tmp_path / "run" / "model").exists()


def test_float16_lowers_its_scale_until_steps_are_finite(tmp_path: Path) -> None:
    """From 65,536 the scale is halved at each overflow, and training goes on as in float32."""
    changes = BATCH_NORM | {"train__steps": 12, "optimizer__lr": 0.05}
    train(config(tmp_path / "32", **changes), Ranks())
    train(config(tmp_path / "16", **changes | {"train__precision": "float16"}), Ranks())
    lines = log_of(tmp_path / "16")
    skipped = lines[-1]["skipped_steps"]
    assert lines[-1]["loss_scale"] == 2.0 ** (16 - skipped)
    assert skipped < 10
    np.testing.assert_allclose(lines[0]["loss"], losses_of(tmp_path / "32")[0], rtol=1e-2)


def test_bfloat16_follows_float32(tmp_path: Path) -> None:
    changes = BATCH_NORM | {"optimizer__lr": 0.002, "data__batch_size": 32}
    train(config(tmp_path / "32", **changes), Ranks())
    train(config(tmp_path / "half", **changes | {"train__precision": "bfloat16"}), Ranks())
    np.testing.assert_allclose(losses_of(tmp_path / "half"), losses_of(tmp_path / "32"), rtol=0.03)
    assert losses_of(tmp_path / "half") != losses_of(tmp_path / "32")


def test_weights_that_are_no_numbers_are_no_model() -> None:
    from trainer.run.engine import _check_finite

    weights = {"backbone": {"w": torch.ones(3), "count": torch.zeros((), dtype=torch.int64)}}
    _check_finite(weights)
    weights["backbone"]["w"][1] = torch.inf
    with pytest.raises(TrainingError, match=r"backbone\.w is not finite .*, so no model is written"):
        _check_finite(weights)
