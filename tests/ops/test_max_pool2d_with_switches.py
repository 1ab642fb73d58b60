"""max_pool2d_with_switches against a plain loop, torch's own pooling, and its rules."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conelens import ops
from conelens.errors import ArgumentError
from tests.kit.compare import Guarded, assert_same
from tests.kit.pooling import FLOATS, LAYOUTS, WINDOWS, Window, map_values, pool_oracle

pytestmark = pytest.mark.usefixtures("two_threads")


def pool(x: Tensor, window: Window, relu: bool = False, **options: Any) -> Any:
    return ops.max_pool2d_with_switches(x, *window.geometry, window.ceil_mode, relu=relu, **options)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_equals_plain_loop(window: Window, backend: str, isa: str) -> None:
    for number, (dtype, layout, relu) in enumerate(itertools.product(FLOATS, LAYOUTS, (False, True))):
        x = map_values((1, 3, 12, 17 + number), dtype, seed=number, special=number % 3 == 0)
        x = x.contiguous(memory_format=layout)
        pooled, switches = pool_oracle(x, window, relu)
        with ops.use_backend(backend):
            result = pool(x, window, relu)
        assert_same(result.pooled, pooled)
        assert_same(result.switches, switches)
        assert result.pooled.dtype == dtype
        assert result.switches.dtype == (torch.uint8 if window.taps <= 256 else torch.int32)
        assert result.pooled.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("window", [w for w in WINDOWS if w.like_torch], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_switches_name_torch_indices(window: Window, layout: torch.memory_format, isa: str) -> None:
    """Wide maps with 37 channels run all vector widths, and their tails, of both layouts."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = torch.randn(1, 37, 19, 71, generator=torch.Generator().manual_seed(1)).to(dtype)
        x = x.contiguous(memory_format=layout)
        pooled, indices = F.max_pool2d(
            x,
            window.kernel,
            window.stride,
            window.padding,
            window.dilation,
            window.ceil_mode,
            return_indices=True,
        )
        result = pool(x, window)
        taps = result.switches.long()
        rows = torch.arange(pooled.shape[2])[:, None] * window.stride[0] - window.padding[0]
        columns = torch.arange(pooled.shape[3]) * window.stride[1] - window.padding[1]
        rows = rows + taps // window.kernel[1] * window.dilation[0]
        columns = columns + taps % window.kernel[1] * window.dilation[1]
        assert_same(result.pooled, pooled)
        assert torch.equal(rows * x.shape[3] + columns, indices)


@pytest.mark.parametrize("size", [(2, 2), (3, 5), (6, 7), (7, 8), (8, 130)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_small_and_wide_maps(size: tuple[int, int], dtype: torch.dtype, isa: str) -> None:
    for channels, layout in itertools.product((1, 3, 4, 33), LAYOUTS):
        x = map_values((2, channels, *size), dtype, seed=channels).contiguous(memory_format=layout)
        pooled, switches = pool_oracle(x, WINDOWS[0], relu=True)
        result = pool(x, WINDOWS[0], relu=True)
        assert_same(result.pooled, pooled)
        assert_same(result.switches, switches)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [WINDOWS[0], WINDOWS[3], WINDOWS[8], WINDOWS[14]], ids=str)
def test_views_in_and_out_touch_nothing_else(window: Window, layout: torch.memory_format, isa: str) -> None:
    big = map_values((3, 9, 30, 41), torch.float32, seed=2).contiguous(memory_format=layout)
    view = big[1:, 2:8, 3:27, 5:39]
    expected = pool(view.clone(), window)
    pooled = Guarded(tuple(expected.pooled.shape), torch.float32, layout)
    switches = Guarded(tuple(expected.pooled.shape), expected.switches.dtype, layout)
    before = big.clone()
    result = pool(view, window, out=(pooled.view, switches.view))
    assert result.pooled is pooled.view
    assert_same(pooled.view, expected.pooled)
    assert_same(switches.view, expected.switches)
    pooled.check()
    switches.check()
    assert torch.equal(big, before)


def test_reads_stay_inside_the_map(isa: str) -> None:
    """The map ends where its buffer ends, and what lies before and behind is NaN, which would win every window."""
    for window, dtype in itertools.product(WINDOWS, (torch.float32, torch.float16)):
        for layout in LAYOUTS:
            buffer = torch.full((3, 4, 19, 23), math.nan, dtype=dtype).contiguous(memory_format=layout)
            buffer[1] = map_values((4, 19, 23), dtype, seed=3)
            result = pool(buffer[1:2], window)
            assert not result.pooled.isnan().any()


@pytest.mark.parametrize("take", ["every second column", "flipped", "expanded", "transposed"])
def test_other_strides(take: str) -> None:
    base = map_values((2, 6, 24, 24), torch.float32, seed=4)
    x = {
        "every second column": base[..., ::2],
        "flipped": base.flip(3)[:, :, ::2],
        "expanded": base[:1, :1].expand(2, 6, 24, 24),
        "transposed": base.transpose(2, 3),
    }[take]
    pooled, switches = pool_oracle(x, WINDOWS[2], relu=False)
    result = pool(x, WINDOWS[2])
    assert_same(result.pooled, pooled)
    assert_same(result.switches, switches)


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8, 8)])
@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_empty_batch(shape: tuple[int, ...], backend: str) -> None:
    with ops.use_backend(backend):
        result = ops.max_pool2d_with_switches(torch.empty(shape), 2)
    assert result.pooled.shape == result.switches.shape == (*shape[:2], 4, 4)


def test_ties_and_nan() -> None:
    x = torch.tensor([[1.0, 1.0, 5.0, math.nan], [1.0, 0.0, math.nan, 9.0]])[None, None]
    result = ops.max_pool2d_with_switches(x, 2)
    assert result.switches.flatten().tolist() == [0, 2]  # the first of the ties, the last NaN
    assert result.pooled[0, 0, 0, 0] == 1
    assert result.pooled[0, 0, 0, 1].isnan()
    dead = ops.max_pool2d_with_switches(torch.tensor([[-1.0, -2.0], [-0.5, -3.0]])[None, None], 2, relu=True)
    assert dead.pooled.item() == 0
    assert dead.switches.item() == 0
    padded = ops.max_pool2d_with_switches(torch.full((1, 1, 3, 3), -math.inf), 3, 2, 1)
    assert padded.switches[0, 0, 0, 0] == 4  # the first tap inside the map


def test_same_bits_on_every_run_and_thread_count(isa: str) -> None:
    x = torch.randn(3, 20, 61, 67, generator=torch.Generator().manual_seed(5))
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(pool(x, WINDOWS[3], relu=True))
    for other in results[1:]:
        assert torch.equal(results[0].pooled, other.pooled)
        assert torch.equal(results[0].switches, other.switches)


def test_out_in_another_layout_is_still_right() -> None:
    x = map_values((2, 6, 12, 12), torch.float32, seed=6)
    expected = pool(x, WINDOWS[0])
    pooled = torch.empty_like(expected.pooled).contiguous(memory_format=torch.channels_last)
    switches = torch.empty_like(expected.switches)
    pool(x, WINDOWS[0], out=(pooled, switches))
    assert_same(pooled, expected.pooled)
    assert_same(switches, expected.switches)


# --- torch: registration, gradients, compilation --------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: torch.memory_format) -> None:
    for dtype, relu, window in itertools.product((torch.float32, torch.float64), (False, True), (WINDOWS[0], WINDOWS[8])):
        x = torch.randn(2, 3, 11, 13, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
        args = (x, *window.geometry, window.ceil_mode, relu)
        torch.library.opcheck(torch.ops.conelens.max_pool2d_with_switches.default, args)
        out = ops.max_pool2d_with_switches(x.detach(), *window.geometry, window.ceil_mode)
        torch.library.opcheck(
            torch.ops.conelens.max_pool2d_with_switches.out,
            (x.detach(), *args[1:]),
            {"out_pooled": out.pooled, "out_switches": out.switches},
        )


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("window", [w for w in WINDOWS[:9] if w.like_torch], ids=str)
def test_gradient_equals_torch(window: Window, relu: bool) -> None:
    x = torch.randn(2, 3, 12, 14, dtype=torch.float64, requires_grad=True)
    ours = pool(x, window, relu).pooled
    theirs = F.max_pool2d(
        x.relu() if relu else x,
        window.kernel,
        window.stride,
        window.padding,
        window.dilation,
        window.ceil_mode,
    )
    direction = torch.randn_like(theirs)
    (a,) = torch.autograd.grad(ours, x, direction)
    (b,) = torch.autograd.grad(theirs, x, direction)
    torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def test_gradcheck_twice() -> None:
    x = torch.randn(1, 2, 7, 6, dtype=torch.float64, requires_grad=True)

    def square(x: Tensor) -> Tensor:
        return ops.max_pool2d_with_switches(x, 3, 2, 1, relu=True).pooled.square()

    assert torch.autograd.gradcheck(square, (x,))
    assert torch.autograd.gradgradcheck(square, (x,))


def test_compiles_as_one_graph() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def compiled(x: Tensor) -> tuple[Tensor, Tensor]:
        pooled, switches = ops.max_pool2d_with_switches(x, 3, 2, relu=True)
        return pooled * 2, switches

    for size in (12, 17):
        x = torch.randn(2, 3, size, size + 1)
        expected = ops.max_pool2d_with_switches(x, 3, 2, relu=True)
        pooled, switches = compiled(x)
        assert torch.equal(pooled, expected.pooled * 2)
        assert torch.equal(switches, expected.switches)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    x = torch.zeros(1, 33, 8192, 8192, dtype=torch.float16)
    x[0, 32, 8190, 8191] = 3
    x[0, 32, 8191, 0] = 2
    result = ops.max_pool2d_with_switches(x, 2)
    assert result.pooled[0, 32, 4095, 4095] == 3
    assert result.switches[0, 32, 4095, 4095] == 1
    assert result.pooled[0, 32, 4095, 0] == 2
    assert result.switches[0, 32, 4095, 0] == 2
    assert int(result.switches.count_nonzero()) == 2


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 8, 8)}, r"x must be \[N,C,H,W\], got shape \[3, 8, 8\]"),
        ({"x": torch.zeros(1, 3, 8, 8, dtype=torch.int32)}, "x must be float32.*got torch.int32"),
        ({"x": torch.zeros(1, 3, 0, 8)}, "x has no cells"),
        ({"x": [[1.0]]}, "x must be a tensor or a DLPack array, got list"),
        ({"kernel_size": 0}, "kernel_size must be at least 1, got 0"),
        ({"kernel_size": (2, 2, 2)}, "kernel_size must be an int or two"),
        ({"kernel_size": 2.5}, "kernel_size must be an int or two"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"padding": -1}, "padding must be at least 0"),
        ({"kernel_size": 9}, "x is too small: height 8"),
        ({"padding": 2}, "window 0 along height has no cell of the map"),
        (
            {"out": (torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4))},
            r"out\[1\] \(switches\) must be torch.uint8",
        ),
        ({"out": (torch.zeros(1, 3, 5, 4), torch.zeros(1, 3, 4, 4))}, r"out\[0\] \(pooled\) must have shape"),
        ({"out": torch.zeros(1, 3, 4, 4)}, r"out must be \(pooled, switches\)"),
        (
            {"out": (torch.zeros(1, 3, 4, 4, device="meta"), torch.zeros(1, 3, 4, 4))},
            r"out\[0\] \(pooled\) is on meta but x is on cpu",
        ),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.zeros(1, 3, 8, 8), "kernel_size": 2} | change
    with pytest.raises(ArgumentError, match=message):
        ops.max_pool2d_with_switches(**arguments)


def test_out_with_gradient_is_refused() -> None:
    x = torch.zeros(1, 1, 4, 4, requires_grad=True)
    out = (torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.uint8))
    with pytest.raises(ArgumentError, match="out= cannot be differentiated"):
        ops.max_pool2d_with_switches(x, 2, out=out)
