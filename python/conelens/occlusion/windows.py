"""The grid of occluding windows, and what is painted into them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from conelens.errors import ArgumentError
from conelens.operators import Pair

BORDERS = ("flush", "clip")
Fill = float | str | Sequence[float] | Tensor | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Windows:
    """Window (r, c) covers pixels ``tops[r]:bottoms[r]``, ``lefts[c]:rights[c]``; all int64 arrays, [rows] and [cols]."""

    tops: np.ndarray
    bottoms: np.ndarray
    lefts: np.ndarray
    rights: np.ndarray
    image_size: Pair

    @property
    def shape(self) -> Pair:
        """(rows, cols) of the grid."""
        return len(self.tops), len(self.lefts)

    @property
    def largest(self) -> Pair:
        """(height, width) of the largest window."""
        return int((self.bottoms - self.tops).max()), int((self.rights - self.lefts).max())

    def box(self, row: int, column: int) -> tuple[int, int, int, int]:
        """Pixels of one window: top, left, bottom, right (exclusive)."""
        return int(self.tops[row]), int(self.lefts[column]), int(self.bottoms[row]), int(self.rights[column])

    def boxes(self, units: np.ndarray) -> np.ndarray:
        """Pixels [U, 4] of the windows of ``units`` [U, 3] (image, row, column), in the order of :meth:`box`."""
        _, row, column = units.T
        return np.stack([self.tops[row], self.lefts[column], self.bottoms[row], self.rights[column]], 1)

    def covers(self) -> tuple[np.ndarray, np.ndarray]:
        """Which pixel rows and columns each window covers: bool [rows, H] and [cols, W]."""
        y, x = (np.arange(cells) for cells in self.image_size)
        rows = (y >= self.tops[:, None]) & (y < self.bottoms[:, None])
        columns = (x >= self.lefts[:, None]) & (x < self.rights[:, None])
        return rows, columns


def make_windows(image_size: Pair, window: int | Sequence[int], stride: int | Sequence[int], border: str = "flush") -> Windows:
    """The grid of a sweep over images of ``image_size`` (height, width).

    Args:
        window, stride: (height, width) in pixels, or one number for both.
        border: "flush" moves the last window inwards so that it ends at the border; "clip" cuts the last window off there, as
            Captum does. Where the stride divides, both are the same grid.
    """
    height, width = pair(window, "window")
    steps = pair(stride, "stride")
    if border not in BORDERS:
        raise ArgumentError(f"border: got {border!r}, wanted one of {', '.join(BORDERS)}")
    if height > image_size[0] or width > image_size[1]:
        raise ArgumentError(
            f"window: got {height}x{width}, larger than the images ({image_size[0]}x{image_size[1]}); take a smaller one"
        )
    axes = [_axis(cells, length, step, border) for cells, length, step in zip(image_size, (height, width), steps, strict=True)]
    return Windows(*axes[0], *axes[1], image_size)


def _axis(cells: int, length: int, step: int, border: str) -> tuple[np.ndarray, np.ndarray]:
    starts = np.arange(math.ceil((cells - length) / step) + 1, dtype=np.int64) * step
    if border == "flush":
        starts = np.minimum(starts, cells - length)
    return starts, np.minimum(starts + length, cells)


def pair(value: int | Sequence[int], name: str) -> Pair:
    """(height, width) from one positive whole number or two."""
    both = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
    if len(both) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in both):
        raise ArgumentError(f"{name}: got {value!r}, wanted a positive whole number of pixels or a (height, width) of them")
    return int(both[0]), int(both[1])


def fill_images(fill: Any, images: Tensor, window: Pair) -> Tensor:
    """What the windows show of each image, as images [N, C, H, W].

    ``fill`` is a number, one number per channel, a tensor that broadcasts to [N, C, H, W] (the network's input space), "mean"
    (each image's own mean per channel), "blur" (the image blurred so that nothing of the window's size is left: a Gaussian with
    a standard deviation of half the window), or a function of the images.
    """
    count, channels = images.shape[:2]
    if isinstance(fill, str):
        if fill == "mean":
            return images.mean((2, 3), keepdim=True).expand_as(images)
        if fill == "blur":
            return _blurred(images, window)
        raise ArgumentError(f"fill: got {fill!r}, wanted a number, one per channel, a tensor, a function, 'mean' or 'blur'")
    value = fill(images) if callable(fill) else fill
    if not isinstance(value, Tensor):
        value = torch.as_tensor(value, dtype=images.dtype)
        if value.ndim > 1 or (value.ndim == 1 and len(value) not in (1, channels)):
            raise ArgumentError(f"fill: got {tuple(value.shape)} numbers, wanted one, or one for each of {channels} channels")
    elif value.ndim == 1 and len(value) not in (1, channels):
        raise ArgumentError(f"fill: got a tensor of {len(value)} numbers, wanted one for each of {channels} channels")
    if value.ndim == 1:
        value = value.reshape(-1, 1, 1)
    try:
        filled = value.to(images).broadcast_to((count, *images.shape[1:]))
    except RuntimeError:
        raise ArgumentError(
            f"fill: got shape {tuple(value.shape)}, wanted one that broadcasts to {tuple(images.shape)}"
        ) from None
    if not bool(torch.isfinite(filled.sum())) and not bool(torch.isfinite(filled).all()):
        raise ArgumentError("fill: holds NaN or infinity, wanted finite values in the network's input space")
    return filled


def _blurred(images: Tensor, window: Pair) -> Tensor:
    blurred = images
    for axis in (2, 3):
        sigma = window[axis - 2] / 2
        reach = min(math.ceil(3 * sigma), images.shape[axis] - 1)
        offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
        kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
        kernel = (kernel / kernel.sum()).to(images)
        shape = (1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1)
        padding = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
        padded = F.pad(blurred, padding, mode="reflect")
        weight = kernel.reshape(shape).expand(images.shape[1], 1, *([len(kernel), 1] if axis == 2 else [1, len(kernel)]))
        blurred = F.conv2d(padded, weight, groups=images.shape[1])
    return blurred


def inside_boxes(boxes: np.ndarray, size: Sequence[int], device: torch.device) -> Tensor:
    """Bool [N, 1, H, W]: the cells of boxes [N, 4] (top, left, bottom, right), which may reach beyond a map of ``size``."""
    y, x = (np.arange(cells) for cells in size)
    top, left, bottom, right = boxes.T[:, :, None]
    rows, columns = (y >= top) & (y < bottom), (x >= left) & (x < right)
    return torch.from_numpy(rows[:, None, :, None] & columns[:, None, None, :]).to(device)


def occluded(images: Tensor, filled: Tensor, windows: Windows, units: np.ndarray) -> Tensor:
    """Occluded copies [U, C, H, W] for ``units`` [U, 3] of (image, row, column)."""
    rows, columns = windows.covers()
    device = images.device
    image = torch.from_numpy(units[:, 0]).to(device)
    y = torch.from_numpy(rows[units[:, 1]]).to(device)
    x = torch.from_numpy(columns[units[:, 2]]).to(device)
    return torch.where((y[:, None, :, None] & x[:, None, None, :]), filled[image], images[image])
