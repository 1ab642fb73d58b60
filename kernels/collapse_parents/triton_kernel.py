"""`collapse_parents` on CUDA: tiles of nodes by images; a parent's displacements lie side by side."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

Results = tuple[Tensor, Tensor, Tensor]
NODES = 32  # of a program
MOST_IMAGES = 32  # of a program: rows of 128 bytes


@triton.jit
def _parent(table_ptr, sigma_ptr, edge, ok, parents, images, image, seen):
    """Precision [BV] and displacement [BV, BI] of one parent of each node; NaN for a parent that is not there."""
    NAN: tl.constexpr = float("nan")
    known = ok & (edge >= 0) & (edge < parents)
    inverse = 1 / tl.load(sigma_ptr + edge, mask=known, other=NAN)
    place = table_ptr + edge.to(tl.int64)[:, None] * (2 * images) + image[None, :]
    there = known[:, None] & seen[None, :]
    return inverse * inverse, tl.load(place, mask=there, other=NAN), tl.load(place + images, mask=there, other=NAN)


@triton.jit
def _about(y, x, table_ptr, sigma_ptr, edges, ok, parents, images, image, seen, M: tl.constexpr):
    """Sums over a node's parents: precision [BV]; precision times the displacement from (y, x), and its square, [BV, BI]."""
    total = tl.zeros_like(tl.sum(y, 1))
    sum_y = tl.zeros_like(y)
    sum_x = tl.zeros_like(y)
    squares = tl.zeros_like(y)
    for k in range(M):
        edge = tl.load(edges + k, mask=ok, other=0)
        precision, py, px = _parent(table_ptr, sigma_ptr, edge, ok, parents, images, image, seen)
        dy = py - y
        dx = px - x
        total += precision
        sum_y += precision[:, None] * dy
        sum_x += precision[:, None] * dx
        squares += precision[:, None] * (dy * dy + dx * dx)
    return total, sum_y, sum_x, squares


@triton.jit(do_not_specialize=["nodes", "parents", "images"])
def collapse_parents_kernel(
    table_ptr, sigma_ptr, edges_ptr, shift_ptr, sigma_out_ptr, agreement_ptr, nodes, parents, images,
    M: tl.constexpr, BV: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """table is [parents, 2, images]. Two passes: a mean, about the first parent, so that parents who agree lose no digit;
    then, about that mean, what it lacks and the spread."""
    first = tl.program_id(0) * BV
    node = first + tl.arange(0, BV)
    ok = node < nodes
    image = tl.program_id(1) * BI + tl.arange(0, BI)
    seen = image < images
    edges = edges_ptr + node.to(tl.int64) * M

    edge = tl.load(edges, mask=ok, other=0)
    _, y, x = _parent(table_ptr, sigma_ptr, edge, ok, parents, images, image, seen)
    total, sum_y, sum_x, _ = _about(y, x, table_ptr, sigma_ptr, edges, ok, parents, images, image, seen, M)
    y += sum_y / total[:, None]
    x += sum_x / total[:, None]
    total, sum_y, sum_x, squares = _about(y, x, table_ptr, sigma_ptr, edges, ok, parents, images, image, seen, M)
    more_y = sum_y / total[:, None]
    more_x = sum_x / total[:, None]
    spread = squares - (more_y * sum_y + more_x * sum_x)
    spread = tl.where(spread < 0, 0.0, spread)  # NaN stays

    # turned around, so that a row of an image is written in one go
    row = image.to(tl.int64) * nodes
    moved = tl.reshape(tl.permute(tl.join(y + more_y, x + more_x), (1, 0, 2)), (BI, 2 * BV))
    pair = 2 * first + tl.arange(0, 2 * BV)
    tl.store(shift_ptr + 2 * row[:, None] + pair[None, :], moved, mask=seen[:, None] & (pair < 2 * nodes)[None, :])
    agreement = tl.trans(spread * (-0.5 / M))
    tl.store(agreement_ptr + row[:, None] + node[None, :], agreement, mask=seen[:, None] & ok[None, :])
    tl.store(sigma_out_ptr + node, tl.sqrt(M / total), mask=ok & (tl.program_id(1) == 0))


def supports(displacement: Tensor, *rest: Any) -> str | None:
    """Why these arguments of the operator's schema cannot run in Triton, or None."""
    if displacement.dtype != torch.float32:
        return f"the Triton kernel takes float32, got {displacement.dtype}"
    return None


def run(displacement: Tensor, sigma: Tensor, edges: Tensor, out: Results | None = None) -> Results:
    """The operator's schema on the current stream; displacements are turned around first."""
    (images, parents, _), (nodes, degree) = displacement.shape, edges.shape
    if out is None or not all(x.is_contiguous() for x in out):
        shapes = ((images, nodes, 2), (nodes,), (images, nodes))
        shift, sigma_out, agreement = (displacement.new_empty(shape) for shape in shapes)
        out = shift, sigma_out, agreement
    if nodes == 0:
        return out
    table = displacement.permute(1, 2, 0).resolve_neg().contiguous()
    block = min(MOST_IMAGES, max(1, triton.next_power_of_2(images)))
    grid = (triton.cdiv(nodes, NODES), max(1, triton.cdiv(images, block)))
    with torch.cuda.device(displacement.device) if displacement.is_cuda else contextlib.nullcontext():
        collapse_parents_kernel[grid](
            table, sigma.contiguous(), edges.contiguous(), *out, nodes, parents, images,
            M=degree, BV=NODES, BI=block, num_warps=4,
        )  # fmt: skip
    return out
