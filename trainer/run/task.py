"""What is trained: from a batch to a loss. The engine knows this seam and no loss.

:class:`TrainTask` trains a new model: backbone, class-sharded head and, where configured, LCE against the old model's
centres, directly (fused into the head's pass) or through learned transformations (next to it).
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.compat.methods.config import Bt2Config, FctConfig, LceTransformedConfig
from trainer.compat.methods.inputs import Inputs
from trainer.compat.methods.registry import build_methods
from trainer.compat.methods.together import Pulls
from trainer.data import Batch, DatasetInfo
from trainer.data.identities import identities
from trainer.distributed import Labels, Ranks, on_main, scale_gradient
from trainer.head.partial_fc import Companion, PartialFC
from trainer.machine import largest_share
from trainer.models.card import Direction, ModelCard, TransformCard, trained_card, transform_card
from trainer.models.folder import save_model
from trainer.models.model import EmbeddingModel, TorchModel
from trainer.networks import build_backbone
from trainer.networks.scale import fit_scale, learn_scale
from trainer.networks.weights import load_backbone_weights
from trainer.run.arcface_start import head_momentum, head_rows
from trainer.run.config import Config
from trainer.run.optim import local_part, starts_momentum
from trainer.run.parallel import autocast, compile_maps, embed, gradient_sync, wrap

START_BLOCK = 65536
"""Rows that are read at once where training starts from given ones."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float16": torch.float32, "float64": torch.float64}
"""train.precision → dtype of the parameters; the half precisions are autocast over float32."""


@dataclass(frozen=True)
class StepOutput:
    """What a task makes of one batch.

    Attributes:
        report: detached scalars by name, equal on all ranks; ``loss`` is the whole loss, the mean over the global
            batch.
        finite: bool scalar, equal on all ranks.
    """

    report: dict[str, Tensor]
    finite: Tensor


class Task(Protocol):
    """What the engine asks of a training task."""

    def modules(self) -> dict[str, nn.Module]:
        """The modules that the optimizer updates, by name; parameters may be sharded."""

    def wrapped(self) -> nn.Module | None:
        """The network as wrapped for the ranks, for its updater (it may be DeepSpeed's engine), where there is one."""

    def compute(
        self, batch: Batch, step: int, last: bool, factor: Tensor, weight: float = 1.0, measured: bool = False
    ) -> StepOutput:
        """Forward and backward of one batch; all gradients are added up.

        Args:
            batch: this rank's slice; images (b, 3, H, W), b may be 0.
            step: number of the batch, from which random draws are seeded.
            last: whether this is the last batch of the update (earlier ones need not reduce gradients over ranks).
            factor: float32 scalar on the modules' gradients: the loss scale, divided by the batches per update.
            weight: on all gradients of this batch: its samples, relative to the mean of the update's batches.
            measured: also report how strongly each term of the loss pulls; the same on all ranks.
        """

    def set_lr(self, lr: float) -> None:
        """The learning rate of what the task itself updates (the head's rows)."""

    def apply(self, finite: Tensor) -> None:
        """End of the update: apply what was held back, or drop it when ``finite`` (bool scalar) is False."""

    def state(self) -> dict[str, Tensor]:
        """Tensors beyond the modules' own that decide the next step, to save and to load into."""

    def loaded(self) -> None:
        """Called after a checkpoint was loaded into :meth:`state`."""

    def export(self, folder: Path, weights: dict[str, dict[str, Tensor]], step: int, figures: dict[str, float]) -> None:
        """Write what was trained for use without the trainer; all ranks call it.

        Args:
            folder: to be made.
            weights: module → its state dict (the moving average, where one is kept); tensors may be sharded.
            step: updates made.
            figures: the last logged numbers.
        """


@runtime_checkable
class Embeds(Protocol):
    """A task whose network embeds images, so that it can be evaluated while it trains."""

    def model(self, weights: dict[str, dict[str, Tensor]], step: int) -> EmbeddingModel:
        """The network with these weights (see :meth:`Task.export`), a copy for use on this rank. Collective."""


class TrainTask:
    """Backbone and head, with LCE when a centre bank is given.

    Args:
        config: the run's configuration.
        inputs: the opened data set and bank.
        ranks: who we are.
    """

    def __init__(self, config: Config, inputs: Inputs, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        dtype = DTYPES[config.train.precision]
        self.inputs = inputs
        torch.manual_seed(config.run.seed)
        backbone = self._build()
        if config.backbone.weights is not None:
            load_backbone_weights(backbone, config.backbone.weights)
        backbone = backbone.to(ranks.device, dtype)
        if config.train.channels_last and config.train.parallel == "ddp":
            # FSDP and ZeRO flatten the weights, which must be contiguous; the images' layout alone does most of it.
            backbone = backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.backbone = backbone
        self.network = wrap(backbone, config.train, ranks, config.optimizer)
        self.method = build_methods(config.methods, config, inputs, ranks)
        for module in self._extra().values():
            module.to(ranks.device, dtype)
        compile_maps(self._transforms().values(), config.train, ranks)
        self.head = PartialFC(
            config.head,
            inputs.num_classes,
            config.backbone.dim,
            ranks,
            seed=config.run.seed,
            compat=None if self.method is None else self.method.direct,
            local_batch=largest_share(config.data.batch_size, ranks.world_size),
            accumulate=config.train.accumulate,
        )
        if config.head.weights is not None:
            self._start_head(config.head.weights)
        self._hold()
        # Rows are updated within the backward pass, unless only the whole update tells whether and how far they may
        # move. So a gradient that overflows inside the backbone, behind a finite loss, finds them moved already: the
        # backbone skips the step, the rows have made it. head.update=deferred rules that out.
        whole = config.train.accumulate > 1 or config.train.precision == "float16"
        self._deferred = whole or config.head.update == "deferred"
        self._dtype = dtype

    def _build(self) -> nn.Module:
        backbone = build_backbone(self.config.backbone, self.inputs.image_size)
        if self.config.head.margin.name == "magface":
            learn_scale(backbone)
        return backbone

    def _start_head(self, path: Path) -> None:
        """Take this rank's rows, and their momentum where it is wanted and there."""
        mine, state = self.head.classes, self.head.shard_state()
        rows = head_rows(path, mine.total, self.config.backbone.dim)
        for first in range(0, mine.size, START_BLOCK):
            last = min(first + START_BLOCK, mine.size)
            self.head.put_rows(first, rows.read(mine.start + first, mine.start + last))
        momentum = head_momentum(path) if starts_momentum(self.config.optimizer) and "momentum" in state else None
        if momentum is not None and mine.size:
            local_part(state["momentum"]).copy_(momentum.read(mine.start, mine.stop))
        self.head.load_shard_state()

    def _hold(self) -> None:
        """Put rows back that a method keeps where they are."""
        if self.method is not None and self.method.held is not None:
            self.head.hold(self.method.held)

    def modules(self) -> dict[str, nn.Module]:
        """The backbone and what the methods train besides it."""
        return {"backbone": self.backbone} | self._extra()

    def wrapped(self) -> nn.Module:
        """See :class:`Task`."""
        return self.network

    def _extra(self) -> dict[str, nn.Module]:
        return {} if self.method is None else self.method.modules()

    def _transforms(self) -> dict[Direction, nn.Module]:
        return {} if self.method is None else self.method.transforms()

    def compute(
        self, batch: Batch, step: int, last: bool, factor: Tensor, weight: float = 1.0, measured: bool = False
    ) -> StepOutput:
        """See :class:`Task`."""
        images = batch.images.to(self._dtype)
        if self.config.train.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        # On CUDA the labels travel ahead of the network: the head's indexes are made of their copy on the host.
        labels = self.head.gather_labels(batch.labels) if batch.labels.is_cuda else batch.labels
        pulls = Pulls(self.ranks) if measured and self.method is not None else None
        with gradient_sync(self.network, last):
            with autocast(self.config.train, self.ranks.device):
                embeddings = embed(self.network, images)
            embeddings = scale_gradient(embeddings.to(self._dtype), factor * self.ranks.world_size)
            if self.method is not None:
                embeddings = self.method.prepare(embeddings, batch, step)
            if pulls is not None:
                pulls.watch(embeddings)
            with self.head.deferred() if self._deferred else nullcontext():
                out = self.head(embeddings, labels, step, self._companion(factor, step, pulls))
            out.loss.backward(torch.full_like(out.loss, weight))
        if not self._deferred:
            self._hold()
        report = {"loss": out.loss.detach(), **out.report} | ({} if pulls is None else pulls.report(weight))
        if "alignment" in report:  # in the paper's unit too: mean_d (u − v)² = (2 − 2 cos) / D on unit vectors
            report["alignment_mse"] = report["alignment"] * (2 / self.config.backbone.dim)
        return StepOutput(report, out.finite)

    def _companion(self, factor: Tensor, step: int, pulls: Pulls | None = None) -> Companion | None:
        """The methods' loss as the head takes it; ``factor`` falls on the gradients of the methods' modules alone."""
        if self.method is None or not (self.method.adds_loss or pulls):
            return None
        method = self.method

        def loss(embeddings: Tensor, labels: Labels, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            rows, embeddings = scale_gradient(rows, 1 / factor), scale_gradient(embeddings, 1 / factor)
            value, report = method.loss(embeddings, labels, rows, step, pulls)
            return scale_gradient(value, factor), report

        return loss

    def set_lr(self, lr: float) -> None:
        """See :class:`Task`."""
        self.head.set_lr(lr)

    def apply(self, finite: Tensor) -> None:
        """See :class:`Task`."""
        if not self._deferred:
            return
        if bool(finite):  # waits for the device
            self.head.apply_update(1 / self.config.train.accumulate)
            self._hold()
        else:
            self.head.discard_update()

    def state(self) -> dict[str, Tensor]:
        """The head's rows and their optimizer's state, sharded by class."""
        return dict(self.head.shard_state())

    def loaded(self) -> None:
        """See :class:`Task`."""
        self.head.load_shard_state()

    def export(self, folder: Path, weights: dict[str, dict[str, Tensor]], step: int, figures: dict[str, float]) -> None:
        """See :class:`Task`: the backbone and the transformations with their card."""
        card, backbone, transforms = self._plain(weights, step, figures)

        def save() -> None:
            known = identities(self.inputs.dataset)
            if known is not None and self.config.backbone.weights is not None:
                known = replace(known, complete=False)  # those weights have seen others
            save_model(folder, backbone, card, transforms, known)

        on_main(save, self.ranks)

    def model(self, weights: dict[str, dict[str, Tensor]], step: int) -> EmbeddingModel:
        """See :class:`Embeds`."""
        card, backbone, transforms = self._plain(weights, step, {})
        float32 = {direction: module.float() for direction, module in transforms.items()}
        return TorchModel(card, Path(f"step {step}"), f"step-{step}", backbone.float(), float32, self.ranks.device)

    def _plain(
        self, weights: dict[str, dict[str, Tensor]], step: int, figures: dict[str, float]
    ) -> tuple[ModelCard, nn.Module, dict[Direction, nn.Module]]:
        """Card, backbone and transformations as plain modules of their own, with these weights. Collective."""
        whole = {
            name: {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in part.items()}
            for name, part in weights.items()
        }
        backbone = self._build()
        fit_scale(backbone, whole["backbone"])
        backbone.to(self._dtype).load_state_dict(whole["backbone"])
        dataset = self.inputs.dataset
        card = trained_card(
            DatasetInfo(image_size=self.inputs.image_size) if dataset is None else dataset.info,
            None if dataset is None else dataset.path,
            self.inputs.old_model,
            backbone=self.config.backbone,
            dim=self.config.backbone.dim,
            mode=self.config.label,
            step=step,
            classes=self.inputs.num_classes,
            figures=figures,
            transforms={direction: self._transform_card(direction) for direction in self._transforms()},
        )
        transforms = {direction: copy.deepcopy(module) for direction, module in self._transforms().items()}
        for direction, module in transforms.items():
            module.load_state_dict(whole[direction])
        return card, backbone, transforms

    def _transform_card(self, direction: Direction) -> TransformCard:
        source = self.inputs.bank or self.inputs.old
        assert source is not None
        number = 0 if direction == "t21" else 1
        method = next(one for one in self.config.methods if one.directions[number])
        assert isinstance(method, LceTransformedConfig | FctConfig | Bt2Config)
        return transform_card(method.transform, direction, self.config.backbone.dim, source.dim)
