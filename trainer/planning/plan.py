"""The plan of a run: memory, traffic, time, sizes on disk, and what would have to change to fit a memory."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.compat.methods.config import LceDirectConfig
from trainer.errors import ranks_text
from trainer.head.config import SgdRowsConfig
from trainer.planning.backbones import BackboneSizes, backbone_sizes
from trainer.planning.maps import map_sizes
from trainer.planning.memory import Part, class_bytes, peak_bytes, rank_memory
from trainer.planning.setting import Setting
from trainer.planning.traffic import Collective, update_traffic
from trainer.run.config import AdamWConfig, Config

MOST_RANKS = 4096
"""How many ranks advice goes up to."""
RATES = (0.9, 0.7, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01)


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        setting: what it was worked out for.
        backbone: the network's numbers.
        memory: parts of the largest rank.
        traffic: collectives of an update.
        checkpoint_bytes: of a checkpoint on disk, all ranks together.
        updates: of the whole run; None: the number of records is not known.
    """

    setting: Setting
    backbone: BackboneSizes
    memory: list[Part]
    traffic: list[Collective]
    checkpoint_bytes: int
    updates: int | None

    @property
    def kept_checkpoints(self) -> int:
        """How many checkpoints lie on the disk at the end: the newest, those kept for good, the best; without a known
        number of updates those kept for good are left out."""
        kept, written = self.setting.config.checkpoint, self.written_checkpoints
        steps = self.updates or 0
        if kept.every_steps:
            newest = kept.keep if written is None else min(kept.keep, written)
            ours = range(kept.every_steps, steps, kept.every_steps)
            old = ours[: max(0, len(ours) + 1 - kept.keep)]
            for_good = sum(step % kept.keep_every == 0 for step in old) if kept.keep_every else 0
            best = int(kept.best is not None and len(old) > for_good)
            return newest + for_good + best
        return 1

    @property
    def written_checkpoints(self) -> int | None:
        """How many a run writes in all, the last at its end; None: the number of updates is not known."""
        every = self.setting.config.checkpoint.every_steps
        if not every:
            return 1
        return None if self.updates is None else 1 + max(0, self.updates - 1) // every

    @property
    def most_checkpoints(self) -> int:
        """How many lie there at a time: the newest is written before the oldest is deleted, where one is."""
        kept, written = self.kept_checkpoints, self.written_checkpoints
        return kept + (written is None or written > kept)

    @property
    def kept_bytes(self) -> int:
        """Of all checkpoints that are kept (:attr:`kept_checkpoints`)."""
        return self.kept_checkpoints * self.checkpoint_bytes

    @property
    def device_bytes(self) -> int:
        """Peak memory of a rank's device; on the CPU of its process."""
        return peak_bytes(self.memory)

    @property
    def host_bytes(self) -> int:
        """Peak host memory of a rank besides its GPU's; 0 on the CPU."""
        return peak_bytes(self.memory, on_host=True)

    @property
    def sent_bytes(self) -> float:
        """What a rank sends in an update."""
        return sum(c.sent_bytes(self.setting.world_size) for c in self.traffic)

    def link_seconds(self, gigabits: float) -> float:
        """The time of an update's traffic over a link of so many 10⁹ bits per second and rank, nothing overlapped."""
        return self.sent_bytes * 8 / (gigabits * 1e9)

    def step_seconds(self, samples_per_second: float) -> float:
        """The time of an update at a measured rate."""
        config = self.setting.config
        return config.data.batch_size * config.train.accumulate / samples_per_second

    def hours(self, samples_per_second: float) -> float | None:
        """Of the whole run; None: the number of updates is not known."""
        return None if self.updates is None else self.updates * self.step_seconds(samples_per_second) / 3600


def make_plan(setting: Setting) -> Plan:
    """Work out a plan. Raises :class:`trainer.errors.ConfigError` for an unknown backbone."""
    backbone = backbone_sizes(setting.config, setting.image_size, setting.local_batch)
    return _assemble(setting, backbone)


def _assemble(setting: Setting, backbone: BackboneSizes) -> Plan:
    return Plan(
        setting,
        backbone,
        rank_memory(setting, backbone),
        update_traffic(setting, backbone),
        checkpoint_bytes(setting, backbone),
        updates(setting),
    )


def checkpoint_bytes(setting: Setting, backbone: BackboneSizes) -> int:
    """Tensors of a checkpoint (its index and padding come on top, some kilobytes per tensor)."""
    config = setting.config
    rows = setting.num_classes * config.head.sub_centers
    number = setting.embedding_bytes
    out = rows * class_bytes(setting)
    if config.head.optimizer.name == "adamw":
        out += 4 * rows
    maps = map_sizes(setting)
    parameters = backbone.parameters + maps.parameters
    weights = (parameters + backbone.fixed + backbone.buffers + maps.fixed) * number
    optimizer = config.optimizer
    own = 2 if isinstance(optimizer, AdamWConfig) else int(optimizer.momentum > 0)
    return out + weights * (2 if config.train.ema else 1) + own * parameters * number


@dataclass(frozen=True)
class Holds:
    """How many classes a device's memory holds on every rank together, everything else as planned.

    ``lce`` is that with LCE's old centres (of dimension D) on the device too, ``lce_on_host`` with them in host memory
    (None: every step would copy all of them, as nothing is drawn).
    """

    memory_bytes: int
    classes: int
    lce: int
    lce_on_host: int | None


def holds(plan: Plan, memory_bytes: int) -> Holds:
    """What a memory holds of a planned run."""
    setting, backbone = plan.setting, plan.backbone

    def most(one: Setting) -> int:
        low, high = 0, 2
        while _device_bytes(replace(one, num_classes=high), backbone) <= memory_bytes:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            fits = _device_bytes(replace(one, num_classes=middle), backbone) <= memory_bytes
            low, high = (middle, high) if fits else (low, middle)
        return low

    method = LceDirectConfig(bank=Path("planned"))
    lce = replace(
        setting,
        config=setting.config.model_copy(update={"compat": (method,)}),
        bank_dim=setting.config.backbone.dim,
    )
    alone = replace(setting, config=setting.config.model_copy(update={"compat": ()}), bank_dim=None)
    on_host = most(_on_host(lce)) if setting.sampled and setting.device == "cuda" else None
    return Holds(memory_bytes, most(alone), most(lce), on_host)


def _device_bytes(setting: Setting, backbone: BackboneSizes) -> int:
    return peak_bytes(rank_memory(setting, backbone))


def updates(setting: Setting) -> int | None:
    """Updates of the run: ``train.steps``, or epochs over the known records."""
    train, data = setting.config.train, setting.config.data
    if train.steps is not None:
        return train.steps
    if setting.records is None:
        return None
    per_epoch = setting.records // data.batch_size if data.drop_last else -(-setting.records // data.batch_size)
    return int(-(-train.epochs * per_epoch // train.accumulate))


@dataclass(frozen=True)
class Change:
    """Something that could be changed, with the peak that it leads to."""

    text: str
    peak_bytes: int
    fits: bool


def changes_to_fit(plan: Plan, limit_bytes: int) -> list[Change]:
    """What would bring a rank below a memory: each change alone, then all that help together, then more ranks.

    Changes that bring nothing are left out. The last says how many ranks the run needs as it is.
    """
    found: list[Change] = []
    together = plan.setting
    for text, change in _changes(plan.setting).items():
        for name, setting in _variants(text, change, plan.setting):
            peak = make_plan(setting).device_bytes
            if peak >= plan.device_bytes:
                continue
            if peak <= limit_bytes or name == text:
                found.append(Change(name, peak, peak <= limit_bytes))
                together = change(together, None) if "{}" not in text else together
                break
    if len(found) > 1 and not any(change.fits for change in found):
        peak = make_plan(together).device_bytes
        found.append(Change("all of these", peak, peak <= limit_bytes))
    ranks = ranks_to_fit(plan.setting, limit_bytes)
    if ranks is None:
        return [*found, Change(f"more ranks do not help, up to {MOST_RANKS}", plan.device_bytes, False)]
    peak = make_plan(replace(plan.setting, world_size=ranks)).device_bytes
    return [*found, Change(f"at least {ranks_text(ranks)}, as it is", peak, True)]


Edit = Callable[[Setting, Any], Setting]


def _changes(setting: Setting) -> dict[str, Edit]:
    """Text → what it changes; with ``{}`` in it, a choice of sample rates."""
    config, out = setting.config, dict[str, Edit]()
    if config.head.rows == "float32":
        out["rows in bfloat16 (head.rows=bfloat16)"] = lambda s, _: _with(s, "head", rows="bfloat16")
    if config.head.rows in ("float32", "bfloat16") and isinstance(config.head.optimizer, SgdRowsConfig):
        none = config.head.optimizer.model_copy(update={"momentum": 0.0})
        out["rows in float8 without momentum (head.rows=float8 head.optimizer.momentum=0)"] = lambda s, _: _with(
            s, "head", rows="float8", optimizer=none
        )
    if config.head.impl == "reference":
        out["the fused head (head.impl=auto)"] = lambda s, _: _with(s, "head", impl="auto")
    if setting.sampled:
        out["head.sample_rate={}"] = lambda s, rate: _with(s, "head", sample_rate=rate)
    if config.train.precision == "float32":
        out["the backbone in bfloat16 (train.precision=bfloat16)"] = lambda s, _: _with(
            s, "train", precision="bfloat16"
        )
    if not config.train.activation_checkpointing:
        out["train.activation_checkpointing=true"] = lambda s, _: _with(s, "train", activation_checkpointing=True)
    if config.data.batch_size > setting.world_size:
        half = config.data.batch_size // 2
        out[f"data.batch_size={half}"] = lambda s, _: _with(s, "data", batch_size=half)
    if config.checkpoint.asynchronous and setting.device == "cpu":
        out["checkpoint.asynchronous=false"] = lambda s, _: _with(s, "checkpoint", asynchronous=False)
    if setting.bank_dim is not None and setting.sampled and setting.device == "cuda" and config.of(LceDirectConfig):
        out["old centres in host memory (compat.centers=host)"] = lambda s, _: _on_host(s)
    return out


def _variants(text: str, change: Edit, setting: Setting) -> list[tuple[str, Setting]]:
    if "{}" not in text:
        return [(text, change(setting, None))]
    rates = [rate for rate in RATES if rate < setting.config.head.highest_rate]
    return [(text.format(rate), change(setting, rate)) for rate in rates]


def _with(setting: Setting, section: str, **values: Any) -> Setting:
    part = getattr(setting.config, section).model_copy(update=values)
    config: Config = setting.config.model_copy(update={section: part})
    return replace(setting, config=config)


def _on_host(setting: Setting) -> Setting:
    methods = tuple(
        one.model_copy(update={"centers": "host"}) if isinstance(one, LceDirectConfig) else one
        for one in setting.config.compat
    )
    return replace(setting, config=setting.config.model_copy(update={"compat": methods}))


def ranks_to_fit(setting: Setting, limit_bytes: int) -> int | None:
    """The smallest number of ranks that fit, with the same global batch; None: not even :data:`MOST_RANKS` do."""

    def fits(ranks: int) -> bool:
        return make_plan(replace(setting, world_size=ranks)).device_bytes <= limit_bytes

    high = 1
    while not fits(high):
        high *= 2
        if high > min(MOST_RANKS, setting.num_classes):
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
