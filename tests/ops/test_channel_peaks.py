"""channel_peaks against torch and plain loops, and its rules."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conelens import ops
from conelens.errors import ArgumentError
from tests.kit.compare import assert_same

pytestmark = pytest.mark.usefixtures("two_threads")

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def random_map(seed: int) -> Tensor:
    """Odd sizes, views, both layouts, every dtype; ties, NaN, and planes of one value."""
    torch.manual_seed(seed)
    random = Random(seed)
    shape = (random.randint(1, 3), random.randint(1, 150), random.randint(1, 40), random.randint(1, 60))
    x = torch.randn(shape).to(FLOATS[seed % 4])
    match seed % 5:
        case 0:
            x = x.clamp(max=0)  # ties
        case 1:
            x[torch.rand(shape) < 0.01] = math.nan
        case 2:
            x = (x * 2).round() / 2
        case 3:
            x[:, : shape[1] // 2] = -math.inf
    x = x.contiguous(memory_format=random.choice(LAYOUTS))
    if random.random() < 0.5:
        x = x[
            :,
            random.randint(0, shape[1] - 1) :,
            random.randint(0, shape[2] - 1) :,
            : random.randint(1, shape[3]),
        ]
    return x


@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_maximum_and_its_first_position(backend: str, isa: str) -> None:
    for seed in range(40):
        x = random_map(seed)
        with ops.use_backend(backend):
            values, positions = ops.channel_peaks(x)
        flat = x.flatten(2)
        assert_same(values, flat.amax(2))
        assert positions.dtype == torch.int32
        is_peak = (flat == values[:, :, None]) | flat.isnan()
        for plane, position in zip(is_peak.flatten(0, 1), positions.flatten(), strict=True):
            assert int(position) == int(plane.int().argmax())


def test_equals_torch_max_without_ties() -> None:
    for layout in LAYOUTS:
        x = torch.randperm(2 * 70 * 33 * 35).float().reshape(2, 70, 33, 35).contiguous(memory_format=layout)
        with ops.require_kernels():
            values, positions = ops.channel_peaks(x)
        top = torch.max(x.flatten(2), 2)
        assert torch.equal(values, top.values)
        assert torch.equal(positions, top.indices.int())


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_sums_are_exact_to_a_few_roundings(reduce: str, isa: str) -> None:
    for number, dtype in enumerate(FLOATS):
        for layout in LAYOUTS:
            x = (torch.rand(2, 19, 151, 67 + number) + 1).to(dtype).contiguous(memory_format=layout)
            x = x / (1 if reduce == "mean" else 256)  # float16 ends at 65504
            with ops.require_kernels():
                values, positions = ops.channel_peaks(x, reduce=reduce)
            expected = getattr(x.double().flatten(2), reduce)(2)
            wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
            tolerance = torch.finfo(dtype).eps / 2 + 16 * wide
            assert bool(((values.double() - expected).abs() <= tolerance * expected).all())
            assert torch.equal(positions, ops.channel_peaks(x).positions)


def test_first_nan_wins() -> None:
    for dtype in FLOATS:
        for layout in LAYOUTS:
            x = torch.zeros(1, 20, 40, 40, dtype=dtype).contiguous(memory_format=layout)
            x[0, :, 3, 5], x[0, :, 20, 1], x[0, :, 39, 39] = math.inf, math.nan, math.nan
            values, positions = ops.channel_peaks(x)
            assert values.isnan().all()
            assert (positions == 20 * 40 + 1).all()


def test_same_bits_on_every_run_thread_count_and_instruction_set(isa: str) -> None:
    for layout in LAYOUTS:
        for reduce, seed in (("max", 0), ("sum", 1), ("mean", 2)):
            x = torch.rand(1, 130, 61, 47, generator=torch.Generator().manual_seed(seed))
            x = x.contiguous(memory_format=layout)
            results = []
            for threads in (1, 2, 3, 2):
                torch.set_num_threads(threads)
                results.append(ops.channel_peaks(x, reduce=reduce).values)
            assert all(torch.equal(results[0], other) for other in results[1:])
            first = FIRST_BITS.setdefault((layout, reduce), results[0])
            assert torch.equal(first, results[0])


FIRST_BITS: dict[Any, Tensor] = {}


def test_out_is_written_and_returned() -> None:
    x = torch.randn(3, 5, 6, 7)
    for out in (
        (torch.full((3, 5), math.nan), torch.full((3, 5), -7, dtype=torch.int32)),
        (torch.full((5, 3), math.nan).T, torch.full((3, 10), -7, dtype=torch.int32)[:, ::2]),
    ):
        result = ops.channel_peaks(x, out=out)
        assert result.values is out[0]
        assert result.positions is out[1]
        assert torch.equal(out[0], x.amax((2, 3)))
        assert torch.equal(out[1], x.flatten(2).argmax(2).int())


def test_empty_batch_and_one_cell() -> None:
    values, positions = ops.channel_peaks(torch.empty(0, 4, 3, 3))
    assert values.shape == positions.shape == (0, 4)
    values, positions = ops.channel_peaks(torch.full((2, 3, 1, 1), -math.inf))
    assert (values == -math.inf).all()
    assert not positions.any()


def test_numpy_in_numpy_out() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 7), dtype=np.float32)
    values, positions = ops.channel_peaks(x)
    assert isinstance(values, np.ndarray)
    assert np.array_equal(values, x.max((2, 3)))
    assert np.array_equal(positions, x.reshape(2, 3, -1).argmax(2))


@pytest.mark.parametrize("reduce", ["max", "sum", "mean"])
def test_gradients(reduce: str) -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    with ops.require_kernels():
        assert torch.autograd.gradcheck(lambda x: ops.channel_peaks(x, reduce=reduce).values, (x,))
        assert torch.autograd.gradgradcheck(lambda x: ops.channel_peaks(x, reduce=reduce).values, (x,))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_and_compile(layout: torch.memory_format) -> None:
    x = torch.randn(2, 6, 5, 7).contiguous(memory_format=layout).requires_grad_()
    torch.library.opcheck(torch.ops.conelens.channel_peaks.default, (x, "max"))
    compiled = torch.compile(lambda x: ops.channel_peaks(x + 1), fullgraph=True, backend="aot_eager")
    values, positions = compiled(x)
    assert torch.equal(values, ops.channel_peaks(x + 1).values)
    assert torch.equal(positions, ops.channel_peaks(x + 1).positions)


X = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("message", "x", "options"),
    [
        ("x must be .N,C,H,W.", X[0], {}),
        ("x must be float32", X.int(), {}),
        ("x has no cells", X[:, :, :0], {}),
        ("reduce must be one of 'max', 'sum', 'mean', got 'median'", X, {"reduce": "median"}),
        ("out must be .values, positions.", X, {"out": X}),
        (r"out\[1\] must be torch.int32", X, {"out": (torch.zeros(2, 3), torch.zeros(2, 3))}),
    ],
)
def test_bad_input_is_named(message: str, x: Tensor, options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=message):
        ops.channel_peaks(x, **options)
