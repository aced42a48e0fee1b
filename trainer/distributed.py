"""The process group: who we are, how tensors cross ranks, and what only one rank does.

Everything works without a process group too (one process, no collective), so that no caller needs to ask.
"""

import ctypes
import datetime
import importlib
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trainer.errors import ConfigError, NetworkError
from trainer.machine import interfaces, threads_of_a_rank
from trainer.owner import Launcher

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1
LAUNCHER = "LCE_LAUNCHER"
"""The variable by which a launcher says who it is to the ranks behind another one: ``HOST:PID:START``."""
_LAUNCHED = ("TORCHELASTIC_RUN_ID", "LCE_LAUNCHED")  # of torchrun, and of lce launch under mpirun and DeepSpeed

# Newer releases of torch renamed these two collectives.
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class CommunicationTime:
    """The time that this process's collectives on tensors take, waiting for other ranks included.

    On the CPU by the clock, on CUDA by events on the stream, which no step waits for. What runs inside DDP, FSDP or
    ZeRO during the backward pass is not counted.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    @contextmanager
    def around(self, tensor: Tensor) -> Iterator[None]:
        """Around a collective on ``tensor``."""
        if tensor.is_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((start, end))
            return
        began = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began

    def take(self) -> float:
        """Seconds since the last call; waits for the device where there are events."""
        seconds, self._seconds = self._seconds, 0.0
        for start, end in self._events:
            end.synchronize()
            seconds += start.elapsed_time(end) / 1000
        self._events.clear()
        return seconds

    def reset(self, seconds: float = 0.0) -> None:
        """Forget what was measured since the last :meth:`take`, and begin again at ``seconds``."""
        self._seconds = seconds
        self._events.clear()


COMMUNICATION = CommunicationTime()


def _all_gather(out: Tensor, part: Tensor) -> None:
    with COMMUNICATION.around(part):
        _gather_into(out, part)


def _reduce_scatter(out: Tensor, full: Tensor) -> None:
    with COMMUNICATION.around(full):
        _scatter_into(out, full)


@dataclass(frozen=True)
class Ranks:
    """This process among all: its rank, the world size W, its place on the node, and its device."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that logs."""
        return self.rank == 0


def choose_device(name: str, local_rank: int) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` → this rank's device. Raises :class:`ConfigError` for cuda without a CUDA
    device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device = cuda: this machine has no usable CUDA device; use run.device=cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if _bound_to_one_gpu():
        return torch.device("cuda", 0)
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU of its own: this node has {torch.cuda.device_count()}; "
            "start fewer ranks, or show each rank its own by CUDA_VISIBLE_DEVICES"
        )
    return torch.device("cuda", local_rank)


def _bound_to_one_gpu() -> bool:
    """Whether each rank is shown a GPU of its own, number 0 then: by SLURM (srun --gpus-per-task=1, --gpu-bind), or by
    a list of its own, ``CUDA_VISIBLE_DEVICES`` with one entry, from whoever starts the ranks (mpirun's wrapper, a pod).

    torchrun's ranks share one environment, in which a single GPU is one for all of them. Ranks of which several are
    shown the same GPU find out when they join: :func:`_check_gpus`.
    """
    bound = bool(os.environ.keys() & {"SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_GPU_BIND"})
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    if "RANK" in os.environ and listed and "," not in listed:
        bound = True
    return bound and "TORCHELASTIC_RUN_ID" not in os.environ and torch.cuda.device_count() == 1


def _check_gpus(store: Any, rank: int, world: int, gpu: str) -> None:
    """Raise :class:`ConfigError`, on all ranks, where two of them compute on the same GPU.

    Args:
        store: torch's, which all ranks have joined. gpu: the identifier of this rank's.
    """
    ranks = range(world)
    store.set(f"gpu of rank {rank}", f"{socket.gethostname()} {gpu}")
    first: dict[str, int] = {}
    for number, value in enumerate(store.multi_get([f"gpu of rank {number}" for number in ranks])):
        host, one = value.decode().split()
        other = first.setdefault(one, number)
        if other == number:
            continue
        store.set(f"rank {rank} knows", "")
        if rank == 0:  # the store may be this process's: the others have to read it first
            with suppress(dist.DistError):
                store.wait([f"rank {number} knows" for number in ranks], datetime.timedelta(seconds=10))
        raise ConfigError(
            f"ranks {other} and {number} have one GPU, {one} on {host}: start fewer ranks, or show each of them "
            "another one by CUDA_VISIBLE_DEVICES"
        )


def peak_memory_bytes(device: torch.device) -> int:
    """The largest amount of memory in use so far: the device's on CUDA, this process's resident one on the CPU.

    Linux counts a program's ``ru_maxrss`` from its parent's size on, which VmHWM does not.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def launched_by() -> Launcher | None:
    """The launcher whose end is to end this rank, on this machine; None: none started it."""
    if not any(name in os.environ for name in _LAUNCHED):
        return None
    host, _, first = os.environ.get(LAUNCHER, "").partition(":")
    return Launcher(os.getppid(), first if host == socket.gethostname() else "")


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Have the kernel send this process the signal when its parent ends, however that ends (Linux; elsewhere nothing
    happens)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)


_threads: ContextVar[int] = ContextVar("threads", default=0)
"""Within :func:`one_thread`: how many there were before."""


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread of the CPU meanwhile, but for what is within :func:`all_threads`.

    Threads that share a small piece of work wait for each other, for milliseconds where another process uses their
    cores.
    """
    before = torch.get_num_threads()
    token = _threads.set(thread_count())
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _threads.reset(token)


@contextmanager
def all_threads() -> Iterator[None]:
    """Within :func:`one_thread`: torch on as many threads as before it."""
    before = torch.get_num_threads()
    torch.set_num_threads(thread_count())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def thread_count() -> int:
    """torch's threads, within :func:`one_thread` those before it."""
    return _threads.get() or torch.get_num_threads()


def worker_threads(workers: int, name: str) -> ThreadPoolExecutor:
    """A pool whose threads compute on all threads (:func:`thread_count`), though it is made within :func:`one_thread`:
    a new thread of Python takes the number that was set last."""
    return ThreadPoolExecutor(workers, name, initializer=_set_threads, initargs=(thread_count(),))


def _set_threads(count: int) -> None:
    torch.get_num_threads()  # takes the number that was set last, which the first operation would otherwise do
    torch.set_num_threads(count)


@contextmanager
def process_group(device: str = "auto", timeout_seconds: float = 600.0, threads: int = 0) -> Iterator[Ranks]:
    """Join the process group that the launcher's environment describes; leave it at the end.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``. gloo for the CPU; NCCL for CUDA tensors and gloo for objects.
        timeout_seconds: a collective that takes longer raises on the ranks that wait.
        threads: intra-op threads; 0: :func:`trainer.machine.threads_of_a_rank`.

    Without RANK and WORLD_SIZE in the environment it is a single process and no group is made.

    Raises:
        ConfigError: a network interface that this host does not have, a master that is unknown or does not answer, a
            GPU that two ranks were given.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)  # DeepSpeed says the latter
    where = choose_device(device, local)
    torch.set_num_threads(threads or threads_of_a_rank(on_node))
    if where.type == "cuda":
        torch.cuda.set_device(where)
    started = world > 1 or "RANK" in os.environ
    if started:
        # Its functions have the default group as a default argument. Imported later, they would keep the group, whose
        # threads then run until the interpreter ends, and may abort it (pytorch/pytorch#179291).
        importlib.import_module("torch.distributed.nn.functional")
        backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
        _check_network(where.type == "cuda")
        try:
            _join(backend, rank, world, datetime.timedelta(seconds=timeout_seconds), where)
        except dist.DistError as error:
            raise ConfigError(
                f"rank {rank} on {socket.gethostname()}: no group of {world} ranks by the master {_master()} within "
                f"{timeout_seconds:g} s ({str(error).splitlines()[0]}); is rank 0 running there, the port open, and "
                "the address one that this host reaches?"
            ) from None
    try:
        yield Ranks(rank, world, local, where)
    finally:
        if started and dist.is_initialized():
            dist.destroy_process_group()


def _master() -> str:
    return f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"


def _check_network(nccl: bool) -> None:
    """Refuse at once what would otherwise be a timeout: interfaces that do not exist, a master without an address."""
    there = [name for _, name in socket.if_nameindex()]
    for variable in ("GLOO_SOCKET_IFNAME", *(("NCCL_SOCKET_IFNAME",) if nccl else ())):
        asked = os.environ.get(variable, "")
        names = interfaces(asked)
        # gloo wants names, NCCL also takes the beginnings of names.
        fits = tuple(names) if variable.startswith("NCCL") and not asked.startswith("=") else ()
        if names and not any(name in names or (fits and name.startswith(fits)) for name in there):
            raise NetworkError(
                f"{variable}={asked}: {socket.gethostname()} has no such network interface; it has {', '.join(there)}. "
                "Name one of them with `lce launch --interface`"
            )
    address = os.environ.get("MASTER_ADDR")
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise NetworkError(f"MASTER_ADDR={address}: unknown on {socket.gethostname()}: {error.strerror}") from None


def _join(backend: str, rank: int, world: int, timeout: datetime.timedelta, device: torch.device) -> None:
    """Make the default group from the environment; a restarted one must not find the addresses of dead ranks.

    With its device NCCL connects the ranks here, where a wrong network shows, and not in the first step.
    """
    restarts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not restarts and device.type != "cuda":
        dist.init_process_group(backend, timeout=timeout)
        return
    store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=timeout))  # type: ignore[attr-defined]
    if restarts:  # torchrun keeps one store over all its attempts, with everything that earlier ranks have left in it
        attempt = f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        store = dist.PrefixStore(attempt, store)  # type: ignore[attr-defined]
    own_device = None
    if device.type == "cuda":
        own_device = device
        _check_gpus(store, rank, world, str(torch.cuda.get_device_properties(device).uuid))
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=own_device)


def all_gather_rows(local: Tensor, sizes: list[int]) -> Tensor:
    """Gather the ranks' rows in rank order: (n_r, …) → (Σ n_r, …). One collective, no gradient.

    Args:
        local: this rank's rows, n_r = sizes[rank] of them.
        sizes: the row count of every rank, known to all. Unequal ones are padded to the largest.
    """
    if len(sizes) == 1:
        return local
    width = max(sizes)
    if min(sizes) == width:
        out = local.new_empty((width * len(sizes), *local.shape[1:]))
        _all_gather(out, local.contiguous())
        return out
    padded = local.new_zeros((width, *local.shape[1:]))
    padded[: len(local)] = local
    out = local.new_empty((width * len(sizes), *local.shape[1:]))
    _all_gather(out, padded)
    return torch.cat([out[r * width : r * width + n] for r, n in enumerate(sizes)])


def all_reduce_sum(value: Tensor) -> Tensor:
    """Sum a tensor over the ranks in place (nothing happens in a single process)."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        with COMMUNICATION.around(value):
            dist.all_reduce(value)
    return value


def broadcast_object(value: T, source: int = 0) -> T:
    """Rank ``source``'s picklable object on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, source)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Every rank's picklable object, in rank order, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def on_main(action: Callable[[], T], ranks: Ranks) -> T:
    """Run ``action`` on rank 0 only and give every rank its result; its exception is raised on every rank."""
    outcome: tuple[bool, Any] = (True, None)
    if ranks.is_main:
        try:
            outcome = (True, action())
        except Exception as error:
            outcome = (False, error)
    done, value = broadcast_object(outcome)
    if not done:
        raise value
    return value


def agree(problem: Exception | None) -> None:
    """Raise on every rank when any rank has a problem: the lowest such rank's. All ranks must call it."""
    first = next((p for p in gather_objects(problem) if p is not None), None)
    if first is not None:
        raise first


def class_mesh(ranks: Ranks) -> DeviceMesh:
    """The 1-D mesh over all ranks along which classes are sharded (dimension name ``class``)."""
    return init_device_mesh(ranks.device.type, (ranks.world_size,), mesh_dim_names=("class",))


def as_sharded(local: Tensor, total: int, mesh: DeviceMesh) -> "DTensor":
    """View a rank's rows (c, …) as its part of a global (C, …) DTensor ``Shard(0)``, without a copy.

    The rows must follow :func:`trainer.head.partition.class_range`, which is DTensor's own rule.
    """
    from torch.distributed.tensor import DTensor, Shard  # a second, which commands without ranks need not wait

    shape = torch.Size((total, *local.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


class Labels:
    """The labels of all ranks on the device, and on the host once their copy, which nothing waits for before, is there.

    Args:
        labels: (B,) int64.
    """

    def __init__(self, labels: Tensor) -> None:
        self.device = labels
        self._arrived: torch.cuda.Event | None = None
        self._host = labels
        if labels.is_cuda:
            self._host = torch.empty(labels.shape, dtype=labels.dtype, pin_memory=torch.cuda.is_available())
            self._host.copy_(labels, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    @property
    def host(self) -> NDArray[np.int64]:
        """(B,); waits for the copy, which is over long before the work that was queued after it."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        return self._host.numpy()

    @classmethod
    def gather(cls, labels: Tensor, world_size: int, capacity: int) -> "Labels":
        """From every rank's own (n,) labels, n ≤ capacity: (W·capacity,), −1 where a rank fills no place. One
        collective.
        """
        own = labels.new_full((capacity,), -1)
        own[: len(labels)] = labels
        if world_size == 1:
            return cls(own)
        out = own.new_empty(world_size * capacity)
        _all_gather(out, own)
        return cls(out)


class MarkedLabels(Labels):
    """Labels of all ranks of which some are marked, so that the host knows both by one copy.

    Args:
        codes: (B,) int64, every rank's :meth:`code`; −1 where a rank fills no place.
    """

    def __init__(self, codes: Tensor) -> None:
        super().__init__(codes)
        self.device = codes >> 1

    @staticmethod
    def code(labels: Tensor, marks: Tensor) -> Tensor:
        """What a rank gives for its labels (n,) in [−1, C) and marks (n,) bool: (n,) int64."""
        return 2 * labels + marks

    @property
    def host(self) -> NDArray[np.int64]:
        """See :class:`Labels`."""
        return super().host >> 1

    @property
    def marked(self) -> NDArray[np.int64]:
        """The places of the marked samples that have a label, ascending; waits as ``host`` does."""
        codes = super().host
        return np.flatnonzero((codes >= 0) & (codes & 1 == 1))


def upload(arrays: Sequence[NDArray[np.int64]], device: torch.device) -> list[Tensor]:
    """Arrays (n_i,) of int64 on the device: one copy from pinned memory, which the host does not wait for."""
    whole = send(torch.from_numpy(np.concatenate(arrays)), device)
    return list(whole.split([len(one) for one in arrays]))


def send(value: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device, from pinned memory where it comes from the host's, so that nothing waits for the copy."""
    if device.type == "cuda" and not value.is_cuda and torch.cuda.is_available():
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


class _GatherBatch(torch.autograd.Function):
    """All-gather of (n, D) rows padded to ``capacity`` → (W·capacity, D); backward: one reduce-scatter of the sum."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, labels: Tensor, world_size: int, capacity: int) -> tuple[Tensor, Tensor]:
        n, dim = rows.shape
        ctx.n, ctx.world_size, ctx.capacity = n, world_size, capacity
        head = dim * rows.element_size()
        width = -(-(head + 8) // 8) * 8  # bytes of a row with its label, a multiple of the label's size
        packed = torch.zeros(capacity, width, dtype=torch.uint8, device=rows.device)
        packed[:n, :head] = rows.detach().contiguous().view(torch.uint8)
        padded_labels = torch.full((capacity, 1), -1, dtype=torch.int64, device=rows.device)
        padded_labels[:n, 0] = labels
        packed[:, width - 8 :] = padded_labels.view(torch.uint8)
        out = packed
        if world_size > 1:
            out = packed.new_empty(world_size * capacity, width)
            _all_gather(out, packed)
        every_label = out[:, width - 8 :].contiguous().view(torch.int64)[:, 0]
        ctx.mark_non_differentiable(every_label)
        return out[:, :head].contiguous().view(rows.dtype), every_label

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _scattered(ctx, grads[0]), None, None, None


class _GatherRows(torch.autograd.Function):
    """All-gather of (n, D) rows padded to ``capacity`` → (W·capacity, D); backward: one reduce-scatter of the sum."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, world_size: int, capacity: int) -> Tensor:
        ctx.n, ctx.world_size, ctx.capacity = len(rows), world_size, capacity
        own = rows.detach()
        if len(rows) < capacity:
            own = torch.cat([own, own.new_zeros(capacity - len(rows), rows.shape[1])])
        if world_size == 1:
            return own.clone()
        out = own.new_empty(world_size * capacity, own.shape[1])
        _all_gather(out, own.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _scattered(ctx, grads[0]), None, None


def _scattered(ctx: Any, gradient: Tensor) -> Tensor:
    full = gradient.contiguous()
    if ctx.world_size > 1:
        part = full.new_empty(ctx.capacity, full.shape[1])
        _reduce_scatter(part, full)
        full = part
    return full[: ctx.n]


def gather_rows(rows: Tensor, world_size: int, capacity: int) -> Tensor:
    """The rows (W·capacity, D) of the global batch on every rank, where :meth:`Labels.gather` has gathered its labels;
    the gradient comes back summed over the ranks. See :func:`gather_batch`.
    """
    gathered: Tensor = _GatherRows.apply(rows, world_size, capacity)
    return gathered


def gather_batch(rows: Tensor, labels: Tensor, world_size: int, capacity: int) -> tuple[Tensor, Tensor]:
    """The global batch on every rank, embeddings and labels in one collective; the gradient comes back summed over
    the ranks.

    Args:
        rows: (n, D) of this rank, any float dtype; n ≤ capacity, and n may differ between ranks or be 0.
        labels: (n,) int64.
        world_size: W.
        capacity: the same on every rank; places that a rank does not fill are zeros with label −1.

    Returns:
        (W·capacity, D) and (W·capacity,), in rank order.
    """
    gathered: tuple[Tensor, Tensor] = _GatherBatch.apply(rows, labels, world_size, capacity)
    return gathered


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor | float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        factor = ctx.factor
        return gradients[0] * (factor.to(gradients[0].dtype) if isinstance(factor, Tensor) else factor), None


def scale_gradient(x: Tensor, factor: Tensor | float) -> Tensor:
    """``x`` unchanged; its gradient is multiplied by the scalar ``factor`` on the way back."""
    out: Tensor = _ScaleGradient.apply(x, factor)
    return out
