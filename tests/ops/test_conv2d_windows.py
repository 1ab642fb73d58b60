"""conv2d_windows against a plain loop over outputs, and its rules."""

from __future__ import annotations

import itertools
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conelens import ops
from conelens.errors import ArgumentError, BackendError
from conelens.kernels.conv2d_windows import triton_configs
from tests.kit.compare import Guarded, relative

pytestmark = pytest.mark.usefixtures("two_threads")

LAYOUTS = (torch.contiguous_format, torch.channels_last)
BACKENDS = ("compiled", "reference")
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def oracle(
    base: Tensor, patch: Tensor, patch_origin: Tensor, window_origin: Tensor, weight: Tensor, bias: Tensor | None,
    stride: tuple[int, int], dilation: tuple[int, int], out_size: tuple[int, int], rows: Tensor | None, relu: bool,
) -> Tensor:  # fmt: skip
    """Tap by tap, in float64, from the rules alone."""
    units, map_size = len(window_origin), base.shape[2:]
    out = torch.zeros(units, weight.shape[0], *out_size, dtype=torch.float64)
    for u, i, j in itertools.product(range(units), *map(range, out_size)):
        row = int(rows[u]) if rows is not None else u if len(base) == units else 0
        for ky, kx in itertools.product(*map(range, weight.shape[2:])):
            y = int(window_origin[u, 0]) + i * stride[0] + ky * dilation[0]
            x = int(window_origin[u, 1]) + j * stride[1] + kx * dilation[1]
            if not (0 <= y < map_size[0] and 0 <= x < map_size[1]):
                continue
            py, px = y - int(patch_origin[u, 0]), x - int(patch_origin[u, 1])
            covered = 0 <= py < patch.shape[2] and 0 <= px < patch.shape[3]
            cell = patch[u, :, py, px] if covered else base[row, :, y, x]
            out[u, :, i, j] += weight[:, :, ky, kx].double() @ cell.double()
    if bias is not None:
        out += bias.double()[:, None, None]
    return out.relu() if relu else out


def random_case(seed: int) -> dict[str, Any]:
    """Sizes, places (windows and patches partly or wholly outside), rows, strides, dilations, dtypes, layouts."""
    random, generator = Random(seed), torch.Generator().manual_seed(seed)
    dtype = tuple(TOLERANCE)[seed % len(TOLERANCE)]

    def noise(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator).to(dtype)
        return x.contiguous(memory_format=random.choice(LAYOUTS)) if len(shape) == 4 else x

    def pair(most: int) -> tuple[int, int]:
        return random.randint(1, most), random.randint(1, most)

    units, channels, filters = random.randint(1, 4), random.choice((1, 3, 8, 17)), random.choice((1, 4, 19))
    samples = random.choice((1, units, 3))
    places = [torch.randint(-6, 12, (units, 2), generator=generator) for _ in range(2)]
    places[0] = places[0].to(random.choice((torch.int32, torch.int64)))
    rows = torch.randint(0, samples, (units,), generator=generator)
    return {
        "base": noise(samples, channels, *pair(12)), "patch": noise(units, channels, *pair(7)),
        "patch_origin": places[0], "window_origin": places[1],
        "weight": noise(filters, channels, *pair(4)), "bias": noise(filters) if random.random() < 0.5 else None,
        "stride": pair(3), "dilation": pair(2), "out_size": pair(6),
        "rows": rows if samples not in (1, units) or random.random() < 0.5 else None, "relu": random.random() < 0.5,
    }  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_a_plain_loop(backend: str) -> None:
    for seed in range(60):
        case = random_case(seed)
        with ops.use_backend(backend):
            found = ops.conv2d_windows(**case)
        wanted = oracle(**case)
        assert relative(found, wanted) < TOLERANCE[found.dtype], f"seed {seed}"
        last = case["base"].stride(1) == 1 and case["base"].stride(3) != 1
        assert found.dtype == case["base"].dtype and found.is_contiguous(memory_format=LAYOUTS[last]), f"seed {seed}"


def test_equals_gathering_and_convolving_bit_for_bit() -> None:
    """The compiled way is those two: a sweep may take either."""
    case = arguments(torch.float32, torch.channels_last) | {"relu": True}
    maps = (case[name] for name in ("base", "patch", "patch_origin", "window_origin"))
    windows = ops.gather_windows(*maps, (5, 4), rows=case["rows"])
    wanted = F.conv2d(windows, case["weight"], case["bias"], case["stride"], 0, case["dilation"]).relu()
    assert torch.equal(ops.conv2d_windows(**case), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_is_written_and_nothing_beside_it(backend: str) -> None:
    case = arguments(torch.float32)
    for layout in LAYOUTS:
        out = Guarded((4, 5, 2, 3), torch.float32, layout)
        with ops.use_backend(backend):
            assert ops.conv2d_windows(**case, out=out.view) is out.view
            assert torch.equal(out.view, ops.conv2d_windows(**case))
        out.check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_passes_the_rectifier_and_no_units_are_no_work(backend: str) -> None:
    case = arguments(torch.float32) | {"relu": True}
    case["patch"][3, 0, 0, 0] = torch.nan
    with ops.use_backend(backend):
        found = ops.conv2d_windows(**case)
        assert found[3].isnan().any() and not found[:3].isnan().any() and (found[:3] >= 0).all()
        empty = {name: case[name][:0] for name in ("patch", "patch_origin", "window_origin", "rows")}
        assert ops.conv2d_windows(**(case | empty)).shape == (0, 5, 2, 3)


# --- torch: registration, gradients, compilation --------------------------------------------------


def arguments(dtype: torch.dtype, layout: torch.memory_format = LAYOUTS[0]) -> dict[str, Any]:
    """Windows across every border, patches partly outside the map and the window, and two units of one sample."""
    generator = torch.Generator().manual_seed(0)
    base, patch, weight = (
        torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout)
        for shape in ((2, 3, 5, 6), (4, 3, 2, 3), (5, 3, 3, 2))
    )
    return {
        "base": base, "patch": patch,
        "patch_origin": torch.tensor([[0, 1], [-1, 4], [4, -1], [1, 1]]),
        "window_origin": torch.tensor([[-1, 0], [0, 3], [2, -2], [0, 0]], dtype=torch.int32),
        "weight": weight, "bias": torch.randn(5, generator=generator).to(dtype), "stride": (2, 1), "dilation": (1, 1),
        "out_size": (2, 3), "rows": torch.tensor([1, 0, 1, 0]), "relu": False,
    }  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("relu", [False, True])
def test_opcheck(relu: bool, layout: torch.memory_format) -> None:
    case = arguments(torch.float32, layout) | {"relu": relu}
    out = ops.conv2d_windows(**case)
    values = list(case.values())
    torch.library.opcheck(torch.ops.conelens.conv2d_windows.out, tuple(values), {"out_out": out})
    for index in (0, 1, 4, 5):
        values[index] = values[index].clone().requires_grad_()
    torch.library.opcheck(torch.ops.conelens.conv2d_windows.default, tuple(values))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("names", [("base", "patch", "weight", "bias"), ("base",), ("weight",), ("bias",)], ids=str)
def test_gradients_twice(names: tuple[str, ...], relu: bool) -> None:
    case = arguments(torch.float64) | {"relu": relu}

    def square(*tensors: Tensor) -> Tensor:
        return ops.conv2d_windows(**(case | dict(zip(names, tensors, strict=True)))).square()

    tensors = tuple(case[name].clone().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(square, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(square, tensors, fast_mode=True)


def test_compiles_as_one_graph() -> None:
    case = arguments(torch.float32)
    compiled = torch.compile(lambda: ops.conv2d_windows(**case) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), ops.conv2d_windows(**case) * 2)


# --- the choice of backend -------------------------------------------------------------------------


def problem(channels: int, cells: int = 13, dtype: torch.dtype = torch.bfloat16) -> triton_configs.Problem:
    base, weight = torch.empty(1, channels, 1, 1, dtype=dtype), torch.empty(channels, channels, 3, 3, dtype=dtype)
    return triton_configs.problem_of(base, 512, weight, weight, (cells, cells), (cells + 2, cells + 2), True)


def test_the_table_takes_triton_where_passes_over_memory_cost_more_than_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_configs, "tf32_allowed", lambda: True)
    for dtype in (torch.bfloat16, torch.float32):
        chosen = [triton_configs.prefer_triton(problem(channels, dtype=dtype)) for channels in (3, 32, 64, 128, 512, 1024)]
        assert chosen == [False, True, True, True, False, False]
    assert not triton_configs.prefer_triton(problem(64, dtype=torch.float64))
    monkeypatch.setattr(triton_configs, "tf32_allowed", lambda: False)
    assert not triton_configs.prefer_triton(problem(64, dtype=torch.float32))


def test_triton_gives_its_reason_on_the_cpu() -> None:
    case = arguments(torch.float32)
    assert ops.backends("conv2d_windows", case["base"])["compiled"] is None
    with ops.use_backend("triton"), pytest.raises(BackendError, match="run on CUDA tensors"):
        ops.conv2d_windows(**case)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_base_does_not_have_is_named(backend: str) -> None:
    case = arguments(torch.float32) | {"rows": torch.tensor([0, 1, 2, 0])}
    with ops.use_backend(backend), pytest.raises(ArgumentError, match=r"rows\[2\] is 2, but base has 2 samples"):
        ops.conv2d_windows(**case)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": torch.zeros(3, 5, 6)}, r"base must be \[N,C,H,W\]"),
        ({"base": torch.zeros(2, 3, 5, 6, dtype=torch.int32)}, "base must be float32"),
        ({"patch": torch.zeros(3, 3, 2, 3)}, r"patch must have shape \[4, 3, 2, 3\], got \[3, 3, 2, 3\]"),
        ({"patch_origin": torch.zeros(4, 2)}, r"patch_origin must be an int32 or int64 tensor \[U,2\]"),
        ({"weight": torch.zeros(5, 2, 3, 3)}, r"weight must have shape \[5, 3, 3, 3\], got \[5, 2, 3, 3\]"),
        ({"weight": torch.zeros(5, 3, 3)}, r"weight must be a tensor \[Co,Ci,kh,kw\]"),
        ({"weight": torch.zeros(5, 3, 3, 2, dtype=torch.float64)}, "weight must be torch.float32"),
        ({"bias": torch.zeros(4)}, r"bias must have shape \[5\], got \[4\]"),
        ({"bias": 1.0}, r"bias must be a tensor \[Co\] or None, got float"),
        ({"groups": 3}, "groups must be 1, got 3"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"out_size": (2, 0)}, "out_size must be at least 1"),
        ({"rows": torch.zeros(4)}, r"rows must be an int32 or int64 tensor \[U\]"),
        ({"base": torch.zeros(3, 3, 5, 6), "rows": None}, "base has 3 samples for 4 windows"),
        ({"out": torch.zeros(4, 5, 2, 2)}, r"out must have shape \[4, 5, 2, 3\]"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ops.conv2d_windows(**(arguments(torch.float32) | change))
