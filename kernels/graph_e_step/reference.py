"""Specification of graph_e_step in plain PyTorch: every density of every cell, written out. See README.md for the rules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def real_dtype(features: Tensor) -> torch.dtype:
    """Of everything but the features, which may be halves."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def graph_e_step(
    features: Tensor,
    mean: Tensor,
    shift: Tensor | None,
    sigma: Tensor,
    weight: Tensor,
    tau: Tensor,
    grid: Sequence[float],
    argmax: bool,
) -> Results:
    """features [I,D,H,W], mean [D,K,2], shift [I,D,K,2], sigma [D,K], weight [I,D,K], tau [I], grid (y0, x0, dy, dx)

    -> mass [I,D,K], first [I,D,K,2], second [I,D,K], log_likelihood [I,D], position [I,D,K] int32, score [I,D,K];
    the last two are empty without argmax.
    """
    height, width = features.shape[2:]
    real = real_dtype(features)
    activity = features.to(real).clamp(min=0)
    centre = mean.to(real) if shift is None else mean.to(real) + shift.to(real)
    y = grid[0] + grid[2] * torch.arange(height, dtype=real, device=features.device)
    x = grid[1] + grid[3] * torch.arange(width, dtype=real, device=features.device)
    dy = y - centre[..., 0, None]  # [I or none, D, K, H]
    dx = x - centre[..., 1, None]
    squares = dy.square()[..., :, None] + dx.square()[..., None, :]
    density = weight.to(real)[..., None, None] * torch.exp(-squares / (2 * sigma.to(real).square()[..., None, None]))
    total = density.sum(-3) + tau.to(real)[:, None, None, None]  # [I, D, H, W]
    total = total.masked_fill(total < torch.finfo(real).tiny, 0)  # so small that its digits are gone
    lit = activity != 0
    evidence = torch.where(lit & (total > 0), activity / total, torch.zeros_like(activity))
    owned = density * evidence[:, :, None]  # [I, D, K, H, W]: posterior times activity
    first = torch.stack(((owned * dy[..., :, None]).sum((-2, -1)), (owned * dx[..., None, :]).sum((-2, -1))), -1)
    likelihood = torch.where(lit, activity * total.log(), torch.zeros_like(activity)).sum((-2, -1))
    mass, second = owned.sum((-2, -1)), (owned * squares).sum((-2, -1))
    if not argmax:
        nothing = features.new_empty(0)
        return mass, first, second, likelihood, nothing.to(torch.int32), nothing.to(real)
    seen = (density * activity[:, :, None]).flatten(-2)
    score, position = seen.max(-1)  # of equals the first; NaN wins
    return mass, first, second, likelihood, position.to(torch.int32).masked_fill(score == 0, -1), score


def empty_results(features: Tensor, nodes: int, argmax: bool) -> Results:
    """Room for them; position and score are empty without an arg-max."""
    maps = features.shape[:2]
    real = real_dtype(features)
    of_nodes = (*maps, nodes)
    chosen = of_nodes if argmax else (0,)
    mass, second, score = (features.new_empty(shape, dtype=real) for shape in (of_nodes, of_nodes, chosen))
    first, likelihood = (features.new_empty(shape, dtype=real) for shape in ((*of_nodes, 2), maps))
    return mass, first, second, likelihood, features.new_empty(chosen, dtype=torch.int32), score
