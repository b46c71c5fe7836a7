"""The measures of benchmarks/image_features.py, against what can be worked out by hand."""

import pytest
import torch

from image_features import ImageFeatures, coverage, kernel_distance, likeness


def test_the_kernel_distance_is_that_of_its_definition():
    first, second = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), torch.tensor([[2.0, 2.0], [0.0, 0.0]])

    def mean(pairs):
        values = [(float(x @ y) / 2 + 1) ** 3 for x, y in pairs]
        return sum(values) / len(values)

    others = mean([(x, y) for i, x in enumerate(first) for j, y in enumerate(first) if i != j])
    others += mean([(x, y) for i, x in enumerate(second) for j, y in enumerate(second) if i != j])
    expected = others - 2 * mean([(x, y) for x in first for y in second])
    assert kernel_distance(first, second) == pytest.approx(1000 * expected)


def test_sets_of_the_same_points_are_at_no_distance_in_the_mean_and_others_are():
    rng = torch.Generator().manual_seed(0)
    same = [kernel_distance(*torch.randn(2, 100, 16, generator=rng)) for _ in range(50)]
    assert min(same) < 0 < max(same), "without bias it is on both sides of zero"
    assert abs(sum(same) / len(same)) < 3 * torch.tensor(same).std() / 50**0.5
    assert kernel_distance(*(torch.randn(2, 100, 16, generator=rng) + torch.tensor([0.0, 0.5]).view(2, 1, 1))) > max(
        same
    )


def test_a_point_is_covered_within_the_reach_of_the_third_neighbour():
    by = torch.tensor([[0.0], [1.0], [2.0], [3.0], [100.0]])  # the reach of each: 3, 2, 2, 3, 99
    assert coverage(by, torch.tensor([[-2.9], [-3.1], [6.0], [0.9], [200.0]])) == pytest.approx(3 / 5)


def test_samples_that_are_all_alike_are_precise_and_recall_nothing():
    rng = torch.Generator().manual_seed(0)
    real = torch.randn(200, 8, generator=rng)
    alike = real[:1] + 1e-3 * torch.randn(200, 8, generator=rng)
    found = likeness(alike, real)
    assert found.precision == 1 and found.recall <= 0.01
    found = likeness(torch.randn(200, 8, generator=rng), real)
    assert found.precision > 0.5 and found.recall > 0.5


def test_the_network_sees_what_is_shown_and_not_only_its_colours():
    ramp = torch.linspace(-1, 1, 32).expand(3, 32, 32)
    images = torch.stack([ramp, ramp.flip(2), ramp.transpose(1, 2), ramp[:, :, torch.randperm(32)]])
    features = ImageFeatures()(images, 16)
    assert features.shape == (4, 1280)
    assert torch.pdist(features).min() > 1
