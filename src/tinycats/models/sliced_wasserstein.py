"""The distance of samples from real images, without any network: the sliced Wasserstein distance between
their small patches, at each scale of a Laplacian pyramid (Karras et al., arXiv 1710.10196, section 5)."""

import numpy as np
import torch
from torch.nn.functional import conv2d, pad

SMALLEST_SIDE = 16  # pixels: the coarsest level of a pyramid
NEIGHBOURHOOD = 7  # pixels: the side of a patch
PATCHES_PER_IMAGE = 128
DIRECTIONS = 512

# What a pyramid is blurred with: 1 4 6 4 1 in both directions (Burt and Adelson, 1983).
_BLUR = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16


def sliced_wasserstein(first: torch.Tensor, second: torch.Tensor, generator: torch.Generator) -> float:
    """The Wasserstein-1 distance of two sets of points, both float [N, D], on the average of `DIRECTIONS` random
    lines through the space.

    Points that are moved by a vector v are at a distance of |v| times the mean of |cos(angle to v)|.

    Raises:
        ValueError: the sets differ in shape, or are empty.
    """
    if first.shape != second.shape or not len(first):
        raise ValueError(f"two sets of as many points are compared, not {[*first.shape]} and {[*second.shape]}")
    directions = torch.randn(first.shape[1], DIRECTIONS, generator=generator)
    directions /= directions.norm(dim=0)
    # On a line, the cheapest way to move one set to the other keeps the points' order.
    return float(np.abs(_sorted(directions.T @ first.T) - _sorted(directions.T @ second.T)).mean())


def _sorted(rows: torch.Tensor) -> np.ndarray:
    return np.sort(rows.numpy(), axis=1)  # much faster than torch's


def _blur(images: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
    channels, reach = images.shape[1], len(_BLUR) // 2
    kernel = (gain * torch.outer(_BLUR, _BLUR)).expand(channels, 1, -1, -1)
    return conv2d(pad(images, [reach] * 4, mode="reflect"), kernel, groups=channels)


def _halve(images: torch.Tensor) -> torch.Tensor:
    return _blur(images)[:, :, ::2, ::2]


def _double(images: torch.Tensor) -> torch.Tensor:
    batch, channels, height, width = images.shape
    spread = images.new_zeros(batch, channels, 2 * height, 2 * width)
    spread[:, :, ::2, ::2] = images
    return _blur(spread, gain=4)  # three of four pixels are zero


def laplacian_pyramid(images: torch.Tensor) -> list[torch.Tensor]:
    """float [B, C, S, S] -> what is seen at S pixels and no longer at S / 2, at S / 2 and no longer at S / 4, and
    so on; the last level is the image at 16 pixels (or at the first odd size) itself."""
    levels = [images]
    while levels[-1].shape[-1] % 2 == 0 and levels[-1].shape[-1] > SMALLEST_SIDE:
        smaller = _halve(levels[-1])
        levels[-1] = levels[-1] - _double(smaller)
        levels.append(smaller)
    return levels


def _patches(level: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """[B, C, H, W] -> [B * PATCHES_PER_IMAGE, C * 7 * 7]: random patches, each channel of them standardized."""
    batch, _, height, width = level.shape
    count = batch * PATCHES_PER_IMAGE
    image = torch.arange(batch).repeat_interleave(PATCHES_PER_IMAGE)
    top = torch.randint(height - NEIGHBOURHOOD + 1, (count,), generator=generator)
    left = torch.randint(width - NEIGHBOURHOOD + 1, (count,), generator=generator)
    windows = level.unfold(2, NEIGHBOURHOOD, 1).unfold(3, NEIGHBOURHOOD, 1)  # [B, C, y, x, 7, 7], not copied
    patches = windows[image, :, top, left]
    patches = patches - patches.mean(dim=(0, 2, 3), keepdim=True)
    return (patches / patches.std(dim=(0, 2, 3), keepdim=True).clamp_min(1e-6)).flatten(1)


def pyramid_distances(first: torch.Tensor, second: torch.Tensor, seed: int = 0) -> dict[int, float]:
    """The sliced Wasserstein distance, times 1000, of two sets of images at each level of their pyramids.

    As in the paper's code each set's patches are standardized by their own mean and deviation: what is compared
    is structure, not brightness or contrast.

    Args:
        first, second: [B, C, S, S], any range; as many images in both, of at least 8 pixels.

    Returns:
        The side of each level, in pixels, to the distance there; fine detail first.

    Raises:
        ValueError: the sets differ in shape, or are empty.
    """
    if first.shape != second.shape or not len(first):
        raise ValueError(f"two sets of as many images are compared, not {[*first.shape]} and {[*second.shape]}")
    generator = torch.Generator().manual_seed(seed)
    return {
        one.shape[-1]: 1000 * sliced_wasserstein(_patches(one, generator), _patches(other, generator), generator)
        for one, other in zip(laplacian_pyramid(first.float()), laplacian_pyramid(second.float()), strict=True)
    }
