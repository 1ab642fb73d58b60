"""Operators that read a neighbourhood without weights: pooling, resizing, padding, flattening."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from conelens import ops
from conelens.operators.base import Bound, Operator, Pair, Sliding, Step, inside


@dataclass(eq=False)
class MaxPool2d(Sliding):
    """Max pooling with switches; its top-down signal goes where the maximum was (Zeiler & Fergus 2014, unpooling)."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    ceil_mode: bool
    kind = "max_pool"
    keeps_zero = False  # a window that leaves the map may still reach into it
    outside = -float("inf")

    def taps(self, axis: int) -> int:
        return self.kernel[axis]

    def pool(self, x: Tensor, whole: bool, relu: bool) -> tuple[Tensor, Tensor]:
        """(pooled, switches) of a whole map, or of a window without any padding."""
        padding, ceil_mode = (self.padding, self.ceil_mode) if whole else ((0, 0), False)
        return ops.max_pool2d_with_switches(x, self.kernel, self.stride, padding, self.dilation, ceil_mode, relu=relu)

    def forward(self, inputs: Sequence[Tensor], step: Step | None) -> Tensor:
        pooled, switches = self.pool(inputs[0], step is None, relu=False)
        if step is not None:
            step.memo["switches"] = switches
        return pooled

    def macs(self, out_shape: tuple[int, int, int]) -> float:
        return super().macs(out_shape) * self.kernel[0] * self.kernel[1]


@dataclass(eq=False)
class Spatial(Operator):
    """Any separable linear map of space, ``rows @ x @ columns.T``: average pooling, resizing, reflection, slicing.

    ``window`` = (kernel, stride, padding) where the operator is a sliding one, so that receptive fields continue past the
    border; otherwise they are read off the non-zero entries.
    """

    rows: Tensor  # [H_out, H_in] float64
    columns: Tensor  # [W_out, W_in] float64
    window: tuple[Pair, Pair, Pair] | None = None
    kind: str = "spatial"  # type: ignore[misc]
    keeps_zero = True  # rows outside the map are zero
    linear = True

    @property
    def translates(self) -> bool:  # type: ignore[override]
        return self.window is not None

    def __post_init__(self) -> None:
        self._extent: list[tuple[np.ndarray, np.ndarray]] = []
        for matrix in (self.rows, self.columns):
            used = matrix.cpu().numpy() != 0
            first = np.where(used.any(1), used.argmax(1), 0)
            last = np.where(used.any(1), used.shape[1] - used[:, ::-1].argmax(1), 0)
            self._extent.append((first, last))
        self._cast: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def reach(self, edge: int, axis: int, low: Bound, high: Bound, in_size: int) -> tuple[Bound, Bound]:
        if self.window is not None:
            kernel, stride, padding = (pair[axis] for pair in self.window)
            return low * stride - padding, (high - 1) * stride - padding + kernel
        first, last = self._extent[axis]
        bounds = [
            (int(first[lo:hi].min()), int(last[lo:hi].max())) if lo < hi else (0, 1)
            for lo, hi in zip(
                np.clip(np.atleast_1d(low), 0, len(first)).tolist(),
                np.clip(np.atleast_1d(high), 0, len(first)).tolist(),
                strict=True,
            )
        ]
        starts, ends = np.array(bounds, dtype=np.int64).T
        return (starts, ends) if np.ndim(low) else (int(starts[0]), int(ends[0]))

    def spread(self, edge: int, axis: int, low: Bound, high: Bound, in_size: int, out_size: int) -> tuple[Bound, Bound]:
        first, last = self._extent[axis]
        reads = (first < np.atleast_1d(high)[:, None]) & (last > np.atleast_1d(low)[:, None])
        starts = reads.argmax(1)
        ends = np.where(reads.any(1), reads.shape[1] - reads[:, ::-1].argmax(1), starts)
        return (starts, ends) if np.ndim(low) else (int(starts[0]), int(ends[0]))

    def scale(self, axis: int) -> int:
        if self.window is not None:
            return self.window[1][axis]
        matrix = (self.rows, self.columns)[axis]
        return max(1, round(matrix.shape[1] / matrix.shape[0]))

    def matrices(self, like: Tensor, step: Step | None) -> tuple[Tensor, Tensor]:
        """(rows, columns) cut to the windows of ``step``: 2-D where all units share them, else [U, 1, out, in]."""
        key = (like.dtype, like.device)
        if key not in self._cast:
            self._cast[key] = (self.rows.to(like), self.columns.to(like))
        whole = self._cast[key]
        if step is None:
            return whole
        if "matrices" not in step.memo:
            step.memo["matrices"] = tuple(
                _cut(matrix, *((p.low[:, axis], p.size[axis]) for p in (step.output, step.read(0))))
                for axis, matrix in enumerate(whole)
            )
        return step.memo["matrices"]

    def forward(self, inputs: Sequence[Tensor], step: Step | None) -> Tensor:
        rows, columns = self.matrices(inputs[0], step)
        return torch.matmul(rows, torch.matmul(inputs[0], columns.transpose(-1, -2)))

    def change(self, inputs: Sequence[Tensor], step: Step | None) -> Tensor:
        """Of one cell from channels side by side, as a mean over the map: one product per unit, without laying out anew."""
        (x,) = inputs
        rows, columns = self.matrices(x, step)
        if rows.shape[-2] * columns.shape[-2] > 1 or x.stride(1) != 1:
            return self.forward(inputs, step)
        weights = (rows.transpose(-1, -2) * columns).flatten(-2).expand(len(x), 1, -1)
        return torch.matmul(weights, x.permute(0, 2, 3, 1).flatten(1, 2)).transpose(1, 2)[..., None]

    def topdown(self, signal: Tensor, step: Step) -> list[Tensor | None]:
        rows, columns = self.matrices(signal, step)
        return [torch.matmul(rows.transpose(-1, -2), torch.matmul(signal, columns))]


def _cut(matrix: Tensor, out: tuple[np.ndarray, int], read: tuple[np.ndarray, int]) -> Tensor:
    """Sub-matrices [U, 1, out size, in size] at (origins [U], size) on both sides, zero outside; 2-D when all units agree."""
    (out_low, out_size), (in_low, in_size) = out, read
    if (out_low == out_low[0]).all() and (in_low == in_low[0]).all():
        out_low, in_low = out_low[:1], in_low[:1]
    height, width = matrix.shape
    row = out_low[:, None] + np.arange(out_size)
    col = in_low[:, None] + np.arange(in_size)
    valid = ((row >= 0) & (row < height))[:, :, None] & ((col >= 0) & (col < width))[:, None, :]
    index = np.clip(row, 0, height - 1)[:, :, None] * width + np.clip(col, 0, width - 1)[:, None, :]
    cut = matrix.reshape(-1)[torch.from_numpy(index).to(matrix.device)]
    cut = cut * torch.from_numpy(valid).to(matrix.device)
    return cut[0] if len(cut) == 1 else cut[:, None]


@dataclass(eq=False)
class Pad(Operator):
    """Constant padding (negative amounts crop); amounts are (top, left, bottom, right)."""

    amounts: tuple[int, int, int, int]
    value: float
    in_size: Pair
    kind = "pad"
    keeps_zero = False
    linear = True

    def reach(self, edge: int, axis: int, low: Bound, high: Bound, in_size: int) -> tuple[Bound, Bound]:
        return low - self.amounts[axis], high - self.amounts[axis]

    def spread(self, edge: int, axis: int, low: Bound, high: Bound, in_size: int, out_size: int) -> tuple[Bound, Bound]:
        start = self.amounts[axis]
        return np.clip(low + start, 0, out_size), np.clip(high + start, 0, out_size)

    def change(self, inputs: Sequence[Tensor], step: Step | None) -> Tensor:
        return replace(self, value=0.0).forward(inputs, step)

    def forward(self, inputs: Sequence[Tensor], step: Step | None) -> Tensor:
        (x,) = inputs
        if step is None:
            top, left, bottom, right = self.amounts
            return F.pad(x, (left, right, top, bottom), value=self.value)
        if self.value == 0.0:
            return x
        return x.masked_fill(~inside(step.read(0), self.in_size, x.device), self.value)

    def topdown(self, signal: Tensor, step: Step) -> list[Tensor | None]:
        return [signal]


@dataclass(eq=False)
class Flatten(Operator):
    """A map as a vector, in row-major order of (channel, y, x)."""

    shape: tuple[int, int, int]
    kind = "flatten"
    translates = False
    linear = True

    def reach(self, edge: int, axis: int, low: Bound, high: Bound, in_size: int) -> tuple[Bound, Bound]:
        return low * 0, low * 0 + in_size

    def spread(self, edge: int, axis: int, low: Bound, high: Bound, in_size: int, out_size: int) -> tuple[Bound, Bound]:
        return low * 0, low * 0 + out_size

    def scale(self, axis: int) -> int:
        return self.shape[1 + axis]

    def forward(self, inputs: Sequence[Tensor], step: Step | None) -> Tensor:
        return inputs[0].flatten(1)[:, :, None, None]

    def topdown(self, signal: Tensor, step: Step) -> list[Tensor | None]:
        return [signal.reshape(-1, *self.shape)]
