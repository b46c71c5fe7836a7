"""Batch normalisation over the whole batch, where each of a run's processes has a part of it."""

import torch
from torch import nn


def synchronised(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with its batch norms computing mean and variance over the batches of all processes, same weights.

    On a GPU by torch's SyncBatchNorm, which refuses tensors on a CPU.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for name, module in model.named_children():
        if isinstance(module, nn.BatchNorm2d):
            setattr(model, name, GlobalBatchNorm2d(module))
        else:
            synchronised(module, device)
    return model


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d (Ioffe and Szegedy, arXiv 1502.03167) over the batches of all processes, which may differ in size.

    Args:
        other: whose parameters and statistics it takes over.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor
    momentum: float

    def __init__(self, other: nn.BatchNorm2d):
        super().__init__(other.num_features, other.eps, other.momentum, other.affine, other.track_running_stats)
        self._parameters, self._buffers, self.training = other._parameters, other._buffers, other.training

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(images)
        given = images.dtype
        images = images.to(torch.promote_types(given, torch.float32))  # bf16 cannot count to three hundred
        count = images.new_tensor([images.numel() / self.num_features])
        total, sums = _sum_over_processes(torch.cat([count, images.sum((0, 2, 3))])).tensor_split([1])
        # Twice, for the mean of squares less the squared mean loses what the two have in common.
        centred = images - (sums / total)[:, None, None]
        variance = _sum_over_processes(centred.square().sum((0, 2, 3))) / total
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(sums / total, self.momentum)
            self.running_var.lerp_(variance * total / (total - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(given)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(_context, tensor: torch.Tensor) -> torch.Tensor:
        summed = tensor.clone()
        torch.distributed.all_reduce(summed)
        return summed

    @staticmethod
    def backward(_context, gradient: torch.Tensor) -> torch.Tensor:
        return _Sum.apply(gradient)  # each process's loss depends on the sum


def _sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    return _Sum.apply(tensor)
