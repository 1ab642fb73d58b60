"""Specification of max_unpool2d and its adjoint in plain PyTorch. See README.md for the rules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def natural_size(
    pooled_size: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Pair:
    """Cells that the windows of a pooled map (or of a part of one) reach over."""
    height, width = (
        (n - 1) * s + d * (k - 1) + 1 for n, k, s, d in zip(pooled_size, kernel_size, stride, dilation, strict=True)
    )
    return height, width


def _outside(size: int, first: Tensor, limit: int) -> Tensor:
    """[N, size]: which of `size` cells from coordinate `first` [N] on lie outside a map of `limit` cells."""
    cells = first.long()[:, None] + torch.arange(size, device=first.device)
    return (cells < 0) | (cells >= limit)


def max_unpool2d(
    pooled: Tensor,
    switches: Tensor,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    output_size: Pair,
    relu: bool,
    origin: Tensor | None,
) -> Tensor:
    """pooled, switches [N,C,h,w] -> [N,C,*output_size], or the natural window of every sample with origin [N,2]."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = kernel_size, stride, padding, dilation
    height, width = output_size
    rows, cols = natural_size((pooled.shape[-2], pooled.shape[-1]), kernel_size, stride, dilation)
    half = pooled.dtype in (torch.float16, torch.bfloat16)
    out = pooled.new_zeros(*pooled.shape[:2], rows, cols, dtype=torch.float32 if half else pooled.dtype)
    # Taps run downwards, so that each cell adds its windows in row-major order: every backend adds in this order.
    for tap in reversed(range(kh * kw)):
        top, left = tap // kw * dh, tap % kw * dw
        target = out[..., top : rows - dh * (kh - 1) + top : sh, left : cols - dw * (kw - 1) + left : sw]
        target += torch.where(switches == tap, pooled, torch.zeros_like(pooled))
    if origin is None:
        out = F.pad(out, (-pw, width + pw - cols, -ph, height + ph - rows))
    else:
        out = out.masked_fill(_outside(rows, origin[:, 0] * sh - ph, height)[:, None, :, None], 0)
        out = out.masked_fill(_outside(cols, origin[:, 1] * sw - pw, width)[:, None, None, :], 0)
    if relu:
        out = out.clamp(min=0)
    return out.to(pooled.dtype)


def _targets(
    switches: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair, origin: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Map coordinates (y, x), each [N,C,h,w] int64, at which the switches point."""
    samples, _, height, width = switches.shape
    device = switches.device
    first = torch.zeros(samples, 2, dtype=torch.int64, device=device) if origin is None else origin.long()
    tap = switches.long()
    window_y = first[:, 0, None] + torch.arange(height, device=device)
    window_x = first[:, 1, None] + torch.arange(width, device=device)
    y = window_y[:, None, :, None] * stride[0] - padding[0] + tap // kernel_size[1] * dilation[0]
    x = window_x[:, None, None, :] * stride[1] - padding[1] + tap % kernel_size[1] * dilation[1]
    return y, x


def max_unpool2d_backward(
    grad: Tensor,
    switches: Tensor,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    output_size: Pair,
    origin: Tensor | None,
) -> Tensor:
    """The adjoint: grad of the output -> grad of pooled [N,C,h,w], which reads each switch's cell (0 outside the map)."""
    height, width = output_size
    y, x = _targets(switches, kernel_size, stride, padding, dilation, origin)
    valid = (switches < kernel_size[0] * kernel_size[1]) & (switches >= 0)
    valid &= (y >= 0) & (y < height) & (x >= 0) & (x < width)
    if origin is not None:
        y = y - (origin[:, 0].long() * stride[0] - padding[0])[:, None, None, None]
        x = x - (origin[:, 1].long() * stride[1] - padding[1])[:, None, None, None]
    flat = torch.where(valid, y * grad.shape[-1] + x, 0).flatten(2)
    if grad.shape[-1] * grad.shape[-2] == 0:
        return grad.new_zeros(switches.shape)
    gathered = grad.flatten(2).gather(2, flat).reshape(switches.shape)
    return torch.where(valid, gathered, torch.zeros_like(gathered))


def invalid_switches(
    switches: Tensor,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    output_size: Pair,
    origin: Tensor | None,
) -> Tensor:
    """[N,C,h,w] bool: switches outside their window, or, without `origin`, outside the map of `output_size`."""
    invalid = (switches < 0) | (switches >= kernel_size[0] * kernel_size[1])
    if origin is None:
        y, x = _targets(switches, kernel_size, stride, padding, dilation, None)
        invalid |= (y < 0) | (y >= output_size[0]) | (x < 0) | (x >= output_size[1])
    return invalid
