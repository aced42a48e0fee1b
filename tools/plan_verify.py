"""`lce plan --verify`: planned peak memory of real updates next to the measured one, every case in fresh processes."""

import multiprocessing
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from trainer.data.config import SyntheticConfig
from trainer.planning.memory import peak_bytes
from trainer.planning.plan import make_plan
from trainer.planning.setting import Setting
from trainer.run.config import parse_config

CASES = tuple((classes, rate, ranks) for classes in (100_000, 1_000_000) for rate in (1.0, 0.1) for ranks in (1, 2))
TOLERANCE = 0.10
UPDATES = 3


def case_setting(classes: int, rate: float, ranks: int, device: str, changes: Sequence[str] = ()) -> Setting:
    """A run of the head on synthetic images with a small network, batch 128, dimension 512, as ``lce bench head`` is.

    ``changes`` are ``section.key=value`` strings on top.
    """
    tree: dict[str, Any] = {
        "run": {"dir": "unused", "device": device},
        "data": {
            "loader": "synthetic",
            "batch_size": 128,
            "synthetic_classes": classes,
            "synthetic_size": 32,
            "synthetic_records": 4096,
        },
        "backbone": {"name": "small", "dim": 512},
        "head": {"sample_rate": rate},
        "train": {"steps": 10},
        "checkpoint": {"asynchronous": False},  # there is none here, and so no copy for it
    }
    config = parse_config(tree, "lce plan --verify", changes)
    data = config.data
    assert isinstance(data, SyntheticConfig)
    kind: Any = device
    return Setting(config, data.synthetic_classes, (data.synthetic_size,) * 2, ranks, kind, records=4096)


def verify(settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """Plan and measure every setting; ``ok`` says whether they differ by at most a tenth of the measured."""
    out = []
    for setting in settings:
        plan = make_plan(setting)
        context = 0
        if setting.device == "cuda":  # the allocator does not see what the driver and NCCL take
            context = sum(part.bytes for part in plan.memory if not part.measured and not part.on_host)
        planned = step_peak(setting) - context
        measured = measure(setting)
        head = setting.config.head
        out.append(
            {
                "classes": setting.num_classes,
                "rate": head.sample_rate,
                "ranks": setting.world_size,
                "rows": head.rows,
                "lce": setting.bank_dim is not None,
                "backbone": setting.config.backbone.name,
                "batch": setting.config.data.batch_size,
                "device": setting.device,
                "planned_bytes": planned,
                "measured_bytes": measured,
                "off": planned / measured - 1,
                "ok": abs(planned / measured - 1) <= TOLERANCE,
            }
        )
    return out


def step_peak(setting: Setting) -> int:
    """The planned peak of updates alone: no checkpoint is loaded."""
    return peak_bytes([part for part in make_plan(setting).memory if part.moment != "load"])


def measure(setting: Setting) -> int:
    """Peak memory of the largest rank in bytes after some updates, in processes of their own."""
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(setting.world_size):
            ours, theirs = context.Pipe()
            arguments = (setting, rank, str(Path(folder) / "store"), theirs)
            process = context.Process(target=_rank, args=arguments, daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return max(int(pipe.recv()) for pipe in pipes)
        except EOFError:
            raise RuntimeError("a rank ended without an answer (out of memory?)") from None
        finally:
            for process in processes:
                process.join(timeout=30)
                if process.is_alive():
                    process.kill()


def _rank(setting: Setting, rank: int, store: str, pipe: Connection) -> None:
    import os

    import torch
    import torch.distributed as dist

    from trainer.distributed import Ranks, peak_memory_bytes
    from trainer.planning.simulation import Updates

    world, cuda = setting.world_size, setting.device == "cuda"
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world)
    updates = Updates(setting.config, Ranks(rank, world, rank, device), setting.bank_dim)
    for _ in range(UPDATES):
        updates.take()
    updates.task.head.flush()  # every row is written, as before a checkpoint
    if cuda:
        torch.cuda.synchronize()
    pipe.send(peak_memory_bytes(device))
    updates.close()
    if world > 1:
        dist.destroy_process_group()


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """Planned next to measured, a line a case."""
    lines = [f"{'classes':>10} {'rate':>5} {'ranks':>5} {'planned':>10} {'measured':>10} {'off':>7}"]
    for row in rows:
        sizes = f"{row['planned_bytes'] / 2**30:7.2f} GiB {row['measured_bytes'] / 2**30:6.2f} GiB"
        verdict = "" if row["ok"] else "  more than a tenth"
        lines.append(f"{row['classes']:>10,} {row['rate']:>5} {row['ranks']:>5} {sizes} {row['off']:>+7.1%}{verdict}")
    return "\n".join(lines)
