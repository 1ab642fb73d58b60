"""The five networks whose occlusion limits are known, as plain modules with random weights: VGG-16, AlexNet, ZFNet, ResNets."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _convolutions(layers: list[tuple[int, ...] | str]) -> nn.Sequential:
    """(in, out, kernel, stride, padding) convolutions with ReLU, (kernel, stride, padding) pools."""
    modules: list[nn.Module] = []
    for layer in layers:
        if len(layer) == 3:
            modules.append(nn.MaxPool2d(*layer))
        else:
            modules += [nn.Conv2d(*layer), nn.ReLU(inplace=True)]
    return nn.Sequential(*modules)


def _classifier(cells: int) -> list[nn.Module]:
    return [
        nn.Flatten(), nn.Linear(cells, 4096), nn.ReLU(inplace=True), nn.Linear(4096, 4096), nn.ReLU(inplace=True),
        nn.Linear(4096, 1000),
    ]  # fmt: skip


def vgg16() -> nn.Module:
    layers: list[tuple[int, ...] | str] = []
    channels = 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers.append((channels, width, 3, 1, 1))
            channels = width
        layers.append((2, 2, 0))
    return nn.Sequential(_convolutions(layers), *_classifier(512 * 7 * 7))


def alexnet() -> nn.Module:
    """torchvision's."""
    features = _convolutions([
        (3, 64, 11, 4, 2), (3, 2, 0), (64, 192, 5, 1, 2), (3, 2, 0), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1),
        (256, 256, 3, 1, 1), (3, 2, 0),
    ])  # fmt: skip
    return nn.Sequential(features, *_classifier(256 * 6 * 6))


def zfnet() -> nn.Module:
    """Zeiler & Fergus 2014, Fig. 3: 110, 55, 26, 13, 13, 13, 6."""
    features = _convolutions([
        (3, 96, 7, 2, 1), (3, 2, 1), (96, 256, 5, 2, 0), (3, 2, 1), (256, 384, 3, 1, 1), (384, 384, 3, 1, 1),
        (384, 256, 3, 1, 1), (3, 2, 0),
    ])  # fmt: skip
    return nn.Sequential(features, *_classifier(256 * 6 * 6))


class _Block(nn.Module):
    """Basic (two 3x3) or bottleneck (1x1, 3x3, 1x1) residual block with batch norm; the 3x3 carries the stride."""

    def __init__(self, channels: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        out = width * 4 if bottleneck else width
        shape = [(channels, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)]
        if not bottleneck:
            shape = [(channels, width, 3, stride), (width, width, 3, 1)]
        layers: list[nn.Module] = []
        for inner, outer, kernel, step in shape:
            layers += [
                nn.Conv2d(inner, outer, kernel, step, kernel // 2, bias=False),
                nn.BatchNorm2d(outer),
                nn.ReLU(inplace=True),
            ]
        self.body = nn.Sequential(*layers[:-1])
        same = stride == 1 and channels == out
        self.down = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.down(x))


def _resnet(blocks: tuple[int, ...], bottleneck: bool) -> nn.Module:
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
    ]  # fmt: skip
    channels = 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        for index in range(count):
            layers.append(_Block(channels, width, 2 if stage and not index else 1, bottleneck))
            channels = width * 4 if bottleneck else width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


def resnet18() -> nn.Module:
    return _resnet((2, 2, 2, 2), bottleneck=False)


def resnet50() -> nn.Module:
    return _resnet((3, 4, 6, 3), bottleneck=True)


NETWORKS = {"VGG-16": vgg16, "AlexNet": alexnet, "ZFNet": zfnet, "ResNet-18": resnet18, "ResNet-50": resnet50}


def build(name: str, seed: int = 0) -> nn.Module:
    """One of NETWORKS in evaluation mode: He's weights, and batch norms as after training on something."""
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 0.6)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
    return model.eval()
