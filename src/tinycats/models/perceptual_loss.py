"""A perceptual loss (Zhang et al., arXiv 1801.03924) on the images that a generator predicts (Ma et al., arXiv
2602.02493): late in a run, they are to look as the true ones do to a network that was trained on ImageNet. The mean
of all images that a noisy one may have been is blurred; what that network sees of it is not (ADR-029).
"""

import torch
from torch.nn.functional import normalize

from tinycats.models.efficientnet import efficientnet_lite, features_after, scaled_for_efficientnet

BEGINS = 0.8  # of a run's steps: it takes longer than the rest of a step, and a few steps learn it
FROM = 0.1  # of the path from noise to image: nearer to noise there is nothing to be seen
SMALLEST = 128  # pixels, of an image as the network sees it: smaller ones are enlarged
BLOCKS = (0, 3, 6, 10)  # whose output is compared: the last at a half, a quarter, an eighth, and a 16th of its side


class PerceptualLoss:
    """How unlike predicted images look to EfficientNet-Lite1, which is not the network that benchmarks/ judge by."""

    def __init__(self, device: torch.device | str = "cpu"):
        self._network = efficientnet_lite(1).to(device)

    def __call__(self, predicted: torch.Tensor, images: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """A scalar: the mean over a batch of `unlikeness`, which counts as 0 up to `FROM`.

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
        looked_at = looked_at.to(predicted.device, non_blocking=True)
        return (counts * self.unlikeness(predicted[looked_at].float(), images[looked_at])).sum() / batch

    def unlikeness(self, predicted: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """[B]: of what is seen of two images [B, 3, S, S], scaled to the length 1 in each place, the squared distance,
        its mean over the places and `BLOCKS`."""
        side = max(SMALLEST, images.shape[-1])
        with torch.no_grad():
            targets = features_after(self._network, scaled_for_efficientnet(images, side), BLOCKS)
        seen = features_after(self._network, scaled_for_efficientnet(predicted, side), BLOCKS)
        distances = [
            (normalize(some, dim=1) - normalize(others, dim=1)).square().sum(1).mean((1, 2))
            for some, others in zip(seen, targets, strict=True)
        ]
        return torch.stack(distances).mean(0)
