"""How unlike images look, and their textures: which differences count, and of which images of a batch."""

import pytest
import torch
from torch.nn.functional import avg_pool2d

from tinycats import generator
from tinycats.images.datasets import open_dataset
from tinycats.images.frames import Frame
from tinycats.models.efficientnet import features_after, scaled_for_efficientnet
from tinycats.models.flow_matching import END
from tinycats.models.perceptual_loss import (
    AT_THE_END,
    BLOCKS,
    FROM,
    TEXTURE,
    TEXTURE_FROM,
    PerceptualLoss,
    some_at_the_end,
    texture_distance,
    unlikeness,
)

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
    same, to_blurred, to_sharp = (unlikeness(*loss.features(other, images)) for other in (images, blurred, sharp))
    assert (same == 0).all()
    assert (to_blurred > 0.05).all()
    assert (to_blurred < 2).all(), "whatever the network makes of an image has the length 1"
    assert to_blurred.mean() > 2 * to_sharp.mean()


def test_what_is_seen_at_a_half_a_quarter_an_eighth_and_a_16th_counts_alike(loss):
    """Seen to fail with the last one alone."""
    sides = [features.shape[-1] for features in features_after(loss._network, torch.zeros(1, 3, 128, 128), BLOCKS)]
    assert sides == [64, 32, 16, 8]
    for stage in range(4):
        targets = [torch.eye(2)[:1, :, None, None].expand(1, 2, 3, 3)] * 4
        seen = [*targets[:stage], targets[stage].flip(1), *targets[stage + 1 :]]  # √2 away from it
        assert unlikeness(seen, targets).item() == pytest.approx(2 / 4)
        targets = [torch.arange(18.0).view(1, 2, 3, 3)] * 4
        seen = [*targets[:stage], targets[stage] + 3, *targets[stage + 1 :]]
        assert texture_distance(seen, targets).item() == pytest.approx(9 / 7.5 / 4)


def test_a_texture_is_the_same_wherever_in_an_image_it_is(loss, images):
    targets = [torch.randn(3, 5, 8, 8)]
    elsewhere = [targets[0].flatten(2)[:, :, torch.randperm(64)].view(3, 5, 8, 8)]
    assert (texture_distance(elsewhere, targets) == 0).all()
    assert (unlikeness(elsewhere, targets) > 1).all()
    blurred = avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    moved = images.roll(1, 3)  # as unlike, in each place
    apart = {name: loss.features(other, images) for name, other in (("blurred", blurred), ("moved", moved))}
    assert texture_distance(*apart["blurred"]).mean() > 3 * texture_distance(*apart["moved"]).mean()
    assert unlikeness(*apart["blurred"]).mean() < 2 * unlikeness(*apart["moved"]).mean()


def test_textures_gradient_leads_each_value_to_that_of_its_rank():
    targets = torch.tensor([[[[10.0, 20], [30, 40]]]])
    seen = torch.tensor([[[[41.0, 19], [33, 10]]]], requires_grad=True)
    texture_distance([seen], [targets]).sum().backward()
    away = torch.tensor([[[[1.0, -1], [3, 0]]]])
    assert torch.allclose(seen.grad, 2 * away / 4 / targets.var())


def test_where_all_values_are_one_a_texture_is_not_infinitely_far():
    one_value = [torch.zeros(1, 2, 4, 4)]
    assert texture_distance([torch.ones(1, 2, 4, 4)], one_value) == 1
    assert texture_distance(one_value, one_value) == 0


def test_some_of_each_batch_are_at_the_end_others_in_each_step():
    timesteps = torch.linspace(0.1, 0.4, 2 * AT_THE_END)
    times = torch.zeros(2 * AT_THE_END)
    for step in range(AT_THE_END):
        moved = some_at_the_end(timesteps, step)
        at_the_end = moved == torch.tensor(END)
        assert at_the_end.sum() == 2
        assert torch.equal(moved[~at_the_end], timesteps[~at_the_end])
        assert moved.dtype == timesteps.dtype
        times += at_the_end
    assert (times == 1).all()
    assert sum((some_at_the_end(torch.zeros(1), step) > 0).item() for step in range(60)) == 60 / AT_THE_END


@pytest.mark.parametrize(("side", "seen_at"), [(32, 128), (64, 128), (160, 160)])
def test_small_images_are_enlarged(loss, monkeypatch, side, seen_at):
    sides = []

    def scaled(images, side):
        sides.append(side)
        return scaled_for_efficientnet(images, side)

    monkeypatch.setattr("tinycats.models.perceptual_loss.scaled_for_efficientnet", scaled)
    loss.features(torch.zeros(1, 3, side, side), torch.ones(1, 3, side, side))
    assert sides == [seen_at, seen_at]


def test_it_is_asked_of_images_that_are_late_on_the_path_alone(loss, images):
    predicted = (images * 0.5).requires_grad_()
    timesteps = torch.full((20,), EARLY)
    timesteps[[3, 7, 12]] = LATE  # three: a number of which a batch of 20 looks at no more than that
    value = loss(predicted, images, timesteps)
    value.backward()
    reached = predicted.grad.abs().sum((1, 2, 3)) > 0
    assert reached.nonzero().flatten().tolist() == [3, 7, 12]
    apart = unlikeness(*loss.features(predicted[[3, 7, 12]].detach(), images[[3, 7, 12]]))
    assert value.item() == pytest.approx(apart.sum().item() / 20, rel=1e-5)
    assert loss(predicted, images, torch.full((20,), EARLY)) == 0


def test_textures_are_asked_of_images_near_the_end_of_the_path_alone(loss, images):
    predicted = images * 0.5
    timesteps = torch.full((20,), TEXTURE_FROM)
    before = loss(predicted, images, timesteps)
    timesteps[[2, 9]] += 0.01
    textures = texture_distance(*loss.features(predicted[[2, 9]], images[[2, 9]]))
    assert (textures > 0.05).all()
    assert (loss(predicted, images, timesteps) - before).item() == pytest.approx(
        TEXTURE * textures.sum().item() / 20, rel=1e-3
    )


def test_in_a_large_batch_numbers_of_images_are_few_and_those_beyond_do_not_count(loss, monkeypatch):
    looked_at = []
    monkeypatch.setattr(loss, "features", lambda predicted, images: looked_at.append(predicted) or (predicted, images))
    monkeypatch.setattr("tinycats.models.perceptual_loss.unlikeness", lambda seen, targets: seen[:, 0])
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
        values.append(unlikeness(*loss.features(predicted, images[:2])).mean())
        optimizer.zero_grad()
        values[-1].backward()
        optimizer.step()
    assert values[-1] < 0.6 * values[0]
