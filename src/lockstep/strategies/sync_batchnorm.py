"""Synchronized batch norm on CPUs, which torch lacks, so that a run with ``sync_batchnorm`` can be tested without GPUs."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


def run_on_cpu(module: nn.Module) -> None:
    """Replace the class of every SyncBatchNorm in ``module``; names and states stay."""
    for submodule in module.modules():
        if isinstance(submodule, nn.SyncBatchNorm):
            submodule.__class__ = CpuSyncBatchNorm  # type: ignore[assignment]


class CpuSyncBatchNorm(nn.Module):
    """SyncBatchNorm for CPUs."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input``, shape (samples, channels, …), by the mean and variance of all ranks' samples."""
        norm: Any = self
        mean, variance = norm.running_mean, norm.running_var
        if self.training or mean is None:
            dims = [0, *range(2, input.dim())]
            sums = _sum_over_ranks(torch.cat([input.sum(dims), input.new_tensor([input.numel() / input.shape[1]])]))
            mean, count = sums[:-1] / sums[-1], sums[-1].detach()
            variance = _sum_over_ranks((input - _as_channels(mean, input)).square().sum(dims)) / count
            if norm.running_mean is not None:
                norm.num_batches_tracked.add_(1)
                momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
                norm.running_mean.lerp_(mean.detach(), momentum)
                norm.running_var.lerp_(variance.detach() * count / (count - 1), momentum)
        output = (input - _as_channels(mean, input)) * _as_channels((variance + norm.eps).rsqrt(), input)
        return output * _as_channels(norm.weight, input) + _as_channels(norm.bias, input) if norm.affine else output


def _sum_over_ranks(tensor: Tensor) -> Tensor:
    summed: Tensor = all_reduce(tensor)  # type: ignore[no-untyped-call]
    return summed


def _as_channels(vector: Tensor, input: Tensor) -> Tensor:
    """``vector``, shape (channels,), as it broadcasts against ``input``."""
    return vector.reshape(1, -1, *[1] * (input.dim() - 2))
