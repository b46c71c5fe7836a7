"""A ResNet for small images, as the paper has it for CIFAR; those for ImageNet are torchvision's."""

from collections import OrderedDict

from torch import nn
from torchvision.models.resnet import BasicBlock, conv1x1, conv3x3

WIDTHS = (16, 32, 64)  # channels of the stages, each with half of the side of the one before
BLOCKS = 3  # of a stage


def resnet20(num_classes: int) -> nn.Module:
    """ResNet-20 (He et al., arXiv 1512.03385, section 4.2): float [B, 3, H, W] -> logits [B, num_classes].

    It has 0.27 million parameters, and its first convolution keeps the side: of 32 pixels 8 are left at the end, where
    ResNet-18, of forty times as many, has one. Shortcuts that change the width are convolutions (the paper's option B).
    """
    layers = OrderedDict(conv1=conv3x3(3, WIDTHS[0]), bn1=nn.BatchNorm2d(WIDTHS[0]), relu=nn.ReLU(inplace=True))
    before = WIDTHS[0]
    for number, width in enumerate(WIDTHS, 1):
        shortcut = None
        if width != before:
            shortcut = nn.Sequential(conv1x1(before, width, stride=2), nn.BatchNorm2d(width))
        first = BasicBlock(before, width, stride=1 if shortcut is None else 2, downsample=shortcut)
        layers[f"layer{number}"] = nn.Sequential(first, *[BasicBlock(width, width) for _ in range(BLOCKS - 1)])
        before = width
    model = nn.Sequential(
        layers | OrderedDict(avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(before, num_classes))
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
