"""Checked-in tile sizes, and the choice between the Triton kernel and cuDNN.

Nothing is timed at run time: same input, same bits. Every entry comes from register, shared-memory and
traffic counts (benchmarks/NOTES.md) and none was measured yet; `make gpu` prints both times per bucket.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Pair = tuple[int, int]
FEW_CHANNELS = 4  # up to this many output channels bytes decide, and one product serves all taps


@dataclass(frozen=True)
class GemmConfig:
    """Tile of the implicit matrix product: output cells, output channels, input channels."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class FewConfig:
    """Tile of the few-output-channel kernel: map cells (y, x), taps per product, input channels."""

    tile_y: int
    tile_x: int
    slots: int
    block_k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Problem:
    """What the choice depends on. Channels are per group; `rows` = output cells of all samples."""

    c_in: int
    c_out: int
    groups: int
    rows: int
    item_bytes: int
    exact_float32: bool
    covering: int  # pooling windows over one map cell; 0 without a fused unpool
    windows: bool


def tf32_allowed() -> bool:
    """Whether torch's settings let a float32 convolution use tf32, most specific setting first."""
    backends = torch.backends
    for level in (getattr(backends.cudnn, "conv", None), backends.cudnn, backends):
        precision = getattr(level, "fp32_precision", "none")
        if precision != "none":
            return bool(precision == "tf32")
    return False


def problem_of(y: Tensor, weight: Tensor, out_cells: int, groups: int, pool: Sequence[int] | None, windows: bool) -> Problem:
    """The key of the tables for these arguments; `pool` = kernel, stride, padding, dilation, each y, x."""
    covering = 0
    if pool is not None:
        covering = math.prod(pool[6 + a] * (pool[a] - 1) // pool[2 + a] + 1 for a in (0, 1))
    return Problem(
        c_in=weight.shape[0] // groups,
        c_out=weight.shape[1],
        groups=groups,
        rows=y.shape[0] * out_cells,
        item_bytes=y.element_size(),
        exact_float32=y.dtype == torch.float32 and not tf32_allowed(),
        covering=covering,
        windows=windows,
    )


def _power_of_two(value: int, low: int, high: int) -> int:
    return min(high, max(low, 1 << math.ceil(math.log2(max(value, 1)))))


def gemm_config(problem: Problem) -> GemmConfig:
    """Tile sizes for the implicit matrix product, by output channels and element size."""
    half = problem.item_bytes == 2
    aligned = problem.c_in * problem.item_bytes % 16 == 0  # else single elements fill many more registers
    block_k = _power_of_two(problem.c_in, 16, 64 if half and aligned else 32)
    block_n = _power_of_two(problem.c_out, 16, 128 if half else 64)
    if problem.exact_float32:
        return GemmConfig(64, min(block_n, 64), min(block_k, 16), 4, 2)
    few_rows = problem.rows < 128 * 132  # not one full tile per multiprocessor: smaller tiles fill the card
    stages = 3 if problem.covering <= 1 else 2  # every covering window has its own staged tiles
    block_m, warps = (64, 4) if few_rows else (128, 8)
    return GemmConfig(block_m, block_n, block_k, warps, stages)


def few_config(problem: Problem, reach: Pair) -> FewConfig:
    """Tile sizes for at most four output channels; `reach` = cells from a phase's first tap to its last."""
    tile_y = _power_of_two(2 * reach[0] + 1, 8, 1024)
    tile_x = _power_of_two(2 * reach[1] + 1, 32, 1024)
    most = 64 if problem.item_bytes == 2 and problem.covering <= 1 else 32
    block_k = _power_of_two(problem.c_in, 16, most)
    return FewConfig(tile_y, tile_x, 8, block_k, 8, 1)


def prefer_triton(problem: Problem) -> bool:
    """Whether the Triton kernel is the default; otherwise unpool and rectify with our kernel, then cuDNN."""
    if problem.groups == 1 and problem.c_out <= FEW_CHANNELS:
        return True
    if problem.exact_float32 or problem.c_in < 16 or problem.c_out < 16:
        return False
    return problem.windows or (problem.covering == 1 and problem.c_in * problem.c_out <= 128 * 128)


def cuda_kernel_fits(y: Tensor, weight: Tensor, stride: Pair, groups: int, dilation: Pair) -> bool:
    """Whether `cuda.cu` takes these arguments (the signal, already unpooled): few output channels, to pixels."""
    c_in, c_out, kh, kw = weight.shape
    halves = y.dtype in (torch.float16, torch.bfloat16)
    plain = groups == 1 and tuple(stride) == (1, 1) and tuple(dilation) == (1, 1)
    small = kh <= 3 and kw <= 3 and kh * kw * c_out <= 28 and c_in % 32 == 0 and c_in <= 128
    rows = y.stride(1) == 1 and y.stride(3) != 1 and all(y.stride(axis) % 8 == 0 for axis in (0, 2, 3))
    return halves and plain and small and rows and y.data_ptr() % 16 == 0
