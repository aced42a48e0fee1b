"""Real updates without a job around them: to count collectives and memory, or as one rank of a simulated job of N.

The simulation joins torch's fake process group, whose collectives return at once, as single ranks of N. Sizes that are
only scaled are scaled down, so that it takes seconds: classes, samples and images; the world, the shares of classes
that the ranks own, the network, the head and how they are spread are those of the configuration.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.compat.bank.center_bank import BankRows, CenterBank
from trainer.compat.methods.config import LceConfig, WithOldConfig
from trainer.compat.methods.inputs import Inputs
from trainer.compat.methods.old_embeddings import OldEmbeddings
from trainer.data import Batch, build_loader
from trainer.data.config import SyntheticConfig
from trainer.data.index import Dataset
from trainer.distributed import Ranks
from trainer.errors import ConfigError, ranks_text
from trainer.head.partition import class_range
from trainer.planning.backbones import backbone_sizes
from trainer.planning.setting import Setting
from trainer.planning.traffic import update_traffic
from trainer.run.config import Config
from trainer.run.engine import Engine
from trainer.run.task import TrainTask

OPERATIONS = {"allgather": "all-gather", "allreduce": "all-reduce", "reduce_scatter": "reduce-scatter"}
SIMULATED_CLASSES = 192
"""Classes of a full rank in a simulated update."""
SIMULATED_BATCH = 2
"""Samples of a rank in a simulated update."""


class CollectiveCounter(TorchDispatchMode):
    """Inside the block, notes every collective that a process group is asked for.

    Attributes:
        found: (operation, bytes of the whole tensor), in order; see :class:`trainer.planning.traffic.Collective`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.name().removeprefix("c10d::").strip("_")
            operation = next((title for key, title in OPERATIONS.items() if name.startswith(key)), name)
            self.found.append((operation, max(t.numel() * t.element_size() for t in _tensors(args))))
        return func(*args, **(kwargs or {}))


def totals(collectives: Sequence[tuple[str, int]]) -> dict[str, int]:
    """Bytes by operation (DDP cuts its sum into buckets, so single collectives say less)."""
    out: dict[str, int] = {}
    for operation, size in collectives:
        out[operation] = out.get(operation, 0) + size
    return out


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


class _Silent:
    """Stands in for the engine's monitor and watch."""

    def waiting_for_data(self) -> AbstractContextManager[None]:
        return nullcontext()

    def count(self, samples: int) -> None:
        pass

    def due(self, step: int) -> bool:
        return False

    def at(self, step: int, phase: str) -> None:
        pass

    def show_images(self, step: int, batch: Batch, dataset: Dataset | None) -> None:
        pass


class MadeUpBank:
    """A centre bank of random unit centres (C, D1) that is on no disk; as far as training asks for it."""

    info, old, fingerprint = None, None, "synthetic"

    def __init__(self, num_classes: int, dim: int) -> None:
        self.num_classes, self.dim = num_classes, dim

    def per_class(self, start: int, stop: int) -> dict[str, Tensor]:
        """See :meth:`trainer.compat.bank.center_bank.CenterBank.per_class`; the masks alone."""
        return {"mask": torch.ones(stop - start, dtype=torch.bool)}

    def rows(self, start: int, stop: int) -> BankRows:
        """See :meth:`trainer.compat.bank.center_bank.CenterBank.rows`."""
        n = stop - start
        centers = torch.empty(n, self.dim)
        for block in centers.split(65536):
            block.copy_(normalize(torch.randn(block.shape)))
        numbers = torch.arange(start, stop)
        return BankRows(
            centers, torch.full((n,), 0.3), torch.ones(n, dtype=torch.bool), torch.ones_like(numbers), numbers
        )


class MadeUpOld:
    """Random old embeddings (b, D1) that are in no file."""

    def __init__(self, dim: int) -> None:
        self.dim, self.fingerprint = dim, "synthetic"
        self.model: tuple[str, str] | None = None
        self.model_hash: str | None = None

    def of(self, batch: Batch) -> Tensor:
        """See :class:`trainer.compat.methods.old_embeddings.OldEmbeddings`."""
        return torch.randn(len(batch.labels), self.dim, device=batch.labels.device)


class Updates:
    """A run on synthetic data that writes nothing: real task, head, network and optimizer.

    Args:
        config: ``data.loader`` has to be ``synthetic``.
        ranks: who we are; the process group exists.
        bank_dim: D1, with a method against synthetic centres and old embeddings; None: without.
        old: old embeddings that are to be taken instead of synthetic ones.

    Raises:
        ConfigError: what the task refuses.
    """

    def __init__(
        self, config: Config, ranks: Ranks, bank_dim: int | None = None, old: OldEmbeddings | None = None
    ) -> None:
        data = config.data
        assert isinstance(data, SyntheticConfig)
        bank = None if bank_dim is None else cast(CenterBank, MadeUpBank(data.synthetic_classes, bank_dim))
        size = (data.synthetic_size, data.synthetic_size)
        if bank_dim and old is None and any(isinstance(one, WithOldConfig) for one in config.methods):
            old = MadeUpOld(bank_dim)
        inputs = Inputs(None, data.synthetic_classes, size, bank, old)
        self.loader = build_loader(data, config.seed, None, ranks)
        self.task = TrainTask(config, inputs, ranks)
        self.engine = Engine(config, ranks, inputs, self.task, self.loader)
        self._batches = self.loader.batches()
        self._silent: Any = _Silent()

    def take(self) -> None:
        """Make one update."""
        self.engine.update(self._batches, self._silent, self._silent)

    def close(self) -> None:
        """Release what the loader holds."""
        self.loader.close()


@dataclass(frozen=True)
class Simulated:
    """What a simulation of N ranks found.

    Attributes:
        owned: classes of the first rank, of the last one that owns any, and how many ranks own none.
        samples: of the first and of the last rank in a batch.
        ranks: the ranks that made an update.
        collectives: of that update, (operation, bytes), at the simulated sizes.
        problems: what is wrong, in words; empty: nothing.
    """

    owned: tuple[int, int, int]
    samples: tuple[int, int]
    ranks: tuple[int, ...]
    collectives: tuple[tuple[str, int], ...]
    problems: tuple[str, ...]


def simulate(setting: Setting, world_size: int) -> Simulated:
    """Check a configuration for N ranks in this one process; nothing is sent, nothing is written.

    Raises:
        ConfigError: a process group exists already, the task refuses the configuration, or it has what a simulation
            cannot stand in for: stored old embeddings, DeepSpeed, batch norms over all ranks.
    """
    if dist.is_initialized():
        raise ConfigError("a simulation makes its own process group; run it outside of a job")
    train = setting.config.train
    other = next((one.method for one in setting.config.methods if not isinstance(one, LceConfig)), None)
    for key, value, known in (
        ("compat.method", other or "none", ("none", "lce")),
        ("train.parallel", train.parallel, ("ddp", "fsdp")),
        ("train.sync_batchnorm", train.sync_batchnorm, (False,)),
    ):
        if value not in known:
            allowed = " or ".join(str(one).lower() for one in known)
            raise ConfigError(f"`simulate`: {key} = {str(value).lower()} cannot be simulated, only {allowed}")
    setting = replace(setting, world_size=world_size)
    sizes = [class_range(setting.num_classes, rank, world_size).size for rank in range(world_size)]
    batch = setting.config.data.batch_size
    samples = batch // world_size + (batch % world_size > 0), batch // world_size
    problems = _problems(setting, sizes)
    last = max(rank for rank, size in enumerate(sizes) if size)
    chosen = tuple(sorted({0, last})) if not problems or min(sizes) else (0,)
    small = _scaled_down(setting)
    backbone = backbone_sizes(small.config, small.image_size, small.local_batch)
    asked = [c for c in update_traffic(small, backbone) if not c.on_host]
    least, most = (
        totals([(c.operation, c.count * c.tensor_bytes * (c.exact or at_most)) for c in asked])
        for at_most in (False, True)
    )
    found: list[tuple[str, int]] = []
    if min(sizes):
        for rank in chosen:
            found = _simulated_update(small, rank)
            sent = totals(found)
            if sent.keys() != most.keys() or not all(least[o] <= sent[o] <= most[o] for o in sent):
                problems.append(f"rank {rank} asks for other bytes than planned: {sent}, planned {most}")
    return Simulated((sizes[0], sizes[last], sizes.count(0)), samples, chosen, tuple(found), tuple(problems))


def _problems(setting: Setting, sizes: list[int]) -> list[str]:
    out, world = [], setting.world_size
    if not min(sizes):
        most = next(n for n in range(world, 0, -1) if class_range(setting.num_classes, n - 1, n).size)
        out.append(
            f"{sizes.count(0)} of {ranks_text(world)} would own no class ({setting.num_classes} classes, {sizes[0]} a "
            f"rank); start {ranks_text(most)}"
        )
    if setting.config.data.batch_size < world:
        out.append(f"data.batch_size = {setting.config.data.batch_size}: {ranks_text(world)}, some would get no image")
    return out


def _scaled_down(setting: Setting) -> Setting:
    """The same run with fewer classes, samples and pixels: the last rank keeps its share of a full rank's classes."""
    world = setting.world_size
    full = min(setting.classes, SIMULATED_CLASSES)
    missing = (setting.classes * world - setting.num_classes) * full // setting.classes
    classes, batch = full * world - min(missing, full - 1), SIMULATED_BATCH * world
    size = (
        min(32, *setting.image_size) if setting.config.backbone.name.startswith(("small", "iresnet", "mobile")) else 112
    )
    kept = setting.config.data
    data = SyntheticConfig(
        synthetic_classes=classes,
        synthetic_records=4 * batch,
        synthetic_size=size,
        batch_size=batch,
        drop_last=kept.drop_last,
        sampling=kept.sampling,
        repeat=kept.repeat,
    )
    train = {"compile": False, "steps": 10, "channels_last": False, "compress_gradients": False}
    config = setting.config.model_copy(
        update={
            "data": data,
            "run": setting.config.run.model_copy(update={"device": "cpu"}),
            "backbone": setting.config.backbone.model_copy(update={"weights": None}),
            "train": setting.config.train.model_copy(update=train),
        }
    )
    return replace(setting, config=config, num_classes=classes, image_size=(size, size), device="cpu")


def _simulated_update(setting: Setting, rank: int) -> list[tuple[str, int]]:
    """One update as a rank of the fake group; its collectives."""
    with fake_ranks(rank, setting.world_size) as ranks:
        updates = Updates(setting.config, ranks, setting.bank_dim)
        if isinstance(updates.task.network, DistributedDataParallel):  # its own hook needs a result, which none gives
            updates.task.network.register_comm_hook(None, _summed)
        try:
            with CollectiveCounter() as counter:
                updates.take()
        finally:
            updates.close()
    return counter.found


def _summed(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    dist.all_reduce(bucket.buffer())
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


@contextlib.contextmanager
def fake_ranks(rank: int, world_size: int) -> Iterator[Ranks]:
    """Rank ``rank`` of a process group of which no other rank exists: collectives return at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield Ranks(rank, world_size, 0, torch.device("cpu"))
    finally:
        dist.destroy_process_group()
