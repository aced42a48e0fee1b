"""Measure one step of the head (forward, backward, update of the rows) against the plain implementation.

Each side runs in processes of its own, so that its peak memory is its own. The two take turns of two steps, of which
the second is measured, and the figures are medians. "Bound" is the larger of two times, both measured after every
step: of the four matrix products that the two passes need, at the speed of one on a chunk that stays in cache; and of
reading rows, momentum and old centres, the first and the last twice, and writing rows and momentum, at the speed at
which a part of the rows is read and written. Where both sides do not fit into memory together, --sequential runs one
after the other, and --only ours leaves the reference out. --ladder goes from 125,000 to 29,000,000 classes as far as
they fit, next to the figures that others published.

Examples:
  lce bench head --classes 1000000 --rate 0.1
  lce bench head --classes 100000 --rate 1.0 --json -
  lce bench head --classes 100000 --rate 0.1 --lce direct --world-size 2
  lce bench head --classes 5500000 --rows bfloat16 --only ours
  lce bench head --classes 100000 --rate 0.1 --lce both --against-no-lce --compile-maps
  lce bench head --classes 100000 --rate 0.1 --trace
  lce bench head --classes 1000000 --device cuda --batch 1024 --impl triton --against fused
  lce bench head --ladder --lce direct --centers mapped --markdown ladder.md --json ladder.json
  lce bench head --ladder --every-rows --device cuda --batch 1024 --rate 0.1 --markdown ladder-cuda.md
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tools.arguments import whole_number
from tools.benchmarks import ladder
from tools.measuring import origin, write_json

STEPS_A_TURN = 2
"""Of which the last counts: the first finds memory that the other side's turn has made cold, as no training does."""
REST_SECONDS = 0.4
"""Before each turn, until the other side's worker threads, which spin for a while after a step, have gone to sleep."""
PART_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}
"""Of rows whose reading and writing is timed: more than the caches hold, and on CUDA than a launch takes time."""
IMPLEMENTATIONS = ("fused", "native", "triton", "reference")
MAPPED = ("backward", "forward", "both")
HELP = "time and memory of a step of the class-sharded head"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lce bench head`."""
    parser.add_argument("--classes", type=whole_number(1), default=100_000, help="C, all classes (100000)")
    parser.add_argument("--rate", type=float, default=1.0, help="sample rate (1.0)")
    parser.add_argument("--batch", type=int, default=128, help="B, the global batch (128)")
    parser.add_argument("--dim", type=int, default=512, help="D, the embedding dimension (512)")
    parser.add_argument("--margin", default="cosface", help="the margin (cosface)")
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd", help="of the rows (sgd)")
    parser.add_argument("--momentum", type=float, default=0.9, help="of --optimizer sgd (0.9)")
    rows = ("float32", "bfloat16", "float8")
    parser.add_argument("--rows", choices=rows, default="float32", help="dtype of rows and state; float8: --momentum 0")
    parser.add_argument("--compute", choices=("float32", "tf32", "bfloat16"), default="float32", help="of the products")
    parser.add_argument("--impl", choices=("auto", *IMPLEMENTATIONS), default="auto", help="head.impl of ours (auto)")
    parser.add_argument(
        "--against",
        choices=IMPLEMENTATIONS,
        default="reference",
        help="of the other side (reference, which is float32; any other takes the same rows and products as ours)",
    )
    parser.add_argument(
        "--lce", choices=("none", "direct", *MAPPED), default="none", help="with LCE's losses, maps included (rbt)"
    )
    parser.add_argument("--compile-maps", action="store_true", help="compile LCE's maps, as train.compile does")
    parser.add_argument(
        "--centers",
        choices=("float32", "bfloat16", "mapped"),
        default="float32",
        help="with --lce: in memory, or bfloat16 in a mapped file, of which a step reads its rows",
    )
    parser.add_argument("--against-no-lce", action="store_true", help="the other side is ours without LCE")
    parser.add_argument("--world-size", type=int, default=1, help="ranks (1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=7, help="measured turns of each side (7)")
    parser.add_argument("--warmup", type=int, default=2, help="turns before (2)")
    parser.add_argument("--only", choices=("both", "ours", "reference"), default="both", help="leave a side out")
    parser.add_argument("--sequential", action="store_true", help="one side after the other, not alternating")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON (- for standard output)")
    parser.add_argument("--trace", action="store_true", help="not measured: every pass of a step, counted")
    ladder.add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit status.

    Raises:
        ConfigError: sizes, a rate, a margin or a device that no head can have.
    """
    _check(args)
    if args.trace:
        return _trace(args)
    if args.ladder:
        ladder.climb(args, measure)
        return 0
    figures = measure(args)
    write_json(figures, args.json)
    if args.json != "-":
        print(summary(figures))
    return 0


def _trace(args: argparse.Namespace) -> int:
    """Print and write what a step consists of, and on CUDA what the profiler says of it."""
    import os
    from dataclasses import asdict
    from unittest.mock import patch

    import torch

    from tools.passes import counting, table
    from trainer.distributed import Ranks
    from trainer.errors import ConfigError

    if args.world_size > 1:
        raise ConfigError("--trace: one rank's step is counted; use --world-size 1")
    device = torch.device(args.device)
    with patch.dict(os.environ, LCE_NATIVE="0"):  # the C++ pass has no operators to count
        head = _head("ours", args, Ranks(device=device))
    rows = len(head.rows) if args.rate == 1 else round(args.rate * len(head.rows))
    labels = torch.randint(0, args.classes, (args.batch,)).to(device)

    def step(number: int) -> None:
        x = torch.randn(args.batch, args.dim, device=device).requires_grad_()
        head(x, head.gather_labels(labels), number).loss.backward()

    step(0)  # leaves the norms of the rows behind, as every step does
    with counting(head, args.dim, min(rows, head.softmax.kernels.chunk_rows) // 2) as passes:
        step(1)
    lines, kernels = [table(passes, rows)], None
    if device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step(2)
            torch.cuda.synchronize()
        averages = profile.key_averages()
        lines.append(averages.table(sort_by="device_time_total", row_limit=40))
        kernels = [{"name": one.key, "calls": one.count, "microseconds": one.device_time_total} for one in averages]
    sizes = ("classes", "rate", "batch", "dim", "device", "lce", "margin", "rows", "compute", "impl")
    figures = {
        "bench": "head",
        **{k: getattr(args, k) for k in sizes},
        **origin(),
        "passes": {name: asdict(one) for name, one in passes.found.items()},
        "kernels": kernels,
    }
    write_json(figures, args.json)
    if args.json != "-":
        print("\n".join(lines))
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise :class:`ConfigError` for what would end a process of ours with a traceback."""
    import pydantic
    import torch

    from trainer.errors import ConfigError

    for name, least in (("batch", args.world_size), ("dim", 1), ("world_size", 1), ("steps", 1), ("warmup", 0)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least {least}")
    classes = min(args.rungs) if args.ladder else args.classes
    if classes < args.world_size:
        raise ConfigError(f"{classes} classes for {args.world_size} rank(s): each needs one")
    if args.compile_maps and args.lce not in MAPPED:
        raise ConfigError(f"--compile-maps: --lce {args.lce} trains no map; say --lce backward, forward or both")
    if args.against_no_lce and args.against != "reference":
        raise ConfigError("--against-no-lce: the other side is ours; --against is of no use then")
    if args.device == "cuda" and torch.cuda.device_count() < args.world_size:
        raise ConfigError(f"--device cuda: {torch.cuda.device_count()} usable CUDA device(s), {args.world_size} needed")
    try:
        for name in _implementations(args):
            _config(args, name)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        raise ConfigError(
            f"{error.title}.{'.'.join(map(str, problem['loc']))} = {problem['input']}: {problem['msg']}"
        ) from None


def _implementations(args: argparse.Namespace) -> list[str]:
    return ["reference", "ours"] if args.only == "both" else [args.only]


def summary(figures: dict[str, Any]) -> str:
    """One measurement in words."""
    head = f"{figures['classes']:,} classes, rate {figures['rate']}, batch {figures['batch']}, {figures['dtype']}"
    lines = [f"{head}, {figures['world_size']} rank(s) on {figures['device']}"]
    for name in ("reference", "ours"):
        if figures.get(name):
            one = figures[name]
            lines.append(f"  {name:9} {one['seconds']:.4f} s, peak {one['peak_bytes'] / 2**30:.2f} GiB")
    if "ratio" in figures:
        lines.append(f"  ratio {figures['ratio']:.2f}")
    if "bound_seconds" in figures:
        lines.append(
            f"  {figures['times_bound']:.2f} × the bound of {figures['bound_seconds']:.4f} s (products "
            f"{figures['products_seconds']:.4f} s, memory {figures['memory_seconds']:.4f} s); "
            f"peak {figures['times_state']:.2f} × the state of {figures['state_bytes'] / 2**30:.2f} GiB"
        )
    return "\n".join(lines)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one run, as the JSON holds them."""
    from trainer.head.products import bfloat16_instructions

    names = _implementations(args)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    figures: dict[str, Any] = {
        "bench": "head",
        **{k: getattr(args, k) for k in ("classes", "rate", "batch", "dim", "device", "world_size", "lce", "margin")},
        "dtype": f"rows {args.rows}, compute {args.compute}",
        "optimizer": args.optimizer,
        "impl": args.impl,
        "compiled_maps": args.compile_maps,
        "against": "ours without LCE" if args.against_no_lce else args.against,
        "bfloat16": bfloat16_instructions() if args.device == "cpu" else None,
        "alternating": not args.sequential,
        **origin(),
    }
    groups = [names] if not args.sequential else [[name] for name in names]
    for group in groups:
        running = {name: Implementation(name, args) for name in group}
        try:
            for step in range(args.warmup + args.steps):
                for name, one in running.items():
                    taken = one.step(step)
                    if step >= args.warmup:
                        seconds[name].append(taken)
                print(f"turn {step + 1} of {args.warmup + args.steps} ({', '.join(group)})", file=sys.stderr)
            for name, one in running.items():
                figures[name] = {"seconds": statistics.median(seconds[name]), **one.finish()}
        finally:
            for one in running.values():
                one.close()
    return figures | _ratios(args, figures, seconds)


def _ratios(args: argparse.Namespace, figures: dict[str, Any], seconds: dict[str, list[float]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if len(seconds) == 2:
        pairs = zip(seconds["reference"], seconds["ours"], strict=True)
        out["ratio"] = statistics.median(theirs / ours for theirs, ours in pairs)
    if "ours" in figures:
        ours = figures["ours"]
        for name in ("products_seconds", "memory_seconds", "state_bytes"):
            out[name] = ours.pop(name)
        out["bound_seconds"] = max(out["products_seconds"], out["memory_seconds"])
        out["times_bound"] = ours["seconds"] / out["bound_seconds"]
        out["times_state"] = ours["peak_bytes"] / out["state_bytes"]
    return out


class Implementation:
    """One implementation on W processes, driven step by step."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        plain = {k: v for k, v in vars(args).items() if v is None or isinstance(v, (bool, int, float, str))}
        args = argparse.Namespace(**plain)  # what the command keeps besides the options cannot be sent
        self.folder = tempfile.TemporaryDirectory()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(args.world_size):
            ours, theirs = context.Pipe()
            store = str(Path(self.folder.name) / "store")
            process = context.Process(target=_rank, args=(name, args, rank, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        self._ask("ready")

    def step(self, number: int) -> float:
        """Take a turn on all ranks; the slowest one's seconds for its last step."""
        time.sleep(REST_SECONDS)
        for one in range(STEPS_A_TURN):
            seconds = self._ask(number * STEPS_A_TURN + one)
        return float(max(seconds))

    def finish(self) -> dict[str, Any]:
        """Peak memory of a rank in bytes, the largest; ours also measures the bound."""
        from trainer.errors import ConfigError

        answers = self._ask("finish")
        eager = next((answer["eager"] for answer in answers if answer.get("eager")), None)
        if eager is not None:
            raise ConfigError(
                f"torch.compile failed, the head ran uncompiled and is not what is measured here: {eager}"
            )
        for answer in answers:
            answer.pop("eager", None)
        return {key: max(answer[key] for answer in answers) for key in answers[0]}

    def close(self) -> None:
        """End the processes."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
        self.folder.cleanup()

    def _ask(self, what: int | str) -> list[Any]:
        for rank, pipe in enumerate(self.pipes):
            with _answering(rank):
                pipe.send(what)
        answers = []
        for rank, pipe in enumerate(self.pipes):
            with _answering(rank):
                answers.append(pipe.recv())
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers


@contextmanager
def _answering(rank: int) -> Iterator[None]:
    """Around the talk with a rank: its end is named."""
    try:
        yield
    except (EOFError, OSError):
        raise RuntimeError(f"rank {rank} ended without an answer (out of memory?)") from None


def _rank(name: str, args: argparse.Namespace, rank: int, store: str, pipe: Connection) -> None:
    """One process: build the head, then answer until the pipe closes."""
    import os

    import torch
    import torch.distributed as dist

    from trainer.distributed import Ranks
    from trainer.errors import ConfigError

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // args.world_size))
    device = torch.device(args.device, rank) if args.device == "cuda" else torch.device("cpu")
    if args.device == "cuda":
        torch.cuda.set_device(device)  # else NCCL and the events of every rank are GPU 0's
    if args.world_size > 1:
        backend = "nccl" if args.device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=args.world_size)
    ranks = Ranks(rank, args.world_size, rank, device)
    try:
        head = _head(name, args, ranks)
    except ConfigError as error:  # an implementation that does not run here
        pipe.recv()
        pipe.send(error)
        return
    if args.lce in MAPPED and name == "ours":
        companion, optimizer = _companion(args, ranks)
    else:
        companion = optimizer = None
    generator = torch.Generator().manual_seed(rank)
    local = args.batch // args.world_size
    bounds: list[tuple[float, float]] = []  # the machine's speed changes while it works: measured after every step
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        if request == "ready":
            pipe.send(True)
        elif request == "finish":
            pipe.send(_final(name, args, head, device, bounds))
        else:
            x = torch.randn(local, args.dim, generator=generator).to(device).requires_grad_()
            y = torch.randint(0, args.classes, (local,), generator=generator).to(device)
            pipe.send(_timed_step(head, x, y, request, companion, optimizer))
            if name == "ours":  # while the other side rests before its step
                rows = len(head.rows) if args.rate == 1 else round(args.rate * len(head.rows))
                bounds.append((products_seconds(rows, args, device), memory_seconds(rows, head, len(bounds))))


def _config(args: argparse.Namespace, name: str) -> Any:
    """The head that is measured, ``ours`` or ``reference``. Raises pydantic's ValidationError."""
    from trainer.config import parse_section
    from trainer.head.config import HeadConfig

    impl = args.impl if name == "ours" or args.against_no_lce else args.against
    plain = impl == "reference"
    tree = {
        "impl": impl,
        "margin": {"name": args.margin, "scale": 64.0},
        "sample_rate": args.rate,
        "optimizer": {"name": args.optimizer} | ({"momentum": args.momentum} if args.optimizer == "sgd" else {}),
        "rows": "float32" if plain else args.rows,
        "compute": "float32" if plain else args.compute,
    }
    return parse_section(HeadConfig, tree, "lce bench head")


def _head(name: str, args: argparse.Namespace, ranks: Any) -> Any:
    from trainer.head.partial_fc import PartialFC

    config = _config(args, name)
    compat = None
    if args.lce == "direct" and not (name == "reference" and args.against_no_lce):
        compat = _bank(args, ranks)
    local = args.batch // ranks.world_size
    head = PartialFC(config, args.classes, args.dim, ranks, seed=0, compat=compat, local_batch=local)
    head.set_lr(0.1)
    return head


def _bank(args: argparse.Namespace, ranks: Any) -> Any:
    """Synthetic centres of the rank's classes."""
    import torch

    from trainer.head.old_centers import DirectCompat
    from trainer.head.partition import class_range

    size = class_range(args.classes, ranks.rank, ranks.world_size).size
    dtype = torch.float32 if args.centers == "float32" else torch.bfloat16
    if args.centers == "mapped":
        with tempfile.NamedTemporaryFile(prefix="lce-centers-") as file:  # nameless once it is open: it ends with us
            centers = torch.from_file(file.name, shared=True, size=size * args.dim, dtype=dtype).view(size, args.dim)
    else:
        centers = torch.empty(size, args.dim, device=ranks.device, dtype=dtype)
    for part in centers.split(65536):
        part.copy_(torch.nn.functional.normalize(torch.randn(part.shape, device=part.device)))
    boundaries = torch.full((size,), 0.3, device=centers.device)
    mask = torch.ones(size, dtype=torch.bool, device=centers.device)
    return DirectCompat(centers, boundaries, mask, 0.4, 1.0)


def _companion(args: argparse.Namespace, ranks: Any) -> tuple[Any, Any]:
    """LCE through trained maps, as the head takes it, and the maps' optimizer."""
    import torch

    from trainer.compat.bank.center_bank import BankRows
    from trainer.compat.methods.config import LceTransformedConfig
    from trainer.compat.methods.lce import TransformedCompat, gather_pairs
    from trainer.run.parallel import compile_blocks

    made_up = _bank(args, ranks)
    unknown = torch.zeros(len(made_up.mask), dtype=torch.int64)
    bank = BankRows(made_up.centers, made_up.boundaries, made_up.mask, unknown, unknown)
    compat = TransformedCompat(LceTransformedConfig(mode=args.lce, bank=Path("synthetic")), args.dim, args.dim)
    compat.to(ranks.device)
    if args.compile_maps:
        compile_blocks(compat.maps().values())

    def loss(embeddings: Any, labels: Any, rows: Any) -> Any:
        return compat(gather_pairs(labels, rows, bank, args.classes, ranks), embeddings)

    return loss, torch.optim.SGD(compat.parameters(), 0.01, momentum=0.9)


def _timed_step(head: Any, x: Any, y: Any, number: int, companion: Any = None, optimizer: Any = None) -> float:
    import torch

    labels = head.gather_labels(y)  # as training does, before the network's own work
    if x.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    head(x, labels, number, companion).loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _final(
    name: str, args: argparse.Namespace, head: Any, device: Any, bounds: list[tuple[float, float]]
) -> dict[str, Any]:
    from trainer.distributed import peak_memory_bytes
    from trainer.head.kernels import why_eager

    peak = peak_memory_bytes(device)
    if name != "ours":
        return {"peak_bytes": peak}
    products, memory = zip(*bounds[STEPS_A_TURN * args.warmup :], strict=True)
    return {
        "peak_bytes": peak,
        "eager": why_eager(),
        "state_bytes": sum(t.nbytes for t in head.softmax.tables().values()) + _center_bytes(head),
        "products_seconds": statistics.median(products),
        "memory_seconds": statistics.median(memory),
    }


def _center_bytes(head: Any) -> int:
    return 0 if head.compat is None else int(head.compat.centers.nbytes)


def memory_seconds(rows: int, head: Any, number: int) -> float:
    """Seconds of the memory traffic that a step of ``rows`` rows cannot avoid, at the speed of one part of the rows,
    the ``number``-th: rows and centres are read in both passes, the optimizer's state in one, and all but the centres
    are written.
    """
    import torch

    table = head.rows.data.view(torch.uint8)  # its version, which the optimizer watches, is to stay
    part, times = timed_part(table, number, table.device.type)
    if part.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        part.bitwise_or_(0)
    if part.is_cuda:
        torch.cuda.synchronize()
    speed = 2 * times * part.nbytes / (time.perf_counter() - began)
    state = sum(t.nbytes for t in head.softmax.tables().values())
    return (2 * state + table.nbytes + 2 * _center_bytes(head)) * rows / len(table) / speed


def timed_part(table: Any, number: int, device_type: str) -> tuple[Any, int]:
    """The ``number``-th part of a table (R, bytes of a row) that is timed, whole rows, and how often: on CUDA a table
    that has fewer bytes than are to be moved is taken several times.
    """
    least = PART_BYTES[device_type]
    rows = min(len(table), -(-least // table.shape[1]))
    first = number * rows % (len(table) - rows + 1)
    part = table[first : first + rows]
    return part, -(-least // part.nbytes) if device_type == "cuda" else 1


def products_seconds(rows: int, args: argparse.Namespace, device: Any) -> float:
    """Seconds of four products of (rows × D) with (D × B), at the speed of one on a chunk that stays in cache."""
    import torch

    from tools.measuring import median_seconds
    from trainer.head.products import matmul_precision
    from trainer.head.sizes import chunk_rows

    chunk = chunk_rows(0, device.type, args.batch)
    dtype = torch.bfloat16 if args.compute == "bfloat16" else torch.float32
    a = torch.randn(chunk, args.dim, device=device).to(dtype)
    b = torch.randn(args.dim, args.batch, device=device).to(dtype)
    out = torch.empty(chunk, args.batch, device=device, dtype=dtype)
    with matmul_precision(args.compute == "tf32"):
        seconds = median_seconds(lambda: torch.mm(a, b, out=out), device.type, steps=15, warmup=5)
    return 4 * rows / chunk * seconds
