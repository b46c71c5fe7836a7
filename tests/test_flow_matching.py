"""Flow matching: the path, the loss, the guidance; and that what is learned lands on the data."""

from collections.abc import Iterator
from itertools import repeat

import pytest
import torch
from torch import nn

from tinycats.models.flow_matching import (
    CHURN_END,
    END,
    STEPS,
    dropped_classes,
    guidance_begins,
    implied_velocity,
    noised_back,
    overshoots,
    point_on_path,
    sample,
    sample_timesteps,
    step_timesteps,
    velocity_loss,
)


def test_the_velocity_is_the_derivative_of_the_path():
    noise, images, timesteps = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.tensor([0.0, 0.3, 0.6, 0.9])
    points, derivative = torch.func.jvp(
        lambda now: point_on_path(noise, images, now), (timesteps,), (torch.ones_like(timesteps),)
    )
    assert torch.allclose(implied_velocity(points, images, timesteps), derivative, atol=1e-4)


def test_the_path_leads_from_noise_to_image():
    noise, images = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(point_on_path(noise, images, torch.zeros(2)), noise)
    assert torch.equal(point_on_path(noise, images, torch.ones(2)), images)


def test_the_loss_is_the_mean_square_of_the_velocitys_error():
    noise, images, timesteps = torch.randn(6, 5), torch.randn(6, 5), 0.9 * torch.rand(6)
    points = point_on_path(noise, images, timesteps)
    errors = implied_velocity(points, torch.zeros(6, 5), timesteps) - implied_velocity(points, images, timesteps)
    loss = velocity_loss(torch.zeros(6, 5), images, timesteps)
    assert loss == pytest.approx(errors.square().mean().item(), rel=1e-4)
    assert velocity_loss(images, images, timesteps) == 0


def test_the_loss_of_images_against_themselves_cannot_happen():
    """Past failure 9: the generator was trained on (image, image) pairs; its loss read 0.0000 for 200,000 steps."""
    images = torch.randn(2, 3)
    with pytest.raises(ValueError, match="to themselves"):
        point_on_path(images, images, torch.rand(2))


def test_times_lie_within_the_path_and_come_from_the_generator():
    timesteps = sample_timesteps(10_000, torch.Generator().manual_seed(0))
    assert timesteps.min() > 0 and timesteps.max() < 1
    assert torch.equal(timesteps, sample_timesteps(10_000, torch.Generator().manual_seed(0)))


def test_a_tenth_of_the_classes_is_dropped():
    dropped = dropped_classes(10_000, 0.1, torch.Generator().manual_seed(0))
    assert dropped.dtype == torch.bool
    assert dropped.float().mean() == pytest.approx(0.1, abs=0.01)


COLOUR = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
HALVES = torch.tensor([1.0, -1.0]).view(1, 1, 1, 2)  # of an image of two pixels: one is light, one is dark


def by_class(points: torch.Tensor, timesteps: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """An image that depends on the class alone: its number times a mean colour and a contrast; at the end of the path,
    where nothing is decided, what is given."""
    named = classes.float().view(-1, 1, 1, 1) * (COLOUR + HALVES)
    return torch.where(timesteps.view(-1, 1, 1, 1) < END - 1e-6, named.expand_as(points), points)


def led_to(noise: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """What a path without fresh noise led to, up to its end."""
    return (samples - (1 - END) * noise) / END


def test_guidance_of_one_is_none_zero_is_the_null_class_and_more_exaggerates_all_but_light_and_colour():
    noise, classes = torch.randn(5, 3, 1, 2), torch.full((5,), 2)
    for scale, light, contrast in ((0, 10, 10), (0.5, 6, 6), (1, 2, 2), (1.5, 2, 10 + 1.5 * (2 - 10))):
        how = {"steps": 20, "churn": 0, "guidance_scale": scale, "guided_from": 0}
        samples = sample(by_class, repeat(noise), classes, 10, **how)
        wanted = (light * COLOUR + contrast * HALVES).expand(5, 3, 1, 2)
        assert torch.allclose(led_to(noise, samples), wanted, atol=1e-3)


def test_a_guide_is_what_guidance_leads_away_from_and_is_not_asked_for_the_class():
    noise, classes = torch.randn(5, 3, 1, 2), torch.full((5,), 2)
    guide = lambda points, timesteps, asked: by_class(points, timesteps, asked) / 2  # noqa: E731
    how = {"steps": 20, "churn": 0, "guidance_scale": 1.5, "guided_from": 0}
    samples = sample(by_class, repeat(noise), classes, 10, guide=guide, **how)
    wanted = 2 * COLOUR + (5 + 1.5 * (2 - 5)) * HALVES
    assert torch.allclose(led_to(noise, samples), wanted.expand(5, 3, 1, 2), atol=1e-3)


@pytest.mark.parametrize(("size", "begins"), [(32, 0.18), (64, 0.1), (128, 0.05)])
def test_guidance_begins_when_light_is_decided_and_ends_before_the_last_step(size, begins):
    assert guidance_begins(size) == pytest.approx(begins, abs=0.002)
    asked = []

    def guide(points: torch.Tensor, timesteps: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        asked.append(timesteps[0].item())
        return points

    classes = torch.zeros(3, dtype=torch.int64)
    seen = lambda points, timesteps, classes: points  # noqa: E731
    sample(seen, repeat(torch.randn(3, 3, size, size)), classes, 10, guidance_scale=1.5, guide=guide)
    timesteps = step_timesteps(STEPS)[:-2].tolist()
    assert asked == [timestep for timestep in timesteps if timestep >= begins]
    assert 0 < len(asked) < len(timesteps)


def test_the_last_step_is_not_exaggerated():
    to_the_end = lambda points, timesteps, asked: by_class(points, 0 * timesteps, asked)  # noqa: E731
    noise = repeat(torch.randn(5, 3, 1, 2))
    for scale, wanted in ((0, 10), (0.5, 6), (1, 2), (1.5, 2)):
        samples = sample(to_the_end, noise, torch.full((5,), 2), 10, guidance_scale=scale)
        assert torch.allclose(samples, (wanted * (COLOUR + HALVES)).expand(5, 3, 1, 2), atol=1e-4)


def test_the_last_step_leads_from_the_end_to_what_is_seen_there():
    seen = []

    def model(points: torch.Tensor, timesteps: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        seen.append(timesteps[0].item())
        return points.abs()

    noise = torch.randn(3, 2)
    samples = sample(model, repeat(noise), torch.zeros(3, dtype=torch.int64), 1, steps=10, end=0.6)
    assert len(seen) == 10
    assert seen[0] == 0
    assert max(seen) == seen[-1] == pytest.approx(0.6)
    assert samples.min() >= 0, "none is negative as the model sees it: no mixture with what was there before"


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 51])
def test_steps_grow_longer_and_then_are_as_long(steps):
    timesteps = step_timesteps(steps, end=0.8)
    assert len(timesteps) == steps + 1
    assert timesteps[0] == 0 and timesteps[-1] == 1
    assert timesteps[-2] == pytest.approx(min(0.8, 1 - 1 / steps))
    lengths = timesteps[:-1].diff()
    assert (lengths > 0).all()
    assert (lengths[: steps // 2].diff() > 0).all()
    assert torch.allclose(lengths[steps // 2 :], lengths[-1:], atol=1e-6)


@pytest.mark.parametrize(("side", "kept"), [(64, 0.96), (128, 0.94)])
def test_light_and_colour_vary_as_they_do_in_the_data(side, kept):
    """Of images of one colour each, whose deviation is 0.29, the best prediction is known. The mean of an image of
    noise has a deviation of 1 / side. Fifty of Euler's steps, as long as each other, keep 0.87 and 0.76."""

    def best_prediction(points: torch.Tensor, timesteps: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        t = timesteps.view(-1, 1)
        return points * t * 0.29**2 / ((t * 0.29) ** 2 + ((1 - t) / side) ** 2)

    samples = sample(best_prediction, iter([torch.tensor([[1 / side]])]), torch.zeros(1, dtype=torch.int64), 1, churn=0)
    assert kept < samples.item() / 0.29 < 1


def best_prediction_of_normal_data(
    points: torch.Tensor, timesteps: torch.Tensor, classes: torch.Tensor
) -> torch.Tensor:
    """Of a mean of 3 and a deviation of 0.5."""
    t = timesteps.view(-1, 1)
    variance = (1 - t) ** 2 + (0.5 * t) ** 2
    return 3 + 0.25 * t / variance * (points - 3 * t)


def test_twice_the_steps_quarter_the_error():
    """Where the data are normal, it is known where the path leads: noise z to 3 + 0.5 z."""
    noise, classes = torch.randn(50, 1, dtype=torch.float64), torch.zeros(50, dtype=torch.int64)

    def error(steps: int) -> float:
        samples = sample(best_prediction_of_normal_data, iter([noise]), classes, 1, steps=steps, end=1, churn=0)
        return (samples - (3 + 0.5 * noise)).abs().mean().item()

    assert error(80) < 0.02
    assert error(80) / error(160) == pytest.approx(4, rel=0.25)


def endless_noise(count: int, rng: torch.Generator) -> Iterator[torch.Tensor]:
    while True:
        yield torch.randn(count, 2, generator=rng)


def test_noise_leads_back_to_where_a_point_of_the_path_was():
    rng = torch.Generator().manual_seed(0)
    image, noise, fresh = 3.0, *torch.randn(2, 100_000, generator=rng)
    back = noised_back(0.2 * noise + 0.8 * image, 0.8, 0.5, fresh)
    assert back.mean() == pytest.approx(0.5 * image, abs=0.01)
    assert (back - 0.5 * image).std() == pytest.approx(0.5, abs=0.01)


def test_steps_lead_farther_than_their_ends_while_form_is_decided():
    timesteps = step_timesteps(20)
    begin, end, reached = timesteps[:-1], timesteps[1:], torch.tensor(overshoots(timesteps, 0.5))
    far = (begin > 0) & (begin < CHURN_END)
    assert 5 < far.sum() < 15
    assert torch.equal(reached[~far], end[~far])
    assert torch.allclose((reached.logit() - begin.logit())[far], 1.5 * (end.logit() - begin.logit())[far], rtol=1e-4)
    assert torch.allclose(torch.tensor(overshoots(timesteps, 0)), end)


@pytest.mark.parametrize("churn", [0, 0.5, 1])
def test_with_and_without_fresh_noise_samples_are_distributed_as_the_data(churn):
    noise, classes = endless_noise(20_000, torch.Generator().manual_seed(0)), torch.zeros(20_000, dtype=torch.int64)
    samples = sample(best_prediction_of_normal_data, noise, classes, 1, steps=100, end=1, churn=churn)
    assert samples.mean() == pytest.approx(3, abs=0.02)
    assert samples.std() == pytest.approx(0.5, abs=0.02)


class Perceptron(nn.Module):
    """A small network for points in the plane."""

    def __init__(self, classes: int):
        super().__init__()
        self.embedding = nn.Embedding(classes + 1, 16)
        self.register_buffer("frequencies", torch.pi * torch.arange(1, 9))
        self.net = nn.Sequential(
            nn.Linear(2 + 16 + 16, 128),
            nn.SiLU(),
            nn.Linear(128, 128),
            nn.SiLU(),
            nn.Linear(128, 128),
            nn.SiLU(),
            nn.Linear(128, 2),
        )

    def forward(self, points: torch.Tensor, timesteps: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        angles = timesteps[:, None] * self.frequencies
        return self.net(torch.cat([points, angles.cos(), angles.sin(), self.embedding(classes)], dim=1))


@pytest.mark.slow
def test_on_two_gaussians_what_is_learned_lands_on_the_data_and_the_null_class_on_both():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    centres, deviation = torch.tensor([[2.0, 1.0], [-2.0, -1.0]]), 0.5
    model = Perceptron(2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2500)
    for _ in range(2500):
        classes = torch.randint(0, 2, (256,), generator=generator)
        data = centres[classes] + deviation * torch.randn(256, 2, generator=generator)
        noise, timesteps = torch.randn(256, 2, generator=generator), sample_timesteps(256, generator)
        told = torch.where(dropped_classes(256, 0.1, generator), 2, classes)
        loss = velocity_loss(model(point_on_path(noise, data, timesteps), timesteps, told), data, timesteps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    noise = endless_noise(2000, generator)
    for name in (0, 1):
        samples = sample(model, noise, torch.full((2000,), name), 2)
        assert torch.allclose(samples.mean(0), centres[name], atol=deviation / 2)
        away = (samples - centres[name]).norm(dim=1)
        assert (away < 3 * deviation).float().mean() > 0.97
        assert ((samples.std(0) > 0.6 * deviation) & (samples.std(0) < 1.2 * deviation)).all(), samples.std(0)
    pixels = (points.view(2000, 2, 1, 1) for points in noise)  # guidance is of images
    of_pixels = lambda points, *told: model(points.flatten(1), *told).view_as(points)  # noqa: E731
    without = sample(of_pixels, pixels, torch.full((2000,), 0), 2, guidance_scale=0).flatten(1)
    nearest = torch.cdist(without, centres)
    assert (nearest.min(1).values < 3 * deviation).float().mean() > 0.9
    assert 0.35 < (nearest.argmin(1) == 0).float().mean() < 0.65
