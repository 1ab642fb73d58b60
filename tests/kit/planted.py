"""Images with known moving parts, and a network whose filters answer to them.

An object of three discs (one channel each) lies anywhere; each disc jitters a little; every channel also holds discs of
clutter, often brighter than the part; a fourth channel holds clutter alone. The lower layer has a filter per channel; the upper
one a filter for the first two parts together, one for the third, one for the clutter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

SIZE = 96
OFFSETS = torch.tensor([[-18.0, 0.0], [12.0, -14.0], [12.0, 14.0]])
LOWER, UPPER = "lower", "upper"


class Planted(NamedTuple):
    images: Tensor  # [N, 4, 96, 96]
    parts: Tensor  # [N, 3, 2] pixels


def planted(count: int, seed: int = 0, clutter: int = 2, jitter: float = 1.5, roam: float = 34.0) -> Planted:
    generator = torch.Generator().manual_seed(seed)
    centre = SIZE / 2 + (torch.rand(count, 1, 2, generator=generator) - 0.5) * roam
    parts = centre + OFFSETS + torch.randn(count, 3, 2, generator=generator) * jitter
    images = torch.zeros(count, 4, SIZE, SIZE)
    images[:, :3] = _discs(parts)
    for _ in range(clutter):
        places = torch.rand(count, 4, 2, generator=generator) * SIZE
        bright = torch.rand(count, 4, 1, 1, generator=generator) * 1.4
        images += bright * _discs(places)
    return Planted(images, parts)


def _discs(places: Tensor) -> Tensor:
    along = torch.arange(SIZE)
    y = (along - places[..., 0, None]).square()
    x = (along - places[..., 1, None]).square()
    return torch.exp(-(y[..., :, None] + x[..., None, :]) / (2 * 3.0**2))


class PlantedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lower = nn.Conv2d(4, 4, 5, stride=2, padding=2)
        self.pool = nn.MaxPool2d(2)
        self.upper = nn.Conv2d(4, 3, 5, padding=2)
        along = torch.arange(5) - 2.0
        blob = torch.exp(-(along[:, None].square() + along.square()) / (2 * 1.5**2))
        blob /= blob.sum()
        with torch.no_grad():
            for conv in (self.lower, self.upper):
                conv.weight.zero_()
                conv.bias.fill_(-0.15)  # silent on the tails of discs
            for channel in range(4):
                self.lower.weight[channel, channel] = blob
            for filter_, channels in enumerate(((0, 1), (2,), (3,))):
                for channel in channels:
                    self.upper.weight[filter_, channel] = 1.5 * blob

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(self.upper(self.pool(torch.relu(self.lower(images)))))
