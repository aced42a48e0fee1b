"""The backbone's optimizer, the learning rate over the updates, clipping, loss scaling and the moving average.

An update never waits for the device: torch's fused optimizers take the factor that undoes loss scaling and clips
(``grad_scale``) and the flag that leaves everything as it is (``found_inf``) as tensors.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer.distributed import all_reduce_sum
from trainer.run.config import (
    AdamWConfig,
    CosineConfig,
    OptimizerConfig,
    PolynomialConfig,
    ScheduleConfig,
    SgdConfig,
    StepConfig,
)

GROWTH_STEPS = 2000  # finite updates after which the loss scale doubles


def learning_rate(config: ScheduleConfig, peak: float, step: int, steps: int) -> float:
    """The learning rate of update ``step`` (0-based) of ``steps``: a linear climb, then the schedule's fall.

    Warm-up: ``peak · (step + 1) / w`` over the first ``w = ⌈warmup · steps⌉`` updates. After it, with
    ``t = (step − w) / (steps − w)`` in [0, 1): polynomial ``peak · (1 − t)^power``, cosine ``peak · (1 + cos πt) / 2``,
    step ``peak · gamma^k`` with k milestones at or before ``step / steps``, constant ``peak``.
    """
    warmup = math.ceil(config.warmup * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    t = min(1.0, (step - warmup) / max(1, steps - warmup))
    match config:
        case PolynomialConfig():
            return float(peak * (1 - t) ** config.power)
        case CosineConfig():
            return peak * (1 + math.cos(math.pi * t)) / 2
        case StepConfig():
            return float(peak * config.gamma ** sum(step >= milestone * steps for milestone in config.milestones))
        case _:  # constant
            return peak


def local_part(tensor: Tensor) -> Tensor:
    """A DTensor's part on this rank (sharing memory); any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(local: Tensor, parameter: Tensor) -> Tensor:
    """``local`` seen with the sharding of ``parameter``: a DTensor when that is one."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


class LossScale:
    """The factor on gradients that keeps float16 from underflowing.

    Doubled after 2,000 finite updates in a row, halved after one that is not.

    Args:
        start: the first factor; 1 with ``fixed`` for every other dtype.
        fixed: never change it.
        device: where the factor lives; it is never read by the host in a step.
    """

    def __init__(self, start: float, fixed: bool, device: torch.device) -> None:
        self.fixed = fixed
        self.value = torch.tensor(start, dtype=torch.float32, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, finite: Tensor) -> None:
        """Take note of an update; ``finite`` is a bool scalar that is equal on all ranks."""
        if self.fixed:
            return
        grow = finite & (self.good_steps + 1 >= GROWTH_STEPS)
        factor = torch.where(finite, torch.where(grow, 2.0, 1.0), 0.5)
        self.value.mul_(factor).clamp_(1.0, 2.0**24)
        self.good_steps.copy_(torch.where(finite & ~grow, self.good_steps + 1, 0))

    def state(self) -> dict[str, Tensor]:
        """The tensors to save and to load into."""
        return {"value": self.value, "good_steps": self.good_steps}


class Updater:
    """Applies gradients to the parameters of named modules: unscale, clip, skip when not finite, then SGD or AdamW.

    Every parameter is decayed, as in the published face recognition recipes, but for those behind a parametrisation
    (:func:`undecayed`).

    Args:
        modules: name → module; parameters are known as ``name.parameter`` in :meth:`state`. Parameters may be DTensors
            (FSDP2): the update is elementwise, so each rank updates its own part.
        config: optimizer, learning rate, decay and clipping.
    """

    def __init__(self, modules: dict[str, nn.Module], config: OptimizerConfig) -> None:
        self.clip_norm = config.clip_norm
        self.parameters: dict[str, nn.Parameter] = {
            f"{name}.{key}": parameter
            for name, module in modules.items()
            for key, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self.modules = modules
        self._local = {key: nn.Parameter(local_part(p.detach())) for key, p in self.parameters.items()}
        if self._local:
            exempt = [self._local[f"{name}.{key}"] for name, module in modules.items() for key in undecayed(module)]
            self.optimizer = build_optimizer(config, list(self._local.values()), exempt)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def gradient_norm(self) -> Tensor:
        """The 2-norm of all gradients over all ranks' parts, a float64 scalar; inf or nan when any entry is."""
        whole = [p.grad for p in self.parameters.values() if p.grad is not None and not isinstance(p.grad, DTensor)]
        parts = [p.grad.to_local() for p in self.parameters.values() if isinstance(p.grad, DTensor)]
        square = _square_norm(whole, next(iter(self._local.values())).device)
        if parts:
            square = square + all_reduce_sum(_square_norm(parts, square.device))
        return square.sqrt()

    def step(self, lr: float, norm: Tensor, finite: Tensor, scale: Tensor) -> None:
        """Update every parameter once, or none.

        Args:
            lr: the learning rate.
            norm: :meth:`gradient_norm`, still scaled.
            finite: bool scalar, equal on all ranks; False leaves parameters and state as they are.
            scale: the loss scale the gradients carry.
        """
        for key, parameter in self.parameters.items():
            gradient = parameter.grad
            self._local[key].grad = None if gradient is None else local_part(gradient)
        self.instruct(self.optimizer, lr, norm, finite, scale)
        self.optimizer.step()

    def instruct(
        self, optimizer: torch.optim.Optimizer, lr: float, norm: Tensor, finite: Tensor, scale: Tensor
    ) -> None:
        """Tell a fused optimizer about its coming step; see :meth:`step`."""
        divisor = scale
        if self.clip_norm > 0:
            divisor = scale * torch.clamp(norm / (scale * self.clip_norm), min=1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.grad_scale = divisor.float()  # type: ignore[attr-defined]
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """module → its state dict, to save and to load into; sharing memory."""
        return {k: {n: v.detach() for n, v in m.state_dict().items()} for k, m in self.modules.items()}

    def state(self) -> dict[str, Tensor]:
        """``parameter/entry`` → the optimizer's tensors, sharded like their parameter; to save and to load into."""
        out: dict[str, Tensor] = {}
        for key, parameter in self.parameters.items():
            for entry, value in self.optimizer.state[self._local[key]].items():
                if isinstance(value, Tensor):
                    out[f"{key}/{entry}"] = like(value, parameter) if value.ndim else value
        return out

    def start(self, values: dict[str, Tensor]) -> None:
        """Begin with these whole tensors of :meth:`state`; names that it does not have are left out."""
        state = self.state()
        for name, value in values.items():
            target = state.get(name)
            if isinstance(target, DTensor):
                target.copy_(distribute_tensor(value.to(target.device), target.device_mesh, target.placements))
            elif target is not None:
                target.copy_(value)
        self.loaded({f"{m}.{k}": v for m, part in self.weights().items() for k, v in part.items()}, state)

    def loaded(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        """A checkpoint was read into the tensors of :meth:`weights` (by ``module.parameter``) and :meth:`state`.

        Nothing is left to do where they share memory with what they describe.
        """


def _square_norm(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(list(tensors))).double().square().sum()


def starts_momentum(config: OptimizerConfig) -> bool:
    """Whether the momentum that starting weights hold is taken too."""
    return isinstance(config, SgdConfig) and config.start_momentum


def undecayed(module: nn.Module) -> list[str]:
    """The trained parameters that stand behind a parametrisation (``torch.nn.utils.parametrize``), such as those of an
    orthogonal matrix: they are coordinates and no weights, and decay would leave the set that they describe (torch's
    householder map reads a stored ±1 as a whole number: 0.9999 makes the matrix 0)."""
    return [
        key
        for key, parameter in module.named_parameters()
        if parameter.requires_grad and "parametrizations" in key.split(".")
    ]


def build_optimizer(
    config: OptimizerConfig, parameters: list[nn.Parameter], exempt: Sequence[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """The fused optimizer, its state made at once: a checkpoint can be loaded into it before the first step.

    Args:
        exempt: those of ``parameters`` that take no weight decay.
    """
    free = {id(parameter) for parameter in exempt}
    groups: list[dict[str, Any]] = [{"params": [p for p in parameters if id(p) not in free]}]
    groups += [{"params": list(exempt), "weight_decay": 0.0}] if exempt else []
    groups = [group for group in groups if group["params"]]
    optimizer: torch.optim.Optimizer
    if isinstance(config, SgdConfig):
        optimizer = torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
        )
    else:
        assert isinstance(config, AdamWConfig)
        optimizer = torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
    for parameter in parameters:
        optimizer.state[parameter] = initial_state(config, parameter)
    return optimizer


def initial_state(config: OptimizerConfig, parameter: Tensor) -> dict[str, Tensor]:
    """What the optimizer keeps of a parameter before the first step."""
    if not isinstance(config, SgdConfig):
        return {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return {"momentum_buffer": torch.zeros_like(parameter)} if config.momentum > 0 else {}


class Average:
    """Exponential moving average of modules' weights: ``a = decay · a + (1 − decay) · weight`` after each update.

    Other buffers (running statistics, counters) are copied.

    Args:
        modules: name → module; the averages start at their present weights.
        decay: in (0, 1).
    """

    def __init__(self, modules: dict[str, nn.Module], decay: float) -> None:
        self.modules, self.decay = modules, decay
        self.values = {name: {k: v.detach().clone() for k, v in m.state_dict().items()} for name, m in modules.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the modules' present weights in."""
        for name, module in self.modules.items():
            trained = {k for k, p in module.named_parameters() if p.requires_grad}
            state = module.state_dict()
            averaged = [(local_part(v), local_part(state[k])) for k, v in self.values[name].items() if k in trained]
            torch._foreach_lerp_([a for a, _ in averaged], [w for _, w in averaged], 1 - self.decay)
            for key, value in self.values[name].items():
                if key not in trained:
                    value.copy_(state[key])


def running_statistics(module: nn.Module) -> list[Tensor]:
    """A module's floating-point buffers that training changes: all but the fixed matrix that torch's orthogonal
    parametrisation keeps (``parametrizations.*.base``)."""
    return [
        buffer
        for key, buffer in module.named_buffers()
        if buffer.is_floating_point() and not (key.endswith(".base") and "parametrizations" in key.split("."))
    ]


class Statistics:
    """The batch norms' running statistics: the same on all ranks after an update, and untouched by one that is skipped.

    Args:
        modules: whose :func:`running_statistics` are meant.
        world_size: W.
    """

    def __init__(self, modules: Iterable[nn.Module], world_size: int) -> None:
        self.buffers = [buffer for module in modules for buffer in running_statistics(module)]
        self.world_size = world_size
        self._before: Tensor | None = None

    def _flat(self) -> Tensor:
        return torch.cat([b.flatten() for b in self.buffers])

    def remember(self) -> None:
        """Before the forward pass: keep a copy."""
        if self.buffers:
            self._before = self._flat()

    @torch.no_grad()
    def settle(self, finite: Tensor) -> None:
        """After the update: the ranks' mean in one all-reduce, or the copy when ``finite`` (bool scalar) is False."""
        if self._before is None:
            return
        mean = all_reduce_sum(self._flat()).div_(self.world_size)
        kept = torch.where(finite, mean, self._before)
        for buffer, value in zip(self.buffers, kept.split([b.numel() for b in self.buffers]), strict=True):
            buffer.copy_(value.view_as(buffer))
