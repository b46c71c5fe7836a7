"""The crops that a generator is told of."""

import pytest
import torch

from tinycats.models.crops import MOST, crop, probability, sample_crops


def ramps(side: int) -> torch.Tensor:
    """[1, 3, S, S]: where a pixel lies, from -1 (left) to 1, from -1 (top) to 1, and nothing."""
    places = (torch.arange(side) + 0.5) / side * 2 - 1
    down, right = torch.meshgrid(places, places, indexing="ij")
    return torch.stack([right, down, 0 * down])[None]


def test_zeros_leave_an_image_exactly_as_it_is():
    images = torch.randn(3, 3, 17, 17)
    assert torch.equal(crop(images, torch.zeros(3, 3)), images)


@pytest.mark.parametrize("numbers", [(1.0, 0.0, 0.0), (1.0, 1.0, -1.0), (0.5, -0.2, 0.4)])
def test_what_is_left_is_as_large_and_lies_where_the_numbers_say(numbers):
    whole = ramps(32)
    left_out, right, down = (MOST * number for number in numbers)
    cropped = crop(whole, torch.tensor([numbers]))
    expected = (1 - left_out) * whole + torch.tensor([right, down, 0.0]).view(1, 3, 1, 1)
    inside = slice(1, -1)  # a ramp ends at the border
    assert torch.allclose(cropped[..., inside, inside], expected[..., inside, inside], atol=1e-5)
    assert cropped.amax() <= 1 and cropped.amin() >= -1


def test_crops_stay_within_the_image_and_as_many_as_promised_are_none():
    crops = sample_crops(10_000, 0.4, torch.Generator().manual_seed(0))
    left_out, right, down = crops.T
    assert (left_out == 0).float().mean().item() == pytest.approx(0.6, abs=0.02)
    assert 0.95 < left_out.max() <= 1
    assert (right.abs() <= left_out).all() and (down.abs() <= left_out).all()
    assert abs(right.mean()) < 0.01 and abs(down.mean()) < 0.01
    assert torch.equal(crops, sample_crops(10_000, 0.4, torch.Generator().manual_seed(0)))


def test_images_that_are_shown_a_few_times_are_shown_whole():
    assert probability(shown=100) == 0 < probability(shown=1000)
    assert not sample_crops(100, 0.0, torch.Generator().manual_seed(0)).any()
