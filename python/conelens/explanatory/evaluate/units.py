"""The feature vectors of a layer's units, read a few images at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from conelens.errors import ArgumentError

BLOCK = 1 << 25  # feature values held in float32 at a time (128 MiB)


def check_features(features: Tensor) -> None:
    """ArgumentError unless features are floats [N,D,H,W], none of the four zero."""
    if features.ndim != 4 or not features.is_floating_point() or not features.numel():
        raise ArgumentError(
            f"features: got {features.dtype} {tuple(features.shape)}, wanted floats [N,D,H,W], none of them empty"
        )


def unit_blocks(features: Tensor, rows: Tensor | None = None, at_once: int | None = None) -> Iterator[Tensor]:
    """The images ``rows`` (default: all) of features [N,D,H,W], which may be memory-mapped, as float32 [n,D,H*W] on the CPU.

    Raises:
        ArgumentError: wrong shape or dtype, or values that no rectified activity has: NaN, infinity, negative.
    """
    check_features(features)
    rows = torch.arange(len(features)) if rows is None else rows
    for part in rows.split(at_once or max(1, BLOCK // features[0].numel())):
        block = features[part].float().flatten(2).cpu()
        least, most = block.aminmax()
        if not (least >= 0 and most < torch.inf):  # also refuses NaN
            raise ArgumentError("features: got NaN, infinity or negative values, wanted activities: rectified and finite")
        yield block
