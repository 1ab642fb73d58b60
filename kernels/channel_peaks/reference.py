"""The specification of `channel_peaks` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def channel_peaks(x: Tensor, reduce: str = "max") -> tuple[Tensor, Tensor]:
    """x [N, C, H, W] -> values [N, C] in x's dtype, positions [N, C] int32 = y * W + x of the first maximum.

    `reduce` is "max", "sum" or "mean": what `values` holds; positions are those of the maximum in each case.
    A NaN counts as the maximum, the first NaN wins. Sums of halves accumulate in float32.
    """
    flat = x.flatten(2)
    top = flat.amax(2, keepdim=True)
    is_peak = (flat == top) | flat.isnan()
    cells = torch.arange(flat.shape[2], device=x.device, dtype=torch.int32)
    positions = torch.where(is_peak, cells, flat.shape[2]).amin(2).to(torch.int32)
    if reduce == "max":
        return top.squeeze(2), positions
    wide = flat.double() if x.dtype == torch.float64 else flat.float()
    total = wide.sum(2)
    return (total if reduce == "sum" else total / flat.shape[2]).to(x.dtype), positions
