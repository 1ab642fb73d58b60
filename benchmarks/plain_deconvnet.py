"""The deconvnet as one writes it in plain PyTorch: whole maps, stock operators, nothing computed twice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Units = tuple[Tensor, Tensor, Tensor]  # channel, y, x: [U] int64 each


class PlainDeconvnet:
    """Deconvnet of a chain of convolutions, ReLUs and max pools; the last layer is the one shown."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = list(layers)

    def __call__(self, images: Tensor, units: Units) -> Tensor:
        """One unit per image -> [U,C,H,W]."""
        return self.down(*self.up(images), units)

    def up(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Images -> (map of the last layer, positions that each pool chose)."""
        x, chosen = images, []
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                x = F.conv2d(x, layer.weight, layer.bias, padding=layer.padding)
            elif isinstance(layer, nn.ReLU):
                x = torch.relu_(x)
            else:
                x, indices = F.max_pool2d(x, layer.kernel_size, layer.stride, return_indices=True)
                chosen.append(indices)
        return x, chosen

    def down(self, maps: Tensor, chosen: list[Tensor], units: Units) -> Tensor:
        """One unit per sample of `maps` -> [U,C,H,W]."""
        rows = torch.arange(len(maps))
        channel, y, x = units
        signal = torch.zeros_like(maps)
        signal[rows, channel, y, x] = maps[rows, channel, y, x].clamp_min(0)
        chosen = list(chosen)
        for layer in reversed(self.layers):
            if isinstance(layer, nn.Conv2d):
                signal = F.conv_transpose2d(signal, layer.weight, padding=layer.padding)
            elif isinstance(layer, nn.ReLU):
                signal = torch.relu_(signal)
            else:
                signal = F.max_unpool2d(signal, chosen.pop(), layer.kernel_size, layer.stride)
        return signal

    def many_one_by_one(self, images: Tensor, rows: Tensor, units: Units) -> Tensor:
        """Forward once per image, top-down once per unit; `rows` [U], ascending: the image of each unit."""
        results = []
        for row in range(len(images)):
            maps, chosen = self.up(images[row : row + 1])
            for u in (rows == row).nonzero().flatten().tolist():
                results.append(self.down(maps, chosen, tuple(part[u : u + 1] for part in units)))
        return torch.cat(results)

    def many_at_once(self, images: Tensor, rows: Tensor, units: Units) -> Tensor:
        """All images forward in one batch, all units top-down in one batch."""
        maps, chosen = self.up(images)
        return self.down(maps[rows], [indices[rows] for indices in chosen], units)
