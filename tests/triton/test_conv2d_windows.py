"""The Triton conv2d_windows in the interpreter against the plain PyTorch reference, inside guarded buffers."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from conelens import ops
from conelens.kernels.conv2d_windows import reference

pytest.importorskip("triton", reason="needs conelens[triton]")

from conelens.kernels.conv2d_windows import triton_kernel

GUARD = 64  # elements before and after every buffer
SENTINEL = -777.0
FAR = 2**63 - 1
CL, NCHW = torch.channels_last, torch.contiguous_format


@dataclass(frozen=True)
class Case:
    """One geometry; the places of four units, on three samples."""

    name: str
    c_in: int = 16
    c_out: int = 20
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    out: tuple[int, int] = (4, 5)
    patch: tuple[int, int] = (4, 3)
    patches: tuple[tuple[int, int], ...] = ((1, 1), (-2, 6), (5, -1), (2, 3))
    windows: tuple[tuple[int, int], ...] = ((0, 0), (-1, 4), (4, -2), (1, 2))
    rows: tuple[int, ...] | None = (2, 0, 0, 1)


CASES = [
    Case("inside_and_across_borders"),
    Case("several_tiles", out=(9, 8), c_in=40, c_out=70),
    Case("ragged_channels", c_in=5, c_out=3),
    Case("one_channel", c_in=1, c_out=1, kernel=(5, 4)),
    Case("stride", stride=(2, 3), out=(3, 2)),
    Case("dilation", dilation=(2, 1), kernel=(2, 4)),
    Case("one_tap", kernel=(1, 1), stride=(2, 1)),
    Case("stem_11_4", c_in=3, kernel=(11, 11), stride=(4, 4), out=(2, 2)),
    Case("most_taps", c_in=2, kernel=(16, 1), out=(1, 2)),
    Case("far_windows", windows=((0, FAR), (-FAR - 1, 0), (FAR, -FAR), (1, 1))),
    Case("far_patches", patches=((0, FAR), (-FAR - 1, 0), (FAR, -FAR), (1, 1))),
    Case("patch_covers_the_window", patch=(12, 12), patches=((-1, -1),) * 4),
    Case("one_sample", rows=None),
    Case("rows_that_are_not_there", rows=(0, 3, -1, 2)),
]


def guarded(like: Tensor, fill: float, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
    """A copy of `like` in the middle of a longer buffer of `fill`, and that buffer."""
    buffer = torch.full((like.numel() + 2 * GUARD,), fill, dtype=like.dtype)
    n, c, h, w = like.shape
    inner = buffer[GUARD:-GUARD]
    view = inner.view(n, h, w, c).permute(0, 3, 1, 2) if layout is CL else inner.view(n, c, h, w)
    view.copy_(like)
    return view, buffer


def run_both(case: Case, dtype: torch.dtype, layout: torch.memory_format, bias: bool, relu: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    base, patch = noise(1 if case.rows is None else 3, case.c_in, 9, 8), noise(4, case.c_in, *case.patch)
    weight, shift = noise(case.c_out, case.c_in, *case.kernel), noise(case.c_out) if bias else None
    places = torch.tensor(case.patches), torch.tensor(case.windows)
    rows = None if case.rows is None else torch.tensor(case.rows, dtype=torch.int32)
    window = (case.stride, case.dilation, case.out, rows, relu)
    wide = torch.float64 if dtype == torch.float32 else dtype
    in_wide = (x if x is None else x.to(wide) for x in (weight, shift))
    wanted = reference.conv2d_windows(base.to(wide), patch.to(wide), *places, *in_wide, *window)

    base, patch, weight = (guarded(x, float("nan"), layout)[0] for x in (base, patch, weight))
    out, buffer = guarded(torch.full(wanted.shape, float("nan"), dtype=dtype), SENTINEL, layout)
    assert triton_kernel.run(base, patch, *places, weight, shift, *window, out=out) is out
    assert (buffer[:GUARD] == SENTINEL).all(), "wrote before the output"
    assert (buffer[-GUARD:] == SENTINEL).all(), "wrote behind the output"
    return out, wanted


def assert_close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Relative 2-norm; NaN (an unwritten cell, or a read outside the maps) never passes."""
    error = (got.double() - wanted.double()).norm() / wanted.double().norm()
    assert error < tolerance, f"relative error {error:.2e}, wanted below {tolerance:.0e}"


@pytest.mark.parametrize("layout", [CL, NCHW], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32_matches_the_reference(case: Case, layout: torch.memory_format) -> None:
    got, wanted = run_both(case, torch.float32, layout, bias=layout is CL, relu=layout is CL)
    assert_close(got, wanted, 1e-6)


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.name)
def test_float16_matches_the_reference(case: Case) -> None:
    got, wanted = run_both(case, torch.float16, CL, bias=True, relu=True)
    assert_close(got, wanted, 2 * torch.finfo(torch.float16).eps)


def test_the_operation_runs_it_when_asked() -> None:
    base, patch = torch.randn(1, 8, 6, 6), torch.randn(3, 8, 2, 2)
    place = torch.tensor([[0, 0], [3, 3], [5, -1]])
    weight = torch.randn(4, 8, 3, 3)
    with ops.use_backend("triton"):
        got = ops.conv2d_windows(base, patch, place, place - 1, weight, out_size=4)
        empty = ops.conv2d_windows(base, patch[:0], place[:0], place[:0], weight, out_size=4)
    assert_close(got, ops.conv2d_windows(base, patch, place, place - 1, weight, out_size=4), 1e-6)
    assert got.is_contiguous() and empty.shape == (0, 4, 4, 4)


def test_nan_passes_the_rectifier() -> None:
    base, patch, place = torch.ones(1, 16, 3, 3), torch.ones(1, 16, 1, 1), torch.tensor([[1, 1]])
    patch[0, 3] = float("nan")
    args = (base, patch, place, place - 1, -torch.ones(4, 16, 1, 1), None, (1, 1), (1, 1), (3, 3), None, True)
    got = triton_kernel.run(*args)
    assert got.isnan().sum() == 4 and got.nan_to_num().sum() == 0


def test_what_it_does_not_take_is_refused() -> None:
    base, weight = torch.ones(1, 2, 20, 20), torch.ones(1, 2, 17, 1)
    assert "float64" in (triton_kernel.supports(base.double()) or "")
    assert "17" in (triton_kernel.supports(base, base, None, None, weight) or "")
    assert triton_kernel.supports(base, base, None, None, weight[:, :, 1:]) is None
