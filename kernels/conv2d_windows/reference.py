"""Specification of conv2d_windows in plain PyTorch. See README.md for the rules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from conelens.kernels.gather_windows import reference as gather_reference

Pair = tuple[int, int]
_HALVES = (torch.float16, torch.bfloat16)


def window_size(out_size: Pair, kernel: Pair, stride: Pair, dilation: Pair) -> Pair:
    """Cells that a convolution without padding reads for ``out_size`` outputs."""
    height, width = ((n - 1) * s + d * (k - 1) + 1 for n, k, s, d in zip(out_size, kernel, stride, dilation, strict=True))
    return height, width


def conv2d_windows(
    base: Tensor,
    patch: Tensor,
    patch_origin: Tensor,
    window_origin: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    dilation: Pair,
    out_size: Pair,
    rows: Tensor | None,
    relu: bool,
) -> Tensor:
    """base [B,Ci,H,W], patch [U,Ci,h,w], weight [Co,Ci,kh,kw] -> [U,Co,*out_size]; halves are rounded once, at the end."""
    size = window_size(out_size, (weight.shape[2], weight.shape[3]), stride, dilation)
    windows = gather_reference.gather_windows(base, patch, patch_origin, window_origin, size, rows, 0.0, False)
    wide = torch.float32 if base.dtype in _HALVES else base.dtype
    out = F.conv2d(windows.to(wide), weight.to(wide), None if bias is None else bias.to(wide), stride, 0, dilation)
    return (torch.relu(out) if relu else out).to(base.dtype)
