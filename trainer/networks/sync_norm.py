"""Batch norm with the mean and variance of the global batch.

On a GPU it is torch's; on the CPU, where torch refuses it, the sums are added over the ranks here. With it the split of
a batch over ranks decides nothing: a run on other ranks has the same losses to rounding.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.distributed import all_reduce_sum


def synchronise_norms(backbone: nn.Module, device: torch.device) -> None:
    """Let the batch norms of ``backbone`` take their statistics from all ranks, in place; names and values stay."""
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(backbone)
        return
    for module in backbone.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = _GlobalNorm


class _SumOverRanks(torch.autograd.Function):
    """The sum over the ranks; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_reduce_sum(x.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return all_reduce_sum(gradients[0].clone(memory_format=torch.contiguous_format))


class _GlobalNorm(_BatchNorm):
    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        """(b, C) or (b, C, H, W), b of each rank its own → the same shape; in training every rank must call it."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(input)
        x = input if input.dtype == torch.float64 else input.float()
        axes, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        count = x.new_tensor([x.numel() / x.shape[1]])
        sums: Tensor = _SumOverRanks.apply(torch.cat([x.sum(axes), count]))
        n = sums[-1].detach()
        mean = sums[:-1] / n
        centred = x - mean.view(shape)
        variance: Tensor = _SumOverRanks.apply(centred.square().sum(axes)) / n
        self._keep(mean.detach(), variance.detach() * n / (n - 1))
        out = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.to(x.dtype).view(shape) + self.bias.to(x.dtype).view(shape)
        return out.to(input.dtype)

    @torch.no_grad()
    def _keep(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)
