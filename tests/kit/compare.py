"""Comparisons whose failure says where and by how much."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

GUARD, SENTINEL = 64, -77


def relative(actual: Tensor, expected: Tensor) -> float:
    """Relative 2-norm of the difference; two zeros are equal."""
    difference = (actual.double() - expected.double()).norm()
    scale = expected.double().norm()
    return float(difference / scale) if scale > 0 else float(difference)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal values in every cell; NaN equals NaN."""
    assert actual.shape == expected.shape, f"shape {list(actual.shape)}, wanted {list(expected.shape)}"
    a, b = actual.double(), expected.double()
    wrong = (a != b) & ~(a.isnan() & b.isnan())
    if wrong.any():
        where = wrong.nonzero()[0].tolist()
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} cells differ, first {where}: "
            f"{a[tuple(where)].item()} instead of {b[tuple(where)].item()}"
        )


class Guarded:
    """A map inside a larger buffer of sentinels: a write beside it is noticed. The view has offset and odd strides."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> None:
        margin = (1, 2, 1, 3)
        grown = [size + 2 * m for size, m in zip(shape, margin, strict=True)]
        self.sentinel = -77 if dtype.is_floating_point else 77
        self.buffer = torch.full(grown, self.sentinel, dtype=dtype).contiguous(memory_format=layout)
        cut = tuple(slice(m, m + size) for m, size in zip(margin, shape, strict=True))
        self.view = self.buffer[cut]

    def check(self) -> None:
        outside = torch.ones_like(self.buffer, dtype=torch.bool)
        cut = tuple(slice(m, m + size) for m, size in zip((1, 2, 1, 3), self.view.shape, strict=True))
        outside[cut] = False
        assert bool((self.buffer[outside] == self.sentinel).all()), "the kernel wrote outside its output"


@contextmanager
def packed_in_guards(*like: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Packed tensors of these shapes and dtypes, NaN, between sentinels that must still be there afterwards."""
    buffers = [torch.full((x.numel() + 2 * GUARD,), SENTINEL, dtype=x.dtype) for x in like]
    views = tuple(buffer[GUARD:-GUARD].view(x.shape) for buffer, x in zip(buffers, like, strict=True))
    for view in views:
        view.fill_(math.nan if view.is_floating_point() else SENTINEL)
    yield views
    for buffer in buffers:
        assert (buffer[:GUARD] == SENTINEL).all() and (buffer[-GUARD:] == SENTINEL).all(), "the kernel wrote outside its output"
