"""Specification of collapse_parents in plain PyTorch. See README.md for the rules."""

from __future__ import annotations

from torch import Tensor


def collapse_parents(displacement: Tensor, sigma: Tensor, edges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """displacement [I,U,2], sigma [U], edges [V,M] -> shift [I,V,2], sigma [V], log_agreement [I,V]."""
    precision = sigma.reciprocal().square()[edges.long()]  # [V, M]
    moved = displacement[:, edges.long()]  # [I, V, M, 2]
    share = precision / precision.sum(-1, keepdim=True)
    shift = (share[..., None] * moved).sum(-2)
    spread = (moved - shift[..., None, :]).square().sum(-1)  # [I, V, M]
    return shift, precision.mean(-1).rsqrt(), -0.5 * (precision * spread).mean(-1)
