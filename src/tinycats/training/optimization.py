"""AdamW, Muon, and their learning rate over time."""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


def adamw(model: torch.nn.Module, lr: float, weight_decay: float, beta2: float = 0.999) -> AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) that decays matrices and convolutions alone: pulling
    the scales and offsets of norms, and biases, towards zero only makes a model worse."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return AdamW(_groups(parameters, weight_decay), lr=lr, betas=(0.9, beta2), fused=_fuses(parameters))


def _groups(parameters: list[torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    return [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]


def _fuses(parameters: list[torch.nn.Parameter]) -> bool:
    return parameters[0].device.type in ("cpu", "cuda")


class Muon(AdamW):
    """Muon (Jordan et al., kellerjordan.github.io/posts/muon) for some weights of a model, AdamW for the rest.

    A convolution is the matrix of its filters, one a row, of which 128 each are a matrix of their own: what a matrix
    takes grows with the square of its rows. The direction in which a matrix moves is its gradient's momentum with all
    singular values made (nearly) the same. It is as long as AdamW's usually is (Liu et al., arXiv
    2502.16982, equation 4), so that one learning rate serves both. torch.optim.Muon, of which
    tests/test_optimization.py shows that it moves matrices alike, evens singular values in five iterations for three
    here, in bf16 wherever it is, which is slow where that is emulated, and wants a second optimizer for what is not a
    matrix.

    Args:
        matrices: of the model's parameters, those that Muon is for: matrices and convolutions.
        dtype: that singular values are evened in; None: each matrix's own.
    """

    MOMENTUM = 0.95
    FILTERS = 128

    def __init__(
        self,
        model: torch.nn.Module,
        matrices: Iterable[torch.nn.Parameter],
        lr: float,
        weight_decay: float,
        beta2: float = 0.999,
        dtype: torch.dtype | None = None,
    ):
        matrices = [*matrices]
        theirs = {id(matrix) for matrix in matrices}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in theirs]
        groups = [{"is_orthogonal": False, **group} for group in _groups(rest, weight_decay)]
        groups.append({"is_orthogonal": True, "params": matrices, "weight_decay": weight_decay})
        super().__init__(groups, lr=lr, betas=(0.9, beta2), fused=_fuses([*matrices, *rest]))
        self._dtype = dtype
        # A fused AdamW divides gradients by the loss's scale itself; of the matrices' it does not know.
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        """Move all parameters that have a gradient; those of the matrices are gone afterwards."""
        assert closure is None, "nothing is computed again"
        for group in self.param_groups:
            if group["is_orthogonal"]:
                having = sorted((p for p in group["params"] if p.grad is not None), key=lambda p: p.shape)
                for _, alike in itertools.groupby(having, lambda p: p.shape):
                    self._move([*alike], group["lr"], group["weight_decay"])
        super().step()

    def _move(self, matrices: list[torch.Tensor], lr: float, weight_decay: float) -> None:
        """A step of matrices of one shape, at once."""
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix] = {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(matrix)}
            self.state[matrix]["step"] += 1  # which AdamW asks of whatever it loads
            matrix.grad = None  # AdamW passes over what has none
        momenta = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - self.MOMENTUM)
        torch._foreach_lerp_(gradients, momenta, self.MOMENTUM)  # Nesterov's; nothing else needs them any more
        ahead = [matrix.movedim(1, -1) for matrix in gradients]  # as convolutions lie in memory, channels last
        flat = [matrix.flatten(1) for matrix in ahead]
        stacked = torch.empty(len(flat), *flat[0].shape, dtype=self._dtype or flat[0].dtype, device=flat[0].device)
        torch._foreach_copy_([*stacked], flat)
        if matrices[0].ndim > 2 and stacked.shape[1] % self.FILTERS == 0:
            stacked = stacked.view(-1, self.FILTERS, stacked.shape[2])
        length = 0.2 * max(stacked.shape[1:]) ** 0.5
        directions = orthogonalized(stacked).reshape(len(ahead), *ahead[0].shape).movedim(-1, 2)
        if weight_decay:
            torch._foreach_mul_(matrices, 1 - lr * weight_decay)
        for matrix, direction in zip(matrices, directions, strict=True):
            matrix.add_(direction, alpha=-lr * length)


# Of odd polynomials a x + b x**3 + c x**5 those that, one after another, bring all of [0.01, 1] nearest to 1: each is
# minimax on what the ones before it have left.
POLYNOMIALS = (
    (8.093368512548258, -23.620430328824273, 17.446151749836247),
    (3.6365855542590406, -2.7219267466089074, 0.5365462883273612),
    (2.6612999857770987, -1.9771545218846234, 0.4526164069964006),
)
MARGIN = 1.02  # of the largest eigenvalue; beyond 1 the polynomials grow fast, and bf16 rounds


def orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    """[B, M, N] with the singular vectors of each matrix, and singular values between 0.73 and 1.27 instead of its
    own, where they are more than about a hundredth of the largest; smaller ones are 78 times as large.

    Three Newton-Schulz iterations with the polynomials of Polar Express (Amsel et al., arXiv 2505.16932). Each
    multiplies the matrix by a polynomial of its Gram matrix. As these commute, they are multiplied with each other
    first, which is smaller where the matrix is long. In bf16 what rounding adds to small singular values grows with
    them, which training does not feel (ADR-029). Of zeros they make zeros.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    gram = matrices.mT @ matrices if is_tall else matrices @ matrices.mT
    # No eigenvalue is larger than the Frobenius norm, and the largest of a gradient's is nearly as large.
    bound = MARGIN * gram.norm(dim=(1, 2), keepdim=True).clamp_min(1e-14)
    gram = gram / bound
    polynomial = product = _polynomial(gram, *POLYNOMIALS[0])
    for coefficients in POLYNOMIALS[1:]:
        gram = polynomial @ gram @ polynomial
        polynomial = _polynomial(gram, *coefficients)
        product = polynomial @ product
    product = product * bound.rsqrt()
    return matrices @ product if is_tall else product @ matrices


def _polynomial(gram: torch.Tensor, a: float, b: float, c: float) -> torch.Tensor:
    """What takes singular values x to a x + b x**3 + c x**5 when it multiplies the matrix."""
    polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    polynomial.diagonal(dim1=1, dim2=2).add_(a)
    return polynomial


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
