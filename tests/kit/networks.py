"""The kinds of network that a deconvnet has to get right, small, with live random weights; the layer to
project is named ``last``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Chain(nn.Sequential):
    """Layers in a row; the last convolution is called ``last``, and whatever follows it does not matter."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        for index, layer in enumerate(layers[:-1]):
            self.add_module(str(index), layer)
        self.add_module("last", layers[-1])


class BasicBlock(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.down is None else self.down(x)
        return self.relu(y)


class Inception(nn.Module):
    """GoogLeNet's block, with functional ReLUs."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.three_a, self.three_b = (
            nn.Conv2d(channels, 4, 1),
            nn.Conv2d(channels, 4, 1),
            nn.Conv2d(4, 6, 3, padding=1),
        )
        self.five_a, self.five_b, self.pooled = (
            nn.Conv2d(channels, 2, 1),
            nn.Conv2d(2, 4, 5, padding=2),
            nn.Conv2d(channels, 4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        three = F.relu(self.three_b(F.relu(self.three_a(x))))
        five = F.relu(self.five_b(F.relu(self.five_a(x), inplace=True)), inplace=True)
        return torch.cat(
            [F.relu(self.one(x)), three, five, F.relu(self.pooled(F.max_pool2d(x, 3, 1, 1, ceil_mode=True)))],
            1,
        )


class DenseLayer(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm, self.relu, self.conv = (
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, growth, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(self.relu(self.norm(x)))], 1)


class ShuffleUnit(nn.Module):
    """ShuffleNet V2: half of the channels pass, the halves are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(inplace=True),
            nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False),
            nn.BatchNorm2d(half), nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, 1)
        joined = torch.cat([kept, self.branch(changed)], 1)
        n, c, h, w = joined.shape
        return joined.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def relu() -> nn.Module:
    return nn.ReLU(inplace=True)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "VGG": lambda: Chain(
        nn.Conv2d(3, 8, 3, padding=1), relu(), nn.Conv2d(8, 8, 3, padding=1), relu(), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1), relu(),
        nn.Conv2d(12, 12, 3, padding=1), relu(), nn.MaxPool2d(2), nn.Conv2d(12, 16, 3, padding=1), relu(),
        nn.Conv2d(16, 16, 3, padding=1),
    ),
    "AlexNet, overlapping 3/2": lambda: Chain(
        nn.Conv2d(3, 12, 7, 2, 2), relu(), nn.MaxPool2d(3, 2), nn.Conv2d(12, 16, 5, padding=2), relu(),
        nn.MaxPool2d(3, 2), nn.Conv2d(16, 16, 3, padding=1),
        relu(), nn.Conv2d(16, 12, 3, padding=1),
    ),
    "ZFNet, ceil and LRN": lambda: Chain(
        nn.Conv2d(3, 12, 5, 2, 1), relu(), nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.LocalResponseNorm(5, 5e-4, 0.75, 2.0), nn.Conv2d(12, 16, 3, 2), relu(),
        nn.MaxPool2d(3, 2, ceil_mode=True), nn.LocalResponseNorm(5, 5e-4, 0.75, 2.0),
        nn.Conv2d(16, 16, 3, padding=1), relu(), nn.Conv2d(16, 8, 3, padding=1),
    ),
    "ResNet": lambda: Chain(
        nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), relu(), nn.MaxPool2d(3, 2, 1),
        BasicBlock(8, 8, 1), BasicBlock(8, 12, 2),
        nn.Conv2d(12, 12, 3, padding=1),
    ),
    "groups, depthwise, dilation": lambda: Chain(
        nn.Conv2d(3, 12, 3, padding=1), relu(), nn.Conv2d(12, 12, 3, 2, 1, groups=12), nn.BatchNorm2d(12),
        relu(), nn.Conv2d(12, 16, 3, padding=2, dilation=2, groups=4),
        relu(), nn.Conv2d(16, 16, (3, 2), padding=(3, 1), dilation=(3, 2), groups=2), relu(),
        nn.Conv2d(16, 8, 3),
    ),
    "average pools": lambda: Chain(
        nn.Conv2d(3, 8, 3), relu(), nn.AvgPool2d(2), nn.Conv2d(8, 12, 3), relu(),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.Conv2d(12, 12, 3, padding=1),
        relu(), nn.AdaptiveAvgPool2d(4), nn.Conv2d(12, 8, 3),
    ),
    "GoogLeNet": lambda: Chain(
        nn.Conv2d(3, 8, 5, 2, 2), relu(), nn.MaxPool2d(3, 2, ceil_mode=True), Inception(8), Inception(18),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(18, 12, 3, padding=1),
    ),
    "DenseNet": lambda: Chain(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), DenseLayer(8, 4), DenseLayer(12, 4), nn.BatchNorm2d(16),
        relu(), nn.Conv2d(16, 8, 1, bias=False), nn.AvgPool2d(2),
        DenseLayer(8, 4), DenseLayer(12, 4), nn.Conv2d(16, 8, 3, padding=1),
    ),
    "ShuffleNet": lambda: Chain(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), relu(), nn.MaxPool2d(3, 2, 1),
        ShuffleUnit(8), ShuffleUnit(8), ShuffleUnit(8), nn.Conv2d(8, 12, 1),
    ),
}  # fmt: skip


def make(kind: str, seed: int = 0) -> nn.Module:
    """The network in float64, evaluation mode, with batch norms that are not the identity."""
    torch.manual_seed(seed)
    model = KINDS[kind]()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0, (2 / module.weight[0].numel()) ** 0.5)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.weight.data *= torch.where(torch.rand_like(module.weight) < 0.7, 1.0, -1.0)
            nn.init.normal_(module.bias, 0.2, 0.3)
            module.running_mean.normal_(0, 0.2)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model.double().eval()


def live_units(model: nn.Module, images: Tensor, layer: str = "last", count: int = 8) -> list[tuple[int, int, int, int]]:
    """Units (image, channel, y, x) with positive activity: corners, borders and inside."""
    captured: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda m, i, o: captured.append(o.clone()))
    with torch.no_grad():
        model(images)
    handle.remove()
    maps = captured[0]
    height, width = maps.shape[2:]
    places = [
        (0, 0),
        (height - 1, width - 1),
        (0, width - 1),
        (height // 2, width // 2),
        (height // 2, 0),
        (height - 1, width // 3),
        (height // 3, width // 2),
    ]
    units = []
    for turn in range(count):
        image, (y, x) = turn % len(images), places[turn % len(places)]
        live = (maps[image, :, y, x] > 0).nonzero().flatten().tolist()
        if live:
            units.append((image, live[turn % len(live)], y, x))
    return units
