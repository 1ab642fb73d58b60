"""Checked-in tile sizes, and the choice between the Triton kernel and gathering the windows for cuDNN.

Nothing is timed at run time: same input, same bits. Every number here is predicted and none was measured yet: the tiles come
from register and shared-memory counts, the choice from the bytes and operations of both ways. `make gpu` prints both times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from conelens.kernels.deconv2d.triton_configs import GemmConfig, tf32_allowed

Pair = tuple[int, int]

COPY = 4.3e12  # bytes per second, read and written
MATRIX = {2: 7.9e14, 4: 3.9e14}  # operations per second of a large matrix product, by bytes of an element (4: tf32)
CUDNN_SHARE = 0.75  # of MATRIX, for stacked windows in channels_last
TRITON_SHARE = 0.55  # addresses of two sources are computed beside the products
MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Problem:
    """What the choice depends on; ``cells`` = output cells of all units, ``window_cells`` = cells that they read."""

    c_in: int
    c_out: int
    taps: int
    cells: int
    window_cells: int
    item_bytes: int
    exact_float32: bool
    bias: bool
    relu: bool


def problem_of(
    base: Tensor, units: int, weight: Tensor, bias: Tensor | None, out_size: Pair, window: Pair, relu: bool
) -> Problem:
    """The key of the tables for these arguments."""
    return Problem(
        c_in=weight.shape[1],
        c_out=weight.shape[0],
        taps=weight.shape[2] * weight.shape[3],
        cells=units * out_size[0] * out_size[1],
        window_cells=units * window[0] * window[1],
        item_bytes=base.element_size(),
        exact_float32=base.dtype == torch.float32 and not tf32_allowed(),
        bias=bias is not None,
        relu=relu,
    )


def gemm_config(problem: Problem) -> GemmConfig:
    """Tile of output cells x output channels x input channels.

    Larger tiles, and 128 x 128 in tf32, make ptxas wait after every single product (its warning C7515).
    """
    half = problem.item_bytes == 2
    aligned = problem.c_in * problem.item_bytes % 16 == 0
    block_n = _power_of_two(problem.c_out, 16, 128)
    block_k = _power_of_two(problem.c_in, 16, 64 if half else 32)
    if problem.exact_float32:
        return GemmConfig(64, min(block_n, 64), min(block_k, 16), 4, 2)
    if not aligned:  # single elements fill many more registers
        return GemmConfig(64, min(block_n, 64), 16, 4, 2)
    few = math.ceil(problem.cells / 128) * math.ceil(problem.c_out / block_n) < MULTIPROCESSORS
    if few:  # smaller tiles fill the card
        return GemmConfig(64, min(block_n, 64), block_k, 4, 4)
    return GemmConfig(128, block_n, block_k, 8, 4) if half else GemmConfig(64, block_n, block_k, 4, 3)


def prefer_triton(problem: Problem) -> bool:
    """Does leaving out the passes over memory gain more than cuDNN's faster products do?

    cuDNN's way writes the windows and reads them, and passes over the result for the bias and for the ReLU.
    """
    if problem.exact_float32 or problem.item_bytes not in MATRIX:
        return False
    if problem.c_in < 16 or problem.c_in * problem.item_bytes % 16 or problem.c_out < 16:
        return False
    operations = 2.0 * problem.taps * problem.c_in * problem.c_out * problem.cells / MATRIX[problem.item_bytes]
    windows = 2 * problem.c_in * problem.window_cells
    results = 2 * (problem.bias + problem.relu) * problem.c_out * problem.cells
    passes = (windows + results) * problem.item_bytes / COPY
    moved = (problem.c_in * problem.window_cells + problem.c_out * problem.cells) * problem.item_bytes / COPY
    return max(operations / TRITON_SHARE, moved) < max(operations / CUDNN_SHARE, moved) + passes


def _power_of_two(value: int, low: int, high: int) -> int:
    return min(high, max(low, 1 << math.ceil(math.log2(max(value, 1)))))
