"""Specification of deconv2d in plain PyTorch: unpool, rectify, mask, filter, crop, mask. See README.md."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from conelens.kernels.max_unpool2d.reference import max_unpool2d

Pair = tuple[int, int]
Pool = tuple[Pair, Pair, Pair, Pair]


def deconv2d(
    y: Tensor,
    weight: Tensor,
    stride: Pair,
    padding: Pair,
    groups: int,
    dilation: Pair,
    output_size: Pair,
    map_size: Pair,
    pool: Pool | None = None,
    switches: Tensor | None = None,
    relu: bool = False,
    origin: Tensor | None = None,
) -> Tensor:
    """Transposed convolution of y [N,Ci,h,w] with the forward filter weight [Ci,Co/groups,kh,kw].

    `map_size` is the size of the map the filter acts on (the forward convolution's output), `output_size`
    that of the map it writes. With `pool` = (kernel, stride, padding, dilation) y is first unpooled by
    `switches`; `relu` rectifies after the unpool and before the filter. With `origin` [N,2] y is a window of
    its map, the result is the natural window; cells outside either map are zero. Halves compute in float32.
    """
    wide = y.float() if y.dtype in (torch.float16, torch.bfloat16) else y
    signal = top_down_signal(wide, map_size, pool, switches, relu, origin)
    first = None if origin is None else filter_origin(origin, pool)
    weight = weight.to(wide.dtype)
    out = transposed_filter(signal, weight, stride, padding, groups, dilation, output_size, first)
    return out.to(y.dtype)


def transposed_filter(
    signal: Tensor,
    weight: Tensor,
    stride: Pair,
    padding: Pair,
    groups: int,
    dilation: Pair,
    output_size: Pair,
    first: Tensor | None,
) -> Tensor:
    """signal [N,Ci,h,w], zero outside its map, onto the map of output_size, or its window at `first`."""
    natural = F.conv_transpose2d(signal, weight, None, stride, 0, 0, groups, dilation)
    if first is None:
        return cells_from(natural, padding, output_size)
    return mask_outside(natural, first * first.new_tensor(stride) - first.new_tensor(padding), output_size)


def top_down_signal(
    y: Tensor, map_size: Pair, pool: Pool | None, switches: Tensor | None, relu: bool, origin: Tensor | None
) -> Tensor:
    """What the filter acts on: y unpooled, rectified, and zero outside its map."""
    if pool is not None and switches is not None:
        return max_unpool2d(y, switches, *pool, map_size, relu, origin)
    signal = y.clamp(min=0) if relu else y
    return signal if origin is None else mask_outside(signal, origin, map_size)


def filter_origin(origin: Tensor, pool: Pool | None) -> Tensor:
    """[N,2] int64: map coordinate of the first cell of the window that the filter acts on."""
    first = origin.long()
    return first if pool is None else first * first.new_tensor(pool[1]) - first.new_tensor(pool[2])


def cells_from(x: Tensor, first: Pair, size: Pair) -> Tensor:
    """[N,C,*size]: cells of x [N,C,h,w] from cell `first` on (may be negative); zero where x has none."""
    pads: list[int] = []
    for axis in (3, 2):  # F.pad wants the last axis first
        begin, end = first[axis - 2], first[axis - 2] + size[axis - 2]
        kept = min(max(begin, 0), x.shape[axis]), min(max(end, 0), x.shape[axis])
        x = x.narrow(axis, kept[0], kept[1] - kept[0])
        before = min(max(-begin, 0), size[axis - 2])
        pads += [before, size[axis - 2] - before - (kept[1] - kept[0])]
    return F.pad(x, pads)


def mask_outside(x: Tensor, origin: Tensor, size: Pair) -> Tensor:
    """x [N,C,h,w], the window at origin [N,2] of a map of `size`: zero outside that map."""
    rows = origin[:, 0, None] + torch.arange(x.shape[2], device=x.device)
    cols = origin[:, 1, None] + torch.arange(x.shape[3], device=x.device)
    inside_rows = (rows >= 0) & (rows < size[0])
    inside_cols = (cols >= 0) & (cols < size[1])
    inside = inside_rows[:, None, :, None] & inside_cols[:, None, None, :]
    return torch.where(inside, x, torch.zeros_like(x))
