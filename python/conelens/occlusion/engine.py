"""What a sweep asks of whatever runs the network at its positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from conelens.occlusion.records import Record


class Visited(NamedTuple):
    """Positions that are done: ``units`` [U, 3] of (image, row, column), outputs [U, ...], {layer: (sums, maxima) [U, K]}."""

    units: np.ndarray
    outputs: Tensor
    activity: dict[str, tuple[Tensor, Tensor]]


class Engine(Protocol):
    """Runs the network on the images as they are, and at the positions of a sweep."""

    form: str

    def clean(self) -> tuple[Tensor, list[Record]]:
        """Outputs [N, ...] of the images as they are, and what is recorded of them."""

    def visit(self, units: np.ndarray) -> Iterator[Visited]:
        """Run ``units`` [U, 3], in whatever order and portions."""
