"""Pool, unpool, peaks and windows on a GPU against the references on the CPU: every value and every switch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from conelens import ops
from conelens.kernels.channel_peaks import reference as peaks_reference
from conelens.kernels.gather_windows import reference as gather_reference
from conelens.kernels.max_pool2d_with_switches import reference as pool_reference
from conelens.kernels.max_unpool2d import reference as unpool_reference
from conelens.kernels.relu_change import reference as relu_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
POOLS = [  # shape, kernel, stride, padding, dilation, ceil_mode
    ((2, 16, 64, 64), (2, 2), (2, 2), (0, 0), (1, 1), False),
    ((2, 16, 56, 56), (2, 2), (2, 2), (0, 0), (1, 1), False),
    ((2, 24, 28, 28), (2, 2), (2, 2), (0, 0), (1, 1), False),
    ((3, 7, 15, 13), (2, 2), (2, 2), (0, 0), (1, 1), True),
    ((2, 16, 112, 112), (3, 3), (2, 2), (1, 1), (1, 1), False),
    ((2, 16, 112, 112), (3, 3), (2, 2), (0, 0), (1, 1), True),
    ((2, 8, 55, 55), (3, 3), (2, 2), (0, 0), (1, 1), False),
    ((1, 8, 20, 18), (3, 2), (1, 3), (1, 1), (2, 1), False),
    ((1, 2, 40, 40), (17, 17), (3, 3), (0, 0), (1, 1), False),
]


def noise(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", POOLS, ids=lambda c: f"{c[0]}k{c[1]}")
def test_pool_and_unpool(case: tuple, dtype: torch.dtype, layout: torch.memory_format) -> None:
    shape, *window, ceil_mode = case
    for relu in (False, True):
        x = noise(shape, dtype)
        x.view(-1)[:: 7 if relu else 5] = 0.5  # ties
        wanted, taps = pool_reference.max_pool2d_with_switches(x, *window, ceil_mode, relu)
        on_gpu = x.cuda().contiguous(memory_format=layout)
        with ops.use_backend("compiled"):
            pooled, switches = ops.max_pool2d_with_switches(on_gpu, *window, ceil_mode, relu=relu)
            again = ops.max_pool2d_with_switches(on_gpu, *window, ceil_mode, relu=relu)
            signal = noise(tuple(wanted.shape), dtype, seed=1)
            moved = signal.cuda().contiguous(memory_format=layout)
            size = shape[2:]
            back = ops.max_unpool2d(moved, switches, *window, output_size=size, relu=relu)
        assert torch.equal(pooled.cpu(), wanted)
        assert torch.equal(switches.cpu(), taps)
        assert torch.equal(again.pooled, pooled)
        assert torch.equal(again.switches, switches)
        assert torch.equal(back.cpu(), unpool_reference.max_unpool2d(signal, taps, *window, size, relu, None))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinities(dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = noise((2, 16, 32, 32), dtype)
    x[noise(tuple(x.shape), torch.float32, 1) > 1.2] = float("nan")
    x[0, :8] = -float("inf")
    for kernel in (2, 3):
        window = ((kernel, kernel), (2, 2), (kernel // 3, kernel // 3), (1, 1))
        for relu in (False, True):
            wanted, taps = pool_reference.max_pool2d_with_switches(x, *window, False, relu)
            with ops.use_backend("compiled"):
                got = ops.max_pool2d_with_switches(x.cuda().contiguous(memory_format=layout), *window, relu=relu)
            torch.testing.assert_close(got.pooled.cpu(), wanted, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(got.switches.cpu(), taps)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unpool_of_windows(dtype: torch.dtype, layout: torch.memory_format) -> None:
    for kernel, size in ((2, (8, 8)), (3, (7, 9)), (2, (5, 6))):
        window = ((kernel, kernel), (2, 2), (0, 0), (1, 1))
        pooled = noise((4, 16, *size), dtype)
        switches = (noise(tuple(pooled.shape), torch.float32, 1).abs() * 3).clamp(max=kernel**2 - 1).to(torch.uint8)
        origin = torch.tensor([[-1, 2], [0, 0], [3, -2], [1, 1]], dtype=torch.int32)
        wanted = unpool_reference.max_unpool2d(pooled, switches, *window, (14, 14), True, origin)
        with ops.use_backend("compiled"):
            got = ops.max_unpool2d(
                pooled.cuda().contiguous(memory_format=layout),
                switches.cuda().contiguous(memory_format=layout),
                *window, output_size=(14, 14), relu=True, origin=origin.cuda(),
            )  # fmt: skip
        assert torch.equal(got.cpu(), wanted)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 64, 112, 112), (1, 3, 333, 257), (40, 72, 13, 13), (2, 1, 1, 1)], ids=str)
def test_peaks(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = noise(shape, dtype)
    x[0, 0].view(-1)[shape[2] * shape[3] // 2 :: 3] = float("nan")
    for reduce in ("max", "sum", "mean"):
        wanted, positions = peaks_reference.channel_peaks(x, reduce)
        with ops.use_backend("compiled"):
            got = ops.channel_peaks(x.cuda().contiguous(memory_format=layout), reduce=reduce)
        assert torch.equal(got.positions.cpu(), positions)
        exact = reduce == "max"
        rtol = 0 if exact else 2 * torch.finfo(dtype).eps
        atol = 0 if exact else 1e-5 * shape[2] * shape[3]
        torch.testing.assert_close(got.values.cpu(), wanted, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8, torch.int32], ids=str)
@pytest.mark.parametrize("channels", [3, 64, 72])
def test_gather_windows(channels: int, dtype: torch.dtype, layout: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, channels, 28, 30), (33, channels, 10, 9))
    base, patch = ((noise(shape, torch.float32) * 9).abs().to(dtype) for shape in shapes)
    place = torch.randint(-6, 30, (33, 2), generator=generator)
    origin = place.int() - 1
    rows = torch.randint(0, 2, (33,), generator=generator)
    rows[5] = 2  # not there: gives the fill, as nobody waits for the device
    for window, add in itertools.product(((12, 11), (12, 12)), (False, True) if dtype.is_floating_point else (False,)):
        wanted = gather_reference.gather_windows(base, patch, place, origin, window, rows, 3.0, add)
        moved = [x.cuda().contiguous(memory_format=layout) for x in (base, patch)]
        with ops.use_backend("compiled"):
            got = ops.gather_windows(*moved, place.cuda(), origin.cuda(), window, rows=rows.cuda(), fill=3.0, add=add)
            cut = [x[:, 1:] for x in moved]  # one element off every alignment
            part = ops.gather_windows(*cut, place.cuda(), origin.cuda(), window, rows=rows.cuda(), fill=3.0, add=add)
        assert torch.equal(got.cpu(), wanted)
        assert torch.equal(part.cpu(), wanted[:, 1:])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [3, 64, 72])
def test_relu_change(channels: int, dtype: torch.dtype, layout: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(0)
    origin = torch.randint(-6, 30, (33, 2), generator=generator)
    rows = torch.randint(0, 2, (33,), generator=generator)
    rows[5] = 2  # not there: gives 0, as nobody waits for the device
    base = noise((2, channels, 28, 30), dtype)
    base[0, :, 3:9] = float("nan")
    for window in ((12, 11), (12, 12)):
        change = noise((33, channels, *window), dtype, 1)
        wanted = relu_reference.relu_change(change, base, origin, rows)
        maps = [x.cuda().contiguous(memory_format=layout) for x in (change, base)]
        cut = [x[:, 1:] for x in maps]  # one element off every alignment
        places = (origin.cuda(), rows.int().cuda())
        with ops.use_backend("compiled"):
            got = ops.relu_change(*maps, places[0], rows=places[1])
            part = ops.relu_change(*cut, places[0], rows=places[1])
            ops.relu_change(*maps, places[0], rows=places[1], out=maps[0])
        for found, expected in ((got, wanted), (part, wanted[:, 1:]), (maps[0], wanted)):
            torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def test_other_stream_and_views() -> None:
    base = noise((2, 16, 34, 66), torch.bfloat16).cuda()
    view = base[:, :, 1:33, 1:65]  # one element off every alignment
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), ops.use_backend("compiled"):
        got = ops.max_pool2d_with_switches(view, 2, relu=True)
    torch.cuda.current_stream().wait_stream(stream)
    wanted, taps = pool_reference.max_pool2d_with_switches(view.cpu(), (2, 2), (2, 2), (0, 0), (1, 1), False, True)
    assert torch.equal(got.pooled.cpu(), wanted)
    assert torch.equal(got.switches.cpu(), taps)


def test_a_graph_replays_the_launches() -> None:
    x = noise((4, 64, 56, 56), torch.bfloat16).cuda()
    with ops.use_backend("compiled"):
        eager = ops.max_pool2d_with_switches(x, 2)
        peaks = ops.channel_peaks(x[:1])  # cut into slices: the work area is captured too
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            pooled, switches = ops.max_pool2d_with_switches(x, 2)
            captured = ops.channel_peaks(x[:1])
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(pooled, eager.pooled)
    assert torch.equal(switches, eager.switches)
    assert torch.equal(captured.positions, peaks.positions)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_more_than_2_31_elements(layout: torch.memory_format) -> None:
    """The last sample lies behind 2^31 elements of x and of the unpooled map."""
    shape = (17, 64, 1408, 1408)  # 2.16e9
    x = torch.zeros(shape, dtype=torch.bfloat16, device="cuda").contiguous(memory_format=layout)
    tail = noise((1, *shape[1:]), torch.bfloat16).cuda()
    x[-1:] = tail
    with ops.use_backend("compiled"):
        pooled, switches = ops.max_pool2d_with_switches(x, 2)
        small = ops.max_pool2d_with_switches(tail.contiguous(memory_format=layout), 2)
        assert torch.equal(pooled[-1:], small.pooled)
        assert torch.equal(switches[-1:], small.switches)
        del x
        back = ops.max_unpool2d(pooled, switches, 2, output_size=shape[2:])
        assert torch.equal(back[-1:], ops.max_unpool2d(small.pooled, small.switches, 2, output_size=shape[2:]))
