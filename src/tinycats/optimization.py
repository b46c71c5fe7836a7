"""AdamW and its learning rate over time."""

import math

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


def adamw(model: torch.nn.Module, lr: float, weight_decay: float, beta2: float = 0.999) -> AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) that decays matrices and convolutions alone: pulling
    the scales and offsets of norms, and biases, towards zero only makes a model worse."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=lr, betas=(0.9, beta2), fused=parameters[0].device.type in ("cpu", "cuda"))


def warmup_cosine(optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int) -> LambdaLR:
    """Linear from almost nothing to the full rate in `warmup_steps`, then half a cosine down to zero at
    `total_steps` (Loshchilov and Hutter, arXiv 1608.03983, without restarts)."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return LambdaLR(optimizer, factor)


def warmup_stable_decay(optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int) -> LambdaLR:
    """Linear from almost nothing to the full rate in `warmup_steps`, and in the last fifth of `total_steps` linear
    down to zero (Hägele et al., arXiv 2405.18392)."""

    def factor(step: int) -> float:
        rise = (step + 1) / max(1, warmup_steps)
        fall = 5 * (total_steps - step) / total_steps
        return max(0.0, min(1.0, rise, fall))

    return LambdaLR(optimizer, factor)


def all_finite(model: torch.nn.Module) -> bool:
    """Whether no weight or buffer of the model is infinite or NaN; waits for the device once."""
    return bool(torch.stack([tensor.isfinite().all() for tensor in model.state_dict().values()]).all())
