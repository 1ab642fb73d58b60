"""`conv2d_windows` as an implicit matrix product: every operand row is read from the patch or from the map, where it lies.

Rows are output cells of all units, columns output channels, and the sum runs over taps and input channels. A row's cell for a
tap is one address, chosen between two; the channels behind it lie side by side in either.
"""

# mypy: disallow-untyped-defs=False, disable-error-code=has-type
from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from conelens.kernels.conv2d_windows.reference import window_size
from conelens.kernels.conv2d_windows.triton_configs import gemm_config, problem_of

Pair = tuple[int, int]
MOST_TAPS = 16  # per axis: a bit each


@triton.jit
def _corner(origin_ptr, unit, ok, AXIS: tl.constexpr):
    """One coordinate of each unit's origin in 32 bits: beyond any map it does not matter how far."""
    FAR: tl.constexpr = 1 << 29
    place = tl.load(origin_ptr + unit * 2 + AXIS, mask=ok, other=0).to(tl.int64)
    return tl.minimum(tl.maximum(place, -FAR), FAR).to(tl.int32)


@triton.jit
def _taps_within(first, size, TAPS: tl.constexpr, D: tl.constexpr):
    """Bit t: does tap t of a filter whose first tap is at cell `first` fall on [0, size)?"""
    bits = tl.zeros_like(first)
    for t in tl.static_range(TAPS):
        cell = first + t * D
        bits |= ((cell >= 0) & (cell < size)).to(tl.int32) << t
    return bits


# sizes differ from call to call: compiled once for all of them
_ANY = ["total", "samples", "map_h", "map_w", "patch_h", "patch_w", "out_h", "out_w"]


@triton.jit(do_not_specialize=_ANY)
def conv2d_windows_kernel(
    base_ptr, patch_ptr, w_ptr, bias_ptr, out_ptr, rows_ptr, patch_origin_ptr, window_origin_ptr, total,
    samples, map_h, map_w, patch_h, patch_w, out_h, out_w, c_in, c_out,
    b_n, b_h, b_w, p_n, p_h, p_w, o_n, o_c, o_h, o_w,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    ROWS: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """One tile of BM output cells (rows, across units) by BN output channels.

    base and patch have unit channel stride; w is [c_out, KH * KW, c_in], the memory of channels_last filters.
    """
    tiles_n = tl.cdiv(c_out, BN)
    tile_m = tl.program_id(0) // tiles_n
    tile_n = tl.program_id(0) % tiles_n
    row = tile_m.to(total.dtype) * BM + tl.arange(0, BM)
    row_ok = row < total
    ox = (row % out_w).to(tl.int32)
    oy = (row // out_w % out_h).to(tl.int32)
    unit = (row // out_w // out_h).to(tl.int64)

    map_y = _corner(window_origin_ptr, unit, row_ok, 0) + oy * SH
    map_x = _corner(window_origin_ptr, unit, row_ok, 1) + ox * SW
    patch_y = map_y - _corner(patch_origin_ptr, unit, row_ok, 0)
    patch_x = map_x - _corner(patch_origin_ptr, unit, row_ok, 1)
    sample = unit
    on_map_y = _taps_within(map_y, map_h, KH, DH)
    on_map_x = _taps_within(map_x, map_w, KW, DW)
    known = row_ok
    if ROWS:
        sample = tl.load(rows_ptr + unit, mask=row_ok, other=0).to(tl.int64)
        known = known & (sample >= 0) & (sample < samples)
    on_map_y = tl.where(known, on_map_y, 0)
    HALF: tl.constexpr = 16
    # both questions about a tap are answered by one shift and one AND in the loop: low half on the map, high half in the patch
    taps_y = on_map_y | (_taps_within(patch_y, patch_h, KH, DH) << HALF)
    taps_x = on_map_x | (_taps_within(patch_x, patch_w, KW, DW) << HALF)
    base_row = base_ptr + (sample * b_n + map_y.to(tl.int64) * b_h + map_x.to(tl.int64) * b_w)
    patch_row = patch_ptr + (unit * p_n + patch_y.to(tl.int64) * p_h + patch_x.to(tl.int64) * p_w)

    column = tile_n * BN + tl.arange(0, BN)
    column_ok = column < c_out
    w_column = w_ptr + column.to(tl.int64) * (KH * KW) * c_in
    acc = tl.zeros([BM, BN], tl.float32)
    for step in range(tl.cdiv(c_in, BK) * (KH * KW)):
        block = step // (KH * KW)  # taps run fastest: neighbouring taps find the same cells in the cache
        tap = step - block * (KH * KW)
        ky = tap // KW
        kx = tap - ky * KW
        found = (taps_y >> ky) & (taps_x >> kx)
        inside = (found & 1) != 0
        covered = (found & (1 << HALF)) != 0
        in_patch = ky * DH * p_h + kx * DW * p_w
        on_map = ky * DH * b_h + kx * DW * b_w
        source = tl.where(covered, patch_row + in_patch, base_row + on_map)
        k = block * BK + tl.arange(0, BK)
        k_ok = (tl.arange(0, BK) < BK) if EVEN_K else (k < c_in)
        a = tl.load(source[:, None] + k[None, :], mask=inside[:, None] & k_ok[None, :], other=0.0)
        b = tl.load(w_column[None, :] + (tap * c_in + k)[:, None], mask=k_ok[:, None] & column_ok[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(bias_ptr + column, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)  # NaN stays
    cell = unit * o_n + oy.to(tl.int64) * o_h + ox.to(tl.int64) * o_w
    target = out_ptr + cell[:, None] + column.to(tl.int64)[None, :] * o_c
    tl.store(target, acc.to(out_ptr.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])


def supports(base: Tensor, *rest: Any) -> str | None:
    """Why these arguments of the operator's schema cannot run in Triton, or None."""
    if len(rest) > 3 and max(rest[3].shape[2:]) > MOST_TAPS:
        return f"the Triton kernel takes filters up to {MOST_TAPS} cells wide, got {list(rest[3].shape[2:])}"
    if base.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the Triton kernel takes float32, float16 and bfloat16, got {base.dtype}"
    return None


def run(
    base: Tensor,
    patch: Tensor,
    patch_origin: Tensor,
    window_origin: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    dilation: Pair,
    out_size: Pair,
    rows: Tensor | None,
    relu: bool,
    out: Tensor | None = None,
) -> Tensor:
    """The operator's schema on the current stream; `out` may have any strides, a fresh one has base's layout.

    Maps and filters that are not channels_last are copied first.
    """
    units, c_out, kernel = patch.shape[0], weight.shape[0], (weight.shape[2], weight.shape[3])
    if out is None:
        layout = torch.channels_last if base.stride(1) == 1 and base.stride(3) != 1 else torch.contiguous_format
        out = torch.empty((units, c_out, *out_size), dtype=base.dtype, device=base.device, memory_format=layout)
    if out.numel() == 0:
        return out
    base, patch = (x if x.stride(1) == 1 else x.contiguous(memory_format=torch.channels_last) for x in (base, patch))
    weight = weight.contiguous(memory_format=torch.channels_last)
    problem = problem_of(base, units, weight, bias, out_size, window_size(out_size, kernel, stride, dilation), relu)
    tile = gemm_config(problem)
    tiles = math.ceil(problem.cells / tile.block_m) * math.ceil(c_out / tile.block_n)
    between_samples = 0 if rows is None and base.shape[0] == 1 else base.stride(0)
    with torch.cuda.device(base.device) if base.is_cuda else contextlib.nullcontext():
        conv2d_windows_kernel[(tiles,)](
            base, patch, weight, weight if bias is None else bias, out, window_origin if rows is None else rows,
            patch_origin.contiguous(), window_origin.contiguous(), problem.cells,
            base.shape[0], *base.shape[2:], *patch.shape[2:], *out_size, problem.c_in, c_out,
            between_samples, *base.stride()[2:], patch.stride(0), *patch.stride()[2:], *out.stride(),
            KH=kernel[0], KW=kernel[1], SH=stride[0], SW=stride[1], DH=dilation[0], DW=dilation[1],
            ROWS=rows is not None, BIAS=bias is not None, RELU=relu,
            PRECISION="ieee" if problem.exact_float32 else "tf32",
            BM=tile.block_m, BN=tile.block_n, BK=tile.block_k, EVEN_K=problem.c_in % tile.block_k == 0,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out
