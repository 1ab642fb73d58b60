"""The quadratic criterion of edge_scores as matrix products: what CUDA runs. README.md says how exact that is."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1 << 24  # elements of the wider operand of one product


def squared_differences(displacement: Tensor, weight: Tensor, parent: Tensor, out: Tensor | None = None) -> Tensor:
    """displacement [I,V,2], weight [I,V], parent [I,U,2] -> sum over I of w |d - p|^2, [V,U]: below 0 only if a weight is."""
    nodes, parents = displacement.shape[1], parent.shape[1]
    if out is None:
        out = torch.empty((nodes, parents), dtype=displacement.dtype, device=displacement.device)
    if weight.is_cuda and torch.backends.cuda.matmul.allow_tf32:  # ten bits of the terms would not leave ten of the differences
        return out.copy_(squared_differences(displacement.double(), weight.double(), parent.double()))
    out.zero_()
    for images in range(0, weight.shape[0], block := max(1, _BLOCK // (3 * max(nodes, parents, 1)))):
        here = slice(images, images + block)
        _add_block(out, displacement[here], weight[here], parent[here])
    if weight.numel() > 0:
        out.clamp_(min=torch.where(weight.amin() < 0, -torch.inf, 0.0).to(out.dtype))  # nobody waits for a CUDA device
    return out


def _add_block(out: Tensor, displacement: Tensor, weight: Tensor, parent: Tensor) -> None:
    """w |d - p|^2 = w |d|^2 - 2 w d p + w |p|^2 about the parents' mean in each image: small numbers cancel less."""
    centre = parent.mean(1, keepdim=True)
    centre = torch.where(centre.isfinite(), centre, 0)  # one parent's NaN is its own column's alone
    d, p = displacement - centre, parent - centre
    of_nodes = torch.stack([weight * d[..., 0], weight * d[..., 1], weight], 1).flatten(0, 1)  # [3 I, V]
    of_parents = torch.stack([-2 * p[..., 0], -2 * p[..., 1], p.square().sum(-1)], 1).flatten(0, 1)  # [3 I, U]
    out += (weight * d.square().sum(-1)).sum(0)[:, None]
    out.addmm_(of_nodes.t(), of_parents)
