"""Several processes that train as one: how they meet, and batch normalisation over the whole batch.

On GPUs PyTorch has the latter, as `nn.SyncBatchNorm`. That refuses tensors on a processor, so here is the same for
them; with it two processes compute what one computes.
"""

import os
import sys

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn


def start_processes() -> PartialState:
    """Join the other processes, where there are any. Accelerate must be told when they have no GPU."""
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu)


def warn(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # once, whatever the number of processes
        print(f"scconv train: {message}", file=sys.stderr)


class SumOfProcesses(torch.autograd.Function):
    """`dist.all_reduce` that can be differentiated: each process's part enters the sum of all."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return SumOfProcesses.apply(gradient)


class SharedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose mean and variance are those of all processes' images together, (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x  # as nn.BatchNorm2d has its statistics
        count = x.numel() // x.shape[1] * dist.get_world_size()  # every process has as many images
        mean = SumOfProcesses.apply(wide.sum((0, 2, 3))) / count
        centred = wide - mean[:, None, None]
        variance = SumOfProcesses.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def share_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Make every `nn.BatchNorm2d` of `model` see the whole batch. Names and tensors of its state stay the same."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SharedBatchNorm2d  # keeps parameters, buffers, options and names
    return model
