"""`graph_e_step` on CUDA: one program per channel of an image, with everything between features and sums in registers.

Sums of densities and moments are three small matrix products on the tensor cores, each float32 factor as two tf32 numbers and
each product as three (tf32x3): the accuracy of float32. The arg-max has no product; it passes over the rows once more, in L1.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from conelens.kernels.graph_e_step.reference import Results, empty_results

MOST_CELLS, MOST_NODES = 2048, 64  # of a map padded to powers of two, and of nodes by the longer side; of nodes


@triton.jit
def _axis(mean_ptr, shift_ptr, shared, node, ok, start, step, narrow, cells, AXIS: tl.constexpr, SHIFT: tl.constexpr):
    """Centre of each node on one axis, each cell's distance from it, and the Gaussian of that, [nodes, cells]."""
    centre = tl.load(mean_ptr + 2 * shared + AXIS, mask=ok, other=0.0)
    if SHIFT:
        centre += tl.load(shift_ptr + 2 * node + AXIS, mask=ok, other=0.0)
    off = (start + step * cells.to(tl.float32))[None, :] - centre[:, None]
    root = off * narrow[:, None]
    return centre, off, tl.exp2(-root * root)


@triton.jit(do_not_specialize=["channels", "height", "width", "nodes", "y0", "x0", "dy", "dx"])
def graph_e_step_kernel(
    features_ptr, mean_ptr, shift_ptr, sigma_ptr, weight_ptr, tau_ptr,
    mass_ptr, first_ptr, second_ptr, likelihood_ptr, position_ptr, score_ptr,
    channels, height, width, nodes, y0, x0, dy, dx, f_n, f_c, f_h, f_w, w_n, w_c, w_k,
    SHIFT: tl.constexpr, ARGMAX: tl.constexpr, PRECISION: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """H, W, K: powers of two that hold height, width and nodes. Padded cells are dark, padded nodes have no weight."""
    TINY: tl.constexpr = 2.0**-126  # smaller sums have lost their digits and count as none
    NOWHERE: tl.constexpr = 2**31 - 1
    plane = tl.program_id(0).to(tl.int64)
    image = plane // channels
    channel = plane % channels
    y = tl.arange(0, H)
    x = tl.arange(0, W)
    k = tl.arange(0, K)
    ok = k < nodes
    node = plane * nodes + k
    shared = channel * nodes + k

    corner = features_ptr + image * f_n + channel * f_c
    inside = (y < height)[:, None] & (x < width)[None, :]
    cells = corner + y.to(tl.int64)[:, None] * f_h + x.to(tl.int64)[None, :] * f_w
    activity = tl.load(cells, mask=inside, other=0.0).to(tl.float32)
    activity = tl.where(activity < 0, 0.0, activity)  # NaN stays
    narrow = 0.84932180028801904 / tl.load(sigma_ptr + shared, mask=ok, other=1.0)  # sqrt(log2(e) / 2)
    weight = tl.load(weight_ptr + image * w_n + channel * w_c + k.to(tl.int64) * w_k, mask=ok, other=0.0)
    centre, off_y, row = _axis(mean_ptr, shift_ptr, shared, node, ok, y0, dy, narrow, y, 0, SHIFT)
    _, off_x, column = _axis(mean_ptr, shift_ptr, shared, node, ok, x0, dx, narrow, x, 1, SHIFT)
    row = weight[:, None] * row

    total = tl.dot(tl.trans(row), column, input_precision=PRECISION) + tl.load(tau_ptr + image)
    total = tl.where(total < TINY, 0.0, total)
    lit = activity != 0
    evidence = tl.where(lit & (total > 0), activity / total, 0.0)
    likelihood = tl.where(lit, activity * tl.log(total), 0.0)
    tl.store(likelihood_ptr + plane, tl.sum(tl.sum(likelihood, 1), 0))

    down = tl.dot(row, evidence, input_precision=PRECISION) * column  # evidence summed over rows: [K, W]
    along = tl.dot(column, tl.trans(evidence), input_precision=PRECISION) * row  # and over columns: [K, H]
    mass = tl.sum(down, 1)
    moment_y = along * off_y
    moment_x = down * off_x
    tl.store(mass_ptr + node, mass, mask=ok)
    tl.store(first_ptr + 2 * node, tl.sum(moment_y, 1), mask=ok)
    tl.store(first_ptr + 2 * node + 1, tl.sum(moment_x, 1), mask=ok)
    if H == W:
        second = tl.sum(moment_y * off_y + moment_x * off_x, 1)
    else:
        second = tl.sum(moment_y * off_y, 1) + tl.sum(moment_x * off_x, 1)
    tl.store(second_ptr + node, second, mask=ok)

    if ARGMAX:
        best = tl.zeros([K, W], tl.float32)
        at = tl.zeros([K, W], tl.int32)
        line = corner + x.to(tl.int64) * f_w
        for i in range(height):
            bright = tl.load(line, mask=x < width, other=0.0).to(tl.float32)
            line += f_h
            root = (y0 + dy * i - centre) * narrow
            seen = (weight * tl.exp2(-root * root))[:, None] * column * bright[None, :]
            better = seen > best  # of equals the first
            best = tl.where(better, seen, best)
            at = tl.where(better, i, at)
        score = tl.max(best, 1)
        place = tl.min(tl.where(best == score[:, None], at * width + x[None, :], NOWHERE), 1)
        place = tl.where(score > 0, place, -1)
        first_nan = tl.min(tl.where(activity != activity, y[:, None] * width + x[None, :], NOWHERE))
        unknown = mass != mass  # NaN counts as the largest
        tl.store(score_ptr + node, tl.where(unknown, mass, score), mask=ok)
        tl.store(position_ptr + node, tl.where(unknown, tl.where(first_nan == NOWHERE, 0, first_nan), place), mask=ok)


def _blocks(features: Tensor, nodes: int) -> tuple[int, int, int]:
    """Height, width and nodes as powers of two, at least 16: what the tensor cores take."""
    height, width, nodes = (max(16, triton.next_power_of_2(n)) for n in (features.shape[2], features.shape[3], nodes))
    return height, width, nodes


def _largest(height: int, width: int, nodes: int) -> int:
    return max(height * width, nodes * max(height, width))


def _warps(largest: int, argmax: bool) -> int:
    """As few as hold the blocks without spilling: more of them share less of the operands and compute more indices."""
    return 1 if largest <= 512 else 4 if largest > 1024 and argmax else 2


def supports(features: Tensor, *rest: Any) -> str | None:
    """Why these arguments of the operator's schema cannot run in Triton, or None."""
    if features.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the Triton kernel takes float32, float16 and bfloat16, got {features.dtype}"
    nodes = rest[2].shape[1] if len(rest) > 2 else 1
    if nodes > MOST_NODES or _largest(*_blocks(features, nodes)) > MOST_CELLS:
        return f"a map of {list(features.shape[2:])} with {nodes} nodes per channel does not fit the registers of one program"
    return None


def run(
    features: Tensor,
    mean: Tensor,
    shift: Tensor | None,
    sigma: Tensor,
    weight: Tensor,
    tau: Tensor,
    grid: Sequence[float],
    argmax: bool,
    out: Results | None = None,
) -> Results:
    """The operator's schema on the current stream; features and weight may have any strides."""
    images, channels, height, width = features.shape
    nodes = sigma.shape[1]
    if out is None or not all(x.is_contiguous() for x in out):
        out = empty_results(features, nodes, argmax)
    if images * channels == 0:
        return out
    blocks = _blocks(features, nodes)
    features, weight, mean, sigma, tau = (x.resolve_neg() for x in (features, weight, mean, sigma, tau))
    shift = mean if shift is None else shift.contiguous()
    with torch.cuda.device(features.device) if features.is_cuda else contextlib.nullcontext():
        graph_e_step_kernel[(images * channels,)](
            features, mean.contiguous(), shift, sigma.contiguous(), weight, tau.contiguous(), *out,
            channels, height, width, nodes, *map(float, grid), *features.stride(), *weight.stride(),
            SHIFT=shift is not mean, ARGMAX=argmax, PRECISION="tf32x3",
            H=blocks[0], W=blocks[1], K=blocks[2], num_warps=_warps(_largest(*blocks), argmax), num_stages=1,
        )  # fmt: skip
    return out
