"""How unlike images look: which differences count, and of which images of a batch they are asked."""

import pytest
import torch
from torch.nn.functional import avg_pool2d

from tinycats import generator
from tinycats.images.datasets import open_dataset
from tinycats.images.frames import Frame
from tinycats.models.efficientnet import features_after, scaled_for_efficientnet
from tinycats.models.perceptual_loss import BLOCKS, FROM, PerceptualLoss

EARLY, LATE = FROM - 0.01, FROM + 0.01


@pytest.fixture(scope="module")
def loss() -> PerceptualLoss:
    return PerceptualLoss()


@pytest.fixture(scope="module")
def images(small_toy, tmp_path_factory) -> torch.Tensor:
    dataset = open_dataset(small_toy, Frame(32, square=True), tmp_path_factory.mktemp("packed"))
    return generator.to_unit(torch.from_numpy(dataset.batch(range(20))).permute(0, 3, 1, 2))


def test_a_blurred_image_looks_unlike_more_than_one_that_is_as_wrong_and_sharp(loss, images):
    blurred = avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    shade = (blurred - images).square().mean((1, 2, 3), keepdim=True).sqrt()
    sharp = images - shade * images.mean((1, 2, 3), keepdim=True).sign()  # as far away, and only lighter or darker
    same, to_blurred, to_sharp = (loss.unlikeness(other, images) for other in (images, blurred, sharp))
    assert (same == 0).all()
    assert (to_blurred > 0.05).all()
    assert (to_blurred < 2).all(), "whatever the network makes of an image has the length 1"
    assert to_blurred.mean() > 2 * to_sharp.mean()


def test_what_is_seen_at_a_half_a_quarter_an_eighth_and_a_16th_counts_alike(loss, monkeypatch):
    """Seen to fail with the last one alone."""
    sides = [features.shape[-1] for features in features_after(loss._network, torch.zeros(1, 3, 128, 128), BLOCKS)]
    assert sides == [64, 32, 16, 8]
    for stage in range(4):
        targets = [torch.eye(2)[:1, :, None, None].expand(1, 2, 3, 3)] * 4
        seen = [*targets[:stage], targets[stage].flip(1), *targets[stage + 1 :]]  # √2 away from it
        stages = iter([targets, seen])
        monkeypatch.setattr("tinycats.models.perceptual_loss.features_after", lambda *_, stages=stages: next(stages))
        assert loss.unlikeness(*torch.zeros(2, 1, 3, 8, 8)).item() == pytest.approx(2 / 4)


@pytest.mark.parametrize(("side", "seen_at"), [(32, 128), (64, 128), (160, 160)])
def test_small_images_are_enlarged(loss, monkeypatch, side, seen_at):
    sides = []

    def scaled(images, side):
        sides.append(side)
        return scaled_for_efficientnet(images, side)

    monkeypatch.setattr("tinycats.models.perceptual_loss.scaled_for_efficientnet", scaled)
    loss.unlikeness(torch.zeros(1, 3, side, side), torch.ones(1, 3, side, side))
    assert sides == [seen_at, seen_at]


def test_it_is_asked_of_images_that_are_late_on_the_path_alone(loss, images):
    predicted = (images * 0.5).requires_grad_()
    timesteps = torch.full((20,), EARLY)
    timesteps[[3, 7, 12]] = LATE  # three: a number of which a batch of 20 looks at no more than that
    value = loss(predicted, images, timesteps)
    value.backward()
    reached = predicted.grad.abs().sum((1, 2, 3)) > 0
    assert reached.nonzero().flatten().tolist() == [3, 7, 12]
    apart = loss.unlikeness(predicted[[3, 7, 12]].detach(), images[[3, 7, 12]])
    assert value.item() == pytest.approx(apart.sum().item() / 20, rel=1e-5)
    assert loss(predicted, images, torch.full((20,), EARLY)) == 0


def test_in_a_large_batch_numbers_of_images_are_few_and_those_beyond_do_not_count(loss, monkeypatch):
    looked_at = []
    monkeypatch.setattr(loss, "unlikeness", lambda predicted, images: looked_at.append(predicted) or predicted[:, 0])
    predicted = torch.arange(1.0, 65)[:, None]
    for late in (9, 10, 12):
        timesteps = torch.full((64,), EARLY)
        timesteps[:late] = LATE
        assert loss(predicted, predicted, timesteps) == pytest.approx(sum(range(1, late + 1)) / 64)
    assert [len(images) for images in looked_at] == [12, 12, 12]
    assert loss(predicted, predicted, torch.full((64,), LATE)) == pytest.approx(sum(range(1, 65)) / 64)


def test_an_image_comes_to_look_like_another(loss, images):
    predicted = avg_pool2d(images[:2], 5, 1, 2, count_include_pad=False).requires_grad_()
    optimizer = torch.optim.Adam([predicted], lr=0.02)
    values = []
    for _ in range(30):
        values.append(loss.unlikeness(predicted, images[:2]).mean())
        optimizer.zero_grad()
        values[-1].backward()
        optimizer.step()
    assert values[-1] < 0.6 * values[0]
