"""DeepSpeed ZeRO for the backbone: optimizer state (1), gradients (2) and parameters (3) spread over all ranks.

The head needs nothing of it: its rows and their state are sharded anyway. DeepSpeed reduces, gathers and steps; what
decides the run stays this project's: the learning rate, the norm, clipping, the factor of float16 and the flag that
leaves everything as it is go to torch's fused optimizer inside DeepSpeed's, so that the same configuration gives the
same run as with DDP. Checkpoints hold whole tensors under DDP's names, gathered into host memory parameter by parameter
while saving: they load on any number of ranks, and with any ``train.parallel``.

Parameters are float32, and so is what crosses ranks (bfloat16 with ``train.compress_gradients``); the half precisions
are autocast, as with DDP.
"""

import importlib.util
import logging
import os
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.distributed import Ranks, all_reduce_sum
from trainer.errors import ConfigError
from trainer.run.config import Config, OptimizerConfig, TrainConfig
from trainer.run.optim import Updater, build_optimizer, initial_state


def check(config: Config) -> None:
    """Refuse what ZeRO cannot do. Raises :class:`ConfigError`; does nothing for other ``train.parallel``."""
    train = config.train
    if not train.parallel.startswith("zero"):
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"train.parallel = {train.parallel}: DeepSpeed is not installed; with torch installed, run "
            "DS_BUILD_OPS=0 pip install 'lce-trainer[deepspeed]' --no-build-isolation, or use ddp or fsdp"
        )
    if train.precision == "float64":
        raise ConfigError(
            f"train.parallel = {train.parallel}: DeepSpeed keeps float32 at most; use train.precision=float32"
        )
    if train.compile:
        raise ConfigError(f"train.parallel = {train.parallel}: not together with train.compile")
    if train.parallel == "zero3" and train.ema:
        raise ConfigError("train.parallel = zero3: no moving average of parameters that no rank has; use zero2 or fsdp")


def shard(backbone: nn.Module, config: TrainConfig, optimizer: OptimizerConfig, ranks: Ranks) -> nn.Module:
    """DeepSpeed's engine around the backbone; to be called in its place. Raises :class:`ConfigError` without ranks."""
    if not dist.is_initialized():
        raise ConfigError(
            f"train.parallel = {config.parallel} needs a process group: start with lce launch or torchrun"
        )
    if ranks.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Serves inference alone, and would be compiled now, by a compiler that may not be there.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # only DeepSpeed's own statistics look at it
        "zero_optimization": {"stage": int(config.parallel[-1])},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,  # done here, see ZeroUpdater.step
        "steps_per_print": None,
    }
    if config.parallel != "zero3":
        settings["zero_optimization"]["compute_grad_norm"] = False  # see ZeroUpdater.gradient_norm
    if config.compress_gradients:
        settings["communication_data_type"] = "bf16"
    if config.precision in ("bfloat16", "float16"):
        # Inside the module, where DeepSpeed leaves it alone: its own autocast would bring its own loss scaling.
        half = torch.autocast(ranks.device.type, dtype=getattr(torch, config.precision))
        backbone.forward = half(backbone.forward)
    base = build_optimizer(optimizer, [p for p in backbone.parameters() if p.requires_grad])
    base.state.clear()  # DeepSpeed swaps the parameters for flat parts of them
    engine, zero, _, _ = deepspeed.initialize(model=backbone, optimizer=base, config=settings, dist_init_required=False)
    for part in _parts(zero):
        base.state[part] = initial_state(optimizer, part)
    if config.parallel != "zero3":
        zero._lazy_init_hp_params_optimizer_state()
    return cast(nn.Module, engine)


def is_engine(network: nn.Module | None) -> bool:
    """Whether this is what :func:`shard` gives (told without importing DeepSpeed)."""
    return hasattr(network, "zero_optimization_stage")


def _parts(zero: Any) -> list[Tensor]:
    """The flat float32 parts of the parameters that this rank updates."""
    found = getattr(zero, "fp32_partitioned_groups_flat", None)
    return list(zero.single_partition_of_fp32_groups if found is None else found)


class ZeroUpdater(Updater):
    """The :class:`trainer.run.optim.Updater` of a backbone under ZeRO, next to other modules that are replicated.

    Args:
        network: what :func:`shard` gave for ``modules["backbone"]``.
        modules: name → module.
        config: optimizer, learning rate, decay and clipping.
    """

    def __init__(self, network: nn.Module, modules: dict[str, nn.Module], config: OptimizerConfig) -> None:
        self.network = cast(Any, network)
        self.zero: Any = self.network.optimizer
        self.backbone: nn.Module = modules["backbone"]
        self.trained = {k: p for k, p in self.backbone.named_parameters() if p.requires_grad}
        self.whole = self.network.zero_optimization_stage() < 3
        super().__init__({k: m for k, m in modules.items() if k != "backbone"}, config)

    def gradient_norm(self) -> Tensor:
        """See :meth:`Updater.gradient_norm`; of the averaged gradients, each rank's part once."""
        parts = [g for group in self.zero.averaged_gradients.values() for g in group or () if g is not None]
        device = _parts(self.zero)[0].device
        square = torch.zeros((), dtype=torch.float64, device=device)
        if parts:
            square = torch.stack(torch._foreach_norm(parts)).double().square().sum()
        square = all_reduce_sum(square)
        return (square + super().gradient_norm().square()).sqrt() if self.parameters else square.sqrt()

    def step(self, lr: float, norm: Tensor, finite: Tensor, scale: Tensor) -> None:
        """See :meth:`Updater.step`."""
        if self.parameters:
            super().step(lr, norm, finite, scale)
        self.instruct(self.zero.optimizer, lr, norm, finite, scale)
        self.network.step()

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """See :meth:`Updater.weights`; parameters of stage 3 are copies in host memory. Collective."""
        return {"backbone": self._whole_weights()} | super().weights()

    def _whole_weights(self) -> dict[str, Tensor]:
        state = {k: v.detach() for k, v in self.backbone.state_dict().items()}
        if self.whole:
            return state
        from deepspeed.runtime.zero import GatheredParameters

        for key, parameter in self.backbone.named_parameters():
            with GatheredParameters([parameter]):
                state[key] = parameter.detach().to("cpu", copy=True)
        return state

    def state(self) -> dict[str, Tensor]:
        """See :meth:`Updater.state`; whole tensors, copies in host memory. Collective."""
        from deepspeed.utils import safe_get_full_optimizer_state

        out = super().state()
        entries = self.zero.optimizer.state[_parts(self.zero)[0]]
        for key, parameter in self.trained.items():
            for entry, value in entries.items():
                whole = (
                    safe_get_full_optimizer_state(parameter, entry).view(self._shape(parameter))
                    if value.ndim
                    else value
                )
                out[f"backbone.{key}/{entry}"] = whole.detach().to("cpu", copy=True)
        return out

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        return cast(torch.Size, parameter.shape if self.whole else cast(Any, parameter).ds_shape)

    def loaded(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        """See :meth:`Updater.loaded`: every rank takes its parts of what was read. Collective."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_full_optimizer_state

        if not self.whole:
            for key, parameter in self.backbone.named_parameters():
                with GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
                    parameter.copy_(weights[f"backbone.{key}"])
        self.zero.refresh_fp32_params()
        for key, parameter in self.trained.items():
            for entry in self.zero.optimizer.state[_parts(self.zero)[0]]:
                value = state[f"backbone.{key}/{entry}"]
                if value.ndim:
                    safe_set_full_optimizer_state(parameter, value.to(_parts(self.zero)[0].device), entry)
                    continue
                for part in _parts(self.zero):
                    self.zero.optimizer.state[part][entry].copy_(value)


def build_updater(modules: dict[str, nn.Module], network: nn.Module | None, config: OptimizerConfig) -> Updater:
    """The updater of a task's modules; ``network``: its wrapped backbone, which may be DeepSpeed's engine."""
    if network is not None and is_engine(network):
        return ZeroUpdater(network, modules, config)
    return Updater(modules, config)
