"""AdamW's groups, and the learning rate over time."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from tinycats.optimization import adamw, warmup_cosine, warmup_stable_decay


def test_norms_and_biases_do_not_decay():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))
    decayed, kept = adamw(model, 1e-3, 0.1).param_groups
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0
    assert {id(parameter) for parameter in decayed["params"]} == {id(model[0].weight), id(model[2].weight)}
    assert len(kept["params"]) == 4


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
