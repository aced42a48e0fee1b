"""The loop: data → task → update → log → checkpoint, until the last step or a request to stop.

The order of data, augmentations and drawn classes follow from the seed and the position alone, and torch's generators
are seeded anew for every step, so that a checkpoint needs to keep no generator: a run continued at the same world size
repeats the uninterrupted one to the last bit (on CUDA with ``run.deterministic``). The loop waits for the device
only where a line is logged, and in float16 or with accumulated batches once an update; the head waits once a batch,
for the labels, and once more where the gradients of accumulated batches are merged; methods wait up to twice a batch.
tests/cuda_waits.json says how often.
"""

import json
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainer.checkpoint import Checkpoints, load_tensors
from trainer.checkpoint_folder import Checkpoint, list_checkpoints, read_seal
from trainer.compat.methods.config import FctConfig, LceMapsConfig
from trainer.compat.methods.inputs import Inputs
from trainer.data import Batch, Loader, build_loader
from trainer.distributed import Ranks, barrier, broadcast_object, gather_objects, on_main
from trainer.errors import CheckpointError, ConfigError, LceError, TrainingError, ranks_text
from trainer.evaluation.periodic import PeriodicEvaluation, open_periodic
from trainer.files import write_text
from trainer.head.kernels import why_eager
from trainer.models.model import embed_batches
from trainer.randomness import step_seed
from trainer.run.arcface_start import backbone_momentum
from trainer.run.config import Config, dump_tree
from trainer.run.cross_model import CrossModelTask
from trainer.run.folder import SUMMARY, RunSummary, changes_since, open_folder, owned_run, read_summary
from trainer.run.monitor import Monitor
from trainer.run.optim import Average, LossScale, Statistics, learning_rate, starts_momentum
from trainer.run.startup import allowing_outside, check_goal, check_origin, identity, prepare, together
from trainer.run.task import Embeds, Task, TrainTask
from trainer.run.watch import Vote, Watch
from trainer.run.zero import build_updater
from trainer.seals import sealed

NO_NORM = 1e-12
"""A map's vector of at most this norm has no direction (torch's ``normalize`` leaves it as good as zero)."""

SHOWN_EMBEDDINGS = 128
"""How many embeddings of the finished model TensorBoard's projector is given."""


_INDIFFERENT = (
    *(
        "run.dir:",
        "run.threads:",
        "run.timeout_seconds:",
        "data.workers:",
        "data.allow_outside:",
        "train.steps:",
        "train.epochs:",
    ),
    *("log.", "checkpoint.", "evaluate."),
)
"""Settings that do not change what a finished run has made."""


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators for one batch: dropout and the like depend on nothing that would have to be saved."""
    torch.manual_seed(step_seed(seed, step, rank))


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name begins with ``prefix``, named by what follows it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def weighted_mean(reports: Sequence[dict[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """The mean of each figure over the batches that have it, by the batches' weights; distributions (n,) are joined."""
    if len(reports) == 1:
        return reports[0]
    out = dict[str, Tensor]()
    for name in dict.fromkeys(name for report in reports for name in report):
        given = [(report[name], weight) for report, weight in zip(reports, weights, strict=True) if name in report]
        if given[0][0].dim():
            out[name] = torch.cat([value for value, _ in given])
            continue
        out[name] = torch.stack([value * weight for value, weight in given]).sum() / sum(weight for _, weight in given)
    return out


class RunState:
    """What a run is at one moment: everything that decides its next step, and nothing else.

    Attributes:
        step: updates made or skipped.
        skipped: updates skipped in all; streak: in a row. int64 scalars on the device.
    """

    def __init__(self, config: Config, task: Task, loader: Loader, ranks: Ranks) -> None:
        self.task, self.loader = task, loader
        self.step = 0
        self.updater = build_updater(task.modules(), task.wrapped(), config.optimizer)
        half = config.train.precision == "float16"
        self.scale = LossScale(2.0**16 if half else 1.0, not half, ranks.device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=ranks.device)
        self.streak = torch.zeros((), dtype=torch.int64, device=ranks.device)
        self.average = Average(task.modules(), config.train.ema) if config.train.ema else None
        if starts_momentum(config.optimizer) and config.backbone.weights is not None:
            momentum = backbone_momentum(config.backbone.weights)
            self.updater.start({f"backbone.{name}/momentum_buffer": value for name, value in momentum.items()})

    def tensors(self) -> dict[str, Tensor]:
        """name → tensor of the whole state, to save and to load into."""
        out = {"skipped": self.skipped, "streak": self.streak}
        for name, weights in self.updater.weights().items():
            out |= {f"module.{name}.{k}": v for k, v in weights.items()}
        for name, weights in (self.average.values if self.average else {}).items():
            out |= {f"average.{name}.{k}": v for k, v in weights.items()}
        out |= {f"optimizer.{k}": v for k, v in self.updater.state().items()}
        out |= {f"task.{k}": v for k, v in self.task.state().items()}
        return out | {f"scale.{k}": v for k, v in self.scale.state().items()}

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint. Raises :class:`trainer.errors.CheckpointError` when it is of another run."""
        tensors = self.tensors()
        load_tensors(checkpoint, tensors)
        self.updater.loaded(below(tensors, "module."), below(tensors, "optimizer."))
        self.task.loaded()
        self.loader.load_state_dict(checkpoint.seal["loader"])
        self.step = checkpoint.step


class Engine:
    """One run on this rank: the parts put together, and the loop.

    Args:
        config: the run's configuration.
        ranks: who we are.
        inputs: the checked inputs (:func:`trainer.run.startup.prepare`).
        task: what is trained.
        loader: gives this rank its slice of every global batch.
        evaluation: what is measured meanwhile, if anything.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        inputs: Inputs,
        task: Task,
        loader: Loader,
        evaluation: PeriodicEvaluation | None = None,
    ) -> None:
        self.config, self.ranks, self.inputs, self.task = config, ranks, inputs, task
        self.state = RunState(config, task, loader, ranks)
        self.statistics = Statistics(task.modules().values(), ranks.world_size)
        accumulate = config.train.accumulate
        self.steps = config.train.steps or math.ceil(config.train.epochs * loader.steps_per_epoch / accumulate)
        self.epoch_steps = loader.steps_per_epoch / accumulate
        if beyond := config.beyond_end(self.steps):
            raise ConfigError(beyond)
        self.folder = config.run.dir
        self.evaluation = evaluation
        old = None if evaluation is None else evaluation.old
        if old is not None and old.dim != config.backbone.dim and not {"t21", "t12"} & task.modules().keys():
            raise ConfigError(
                f"evaluate.old = {config.evaluate.old}: dimension {old.dim}, backbone.dim is {config.backbone.dim}, "
                "and this run trains no map between them; remove it, or use compat.mode backward, forward or both"
            )
        self._saved_step = -1
        self.continued: dict[str, Any] | None = None  # the configuration of the checkpoint that it continues from
        self._shown = False  # whether the first batch's images were handed to the monitor
        self._figures: dict[str, float] = {}

    def update(self, batches: Iterator[Batch], monitor: Monitor, watch: Watch) -> dict[str, float | Tensor]:
        """One update from ``train.accumulate`` batches; what there is to log about it."""
        state, count = self.state, self.config.train.accumulate
        lr = learning_rate(self.config.schedule, self.config.optimizer.lr, state.step, self.steps)
        self.task.set_lr(lr)
        self.statistics.remember()
        state.updater.zero_grad()
        finite = torch.ones((), dtype=torch.bool, device=self.ranks.device)
        sizes = state.loader.sizes(count)
        weights = [count * size / sum(sizes) for size in sizes]
        reports: list[dict[str, Tensor]] = []
        for part, weight in enumerate(weights):
            watch.at(state.step, "data")
            with monitor.waiting_for_data():
                batch = next(batches)
            monitor.count(len(batch.labels))
            if not self._shown:
                self._shown = True
                monitor.show_images(state.step, batch, self.inputs.dataset)
            watch.at(state.step, "forward")
            number = state.step * count + part
            seed_step(self.config.run.seed, number, self.ranks.rank)
            last = part == count - 1
            measured = last and monitor.due(state.step + 1)
            out = self.task.compute(batch, number, last, state.scale.value / count, weight, measured)
            finite = finite & out.finite
            reports.append(out.report)
        watch.at(state.step, "update")
        norm = state.updater.gradient_norm()
        finite = finite & norm.isfinite()
        state.updater.step(lr, norm, finite, state.scale.value)
        self.task.apply(finite)
        self._settle(finite)
        scale = state.scale.value.clone()
        state.scale.update(finite)
        state.step += 1
        values: dict[str, float | Tensor] = {"epoch": state.step / self.epoch_steps, **weighted_mean(reports, weights)}
        values |= {"lr": lr, "grad_norm": norm / scale}
        return values if state.scale.fixed else {**values, "loss_scale": scale}

    def _settle(self, finite: Tensor) -> None:
        """What follows an update: running statistics, counters of skipped updates, moving averages."""
        state = self.state
        self.statistics.settle(finite)
        state.skipped += ~finite
        state.streak.copy_(torch.where(finite, 0, state.streak + 1))
        if state.average is not None:
            state.average.update()

    def run(self, checkpoints: Checkpoints, monitor: Monitor, watch: Watch) -> int:
        """The loop. Returns the signal that stopped it (0 when it came to the end).

        Raises:
            TrainingError: too many updates in a row were not finite.
            CheckpointError: two checkpoints in a row could not be written.
        """
        state, vote, every = self.state, Vote(), self.config.checkpoint.every_steps
        batches = state.loader.batches()
        answer: list[int] | None = None
        while state.step < self.steps and not (answer and answer[0]):
            values = self.update(batches, monitor, watch)
            self._figures = self.evaluate(monitor, watch)
            values |= self._figures
            if self._figures or monitor.due(state.step):
                watch.at(state.step, "log")
                self._log(monitor, values)
            monitor.advance(state.step)
            watch.at(state.step, "save")
            if answer and answer[1] == 1:
                checkpoints.settle()
            if every and state.step % every == 0 and state.step < self.steps:
                self.save(checkpoints, monitor)
            answer = vote.cast(watch.stop_signal, checkpoints.saving * (1 if checkpoints.idle else 2))
        watch.at(state.step, "save")
        self.save(checkpoints, monitor)
        checkpoints.settle()
        if checkpoints.failures:  # no next one will make up for it
            self._saved_step = -1
            self.save(checkpoints, monitor)
            checkpoints.settle()
        return answer[0] if answer and state.step < self.steps else 0

    def evaluate(self, monitor: Monitor, watch: Watch) -> dict[str, float]:
        """The figures of the present network, when it is time for them."""
        evaluation, task, state = self.evaluation, self.task, self.state
        if evaluation is None or (state.step % evaluation.config.every_steps and state.step != self.steps):
            return {}
        assert isinstance(task, Embeds)
        watch.at(state.step, "evaluate")
        with monitor.pausing():
            model = task.model(self.weights(), state.step)
            return evaluation.measure(model, lambda: watch.at(state.step, "evaluate"))

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """module → the weights to hand over: the moving average where one is kept. Collective."""
        return self.state.updater.weights() if self.state.average is None else self.state.average.values

    def _log(self, monitor: Monitor, values: dict[str, float | Tensor]) -> None:
        line = monitor.log(self.state.step, {**values, "skipped_steps": self.state.skipped})
        limit, streak = self.config.train.max_nonfinite_steps, int(self.state.streak)
        if streak > limit:
            raise TrainingError(
                f"{self.folder}: {streak} updates in a row were not finite up to step {self.state.step} (loss "
                f"{line['loss']:.4g}, gradient norm {line['grad_norm']:.4g}); they changed nothing. "
                "Lower optimizer.lr, set optimizer.clip_norm, or look at the data "
                f"(limit: train.max_nonfinite_steps={limit})"
            )
        for number, (name, key) in enumerate((("T₂₁", "t21_norm"), ("T₁₂", "t12_norm"))):
            method = next((one for one in self.config.methods if one.directions[number]), None)
            if line.get(key, 1.0) <= NO_NORM and isinstance(method, LceMapsConfig | FctConfig):
                raise TrainingError(
                    f"compat.transform.name = {method.transform.name}: {name} gives vectors of norm "
                    f"{line[key]:.3g} at step {self.state.step}, which cannot be compared; lower optimizer.lr, or "
                    "choose another compat.transform.name"
                )

    def save(self, checkpoints: Checkpoints, monitor: Monitor) -> None:
        """Begin a checkpoint of the present state, unless this very state is saved already. The log is on the disk
        before it: a run that continues from here does not write these lines again."""
        if self._saved_step == self.state.step:
            return
        self._saved_step = self.state.step
        monitor.flush()
        seal = {
            "step": self.state.step,
            "steps": self.steps,
            "loader": self.state.loader.state_dict(),
            "world_size": self.ranks.world_size,
            "identity": identity(self.config, self.inputs),
            "num_classes": self.inputs.num_classes,
            "old_model": list(self.inputs.old_model),
            "figures": self._figures,
            "config": dump_tree(self.config),
            "time": time.time(),
        }
        checkpoints.save(self.state.tensors(), seal)

    def resume(self, checkpoints: Checkpoints) -> str:
        """Continue from the newest whole checkpoint, if there is one; says what was done, for people."""
        if self.config.checkpoint.resume == "never":
            refuse_used(self.config, broadcast_object(bool(list_checkpoints(self.folder / "checkpoints"))))
            return "starting"
        checkpoint = checkpoints.newest()
        if checkpoint is None:
            return "starting"
        check_origin(checkpoint, self.config, self.inputs)
        check_goal(checkpoint, self.steps)
        self._check_updates(checkpoint)
        self.state.load(checkpoint)
        self._saved_step = self.state.step
        self.continued = checkpoint.seal.get("config")
        return f"continuing from {checkpoint.folder} (written by {ranks_text(checkpoint.seal['world_size'])})"

    def _check_updates(self, checkpoint: Checkpoint) -> None:
        """Raise :class:`CheckpointError` when the updates made do not count as those to come, in a run by epochs."""
        if self.config.train.steps is not None:
            return
        before, now = checkpoint.seal["config"], self.config
        pairs = {
            "data.batch_size": (before["data"]["batch_size"], now.data.batch_size),
            "train.accumulate": (before["train"]["accumulate"], now.train.accumulate),
        }
        for key, (was, wanted) in pairs.items():
            if was != wanted:
                raise CheckpointError(
                    f"{checkpoint.folder}: was taken with {key}={was}, now {wanted}: its {checkpoint.step} updates "
                    f"would count as a different number of epochs; use {key}={was}, or give train.steps instead of "
                    "train.epochs"
                )
        position, an_epoch = checkpoint.seal["loader"], self.state.loader.steps_per_epoch
        epoch, batch = divmod(checkpoint.step * now.train.accumulate, an_epoch)
        at_end = (epoch - 1, an_epoch * now.data.batch_size) if batch == 0 else None  # what drop_last leaves is behind
        if (position["epoch"], position["samples"]) not in ((epoch, batch * now.data.batch_size), at_end):
            raise CheckpointError(
                f"{checkpoint.folder}: its loader stands at epoch {position['epoch']}, sample {position['samples']}, "
                f"which step {checkpoint.step} does not reach; remove it, and the one before is taken"
            )


def train(config: Config, ranks: Ranks) -> RunSummary:
    """Train as configured; all ranks call it. Starts, continues, or finds that the run is finished and does nothing.

    Raises:
        LceError: the input is wrong (nothing has been written then), checkpoints are damaged, the loss diverges.
    """
    began = time.perf_counter()
    with allowing_outside(config):
        inputs = prepare(config, ranks)
        with owned_run(config.run.dir, ranks):
            return _start(config, ranks, inputs, began)


def _start(config: Config, ranks: Ranks, inputs: Inputs, began: float) -> RunSummary:
    size, trained = inputs.image_size, inputs.dataset
    evaluation = together(lambda: open_periodic(config.evaluate, size, ranks, trained, ranks.is_main))
    images = inputs.cross is None or inputs.cross.images
    loader = together(lambda: build_loader(config.data, config.seed, inputs.dataset, ranks, images))
    for source in inputs.stored:
        loader.follow(source.will_need)
    try:
        kind = TrainTask if inputs.cross is None else CrossModelTask
        try:
            task: Task = kind(config, inputs, ranks)
        except LceError as error:  # each rank reads its own classes' part of the files
            error.add_note(f"while rank {ranks.rank} prepared its classes")
            raise
        engine = Engine(config, ranks, inputs, task, loader, evaluation)
        done = on_main(lambda: _finished(engine), ranks)
        if done is not None:
            return done
        return _train(engine, began)
    finally:
        loader.close()


def _train(engine: Engine, began: float) -> RunSummary:
    config, ranks, folder = engine.config, engine.ranks, engine.folder
    warnings: list[str] = []
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint, ranks, warnings.append)
    checkpoints.clean()
    started = engine.resume(checkpoints)
    changes = on_main(lambda: open_folder(config, engine.continued), ranks)
    warnings += [f"{folder}: changed since the last start: {change}" for change in changes]
    opened = together(lambda: Monitor(folder, config.log, ranks, engine.steps, engine.state.step))
    with Watch(folder / "ranks", ranks, config.run.timeout_seconds) as watch, opened as monitor:
        checkpoints.notify = monitor.say
        for line in (
            *warnings,
            f"{folder}: {started}, step {engine.state.step} of {engine.steps}, {ranks_text(ranks.world_size)}",
        ):
            monitor.say(line)
        try:
            stopped = engine.run(checkpoints, monitor, watch)
        except Exception as error:
            error.add_note(watch.explain(error))
            raise
        bad: dict[int, str] = {}
        for met in gather_objects(engine.state.loader.bad_records):
            bad |= met
        for record in sorted(bad)[:10]:
            monitor.say(f"damaged record skipped: {bad[record]}")
        if not stopped and int(engine.state.skipped) == engine.state.step:
            raise TrainingError(
                f"{folder}: none of the {engine.state.step} updates was finite, so that nothing was learned and no "
                "model is handed over. Lower optimizer.lr, set optimizer.clip_norm, or look at the data"
            )
        eager = next((reason for reason in gather_objects(why_eager()) if reason is not None), None)
        if eager is not None:
            monitor.say(f"head: eager, which is slower: torch.compile failed ({eager})")
        summary = RunSummary(
            "interrupted" if stopped else "finished",
            stopped,
            str(folder),
            engine.state.step,
            engine.steps,
            int(engine.state.skipped),
            round(time.perf_counter() - began, 3),
            monitor.last,
            len(bad),
            "" if eager is None else "eager",
        )
        if stopped:
            monitor.say(
                f"{folder}: stopped by {signal.Signals(stopped).name} at step {summary.step}; "
                "the same command continues"
            )
            monitor.ending = "stopped"
        else:
            monitor.flush()
            _finish(engine, summary)
            _show_embeddings(engine, monitor)
            monitor.ending = "finished"
            monitor.say(f"{folder}: finished, {summary.step} steps, model in {folder / 'model'}")
    return summary


def refuse_used(config: Config, used: bool) -> None:
    """Raise :class:`ConfigError` where a run is to start from nothing and its folder was ``used``: has checkpoints."""
    if used and config.checkpoint.resume == "never":
        raise ConfigError(f"run.dir = {config.run.dir}: was used before, and checkpoint.resume=never; choose another")


def refuse_other_settings(config: Config) -> list[str]:
    """What a finished run's settings differ in, as far as nothing of its result depends on it.

    Raises:
        ConfigError: a setting differs that decides what comes out.
    """
    folder = config.run.dir
    changes = changes_since(folder / "config.yaml", config, common=True)
    decisive = [change for change in changes if not change.startswith(_INDIFFERENT)]
    if decisive:
        raise ConfigError(
            f"{folder}: finished already, with other settings ({'; '.join(decisive[:5])}); choose another run.dir to "
            "use the new ones"
        )
    return changes


def _finished(engine: Engine) -> RunSummary | None:
    """The summary of a run that has made all its steps, and a word to people; None: there is something to do.

    Raises:
        CheckpointError: it was made with other data.
        ConfigError: it was made with other settings that decide what comes out.
    """
    folder = engine.folder
    summary = read_summary(folder, engine.steps)
    if summary is None:
        return None
    refuse_used(engine.config, True)
    for checkpoint in list_checkpoints(folder / "checkpoints")[-1:]:
        try:
            found = Checkpoint(checkpoint, read_seal(checkpoint))
        except CheckpointError:
            continue  # nothing is continued from it
        check_origin(found, engine.config, engine.inputs)
    changes = refuse_other_settings(engine.config)
    print(f"{folder}: finished already, {summary.step} steps; nothing to do", file=sys.stderr)
    for change in changes:
        print(f"{folder}: it was made with another setting, {change}", file=sys.stderr)
    return summary


def _show_embeddings(engine: Engine, monitor: Monitor) -> None:
    """Hand some embeddings of the finished model to the writers that take them. Collective."""
    task, dataset = engine.task, engine.inputs.dataset
    if dataset is None or not isinstance(task, Embeds) or not broadcast_object(monitor.takes("embeddings")):
        return
    model = task.model(engine.weights(), engine.state.step)
    if not engine.ranks.is_main:
        return
    sound = np.flatnonzero(dataset.sound_labels >= 0)
    records = sound[np.unique(np.linspace(0, len(sound) - 1, SHOWN_EMBEDDINGS).astype(int))]
    names, labels = dataset.class_names, dataset.labels[records]
    try:
        vectors = np.concatenate([v for _, v in embed_batches(model, dataset, records)])
    except LceError as error:  # the run is finished: a picture of it is no reason to fail
        monitor.say(f"log: no embeddings are shown: {error}")
        return
    monitor.show_embeddings(
        engine.state.step, vectors, [str(label) if names is None else names[label] for label in labels]
    )


def _check_finite(weights: dict[str, dict[str, Tensor]]) -> None:
    """Raise :class:`TrainingError` for weights that are no numbers: they are no model, whatever the run's status."""
    for module, tensors in weights.items():
        for name, value in tensors.items():
            local = value.to_local() if isinstance(value, DTensor) else value
            if local.is_floating_point() and not bool(local.isfinite().all()):
                raise TrainingError(
                    f"{module}.{name} is not finite (NaN or infinite), so no model is written: lower optimizer.lr, or "
                    "set optimizer.clip_norm, and start again in another run.dir"
                )


def _finish(engine: Engine, summary: RunSummary) -> None:
    """Export the model and write the summary, which marks the run as finished."""
    figures = {k: float(v) for k, v in summary.last.items() if isinstance(v, int | float)}
    weights = engine.weights()
    _check_finite(weights)
    engine.task.export(engine.folder / "model", weights, summary.step, figures)
    on_main(lambda: write_text(engine.folder / SUMMARY, json.dumps(sealed(asdict(summary)), indent=1)), engine.ranks)
    barrier()
