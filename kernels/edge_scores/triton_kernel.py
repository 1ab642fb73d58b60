"""`edge_scores` on CUDA: the kernel criterion in one pass; squared differences go to the matrix product."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from conelens.kernels.edge_scores import products

LOG2E = 1.4426950408889634
NODES, PARENTS = 32, 64  # of a program
IMAGES = 128  # whose sum is added to the sum of the others


@triton.jit(do_not_specialize=["images", "nodes", "parents"])
def edge_scores_kernel(
    place_ptr, weight_ptr, parent_ptr, steepness_ptr, out_ptr, images, nodes, parents,
    BV: tl.constexpr, BU: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """One tile of nodes by parents, kept in registers while all images pass by; steepness is -log2(e) / 2b."""
    tiles_u = tl.cdiv(parents, BU)
    v = (tl.program_id(0) // tiles_u * BV + tl.arange(0, BV))[:, None]
    u = (tl.program_id(0) % tiles_u * BU + tl.arange(0, BU))[None, :]
    v_ok = v < nodes
    u_ok = u < parents
    steepness = tl.load(steepness_ptr + v, mask=v_ok, other=0.0)
    weights = weight_ptr + v
    places = place_ptr + 2 * v
    candidates = parent_ptr + 2 * u
    total = tl.zeros([BV, BU], tl.float32)
    for block in range(0, images, BI):
        part = tl.zeros([BV, BU], tl.float32)
        for _ in range(block, tl.minimum(block + BI, images)):
            weight = tl.load(weights, mask=v_ok, other=0.0)
            vy = tl.load(places, mask=v_ok, other=0.0)
            vx = tl.load(places + 1, mask=v_ok, other=0.0)
            uy = tl.load(candidates, mask=u_ok, other=0.0)
            ux = tl.load(candidates + 1, mask=u_ok, other=0.0)
            dy = uy - vy
            dx = ux - vx
            part += weight * tl.exp2((dy * dy + dx * dx) * steepness)
            weights += nodes
            places += 2 * nodes
            candidates += 2 * parents
        total += part
    tl.store(out_ptr + v.to(tl.int64) * parents + u, total, mask=v_ok & u_ok)


def supports(displacement: Tensor, *rest: Any) -> str | None:
    """Why these arguments of the operator's schema cannot run here, or None."""
    quadratic = len(rest) > 2 and rest[2] is None
    if displacement.dtype != torch.float32 and not quadratic:
        return f"the Triton kernel takes float32, got {displacement.dtype}"
    return None


def run(displacement: Tensor, weight: Tensor, parent: Tensor, bandwidth: Tensor | None, out: Tensor | None = None) -> Tensor:
    """The operator's schema on the current stream."""
    if bandwidth is None:
        return products.squared_differences(displacement, weight, parent, out)
    (images, nodes), parents = weight.shape, parent.shape[1]
    if out is None or not out.is_contiguous():
        out = displacement.new_empty((nodes, parents))
    if out.numel() == 0:
        return out
    steepness = -LOG2E / 2 / bandwidth
    displacement, weight, parent = (x.resolve_neg().contiguous() for x in (displacement, weight, parent))
    grid = (triton.cdiv(nodes, NODES) * triton.cdiv(parents, PARENTS),)
    with torch.cuda.device(displacement.device) if displacement.is_cuda else contextlib.nullcontext():
        edge_scores_kernel[grid](
            displacement, weight, parent, steepness, out, images, nodes, parents,
            BV=NODES, BU=PARENTS, BI=IMAGES, num_warps=4,
        )  # fmt: skip
    return out
