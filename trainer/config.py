"""The configuration of a run: pydantic models of the YAML, inheritance between files, and dotted overrides.

A configuration is one YAML file that may extend others (``extends: base.yaml``, relative to the file that says so),
followed by overrides from the command line (``optimizer.lr=0.05``). Unknown keys are errors that name the nearest
known one; wrong values are errors that name the file, the key and what is allowed. Nothing here takes a resource:
:func:`load_config` only reads text.
"""

import difflib
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from trainer.errors import ConfigError
from trainer.reading import parse_yaml, read_yaml

Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of every section: immutable, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class RunConfig(Section):
    """Where the run is written and what it is seeded with."""

    dir: Path = Field(description="run folder: config.yaml, logs, checkpoints and the final model are written here")
    seed: int = Field(0, ge=0, description="seeds initialisation, data order, augmentation and negative sampling")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes CUDA when there is one")
    threads: int = Field(
        0,
        ge=0,
        description="intra-op threads per rank; 0: OMP_NUM_THREADS, else the cores / all ranks on this machine",
    )
    timeout_seconds: float = Field(600.0, gt=0, description="a collective that takes longer ends the run")
    deterministic: bool = Field(
        False, description="cuda: only algorithms that repeat to the last bit, slower; a CPU's always do"
    )


class AugmentConfig(Section):
    """Random image changes in training, drawn per sample from (seed, epoch, record); every probability or size of 0 is
    off."""

    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    rotate_degrees: float = Field(0.0, ge=0, description="standard deviation of the rotation")
    scale: float = Field(0.0, ge=0, lt=1, description="standard deviation of the relative size")
    translate: float = Field(0.0, ge=0, lt=1, description="standard deviation of the shift, in image widths")
    contrast: float = Field(0.0, ge=0, description="standard deviation of the relative contrast about mid grey")
    brightness: float = Field(
        0.0, ge=0, description="standard deviation of the shift of brightness; 1 is the full range"
    )
    saturation: float = Field(0.0, ge=0, description="standard deviation of the relative saturation")
    noise: float = Field(0.0, ge=0, description="standard deviation of the pixel noise; 1 is the full range")
    blur: float = Field(0.0, ge=0, le=1, description="probability of a Gaussian blur of 0.5 to 1.5 pixels")
    low_resolution: float = Field(
        0.0, ge=0, le=1, description="probability of shrinking to 1/4…1/2 of the size and back"
    )
    occlusion: float = Field(0.0, ge=0, le=1, description="probability of a grey rectangle over 1/5…2/5 of each side")


class DataConfig(Section):
    """The training images."""

    path: Path | None = Field(
        None, description="a folder with dataset.yaml (made by `lce pack`); not for loader: synthetic"
    )
    labels: Path | None = Field(None, description="int64 .npy that replaces the data set's labels; -1 drops a record")
    loader: Literal["auto", "dali", "torch", "synthetic"] = Field(
        "auto", description="auto: DALI when installed, else torch"
    )
    batch_size: int = Field(128, ge=1, description="the global batch B; every rank reads its slice of it")
    workers: int = Field(2, ge=0, description="decoding threads (DALI) or processes (torch) per rank")
    drop_last: bool = Field(False, description="drop the incomplete last batch of an epoch instead of training on it")
    sampling: Literal["shuffle", "class_balanced"] = Field(
        "shuffle", description="shuffle: every record once an epoch; class_balanced: every class equally often"
    )
    repeat: int = Field(1, ge=1, description="repeated augmentation: each drawn record this many times in a row")
    max_bad_records: int = Field(0, ge=0, description="how many damaged records training may skip before it stops")
    augment: AugmentConfig = AugmentConfig()
    synthetic_classes: int = Field(1000, ge=1, description="loader: synthetic only, the class count")
    synthetic_size: int = Field(112, ge=8, description="loader: synthetic only, the image side in pixels")
    synthetic_records: int = Field(100_000, ge=1, description="loader: synthetic only, the records of one epoch")


class BackboneConfig(Section):
    """The network that maps an image to an embedding."""

    name: str = Field("iresnet18", description="a name known to trainer.networks (an unknown one lists them all)")
    dim: int = Field(512, ge=2, description="embedding dimension D")
    width: int | None = Field(None, ge=1, description="first stage's channels, for the small networks that offer it")
    weights: Path | None = Field(
        None, description="start from these weights (.safetensors, .pt state dict or a run folder)"
    )


class MarginConfig(Section):
    """The margin on the target's cosine; formulas and papers in trainer/head/margin.py."""

    name: Literal["softmax", "cosface", "arcface", "combined", "adaface", "magface", "curricular"] = "cosface"
    scale: float = Field(64.0, gt=0, description="s: logits are s · cos")
    m: float = Field(0.4, ge=0, description="the margin of cosface, arcface, adaface and curricular")
    m1: float = Field(1.0, ge=1, description="combined: cos(m1·θ + m2) − m3")
    m2: float = Field(0.0, ge=0)
    m3: float = Field(0.0, ge=0)
    gradient: Literal["exact", "straight_through"] = Field(
        "exact", description="arcface: straight_through replaces the margin's derivative by 1, as arcface_torch does"
    )
    h: float = Field(0.333, gt=0, description="adaface: concentration of the norm statistic")
    norm_momentum: float = Field(
        0.01, gt=0, le=1, description="adaface: share of the batch in the running norm statistics"
    )
    lower_norm: float = Field(10.0, gt=0, description="magface: l_a; below √D, from where norms begin")
    upper_norm: float = Field(110.0, gt=0, description="magface: u_a; above √D")
    lower_margin: float = Field(0.45, ge=0, description="magface: l_m")
    upper_margin: float = Field(0.8, ge=0, description="magface: u_m")
    norm_weight: float = Field(35.0, ge=0, description="magface: λ_g of the norm term")
    inter_class_filter: float = Field(
        0.0, ge=0, le=1, description="negatives with a cosine above this are left out (noisy labels); 0 is off"
    )


class RowOptimizerConfig(Section):
    """How the head's rows are updated; what it means for a row that was not drawn is in
    trainer/head/row_optimizer.py."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr_factor: float = Field(1.0, gt=0, description="the rows' learning rate is this times the schedule's")
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)


class HeadConfig(Section):
    """The class-sharded margin softmax."""

    impl: Literal["fused", "reference"] = Field("fused", description="reference: logits materialised, dense gradient")
    update: Literal["fused", "deferred"] = Field(
        "fused",
        description="deferred: rows wait until the backbone's gradient is known to be finite; costs their gradient's "
        "memory and a wait for the device (always so with accumulated batches and float16)",
    )
    margin: MarginConfig = MarginConfig()
    sample_rate: float = Field(1.0, gt=0, le=1, description="share of the classes drawn as negatives each step")
    sampling_correction: bool = Field(
        False, description="weight drawn negatives by 1 / sample_rate, so that their sum estimates the full one"
    )
    sub_centers: int = Field(
        1, ge=1, le=16, description="K rows per class, the nearest one counts (sub-center ArcFace)"
    )
    optimizer: RowOptimizerConfig = RowOptimizerConfig()
    compute: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype that the matrix products take; their results are float32"
    )
    rows: Literal["float32", "bfloat16", "float64"] = Field("float32", description="dtype of rows and their state")
    chunk_rows: int = Field(0, ge=0, description="rows per chunk of the fused pass; 0: chosen for the device")
    init_std: float = Field(0.01, gt=0, description="standard deviation of the rows at the start")
    weights: Path | None = Field(
        None, description="start from these rows: arcface_torch's output folder, a classifier file, or a run folder"
    )


class TransformConfig(Section):
    """The map T between the embedding spaces (trainer/networks/transform.py)."""

    name: Literal["rbt", "linear", "orthogonal", "mlp"] = "rbt"
    blocks: int = Field(4, ge=1, description="rbt: residual bottleneck blocks in series")
    paths: int = Field(4, ge=1, description="rbt: parallel paths of a block")
    bottleneck: int = Field(16, ge=1, description="rbt: width of a path")
    hidden: int = Field(0, ge=0, description="mlp: hidden width; 0: twice the larger dimension")


class CompatConfig(Section):
    """Compatibility with a deployed model (../trainer/compat). Weights are in (1 − cos) units, independent of D.

    The paper's alignment weight λ_a multiplies a mean over dimensions too: its λ_a is ``alignment_weight · D / 2``
    (λ_a = 100 at D = 2048 is 0.098 here, at D = 64 it is 3.1).

    What the methods beside LCE (../trainer/compat/rivals.py) take: bct ``bank``; unibct ``old_embeddings``; l2 and fct
    ``old_embeddings`` or ``old_model``; mixbct and advbct both a ``bank`` and one of the two. Where no bank is needed
    one may be given: it names the old model in what is exported. All but fct need D1 = D2.
    """

    method: Literal["none", "lce", "bct", "l2", "unibct", "advbct", "mixbct", "fct"] = "none"
    mode: Literal["direct", "backward", "forward", "both", "cross-model"] = "direct"
    bank: Path | None = Field(None, description="centre bank of the old model (`lce centers …`); its folder")
    alignment_weight: float = Field(0.4, ge=0, description="λ_a in (1 − cos) units")
    boundary_weight: float = Field(1.0, ge=0, description="λ_b")
    centers: Literal["device", "host"] = Field(
        "device", description="direct: where the old centres lie; host: a step's rows are copied to the device"
    )
    old_embeddings: Path | None = Field(
        None, description="old embeddings by record (.npy, float32, N × D1), for l2, mixbct, advbct, fct and unibct"
    )
    old_model: Path | None = Field(
        None, description="or the old model (model folder, run folder, .onnx), run along on the batch's images"
    )
    new_embeddings: Path | None = Field(
        None, description="cross-model: new embeddings by record (.npy, float32, N × D2)"
    )
    new_model: Path | None = Field(
        None,
        description="cross-model: the new model, run along where new_embeddings is not set; exported with the maps",
    )
    new_bank: Path | None = Field(
        None, description="cross-model: centres of the new model, to align with those of bank"
    )
    maps: Literal["both", "t21", "t12"] = Field("both", description="cross-model: which maps are trained")
    weight: float = Field(
        1.0, ge=0, description="the weight of a rival method's loss (advbct: of its reversed gradient; mixbct: none)"
    )
    old_margin: float = Field(0.0, ge=0, description="bct, unibct: cosine margin before the old classifier")
    mix_share: float = Field(0.3, ge=0, le=1, description="mixbct: share of the batch that old embeddings stand in for")
    transform: TransformConfig = TransformConfig()
    authors_formula: bool = Field(
        False, description="the authors' terms: T's output and the boundary's embeddings are not made unit"
    )

    @property
    def way(self) -> str:
        """How the model is made compatible, as its card names it: LCE's mode, a rival's method, or empty."""
        return {"none": "", "lce": self.mode}.get(self.method, self.method)


class OptimizerConfig(Section):
    """The backbone's (and T's) optimizer."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(0.1, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    betas: tuple[Share, Share] = (0.9, 0.999)
    clip_norm: float = Field(0.0, ge=0, description="largest norm of the backbone's gradient; 0 is off")
    start_momentum: bool = Field(
        False, description="sgd: also take the momentum that backbone.weights and head.weights hold (arcface_torch)"
    )


class ScheduleConfig(Section):
    """The learning rate over the updates, stepped once per update."""

    name: Literal["polynomial", "cosine", "step", "constant"] = "polynomial"
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the updates that climb linearly from 0")
    power: float = Field(2.0, gt=0, description="polynomial")
    milestones: tuple[float, ...] = Field((0.5, 0.75, 0.9), description="step: shares of the updates")
    gamma: float = Field(0.1, gt=0, le=1, description="step: the factor at each milestone")


class TrainConfig(Section):
    """How long and how the step is taken."""

    epochs: float = Field(20.0, gt=0, description="passes over the data; ignored when steps is set")
    steps: int | None = Field(None, ge=1, description="number of updates")
    accumulate: int = Field(1, ge=1, description="batches per update")
    precision: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    parallel: Literal["ddp", "fsdp", "zero1", "zero2", "zero3"] = "ddp"
    compress_gradients: bool = Field(
        False, description="ddp, zero: sum the backbone's gradients over ranks in bfloat16"
    )
    compile: bool = Field(False, description="torch.compile the backbone")
    channels_last: bool = False
    sync_batchnorm: bool = Field(False, description="CUDA: batch norm over the global batch; needs data.drop_last")
    activation_checkpointing: bool = False
    ema: float = Field(0.0, ge=0, lt=1, description="decay of an exponential moving average of the backbone; 0 is off")
    max_nonfinite_steps: int = Field(10, ge=0, description="skipped non-finite steps in a row before the run stops")


class EvaluateConfig(Section):
    """Verification while training (trainer/evaluation/periodic.py)."""

    every_steps: int = Field(0, ge=0, description="updates between evaluations, and once at the end; 0: none")
    sets: dict[str, Path] = Field(
        default_factory=dict,
        description="name → verification .bin, or data set (DATASET or DATASET@LABELS.npy); never the training images",
    )
    old: Path | None = Field(None, description="old model: also measure new queries against its gallery")
    far: float = Field(1e-3, gt=0, lt=1, description="labelled sets: the false accept rate of SET.tar")
    max_images: int = Field(10_000, ge=4, description="labelled sets: about so many images at most, whole identities")


class CheckpointConfig(Section):
    """Checkpoints under <run>/checkpoints."""

    every_steps: int = Field(1000, ge=0, description="0: only at the end and when asked to stop")
    keep: int = Field(2, ge=1, description="how many of the newest are kept")
    keep_every: int = Field(0, ge=0, description="checkpoints of steps divisible by this are kept for good; 0 is off")
    best: str | None = Field(
        None, description="also keep the one with the highest figure of this name, such as lfw.accuracy (see evaluate)"
    )
    asynchronous: bool = True
    resume: Literal["auto", "exact", "never"] = Field(
        "auto",
        description="auto: newest complete one; exact: exit 2 if the newest is damaged; never: refuse a used folder",
    )


class LogConfig(Section):
    """What is written while training."""

    every_steps: int = Field(20, ge=1)
    tensorboard: bool = True
    wandb: str | None = Field(None, description="Weights & Biases: the project's name (needs wandb)")
    monitors: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="writers of other packages: name → settings (trainer/run/writers.py)"
    )
    progress: bool = Field(True, description="show progress: a bar on a terminal, lines elsewhere")
    line_seconds: float = Field(
        30.0, ge=0, description="least seconds between two progress lines where standard error is no terminal"
    )
    images: bool = Field(True, description="show the first batch's images in TensorBoard, as training sees them")
    profile: tuple[int, int] | None = Field(None, description="trace these updates (first, last) into <run>/profile")

    @field_validator("profile")
    @classmethod
    def _in_order(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not 1 <= value[0] <= value[1]:
            raise ValueError("expected [first, last] with 1 ≤ first ≤ last")
        return value


class Config(Section):
    """A whole run."""

    run: RunConfig
    data: DataConfig
    backbone: BackboneConfig = BackboneConfig()
    head: HeadConfig = HeadConfig()
    compat: CompatConfig = CompatConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _combinations(self) -> "Config":
        if self.data.loader != "synthetic" and self.data.path is None:
            raise ValueError("data.path: needed unless data.loader is synthetic")
        _check_best(self.checkpoint, self.evaluate)
        if self.head.impl == "reference" and self.head.rows == "bfloat16":
            raise ValueError("head.rows: bfloat16 needs stochastic rounding, which impl reference has not; use fused")
        if self.train.compress_gradients and self.train.parallel == "fsdp":
            raise ValueError("train.compress_gradients: not with train.parallel fsdp; use ddp, or leave it out")
        method = self.compat.method
        if self.compat.mode == "cross-model":
            if method != "lce":
                raise ValueError(f"compat.mode: cross-model trains the maps of method lce, not {method}")
            return self
        if method in ("lce", "bct", "advbct", "mixbct") and self.compat.bank is None:
            raise ValueError(f"compat.bank: compat.method {method} needs the old model's centre bank")
        given = (self.compat.old_embeddings is not None) + (self.compat.old_model is not None)
        if method in ("l2", "advbct", "mixbct", "fct") and given != 1:
            raise ValueError(
                f"compat.old_embeddings, compat.old_model: compat.method {method} needs one of them, {given} given"
            )
        if method == "unibct" and (self.compat.old_embeddings is None or given != 1):
            raise ValueError("compat.old_embeddings: compat.method unibct makes its prototypes from it alone")
        return self


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


def is_layer(word: str) -> bool:
    """Whether a word of the command line names a further configuration file, and is no ``key=value``."""
    return "=" not in word and word.endswith((".yaml", ".yml"))


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a configuration file, what it extends, and the overrides.

    Args:
        path: the YAML file. Relative paths inside it are taken from the working folder, ``extends`` from the file's
        own.
        overrides: ``section.key=value`` strings; the value is read as YAML (``head.sample_rate=0.1``,
        ``run.dir=runs/a``). A word ``FILE.yaml`` is a further file; each word goes over what stands before it.

    Raises:
        ConfigError: file missing or no YAML; an unknown key (the nearest known one is named); a wrong value.
    """
    tree = _read_yaml(Path(path), ())
    for override in overrides:
        if is_layer(override):
            _merge(tree, _read_yaml(Path(override), ()))
            continue
        apply_override(tree, override)
    return parse_config(tree, str(path))


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Put ``section.key=value``, the value read as YAML, into a tree of plain values. Raises :class:`ConfigError`."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r}: expected section.key=value, for example optimizer.lr=0.05")
    value = parse_yaml(text, f"override {override!r}", ConfigError)
    _merge(tree, _nest(key.split("."), value))


def parse_config(tree: dict[str, Any], source: str) -> Config:
    """Validate a tree of plain values; ``source`` names it in errors. Raises :class:`ConfigError`."""
    _check_keys(Config, tree, "", source)
    try:
        return Config.model_validate(tree)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(_explain(problem, source) for problem in error.errors())) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML text that :func:`load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_yaml(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: extends itself: {' → '.join(str(p) for p in (*seen, path))}")
    tree = read_yaml(path, ConfigError) or {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as `run:` and `data:`, found {type(tree).__name__}")
    base: dict[str, Any] = {}
    parents = tree.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ConfigError(f"{path}: extends = {parents!r}: expected a file or a list of files")
    for parent in parents:
        _merge(base, _read_yaml(path.parent / Path(parent).expanduser(), (*seen, path.resolve())))
    _check_keys(Config, tree, "", str(path))
    _merge(base, tree)
    return base


def _merge(into: dict[str, Any], tree: dict[str, Any]) -> None:
    for key, value in tree.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _nest(keys: list[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return typing.cast(dict[str, Any], value)


def _section_of(annotation: Any) -> type[Section] | None:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, Section)), None)


def _check_keys(model: type[Section], tree: dict[str, Any], prefix: str, source: str) -> None:
    known = model.model_fields
    for key, value in tree.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise ConfigError(f"{source}: unknown key {prefix}{key}; {hint}")
        section = _section_of(known[key].annotation)
        if section is not None:
            if not isinstance(value, dict):
                raise ConfigError(
                    f"{source}: {prefix}{key} is a section; known keys: {', '.join(section.model_fields)}"
                )
            _check_keys(section, value, f"{prefix}{key}.", source)


def _explain(problem: Any, source: str) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"{source}: {key} is missing and has no default"
    message = problem["msg"].removeprefix("Value error, ")
    if not key:
        return f"{source}: {message}"
    return f"{source}: {key} = {problem['input']!r}: {message[0].lower()}{message[1:]}"
