"""The collectives of an update, with their bytes: what the process group is asked for, not an estimate.

A test counts the collectives of real updates on 2 and 3 ranks and compares them one by one.
"""

from dataclasses import dataclass
from typing import Literal

from trainer.compat.methods.config import (
    AdvBctConfig,
    BctConfig,
    Bt2Config,
    LceConfig,
    LceDirectConfig,
    LceMapsConfig,
    MixBctConfig,
    NdppConfig,
    UniBctConfig,
    WithOldConfig,
)
from trainer.planning.backbones import BackboneSizes
from trainer.planning.maps import map_sizes
from trainer.planning.setting import Setting

Operation = Literal["all-gather", "all-reduce", "reduce-scatter"]


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind in an update.

    Attributes:
        purpose: what they are for.
        operation: what is asked for.
        tensor_bytes: the whole tensor: an all-gather's result, what an all-reduce sums, a reduce-scatter's input.
        count: how many of this size an update makes.
        exact: False: at most so many bytes; the batch decides.
        on_host: between host memories (gloo), whatever the device.
    """

    purpose: str
    operation: Operation
    tensor_bytes: int
    count: int = 1
    exact: bool = True
    on_host: bool = False

    def sent_bytes(self, world_size: int) -> float:
        """What a rank sends for all of them by a ring: (W−1)/W of the tensor, twice that for an all-reduce."""
        passes = 2 if self.operation == "all-reduce" else 1
        return self.count * passes * self.tensor_bytes * (world_size - 1) / world_size


def update_traffic(setting: Setting, backbone: BackboneSizes) -> list[Collective]:
    """All collectives of one update, empty in a single process."""
    if setting.world_size == 1:
        return []
    number = setting.embedding_bytes
    out = [*_head(setting), *_compatibility(setting), *_backbone(setting, backbone)]
    buffers = backbone.buffers + map_sizes(setting).statistics
    if buffers:
        out.append(Collective("running statistics", "all-reduce", buffers * number))
    out.append(Collective("stop and checkpoint vote", "all-reduce", 16, on_host=True))
    return out


def _head(setting: Setting) -> list[Collective]:
    """Of the sharded head, ``train.accumulate`` times each."""
    count, gathered = setting.config.train.accumulate, setting.gathered
    row = setting.config.backbone.dim * setting.embedding_bytes
    width = -(-(row + 8) // 8) * 8
    out = [
        Collective("embeddings and labels", "all-gather", gathered * width, count),
        *_softmax(setting),
        Collective("gradient of the embeddings", "reduce-scatter", gathered * row, count),
    ]
    if setting.config.head.margin.name == "curricular":
        out.insert(1, Collective("target cosines, for the negatives", "all-reduce", gathered * 8, count))
    return out


def _softmax(setting: Setting) -> list[Collective]:
    """The sums over all classes; the plain implementation asks for its numbers one kind at a time."""
    count, gathered = setting.config.train.accumulate, setting.gathered
    if setting.config.head.impl != "reference":
        return [Collective("softmax sums and target cosines", "all-reduce", (2 * gathered + 3) * 8, count)]
    numbers = gathered * setting.work_bytes
    out = [Collective("softmax sums, target cosines, largest logits", "all-reduce", numbers, 3 * count)]
    if setting.bank_dim is not None and setting.config.of(LceConfig):
        out.append(Collective("sums of LCE", "all-reduce", setting.work_bytes, 3 * count))
    return out


def _compatibility(setting: Setting) -> list[Collective]:
    """Of the compatibility methods; direct LCE adds nothing, and neither do rows that stay at the bank."""
    dim, old, number = setting.config.backbone.dim, setting.old_dim, setting.embedding_bytes
    count, gathered = setting.config.train.accumulate, setting.gathered
    out: list[Collective] = []

    def pairs(width: int) -> Collective:
        most = setting.world_size * gathered * width
        return Collective("rows and centres of the batch's classes", "all-gather", most, count, exact=False)

    for method in setting.config.methods if setting.bank_dim is not None else ():
        if isinstance(method, LceMapsConfig):
            out.append(pairs((dim + old + 2) * setting.work_bytes))
        elif isinstance(method, AdvBctConfig) or (isinstance(method, LceDirectConfig) and method.authors_formula):
            out.append(pairs((old + 2) * 4))
    for method in setting.config.methods:
        if isinstance(method, WithOldConfig):
            mixed = isinstance(method, MixBctConfig)
            width = -(-((old + mixed) * number + 8) // 8) * 8
            out.append(Collective(f"old embeddings ({method.method})", "all-gather", gathered * width, count))
            if mixed:
                out.append(Collective("which old embeddings are credible", "all-reduce", gathered * 8, count))
        if isinstance(method, BctConfig | UniBctConfig | NdppConfig | Bt2Config):
            out.append(Collective(f"old classifier's sums ({method.method})", "all-reduce", 3 * gathered * 8, count))
        if isinstance(method, Bt2Config):
            out.append(Collective("gradient of the old part (bt2)", "all-reduce", gathered * old * number, count))
    return out


def _backbone(setting: Setting, backbone: BackboneSizes) -> list[Collective]:
    train, number = setting.config.train, setting.embedding_bytes
    if train.parallel == "ddp":
        item = 2 if train.compress_gradients else number
        return [Collective("backbone's gradients (DDP)", "all-reduce", backbone.parameters * item)]
    if train.parallel != "fsdp":
        return _zero(setting, backbone)
    world, out = setting.world_size, []
    for index, unit in enumerate(backbone.unit_parameters):
        root = index == len(backbone.unit_parameters) - 1
        whole = sum(_padded(shape, world) for shape, _ in unit) * number
        trained = sum(_padded(shape, world) for shape, learns in unit if learns) * number
        gathers = train.accumulate * (1 if root else 2)  # units are gathered again in the backward pass
        if whole:
            out.append(Collective("backbone's parameters (FSDP)", "all-gather", whole, gathers))
        if trained:
            out.append(Collective("backbone's gradients (FSDP)", "reduce-scatter", trained))
    return [*out, Collective("gradient norm", "all-reduce", 8)]


def _zero(setting: Setting, backbone: BackboneSizes) -> list[Collective]:
    """DeepSpeed's, by what its stages exchange; it cuts them into buckets and adds small ones of its own."""
    train, number = setting.config.train, 2 if setting.config.train.compress_gradients else 4
    sizes = backbone.parameters * number
    out = [Collective(f"backbone's gradients ({train.parallel})", "reduce-scatter", sizes, exact=False)]
    gathers = 2 * train.accumulate if train.parallel == "zero3" else 1
    return [
        *out,
        Collective(
            f"backbone's parameters ({train.parallel})", "all-gather", backbone.parameters * 4, gathers, exact=False
        ),
    ]


def _padded(shape: tuple[int, ...], world: int) -> int:
    """Numbers of a parameter over all ranks as FSDP2 shards it: by its first dimension, padded to a multiple of W."""
    rest = 1
    for size in shape[1:]:
        rest *= size
    return -(-shape[0] // world) * world * rest if shape else world
