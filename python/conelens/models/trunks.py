"""Convolutional trunks of VGG-16 and AlexNet with torchvision's parameter names, no classifiers."""

from __future__ import annotations

from torch import Tensor, nn


class Trunk(nn.Module):
    """[N,3,H,W] float -> [N,C,h,w]: what stands before the classifier."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


def vgg16_features() -> Trunk:
    """The 13 convolutions of VGG-16 (Simonyan & Zisserman 2014, configuration D) and their five pools."""
    layers: list[nn.Module] = []
    channels = 3
    for block in ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)):
        for width in block:
            layers += [nn.Conv2d(channels, width, kernel_size=3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2, 2))
    return Trunk(layers)


def alexnet_features() -> Trunk:
    """The five convolutions of AlexNet in torchvision's one-tower widths, with overlapping 3x3/2 pools."""
    return Trunk(
        [
            nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, kernel_size=5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
        ]
    )
