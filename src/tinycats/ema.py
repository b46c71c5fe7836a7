"""EMA: the exponential moving average of a model's weights, which samples better than the weights themselves."""

import torch
from torch.optim.swa_utils import PARAM_LIST, AveragedModel


def ema_model(model: torch.nn.Module, beta: float) -> AveragedModel:
    """An average that `update_parameters(model)` moves towards the weights by 1 - decay.

    The decay after n updates is min(beta, (1 + n) / (10 + n)): a short run is not for ever an average with the
    noise that it began from.
    """

    def move(averages: PARAM_LIST, weights: PARAM_LIST, updates: torch.Tensor | int) -> None:
        count = int(updates)
        decay = min(beta, (1 + count) / (10 + count))
        torch._foreach_lerp_(list(averages), list(weights), 1 - decay)

    ema = AveragedModel(model, multi_avg_fn=move)
    ema.n_averaged = ema.n_averaged.cpu()  # read at each step, for which a GPU would have to be waited for
    return ema.requires_grad_(False)
