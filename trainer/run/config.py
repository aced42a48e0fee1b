"""The configuration of a run: the sections of every room assembled, and those of the loop itself.

:func:`load_config` only reads text; nothing here takes a resource.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from trainer.checkpoint_folder import CheckpointConfig
from trainer.compat.methods.config import (
    AnyMethod,
    LceConfig,
    LceCrossConfig,
    MethodConfig,
    MixBctConfig,
    NoMethodConfig,
    check_together,
)
from trainer.config import Layers, Section, Variants, build, load, refuse_idle, unit
from trainer.data.config import AnyData
from trainer.evaluation.config import EvaluateConfig
from trainer.head.config import HeadConfig, SgdRowsConfig
from trainer.networks.config import BackboneConfig, RbtConfig
from trainer.reading import as_path
from trainer.run.idle import without_idle

M = TypeVar("M", bound=MethodConfig)
Share = Annotated[float, Field(ge=0, lt=1)]

LARGEST_DECAY = 0.5
"""Learning rate times weight decay of the rows, above which rows that are not drawn would be lost."""


class RunConfig(Section):
    """Where the run is written and what it is seeded with."""

    dir: Path = Field(description="run folder: config.yaml, logs, checkpoints and the final model are written here")
    seed: int = Field(
        0, ge=0, lt=2**63, description="seeds initialisation, data order, augmentation and negative sampling"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes CUDA when there is one")
    threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="intra-op threads per rank; 0: OMP_NUM_THREADS, else the cores / all ranks on this machine",
    )
    timeout_seconds: float = Field(
        600.0, gt=0, description="a collective that takes longer ends the run", json_schema_extra=unit("seconds")
    )
    deterministic: bool = Field(
        False, description="cuda: only algorithms that repeat to the last bit, slower; a CPU's always do"
    )


_OPTIMIZER = "what updates the backbone and the maps T"


class OptimizerConfig(Section):
    """The backbone's (and T's) optimizer; the base of its kinds."""

    name: str
    lr: float = Field(0.1, gt=0, description="the highest learning rate; see schedule")
    weight_decay: float = Field(5e-4, ge=0, description="weight decay, per update and unit of learning rate")
    clip_norm: float = Field(0.0, ge=0, description="largest norm of the backbone's gradient; 0 is off")


class SgdConfig(OptimizerConfig):
    """SGD with momentum."""

    name: Literal["sgd"] = Field("sgd", description=_OPTIMIZER)
    momentum: float = Field(0.9, ge=0, lt=1, description="share of the former step that is kept")
    start_momentum: bool = Field(
        False, description="also take the momentum that backbone.weights and head.weights hold (arcface_torch)"
    )

    @model_validator(mode="after")
    def _kept(self) -> "SgdConfig":
        if self.momentum == 0:
            refuse_idle(self, "optimizer", ("start_momentum",), "with optimizer.momentum=0")
        return self


class AdamWConfig(OptimizerConfig):
    """AdamW."""

    name: Literal["adamw"] = Field("adamw", description=_OPTIMIZER)
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="shares of the first and second moment that are kept")


AnyOptimizer: TypeAlias = Annotated[SgdConfig | AdamWConfig, Variants(name="sgd")]

_SCHEDULE = "how the learning rate falls after the warm-up"


class ScheduleConfig(Section):
    """The learning rate over the updates, stepped once per update; the base of its kinds."""

    name: str
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the updates that climb linearly from 0")


class PolynomialConfig(ScheduleConfig):
    """(1 − t)^power."""

    name: Literal["polynomial"] = Field("polynomial", description=_SCHEDULE)
    power: float = Field(2.0, gt=0, description="the exponent in (1 − t)^power")


class CosineConfig(ScheduleConfig):
    """Half a cosine."""

    name: Literal["cosine"] = Field("cosine", description=_SCHEDULE)


class StepConfig(ScheduleConfig):
    """A factor at each milestone."""

    name: Literal["step"] = Field("step", description=_SCHEDULE)
    milestones: tuple[float, ...] = Field((0.5, 0.75, 0.9), description="ascending shares of the updates, in (0, 1)")
    gamma: float = Field(0.1, gt=0, lt=1, description="the factor at each milestone")

    @field_validator("milestones")
    @classmethod
    def _ascending(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value:
            raise ValueError("expected at least one; schedule.name=constant has none")
        edges = (0.0, *value, 1.0)
        if any(a >= b for a, b in pairwise(edges)):
            raise ValueError("expected ascending shares of the updates, each above 0 and below 1")
        return value

    @model_validator(mode="after")
    def _behind_the_climb(self) -> "StepConfig":
        if self.milestones[0] <= self.warmup:
            raise ValueError(
                f"schedule.milestones: the first, {self.milestones[0]:g}, is not behind the warm-up, {self.warmup:g}, "
                "which climbs to the full rate all the same; take a later one, or a lower schedule.warmup"
            )
        return self


class ConstantConfig(ScheduleConfig):
    """The same after the warm-up."""

    name: Literal["constant"] = Field("constant", description=_SCHEDULE)


AnySchedule: TypeAlias = Annotated[
    PolynomialConfig | CosineConfig | StepConfig | ConstantConfig, Variants(name="polynomial")
]


class TrainConfig(Section):
    """How long and how the step is taken."""

    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (("epochs", "steps"),)

    epochs: float = Field(20.0, gt=0, description="passes over the data; or give steps")
    steps: int | None = Field(None, ge=1, description="number of updates, instead of epochs")
    accumulate: int = Field(1, ge=1, description="batches per update")
    matmul: Literal["float32", "tf32"] = Field(
        "float32",
        description="tf32: CUDA rounds what the backbone's float32 products take to 11 bits (the head: head.compute)",
    )
    precision: Literal["float32", "bfloat16", "float16", "float64"] = Field(
        "float32", description="dtype of the backbone's arithmetic; the half precisions are autocast over float32"
    )
    parallel: Literal["ddp", "fsdp", "zero1", "zero2", "zero3"] = Field(
        "ddp", description="how the backbone stands on the ranks: replicated (ddp) or sharded (fsdp, DeepSpeed's zero)"
    )
    compress_gradients: bool = Field(
        False, description="ddp, zero: sum the backbone's gradients over ranks in bfloat16"
    )
    compile: bool = Field(False, description="torch.compile the backbone, and maps of residual bottleneck blocks")
    channels_last: bool = Field(False, description="images and weights in the memory layout that convolutions prefer")
    sync_batchnorm: bool = Field(False, description="batch norm over the global batch; needs data.drop_last")
    activation_checkpointing: bool = Field(
        False, description="recompute the backbone's units in the backward pass instead of keeping their activations"
    )
    ema: float = Field(0.0, ge=0, lt=1, description="decay of an exponential moving average of the backbone; 0 is off")
    max_nonfinite_steps: int = Field(
        10,
        ge=0,
        description="the run stops after more skipped non-finite updates in a row (seen when a line is logged)",
        json_schema_extra=unit("updates"),
    )

    @model_validator(mode="after")
    def _combinations(self) -> "TrainConfig":
        if self.steps is not None and "epochs" in self.model_fields_set:
            raise ValueError("train.epochs has no effect with train.steps; give one of them")
        if self.compress_gradients and self.parallel == "fsdp":
            raise ValueError("train.compress_gradients: not with train.parallel fsdp; use ddp, or leave it out")
        if self.precision == "float64":
            refuse_idle(self, "train", ("matmul",), "with train.precision=float64")
        return self

    @model_serializer(mode="wrap")
    def _one_length(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        tree: dict[str, Any] = handler(self)
        if self.steps is not None:
            del tree["epochs"]
        return tree


class LogConfig(Section):
    """What is written while training."""

    every_steps: int = Field(20, ge=1, description="updates between two lines", json_schema_extra=unit("updates"))
    tensorboard: bool = Field(True, description="write events for TensorBoard into <run>/tensorboard")
    wandb: str | None = Field(None, description="Weights & Biases: the project's name (needs wandb)")
    monitors: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="further writers: name → settings: mlflow (experiment, uri), or of other packages "
        "(trainer/run/writers.py)",
    )
    progress: bool = Field(True, description="show progress: a bar on a terminal, lines elsewhere")
    line_seconds: float = Field(
        30.0,
        ge=0,
        description="least time between two progress lines where standard error is no terminal",
        json_schema_extra=unit("seconds"),
    )
    images: bool = Field(True, description="send the first batch's images to the writers, as training sees them")
    profile: tuple[int, int] | None = Field(None, description="trace these updates (first, last) into <run>/profile")

    @field_validator("profile")
    @classmethod
    def _in_order(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not 1 <= value[0] <= value[1]:
            raise ValueError("expected [first, last] with 1 ≤ first ≤ last")
        return value

    @model_validator(mode="after")
    def _shown(self) -> "LogConfig":
        if not self.progress:
            refuse_idle(self, "log", ("line_seconds",), "with log.progress=false")
        if not self.tensorboard and self.wandb is None and not self.monitors:
            refuse_idle(self, "log", ("images",), "without log.tensorboard, log.wandb or log.monitors")
        return self


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def _chosen(value: tuple[AnyMethod, ...]) -> tuple[MethodConfig, ...]:
    made = tuple(one for one in value if not isinstance(one, NoMethodConfig))
    if made and len(made) < len(value):
        raise ValueError("method none stands next to others; leave it out of the list")
    return made


def _short(value: tuple[MethodConfig, ...]) -> Any:
    """One method as a mapping, none as ``method: none``: the form in which YAML gives them."""
    trees = [one.model_dump(mode="json") for one in value]
    return trees if len(trees) > 1 else trees[0] if trees else {"method": "none"}


Methods: TypeAlias = Annotated[
    tuple[AnyMethod, ...], BeforeValidator(_as_list), AfterValidator(_chosen), PlainSerializer(_short)
]


class Config(Section):
    """A whole run."""

    run: RunConfig = Field(description="where the run is written and what it is seeded with")
    data: AnyData = Field(description="the training images")
    backbone: BackboneConfig = Field(BackboneConfig(), description="the network that maps an image to an embedding")
    head: HeadConfig = Field(HeadConfig(), description="the class-sharded margin softmax")
    compat: Methods = Field((), description="compatibility with a deployed model: a method, or a list of methods")
    optimizer: AnyOptimizer = Field(SgdConfig(), description="what updates the backbone and the maps T")
    schedule: AnySchedule = Field(PolynomialConfig(), description="the learning rate over the updates")
    train: TrainConfig = Field(TrainConfig(), description="how long and how the step is taken")
    evaluate: EvaluateConfig = Field(EvaluateConfig(), description="verification while training")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="checkpoints under <run>/checkpoints")
    log: LogConfig = Field(LogConfig(), description="what is written while training")

    @classmethod
    def without_idle(cls, tree: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """See :meth:`trainer.config.Section.without_idle`."""
        return without_idle(tree)

    @property
    def seed(self) -> int:
        """``run.seed``."""
        return self.run.seed

    @property
    def accumulate(self) -> int:
        """``train.accumulate``."""
        return self.train.accumulate

    @property
    def methods(self) -> tuple[MethodConfig, ...]:
        """The methods of compatible training; empty: a model of its own."""
        return tuple(one for one in self.compat if isinstance(one, MethodConfig))

    def of(self, *kinds: type[M]) -> M | None:
        """The method of one of these kinds, if there is one among :attr:`methods`."""
        return next((one for one in self.methods if isinstance(one, kinds)), None)

    @property
    def label(self) -> str:
        """How the model is made compatible, as its card names it: LCE's mode, another method, several with + between
        them, or empty."""
        return "+".join(one.label for one in self.methods)

    @model_validator(mode="after")
    def _combinations(self) -> "Config":
        check_together(self.methods)
        _check_best(self.checkpoint, self.evaluate)
        _check_kept(self.checkpoint)
        beyond = "" if self.train.steps is None else self.beyond_end(self.train.steps)
        if beyond:
            raise ValueError(beyond)
        _check_decay("optimizer", self.optimizer.weight_decay, self.optimizer.lr)
        if self.of(LceCrossConfig):
            self._check_maps_alone()
            return self
        rows, peak = self.head.optimizer, self.optimizer.lr * self.head.optimizer.lr_factor
        _check_decay("head.optimizer", rows.weight_decay, peak)
        sampled = self.head.draws and self.head.impl != "reference"
        if sampled and isinstance(rows, SgdRowsConfig) and peak * rows.weight_decay > LARGEST_DECAY:
            raise ValueError(
                f"head.optimizer.weight_decay = {rows.weight_decay}: times the highest learning rate, {peak:g}, it is "
                f"above {LARGEST_DECAY}; with head.sample_rate below 1, rows that are not drawn would be lost: lower "
                "it, or optimizer.lr"
            )
        starts = isinstance(self.optimizer, SgdConfig) and self.optimizer.start_momentum
        if starts and self.backbone.weights is None and self.head.weights is None:
            raise ValueError(
                "optimizer.start_momentum: no weights that hold one are given; set backbone.weights or head.weights, "
                "or remove it"
            )
        lce = self.of(LceConfig)
        if lce is not None and self.head.sub_centers > 1:
            raise ValueError(
                f"compat.mode = {lce.mode} with head.sub_centers = {self.head.sub_centers}: an old centre has "
                "no single new row to align with; use head.sub_centers=1"
            )
        if self.of(MixBctConfig) and self.head.margin.name in ("adaface", "magface"):
            raise ValueError(
                f"head.margin.name = {self.head.margin.name}: it reads the embeddings' norms, which mixbct makes 1; "
                "use cosface or arcface"
            )
        return self

    def beyond_end(self, steps: int) -> str:
        """What a run of so many updates never comes to, as an error says it; empty: nothing."""
        first, rate = self.head.rates[-1]
        if first >= steps:
            return (
                f"head.sample_rate = {rate:g} from update {first:,} on: the run ends after {steps:,} updates; let it "
                "change before"
            )
        if self.log.profile is None or self.log.profile[0] <= steps:
            return ""
        return f"log.profile = {list(self.log.profile)}: the run ends after {steps:,} updates; trace earlier ones"

    def _check_maps_alone(self) -> None:
        train = self.train
        if train.parallel != "ddp" or train.precision not in ("float32", "float64"):
            raise ValueError(
                f"train.parallel = {train.parallel}, train.precision = {train.precision}: cross-model training has "
                "nothing to shard and no backbone to speed up; use ddp and float32 (or float64)"
            )
        networks = ("channels_last", "sync_batchnorm", "activation_checkpointing", "compress_gradients")
        without = "where no network is trained; compat.mode is cross-model"
        refuse_idle(train, "train", networks, without)
        method = self.of(LceCrossConfig)
        if method is None or not isinstance(method.transform, RbtConfig):
            refuse_idle(train, "train", ("compile",), f"{without} and compat.transform.name is not rbt")
        if isinstance(self.optimizer, SgdConfig):
            refuse_idle(self.optimizer, "optimizer", ("start_momentum",), without)
        if self.evaluate.sets:
            raise ValueError("evaluate.sets: compat.mode cross-model trains no network that embeds images; remove them")
        for section in ("backbone", "head"):
            given = getattr(self, section).model_fields_set if section in self.model_fields_set else ()
            if given:
                raise ValueError(
                    f"{section}.{min(given)} belongs to runs that train a network; compat.mode is cross-model"
                )


def _check_decay(section: str, decay: float, peak: float) -> None:
    if decay * peak >= 1:
        raise ValueError(
            f"{section}.weight_decay = {decay:g}: times the highest learning rate, {peak:g}, it is 1 or more, so that "
            "an update turns the weights round; lower it, or optimizer.lr"
        )


def _check_kept(checkpoint: CheckpointConfig) -> None:
    if not checkpoint.every_steps:
        refuse_idle(checkpoint, "checkpoint", ("keep_every",), "with checkpoint.every_steps=0")
    elif checkpoint.keep_every % checkpoint.every_steps:
        raise ValueError(
            f"checkpoint.keep_every = {checkpoint.keep_every}: no multiple of checkpoint.every_steps="
            f"{checkpoint.every_steps}, so that other checkpoints are kept than it says; take a multiple"
        )


def _check_best(checkpoint: CheckpointConfig, evaluate: EvaluateConfig) -> None:
    if checkpoint.best is None:
        return
    name, _, metric = checkpoint.best.rpartition(".")
    path = evaluate.sets.get(name)
    known = "tar" if path is None or path.suffix != ".bin" else "accuracy"
    if path is None or metric not in (known, f"{known}_to_old") or (metric != known and evaluate.old is None):
        kinds = [f"{n}.{'accuracy' if p.suffix == '.bin' else 'tar'}" for n, p in evaluate.sets.items()]
        known = ", ".join(kinds) or "none"
        raise ValueError(f"checkpoint.best = {checkpoint.best}: not measured; evaluate.sets gives {known}")
    every, measured = checkpoint.every_steps, evaluate.every_steps
    if not measured or every % measured:
        raise ValueError(
            f"checkpoint.best: checkpoint.every_steps={every} is no multiple of evaluate.every_steps={measured}"
        )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file, what it extends, and what stands behind it on the command line.

    Args:
        path: the YAML file. Relative paths inside it are taken from the working folder, ``extends`` from the file's
        own.
        overrides: ``section.key=value`` strings; the value is read as YAML (``head.sample_rate=0.1``,
        ``run.dir=runs/a``). ``FILE.yaml`` is a further file; each goes over what stands before it.

    Raises:
        ConfigError: file missing or no YAML; an unknown key (the nearest known one is named); a key of another
            variant; a wrong value.
    """
    path = as_path(path, "path", "the path of a YAML file")
    return _built(load(Config, path, overrides), str(path))


def parse_config(tree: dict[str, Any], source: str, overrides: Sequence[str] = ()) -> Config:
    """Validate a tree of plain values with ``section.key=value`` strings behind it; ``source`` names it in errors.
    Raises :class:`ConfigError`."""
    layers = Layers(Config)
    layers.add(tree, source)
    layers.add_overrides(overrides)
    return _built(layers, source)


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML text that :func:`load_config` reads back to an equal one."""
    return yaml.safe_dump(dump_tree(config), sort_keys=False)


def dump_tree(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain values, without the sections that it does not use."""
    tree = config.model_dump(mode="json")
    if config.of(LceCrossConfig):
        del tree["backbone"], tree["head"]
    return tree


def _built(layers: Layers, source: str) -> Config:
    config: Config = build(Config, layers, source)
    return config
