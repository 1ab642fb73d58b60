"""relu_change against a plain loop over cells, and its rules."""

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

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
BACKENDS = ("compiled", "reference")


def oracle(change: Tensor, base: Tensor, origin: Tensor, rows: Tensor | None = None) -> Tensor:
    """Cell by cell, from the rules alone, in the dtype that the rules compute in."""
    compute = torch.float64 if change.dtype == torch.float64 else torch.float32
    out = torch.zeros_like(change)
    for u, i, j in itertools.product(range(len(change)), *map(range, change.shape[2:])):
        y, x = int(origin[u, 0]) + i, int(origin[u, 1]) + j
        if 0 <= y < base.shape[2] and 0 <= x < base.shape[3]:
            row = int(rows[u]) if rows is not None else u if len(base) == len(change) else 0
            z, moved = base[row, :, y, x].to(compute), change[u, :, i, j].to(compute)
            on = torch.where(moved > -z, moved, -z)  # off afterwards: all of z is lost
            off = torch.where(moved + z > 0, moved + z, 0)
            cell = torch.where(z > 0, on, off)
            out[u, :, i, j] = torch.where(z.isnan() | moved.isnan(), math.nan, cell)
    return out


def noise(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Noise with zeros of both signs and a few NaN."""
    generator = torch.Generator().manual_seed(seed)
    x, kind = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
    return x.masked_fill(kind < 0.1, 0.0).masked_fill(kind > 0.9, -0.0).masked_fill(kind > 0.98, math.nan).to(dtype)


def laid_out(x: Tensor, random: Random, layout: torch.memory_format) -> Tensor:
    """x in this layout, sometimes as a slice of something larger."""
    if random.random() < 0.4:
        return x.contiguous(memory_format=layout)
    margins = [(random.randint(0, 2), random.randint(0, 3)) for _ in x.shape]
    grown = torch.full([n + a + b for n, (a, b) in zip(x.shape, margins, strict=True)], math.nan, dtype=x.dtype)
    view = grown.contiguous(memory_format=layout)[tuple(slice(a, a + n) for n, (a, _) in zip(x.shape, margins, strict=True))]
    return view.copy_(x)


def random_case(seed: int) -> dict[str, Any]:
    """Sizes, places (also outside), rows, layouts (now and then a different one of each), slices, dtypes."""
    random, generator = Random(seed), torch.Generator().manual_seed(seed)
    dtype, index = DTYPES[seed % len(DTYPES)], random.choice((torch.int32, torch.int64))
    units, channels = random.randint(1, 5), random.choice((1, 2, 3, 5, 8, 16, 37, 64, 133))
    samples = random.choice((1, units, random.randint(1, 4)))
    height, width, size = random.randint(1, 12), random.randint(1, 40), (random.randint(1, 10), random.randint(1, 45))
    reach = random.choice((0, 4, 50))
    places = [torch.randint(-reach, n + 1, (units,), generator=generator) for n in (height, width)]
    rows = torch.randint(0, samples, (units,), generator=generator).to(index)
    layout = random.choice(LAYOUTS)
    other = layout if random.random() < 0.8 else random.choice(LAYOUTS)
    return {
        "change": laid_out(noise((units, channels, *size), dtype, seed), random, layout),
        "base": laid_out(noise((samples, channels, height, width), dtype, seed + 1), random, other),
        "origin": torch.stack(places, 1).to(index),
        "rows": rows if samples not in (1, units) or random.random() < 0.5 else None,
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_a_plain_loop(backend: str, isa: str) -> None:
    for seed in range(150):
        case = random_case(seed)
        wanted = oracle(**case)
        with ops.use_backend(backend):
            found = ops.relu_change(**case)
        try:
            assert_same(found, wanted)
            with ops.use_backend(backend):
                assert ops.relu_change(**case, out=case["change"]) is case["change"]
            assert_same(case["change"], wanted)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error
        last = case["base"].stride(1) == 1 and case["base"].stride(3) != 1
        assert found.is_contiguous(memory_format=LAYOUTS[last])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_on_passes_its_change_unrounded_and_zero_gives_zero(dtype: torch.dtype, backend: str, isa: str) -> None:
    base = (torch.rand(3, 8, 5, 6, dtype=torch.float64) * 1000 + 100).to(dtype)
    change = (torch.rand(3, 8, 5, 6, dtype=torch.float64) / 1000 + 0.001).to(dtype)
    origin = torch.zeros(3, 2, dtype=torch.int64)
    with ops.use_backend(backend):
        assert torch.equal(ops.relu_change(change, base, origin), change)
        assert torch.equal(ops.relu_change(-base * 2, base, origin), -base)
        assert torch.equal(ops.relu_change(base * 2, -base, origin), base)
        for value in (1.5, -1.5, math.inf, -math.inf, 0.0):
            clean = torch.full_like(base, value)
            assert not ops.relu_change(torch.zeros_like(base), clean, origin).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_round_once(dtype: torch.dtype, backend: str, isa: str) -> None:
    change, base = (torch.randn(2, 67, 5, 33).to(dtype) for _ in range(2))
    wanted = (torch.relu(change.double() + base.double()) - torch.relu(base.double())).to(dtype)  # exact before it is rounded
    for layout in LAYOUTS:
        maps = [x.contiguous(memory_format=layout) for x in (change, base)]
        with ops.use_backend(backend):
            assert_same(ops.relu_change(*maps, torch.zeros(2, 2, dtype=torch.int32)), wanted)


@pytest.mark.parametrize("far", [2**31, 2**62, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_origins_at_the_ends_of_int64(backend: str, far: int, isa: str) -> None:
    origin = torch.tensor([[0, far], [0, 0], [far, far]])
    with ops.use_backend(backend):
        out = ops.relu_change(torch.full((3, 2, 2, 2), math.nan), torch.ones(1, 2, 4, 4), origin)
    assert (out[0] == 0).all() and out[1].isnan().all() and (out[2] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_and_an_expanded_base_touch_nothing_else(layout: torch.memory_format, backend: str, isa: str) -> None:
    base = noise((1, 5, 9, 9), torch.float32, 0).contiguous(memory_format=layout).expand(3, -1, -1, -1)
    change = noise((3, 7, 9, 11), torch.float32, 1).contiguous(memory_format=layout)[:, 1:6, 2:6, 3:8]
    origin = torch.tensor([[0, 1, 2], [0, -2, 3], [0, 7, 6]])[:, 1:]  # not contiguous
    wanted = oracle(change, base, origin)
    for target in LAYOUTS:
        out = Guarded((3, 5, 4, 5), torch.float32, target)
        with ops.use_backend(backend):
            assert ops.relu_change(change, base, origin, out=out.view) is out.view
        assert_same(out.view, wanted)
        out.check()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_place_touches_nothing_else(layout: torch.memory_format, dtype: torch.dtype, backend: str, isa: str) -> None:
    """Off, a change that were rectified twice would come out smaller: each cell must be read before it is written."""
    base = -torch.rand(1, 37, 9, 30).to(dtype).contiguous(memory_format=layout)
    change = Guarded((3, 37, 4, 29), dtype, layout)
    change.view.copy_(torch.rand(3, 37, 4, 29) * 4)
    origin = torch.tensor([[1, 2], [-2, 3], [7, 6]])
    wanted = oracle(change.view, base, origin)
    for mode in (torch.no_grad, torch.inference_mode):
        mine = Guarded((3, 37, 4, 29), dtype, layout)
        mine.view.copy_(change.view)
        with mode(), ops.use_backend(backend):
            ops.relu_change(mine.view, base, origin, out=mine.view)
        assert_same(mine.view, wanted)
        mine.check()


def test_strides_of_no_layout() -> None:
    base = noise((2, 4, 6, 18), torch.float32, 0)[..., ::2].transpose(2, 3)
    change = noise((2, 4, 6, 8), torch.float32, 1)[..., ::2]
    origin = torch.tensor([[1, 2], [-2, 3]])
    assert_same(ops.relu_change(change, base, origin), oracle(change, base, origin))
    with torch.no_grad():
        negated = torch._neg_view(change), torch._neg_view(base)
        assert_same(ops.relu_change(change, negated[1], origin), oracle(change, -base, origin))
        assert_same(ops.relu_change(negated[0], base, origin), oracle(-change, base, origin))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_units_no_channels(backend: str) -> None:
    none = torch.zeros(0, 2, dtype=torch.int32)
    with ops.use_backend(backend):
        found = ops.relu_change(torch.zeros(0, 2, 3, 3), torch.zeros(3, 2, 4, 4), none, rows=none[:, 0])
        assert found.shape == (0, 2, 3, 3)
        assert ops.relu_change(torch.zeros(0, 2, 3, 3), torch.zeros(0, 2, 4, 4), none).shape == (0, 2, 3, 3)
        assert ops.relu_change(torch.zeros(2, 0, 3, 3), torch.zeros(2, 0, 4, 4), none.new_zeros(2, 2)).shape == (2, 0, 3, 3)


def test_same_bits_on_every_run_and_thread_count(isa: str) -> None:
    for layout in LAYOUTS:
        base = torch.randn(1, 64, 28, 28).contiguous(memory_format=layout)
        change = torch.randn(16, 64, 12, 12).contiguous(memory_format=layout)
        origin = torch.randint(-4, 24, (16, 2))
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(ops.relu_change(change, base, origin))
        assert all(torch.equal(results[0], other) for other in results[1:])
        assert_same(results[0], oracle(change, base, origin))


def test_other_libraries_arrays() -> None:
    base = np.arange(-8, 8, dtype=np.float32).reshape(1, 1, 4, 4)
    change = np.full((1, 1, 2, 2), -2.5, dtype=np.float32)
    out = ops.relu_change(change, base, np.array([[2, 2]]))
    assert isinstance(out, np.ndarray)
    assert out.tolist() == [[[[-2, -2.5], [-2.5, -2.5]]]]
    assert ops.relu_change(change, base, np.array([[2, 0]]), out=change) is change
    assert change.tolist() == [[[[0, -1], [-2.5, -2.5]]]]


# --- torch: registration, gradients, compilation --------------------------------------------------


def arguments(dtype: torch.dtype = torch.float32, layout: torch.memory_format = LAYOUTS[0]) -> dict[str, Any]:
    """Changes across every border, one outside, and two units of one sample."""
    generator = torch.Generator().manual_seed(0)
    return {
        "change": torch.randn(4, 3, 4, 3, generator=generator).to(dtype).contiguous(memory_format=layout),
        "base": torch.randn(2, 3, 5, 6, generator=generator).to(dtype).contiguous(memory_format=layout),
        "origin": torch.tensor([[-1, 0], [0, 4], [3, -2], [9, 9]], dtype=torch.int32),
        "rows": torch.tensor([1, 0, 1, 0]),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: torch.memory_format) -> None:
    case = arguments(layout=layout)
    out = ops.relu_change(**case)
    torch.library.opcheck(torch.ops.conelens.relu_change.out, tuple(case.values()), {"out_out": out})
    change, base, *rest = case.values()
    maps = change.requires_grad_(), base.requires_grad_()
    torch.library.opcheck(torch.ops.conelens.relu_change.default, (*maps, *rest))
    torch.library.opcheck(torch.ops.conelens.relu_change.default, (maps[0], maps[1].detach()[:1], rest[0], None))


@pytest.mark.parametrize("names", [("change", "base"), ("change",), ("base",)])
def test_gradients_twice(names: tuple[str, ...]) -> None:
    case = arguments(torch.float64)

    def square(*tensors: Tensor) -> Tensor:
        return ops.relu_change(**(case | dict(zip(names, tensors, strict=True)))).square()

    tensors = tuple(case[name].requires_grad_() for name in names)
    assert torch.autograd.gradcheck(square, tensors)
    assert torch.autograd.gradgradcheck(square, tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_halves_keep_their_dtype_and_sum_in_float(dtype: torch.dtype) -> None:
    base = torch.full((1, 1, 1, 1), -1.0, dtype=dtype, requires_grad=True)
    change = torch.full((5000, 1, 1, 1), 2.0, dtype=dtype, requires_grad=True)
    ops.relu_change(change, base, torch.zeros(5000, 2, dtype=torch.int64)).sum().backward()
    assert base.grad is not None and base.grad.item() == torch.tensor(5000.0).to(dtype).item()
    assert change.grad is not None and change.grad.dtype == dtype and (change.grad == 1).all()


def test_compiles_as_one_graph() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def chain(change: Tensor, base: Tensor, origin: Tensor) -> Tensor:
        return ops.relu_change(change * 2, base + 1, origin) * 2

    for units in (3, 5):
        change = torch.randn(units, 3, 2, 2 + units, requires_grad=True)
        base, origin = torch.randn(1, 3, 6, 6), torch.randint(-2, 7, (units, 2))
        wanted = ops.relu_change(change * 2, base + 1, origin) * 2
        found = chain(change, base, origin)
        assert torch.equal(found, wanted)
        assert torch.equal(*(torch.autograd.grad(y.square().sum(), change)[0] for y in (found, wanted)))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_two_to_the_31_elements(layout: torch.memory_format) -> None:
    base = -torch.ones(1, 33, 64, 64, dtype=torch.bfloat16).contiguous(memory_format=layout)
    units = 16000  # 33 * 64 * 64 * 16000 = 2.16e9
    change = torch.empty(units, 33, 64, 64, dtype=torch.bfloat16, memory_format=layout).fill_(3)
    origin = torch.zeros(units, 2, dtype=torch.int64)
    origin[-1] = 1
    with ops.require_kernels(), torch.no_grad():
        ops.relu_change(change, base, origin, out=change)
    assert change[:-1].min() == change[:-1].max() == 2
    assert_same(change[-1:], oracle(torch.full_like(change[-1:], 3), base, origin[-1:]))


# --- bad input ------------------------------------------------------------------------------------


def test_a_row_that_base_does_not_have_is_named() -> None:
    for backend, row in itertools.product(BACKENDS, (2, -1)):
        case = arguments() | {"rows": torch.tensor([0, 1, row, 5])}
        with ops.use_backend(backend), pytest.raises(ArgumentError, match=rf"rows\[2\] is {row}, but base has 2 samples"):
            ops.relu_change(**case)


def test_out_is_change_itself_or_apart_from_everything() -> None:
    case = arguments()
    large = torch.zeros(5, 3, 5, 6)
    for change, out in ((large[:4, :, :4, :3], large[1:, :, :4, :3]), (large[:4, :, :4, :3], large[:4, :, 1:, :3])):
        with torch.no_grad(), pytest.raises(ArgumentError, match="out shares memory with change"):
            ops.relu_change(**(case | {"change": change}), out=out)
    with pytest.raises(ArgumentError, match="out shares memory with base"):
        ops.relu_change(**(case | {"base": large[:2]}), out=large[:4, :, :4, :3])
    one = torch.zeros(4, 1, 4, 3).expand(-1, 3, -1, -1)
    with pytest.raises(ArgumentError, match="out has several cells in one place"):
        ops.relu_change(**(case | {"change": one}), out=one)
    with pytest.raises(ArgumentError, match="out= cannot be differentiated"):
        ops.relu_change(**(case | {"base": case["base"].requires_grad_()}), out=case["change"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"change": torch.zeros(4, 3, 4)}, r"change must be \[N,C,H,W\]"),
        ({"change": torch.zeros(4, 3, 0, 3)}, "change has no cells"),
        ({"change": torch.zeros(4, 3, 4, 3, dtype=torch.int32)}, "change must be float32, .* or float64, got torch.int32"),
        ({"base": torch.zeros(3, 5, 6)}, r"base must be \[N,C,H,W\]"),
        ({"base": torch.zeros(2, 4, 5, 6)}, r"base must have shape \[2, 3, 5, 6\], got \[2, 4, 5, 6\]"),
        ({"base": torch.zeros(2, 3, 5, 6, dtype=torch.float64)}, "base must be torch.float32, got torch.float64"),
        ({"base": torch.zeros(2, 3, 5, 6, device="meta")}, "base is on meta but change is on cpu"),
        ({"origin": torch.zeros(4, 2)}, r"origin must be an int32 or int64 tensor \[U,2\], got torch.float32"),
        ({"origin": torch.zeros(3, 2, dtype=torch.int64)}, r"origin must have shape \[4, 2\], got \[3, 2\]"),
        ({"origin": [[0, 0]]}, r"origin must be an int32 or int64 tensor \[U,2\], got list"),
        ({"rows": None}, "base has 2 samples for 4 changes: rows must say"),
        ({"rows": torch.zeros(3, dtype=torch.int64)}, r"rows must have shape \[4\], got \[3\]"),
        ({"rows": torch.zeros(4)}, r"rows must be an int32 or int64 tensor \[U\]"),
        ({"out": torch.zeros(4, 3, 4, 4)}, r"out must have shape \[4, 3, 4, 3\]"),
        ({"out": torch.zeros(4, 3, 4, 3, dtype=torch.float64)}, "out must be torch.float32"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ops.relu_change(**(arguments() | change))
