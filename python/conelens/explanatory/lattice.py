"""The E-step on the release's domain: 6 x 6 points in a window round each node, over smoothed activity; plain PyTorch.

What the release (`zqs1022/explanatoryGraph`) computes, without its errors: the smoothing weights of a point add up to one and
know its place between cells, densities of the other nodes are exact, windows are each node's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from conelens import ops
from conelens.explanatory.features import Grid

_POINTS = 6  # per axis
_WINDOW = 0.3  # of the map: largest side of a window
_SMOOTH = 0.025  # of the map: deviation of the smoothing
_CELLS = 1 << 23  # of the largest table that is held at once


def lattice_mass(sigma: Tensor, spread: Tensor, grid: Grid) -> Tensor:
    """exp(-r^2 / (2 sigma^2)) summed over a node's points [D, K]; ``spread`` [D, K] sizes their windows, pixels."""
    along = [torch.exp(-offset.square() / (2 * sigma.square()[..., None])).sum(-1) for offset in _offsets(spread, grid)]
    return along[0] * along[1]


def lattice_step(
    features: Tensor, mean: Tensor, shift: Tensor | None, sigma: Tensor, weight: Tensor, tau: Tensor, grid: Grid, spread: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ``ops.graph_e_step`` with arg-max, over points instead of units; ``spread`` [D, K] sizes their windows, pixels.

    -> mass [I,D,K], first [I,D,K,2], second [I,D,K], log_likelihood [I,D] (of the whole map's units), positions [I,D,K,2] in
    pixels, scores [I,D,K].
    """
    units = ops.graph_e_step(features, mean, shift, sigma, weight, tau, grid=grid.numbers)
    centre = (mean if shift is None else mean + shift).expand(len(features), *mean.shape)
    offsets = _offsets(spread, grid)
    each = sigma.numel() * _POINTS * max(sigma.shape[1], *grid.size)
    at_once = max(1, _CELLS // each)
    split = zip(*(part.split(at_once) for part in (features, centre, weight, tau)), strict=True)
    parts = [_step(f, c, w, t, sigma, offsets, grid) for f, c, w, t in split]
    mass, first, second, positions, scores = (torch.cat(part) for part in zip(*parts, strict=True))
    return mass, first, second, units.log_likelihood, positions, scores


def _offsets(spread: Tensor, grid: Grid) -> list[Tensor]:
    """Where a node's points lie from its centre along each axis, 2 x [D, K, 6] pixels."""
    middles = (torch.arange(_POINTS, device=spread.device) * 2 - (_POINTS - 1)).to(spread) / _POINTS
    halves = (
        (3 * spread / step).clamp(max=_WINDOW * cells / 2).round().clamp(min=1) * step
        for cells, step in zip(grid.size, grid.step, strict=True)
    )
    return [half[..., None] * middles for half in halves]


def _step(
    features: Tensor, centre: Tensor, weight: Tensor, tau: Tensor, sigma: Tensor, offsets: list[Tensor], grid: Grid
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    seen, density = [], []
    for axis in (0, 1):
        cells, step = grid.size[axis], grid.step[axis]
        point = centre[..., axis, None] + offsets[axis]  # [I, D, K, 6]
        seen.append(_weights((point - grid.start[axis]) / step, cells, _SMOOTH * cells))
        apart = point[:, :, None] - centre[..., axis][:, :, :, None, None]  # [I, D, U, K, 6]: from every node of the filter
        density.append(torch.exp(-apart.square() / (2 * sigma.square()[..., None, None])))
    activity = torch.einsum("idkay,idyx,idkbx->idkab", seen[0], features.to(centre.dtype).clamp(min=0), seen[1])
    total = torch.einsum("idu,iduka,idukb->idkab", weight, density[0], density[1]) + tau[:, None, None, None, None]
    own = [torch.diagonal(part, dim1=2, dim2=3).movedim(-1, 2) for part in density]  # [I, D, K, 6]
    mine = weight[..., None, None] * own[0][..., :, None] * own[1][..., None, :]
    owned = mine * torch.where(activity > 0, activity / total, 0)
    along = owned.sum(-1), owned.sum(-2)
    first = torch.stack([(part * offset).sum(-1) for part, offset in zip(along, offsets, strict=True)], -1)
    second = sum((part * offset.square()).sum(-1) for part, offset in zip(along, offsets, strict=True))
    scores, best = (mine * activity).flatten(-2).max(-1)
    chosen = (best // _POINTS, best % _POINTS)
    moved = [o.expand(*best.shape, -1).gather(-1, c[..., None])[..., 0] for o, c in zip(offsets, chosen, strict=True)]
    positions = centre + torch.stack(moved, -1).masked_fill((scores == 0)[..., None], 0)
    return owned.sum((-2, -1)), first, torch.as_tensor(second), positions, scores


def _weights(place: Tensor, cells: int, deviation: float) -> Tensor:
    """Gaussian weights [..., cells] of a map's cells for points ``place`` [...], in cells; one in sum on an endless map."""
    near = torch.arange(-int(3 * deviation) - 2, cells + int(3 * deviation) + 2, device=place.device)
    weights = torch.exp(-(place[..., None] - near).square() / (2 * deviation**2))
    inside = (near >= 0) & (near < cells)
    return weights[..., inside] / weights.sum(-1, keepdim=True).clamp(min=1e-30)
