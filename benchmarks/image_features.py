"""Whether images show what others show, as a network trained on ImageNet sees it: kernel distance, precision, recall.

The network is EfficientNet-Lite0 (Tan and Le, arXiv 1905.11946), whose weights come with a package; images of any size
are resized to the 224 pixels that it was trained on, and what it makes of one is its last 1,280 features, averaged over
their places.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import interpolate

from tinycats.models.efficientnet import efficientnet_lite, scaled_for_efficientnet

SIDE = 224  # pixels, that the network was trained on
NEIGHBOURS = 3  # as in arXiv 1904.06991


@dataclass(frozen=True)
class Likeness:
    """How two sets of images are alike.

    Attributes:
        kernel_distance: x 1000; 0 is the mean of sets that were drawn from the same images.
        precision: which part of the samples lies where real images lie.
        recall: which part of the real images lies where samples lie.
    """

    kernel_distance: float
    precision: float
    recall: float

    def __str__(self) -> str:
        return f"KID {self.kernel_distance:.1f}  precision {self.precision:.2f}  recall {self.recall:.2f}"


def likeness(samples: torch.Tensor, real: torch.Tensor) -> Likeness:
    """Of the features, float [N, D] and [M, D], of samples and of real images."""
    return Likeness(kernel_distance(samples, real), coverage(real, samples), coverage(samples, real))


def kernel_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """The squared maximum mean discrepancy of features [N, D] and [M, D] x 1000, with the kernel (x·y / D + 1)³ and
    without bias (Bińkowski et al., arXiv 1801.01401)."""
    first, second = first.double(), second.double()

    def kernel(some: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        return (some @ others.T / some.shape[1] + 1) ** 3

    def among(some: torch.Tensor) -> float:
        every = kernel(some, some)
        return ((every.sum() - every.trace()) / (len(some) * (len(some) - 1))).item()

    return 1000 * (among(first) + among(second) - 2 * kernel(first, second).mean().item())


def coverage(by: torch.Tensor, of: torch.Tensor) -> float:
    """Which part of the features `of` [M, D] is no farther from one of the features `by` [N, D] than the third nearest
    of the others is from that one (Kynkäänniemi et al., arXiv 1904.06991)."""
    radii = torch.cdist(by, by).kthvalue(NEIGHBOURS + 1, dim=1).values  # the nearest is the point itself
    return (torch.cdist(of, by) <= radii).any(dim=1).float().mean().item()


class ImageFeatures:
    """What the network makes of images."""

    def __init__(self) -> None:
        self._network = efficientnet_lite(0)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, side: int) -> torch.Tensor:
        """float [B, 3, S, S] in [-1, 1], seen at `side` pixels, which divide S -> float [B, 1280]."""
        parts = []
        for part in images.split(50):
            seen = interpolate(part.clamp(-1, 1), side, mode="area")
            parts.append(self._network.extract_features(scaled_for_efficientnet(seen, SIDE)).mean(dim=(2, 3)))
        return torch.cat(parts)
