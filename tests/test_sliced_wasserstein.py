"""The distance between sets of images, on sets whose distance is known."""

import math

import pytest
import torch
from torch.nn.functional import interpolate

from tinycats.models.sliced_wasserstein import laplacian_pyramid, pyramid_distances, sliced_wasserstein


def random_numbers(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed):
    return torch.randn(*shape, generator=random_numbers(seed))


@pytest.mark.parametrize("dimensions", [1, 3, 147])
def test_a_shifted_set_is_as_far_as_the_mean_of_its_projections(dimensions):
    points = normal(500, dimensions, seed=0)
    shift = normal(dimensions, seed=1)
    # E|cos| of the angle between a fixed and a random direction
    mean_cosine = math.exp(math.lgamma(dimensions / 2) - math.lgamma((dimensions + 1) / 2)) / math.sqrt(math.pi)
    distance = sliced_wasserstein(points, points + shift, random_numbers(2))
    assert distance == pytest.approx(shift.norm().item() * mean_cosine, rel=0.1 if dimensions > 1 else 1e-5)


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_normal_distributions_differ_by_their_deviations(scale):
    """W1 of N(0, 1) and N(0, s^2) is |s - 1| E|N(0, 1)|."""
    first, second = normal(20_000, 4, seed=0), scale * normal(20_000, 4, seed=1)
    distance = sliced_wasserstein(first, second, random_numbers(2))
    assert distance == pytest.approx(abs(scale - 1) * math.sqrt(2 / math.pi), abs=0.02)


def test_the_order_of_the_points_does_not_matter():
    points = normal(500, 5, seed=0)
    shuffled = points[torch.randperm(500, generator=random_numbers(1))]
    assert sliced_wasserstein(points, shuffled, random_numbers(2)) == pytest.approx(0, abs=1e-6)


def test_sets_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="as many"):
        sliced_wasserstein(torch.zeros(2, 3), torch.zeros(3, 3), random_numbers(0))
    with pytest.raises(ValueError, match="as many"):
        pyramid_distances(torch.zeros(0, 3, 32, 32), torch.zeros(0, 3, 32, 32))


def test_a_pyramid_separates_the_scales():
    """A constant lives in the coarsest level alone, a checkerboard in the finest; their sum is the image."""
    flat = torch.full((1, 3, 64, 64), 7.0)
    fine, middle, coarse = laplacian_pyramid(flat)
    assert [level.shape[-1] for level in (fine, middle, coarse)] == [64, 32, 16]
    for level, expected in ((fine, 0.0), (middle, 0.0), (coarse, 7.0)):
        torch.testing.assert_close(level, torch.full_like(level, expected), atol=1e-5, rtol=0)

    checkers = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 2.0 - 1
    fine, middle, coarse = laplacian_pyramid(checkers.expand(1, 3, 64, 64))
    torch.testing.assert_close(fine, checkers.expand(1, 3, 64, 64), atol=1e-5, rtol=0)
    assert middle.abs().max() < 1e-5 and coarse.abs().max() < 1e-5


@pytest.mark.slow
def test_grain_is_seen_in_the_detail_and_not_in_the_large():
    def clouds(seed):
        return interpolate(torch.rand(200, 3, 8, 8, generator=random_numbers(seed)), 64, mode="bicubic")

    same = pyramid_distances(clouds(0), clouds(1))
    grainy = pyramid_distances(clouds(0), clouds(1) + 0.05 * normal(200, 3, 64, 64, seed=2))
    assert list(same) == [64, 32, 16]
    assert grainy[64] > 5 * same[64]
    assert grainy[16] < 1.5 * same[16]


def test_the_same_seed_measures_the_same():
    first, second = (torch.rand(4, 3, 32, 32, generator=random_numbers(seed)) for seed in (0, 1))
    assert pyramid_distances(first, second) == pyramid_distances(first, second)
