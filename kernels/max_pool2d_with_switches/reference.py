"""Specification of max_pool2d_with_switches in plain PyTorch. See README.md for the rules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def output_length(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """Windows along one axis, counted as torch does: in ceil mode no window starts in the far padding."""
    reach = size + 2 * padding - dilation * (kernel - 1) - 1
    length = (reach + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (length - 1) * stride >= size + padding:
        length -= 1
    return length


def switch_dtype(kernel_size: Pair) -> torch.dtype:
    return torch.uint8 if kernel_size[0] * kernel_size[1] <= 256 else torch.int32


def max_pool2d_with_switches(
    x: Tensor,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """x [N,C,H,W] -> pooled [N,C,h,w] of the same dtype, switches [N,C,h,w] (uint8 up to 256 taps, else int32)."""
    height, width = x.shape[-2:]
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = kernel_size, stride, padding, dilation
    out_h = output_length(height, kh, sh, ph, dh, ceil_mode)
    out_w = output_length(width, kw, sw, pw, dw, ceil_mode)
    if relu:
        x = x.relu()

    # widen the map until every window lies inside; `inside` tells map cells from added ones
    bottom = max(0, (out_h - 1) * sh + dh * (kh - 1) + 1 - height - ph)
    right = max(0, (out_w - 1) * sw + dw * (kw - 1) + 1 - width - pw)
    widened = F.pad(x, (pw, right, ph, bottom))
    inside = F.pad(torch.ones(height, width, device=x.device), (pw, right, ph, bottom)).bool()

    pooled = x.new_zeros(*x.shape[:2], out_h, out_w)
    switches = torch.zeros(pooled.shape, dtype=switch_dtype(kernel_size), device=x.device)
    empty = torch.ones(out_h, out_w, dtype=torch.bool, device=x.device)
    for tap in range(kh * kw):
        top, left = tap // kw * dh, tap % kw * dw
        rows = slice(top, top + (out_h - 1) * sh + 1, sh)
        cols = slice(left, left + (out_w - 1) * sw + 1, sw)
        value, valid = widened[..., rows, cols], inside[rows, cols]
        wins = valid & (empty | (value > pooled) | value.isnan())
        pooled = torch.where(wins, value, pooled)
        switches.masked_fill_(wins, tap)
        empty = empty & ~valid
    return pooled, switches
