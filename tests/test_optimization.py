"""AdamW's groups, and the learning rate over time."""

import itertools

import pytest
import torch

from tinycats.optimization import adamw, warmup_cosine


def test_norms_and_biases_do_not_decay():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))
    decayed, kept = adamw(model, 1e-3, 0.1).param_groups
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0
    assert {id(parameter) for parameter in decayed["params"]} == {id(model[0].weight), id(model[2].weight)}
    assert len(kept["params"]) == 4


def rates(warmup: int, total: int) -> list[float]:
    optimizer = adamw(torch.nn.Linear(2, 2), 1.0, 0.0)
    schedule = warmup_cosine(optimizer, warmup, total)
    result = []
    for _ in range(total):
        result.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return result


def test_the_rate_rises_linearly_then_falls_along_a_cosine():
    rate = rates(10, 110)
    assert rate[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rate[10] == 1
    assert rate[60] == pytest.approx(0.5)
    assert rate[-1] == pytest.approx(0, abs=1e-3)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rate[10:]))


def test_without_a_warm_up_it_begins_at_the_peak():
    assert rates(0, 10)[0] == 1
