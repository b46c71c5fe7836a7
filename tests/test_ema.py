"""The EMA of the weights."""

import pytest
import torch

from tinycats.models.ema import EarlierEMA, ema_model


def test_its_decay_is_warmed_up_so_that_a_short_run_is_not_noise():
    model = torch.nn.Linear(1, 1, bias=False)
    ema = ema_model(model, beta=0.9999)
    with torch.no_grad():
        model.weight.fill_(0.0)
        ema.update_parameters(model)  # the first update copies
        model.weight.fill_(1.0)
        for _ in range(200):
            ema.update_parameters(model)
    assert ema.module.weight.item() > 0.99, "with 0.9999 from the beginning it would be 0.02"


def test_in_the_long_run_its_decay_is_beta():
    model = torch.nn.Linear(1, 1, bias=False)
    ema = ema_model(model, beta=0.5)
    with torch.no_grad():
        model.weight.fill_(0.0)
        for _ in range(100):
            ema.update_parameters(model)
        model.weight.fill_(1.0)
        ema.update_parameters(model)
    assert ema.module.weight.item() == pytest.approx(0.5)


def test_it_is_restored_with_its_count():
    model = torch.nn.Linear(2, 2)
    one, other = ema_model(model, 0.99), ema_model(model, 0.99)
    for _ in range(5):
        one.update_parameters(model)
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        model.weight.add_(1)
    one.update_parameters(model)
    other.update_parameters(model)
    assert torch.equal(one.module.weight, other.module.weight)


def test_the_earlier_ema_is_of_a_quarter_to_a_half_of_the_steps_also_when_it_goes_on_from_a_checkpoint():
    model = torch.nn.Linear(1, 1, bias=False)
    ema, earlier = ema_model(model, beta=0.0), EarlierEMA()
    for step in range(1, 1100):
        with torch.no_grad():
            model.weight.fill_(float(step))
        ema.update_parameters(model)
        earlier.update(ema, step)
        if step < 2 * EarlierEMA.MIN_STEPS:
            assert not earlier.weights(), "which is no model yet"
            assert earlier.model(ema.module) is None
        else:
            kept = earlier.weights()["weight"].item()
            assert step / 4 < kept <= step / 2
            assert earlier.model(ema.module).weight.item() == kept
            assert ema.module.weight.item() == step, "it is a copy"
        resumed = EarlierEMA()
        resumed.load_state_dict(earlier.state_dict())
        earlier = resumed
