"""Crops of the images that a generator learns from, of which it is told (Karras et al., arXiv 2206.00364, appendix F).

An image that is shown in many ways takes longer to be learned by heart. The model is told how an image was cropped, and
when it samples it is told that nothing was: crops do not leak into what is sampled. Where there are images enough they
only cost time (ADR-029).
"""

import torch
from torch.nn.functional import affine_grid, grid_sample

NUMBERS = 3  # that say how an image was cropped
PROBABILITY = 0.5  # of an image to be cropped, where that is worth it:
WORTH_CROPPING = 200  # times that a run shows an image
MOST = 0.3  # of an image's side that a crop leaves out


def probability(shown: float) -> float:
    """Of an image to be cropped, in a run that shows each so many times."""
    return PROBABILITY if shown > WORTH_CROPPING else 0.0


def sample_crops(count: int, probability: float, rng: torch.Generator) -> torch.Tensor:
    """float32 [count, 3]: how much of the side is left out, from 0 to 1, which is MOST, and how far the middle moves
    right and down, at most as far as that allows. Zeros leave an image as it is."""
    cropped = torch.rand(count, generator=rng) < probability
    left_out = torch.rand(count, generator=rng) * cropped
    right, down = 2 * torch.rand(2, count, generator=rng) - 1
    return torch.stack([left_out, left_out * right, left_out * down], dim=1)


def crop(images: torch.Tensor, crops: torch.Tensor) -> torch.Tensor:
    """What is left of float images [B, 3, S, S], as large as before, by `sample_crops`' numbers [B, 3]."""
    left_out, right, down = MOST * crops.T
    zero, scale = torch.zeros_like(left_out), 1 - left_out
    rows = torch.stack([scale, zero, right, zero, scale, down], dim=1)
    grid = affine_grid(rows.view(-1, 2, 3), list(images.shape), align_corners=False)
    resized = grid_sample(images, grid, align_corners=False, padding_mode="border")
    return torch.where((left_out > 0).view(-1, 1, 1, 1), resized, images)
