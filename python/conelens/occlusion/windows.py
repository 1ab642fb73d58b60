"""The grid of occluding windows, and what is painted into them."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from conelens.errors import ArgumentError
from conelens.operators import Pair

BORDERS = ("flush", "clip")
_FILLS = "a number, one per channel, a tensor or array, a function, 'mean' or 'blur'"


@dataclass(frozen=True, eq=False)
class Windows:
    """Window (r, c) covers pixels ``tops[r]:bottoms[r]``, ``lefts[c]:rights[c]``; all int64 arrays, [rows] and [cols].

    Made of any sequences of whole numbers, in any order. ArgumentError where a window is empty or reaches outside the image.
    """

    tops: np.ndarray
    bottoms: np.ndarray
    lefts: np.ndarray
    rights: np.ndarray
    image_size: Pair

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", pair(self.image_size, "image_size"))
        for axis, (first, last) in enumerate((("tops", "bottoms"), ("lefts", "rights"))):
            starts, ends = (_whole_numbers(getattr(self, name), name) for name in (first, last))
            if len(starts) != len(ends):
                raise ArgumentError(f"{last}: got {len(ends)} of them for {len(starts)} {first}, wanted as many")
            wrong = np.flatnonzero((starts < 0) | (starts >= ends) | (ends > self.image_size[axis]))
            if len(wrong):
                at = wrong[0]
                raise ArgumentError(
                    f"{first}, {last}: got a window from {starts[at]} to {ends[at]} (exclusive) on an image of "
                    f"{self.image_size[axis]} pixels; wanted one that covers some of them and nothing outside"
                )
            object.__setattr__(self, first, starts)
            object.__setattr__(self, last, ends)

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


def _whole_numbers(values: Any, name: str) -> np.ndarray:
    """int64 [n], n >= 1, of the caller's numbers; a copy, so that nobody changes a grid that has been checked."""
    found = np.array(values)
    if found.ndim != 1 or not len(found) or found.dtype.kind not in "iu":
        raise ArgumentError(f"{name}: got {values!r}, wanted a list or array of one whole number of pixels or more")
    return found.astype(np.int64)


def _axis(cells: int, length: int, step: int, border: str) -> tuple[np.ndarray, np.ndarray]:
    starts = np.arange(math.ceil((cells - length) / step) + 1, dtype=np.int64) * step
    if border == "flush":
        starts = np.minimum(starts, cells - length)
    starts = starts[starts < cells]  # a stride longer than the window may step over all that is left
    return starts, np.minimum(starts + length, cells)


def pair(value: int | Sequence[int], name: str) -> Pair:
    """(height, width) from one positive whole number or two, of whatever integer type."""
    try:
        both = [whole_number(v) for v in (value if isinstance(value, Sequence) else (value, value))]
    except TypeError:
        both = []
    if len(both) != 2 or min(both) < 1:
        raise ArgumentError(f"{name}: got {value!r}, wanted a positive whole number of pixels or a (height, width) of them")
    return both[0], both[1]


def whole_number(value: Any) -> int:
    """``value`` of any integer type as int; TypeError for everything else, a bool among them."""
    if isinstance(value, bool):
        raise TypeError(f"{value} is no number")
    return operator.index(value)


def fill_images(fill: Any, images: Tensor, window: Pair) -> Tensor:
    """What the windows show of each image, as images [N, C, H, W].

    ``fill`` is a number, one number per channel, a tensor or array that broadcasts to [N, C, H, W] (the network's input space),
    "mean" (each image's own mean per channel), "blur" (the image blurred so that nothing of the window's size is left: a
    Gaussian with a standard deviation of half the window), or a function of the images.
    """
    count, channels = images.shape[:2]
    if isinstance(fill, str):
        if fill in ("mean", "blur") and not images.is_floating_point():
            raise ArgumentError(f"fill: {fill!r} needs floating-point images, got {images.dtype}; give a number or a tensor")
        if fill == "mean":
            return images.mean((2, 3), keepdim=True).expand_as(images)
        if fill == "blur":
            blurred = torch.empty_like(images)
            for out, image in zip(blurred, images):  # one by one: what blurring needs besides is several times its image
                out.copy_(_blurred(image[None], window)[0])
            return blurred
        raise ArgumentError(f"fill: got {fill!r}, wanted {_FILLS}")
    value = fill(images.clone()) if callable(fill) else fill  # a copy: the function may work in place
    if not isinstance(value, Tensor):
        try:
            if isinstance(value, np.ndarray):
                value = torch.from_numpy(value.copy())  # torch takes no negative strides
            else:
                value = torch.as_tensor(value, dtype=images.dtype)
        except (TypeError, ValueError, RuntimeError):
            raise ArgumentError(f"fill: got {value!r}, wanted {_FILLS}") from None
    if value.ndim == 1:
        if len(value) not in (1, channels):
            raise ArgumentError(f"fill: got {len(value)} numbers, wanted one, or one for each of {channels} channels")
        value = value.reshape(-1, 1, 1)
    try:
        filled = value.to(images).broadcast_to((count, *images.shape[1:]))
    except RuntimeError:
        raise ArgumentError(
            f"fill: got shape {tuple(value.shape)}, wanted one that broadcasts to {tuple(images.shape)}"
        ) from None
    if not all_finite(filled):
        raise ArgumentError("fill: holds NaN or infinity, wanted finite values in the network's input space")
    return filled


def all_finite(values: Tensor) -> bool:
    """Is there neither NaN nor infinity? Without a map of the answers, unless the sum alone overflows."""
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


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
    inside = inside_boxes(windows.boxes(units), images.shape[2:], images.device)
    image = torch.from_numpy(units[:, 0]).to(images.device)
    return torch.where(inside, filled[image], images[image])
