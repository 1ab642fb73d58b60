"""max_unpool2d and its adjoint against a plain loop, torch where it is right, and their rules."""

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
from tests.kit.compare import Guarded, assert_same, relative
from tests.kit.pooling import FLOATS, LAYOUTS, WINDOWS, Window, map_values, random_switches, unpool_oracle

pytestmark = pytest.mark.usefixtures("two_threads")


def unpool(pooled: Tensor, switches: Tensor, window: Window, size: tuple[int, int], **options: Any) -> Tensor:
    return ops.max_unpool2d(pooled, switches, *window.geometry, output_size=size, **options)


def map_size(window: Window, height: int, width: int, extra: int) -> tuple[int, int]:
    """A map on which every one of these windows has a cell."""
    sizes = [
        max(1, (n - 1) * s - p + 1 + extra * d)
        for n, s, p, d in zip((height, width), window.stride, window.padding, window.dilation, strict=True)
    ]
    return sizes[0], sizes[1]


def has_cells(window: Window, height: int, width: int, size: tuple[int, int]) -> bool:
    for n, limit, k, s, p, d in zip((height, width), size, *window.geometry, strict=True):
        for i in range(n):
            if not any(0 <= i * s - p + d * t < limit for t in range(k)):
                return False
    return True


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_equals_plain_loop(window: Window, backend: str, isa: str) -> None:
    tried = 0
    for number, (dtype, layout) in enumerate(itertools.product(FLOATS, LAYOUTS)):
        shape = (1, 5, 4, 7 + 2 * number)
        size = map_size(window, *shape[2:], extra=number % 3)
        if not has_cells(window, *shape[2:], size):
            continue
        tried += 1
        # small integers: sums are exact in every dtype
        pooled = map_values(shape, dtype, seed=number).contiguous(memory_format=layout)
        switches = random_switches(shape, window, size, seed=number).contiguous(memory_format=layout)
        with ops.use_backend(backend):
            result = unpool(pooled, switches, window, size, relu=number % 2 == 0)
        assert_same(result, unpool_oracle(pooled, switches, window, size, relu=number % 2 == 0))
        assert result.dtype == dtype
        assert result.is_contiguous(memory_format=layout)
    assert tried >= 2


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_windows_of_a_larger_map(window: Window, backend: str, isa: str) -> None:
    for number, (layout, index) in enumerate(itertools.product(LAYOUTS, (torch.int32, torch.int64))):
        pooled = map_values((4, 3, 3, 6 + number), torch.float32, seed=number).contiguous(memory_format=layout)
        switches = random_switches(tuple(pooled.shape), window, None, seed=number).contiguous(memory_format=layout)
        origin = torch.tensor([[0, 0], [-2, 1], [3, -1], [40, 2]], dtype=index)
        with ops.use_backend(backend):
            result = unpool(pooled, switches, window, (9, 11), origin=origin, relu=number % 2 == 1)
        expected = unpool_oracle(pooled, switches, window, (9, 11), relu=number % 2 == 1, origin=origin)
        assert_same(result, expected)
        assert not result[3].any()  # wholly outside the map


def test_window_of_a_map_equals_the_whole_map() -> None:
    window = WINDOWS[3]
    pooled = torch.randn(2, 3, 9, 9)
    switches = random_switches((2, 3, 9, 9), window, (17, 17), seed=1)
    whole = unpool(pooled, switches, window, (17, 17))
    # cells that no window outside the cut reaches
    cut = unpool(
        pooled[:, :, 2:7, 3:8],
        switches[:, :, 2:7, 3:8],
        window,
        (17, 17),
        origin=torch.tensor([[2, 3], [2, 3]], dtype=torch.int32),
    )
    top, left = 2 * 2 - 1, 3 * 2 - 1
    assert torch.equal(cut[:, :, 1:-1, 1:-1], whole[:, :, top + 1 : top + 10, left + 1 : left + 10])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("window", [WINDOWS[0], WINDOWS[2], WINDOWS[4], WINDOWS[7]], ids=str)
def test_wide_maps_and_rounding(window: Window, dtype: torch.dtype, isa: str) -> None:
    """All vector widths and tails; halves are summed in float32 and rounded once."""
    for (width, channels), layout in itertools.product(((70, 3), (33, 37), (7, 70)), LAYOUTS):
        x = torch.randn(2, channels, 9, 2 * width, generator=torch.Generator().manual_seed(width)).to(dtype)
        x = x.contiguous(memory_format=layout)
        switches = ops.max_pool2d_with_switches(x, *window.geometry).switches
        pooled = torch.randn(switches.shape).to(dtype).contiguous(memory_format=layout)
        size = (x.shape[2], x.shape[3])
        result = unpool(pooled, switches, window, size, relu=True)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        with ops.use_backend("reference"):
            assert_same(result, unpool(pooled.to(wide), switches, window, size, relu=True).to(dtype))


def test_equals_torch_where_windows_do_not_overlap() -> None:
    x = torch.randn(2, 5, 14, 18, dtype=torch.float64)
    pooled, indices = F.max_pool2d(x, 2, return_indices=True)
    ours = ops.max_unpool2d(*ops.max_pool2d_with_switches(x, 2), 2, output_size=(14, 18))
    assert torch.equal(ours, F.max_unpool2d(pooled, indices, 2))


def test_overlapping_windows_add() -> None:
    x = torch.zeros(1, 1, 5, 5)
    x[0, 0, 2, 2] = 3
    pooled, switches = ops.max_pool2d_with_switches(x, 3, 2)
    out = ops.max_unpool2d(pooled, switches, 3, 2, output_size=(5, 5))
    assert out[0, 0, 2, 2] == 12
    assert out.sum() == 12


def test_relu_rectifies_the_sum_and_keeps_nan() -> None:
    switches = torch.tensor([[[[1, 0]]]], dtype=torch.uint8)  # both windows point at column 1
    pooled = torch.tensor([[[[5.0, -2.0]]]])
    out = ops.max_unpool2d(pooled, switches, (1, 2), 1, output_size=(1, 3), relu=True)
    assert out.flatten().tolist() == [0, 3, 0]
    for dtype in FLOATS:
        pooled = torch.tensor([[[[math.nan, -2.0, -math.nan, math.inf]]]], dtype=dtype)
        switches = torch.tensor([[[[1, 0, 0, 1]]]], dtype=torch.uint8)
        out = ops.max_unpool2d(pooled, switches, (1, 2), output_size=(1, 8), relu=True).flatten()
        assert out.isnan().tolist() == [False, True, False, False, True, False, False, False]
        assert out.nan_to_num(0.0, 9.0).tolist() == [0, 0, 0, 0, 0, 0, 0, 9]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [WINDOWS[0], WINDOWS[2], WINDOWS[4], WINDOWS[8], WINDOWS[14]], ids=str)
def test_views_in_and_out_touch_nothing_else(window: Window, layout: torch.memory_format, isa: str) -> None:
    shape, size = (2, 6, 6, 9), map_size(window, 6, 9, extra=0)
    big = map_values((3, 9, 11, 15), torch.float32, seed=2).contiguous(memory_format=layout)
    pooled = big[1:, 2:8, 3:9, 5:14]
    switches = random_switches(shape, window, size, seed=3)
    wide = torch.full((3, 9, 11, 15), 250, dtype=switches.dtype).contiguous(memory_format=layout)
    wide[1:, 2:8, 3:9, 5:14] = switches
    out = Guarded((2, 6, *size), torch.float32, layout)
    unpool(pooled, wide[1:, 2:8, 3:9, 5:14], window, size, out=out.view)
    assert_same(out.view, unpool_oracle(pooled, switches, window, size, relu=False))
    out.check()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4)])
@pytest.mark.parametrize("backend", ["compiled", "reference"])
@pytest.mark.parametrize("windowed", [False, True])
def test_empty_batch(shape: tuple[int, ...], backend: str, windowed: bool) -> None:
    switches = torch.zeros(shape, dtype=torch.uint8)
    origin = torch.zeros(shape[0], 2, dtype=torch.int64) if windowed else None
    with ops.use_backend(backend):
        out = ops.max_unpool2d(torch.zeros(shape), switches, 2, output_size=(8, 8), origin=origin)
    assert out.shape == (*shape[:2], 8, 8)


def test_other_strides() -> None:
    window, size = WINDOWS[2], (13, 13)
    pooled = map_values((2, 4, 6, 12), torch.float32, seed=4)[..., ::2]
    switches = random_switches((2, 4, 6, 6), window, size, seed=5).transpose(0, 1).contiguous().transpose(0, 1)
    expected = unpool_oracle(pooled, switches, window, size, relu=False)
    assert_same(unpool(pooled, switches, window, size), expected)
    last = switches.contiguous(memory_format=torch.channels_last)
    assert_same(unpool(pooled, last, window, size), expected)
    out = torch.empty(2, 4, 13, 13).contiguous(memory_format=torch.channels_last)
    assert_same(unpool(pooled, switches, window, size, out=out), expected)


def test_same_bits_on_every_run_and_thread_count(isa: str) -> None:
    window = WINDOWS[2]
    switches = random_switches((2, 9, 30, 33), window, (61, 67), seed=6)
    pooled = torch.randn(2, 9, 30, 33)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(unpool(pooled, switches, window, (61, 67), relu=True))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# --- switches that point nowhere ------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["compiled", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("window", "size", "place", "value"),
    [
        (WINDOWS[0], (12, 80), (1, 2, 5, 39), 4),  # outside the window
        (WINDOWS[0], (12, 80), (0, 0, 0, 0), 255),
        (WINDOWS[3], (11, 79), (1, 3, 0, 7), 0),  # above the map
        (WINDOWS[3], (11, 79), (0, 1, 3, 0), 3),  # left of the map
        (WINDOWS[2], (12, 80), (1, 4, 5, 20), 6),  # below a map that is too low for the last row
        (WINDOWS[2], (13, 80), (1, 4, 2, 39), 5),  # right of the map
        (WINDOWS[14], (20, 200), (1, 4, 2, 20), 272),
        (WINDOWS[14], (20, 200), (1, 4, 2, 20), -1),
    ],
    ids=str,
)
def test_an_invalid_switch_is_named(
    window: Window, size: Any, place: Any, value: int, layout: torch.memory_format, backend: str, isa: str
) -> None:
    switches = random_switches((2, 5, 6, 40), window, size, seed=7).contiguous(memory_format=layout)
    pooled = torch.ones(2, 5, 6, 40).contiguous(memory_format=layout)
    with ops.use_backend(backend):
        unpool(pooled, switches, window, size)
        switches[place] = value
        with pytest.raises(ArgumentError, match=rf"switches\[{', '.join(map(str, place))}\] is {value}, which points"):
            unpool(pooled, switches, window, size)


def test_a_window_may_point_outside_the_map_but_not_outside_itself() -> None:
    switches = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    origin = torch.tensor([[-1, 0]])
    out = ops.max_unpool2d(torch.ones(1, 1, 2, 2), switches, 2, output_size=(8, 8), origin=origin)
    assert out.sum() == 2
    switches[0, 0, 1, 0] = 4
    with pytest.raises(ArgumentError, match=r"switches\[0, 0, 1, 0\] is 4"):
        ops.max_unpool2d(torch.ones(1, 1, 2, 2), switches, 2, output_size=(8, 8), origin=origin)


# --- torch: registration, gradients, compilation --------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: torch.memory_format) -> None:
    window, size = WINDOWS[2], (9, 11)
    switches = random_switches((2, 3, 4, 5), window, size, seed=8).contiguous(memory_format=layout)
    for relu, origin in ((False, None), (True, torch.tensor([[0, 1], [-1, 2]]))):
        pooled = torch.randn(2, 3, 4, 5).contiguous(memory_format=layout).requires_grad_()
        args = (pooled, switches, *window.geometry, size, relu, origin, False)
        torch.library.opcheck(torch.ops.conelens.max_unpool2d.default, args)
        out = unpool(pooled.detach(), switches, window, size, origin=origin)
        args = (pooled.detach(), *args[1:])
        torch.library.opcheck(torch.ops.conelens.max_unpool2d.out, args, {"out_out": out})
        grad = torch.randn_like(out).requires_grad_()
        torch.library.opcheck(
            torch.ops.conelens.max_unpool2d_backward.default, (grad, switches, *window.geometry, size, origin)
        )


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("window", WINDOWS[:9], ids=str)
def test_gradcheck_twice(window: Window, windowed: bool) -> None:
    size = map_size(window, 3, 4, extra=1)
    if not has_cells(window, 3, 4, size):
        size = map_size(window, 3, 4, extra=2)
    origin = torch.tensor([[1, -1], [0, 0]], dtype=torch.int32) if windowed else None
    switches = random_switches((2, 2, 3, 4), window, None if windowed else size, seed=9)
    pooled = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)

    def square(pooled: Tensor) -> Tensor:
        return unpool(pooled, switches, window, size, relu=True, origin=origin).square()

    with ops.require_kernels():
        assert torch.autograd.gradcheck(square, (pooled,))
        assert torch.autograd.gradgradcheck(square, (pooled,))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_adjoint_equals_reference(dtype: torch.dtype, layout: torch.memory_format, isa: str) -> None:
    for window in WINDOWS:
        switches = random_switches((2, 5, 4, 9), window, None, seed=10).contiguous(memory_format=layout)
        origin = torch.tensor([[0, 3], [-1, -2]])
        results = []
        for backend in ("compiled", "reference"):
            with ops.use_backend(backend):
                pooled = torch.zeros(2, 5, 4, 9, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
                out = unpool(pooled, switches, window, (12, 15), origin=origin)
                direction = map_values(tuple(out.shape), dtype, seed=11)
                results.append(torch.autograd.grad(out, pooled, direction)[0])
        assert_same(*results)


def test_compiles_as_one_graph() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def chain(x: Tensor) -> Tensor:
        pooled, switches = ops.max_pool2d_with_switches(x, 3, 2)
        return ops.max_unpool2d(pooled, switches, 3, 2, output_size=x.shape[2:], relu=True) + 1

    for size in (11, 16):
        x = torch.randn(2, 3, size, size + 2, requires_grad=True)
        pooled, switches = ops.max_pool2d_with_switches(x, 3, 2)
        expected = ops.max_unpool2d(pooled, switches, 3, 2, output_size=x.shape[2:], relu=True) + 1
        result = chain(x)
        assert torch.equal(result, expected)
        assert relative(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (result, expected))) < 1e-6


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    pooled = torch.zeros(1, 33, 4096, 4096, dtype=torch.float16)
    switches = torch.zeros(pooled.shape, dtype=torch.uint8)
    pooled[0, 32, 4095, 4095] = 3
    switches[0, 32, 4095, 4095] = 3
    out = ops.max_unpool2d(pooled, switches, 2, output_size=(8192, 8192))
    assert out[0, 32, 8191, 8191] == 3
    assert int(out.count_nonzero()) == 1


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pooled": torch.zeros(4, 4)}, r"pooled must be \[N,C,H,W\], got shape \[4, 4\]"),
        ({"pooled": torch.zeros(1, 3, 4, 4, dtype=torch.int64)}, "pooled must be float32"),
        (
            {"switches": torch.zeros(1, 3, 4, 4, dtype=torch.int64)},
            "looks like the flat indices of F.max_pool2d",
        ),
        (
            {"switches": torch.zeros(1, 3, 4, 4, dtype=torch.int32)},
            "switches must be torch.uint8, got torch.int32",
        ),
        (
            {"switches": torch.zeros(1, 3, 4, 5, dtype=torch.uint8)},
            r"switches must have shape \[1, 3, 4, 4\]",
        ),
        ({"switches": None}, "switches must be a tensor, got NoneType"),
        (
            {"switches": torch.zeros(1, 3, 4, 4, dtype=torch.uint8, device="meta")},
            "switches is on meta but pooled is on",
        ),
        ({"output_size": 8.5}, "output_size must be"),
        ({"output_size": (-1, 8)}, "output_size must be at least 0"),
        ({"origin": torch.zeros(1, 2)}, "origin must be an int32 or int64 tensor"),
        ({"origin": torch.zeros(2, 2, dtype=torch.int64)}, r"origin must have shape \[1, 2\]"),
        ({"out": torch.zeros(1, 3, 8, 9)}, r"out must have shape \[1, 3, 8, 8\]"),
        ({"out": torch.zeros(1, 3, 8, 8, dtype=torch.float64)}, "out must be torch.float32"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "pooled": torch.zeros(1, 3, 4, 4),
        "switches": torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
        "kernel_size": 2,
        "output_size": (8, 8),
    }
    with pytest.raises(ArgumentError, match=message):
        ops.max_unpool2d(**(arguments | change))
