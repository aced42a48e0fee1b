"""What a rank allocates, part by part: the model behind `lce plan`, whose constants stand here and nowhere else.

Parts that are always there add up with the largest moment: a step, or the loading of a checkpoint. Bytes of tables are
exact; what a step of the head needs besides is modelled on trainer/head, and with it the peak is within 10 % of the
measured one (`lce plan --verify`, small networks). A large network adds what autograd keeps of a batch, which is
counted, and workspace of its kernels, which is a guess. On the CPU a part is memory of the process; with CUDA it is the
GPU's, unless it says that it is the host's.
"""

import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from trainer.compat.methods.config import (
    AdvBctConfig,
    BctConfig,
    Bt2Config,
    FrozenConfig,
    LceConfig,
    LceDirectConfig,
    MixBctConfig,
    NdppConfig,
    UniBctConfig,
)
from trainer.head.config import SgdRowsConfig
from trainer.head.sizes import COMPILE_FROM_ROWS, KEEP_SHARE, chunk_rows, native_covers
from trainer.planning.backbones import BackboneSizes
from trainer.planning.maps import map_sizes
from trainer.planning.setting import BYTES, Setting

Moment = Literal["always", "step", "load"]

# Measured on the CPU (torch 2.13, Linux): a rank before its first tensor.
PROCESS_BYTES = 370 * 2**20
COMPILER_BYTES = 110 * 2**20
"""What torch.compile leaves in the process that used it."""
TRITON_BYTES = 80 * 2**20
"""What triton takes, which torch imports with the first update where it is installed."""
# Not measured here: no such device was at hand.
CUDA_CONTEXT_BYTES = 600 * 2**20
NCCL_BYTES = 400 * 2**20
CUDA_HOST_BYTES = 3 * 2**30
"""Host memory of a process that uses CUDA: its libraries and pinned buffers."""

CHUNK_BLOCKS = 3
"""Blocks of chunk × B numbers that are alive at once: products, softmax weights, and one between."""
NATIVE_ROWS = 512
"""Rows that are under way at once in the C++ passes of two threads."""
PLAIN_BLOCKS = 6
"""The same where nothing is compiled."""
BATCH_BLOCKS = 5
"""Blocks of gathered B × D numbers: embeddings, their unit vectors, those times s, the gradient twice."""
DRAW_WORDS = 12
"""Words of 8 bytes per drawn row while rows are drawn (hashes, strata, places)."""
LIVE_TENSORS = 4
"""Further tensors of the size of the largest activation: results and gradients under way in a residual unit."""
CPU_WORKSPACE_SHARE = 0.3
"""What the CPU's convolutions need besides, as a share of the activations: measured with iresnet18 in float32 alone. In
bfloat16 they need more (the plan is then a fifth too low), and CUDA's were not measured."""


@dataclass(frozen=True)
class Part:
    """One line of the plan.

    Attributes:
        name: what it is.
        bytes: of the largest rank.
        moment: ``always``; during a ``step``; or while a checkpoint is ``load``-ed.
        on_host: in host memory although ranks compute on a GPU.
        measured: False: a constant that was not measured on such a device.
    """

    name: str
    bytes: int
    moment: Moment = "always"
    on_host: bool = False
    measured: bool = True


def peak_bytes(parts: list[Part], on_host: bool = False) -> int:
    """The largest sum of parts that are there together, on the device or on the host."""
    here = [part for part in parts if part.on_host == on_host]
    sums = {moment: sum(p.bytes for p in here if p.moment == moment) for moment in ("always", "step", "load")}
    return sums["always"] + max(sums["step"], sums["load"])


def rank_memory(setting: Setting, backbone: BackboneSizes) -> list[Part]:
    """All parts of the largest rank, the first; parts without bytes are left out. Of several sample rates the one that
    takes most counts: drawn rows are copied, all of them are not.
    """
    each = [_memory_of(one, backbone) for one in setting.by_rate]
    return max(each, key=lambda parts: (peak_bytes(parts), peak_bytes(parts, on_host=True)))


def _memory_of(setting: Setting, backbone: BackboneSizes) -> list[Part]:
    parts = [*_process(setting), *_tables(setting), *_head_step(setting), *_network(setting, backbone)]
    parts += _checkpoint(setting, backbone)
    return [part for part in parts if part.bytes]


def state_bytes(setting: Setting) -> int:
    """Rows and their optimizer's state of a rank."""
    return setting.rows * class_bytes(setting)


def class_bytes(setting: Setting) -> int:
    """A row and its optimizer's state, without counters."""
    return _row_bytes(setting) + row_states(setting) * setting.config.backbone.dim * BYTES[setting.config.head.rows]


def _row_bytes(setting: Setting) -> int:
    """A row as it is stored; in float8 with its scale and, where it is kept, the bfloat16 residual."""
    head, dim = setting.config.head, setting.config.backbone.dim
    return dim * BYTES[head.rows] + (4 + 2 * dim * head.rows_residual if head.rows == "float8" else 0)


def row_states(setting: Setting) -> int:
    """Tables of the rows' optimizer: moments of AdamW, momentum of SGD where it is not 0."""
    optimizer = setting.config.head.optimizer
    return int(optimizer.momentum > 0) if isinstance(optimizer, SgdRowsConfig) else 2


def _process(setting: Setting) -> list[Part]:
    large = setting.rows >= COMPILE_FROM_ROWS and setting.config.head.impl != "reference"
    compiled = large and not _native(setting)
    if setting.device == "cpu":
        return [
            Part("process", PROCESS_BYTES),
            Part("torch.compile", COMPILER_BYTES if compiled else 0),
            Part("triton, as installed here", TRITON_BYTES if find_spec("triton") else 0),
        ]
    nccl = NCCL_BYTES if setting.world_size > 1 else 0
    return [
        Part("CUDA context", CUDA_CONTEXT_BYTES, measured=False),
        Part("NCCL's buffers", nccl, measured=False),
        Part("process", CUDA_HOST_BYTES, on_host=True, measured=False),
    ]


def _native(setting: Setting) -> bool:
    """Whether the head's passes run in C++, in the cache: a step then allocates next to nothing."""
    head, train = setting.config.head, setting.config.train
    deferred = train.accumulate > 1 or train.precision == "float16" or head.update == "deferred"
    return setting.device == "cpu" and setting.rows >= COMPILE_FROM_ROWS and native_covers(head) and not deferred


def _tables(setting: Setting) -> list[Part]:
    """What stays: rows, state, and the old model's knowledge of the same classes."""
    head, dim = setting.config.head, setting.config.backbone.dim
    table = setting.rows * _row_bytes(setting)
    states = setting.rows * class_bytes(setting) - table
    counters = 4 * setting.rows if setting.sampled or head.optimizer.name == "adamw" else 0
    parts = [Part("rows", table), Part("rows' optimizer state", states + counters)]
    for method in setting.config.methods:
        if isinstance(method, BctConfig | UniBctConfig | NdppConfig | Bt2Config | FrozenConfig):
            frozen = setting.classes * (setting.bank_dim or dim) * BYTES[head.frozen_rows]
            parts.append(Part("old classifier's rows", frozen))
        elif setting.bank_dim is not None and isinstance(method, LceConfig | AdvBctConfig | MixBctConfig):
            elsewhere = setting.device == "cuda" and (
                not isinstance(method, LceDirectConfig) or _sends_centers(setting)
            )
            with_numbers = setting.classes * (setting.bank_dim * 4 + 4 + 1)
            parts.append(Part("old centres", with_numbers, on_host=elsewhere))
            if _sends_centers(setting):
                parts.append(Part("boundaries and mask of old centres", setting.classes * (4 + 1)))
    return parts


def _sends_centers(setting: Setting) -> bool:
    """Whether old centres are in host memory, and those of a step's rows come to the GPU."""
    direct = setting.config.of(LceDirectConfig)
    return setting.device == "cuda" and setting.bank_dim is not None and direct is not None and direct.centers == "host"


def _head_step(setting: Setting) -> list[Part]:
    if setting.config.head.impl == "reference":
        return _reference_step(setting)
    head, dim, work = setting.config.head, setting.config.backbone.dim, setting.work_bytes
    rows, batch = setting.step_rows, setting.gathered
    chunk = min(rows, chunk_rows(head.chunk_rows, setting.device, batch))
    copies = setting.sampled or BYTES[head.rows] != work  # else blocks are views of the tables
    first = rows if setting.sampled else chunk
    spaces = (first + (0 if _native(setting) else row_states(setting) * chunk)) * 65 // 64 * dim * work if copies else 0
    kept = rows * batch * work if rows * batch * 4 <= KEEP_SHARE * state_bytes(setting) else 0
    if _native(setting):
        chunk = min(chunk, NATIVE_ROWS)
    compiled = setting.rows >= COMPILE_FROM_ROWS
    blocks = (CHUNK_BLOCKS if compiled else PLAIN_BLOCKS) * chunk * batch * work
    narrow = chunk * (dim + batch) * 2 if head.compute == "bfloat16" else 0
    lce = setting.bank_dim is not None and setting.config.of(LceConfig) is not None
    centers = chunk * dim * (4 if setting.sampled else 0) if lce else 0
    arrived = rows * dim * 4 if _sends_centers(setting) else 0
    numbers = rows * (
        work * (1 + lce + head.sampling_correction + (not setting.sampled)) + (8 * DRAW_WORDS if setting.sampled else 0)
    )
    deferred = 0
    waits = setting.config.train.precision == "float16" or head.update == "deferred"
    if setting.config.train.accumulate > 1 or waits:
        collected = rows * setting.config.train.accumulate
        deferred = (collected + min(collected, setting.rows) if setting.sampled else setting.rows) * dim * work
    width = dim * setting.embedding_bytes + 8
    return [
        Part("sampled rows" if setting.sampled else "blocks of rows", spaces),
        Part("old centres of a step's rows", arrived, "step"),
        Part("collected gradients of rows", deferred, "step"),
        Part("products kept for the second pass", kept, "step"),
        Part("logits of a chunk", blocks + narrow + centers + chunk * dim * work, "step"),
        Part("numbers per row of a step", numbers, "step"),
        Part("gathered batch", batch * (BATCH_BLOCKS * dim * work + width), "step"),
    ]


def _reference_step(setting: Setting) -> list[Part]:
    """The plain implementation: a dense gradient and its decayed copy, logits and rows of a step several times."""
    row = setting.config.backbone.dim * setting.work_bytes
    dense, drawn, logits = setting.rows * row, setting.step_rows * row, setting.step_rows * setting.gathered * 4
    backward = 2 * dense + 9 * drawn + 2 * logits if setting.sampled else dense + 3 * drawn + 8 * logits
    return [Part("dense gradient, rows and logits of a step", max(2 * dense, backward), "step")]


def _network(setting: Setting, backbone: BackboneSizes) -> list[Part]:
    train, number = setting.config.train, setting.embedding_bytes
    world, optimizer = setting.world_size, setting.config.optimizer
    shared = {"zero1": 0b100, "zero2": 0b110, "zero3": 0b111, "fsdp": 0b111}.get(train.parallel, 0)

    def part_of(size: int, bit: int) -> int:
        return -(-size // world) if shared & bit else size

    states = 2 if optimizer.name == "adamw" else int(optimizer.momentum > 0)
    weights = (backbone.parameters + backbone.fixed) * number
    gathered = 0
    if shared & 1:  # the largest units of the network, whole while they are computed
        units = sorted(sum(math.prod(shape) for shape, _ in unit) for unit in backbone.unit_parameters)
        gathered = 2 * sum(units[-2:]) * number
    activations = backbone.saved_bytes + backbone.unit_bytes + LIVE_TENSORS * backbone.largest_bytes
    cpu = setting.device == "cpu"
    maps = map_sizes(setting)
    local = setting.local_batch * 3 * setting.image_size[0] * setting.image_size[1]
    return [
        Part("backbone's parameters", part_of(weights, 1) + 2 * backbone.buffers * number),
        Part("backbone's gradients", part_of(backbone.parameters * number, 2)),
        Part("backbone's optimizer state", states * part_of(backbone.parameters * number, 4)),
        Part("the methods' maps: parameters, gradients, state", (2 + states) * maps.parameters * number),
        Part("moving average", weights + maps.parameters * number if train.ema else 0),
        Part("parameters gathered for a unit", gathered, "step"),
        Part("images", 2 * local * number, "step"),
        Part("activations", activations, "step"),
        Part("workspace of the network", round(CPU_WORKSPACE_SHARE * activations) if cpu else 0, "step"),
    ]


def _checkpoint(setting: Setting, backbone: BackboneSizes) -> list[Part]:
    """The copy of an asynchronous checkpoint, and one table read from a file while a checkpoint is loaded."""
    cuda = setting.device == "cuda"
    weights = backbone.parameters * setting.embedding_bytes * 2
    copy = state_bytes(setting) + weights if setting.config.checkpoint.asynchronous and setting.world_size > 1 else 0
    table = setting.rows * _row_bytes(setting)
    return [
        Part("copy for the asynchronous checkpoint", copy, on_host=cuda),
        Part("a table read from a checkpoint", 2 * table, "load", on_host=cuda),
    ]
