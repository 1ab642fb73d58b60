"""deconv2d against plain loops, torch and autograd, and its rules."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conelens import ops
from conelens.errors import ArgumentError, BackendError
from tests.kit.compare import Guarded, assert_same, relative

pytestmark = pytest.mark.usefixtures("two_threads")

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
Case = dict[str, Any]


def random_case(random: Random, overlapping: bool = False) -> Case:
    """Arguments of deconv2d in float64; every option now and then, also sizes no convolution has."""

    def two(low: int, high: int) -> tuple[int, int]:
        return random.randint(low, high), random.randint(low, high)

    groups = random.choice((1, 1, 1, 2, 3))
    n, ci, co = random.randint(1, 3), groups * random.randint(1, 20), random.choice((1, 3, 5, 17, 40))
    size, kernel, dilation, padding = two(1, 6), two(1, 4), two(1, 2), two(0, 3)
    case: Case = {
        "y": torch.randn(n, ci, *size, dtype=torch.float64),
        "weight": torch.randn(ci, co, *kernel, dtype=torch.float64),
        "stride": two(1, 3),
        "padding": padding,
        "groups": groups,
        "dilation": dilation,
        "output_size": two(1, 20),
        "map_size": size,
        "relu": random.random() < 0.5,
    }
    if random.random() < 0.4:
        case["origin"] = torch.randint(-4, 7, (n, 2), dtype=random.choice((torch.int32, torch.int64)))
        case["map_size"] = two(1, 16)
    if overlapping or random.random() < 0.4:
        taps, spread = two(2, 3) if overlapping else two(1, 3), two(1, 2)
        step = tuple(1 if overlapping else d * (k - 1) + 1 + random.randint(0, 1) for k, d in zip(taps, spread, strict=True))
        reach = [(c - 1) * s + d * (k - 1) + 1 for c, s, d, k in zip(size, step, spread, taps, strict=True)]
        case["pool"] = (taps, step, (0, 0), spread)
        case["switches"] = torch.randint(0, taps[0] * taps[1], (n, ci, *size), dtype=torch.uint8)
        if "origin" not in case:
            case["map_size"] = tuple(reach)
    return case


def loops(case: Case) -> np.ndarray:
    """The definition, one product at a time, in float64."""
    y, weight = case["y"].double().numpy(), case["weight"].double().numpy()
    n, ci, h, w = y.shape
    co, kernel = weight.shape[1], weight.shape[2:]
    s, p, d, groups = case["stride"], case["padding"], case["dilation"], case["groups"]
    origin, pool = case.get("origin"), case.get("pool")
    taps, step, pool_padding, spread = pool or ((1, 1), (1, 1), (0, 0), (1, 1))
    natural = [(c - 1) * a + b * (k - 1) + 1 for c, a, b, k in zip((h, w), step, spread, taps, strict=True)]
    window = [(c - 1) * a + b * (k - 1) + 1 for c, a, b, k in zip(natural, s, d, kernel, strict=True)]
    map_size, output = case["map_size"], case["output_size"]
    out = np.zeros((n, co * groups, *(output if origin is None else window)))
    for i in range(n):
        first = (0, 0) if origin is None else tuple(int(o) for o in origin[i])
        signal = np.zeros((ci, *map_size))
        for c, row, col in np.ndindex(ci, h, w):
            tap = divmod(int(case["switches"][i, c, row, col]), taps[1]) if pool else (0, 0)
            at = [(first[a] + (row, col)[a]) * step[a] - pool_padding[a] + spread[a] * tap[a] for a in (0, 1)]
            if 0 <= at[0] < map_size[0] and 0 <= at[1] < map_size[1]:
                signal[c, at[0], at[1]] += y[i, c, row, col]
        if case["relu"]:
            signal = np.maximum(signal, 0)
        start = [0, 0]
        if origin is not None:
            start = [(first[a] * step[a] - pool_padding[a]) * s[a] - p[a] for a in (0, 1)]
        for c, row, col in zip(*np.nonzero(signal), strict=True):
            group = slice(c * groups // ci * co, (c * groups // ci + 1) * co)
            for ky, kx in np.ndindex(*kernel):
                to = (row * s[0] - p[0] + d[0] * ky, col * s[1] - p[1] + d[1] * kx)
                local = to[0] - start[0], to[1] - start[1]
                mapped = 0 <= to[0] < output[0] and 0 <= to[1] < output[1]
                if mapped and 0 <= local[0] < out.shape[2] and 0 <= local[1] < out.shape[3]:
                    out[i, group, local[0], local[1]] += signal[c, row, col] * weight[c, :, ky, kx]
    return out


def run(case: Case, **changes: Any) -> Tensor:
    case = {**case, **changes}
    if "pool" not in case and "origin" not in case:
        case.pop("map_size")
    return ops.deconv2d(case.pop("y"), case.pop("weight"), **case)


@pytest.mark.parametrize("seed", range(24))
def test_equals_plain_loops(seed: int, isa: str) -> None:
    torch.manual_seed(seed)
    random = Random(seed)
    case = random_case(random, overlapping=seed % 6 == 5)
    dtype, layout, filters = random.choice(FLOATS), random.choice(LAYOUTS), random.choice(LAYOUTS)
    case["y"] = case["y"].to(dtype).contiguous(memory_format=layout)
    case["weight"] = case["weight"].to(dtype).contiguous(memory_format=filters)
    expected = torch.from_numpy(loops(case))
    with ops.require_kernels():
        result = run(case)
    assert result.dtype == dtype
    ambiguous = all(case["y"].is_contiguous(memory_format=either) for either in LAYOUTS)
    assert ambiguous or result.is_contiguous(memory_format=layout)
    # unpooled sums of overlapping windows are rounded to the dtype once more
    assert relative(result, expected) < 4 * torch.finfo(dtype).eps
    with ops.use_backend("reference"):
        assert relative(run(case), expected) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("channels", [(64, 3), (128, 64), (70, 130), (5, 2), (3, 20)], ids=str)
def test_large_maps_are_cut_without_a_seam(channels: tuple[int, int], isa: str) -> None:
    """Many strips, lists and blocks of output channels; both layouts of map and filter."""
    torch.manual_seed(0)
    y, weight = torch.randn(3, channels[0], 45, 61), torch.randn(*channels, 3, 3)
    expected = F.conv_transpose2d(y.clamp(min=0).double(), weight.double(), None, 1, 1)
    for layout in LAYOUTS:
        for filters in LAYOUTS:
            a, b = y.contiguous(memory_format=layout), weight.contiguous(memory_format=filters)
            assert relative(ops.deconv2d(a, b, 1, 1, relu=True), expected) < 1e-6


@pytest.mark.parametrize("kernel", [(1, 1), (2, 3), (7, 7), (11, 11)], ids=str)
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_equals_torch(kernel: tuple[int, int], stride: int, isa: str) -> None:
    torch.manual_seed(stride)
    y, weight = (
        torch.randn(2, 20, 7, 5, dtype=torch.float64),
        torch.randn(20, 3, *kernel, dtype=torch.float64),
    )
    padding, extra = (kernel[0] // 2, kernel[1] // 2), stride - 1
    ours = ops.deconv2d(y, weight, stride, padding, extra)
    assert relative(ours, F.conv_transpose2d(y, weight, None, stride, padding, extra)) < 1e-14
    sized = ops.deconv2d(y, weight, stride, padding, output_size=ours.shape[2:])
    assert torch.equal(ours, sized)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("pool", [(2, 2, 0, 1), (3, 2, 1, 1), (3, 2, 0, 1), ((2, 1), (2, 2), 0, 1)], ids=str)
def test_is_the_gradient_of_convolution_and_pool(pool: tuple[Any, ...], relu: bool) -> None:
    """Asymmetric padding, groups and a dilated filter on the way; ReLU by the deconvnet's rule."""
    torch.manual_seed(1)
    x = torch.randn(2, 4, 17, 14, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 2, 3, 2, dtype=torch.float64)
    hidden = F.conv2d(F.pad(x, (1, 2, 0, 1)), weight, None, (2, 1), 0, (1, 2), groups=2)
    if relu:
        hidden.register_hook(lambda grad: grad.clamp(min=0))
    pooled = F.max_pool2d(hidden, *pool)
    seed = torch.randn_like(pooled)
    (expected,) = torch.autograd.grad(pooled, x, seed)
    switches = ops.max_pool2d_with_switches(hidden.detach(), *pool).switches
    with ops.require_kernels():
        result = ops.deconv2d(
            seed,
            weight,
            (2, 1),
            (0, 1),
            0,
            2,
            (1, 2),
            output_size=(17, 14),
            map_size=hidden.shape[2:],
            pool=pool,
            switches=switches,
            relu=relu,
        )
    assert relative(result, expected) < 1e-14


def test_window_equals_the_cut_of_the_whole_map() -> None:
    torch.manual_seed(2)
    y, weight = torch.zeros(1, 32, 12, 12), torch.randn(32, 8, 3, 3)
    y[:, :, 4:7, 5:9] = torch.randn(1, 32, 3, 4)
    whole = ops.deconv2d(y, weight, 2, 1, output_size=(24, 24), relu=True)
    origin = torch.tensor([[4, 5]])
    cut = ops.deconv2d(y[:, :, 4:7, 5:9], weight, 2, 1, output_size=(24, 24), map_size=(12, 12), relu=True, origin=origin)
    assert cut.shape == (1, 8, 7, 9)
    assert relative(cut, whole[:, :, 7:14, 9:18]) < 1e-6
    assert not torch.cat([whole[:, :, :7].flatten(), whole[:, :, 14:].flatten()]).any()


def test_nan_and_infinity() -> None:
    for dtype in FLOATS:
        for relu in (False, True):
            y = torch.zeros(1, 40, 3, 3, dtype=dtype)
            y[0, 33, 0, 0], y[0, 34, 2, 2] = math.nan, math.inf
            out = ops.deconv2d(y, torch.ones(40, 20, 1, 1, dtype=dtype), relu=relu)
            assert out[0, :, 0, 0].isnan().all()
            assert (out[0, :, 2, 2] == math.inf).all()
            assert out.isnan().sum() == 20


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_in_and_out_touch_nothing_else(layout: torch.memory_format, isa: str) -> None:
    torch.manual_seed(3)
    big = torch.randn(3, 30, 9, 11).contiguous(memory_format=layout)
    y, weight = big[1:, 3:22, 2:8, 1:10], torch.randn(40, 9, 3, 4)[10:29, 1:8, :, 1:4]
    out = Guarded((2, 7, 8, 11), torch.float32, layout)
    result = ops.deconv2d(y, weight, relu=True, out=out.view)
    assert result is out.view
    out.check()
    assert_same(result, ops.deconv2d(y.contiguous(), weight.contiguous(), relu=True))
    with pytest.raises(ArgumentError, match="out must have shape"):
        ops.deconv2d(y, weight, out=torch.empty(2, 7, 8, 10))


def test_same_bits_for_any_number_of_threads(isa: str) -> None:
    torch.manual_seed(4)
    for shape, filters in (
        ((1, 64, 9, 9), (64, 70, 3, 3)),
        ((5, 33, 3, 3), (33, 64, 1, 1)),
        ((1, 64, 40, 40), (64, 3, 5, 5)),
    ):
        y, weight = torch.randn(shape), torch.randn(filters)
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(ops.deconv2d(y, weight, relu=True))
        assert all(torch.equal(results[0], other) for other in results[1:])


def test_empty_batch() -> None:
    y, weight = torch.empty(0, 8, 3, 3), torch.randn(8, 2, 3, 3)
    assert ops.deconv2d(y, weight).shape == (0, 2, 5, 5)
    origin = torch.empty(0, 2, dtype=torch.int64)
    assert ops.deconv2d(y, weight, output_size=(9, 9), origin=origin).shape == (0, 2, 5, 5)


def test_wide_switches() -> None:
    """Windows of more than 256 taps have int32 switches."""
    torch.manual_seed(5)
    x, weight = torch.randn(1, 4, 34, 34, dtype=torch.float64), torch.randn(4, 3, 3, 3, dtype=torch.float64)
    pooled, switches = ops.max_pool2d_with_switches(x, 17)
    assert switches.dtype == torch.int32
    result = ops.deconv2d(pooled, weight, 1, 1, output_size=(34, 34), pool=(17, 17, 0, 1), switches=switches)
    unpooled = F.max_unpool2d(*F.max_pool2d(x, 17, return_indices=True), 17)
    assert relative(result, F.conv_transpose2d(unpooled, weight, None, 1, 1)) < 1e-14


def test_numpy_in_numpy_out() -> None:
    random = np.random.default_rng(0)
    y, weight = random.standard_normal((1, 6, 4, 4)), random.standard_normal((6, 2, 3, 3))
    result = ops.deconv2d(y, weight, 1, 1, relu=True)
    assert isinstance(result, np.ndarray)
    expected = ops.deconv2d(torch.from_numpy(y), torch.from_numpy(weight), 1, 1, relu=True)
    assert np.array_equal(result, expected.numpy())


POOLED = {"output_size": (6, 6), "pool": (2, 2, 0, 1)}


def gradient_cases() -> list[Case]:
    switches = torch.randint(0, 4, (2, 4, 3, 3), dtype=torch.uint8)
    origin = torch.tensor([[-1, 0], [1, 2]])
    return [
        {},
        {"stride": 2, "padding": 1, "groups": 2, "relu": True},
        {"output_size": (6, 7), "origin": origin, "relu": True},
        {**POOLED, "padding": 1, "switches": switches, "relu": True},
        {**POOLED, "padding": 1, "switches": switches, "origin": origin},
    ]


@pytest.mark.parametrize("number", range(5))
def test_gradients(number: int) -> None:
    torch.manual_seed(6)
    case = gradient_cases()[number]
    co = 2 // case.get("groups", 1)
    y = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, co, 3, 3, dtype=torch.float64, requires_grad=True)
    with ops.require_kernels():
        assert torch.autograd.gradcheck(lambda y, w: ops.deconv2d(y, w, **case), (y, weight))
        if number in (1, 3):
            assert torch.autograd.gradgradcheck(lambda y, w: ops.deconv2d(y, w, **case), (y, weight))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pooled", [False, True])
def test_opcheck(layout: torch.memory_format, pooled: bool) -> None:
    torch.manual_seed(7)
    y = torch.randn(2, 6, 4, 5).contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(6, 3, 3, 3, requires_grad=True)
    window, size, on = None, (6, 7), (4, 5)
    switches = None
    if pooled:
        window, size, on = [2, 2, 2, 2, 0, 0, 1, 1], (10, 12), (8, 10)
        switches = torch.randint(0, 4, y.shape, dtype=torch.uint8).contiguous(memory_format=layout)
    args = (y, weight, [1, 1], [0, 0], 1, [1, 1], size, on, window, switches, True, None)
    torch.library.opcheck(torch.ops.conelens.deconv2d.default, args)


def test_compiles_as_one_graph() -> None:
    torch.manual_seed(8)
    y, weight = torch.randn(2, 20, 4, 4, requires_grad=True), torch.randn(20, 3, 3, 3)
    switches = torch.randint(0, 4, y.shape, dtype=torch.uint8)

    def step(y: Tensor) -> Tensor:
        return ops.deconv2d(y * 2, weight, 1, 1, pool=(2, 2, 0, 1), switches=switches, output_size=(8, 8), relu=True)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    out = compiled(y)
    assert torch.equal(out, step(y))
    (grad,) = torch.autograd.grad(out.sum(), y)
    (expected,) = torch.autograd.grad(step(y).sum(), y)
    assert relative(grad, expected) < 1e-6


Y, WEIGHT, SWITCHES = (
    torch.zeros(1, 4, 3, 3),
    torch.zeros(4, 2, 3, 3),
    torch.zeros(1, 4, 3, 3, dtype=torch.uint8),
)


@pytest.mark.parametrize(
    ("message", "args", "options"),
    [
        ("y must be .N,C,H,W.", (Y[0], WEIGHT), {}),
        ("y must be float32", (Y.int(), WEIGHT.int()), {}),
        ("weight must be a tensor", (Y, WEIGHT[0]), {}),
        ("weight is torch.float64", (Y, WEIGHT.double()), {}),
        ("weight has 3 filters but y has 4", (Y, WEIGHT[:3]), {}),
        ("weight is empty", (Y, WEIGHT[:, :0]), {}),
        ("groups must divide y's 4 channels, got 3", (Y, WEIGHT), {"groups": 3}),
        ("stride must be at least 1", (Y, WEIGHT, 0), {}),
        ("padding must be an int or two", (Y, WEIGHT, 1, (1, 2, 3)), {}),
        ("padding .* leaves no output cell", (Y, WEIGHT, 1, 9), {}),
        ("give one of them", (Y, WEIGHT, 1, 0, 1), {"output_size": (5, 5)}),
        ("pool and switches belong together", (Y, WEIGHT), {"pool": (2, 2, 0, 1)}),
        ("pool must be .kernel_size, stride", (Y, WEIGHT), {"pool": (2, 2), "switches": SWITCHES}),
        ("give output_size .* or map_size", (Y, WEIGHT), {"pool": (2, 2, 0, 1), "switches": SWITCHES}),
        ("switches is int64", (Y, WEIGHT), {**POOLED, "switches": SWITCHES.long()}),
        ("switches must have shape", (Y, WEIGHT), {**POOLED, "switches": SWITCHES[..., :2]}),
        ("map_size is", (Y, WEIGHT), {"map_size": (4, 4)}),
        ("origin must be an int32 or int64", (Y, WEIGHT), {"origin": torch.zeros(1, 2), "map_size": (9, 9)}),
        ("out must be torch.float32", (Y, WEIGHT), {"out": torch.zeros(1, 2, 5, 5).double()}),
    ],
)
def test_bad_input_is_named(message: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=message):
        ops.deconv2d(*args, **options)


@pytest.mark.parametrize("tap", [7, 3], ids=["outside its window", "outside the map"])
def test_a_switch_that_points_nowhere_is_named(tap: int) -> None:
    switches = SWITCHES.clone()
    switches[0, 1, 2, 2] = tap
    with pytest.raises(ArgumentError, match=r"switches\[0, 1, 2, 2\]"):
        ops.deconv2d(Y, WEIGHT, 1, 1, output_size=(5, 5), pool=(2, 2, 0, 1), switches=switches, relu=True)


def test_requiring_kernels_refuses_the_reference() -> None:
    with ops.require_kernels(), ops.use_backend("reference"), pytest.raises(BackendError, match="deconv2d"):
        ops.deconv2d(Y, WEIGHT)
