"""A data set as a network wants it: every item checked, those that cannot be used named and skipped."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from conelens.data import ImageDataset
from conelens.errors import ArgumentError, DataError
from conelens.network import Network


class CheckedImages:
    """The items of a data set from ``start`` on, on the network's device; DataError for one that holds NaN."""

    def __init__(self, net: Network, dataset: Tensor | ImageDataset, start: int = 0) -> None:
        self.net = net
        self.dataset = dataset
        self.start = start

    def __len__(self) -> int:
        return max(0, len(self.dataset) - self.start)

    def __getitem__(self, index: int) -> Tensor:
        image = self.dataset[self.start + index]
        if not isinstance(image, Tensor):
            raise ArgumentError(
                f"dataset: item {self.start + index} is a {type(image).__name__}, wanted a tensor [C, H, W]; leave labels out"
            )
        image = image.to(self.net.device)
        self.net.check_images(image[None])
        if not bool(torch.isfinite(image).all()):
            raise DataError(f"image {self.start + index} holds NaN or infinity")
        return image


def warn_skipped(index: int, error: DataError) -> None:
    """What a pass over a data set does with an item that cannot be read."""
    warnings.warn(f"skipped: {error}", stacklevel=2)
