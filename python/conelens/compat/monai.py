"""``monai.visualize.OcclusionSensitivity`` with conelens underneath, for plain tensors. MONAI itself is not needed.

Source: MONAI 1.6, ``monai/visualize/occlusion_sensitivity.py`` and ``monai/inferers/utils.py`` (Apache-2.0), read for what they
compute.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from conelens.compat._progress import bar
from conelens.compat._traced import Traced
from conelens.errors import ArgumentError, ConelensError
from conelens.network import Network
from conelens.occlusion import Windows, occlude

MODES = ("gaussian", "mean_patch", "mean_img")
Axes = list[tuple[np.ndarray, int]]  # per spatial axis: where the windows begin, and how long they are


class OcclusionSensitivity:
    """Class probabilities under an occluding window, with MONAI's signature, shapes and numbers.

    A number or "mean_img" as ``mode`` show the same in every window: there, for images, :func:`conelens.occlude` computes
    only what a window can change. "gaussian" (MONAI's default), "mean_patch" and functions show something else in every window
    and run everything anew, as MONAI does; a warning says so.

    Two modes follow MONAI's documentation instead of its code: MONAI 1.6 multiplies by the mean of the patch in "mean_patch",
    and fails with a function.

    Args:
        nn_module: a classifier; it is switched to evaluation mode meanwhile. Traced once, and again after its weights changed.
        mask_size: of the window in pixels; a number, or one per axis.
        n_batch: windows in one batch, where everything runs anew.
        verbose: a bar on the error stream, when it is a terminal (extra 'cli').
        mode: what a window shows: a number; "mean_img", the mean of all values of the image; "mean_patch", that of what is
            covered; "gaussian", the image fading to 0 in the middle, and averages weighted towards the middle; or a function
            ``(image, covered) -> shown`` of [1, C, H, W] and [1, C, h, w].
        overlap: of neighbouring windows, 0 <= overlap < 1; the step is int(mask_size * (1 - overlap)), at least 1.
        activate: True: as MONAI does, sigmoid for images of one channel, else softmax; False: nothing; or a function of outputs
            [B, classes].
    """

    def __init__(
        self,
        nn_module: nn.Module,
        mask_size: int | Sequence[int] = 16,
        n_batch: int = 16,
        verbose: bool = True,
        mode: str | float | Callable[[Tensor, Tensor], Tensor] = "gaussian",
        overlap: float = 0.6,
        activate: bool | Callable[[Tensor], Tensor] = True,
    ) -> None:
        if not isinstance(nn_module, nn.Module):
            raise ArgumentError(f"nn_module: got {type(nn_module).__name__}, wanted a torch.nn.Module")
        known = mode in MODES if isinstance(mode, str) else callable(mode) or _finite(mode)
        if not known:
            raise ArgumentError(f"mode: got {mode!r}, wanted a finite number, a function, or one of {', '.join(MODES)}")
        if not _whole(n_batch) or n_batch < 1:
            raise ArgumentError(f"n_batch: got {n_batch!r}, wanted a whole number from 1")
        if not _finite(overlap) or not 0 <= overlap < 1:
            raise ArgumentError(f"overlap: got {overlap!r}, wanted a number, at least 0 and less than 1")
        self.nn_module, self.mask_size, self.n_batch, self.verbose = nn_module, mask_size, n_batch, verbose
        self.mode, self.overlap, self.activate = mode, overlap, activate
        self._traced = Traced(nn_module)

    def __call__(self, x: Tensor, b_box: Sequence[int] | None = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Sweep the window over one image.

        Args:
            x: [1, C, H, W], or a volume [1, C, H, W, D].
            b_box: (first, end) of each axis, flat, end exclusive: what the results show, its surroundings being swept as far
                as windows reach in. Negative: from the first pixel, to the last.
            kwargs: further arguments of the module.

        Returns:
            Probabilities [1, classes, H, W] of every class, at each pixel the mean over the windows that cover it; and the most
            probable class [1, 1, H, W], int64. Of the size of ``b_box`` where given.

        Raises:
            ArgumentError: more than one image, a mask larger than the image, a box outside it.
        """
        if not isinstance(x, Tensor) or x.ndim < 3 or not x.numel() or not x.is_floating_point():
            raise ArgumentError("x: wanted an image [1, C, H, W] of floating-point numbers")
        if len(x) != 1:
            raise ArgumentError(f"x: got {len(x)} images, wanted 1; call once for each")
        x, size = x.detach(), x.shape[2:]
        box = _box(b_box, size)
        axes = self._axes(size, box)
        with torch.no_grad(), _evaluating(self.nn_module), bar("Occlusion sensitivity", self.verbose) as progress:
            network, reason = self._network(x, kwargs)
            if network is None:
                warnings.warn(f"every position runs everything anew, in batches, because {reason}", stacklevel=2)
                result = self._plain(x, axes, kwargs, progress)
            else:
                result = self._swept(network, x, axes, progress)
        result = result[(slice(None), slice(None), *(slice(a, b) for a, b in box))].to(x.dtype).contiguous()
        return result, result.argmax(1, keepdim=True)

    def _axes(self, size: Sequence[int], box: Sequence[tuple[int, int]]) -> Axes:
        """MONAI's grid on the box and half a mask around it; the last window ends at its border."""
        given: Any = [self.mask_size] * len(size) if _whole(self.mask_size) else self.mask_size
        mask = [int(m) if _whole(m) else 0 for m in given] if isinstance(given, Sequence | np.ndarray) else []
        if len(mask) != len(size) or not all(m > 0 for m in mask):
            raise ArgumentError(f"mask_size: got {self.mask_size!r}, wanted a positive number, or {len(size)} of them")
        axes: Axes = []
        for cells, length, (first, end) in zip(size, mask, box):
            if (first, end) == (0, cells) and length > cells:
                raise ArgumentError(f"mask_size: got {tuple(mask)}, larger than the image {tuple(size)}; take a smaller one")
            reach = (length - 1) // 2
            low, high = max(first - reach, 0), min(end + reach, cells)
            length = min(length, high - low)
            step = max(int(length * (1 - self.overlap)), 1)
            starts = np.arange(math.ceil((high - low - length) / step) + 1, dtype=np.int64) * step
            axes.append((low + np.minimum(starts, high - low - length), length))
        return axes

    def _network(self, x: Tensor, kwargs: dict[str, Any]) -> tuple[Network | None, str]:
        """The traced module, or None and why it cannot be used."""
        if not _finite(self.mode) and self.mode != "mean_img":
            what = repr(self.mode) if isinstance(self.mode, str) else "a function"
            return None, f"mode {what} shows something else in every window; a number or 'mean_img' shows the same"
        if kwargs:
            return None, "the module takes more than the image"
        if x.ndim != 4:
            return None, f"{list(x.shape)} is no image [1, C, H, W]"
        try:
            return self._traced.network(x, self.nn_module(x)), ""
        except ConelensError as error:
            return None, str(error)

    def _swept(self, network: Network, x: Tensor, axes: Axes, progress: Callable[[int, int], None] | None) -> Tensor:
        (tops, height), (lefts, width) = axes
        windows = Windows(tops, tops + height, lefts, lefts + width, (x.shape[2], x.shape[3]))
        sweep = occlude(network, x, windows, fill=self._constant(x), progress=progress)
        values = self._activated(sweep.outputs.flatten(0, 2), x)
        grid = values.reshape(*windows.shape, -1).permute(2, 0, 1)
        return sweep.pixel_map(grid)[None]

    def _plain(
        self, x: Tensor, axes: Axes, kwargs: dict[str, Any], progress: Callable[[int, int], None] | None
    ) -> Tensor:  # fmt: skip
        lengths = [length for _, length in axes]
        weight = _importance(lengths).to(x) if self.mode == "gaussian" else x.new_ones(lengths)
        fade = _fading(lengths).to(x)
        places = list(itertools.product(*(starts.tolist() for starts, _ in axes)))
        total, count = x.new_zeros(()), x.new_zeros(x.shape[2:])
        for start in range(0, len(places), self.n_batch):
            some = places[start : start + self.n_batch]
            batch = x.repeat_interleave(len(some), 0)
            cuts = [tuple(slice(a, a + m) for a, m in zip(place, lengths)) for place in some]
            for number, cut in enumerate(cuts):
                part = (slice(number, number + 1), slice(None), *cut)
                batch[part] = self._shown(x, batch[part], fade)
            values = self._activated(self.nn_module(batch, **kwargs), x)
            if not total.ndim:
                total = x.new_zeros(values.shape[1], *x.shape[2:])
            for cut, value in zip(cuts, values):
                total[(slice(None), *cut)] += value.reshape(-1, *[1] * len(cut)) * weight
                count[cut] += weight
            if progress is not None:
                progress(start + len(some), len(places))
        return (total / count)[None]

    def _constant(self, x: Tensor) -> float:
        return float(x.mean()) if self.mode == "mean_img" else float(self.mode)  # type: ignore[arg-type]

    def _shown(self, x: Tensor, covered: Tensor, fade: Tensor) -> Tensor:
        if self.mode == "gaussian":
            return covered * fade
        if self.mode == "mean_patch":
            return covered.mean().expand_as(covered)
        return self.mode(x, covered) if callable(self.mode) else covered.new_full((), self._constant(x)).expand_as(covered)

    def _activated(self, outputs: Any, x: Tensor) -> Tensor:
        if not isinstance(outputs, Tensor) or outputs.ndim != 2:
            got = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ArgumentError(f"nn_module: returned {got}, wanted class scores [B, classes]")
        if callable(self.activate):
            return self.activate(outputs)
        if not self.activate:
            return outputs
        return outputs.sigmoid() if x.shape[1] == 1 else outputs.softmax(1)


def _box(b_box: Sequence[int] | None, size: Sequence[int]) -> list[tuple[int, int]]:
    if b_box is None:
        return [(0, cells) for cells in size]
    if len(b_box) != 2 * len(size) or not all(_whole(edge) for edge in b_box):
        raise ArgumentError(f"b_box: got {b_box!r}, wanted {2 * len(size)} whole numbers: first and end of each axis")
    box = [(max(int(a), 0), cells if b < 0 else min(int(b), cells)) for a, b, cells in zip(b_box[::2], b_box[1::2], size)]
    if not all(a < b for a, b in box):
        raise ArgumentError(f"b_box: got {tuple(b_box)}, which is empty within {tuple(size)}")
    return box


def _whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)


def _outer(rows: Sequence[Tensor]) -> Tensor:
    result = torch.ones(())
    for row in rows:
        result = result[..., None] * row
    return result


def _fading(lengths: Sequence[int]) -> Tensor:
    """1 - a Gaussian of a quarter of the window around its middle, stretched to [0, 1]: what a window leaves of the image."""
    rows = []
    for length in lengths:
        offset, scale = torch.arange(length) - length // 2, math.sqrt(0.5) / (length / 4)
        rows.append(0.5 * (torch.erf(scale * (offset + 0.5)) - torch.erf(scale * (offset - 0.5))))
    bell = _outer(rows)
    spread = bell.max() - bell.min()
    return (bell.max() - bell) / spread if spread > 0 else torch.zeros_like(bell)


def _importance(lengths: Sequence[int]) -> Tensor:
    """Weights of a window's pixels in the average: a Gaussian of an eighth of the window."""
    bell = _outer([torch.exp(-(((torch.arange(n) - (n - 1) / 2) / (n / 8)) ** 2) / 2) for n in lengths])
    return bell.clamp_min(max(float(bell.min()), 1e-3))


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
