"""Training steps on tensors that claim to be on a CUDA device, where there is none: how often the host waits for it.

A tensor here says ``device=cuda:0`` and holds its data in host memory; every operation is checked as CUDA would check
it and then computed on the CPU, so that a whole step runs with real numbers. What is listed:

* ERROR  an operation that mixes devices: it would raise there;
* WAIT   the host would wait for the device: ``item``, ``nonzero``, ``unique``, boolean masks, copies to the host that
         are not into pinned memory, copies from it that do not say non_blocking, events.

``python -m tests.fake_cuda WORLD`` prints, for rank 1 of WORLD (0 of 1), the losses, errors and waits of an update by
case as JSON. It needs g++: autograd's engine wants a device guard and hooks for CUDA, a few lines of C++.
"""

import collections
import contextlib
import ctypes
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import traceback
import zlib
from pathlib import Path
from typing import Any

GUARD = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
using c10::Device; using c10::DeviceType; using c10::DeviceIndex; using c10::Stream;
struct Guard : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  static Device zero() { return Device(DeviceType::CUDA, 0); }
  static Stream stream() { return Stream(Stream::DEFAULT, zero()); }
  Device exchangeDevice(Device) const override { return zero(); }
  Device getDevice() const override { return zero(); }
  Stream getStream(Device) const noexcept override { return stream(); }
  Stream getNewStream(Device, int = 0) const override { return stream(); }
  Stream exchangeStream(Stream) const noexcept override { return stream(); }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
struct FakeHooks : at::CUDAHooksInterface {
  explicit FakeHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  bool isPinnedPtr(const void*) const override { return false; }
};
using at::CUDAHooksRegistry; using at::RegistererCUDAHooksRegistry;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, FakeHooks)
}
"""


def load_guard() -> None:
    """Build (once) and load the library, before torch asks for CUDA's hooks, which is while it is imported."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    key = zlib.crc32((GUARD + (root / "version.py").read_text()).encode())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lce-trainer"
    built = folder / f"fake-cuda-{key:08x}.so"
    if not built.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            source = Path(own) / "guard.cpp"
            source.write_text(GUARD)
            include = root / "include"
            headers = [f"-I{include}", f"-I{include}/torch/csrc/api/include"]
            command = ["g++", "-O0", "-std=c++20", "-shared", "-fPIC", *headers, str(source), "-o", f"{own}/guard.so"]
            subprocess.run([*command, f"-L{root}/lib", "-lc10", "-ltorch_cpu"], check=True)
            Path(own, "guard.so").replace(built)
    for library in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(root / "lib" / library), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(built))


if __name__ == "__main__":
    load_guard()
import torch  # noqa: E402
from torch.utils import _pytree as pytree  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
ROOT = Path(__file__).resolve().parents[1]


class Fake(torch.Tensor):
    """A tensor on the simulated device; ``held`` holds its data."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, real: torch.Tensor, requires_grad: bool = False) -> "Fake":
        out = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            real.shape,
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            layout=real.layout,
            device=CUDA,
            requires_grad=requires_grad,
        )
        out.held = real.detach()
        return out

    def __repr__(self) -> str:
        return f"Fake({self.held})"

    def tolist(self) -> Any:
        """Torch refuses it for subclasses."""
        LOG.note("WAIT", "tolist")
        return self.held.tolist()

    def new_tensor(self, data: Any, **options: Any) -> Any:
        """Torch makes it on the host and copies it below Python's sight."""
        LOG.note("WAIT", "new_tensor: blocking copy from the host")
        return Fake(self.held.new_tensor(data, **{k: v for k, v in options.items() if k != "device"}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return LOG.run(func, args, kwargs or {})


SYNCS = {
    aten._local_scalar_dense.default: "item",
    aten.nonzero.default: "nonzero",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.unique_consecutive.default: "unique",
    aten.masked_select.default: "masked_select",
    aten.equal.default: "equal",
    aten.is_nonzero.default: "bool",
    aten.bincount.default: "bincount",
}
COPIES = (aten._to_copy.default, aten.copy_.default)
TO_FLOAT32 = {aten.mm.dtype: aten.mm.default}
NO_SCALARS = (aten.cat.default, aten.stack.default, aten.mm.default, aten.addmm.default, aten.index_add_.default)


PINNED: dict[int, torch.Tensor] = {}
"""Storages in pinned memory, kept so that none takes the address of another."""


def _pinned(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() in PINNED


class Log:
    """What was met, by kind and place; and the one function that runs an operation."""

    def __init__(self) -> None:
        self.met: collections.Counter[tuple[str, str, str]] = collections.Counter()
        self.ops = 0
        self.on = True

    def note(self, kind: str, what: str) -> None:
        # Autograd runs the backward pass of CUDA tensors in a thread of its own, which the main one waits for.
        if self.on and not threading.current_thread().name.startswith("old centres"):  # that one holds up nothing
            self.met[kind, what, where()] += 1

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        flat = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        fakes = [t for t in flat if isinstance(t, Fake)]
        plain = [t for t in flat if not isinstance(t, Fake)]
        wanted = kwargs.get("device")
        wanted = None if wanted is None else torch.device(wanted)
        if not fakes and (wanted is None or wanted.type != "cuda"):
            return func(*args, **kwargs)
        self.ops += 1
        on_cuda = wanted.type == "cuda" if wanted is not None else bool(fakes)
        if func in COPIES:
            on_cuda = self._copy(func, args, kwargs, on_cuda)
        elif fakes and plain:
            self._mixed(func, args, plain)
        if fakes:
            self._waits(func, args)
        inner = pytree.tree_map(lambda t: t.held if isinstance(t, Fake) else t, (args, kwargs))
        if wanted is not None:
            inner[1]["device"] = torch.device("cpu")
        if func in TO_FLOAT32:  # the CPU has no product of bfloat16 with a float32 result
            *matrices, dtype = inner[0]
            func, inner = TO_FLOAT32[func], ([m.to(dtype) for m in matrices], {})
        out = func(*inner[0], **inner[1])
        if not on_cuda:
            return return_in_place(func, args, out)
        out = pytree.tree_map(lambda t: Fake(t) if isinstance(t, torch.Tensor) else t, out)
        if func.namespace == "c10d":
            return out
        return return_in_place(func, args, out)

    def _copy(self, func: Any, args: Any, kwargs: dict[str, Any], on_cuda: bool) -> bool:
        """A copy between devices; whether its result is on CUDA."""
        if func is aten.copy_.default:
            target, source = args[0], args[1]
            there = isinstance(target, Fake)
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        else:
            source, there = args[0], on_cuda
            blocking = not kwargs.get("non_blocking", False)
        here = isinstance(source, Fake)
        size = source.numel() * source.element_size()
        if here and not there and (blocking or not _pinned(args[0])):
            self.note("WAIT", f"copy to the host, {size} B")
        if there and not here and (blocking or not (_pinned(source) or source.numel() < 2)):
            self.note("WAIT", f"{'blocking copy' if blocking else 'copy from pageable memory'} to the device, {size} B")
        return there

    def _mixed(self, func: Any, args: Any, plain: list[torch.Tensor]) -> None:
        """An operation on both devices: what CUDA allows is a number from the host, and indices into a CUDA tensor."""
        name = str(func)
        writes = func._schema.arguments and func._schema.arguments[0].is_write
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            if isinstance(args[0], Fake):
                if any(t.ndim or t.dtype == torch.bool for t in plain):
                    self.note("WAIT", f"{name}: indices from the host")
                return
        elif all(t.ndim == 0 for t in plain) and func not in NO_SCALARS:
            if not (writes and isinstance(args[0], torch.Tensor) and not isinstance(args[0], Fake)):
                return
        elif func.namespace in ("c10d",):
            return
        shapes = ", ".join(str(tuple(t.shape)) for t in plain)
        self.note("ERROR", f"{name}: CPU tensor {shapes} next to CUDA ones")

    def _waits(self, func: Any, args: Any) -> None:
        if func in SYNCS and isinstance(args[0], Fake):
            self.note("WAIT", SYNCS[func])
        elif func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            masks = [t for t in args[1] if isinstance(t, torch.Tensor) and t.dtype in (torch.bool, torch.uint8)]
            if masks and not (func is not aten.index.Tensor and args[2].numel() == 1 and masks[0].ndim == args[0].ndim):
                self.note("WAIT", "boolean mask (nonzero)")
        elif func is aten.repeat_interleave.Tensor:
            self.note("WAIT", "repeat_interleave")


def return_in_place(func: Any, args: Any, out: Any) -> Any:
    """In-place operations give their argument back."""
    arguments = func._schema.arguments
    returns = func._schema.returns
    if len(returns) == 1 and arguments and arguments[0].is_write and returns[0].alias_info is not None:
        return args[0]
    if len(returns) == 1 and returns[0].alias_info is not None and returns[0].alias_info.is_write:
        return out
    return out


LOG = Log()


class Mode(TorchDispatchMode):
    """Catches what makes tensors from nothing; the rest comes by way of :class:`Fake`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return LOG.run(func, args, kwargs or {})


def where() -> str:
    """The innermost lines of this project that are being executed, or the autograd node."""
    found = []
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if "site-packages" in path.parts or path == Path(__file__).resolve():
            continue
        with contextlib.suppress(ValueError):
            found.append(f"{path.relative_to(ROOT)}:{frame.lineno}")
    return " < ".join(found[:2]) or "inside torch (backward of a built-in operation)"


@contextlib.contextmanager
def fake_cuda() -> Any:
    """Doors to CUDA that lead nowhere."""
    from torch.cuda.amp import common

    generator, empty = torch.Generator, torch.empty

    class Generator:
        def __new__(cls, device: Any = "cpu") -> Any:
            return generator("cpu")

    class Event:
        def __init__(self, enable_timing: bool = False) -> None: ...
        def record(self, stream: Any = None) -> None: ...
        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            LOG.note("WAIT", "event")

        def elapsed_time(self, other: Any) -> float:
            return 0.0

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        out = tensor.clone()
        PINNED[out.untyped_storage().data_ptr()] = out
        return out

    class Stream:
        def __init__(self, *_: Any) -> None: ...
        def wait_stream(self, other: Any) -> None: ...
        def wait_event(self, event: Any) -> None: ...

    def empty_pinned(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return pin(empty(*size, **options)) if pin_memory else empty(*size, **options)

    changes: list[tuple[Any, str, Any]] = [
        (torch, "Generator", Generator),
        (torch, "empty", empty_pinned),
        (torch.Tensor, "pin_memory", pin),
        (torch.Tensor, "record_stream", lambda tensor, stream: None),
        (torch.cuda, "Event", Event),
        (torch.cuda, "Stream", Stream),
        (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
        (torch.cuda, "current_stream", lambda device=None: Stream()),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "is_bf16_supported", lambda *a, **k: True),
        (torch.cuda, "max_memory_allocated", lambda *a, **k: 0),
        (common, "amp_definitely_not_available", lambda: False),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # Module.to makes parameters of the new kind
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") then shows its copy
    try:
        with Mode():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        for owner, name, value in before:
            setattr(owner, name, value)


INJECTED = "careless backward"
"""The case whose second pass waits once and mixes devices once: the log has to find both."""
LCE = {"compat__method": "lce"}
SAMPLED = {"head__sample_rate": 0.3}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sampled": SAMPLED,
    "sampled, correction": {**SAMPLED, "head__sampling_correction": True},
    "sampled, adamw": {**SAMPLED, "head__optimizer": {"name": "adamw"}},
    "bfloat16": {**SAMPLED, "head__rows": "bfloat16", "head__compute": "bfloat16"},
    "no momentum": {**SAMPLED, "head__optimizer": {"momentum": 0.0}},
    "float8": {"head__rows": "float8", "head__optimizer": {"momentum": 0.0}},
    "float8, sampled": {**SAMPLED, "head__rows": "float8", "head__optimizer": {"momentum": 0.0}},
    "sub-centres": {**SAMPLED, "head__sub_centers": 3},
    **{
        f"margin {name}": {"head__margin": {"name": name, "scale": 16}} for name in ("adaface", "magface", "curricular")
    },
    "inter-class filter": {"head__margin": {"scale": 16, "inter_class_filter": 0.5}},
    "lce direct": {**LCE, **SAMPLED},
    "lce direct, host centres": {**LCE, **SAMPLED, "compat__centers": "host"},
    "lce direct, authors": {**LCE, "compat__authors_formula": True},
    **{f"lce {mode}": {**LCE, "compat__mode": mode} for mode in ("backward", "forward", "both")},
    "lce cross-model": {"cross": ("new", "bank", "new_bank")},
    "lce cross-model, images": {"cross": ("new", "old", "bank"), "compat__noise": 0.5},
    **{f"rival {name}": {"compat__method": name} for name in ("bct", "l2", "fct", "mixbct", "advbct")},
    "rival bct, sampled": {"compat__method": "bct", **SAMPLED},
    "deferred": {**SAMPLED, "head__update": "deferred"},
    "accumulated": {**SAMPLED, "train__accumulate": 2},
    INJECTED: {},
}
CHUNKS = {"one chunk": 1, "eight chunks": 8}
DIM, CLASSES, RECORDS = 8, 64, 256


def configuration(case: dict[str, Any], folder: Path, world: int, chunk: int) -> Any:
    """A run in batches of 12 a rank."""
    import numpy as np

    from tests.banks import write_bank
    from tests.runs import tree
    from trainer.compat.bank.center_bank import BankInfo
    from trainer.run.config import parse_config

    case = dict(case)
    base: dict[str, Any] = {
        "run__device": "cpu",
        "data__synthetic_classes": CLASSES,
        "data__synthetic_records": RECORDS,
        "data__batch_size": 12 * world,
        "backbone__dim": DIM,
        "head__rows": "float32",
        "head__chunk_rows": chunk,
        "head__margin": {"scale": 16, "m": 0.2},
        "train__precision": "float32",
    }
    cross, method = case.pop("cross", None), case.get("compat__method")
    rng = torch.Generator().manual_seed(1)
    centers = torch.nn.functional.normalize(torch.randn(CLASSES, DIM, generator=rng))
    mask = torch.arange(CLASSES) % 7 != 0
    old = centers[torch.arange(RECORDS) % CLASSES] + 0.2 * torch.randn(RECORDS, DIM, generator=rng)
    if method or cross:
        for name in ("bank", "new-bank"):
            known = {"boundaries": torch.full((CLASSES,), 0.7), "counts": torch.full((CLASSES,), 4), "mask": mask}
            write_bank(folder / name, centers=centers, info=BankInfo(model=name), **known)
        for name in ("old", "new"):
            np.save(folder / f"{name}.npy", torch.nn.functional.normalize(old).numpy())
        base["compat__bank"] = str(folder / "bank")
        if method in ("l2", "fct", "mixbct", "advbct"):
            base["compat__old_embeddings"] = str(folder / "old.npy")
    if cross:
        from tests.data.samples import packed

        packed(folder, CLASSES, RECORDS // CLASSES, (8, 8))
        files = {
            "new": ("new_embeddings", "new.npy"),
            "old": ("old_embeddings", "old.npy"),
            "bank": ("bank", "bank"),
            "new_bank": ("new_bank", "new-bank"),
        }
        base = {"run__device": "cpu", "data__batch_size": 12 * world, "train__precision": "float32"}
        base |= {"data__loader": "torch", "data__path": str(folder / "packed"), "data__workers": 0}
        base |= {**LCE, "compat__mode": "cross-model"}
        base |= {f"compat__{files[name][0]}": str(folder / files[name][1]) for name in cross}
    return parse_config(tree(folder / "run", **(base | case)), "fake-cuda")


class _Watch:
    def at(self, step: int, phase: str) -> None: ...


class _Monitor:
    def count(self, samples: int) -> None: ...
    def due(self, step: int) -> bool:
        return False

    def show_images(self, *_: Any) -> None: ...
    @contextlib.contextmanager
    def waiting_for_data(self) -> Any:
        yield


def losses_and_log(config: Any, world: int, device: torch.device, updates: int) -> float:
    """The loss of the last of some updates of a run; the log holds that update's waits, and every error."""
    from trainer.data import build_loader
    from trainer.distributed import Ranks
    from trainer.run.cross_model import CrossModelTask
    from trainer.run.engine import Engine
    from trainer.run.startup import prepare
    from trainer.run.task import TrainTask

    LOG.on = False
    inputs = prepare(config, Ranks())
    ranks = Ranks(1 if world > 1 else 0, world, 0, device)
    loader = build_loader(config.data, config.seed, inputs.dataset, ranks, inputs.cross is None or inputs.cross.images)
    kind = TrainTask if inputs.cross is None else CrossModelTask
    engine = Engine(config, ranks, inputs, kind(config, inputs, ranks), loader)
    batches = engine.state.loader.batches()
    LOG.on = True
    for _ in range(updates):
        for key in [key for key in LOG.met if key[0] == "WAIT"]:
            del LOG.met[key]
        values = engine.update(batches, _Monitor(), _Watch())  # type: ignore[arg-type]
    LOG.on = False
    return float(values["loss"])


@contextlib.contextmanager
def careless_backward() -> Any:
    """A second pass that waits for the device and hands an operation a tensor of the host."""
    from trainer.head.fused import FusedSoftmax

    second_pass = FusedSoftmax.second_pass

    def careless(self: Any, step: Any, gradient: Any, deferred: bool) -> torch.Tensor:
        float(gradient.coefficient)
        torch.cat([gradient.target_pull, torch.zeros(1)])
        return second_pass(self, step, gradient, deferred)

    FusedSoftmax.second_pass = careless  # type: ignore[method-assign]
    try:
        yield
    finally:
        FusedSoftmax.second_pass = second_pass  # type: ignore[method-assign]


def main(world: int) -> None:
    """Run every case and print what was met."""
    torch.set_num_threads(1)
    if world > 1:
        import torch.distributed as dist
        from torch.testing._internal.distributed.fake_pg import FakeStore

        from trainer.run import task

        dist.init_process_group("fake", rank=1, world_size=world, store=FakeStore())
        task.wrap = lambda backbone, *rest: backbone  # DDP's reducer, in C++, takes no such tensors
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        for chunks, count in CHUNKS.items():
            with tempfile.TemporaryDirectory() as folder:
                LOG.met.clear()
                config = configuration(case, Path(folder), world, CLASSES // world // count)
                with fake_cuda(), careless_backward() if name == INJECTED else contextlib.nullcontext():
                    loss = losses_and_log(config, world, CUDA, 2)
                met = {kind: sum(n for (k, _, _), n in LOG.met.items() if k == kind) for kind in ("ERROR", "WAIT")}
                places = sorted(f"{n} × {kind} {what} at {at}" for (kind, what, at), n in LOG.met.items())
                one: dict[str, Any] = {"errors": met["ERROR"], "waits": met["WAIT"], "loss": loss, "places": places}
                if world == 1 and chunks == "eight chunks":
                    one["loss on the CPU"] = losses_and_log(config, 1, torch.device("cpu"), 2)
                found.setdefault(name, {})[chunks] = one
    print(json.dumps(found, indent=1))
    sys.stdout.flush()
    os._exit(0)  # the engine's device thread has no device to leave


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(int(sys.argv[1]))
