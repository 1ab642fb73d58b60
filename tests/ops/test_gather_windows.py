"""gather_windows against a plain loop over cells, and its rules."""

from __future__ import annotations

import itertools
import math
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conelens import ops
from conelens.errors import ArgumentError
from tests.kit.compare import Guarded, assert_same

pytestmark = pytest.mark.usefixtures("two_threads")

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DTYPES = (*FLOATS, torch.uint8, torch.int32)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
BACKENDS = ("compiled", "reference")


def oracle(
    base: Tensor,
    patch: Tensor | None,
    patch_origin: Tensor | None,
    window_origin: Tensor,
    window_size: tuple[int, int],
    rows: Tensor | None = None,
    fill: float = 0.0,
    add: bool = False,
) -> Tensor:
    """Cell by cell, from the rules alone."""
    units = len(window_origin)
    out = base.new_empty(units, base.shape[1], *window_size)
    for u, i, j in itertools.product(range(units), *map(range, window_size)):
        y, x = int(window_origin[u, 0]) + i, int(window_origin[u, 1]) + j
        if not (0 <= y < base.shape[2] and 0 <= x < base.shape[3]):
            out[u, :, i, j] = fill
            continue
        row = int(rows[u]) if rows is not None else u if len(base) == units else 0
        cell = base[row, :, y, x]
        if patch is not None and patch_origin is not None:
            py, px = y - int(patch_origin[u, 0]), x - int(patch_origin[u, 1])
            if 0 <= py < patch.shape[2] and 0 <= px < patch.shape[3]:
                cell = cell + patch[u, :, py, px] if add else patch[u, :, py, px]
        out[u, :, i, j] = cell
    return out


def noise(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 50
    return (x.abs() if dtype == torch.uint8 else x).to(dtype)


def laid_out(x: Tensor, random: Random) -> Tensor:
    """x in either layout, sometimes as a view into something larger."""
    layout = random.choice(LAYOUTS)
    if random.random() < 0.5:
        return x.contiguous(memory_format=layout)
    margins = [(random.randint(0, 2), random.randint(0, 3)) for _ in x.shape]
    grown = torch.full([n + a + b for n, (a, b) in zip(x.shape, margins, strict=True)], 99).to(x.dtype)
    view = grown.contiguous(memory_format=layout)[tuple(slice(a, a + n) for n, (a, _) in zip(x.shape, margins, strict=True))]
    return view.copy_(x)


def random_case(seed: int) -> dict[str, Any]:
    """Sizes, places (windows outside, patches partly outside), rows, layouts, views, dtypes, fills."""
    random = Random(seed)
    units, channels = random.randint(1, 5), random.choice((1, 2, 3, 5, 8, 16, 37, 64, 133))
    dtype = DTYPES[seed % len(DTYPES)]
    floating = dtype.is_floating_point
    height, width = random.randint(1, 12), random.randint(1, 40)
    index = random.choice((torch.int32, torch.int64))
    generator = torch.Generator().manual_seed(seed)

    def origins(reach: int) -> Tensor:
        y = torch.randint(-reach, height + 1, (units, 1), generator=generator)
        x = torch.randint(-reach, width + 1, (units, 1), generator=generator)
        return torch.cat([y, x], 1).to(index)

    samples = random.choice((1, units, random.randint(1, 4)))
    rows = torch.randint(0, samples, (units,), generator=generator).to(index)
    case: dict[str, Any] = {
        "base": laid_out(noise((samples, channels, height, width), dtype, seed), random),
        "patch": None,
        "patch_origin": None,
        "window_origin": origins(random.choice((0, 4, 60))),
        "window_size": (random.randint(1, 14), random.randint(1, 45)),
        "rows": rows if samples not in (1, units) or random.random() < 0.5 else None,
        "fill": random.choice((0.0, 3.0, *((-math.inf, math.inf, math.nan, -1.5) if floating else ()))),
    }
    if random.random() < 0.85:
        patch_size = (random.randint(1, 10), random.randint(1, 30))
        case["patch"] = laid_out(noise((units, channels, *patch_size), dtype, seed + 1), random)
        case["patch_origin"] = case["window_origin"] + random.choice((0, 1, 2)) if random.random() < 0.4 else origins(8)
        case["add"] = floating and random.random() < 0.5
    return case


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_a_plain_loop(backend: str, isa: str) -> None:
    for seed in range(150):
        case = random_case(seed)
        wanted = oracle(**case)
        with ops.use_backend(backend):
            found = ops.gather_windows(**case)
        try:
            assert_same(found, wanted)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error
        assert found.dtype == case["base"].dtype
        last = case["base"].stride(1) == 1 and case["base"].stride(3) != 1
        assert found.is_contiguous(memory_format=LAYOUTS[last])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("add", [False, True])
def test_every_place_of_patch_and_window(backend: str, add: bool, isa: str) -> None:
    """One axis at a time, every relation of window, patch and map: before, across, inside, behind."""
    base = torch.arange(1.0, 6).reshape(1, 1, 1, 5).repeat(1, 3, 5, 1).contiguous(memory_format=torch.channels_last)
    places = torch.cartesian_prod(torch.arange(-7, 8), torch.arange(-7, 8))  # window, patch
    other = torch.ones_like(places[:, :1])
    for axis in (0, 1):
        window, patch = (torch.cat([p, other][:: 1 if axis == 0 else -1], 1) for p in places.split(1, 1))
        size = (4, 2) if axis == 0 else (2, 4)
        values = noise((len(places), 3, 3, 3), torch.float32, 0)
        with ops.use_backend(backend):
            found = ops.gather_windows(base, values, patch, window, size, fill=-7, add=add)
        assert_same(found, oracle(base, values, patch, window, size, fill=-7, add=add))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_bits_are_copied_and_sums_round_once(dtype: torch.dtype, backend: str, isa: str) -> None:
    bits = torch.randint(0, 256, (2, 6, 5, 7 * dtype.itemsize), dtype=torch.uint8).view(dtype)  # any NaN, subnormal, -0
    origin = torch.zeros(2, 2, dtype=torch.int64)
    for layout in LAYOUTS:
        x = bits.contiguous(memory_format=layout)
        with ops.use_backend(backend):
            copied = ops.gather_windows(x, None, None, origin, (5, 7))
            assert torch.equal(copied.contiguous().view(torch.uint8), bits.view(torch.uint8))
            x, y = (noise((2, 67, 5, 33), dtype, seed).contiguous(memory_format=layout) for seed in (1, 2))
            summed = ops.gather_windows(x, y, origin, origin, (5, 33), add=True)
        assert_same(summed, (x.double() + y.double()).to(dtype))


@pytest.mark.parametrize("far", [2**31, 2**62, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_origins_at_the_ends_of_int64(backend: str, far: int, isa: str) -> None:
    base, patch = torch.ones(1, 2, 4, 4), torch.full((3, 2, 2, 2), 5.0)
    window = torch.tensor([[0, far], [0, 0], [far, far]])
    place = torch.tensor([[0, 0], [far, 0], [far, far]])
    with ops.use_backend(backend):
        out = ops.gather_windows(base, patch, place, window, 3, fill=-1)
    assert (out[0] == -1).all() and (out[1] == 1).all() and (out[2] == -1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_and_an_expanded_base_touch_nothing_else(layout: torch.memory_format, backend: str, isa: str) -> None:
    base = noise((1, 5, 9, 9), torch.float32, 0).contiguous(memory_format=layout).expand(3, -1, -1, -1)
    big = noise((3, 7, 9, 11), torch.float32, 1).contiguous(memory_format=layout)
    patch = big[:, 1:6, 2:6, 3:8]
    origin = torch.tensor([[1, 2], [-2, 3], [7, 6]])
    window = torch.stack([origin - 1, origin], 0).repeat(1, 1, 2)[0, :, 1:3]  # columns 1 and 2: not contiguous
    out = Guarded((3, 5, 6, 7), torch.float32, layout)
    with ops.use_backend(backend):
        result = ops.gather_windows(base, patch, origin, window, (6, 7), fill=2.0, out=out.view)
    assert result is out.view
    assert_same(out.view, oracle(base, patch, origin, window, (6, 7), fill=2.0))
    out.check()
    other = Guarded((3, 5, 6, 7), torch.float32, LAYOUTS[layout == LAYOUTS[0]])
    with ops.use_backend(backend):
        ops.gather_windows(base, patch, origin, window, (6, 7), fill=2.0, out=other.view)
    assert_same(other.view, out.view)
    other.check()


def test_strides_of_no_layout() -> None:
    base = noise((2, 4, 6, 18), torch.float32, 0)[..., ::2].transpose(2, 3)
    patch = noise((2, 4, 6, 4), torch.float32, 1)[..., ::2]
    origin = torch.tensor([[1, 2], [-2, 3]])
    assert_same(ops.gather_windows(base, patch, origin, origin - 1, 5), oracle(base, patch, origin, origin - 1, (5, 5)))
    negated = torch._neg_view(patch)
    with torch.no_grad():
        assert_same(ops.gather_windows(base, negated, origin, origin, 5), oracle(base, -patch, origin, origin, (5, 5)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_units_no_samples_no_channels(backend: str) -> None:
    none = torch.zeros(0, 2, dtype=torch.int32)
    with ops.use_backend(backend):
        assert ops.gather_windows(torch.zeros(3, 2, 4, 4), None, None, none, 3, rows=none[:, 0]).shape == (0, 2, 3, 3)
        assert ops.gather_windows(torch.zeros(1, 2, 4, 4), torch.zeros(0, 2, 1, 1), none, none, 3).shape == (0, 2, 3, 3)
        assert ops.gather_windows(torch.zeros(0, 2, 4, 4), None, None, none, 3).shape == (0, 2, 3, 3)
        assert ops.gather_windows(torch.zeros(2, 0, 4, 4), None, None, none.new_zeros(2, 2), 3).shape == (2, 0, 3, 3)


def test_same_bits_on_every_run_and_thread_count(isa: str) -> None:
    for layout in LAYOUTS:
        base = torch.randn(1, 64, 28, 28).contiguous(memory_format=layout)
        patch = torch.randn(16, 64, 10, 10).contiguous(memory_format=layout)
        origin = torch.randint(-4, 24, (16, 2))
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(ops.gather_windows(base, patch, origin, origin - 1, 12, add=True))
        assert all(torch.equal(results[0], other) for other in results[1:])


def test_other_libraries_arrays() -> None:
    base = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    patch = np.full((1, 1, 1, 1), -5, dtype=np.float32)
    out = ops.gather_windows(base, patch, np.array([[1, 2]]), np.array([[1, 1]]), 2)
    assert isinstance(out, np.ndarray)
    assert out.tolist() == [[[[5, -5], [9, 10]]]]
    mine = np.empty_like(out)
    assert ops.gather_windows(base, None, None, np.array([[2, 2]]), 2, out=mine) is mine
    assert mine.tolist() == [[[[10, 11], [14, 15]]]]


# --- torch: registration, gradients, compilation --------------------------------------------------


def arguments(dtype: torch.dtype = torch.float32, layout: torch.memory_format = LAYOUTS[0]) -> dict[str, Any]:
    """Windows across every border, patches partly outside the map and the window, and two units of one sample."""
    return {
        "base": noise((2, 3, 5, 6), dtype, 0).contiguous(memory_format=layout),
        "patch": noise((4, 3, 2, 3), dtype, 1).contiguous(memory_format=layout),
        "patch_origin": torch.tensor([[0, 1], [-1, 4], [4, -1], [1, 1]]),
        "window_origin": torch.tensor([[-1, 0], [0, 3], [2, -2], [9, 9]], dtype=torch.int32),
        "window_size": (4, 4),
        "rows": torch.tensor([1, 0, 1, 0]),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("add", [False, True])
def test_opcheck(add: bool, layout: torch.memory_format) -> None:
    case = {**arguments(layout=layout), "fill": 1.0, "add": add}
    out = ops.gather_windows(**case)
    values = list(case.values())
    torch.library.opcheck(torch.ops.conelens.gather_windows.out, tuple(values), {"out_out": out})
    values[:2] = (values[0].clone().requires_grad_(), values[1].clone().requires_grad_())
    torch.library.opcheck(torch.ops.conelens.gather_windows.default, tuple(values))
    values[1:3] = (None, None)
    torch.library.opcheck(torch.ops.conelens.gather_windows.default, (*values[:-1], False))


@pytest.mark.parametrize("which", ["both", "base", "patch", "no patch"])
@pytest.mark.parametrize("add", [False, True])
def test_gradients_twice(add: bool, which: str) -> None:
    case = arguments(torch.float64)
    if which == "no patch":
        case["patch"] = case["patch_origin"] = None
    add = add and case["patch"] is not None
    names = [n for n in ("base", "patch") if case[n] is not None and which in ("both", "no patch", n)]

    def square(*tensors: Tensor) -> Tensor:
        return ops.gather_windows(**(case | dict(zip(names, tensors, strict=True))), add=add, fill=2.0).square()

    tensors = tuple((case[name] / 50).requires_grad_() for name in names)
    assert torch.autograd.gradcheck(square, tensors)
    assert torch.autograd.gradgradcheck(square, tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_halves_sum_in_float(dtype: torch.dtype) -> None:
    base = torch.zeros(1, 1, 1, 1, dtype=dtype, requires_grad=True)
    ops.gather_windows(base, None, None, torch.zeros(5000, 2, dtype=torch.int64), 1).sum().backward()
    assert base.grad is not None and base.grad.item() == torch.tensor(5000.0).to(dtype).item()


def test_compiles_as_one_graph() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def chain(base: Tensor, patch: Tensor, origin: Tensor) -> Tensor:
        return ops.gather_windows(base + 1, patch, origin, origin - 1, (4, 5), add=True) * 2

    for units in (3, 5):
        base = torch.randn(1, 3, 6, 6 + units, requires_grad=True)
        patch, origin = torch.randn(units, 3, 2, 2), torch.randint(-2, 7, (units, 2))
        wanted = ops.gather_windows(base + 1, patch, origin, origin - 1, (4, 5), add=True) * 2
        found = chain(base, patch, origin)
        assert torch.equal(found, wanted)
        assert torch.equal(*(torch.autograd.grad(y.square().sum(), base)[0] for y in (found, wanted)))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_two_to_the_31_elements(layout: torch.memory_format) -> None:
    base = torch.ones(1, 33, 64, 64, dtype=torch.uint8).contiguous(memory_format=layout)
    units = 16000  # 33 * 64 * 64 * 16000 = 2.16e9
    origin = torch.zeros(units, 2, dtype=torch.int64)
    origin[-1] = 1
    with ops.require_kernels():
        out = ops.gather_windows(base, None, None, origin, 64, fill=7)
    assert out[:-1].min() == out[:-1].max() == 1
    assert_same(out[-1:], oracle(base, None, None, origin[-1:], (64, 64), fill=7))


# --- bad input ------------------------------------------------------------------------------------


def test_a_row_that_base_does_not_have_is_named() -> None:
    for backend, row in itertools.product(BACKENDS, (2, -1)):
        case = arguments() | {"rows": torch.tensor([0, 1, row, 5])}
        with ops.use_backend(backend), pytest.raises(ArgumentError, match=rf"rows\[2\] is {row}, but base has 2 samples"):
            ops.gather_windows(**case)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": torch.zeros(3, 5, 6)}, r"base must be \[N,C,H,W\]"),
        ({"base": torch.zeros(2, 3, 5, 6, dtype=torch.int64)}, "base must be float32, .* uint8 or int32, got torch.int64"),
        ({"base": torch.zeros(2, 3, 0, 6)}, "base has no cells"),
        ({"patch": torch.zeros(4, 3, 2)}, r"patch must be \[N,C,H,W\]"),
        ({"patch": torch.zeros(3, 3, 2, 3)}, r"patch must have shape \[4, 3, 2, 3\], got \[3, 3, 2, 3\]"),
        ({"patch": torch.zeros(4, 2, 2, 3)}, r"patch must have shape \[4, 3, 2, 3\]"),
        ({"patch": torch.zeros(4, 3, 2, 3, dtype=torch.float64)}, "patch must be torch.float32, got torch.float64"),
        ({"patch": torch.zeros(4, 3, 2, 3, device="meta")}, "patch is on meta but base is on cpu"),
        ({"patch": None}, "patch and patch_origin go together"),
        ({"patch_origin": None}, "patch and patch_origin go together"),
        ({"patch_origin": torch.zeros(4, 2)}, r"patch_origin must be an int32 or int64 tensor \[U,2\], got torch.float32"),
        ({"patch_origin": torch.zeros(3, 2, dtype=torch.int64)}, r"patch_origin must have shape \[4, 2\], got \[3, 2\]"),
        ({"window_origin": [[0, 0]]}, r"window_origin must be an int32 or int64 tensor \[U,2\], got list"),
        ({"window_origin": torch.zeros(4, 3, dtype=torch.int64)}, r"window_origin must have shape \[4, 2\], got \[4, 3\]"),
        ({"window_origin": torch.zeros(4, 2, dtype=torch.int64, device="meta")}, "window_origin is on meta"),
        ({"window_size": 0}, "window_size must be at least 1"),
        ({"window_size": (2, 2, 2)}, "window_size must be an int or two"),
        ({"rows": None}, "base has 2 samples for 4 windows: rows must say"),
        ({"rows": torch.zeros(3, dtype=torch.int64)}, r"rows must have shape \[4\], got \[3\]"),
        ({"rows": torch.zeros(4)}, r"rows must be an int32 or int64 tensor \[U\]"),
        ({"patch": None, "patch_origin": None, "add": True}, "add=True has nothing to add"),
        ({"fill": 1e39}, "fill must be a number that torch.float32 holds"),
        ({"out": torch.zeros(4, 3, 4, 5)}, r"out must have shape \[4, 3, 4, 4\]"),
        ({"out": torch.zeros(4, 3, 4, 4, dtype=torch.float64)}, "out must be torch.float32"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ops.gather_windows(**(arguments() | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fill": 0.5}, "fill must be a number that torch.uint8 holds, got 0.5"),
        ({"fill": -1}, "fill must be a number that torch.uint8 holds"),
        ({"fill": math.nan}, "fill must be a number that torch.uint8 holds, got nan"),
        ({"add": True}, "add=True wants floats, got torch.uint8"),
    ],
)
def test_bad_input_for_switches_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ops.gather_windows(**(arguments(torch.uint8) | change))
