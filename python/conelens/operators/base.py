"""The operators a traced network is made of: how each runs forward, what it reads, and how a top-down signal passes it.

Every map is ``[U, C, H, W]``; a vector of F features is a map ``[U, F, 1, 1]``. An operator is run either on whole maps or on
*windows*: inputs then hold exactly the cells that ``reach`` asks for, with everything outside the map already filled by
``outside``. One class serves both, so the cone and the whole image cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from conelens.errors import UnsupportedOperatorError

Pair = tuple[int, int]
Offset = Pair | np.ndarray  # one (y, x) for all units, or [U, 2]
Bound = Any  # int or np.ndarray of int64: the interval algebra is the same for one unit and for many


class Place:
    """Where the windows of a batch of units lie: ``low`` [U, 2], the map coordinate of their first cell, and their ``size``.

    ``low`` may be given as (base, stride, positions): most callers of the interior route never ask for it.
    """

    __slots__ = ("_low", "_moved", "size")

    def __init__(self, low: np.ndarray | None, size: Pair, moved: tuple[np.ndarray, ...] | None = None) -> None:
        self._low = low
        self._moved = moved
        self.size = size

    @property
    def low(self) -> np.ndarray:
        if self._low is None:
            assert self._moved is not None
            base, stride, positions = self._moved
            self._low = base + stride * positions
        return self._low

    @property
    def origin(self) -> Offset:
        """(y, x) when all units share it, else ``low``."""
        low = self.low
        if len(low) == 1 or (low == low[0]).all():
            return int(low[0, 0]), int(low[0, 1])
        return low


@dataclass(frozen=True)
class Edge:
    """What one input of a node must provide: a window of ``size`` that begins at ``offset`` of the one held for it."""

    offset: Offset
    size: Pair


@dataclass
class Step:
    """What an operator may need besides its inputs: where its windows lie, and a memo shared by the two passes."""

    edges: list[Edge]
    sources: list[Place]  # the windows held for the inputs
    output: Place
    memo: dict[str, Any] = field(default_factory=dict)

    def read(self, edge: int) -> Place:
        """Where the window that an input provides lies on its map."""
        return Place(self.sources[edge].low + np.asarray(self.edges[edge].offset), self.edges[edge].size)


class Operator:
    """One operator. The defaults describe an element-wise one that keeps zero at zero."""

    kind: ClassVar[str] = "operator"
    keeps_zero: ClassVar[bool] = True  # a zero cell outside the map stays zero
    outside: ClassVar[float] = 0.0  # what cells outside the map count as

    linear: ClassVar[bool] = False  # up to a constant: what changes at the inputs decides alone what changes at the output
    translates: bool = True  # ``reach`` moves with the output cell, whatever the size of the map
    remembers: bool = False  # the top-down pass needs an input of the forward pass

    def reach(self, edge: int, axis: int, low: Bound, high: Bound, in_size: int) -> tuple[Bound, Bound]:
        """Half-open interval of input ``edge`` that outputs ``[low, high)`` read along ``axis``, not clipped to the map."""
        return low, high

    def spread(self, edge: int, axis: int, low: Bound, high: Bound, in_size: int, out_size: int) -> tuple[Bound, Bound]:
        """Half-open interval of outputs that read an input cell of ``[low, high)``, on the map: the inverse of ``reach``."""
        return low, high

    def scale(self, axis: int) -> int:
        """Input cells per output cell (the stride)."""
        return 1

    def forward(self, inputs: Sequence[Tensor], step: Step | None) -> Tensor:
        """Output map; ``step`` is None on whole maps, where the operator pads by itself."""
        raise NotImplementedError

    def change(self, inputs: Sequence[Tensor], step: Step | None) -> Tensor:
        """Change of the output for changes of the inputs; only for a ``linear`` operator."""
        return self.forward(inputs, step)

    def topdown(self, signal: Tensor, step: Step) -> list[Tensor | None]:
        """Signal for each input on exactly the window that ``reach`` asks for; None where the signal stops."""
        raise NotImplementedError

    def refusal(self) -> str | None:
        """Why a top-down signal cannot pass, or None."""
        return None

    def advice(self) -> str:
        """What the user can do about a refusal."""
        return "only layers below it can be projected"

    def macs(self, out_shape: tuple[int, int, int]) -> float:
        """Multiply-accumulates (or element visits) for an output of this shape, for the cost model."""
        channels, height, width = out_shape
        return float(channels * height * width)


class Sliding(Operator):
    """A window of taps that slides over the map: convolution and max pooling."""

    stride: Pair
    padding: tuple[int, ...]  # before the map along y and x first
    dilation: Pair

    def taps(self, axis: int) -> int:
        """Taps of the window along ``axis``."""
        raise NotImplementedError

    def span(self, axis: int) -> int:
        """Input cells from the first tap to the last."""
        return self.dilation[axis] * (self.taps(axis) - 1) + 1

    def reach(self, edge: int, axis: int, low: Bound, high: Bound, in_size: int) -> tuple[Bound, Bound]:
        start = self.padding[axis]
        return low * self.stride[axis] - start, (high - 1) * self.stride[axis] - start + self.span(axis)

    def spread(self, edge: int, axis: int, low: Bound, high: Bound, in_size: int, out_size: int) -> tuple[Bound, Bound]:
        stride, start = self.stride[axis], self.padding[axis]
        first = -((self.span(axis) - 1 - start - low) // stride)
        last = (high - 1 + start) // stride + 1
        return np.maximum(first, 0), np.minimum(last, out_size)

    def scale(self, axis: int) -> int:
        return self.stride[axis]


class Input(Operator):
    kind = "input"

    def macs(self, out_shape: tuple[int, int, int]) -> float:
        return 0.0


def inside(place: Place, map_size: Pair, device: torch.device) -> Tensor:
    """Bool mask [U, 1, h, w] of the window cells that lie on the map."""
    masks = []
    for axis in (0, 1):
        cells = place.low[:, axis, None] + np.arange(place.size[axis])
        masks.append(torch.from_numpy((cells >= 0) & (cells < map_size[axis])).to(device))
    return masks[0][:, None, :, None] & masks[1][:, None, None, :]


def require_rule(operator: Operator, where: str) -> None:
    """Raise when a top-down signal cannot pass ``operator``."""
    reason = operator.refusal()
    if reason:
        raise UnsupportedOperatorError(f"cannot project through {where}: {reason}; {operator.advice()}")
