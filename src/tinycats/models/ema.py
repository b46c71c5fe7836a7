"""EMA: the exponential moving average of a model's weights, which samples better than the weights themselves."""

import copy
from typing import Any, TypeVar

import torch
from torch.optim.swa_utils import PARAM_LIST, AveragedModel

Model = TypeVar("Model", bound=torch.nn.Module)


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


class EarlierEMA:
    """The EMA as it was at a quarter to a half of the steps so far, the guide of `flow_matching.sample`.

    It is kept at steps that are a power of two: twice, for the one before the last is early enough; in bf16.
    """

    MIN_STEPS = 256  # before, it is no worse model but none, and leads away from the classes, too (ADR-029)

    def __init__(self) -> None:
        self._kept: dict[int, dict[str, torch.Tensor]] = {}  # step: weights; the last two

    def update(self, ema: AveragedModel, step: int) -> None:
        """Look at the EMA after that many steps."""
        if step & (step - 1) == 0:
            weights = {name: tensor.to(torch.bfloat16) for name, tensor in ema.module.state_dict().items()}
            self._kept = {kept: self._kept[kept] for kept in self._kept if 2 * kept == step} | {step: weights}

    def weights(self) -> dict[str, torch.Tensor]:
        """bf16, on the CPU; empty while there is no guide."""
        step = min(self._kept, default=0)
        if step < self.MIN_STEPS or len(self._kept) < 2:
            return {}
        return {name: tensor.cpu() for name, tensor in self._kept[step].items()}

    def model(self, like: Model) -> Model | None:
        """A model like that one with these weights, where it is; None while there is no guide."""
        weights = self.weights()
        if not weights:
            return None
        model = copy.deepcopy(like)
        model.load_state_dict(weights)
        return model

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {str(step): weights for step, weights in self._kept.items()}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """From the checkpoint."""
        self._kept = {int(step): weights for step, weights in state_dict.items()}
