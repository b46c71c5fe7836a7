"""AdamW's groups, Muon, and the learning rate over time."""

import itertools
import math
from collections.abc import Callable, Iterable

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from tinycats.training import optimization
from tinycats.training.optimization import (
    POLYNOMIALS,
    Muon,
    adamw,
    orthogonalized,
    warmup_cosine,
    warmup_stable_decay,
)


def test_norms_and_biases_do_not_decay():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))
    decayed, kept = adamw(model, 1e-3, 0.1).param_groups
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0
    assert {id(parameter) for parameter in decayed["params"]} == {id(model[0].weight), id(model[2].weight)}
    assert len(kept["params"]) == 4


def test_an_orthogonalized_matrix_keeps_its_singular_vectors_and_evens_its_singular_values():
    rng = torch.Generator().manual_seed(0)
    for shape in (12, 20), (20, 12), (12, 60), (60, 12):
        matrices = torch.randn(2, *shape, generator=rng)
        for matrix, result in zip(matrices, orthogonalized(matrices), strict=True):
            left, _, right = torch.linalg.svd(matrix, full_matrices=False)
            inside = left.T @ result @ right.T
            assert (inside - inside.diag().diag()).abs().max() < 1e-4
            assert inside.diag().min() > 0.6 and inside.diag().max() < 1.3
    assert torch.equal(orthogonalized(torch.zeros(1, 3, 2)), torch.zeros(1, 3, 2))


@pytest.mark.parametrize("shape", [(64, 256), (576, 192)])
def test_in_bf16_too_singular_values_are_evened_where_gradients_have_hardly_any_but_the_first(shape):
    matrices = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    falling = 1 / torch.arange(1.0, values.shape[1] + 1)
    matrices = left * falling @ right
    results = orthogonalized(matrices.bfloat16()).float()
    inside = (left.mT @ results @ right.mT).diagonal(dim1=1, dim2=2)
    assert inside[:, values.shape[1] // 4].min() > 0.6 and inside.max() < 1.5
    assert torch.linalg.matrix_norm(results, 2).max() < 2.5
    assert (results - orthogonalized(matrices)).norm() < 0.2 * results.norm()


def test_each_polynomial_comes_nearer_to_one_than_any_other_of_its_terms():
    """Its error is equally large, and of changing sign, at four points: no other polynomial of its three terms has a
    smaller one (Chebyshev's equioscillation)."""
    smallest, largest = 0.01, 1.0
    for a, b, c in POLYNOMIALS:
        x = torch.linspace(smallest, largest, 100_001, dtype=torch.float64)
        errors = a * x + b * x**3 + c * x**5 - 1
        turns = errors[1:-1][(errors[1:-1] - errors[:-2]) * (errors[2:] - errors[1:-1]) <= 0]
        extremes = torch.stack([errors[0], *turns, errors[-1]])
        most = errors.abs().max()
        assert torch.allclose(extremes, most * torch.tensor([-1, 1, -1, 1], dtype=torch.float64), rtol=1e-3)
        smallest, largest = 1 - most.item(), 1 + most.item()
    assert largest < 1.27


def small_model() -> tuple[torch.nn.Module, list[torch.nn.Parameter]]:
    """A model, and its matrices: two of one shape, and one of another."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 24))
    return model, [parameter for parameter in model.parameters() if parameter.ndim == 2]


def loss_at(model: torch.nn.Module, step: int) -> torch.Tensor:
    """On data of that step's own."""
    rng = torch.Generator().manual_seed(step)
    inputs, targets = torch.randn(32, 8, generator=rng), torch.randn(32, 24, generator=rng)
    return (model(inputs) - targets).square().mean()


def moved(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], steps: Iterable[int]) -> list[torch.Tensor]:
    """The parameters after these steps."""
    for step in steps:
        model.zero_grad()
        loss_at(model, step).backward()
        for optimizer in optimizers:
            optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_muon_moves_matrices_as_torchs_own_and_the_rest_as_adamw(dtype, monkeypatch):
    """Both with singular values of one: torch's by many iterations of a polynomial that converges."""

    def exactly(matrices: torch.Tensor) -> torch.Tensor:
        left, _, right = torch.linalg.svd(matrices.float(), full_matrices=False)
        return (left @ right).to(matrices.dtype)

    monkeypatch.setattr(optimization, "orthogonalized", exactly)
    model, matrices = small_model()
    began = [parameter.detach().clone() for parameter in model.parameters()]
    ours = moved(model, [Muon(model, matrices, 1e-2, 0.1, 0.95, dtype)], range(5))
    model, matrices = small_model()
    converging = {"ns_coefficients": (15 / 8, -10 / 8, 3 / 8), "ns_steps": 30}
    alike = {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    theirs = moved(
        model,
        [
            torch.optim.Muon(matrices, **alike, **converging),
            torch.optim.AdamW(
                [p for p in model.parameters() if p.ndim == 1], lr=1e-2, weight_decay=0.0, betas=(0.9, 0.95)
            ),
        ],
        range(5),
    )
    for start, mine, other in zip(began, ours, theirs, strict=True):
        assert (mine - other).norm() < 0.02 * (other - start).norm(), "but for bf16's rounding"


def test_muon_moves_a_convolution_as_the_matrices_of_128_filters_each():
    rng = torch.Generator().manual_seed(0)
    weight, gradient = torch.randn(2, 256, 4, 3, 3, generator=rng)
    convolution = torch.nn.Conv2d(4, 256, 3, bias=False).to(memory_format=torch.channels_last)
    halves = torch.nn.ParameterList([part.flatten(1).clone() for part in weight.split(128)])
    with torch.no_grad():
        convolution.weight.copy_(weight)
    convolution.weight.grad = gradient.clone()
    for half, part in zip(halves, gradient.split(128), strict=True):
        half.grad = part.flatten(1)
    Muon(convolution, [convolution.weight], 0.1, 0.1).step()
    Muon(halves, halves, 0.1, 0.1).step()
    assert not torch.allclose(convolution.weight, weight, atol=1e-2)
    assert torch.allclose(convolution.weight.flatten(1), torch.cat([*halves]), atol=1e-6)


def test_muon_goes_on_where_it_was_saved():
    model, matrices = small_model()
    straight = moved(model, [Muon(model, matrices, 1e-2, 0.0, 0.95)], range(6))
    model, matrices = small_model()
    optimizer = Muon(model, matrices, 1e-2, 0.0, 0.95)
    moved(model, [optimizer], range(3))
    again = Muon(model, matrices, 1e-2, 0.0, 0.95)
    again.load_state_dict(optimizer.state_dict())
    assert all(map(torch.equal, moved(model, [again], range(3, 6)), straight))


def test_muon_skips_a_step_whose_scaled_gradients_are_infinite_and_unscales_the_others():
    model, matrices = small_model()
    plain = moved(model, [Muon(model, matrices, 1e-2, 0.0, 0.95)], [0, 2])
    model, matrices = small_model()
    optimizer, scaler = Muon(model, matrices, 1e-2, 0.0, 0.95), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step, factor in enumerate((1.0, math.inf, 1.0)):
        model.zero_grad()
        scaler.scale(factor * loss_at(model, step)).backward()
        scaler.step(optimizer)
        scaler.update()
    for parameter, expected in zip(model.parameters(), plain, strict=True):
        assert torch.allclose(parameter, expected, atol=1e-5)


def rates(make_schedule: Callable[..., LambdaLR], warmup: int, total: int) -> list[float]:
    optimizer = adamw(torch.nn.Linear(2, 2), 1.0, 0.0)
    schedule = make_schedule(optimizer, warmup, total)
    result = []
    for _ in range(total):
        result.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return result


def test_the_rate_rises_linearly_then_falls_along_a_cosine():
    rate = rates(warmup_cosine, 10, 110)
    assert rate[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rate[10] == 1
    assert rate[60] == pytest.approx(0.5)
    assert rate[-1] == pytest.approx(0, abs=1e-3)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rate[10:]))


def test_the_rate_rises_linearly_stays_and_falls_linearly_in_the_last_fifth():
    rate = rates(warmup_stable_decay, 10, 100)
    assert rate[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rate[10:81] == [1] * 71
    assert rate[80:] == pytest.approx([left / 20 for left in range(20, 0, -1)])


@pytest.mark.parametrize("make_schedule", [warmup_cosine, warmup_stable_decay])
def test_without_a_warm_up_it_begins_at_the_peak(make_schedule):
    assert rates(make_schedule, 0, 10)[0] == 1


@pytest.mark.parametrize("make_schedule", [warmup_cosine, warmup_stable_decay])
def test_a_rate_is_above_zero_in_a_run_that_is_all_warm_up(make_schedule):
    assert all(0 < rate <= 1 for rate in rates(make_schedule, 3, 3) + rates(make_schedule, 1, 1))
