"""The Triton deconv2d in the interpreter against the plain PyTorch reference, inside guarded buffers."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from conelens.kernels.deconv2d import reference

pytest.importorskip("triton", reason="needs conelens[triton]")

from conelens.kernels.deconv2d import triton_kernel

GUARD = 64  # elements before and after every buffer
SENTINEL = -777.0


@dataclass(frozen=True)
class Case:
    """One geometry; ints stand for both axes."""

    name: str
    c_in: int = 16
    kernel: int | tuple[int, int] = 3
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] = 1
    dilation: int | tuple[int, int] = 1
    size: tuple[int, int] = (4, 5)
    pool: tuple | None = None  # kernel, stride, padding, dilation
    origin: bool = False
    groups: int = 1
    extra: tuple[int, int] = (0, 0)  # output cells beyond the symmetric formula


CASES = [
    Case("vgg", size=(13, 37)),  # several tiles both ways
    Case("ragged_channels", c_in=5, kernel=(3, 5), stride=(2, 1), padding=(1, 2), extra=(1, 0)),
    Case("stem_7_2", kernel=7, stride=2, padding=3, extra=(1, 1)),
    Case("stem_11_4", kernel=11, stride=4, padding=2, size=(4, 3), extra=(1, 2)),
    Case("stride_shares_dilation", stride=3, padding=0, dilation=2),
    Case("phases_without_taps", kernel=1, stride=2, padding=0),
    Case("dilation_skips_phases", stride=2, dilation=2),
    Case("pool_2_2", c_in=40, pool=(2, 2, 0, 1)),
    Case("pool_3_2_overlaps", pool=(3, 2, 1, 1)),
    Case("pool_uneven_dilated", pool=((3, 2), (1, 2), 0, (2, 1))),
    Case("window", stride=2, origin=True),
    Case("window_pool_2_2", pool=(2, 2, 0, 1), origin=True),
    Case("window_pool_3_2", stride=2, pool=(3, 2, 1, 1), origin=True),
]
GROUPED = [Case("groups", c_in=32, groups=2), Case("groups_pool", c_in=32, groups=4, pool=(2, 2, 0, 1))]


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def guarded(like: Tensor, fill: float, channels_last: bool) -> tuple[Tensor, Tensor]:
    """A copy of `like` in the middle of a longer buffer of `fill`, and that buffer."""
    buffer = torch.full((like.numel() + 2 * GUARD,), fill, dtype=like.dtype)
    n, c, h, w = like.shape
    inner = buffer[GUARD:-GUARD]
    view = inner.view(n, h, w, c).permute(0, 3, 1, 2) if channels_last else inner.view(n, c, h, w)
    view.copy_(like)
    return view, buffer


def run_both(case: Case, c_out: int, dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    kernel, stride, padding, dilation = map(pair, (case.kernel, case.stride, case.padding, case.dilation))
    samples = 2
    y = torch.randn(samples, case.c_in, *case.size, generator=generator).to(dtype)
    weight = torch.randn(case.c_in, c_out // case.groups, *kernel, generator=generator).to(dtype)
    pool = switches = origin = None
    map_size = case.size
    if case.pool is not None:
        pool = tuple(map(pair, case.pool))
        (pk, ps, pp, pd), taps = pool, pool[0][0] * pool[0][1]
        switches = torch.randint(0, taps, y.shape, generator=generator).to(torch.uint8)
        natural = ((case.size[a] - 1) * ps[a] - 2 * pp[a] + pd[a] * (pk[a] - 1) + 1 for a in (0, 1))
        map_size = (next(natural), next(natural) + 1)  # one column that no window reaches
    if case.origin:
        origin = torch.tensor([[-2, 1], [1, -1]], dtype=torch.int32)
        map_size = (map_size[0] - 1, map_size[1] + 1)
    out_h, out_w = (
        (map_size[a] - 1) * stride[a] - 2 * padding[a] + dilation[a] * (kernel[a] - 1) + 1 + case.extra[a] for a in (0, 1)
    )
    window = (stride, padding, case.groups, dilation, (out_h, out_w), map_size)
    wide = torch.float64 if dtype == torch.float32 else dtype
    wanted = reference.deconv2d(y.to(wide), weight.to(wide), *window, pool, switches, True, origin)

    flat_pool = None if pool is None else [v for axis in pool for v in axis]
    y, _ = guarded(y, float("nan"), channels_last)
    if switches is not None:
        switches, _ = guarded(switches, 0, channels_last)
    out, buffer = guarded(torch.full(wanted.shape, float("nan"), dtype=dtype), SENTINEL, channels_last)
    triton_kernel.run(y, weight, *window, flat_pool, switches, True, origin, out=out)
    assert (buffer[:GUARD] == SENTINEL).all(), "wrote before the output"
    assert (buffer[-GUARD:] == SENTINEL).all(), "wrote behind the output"
    return out, wanted


def assert_close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Relative 2-norm; NaN (an unwritten cell, or a read outside the operand) never passes."""
    error = (got.double() - wanted.double()).norm() / wanted.double().norm()
    assert error < tolerance, f"relative error {error:.2e}, wanted below {tolerance:.0e}"


@pytest.mark.parametrize("c_out", [3, 20], ids=["few", "gemm"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32_matches_the_reference(case: Case, c_out: int) -> None:
    got, wanted = run_both(case, c_out, torch.float32, channels_last=False)
    assert_close(got, wanted, 1e-6)


@pytest.mark.parametrize("case", GROUPED, ids=lambda case: case.name)
def test_groups_match_the_reference(case: Case) -> None:
    got, wanted = run_both(case, 48, torch.float32, channels_last=True)
    assert_close(got, wanted, 1e-6)


@pytest.mark.parametrize("c_out", [1, 3, 20], ids=["one", "few", "gemm"])
@pytest.mark.parametrize("case", [CASES[0], CASES[7], CASES[12]], ids=lambda case: case.name)
def test_float16_channels_last_matches_the_reference(case: Case, c_out: int) -> None:
    got, wanted = run_both(case, c_out, torch.float16, channels_last=True)
    assert_close(got, wanted, 2 * torch.finfo(torch.float16).eps)


@pytest.mark.parametrize("c_out", [3, 20], ids=["few", "gemm"])
def test_nan_passes_the_rectifier(c_out: int) -> None:
    y = torch.ones(1, 16, 3, 3)
    y[0, 0, 1, 1] = float("nan")
    y[0, 1, 0, 0] = -5.0
    weight = torch.ones(16, c_out, 1, 1)
    args = ((1, 1), (0, 0), 1, (1, 1), (3, 3), (3, 3), None, None, True, None)
    got = triton_kernel.run(y, weight, *args)
    torch.testing.assert_close(got, reference.deconv2d(y, weight, *args), equal_nan=True)
    assert got.isnan().sum() == c_out


def test_empty_batch() -> None:
    y, weight = torch.empty(0, 16, 3, 3), torch.ones(16, 8, 1, 1)
    got = triton_kernel.run(y, weight, (1, 1), (0, 0), 1, (1, 1), (3, 3), (3, 3), None, None, False, None)
    assert got.shape == (0, 8, 3, 3)


def test_float64_is_refused() -> None:
    y, weight = torch.ones(1, 16, 3, 3, dtype=torch.float64), torch.ones(16, 8, 1, 1, dtype=torch.float64)
    assert "float64" in (triton_kernel.supports(y, weight) or "")
