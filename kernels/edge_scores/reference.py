"""Specification of edge_scores in plain PyTorch: every difference written out. See README.md for the rules."""

from __future__ import annotations

import torch
from torch import Tensor


def edge_scores(displacement: Tensor, weight: Tensor, parent: Tensor, bandwidth: Tensor | None) -> Tensor:
    """displacement [I,V,2], weight [I,V], parent [I,U,2], bandwidth [V] or None -> [V,U]."""
    squares = (displacement[:, :, None] - parent[:, None]).square().sum(-1)  # [I, V, U]
    if bandwidth is None:
        return (weight[..., None] * squares).sum(0)
    return (weight[..., None] * torch.exp(-squares / (2 * bandwidth[:, None]))).sum(0)
