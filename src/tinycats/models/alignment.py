"""Representation alignment (Yu et al., arXiv 2410.06940): while a generator trains, its tokens learn to tell what a
network that was trained on ImageNet sees where they are. It learns form sooner (ADR-029)."""

from hashlib import blake2b

import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, cosine_similarity, layer_norm

from tinycats.models.dit import TinyDiT
from tinycats.models.efficientnet import efficientnet_lite, features_after, scaled_for_efficientnet

PART = 0.6  # of a run's steps: later, what the tokens are for is better left to the images
SIDE = 256  # pixels, of an image as the network sees it
STAGES = {14: 112, 20: 320}  # the blocks whose output is taken, at a 16th and at a 32nd of its side: their channels
CHANNELS = sum(STAGES.values())
MEMORY = 2**29  # bytes, for what was seen
WORTH_LOOKING = 12  # times that an image is shown


def part_looked_at(shown: float, number_of_images: int, side: int) -> float:
    """Of the images, in a run that shows each so many times, mirrored half of them, to `side**2` tokens: no more than
    are remembered, and so few that one is looked at for twelve that are shown."""
    remembered = MEMORY // (side**2 * CHANNELS * torch.bfloat16.itemsize)
    return min(1.0, remembered / (2 * number_of_images), shown / (2 * WORTH_LOOKING))


class WhatIsSeen:
    """What EfficientNet-Lite1 (not the network that benchmarks/ judge samples by) sees in images, place by place.

    Of an image this takes a CPU as long as training on it a few times. It is remembered.

    Args:
        side: places in a row, as of a model's tokens.
        part: of the images, that are looked at; which ones depends on their pixels alone, so that a run that is resumed
            looks at the same.
    """

    def __init__(self, side: int, part: float, device: torch.device | str = "cpu"):
        self._network = efficientnet_lite(1).to(device)
        self._side, self._part, self._device = side, part, device
        self._seen: dict[bytes, torch.Tensor] = {}

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [B, 3, S, S] on the CPU -> what is seen, bf16 [B, side**2, CHANNELS], row by row, and whether it is
        told, bool [B]; both on the device. Of each image each channel has a mean of 0 and a deviation of 1 over its
        places (Singh et al., arXiv 2512.10794): where things are, and not what there is in all of it, is what helps.
        """
        nothing = torch.zeros(self._side**2, CHANNELS, dtype=torch.bfloat16, device=self._device)
        few = images[:, :, ::4, ::4].contiguous().numpy()  # pixels, by which images are told apart
        keys = [blake2b(pixels.tobytes(), digest_size=8).digest() for pixels in few]
        told = [int.from_bytes(key) < self._part * 2**64 for key in keys]
        for key, image, is_told in zip(keys, images, told, strict=True):
            if is_told and key not in self._seen:
                self._seen[key] = self._look_at(image.to(self._device))
        seen = torch.stack([self._seen[key] if is_told else nothing for key, is_told in zip(keys, told, strict=True)])
        return seen, torch.tensor(told).to(self._device, non_blocking=True)

    @torch.no_grad()
    def _look_at(self, image: torch.Tensor) -> torch.Tensor:
        """One by one: what is seen in an image does not depend, in its last bits, on others beside it."""
        scaled = scaled_for_efficientnet(image[None] / 127.5 - 1, SIDE)
        stages = features_after(self._network, scaled, STAGES)
        pooled = [adaptive_avg_pool2d(stage, self._side).flatten(2) for stage in stages]
        return layer_norm(torch.cat(pooled, dim=1), [self._side**2])[0].mT.to(torch.bfloat16)


class Aligned(nn.Module):
    """TinyDiT as it is trained: what its tokens tell after a third of its blocks is asked, too."""

    def __init__(self, model: TinyDiT):
        super().__init__()
        dim = model.position.shape[1]
        self.model = model
        self.projector = nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, CHANNELS))

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As TinyDiT's -> images [B, 3, S, S], and what the tokens tell [B, N, CHANNELS]."""
        images, tokens = self.model.with_tokens(*inputs)
        return images, self.projector(tokens)


def misalignment(told: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """[B]: 1 - the cosine between what tokens tell and what is seen there, both [B, N, CHANNELS], the mean over the
    places and the stages that it is seen at."""
    stages = zip(told.float().split([*STAGES.values()], 2), seen.float().split([*STAGES.values()], 2), strict=True)
    return 1 - torch.stack([cosine_similarity(*stage, dim=2).mean(1) for stage in stages]).mean(0)
