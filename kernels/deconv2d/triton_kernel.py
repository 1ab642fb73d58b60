"""`deconv2d` as an implicit matrix product: the operand is built on load from pooled values and switches.

A transposed convolution of stride s is s_y * s_x independent convolutions of stride 1, one per output *phase*
(Y mod s_y, X mod s_x), each with its own subset of the filter's taps; one grid axis runs over the phases.
Inside a phase, output cell q reads map cell q + base - i * step for the i-th tap of the phase.

With `origin` everything is computed in window coordinates, where all padding is zero; the origin only masks.
"""

# mypy: disallow-untyped-defs=False, disable-error-code=has-type
from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from conelens.kernels.deconv2d.triton_configs import FEW_CHANNELS, few_config, gemm_config, problem_of
from conelens.kernels.max_unpool2d.reference import natural_size

Pair = tuple[int, int]
Pool = Sequence[int]  # kernel y, x, stride y, x, padding y, x, dilation y, x


@triton.jit
def _phase_taps(phase, pad, K: tl.constexpr, S: tl.constexpr, D: tl.constexpr, STRIDE_TAPS: tl.constexpr):
    """First tap, number of taps and base offset of one axis of an output phase."""
    first = K
    for back in tl.static_range(STRIDE_TAPS):
        tap = STRIDE_TAPS - 1 - back
        first = tl.where((phase + pad - D * tap) % S == 0, tap, first)
    count = (K - first + STRIDE_TAPS - 1) // STRIDE_TAPS
    return first, count, (phase + pad - D * first) // S


@triton.jit
def _operand(
    y_ptr, switch_ptr, sample, my, mx, inside, channel, channel_ok,
    h, w, y_n, y_c, y_h, y_w, s_n, s_c, s_h, s_w, pool_pad_y, pool_pad_x,
    POOL: tl.constexpr, PKH: tl.constexpr, PKW: tl.constexpr, PSH: tl.constexpr, PSW: tl.constexpr,
    PDH: tl.constexpr, PDW: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """relu(unpool(y)) at map cells (my, mx) [rows] and `channel` [columns]; zero where `inside` is false."""
    if POOL:
        COVER_Y: tl.constexpr = PDH * (PKH - 1) // PSH + 1
        COVER_X: tl.constexpr = PDW * (PKW - 1) // PSW + 1
        for jy in tl.static_range(COVER_Y):
            for jx in tl.static_range(COVER_X):
                py = (my + pool_pad_y) // PSH - jy
                px = (mx + pool_pad_x) // PSW - jx
                ry = my + pool_pad_y - py * PSH
                rx = mx + pool_pad_x - px * PSW
                ok = inside & (py >= 0) & (py < h) & (px >= 0) & (px < w)
                ok = ok & (ry % PDH == 0) & (ry // PDH < PKH) & (rx % PDW == 0) & (rx // PDW < PKW)
                tap = (ry // PDH) * PKW + rx // PDW
                mask = ok[:, None] & channel_ok[None, :]
                cell = sample * y_n + py.to(tl.int64) * y_h + px.to(tl.int64) * y_w
                value = tl.load(y_ptr + cell[:, None] + channel[None, :] * y_c, mask=mask, other=0.0)
                cell = sample * s_n + py.to(tl.int64) * s_h + px.to(tl.int64) * s_w
                switch = tl.load(switch_ptr + cell[:, None] + channel[None, :] * s_c, mask=mask, other=0)
                value = tl.where(switch.to(tl.int32) == tap[:, None], value, 0.0)
                if COVER_Y * COVER_X > 1:  # overlapping windows add, in float32
                    value = value.to(tl.float32)
                total = value if jy + jx == 0 else total + value  # noqa: F821
    else:
        mask = inside[:, None] & channel_ok[None, :]
        cell = sample * y_n + my.to(tl.int64) * y_h + mx.to(tl.int64) * y_w
        total = tl.load(y_ptr + cell[:, None] + channel[None, :] * y_c, mask=mask, other=0.0)
    if RELU:
        total = tl.where(total < 0, 0.0, total)
    return total.to(y_ptr.dtype.element_ty)


@triton.jit
def deconv2d_kernel(
    y_ptr, switch_ptr, w_ptr, out_ptr, origin_ptr, rows_total,
    h, w, window_h, window_w, map_h, map_w, out_h, out_w, full_h, full_w, c_in, c_out,
    pad_y, pad_x, pool_pad_y, pool_pad_x,
    y_n, y_h, y_w, s_n, s_h, s_w, o_n, o_c, o_h, o_w,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr,
    POOL: tl.constexpr, PKH: tl.constexpr, PKW: tl.constexpr, PSH: tl.constexpr, PSW: tl.constexpr,
    PDH: tl.constexpr, PDW: tl.constexpr, RELU: tl.constexpr, ORIGIN: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """One tile of BM output cells of a phase (rows, across samples) by BN output channels of a group.

    y and switches have unit channel stride; w is packed [groups, KH * KW, c_out, c_in]; TAPS_* = taps between
    two taps of the same phase.
    """
    tiles_n = tl.cdiv(c_out, BN)
    tile_m = tl.program_id(0) // tiles_n
    tile_n = tl.program_id(0) % tiles_n
    group = tl.program_id(1)
    phase_y = tl.program_id(2) // SW
    phase_x = tl.program_id(2) % SW
    first_y, count_y, base_y = _phase_taps(phase_y, 0 if ORIGIN else pad_y, KH, SH, DH, TAPS_Y)
    first_x, count_x, base_x = _phase_taps(phase_x, 0 if ORIGIN else pad_x, KW, SW, DW, TAPS_X)

    q_h = tl.cdiv(out_h, SH)
    q_w = tl.cdiv(out_w, SW)
    row = tile_m.to(rows_total.dtype) * BM + tl.arange(0, BM)
    qx = (row % q_w).to(tl.int32)
    qy = (row // q_w % q_h).to(tl.int32)
    sample = (row // q_w // q_h).to(tl.int64)
    row_ok = row < rows_total
    map_y = tl.zeros([BM], tl.int32)
    map_x = tl.zeros([BM], tl.int32)
    if ORIGIN:
        map_y += tl.load(origin_ptr + sample * 2, mask=row_ok, other=0).to(tl.int32)
        map_x += tl.load(origin_ptr + sample * 2 + 1, mask=row_ok, other=0).to(tl.int32)
        if POOL:
            map_y = map_y * PSH - pool_pad_y
            map_x = map_x * PSW - pool_pad_x

    column = tile_n * BN + tl.arange(0, BN)
    column_ok = column < c_out
    steps_c = tl.cdiv(c_in, BK)
    taps = count_y * count_x
    acc = tl.zeros([BM, BN], tl.float32)
    for step in range(steps_c * taps):
        block = step // taps  # taps run fastest: neighbouring taps find the same pooled cells in the cache
        tap = step - block * taps
        iy = tap // count_x
        ix = tap - iy * count_x
        my = qy + base_y - iy * (DH * TAPS_Y // SH)
        mx = qx + base_x - ix * (DW * TAPS_X // SW)
        inside = row_ok & (my >= 0) & (my < window_h) & (mx >= 0) & (mx < window_w)
        if ORIGIN:
            inside = inside & (my + map_y >= 0) & (my + map_y < map_h)
            inside = inside & (mx + map_x >= 0) & (mx + map_x < map_w)
        k = block * BK + tl.arange(0, BK)
        k_ok = (tl.arange(0, BK) < BK) if EVEN_K else (k < c_in)
        a = _operand(
            y_ptr, switch_ptr, sample, my, mx, inside, group * c_in + k, k_ok,
            h, w, y_n, 1, y_h, y_w, s_n, 1, s_h, s_w,
            0 if ORIGIN else pool_pad_y, 0 if ORIGIN else pool_pad_x,
            POOL, PKH, PKW, PSH, PSW, PDH, PDW, RELU,
        )  # fmt: skip
        filter_tap = (first_y + iy * TAPS_Y) * KW + first_x + ix * TAPS_X
        w_tile = ((group * (KH * KW) + filter_tap) * c_out + column).to(tl.int64) * c_in
        b = tl.load(w_ptr + k[:, None] + w_tile[None, :], mask=k_ok[:, None] & column_ok[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    oy = qy * SH + phase_y
    ox = qx * SW + phase_x
    if ORIGIN:
        fy = map_y * SH - pad_y + oy
        fx = map_x * SW - pad_x + ox
        on_map = (fy >= 0) & (fy < full_h) & (fx >= 0) & (fx < full_w)
        acc = tl.where(on_map[:, None], acc, 0.0)
    cell = sample * o_n + oy.to(tl.int64) * o_h + ox.to(tl.int64) * o_w
    channel = (group * c_out + column).to(tl.int64) * o_c
    keep = (row_ok & (oy < out_h) & (ox < out_w))[:, None] & column_ok[None, :]
    tl.store(out_ptr + cell[:, None] + channel[None, :], acc.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def deconv2d_few_kernel(
    y_ptr, switch_ptr, w_ptr, out_ptr, origin_ptr,
    h, w, window_h, window_w, map_h, map_w, out_h, out_w, full_h, full_w, c_in, c_out,
    pad_y, pad_x, pool_pad_y, pool_pad_x,
    y_n, y_c, y_h, y_w, s_n, s_c, s_h, s_w, o_n, o_c, o_h, o_w,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr,
    POOL: tl.constexpr, PKH: tl.constexpr, PKW: tl.constexpr, PSH: tl.constexpr, PSW: tl.constexpr,
    PDH: tl.constexpr, PDW: tl.constexpr, RELU: tl.constexpr, ORIGIN: tl.constexpr,
    PRECISION: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, SLOTS: tl.constexpr,
    BK: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """A TILE_Y x TILE_X tile of map cells of one phase, read once, times the filters of SLOTS taps at a time.

    One product gives every map cell's contribution through every tap, [cells, SLOTS * 4]; a gather then moves
    each column to its output cell. Output tiles are smaller than the map tile by the filter's reach.
    """
    NY: tl.constexpr = (KH + TAPS_Y - 1) // TAPS_Y  # most taps a phase can have
    NX: tl.constexpr = (KW + TAPS_X - 1) // TAPS_X
    STEP_Y: tl.constexpr = DH * TAPS_Y // SH
    STEP_X: tl.constexpr = DW * TAPS_X // SW
    OUT_Y: tl.constexpr = TILE_Y - (NY - 1) * STEP_Y
    OUT_X: tl.constexpr = TILE_X - (NX - 1) * STEP_X
    CELLS: tl.constexpr = TILE_Y * TILE_X
    q_h = tl.cdiv(out_h, SH)
    q_w = tl.cdiv(out_w, SW)
    tiles_x = tl.cdiv(q_w, OUT_X)
    tiles = tiles_x * tl.cdiv(q_h, OUT_Y)
    phase = tl.program_id(0) % (SH * SW)  # phases of a tile run together: they read the same cells
    pid = tl.program_id(0) // (SH * SW)
    sample = (pid // tiles).to(tl.int64)
    tile_y = pid % tiles // tiles_x
    tile_x = pid % tiles_x
    phase_y = phase // SW
    phase_x = phase % SW
    first_y, count_y, base_y = _phase_taps(phase_y, 0 if ORIGIN else pad_y, KH, SH, DH, TAPS_Y)
    first_x, count_x, base_x = _phase_taps(phase_x, 0 if ORIGIN else pad_x, KW, SW, DW, TAPS_X)
    map_y = 0
    map_x = 0
    if ORIGIN:
        map_y = tl.load(origin_ptr + sample * 2).to(tl.int32)
        map_x = tl.load(origin_ptr + sample * 2 + 1).to(tl.int32)
        if POOL:
            map_y = map_y * PSH - pool_pad_y
            map_x = map_x * PSW - pool_pad_x

    cell = tl.arange(0, CELLS)
    cy = cell // TILE_X
    cx = cell % TILE_X
    my = tile_y * OUT_Y + base_y - (NY - 1) * STEP_Y + cy
    mx = tile_x * OUT_X + base_x - (NX - 1) * STEP_X + cx
    inside = (my >= 0) & (my < window_h) & (mx >= 0) & (mx < window_w)
    if ORIGIN:
        inside = inside & (my + map_y >= 0) & (my + map_y < map_h)
        inside = inside & (mx + map_x >= 0) & (mx + map_x < map_w)
    column = tl.arange(0, SLOTS * 4)
    co = column % 4
    out = tl.zeros([CELLS, 4], tl.float32)
    for group in tl.static_range((NY * NX + SLOTS - 1) // SLOTS):
        slot = group * SLOTS + column // 4
        iy = slot // NX
        ix = slot % NX
        filter_tap = (first_y + iy * TAPS_Y) * KW + first_x + ix * TAPS_X
        column_ok = (iy < count_y) & (ix < count_x) & (co < c_out)
        acc = tl.zeros([CELLS, SLOTS * 4], tl.float32)
        for start in range(0, c_in, BK):
            k = (start + tl.arange(0, BK)).to(tl.int64)
            k_ok = (tl.arange(0, BK) < BK) if EVEN_K else (k < c_in)
            a = _operand(
                y_ptr, switch_ptr, sample, my, mx, inside, k, k_ok,
                h, w, y_n, y_c, y_h, y_w, s_n, s_c, s_h, s_w,
                0 if ORIGIN else pool_pad_y, 0 if ORIGIN else pool_pad_x,
                POOL, PKH, PKW, PSH, PSW, PDH, PDW, RELU,
            )  # fmt: skip
            w_tile = (filter_tap * c_out + co) * c_in
            b_ok = k_ok[:, None] & column_ok[None, :]
            b = tl.load(w_ptr + k[:, None] + w_tile[None, :], mask=b_ok, other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        reach = (NY - 1 - iy) * (STEP_Y * TILE_X) + (NX - 1 - ix) * STEP_X
        source = tl.where(column_ok[None, :], cell[:, None] + reach[None, :], 0) % CELLS
        moved = tl.gather(acc, source, axis=0)
        moved = tl.where(column_ok[None, :], moved, 0.0)
        out += tl.sum(tl.reshape(moved, [CELLS, SLOTS, 4]), axis=1)

    oy = (tile_y * OUT_Y + cy) * SH + phase_y
    ox = (tile_x * OUT_X + cx) * SW + phase_x
    if ORIGIN:
        fy = map_y * SH - pad_y + oy
        fx = map_x * SW - pad_x + ox
        on_map = (fy >= 0) & (fy < full_h) & (fx >= 0) & (fx < full_w)
        out = tl.where(on_map[:, None], out, 0.0)
    channel = tl.arange(0, 4)
    target = sample * o_n + oy.to(tl.int64) * o_h + ox.to(tl.int64) * o_w
    target = target[:, None] + channel.to(tl.int64)[None, :] * o_c
    keep = ((cy < OUT_Y) & (cx < OUT_X) & (oy < out_h) & (ox < out_w))[:, None] & (channel < c_out)[None, :]
    tl.store(out_ptr + target, out.to(out_ptr.dtype.element_ty), mask=keep)


def supports(y: Tensor, weight: Tensor, *rest: object) -> str | None:
    """Why these arguments of the operator's schema cannot run in Triton, or None."""
    if y.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the Triton kernel takes float32, float16 and bfloat16, got {y.dtype}"
    return None


def run(
    y: Tensor,
    weight: Tensor,
    stride: Pair,
    padding: Pair,
    groups: int,
    dilation: Pair,
    output_size: Pair,
    map_size: Pair,
    pool: Pool | None,
    switches: Tensor | None,
    relu: bool,
    origin: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """The operator's schema on the current stream; `out` may have any strides, a fresh one has y's layout.

    The matrix product wants channels_last operands and copies others (a quarter of the map's bytes under a
    2/2 pool); the few-output-channel kernel reads both layouts in place.
    """
    few = groups == 1 and weight.shape[1] <= FEW_CHANNELS
    kernel_size = (weight.shape[2], weight.shape[3])
    window = natural_size((y.shape[2], y.shape[3]), pool[0:2], pool[2:4], pool[6:8]) if pool else y.shape[2:]
    if pool is not None and origin is None:
        window = map_size
    size = output_size if origin is None else natural_size(window, kernel_size, stride, dilation)
    layout = torch.channels_last if y.stride(1) == 1 and y.stride(3) != 1 else torch.contiguous_format
    if out is None:
        shape = (y.shape[0], weight.shape[1] * groups, *size)
        out = torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=layout)
    if out.numel() == 0:
        return out
    if not few:
        y = y.contiguous(memory_format=torch.channels_last)
        switches = None if switches is None else switches.contiguous(memory_format=torch.channels_last)

    taps_apart = tuple(stride[a] // math.gcd(stride[a], dilation[a]) for a in (0, 1))
    phase_size = tuple(math.ceil(size[a] / stride[a]) for a in (0, 1))
    phases = stride[0] * stride[1]
    problem = problem_of(y, weight, size[0] * size[1], groups, pool, origin is not None)
    packed = pack_weight(weight, groups)
    switch_strides = (0, 0, 0, 0) if switches is None else switches.stride()
    pool = pool or (1, 1, 1, 1, 0, 0, 1, 1)
    places = packed if origin is None else origin.contiguous()
    tensors = (y, y if switches is None else switches, packed, out, places)
    sizes = (
        *y.shape[2:], *window, *map_size, *size, *output_size, problem.c_in, problem.c_out,
        *padding, *pool[4:6],
    )  # fmt: skip
    constants = {
        "KH": kernel_size[0], "KW": kernel_size[1], "SH": stride[0], "SW": stride[1],
        "DH": dilation[0], "DW": dilation[1], "TAPS_Y": taps_apart[0], "TAPS_X": taps_apart[1],
        "POOL": switches is not None, "PKH": pool[0], "PKW": pool[1], "PSH": pool[2], "PSW": pool[3],
        "PDH": pool[6], "PDW": pool[7], "RELU": relu, "ORIGIN": origin is not None,
        "PRECISION": "ieee" if problem.exact_float32 else "tf32",
    }  # fmt: skip
    with torch.cuda.device(y.device) if y.is_cuda else contextlib.nullcontext():
        if few:
            most_taps = tuple(math.ceil(kernel_size[a] / taps_apart[a]) for a in (0, 1))
            reach = tuple((most_taps[a] - 1) * dilation[a] * taps_apart[a] // stride[a] for a in (0, 1))
            small = few_config(problem, (reach[0], reach[1]))
            edges = (small.tile_y - reach[0], small.tile_x - reach[1])
            tiles = math.ceil(phase_size[0] / edges[0]) * math.ceil(phase_size[1] / edges[1])
            deconv2d_few_kernel[(y.shape[0] * tiles * phases,)](
                *tensors, *sizes, *y.stride(), *switch_strides, *out.stride(), **constants,
                TILE_Y=small.tile_y, TILE_X=small.tile_x, SLOTS=small.slots, BK=small.block_k,
                EVEN_K=problem.c_in % small.block_k == 0, num_warps=small.warps, num_stages=small.stages,
            )  # fmt: skip
        else:
            tile = gemm_config(problem)
            rows = y.shape[0] * phase_size[0] * phase_size[1]
            tiles = math.ceil(rows / tile.block_m) * math.ceil(problem.c_out / tile.block_n)
            deconv2d_kernel[(tiles, groups, phases)](
                *tensors, rows, *sizes, y.stride(0), *y.stride()[2:], switch_strides[0], *switch_strides[2:],
                *out.stride(), **constants, BM=tile.block_m, BN=tile.block_n, BK=tile.block_k,
                EVEN_K=problem.c_in % tile.block_k == 0, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return out


def pack_weight(weight: Tensor, groups: int) -> Tensor:
    """[Ci, Co / groups, kh, kw] -> [groups, kh * kw, Co / groups, Ci / groups], contiguous."""
    c_in, c_out, kh, kw = weight.shape
    return weight.reshape(groups, c_in // groups, c_out, kh * kw).permute(0, 3, 2, 1).contiguous()
