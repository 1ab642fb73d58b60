"""The up-convolutional network of a decoder: its recipe, the shapes of its weights, and how it paints."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from conelens.errors import ArgumentError

SLOPE = 0.2  # of the rectifiers below zero


@dataclass(frozen=True)
class Recipe:
    """How a decoder is trained; two with equal recipes, data and threads are equal to the bit.

    Attributes:
        steps: updates of the weights; ``batch_size`` images each, in a new order whenever all have been seen.
        seed: of the first weights, the order, the held-out images and the dropped units.
        size: longest side of the picture in pixels, at most: the map is doubled while it fits.
        width: channels before the last doubling; each layer before has twice as many, at most ``widest``.
        rate: Adam's, after a short warm-up falling to zero along a cosine.
        thinned: share of the images of a batch that lose units at random (:func:`thin`), so that sparse maps are nothing new.
        contrast: weight of the differences of neighbouring pixels in the loss, beside the pixels themselves.
        held_out: share of the images that is kept aside, to measure the error on.
    """

    steps: int = 800
    batch_size: int = 16
    seed: int = 0
    size: int = 112
    width: int = 48
    widest: int = 192
    rate: float = 3e-3
    thinned: float = 0.5
    contrast: float = 1.0
    held_out: float = 0.1

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "size", "width", "widest"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ArgumentError(f"{name}: got {getattr(self, name)!r}, wanted a whole number of at least 1")
        if type(self.seed) is not int:
            raise ArgumentError(f"seed: got {self.seed!r}, wanted a whole number")
        for name, low, high in (("thinned", 0, 1), ("held_out", 0, 0.9), ("contrast", 0, 1000), ("rate", 0, 1)):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not low <= value <= high:
                raise ArgumentError(f"{name}: got {value!r}, wanted a number in {low}..{high}")


def doublings(shape: tuple[int, int, int], size: int) -> int:
    return max(0, int(math.log2(max(1.0, size / max(shape[1:])))))


def layout_of(shape: tuple[int, int, int], recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights, in order."""
    ups = doublings(shape, recipe.size)
    widths = [min(recipe.widest, recipe.width * 2**number) for number in reversed(range(max(1, ups)))]
    layout: dict[str, tuple[int, ...]] = {"gather": (widths[0], shape[0], 1, 1), "mix": (widths[0], widths[0], 3, 3)}
    layout |= {f"up{number}": (*widths[number - 1 : number + 1], 4, 4) for number in range(1, len(widths))}
    layout["colour"] = (widths[-1], 3, 4, 4) if ups else (widths[-1], 3, 3, 3)
    biases = {f"{name}.bias": (size[0] if name in ("gather", "mix") else size[1],) for name, size in layout.items()}
    return layout | biases


def paint(weights: dict[str, Tensor], maps: Tensor) -> Tensor:
    """Maps [N, D, H, W] floating -> pictures [N, 3, h, w], not yet held to 0..1.

    Two convolutions, then an up-convolution (4x4, stride 2) for each doubling, of which the last gives the colours.
    """
    # roots: which units fire tells more than how strongly; channels last: twice as fast on CPU
    x = maps.sqrt().contiguous(memory_format=torch.channels_last)
    x = functional.conv2d(x, weights["gather"], weights["gather.bias"])
    x = functional.conv2d(functional.leaky_relu(x, SLOPE), weights["mix"], weights["mix.bias"], padding=1)
    for name in [name for name in weights if name.startswith("up") and not name.endswith("bias")] + ["colour"]:
        stride = weights[name].shape[2] - 2
        x = functional.leaky_relu(x, SLOPE)
        x = functional.conv_transpose2d(x, weights[name], weights[f"{name}.bias"], stride=stride, padding=1)
    return x
