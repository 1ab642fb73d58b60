"""Arguments of graph_e_step as its kernels meet them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

GRID = (7.5, 3.0, 16.0, 11.0)


def problem(images: int, channels: int, height: int, width: int, nodes: int, shifted: bool = True) -> list[Any]:
    """Positional arguments in float32: activity, two thirds of it positive, and nodes in and around the map of GRID."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    size = torch.tensor([height * GRID[2], width * GRID[3]])
    return [
        random(images, channels, height, width) * 3 - 1,
        random(channels, nodes, 2) * size,
        (random(images, channels, nodes, 2) - 0.5) * 0.4 * size if shifted else None,
        (0.25 + random(channels, nodes)) * 0.4 * float(size.max()),
        random(images, channels, nodes),
        0.2 * random(images),
    ]
