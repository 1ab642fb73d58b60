"""Classifiers to occlude, and their outputs the slow way."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import conelens
from tests.kit import networks

FORMS = ("gather", "delta")


def by_hand(
    model: Callable[[Tensor], Tensor], images: Tensor, windows: list[tuple[int, int, int, int]], fill: Tensor
) -> Tensor:
    """Outputs [N, P, ...] of the model, one occluded batch after the other."""
    outputs = []
    for top, left, bottom, right in windows:
        covered = images.clone()
        covered[:, :, top:bottom, left:right] = fill.expand_as(images)[:, :, top:bottom, left:right]
        outputs.append(model(covered))
    return torch.stack(outputs, 1)


def boxes(sweep: conelens.Sweep) -> list[tuple[int, int, int, int]]:
    return [sweep.windows.box(r, c) for r in range(len(sweep.tops)) for c in range(len(sweep.lefts))]


class Classifier(nn.Module):
    """One of the kinds of network with the rest of a classifier behind it."""

    def __init__(self, kind: str, ending: str) -> None:
        super().__init__()
        self.body = networks.make(kind)
        self.ending = ending
        with torch.no_grad():
            maps = self.body(torch.zeros(1, 3, 64, 64, dtype=torch.float64))
        cells = maps[0].numel() if ending == "flatten" else maps.shape[1]
        self.fc = nn.Linear(cells, 7).double()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.body(x))
        return self.fc(y.flatten(1) if self.ending == "flatten" else F.adaptive_avg_pool2d(y, 1).flatten(1))
