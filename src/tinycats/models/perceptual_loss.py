"""A perceptual loss (Zhang et al., arXiv 1801.03924) on the images that a generator predicts (Ma et al., arXiv
2602.02493): late in a run, they are to look as the true ones do to a network that was trained on ImageNet. The mean
of all images that a noisy one may have been is blurred; what that network sees of it is not (ADR-029). Near the image
they are to have its texture, too, wherever it is (after Heitz et al., arXiv 2006.07229).
"""

import numpy as np
import torch
from torch.nn.functional import normalize

from tinycats.models.efficientnet import efficientnet_lite, features_after, scaled_for_efficientnet
from tinycats.models.flow_matching import END

BEGINS = 0.8  # of a run's steps: it takes longer than the rest of a step, and a few steps learn it
FROM = 0.1  # of the path from noise to image: nearer to noise there is nothing to be seen
TEXTURE_FROM = 0.8  # of the path: before, images that have the right texture are led to by too much contrast
TEXTURE = 6.0  # what the difference of textures counts beside the unlikeness
AT_THE_END = 6  # images: of so many one is where sampling's last step begins, or a few in a hundred would be near it
SMALLEST_VARIANCE = 1.0  # of channels, where photos have 10 and more: an image of one colour has hardly any
SMALLEST = 128  # pixels, of an image as the network sees it: smaller ones are enlarged
BLOCKS = (0, 3, 6, 10)  # whose output is compared: the last at a half, a quarter, an eighth, and a 16th of its side


def some_at_the_end(timesteps: torch.Tensor, step: int) -> torch.Tensor:
    """Those of a batch, [B], but that of each `AT_THE_END`th image, of others in each step of a run, is `END`."""
    return torch.where((torch.arange(len(timesteps)) + step) % AT_THE_END == 0, END, timesteps)


class PerceptualLoss:
    """How unlike predicted images look to EfficientNet-Lite1, which is not the network that benchmarks/ judge by."""

    def __init__(self, device: torch.device | str = "cpu"):
        self._network = efficientnet_lite(1).to(device)

    def __call__(self, predicted: torch.Tensor, images: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """A scalar: the mean over a batch of `unlikeness`, which counts as 0 up to `FROM`, and of `texture_distance`,
        which counts `TEXTURE` times, and as 0 up to `TEXTURE_FROM`.

        Args:
            predicted: [B, 3, S, S] in [-1, 1], at `timesteps` [B] on the CPU, so that nobody waits for a GPU.
            images: the true ones.
        """
        batch = len(timesteps)
        late = int((timesteps > FROM).sum())
        if not late:
            return torch.zeros((), device=predicted.device)
        # A GPU looks for the fastest convolution again where their number is another, so it is one of a few.
        among_few = max(1, batch // 16)
        looked_at = timesteps.topk(min(batch, -(-late // among_few) * among_few)).indices
        counts = (timesteps[looked_at] > FROM).to(predicted.device, non_blocking=True)
        near = int((timesteps > TEXTURE_FROM).sum())  # the first of those that are looked at: the latest come first
        looked_at = looked_at.to(predicted.device, non_blocking=True)
        seen, targets = self.features(predicted[looked_at].float(), images[looked_at])
        value = (counts * unlikeness(seen, targets)).sum()
        if near:
            textures = texture_distance([some[:near] for some in seen], [some[:near] for some in targets])
            value = value + TEXTURE * textures.sum()
        return value / batch

    def features(self, predicted: torch.Tensor, images: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What the network sees of the one and of the other [B, 3, S, S]: float32 [B, C, h, w] after each of `BLOCKS`;
        no gradient leads to the true ones."""
        side = max(SMALLEST, images.shape[-1])
        with torch.no_grad():
            targets = features_after(self._network, scaled_for_efficientnet(images, side), BLOCKS)
        return features_after(self._network, scaled_for_efficientnet(predicted, side), BLOCKS), targets


def unlikeness(seen: list[torch.Tensor], targets: list[torch.Tensor]) -> torch.Tensor:
    """[B]: of features, scaled to the length 1 in each place, the squared distance, its mean over places and stages."""
    distances = [
        (normalize(some, dim=1) - normalize(others, dim=1)).square().sum(1).mean((1, 2))
        for some, others in zip(seen, targets, strict=True)
    ]
    return torch.stack(distances).mean(0)


def texture_distance(seen: list[torch.Tensor], targets: list[torch.Tensor]) -> torch.Tensor:
    """[B]: of features, how far each channel's values are from those of the same rank, wherever in the image they are:
    the squared Wasserstein-2 distance, as a part of the targets' variance, its mean over channels and stages."""
    distances = []
    for some, others in zip(seen, targets, strict=True):
        values, wanted = _sorted(some.flatten(2)), _sorted(others.flatten(2))
        variance = wanted.var(2).mean(1).clamp_min(SMALLEST_VARIANCE)
        distances.append((values - wanted).square().mean((1, 2)) / variance)
    return torch.stack(distances).mean(0)


def _sorted(values: torch.Tensor) -> torch.Tensor:
    """[B, C, N], each row by size. numpy takes a CPU an eighth of torch's time (ADR-029)."""
    if values.device.type != "cpu":
        return values.sort(2).values
    if not values.requires_grad:
        return torch.from_numpy(np.sort(values.numpy(), 2))
    return values.gather(2, torch.from_numpy(values.detach().numpy().argsort(2)))
