"""The CUDA kernels run on the host, thread by thread, against the plain PyTorch references.

Same source as on the GPU, with every vector access checked for alignment; inputs and outputs lie in guarded
buffers at odd offsets. Intrinsics of 16-bit floats are the one thing that only a GPU runs.
"""

from __future__ import annotations

import shutil
from types import ModuleType

import cuda_build
import pytest
import torch
from torch import Tensor

from conelens.kernels.channel_peaks import reference as peaks_reference
from conelens.kernels.deconv2d import reference as deconv_reference
from conelens.kernels.gather_windows import reference as gather_reference
from conelens.kernels.max_pool2d_with_switches import reference as pool_reference
from conelens.kernels.max_unpool2d import reference as unpool_reference
from conelens.kernels.relu_change import reference as relu_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
GUARD = 64  # elements


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    if shutil.which("g++") is None:
        pytest.skip("no g++ on PATH")
    return cuda_build.build_emulated(tmp_path_factory.mktemp("emulated"))


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def guarded(like: Tensor, channels_last: bool, skew: int, fill: float) -> tuple[Tensor, Tensor]:
    """A copy of `like`, `skew` elements off its alignment, in a longer buffer of `fill`; and what guards it."""
    n, c, h, w = like.shape
    buffer = torch.full((like.numel() + 2 * GUARD + skew,), fill, dtype=like.dtype)
    inner = buffer[GUARD + skew : GUARD + skew + like.numel()]
    view = inner.view(n, h, w, c).permute(0, 3, 1, 2) if channels_last else inner.view(n, c, h, w)
    view.copy_(like)
    return view, torch.cat([buffer[: GUARD + skew].clone(), buffer[GUARD + skew + like.numel() :].clone()])


def guards(view: Tensor, skew: int) -> Tensor:
    """The guards around a view made by `guarded`, as they are now."""
    whole = torch.tensor([], dtype=view.dtype).set_(view.untyped_storage())
    return torch.cat([whole[: GUARD + skew], whole[GUARD + skew + view.numel() :]])


POOLS = [  # shape, kernel, stride, padding, dilation, ceil_mode
    ((2, 3, 12, 32), 2, 2, 0, 1, False),
    ((1, 2, 9, 24), 2, 2, 0, 1, False),
    ((2, 16, 9, 7), 2, 2, 0, 1, True),
    ((1, 8, 10, 16), 3, 2, 0, 1, True),
    ((1, 8, 10, 16), 3, 2, 0, 1, False),
    ((2, 8, 11, 64), 3, 2, 1, 1, False),
    ((1, 3, 13, 11), 3, 2, (0, 1), 1, False),
    ((1, 3, 13, 12), 3, 2, (1, 0), 1, True),
    ((1, 2, 8, 9), (3, 2), (1, 3), (1, 1), (2, 1), False),
    ((1, 1, 20, 20), 17, 3, 0, 1, False),  # more than 256 taps
]


def values(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=generator)
    some = torch.rand(shape, generator=generator)
    if kind == "ties":
        return x.sign()
    if kind == "nan":
        return x.masked_fill(some < 0.2, float("nan"))
    if kind == "infinite":
        return x.masked_fill(some < 0.9, -float("inf"))
    return x


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pool(emulated: ModuleType, dtype: torch.dtype, channels_last: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for shape, kernel, stride, padding, dilation, ceil_mode in POOLS:
        window = tuple(map(pair, (kernel, stride, padding, dilation)))
        for kind in ("noise", "ties", "nan", "infinite"):
            for relu, skew in ((False, 0), (True, 0), (True, 1)):
                case = f"{shape} {window} ceil={ceil_mode} relu={relu} skew={skew} {kind}"
                x = values(kind, shape, generator).to(dtype)
                wanted, taps = pool_reference.max_pool2d_with_switches(x, *window, ceil_mode, relu)
                x, _ = guarded(x, channels_last, skew, float("nan"))
                pooled, before = guarded(torch.full_like(wanted, -9), channels_last, skew, -777.0)
                switches, marks = guarded(torch.full_like(taps, 99), channels_last, skew, 201)
                emulated.max_pool2d_with_switches(x, pooled, switches, *window, relu, 0)
                torch.testing.assert_close(pooled, wanted, rtol=0, atol=0, equal_nan=True, msg=case)
                assert torch.equal(switches, taps), case
                assert torch.equal(guards(pooled, skew), before), case
                assert torch.equal(guards(switches, skew), marks), case


UNPOOLS = [  # pooled shape, kernel, stride, padding, dilation, output size
    ((2, 3, 5, 16), 2, 2, 0, 1, (10, 32)),
    ((1, 2, 5, 12), 2, 2, 0, 1, (10, 24)),
    ((2, 16, 4, 5), 2, 2, 0, 1, (9, 11)),
    ((1, 8, 6, 15), 3, 2, 0, 1, (13, 32)),
    ((2, 8, 5, 8), 3, 2, 1, 1, (10, 16)),
    ((1, 8, 5, 8), 3, 2, (1, 0), 1, (9, 16)),
    ((1, 8, 5, 8), 3, 2, (0, 1), 1, (11, 16)),
    ((1, 3, 5, 6), 3, 2, (0, 1), 1, (11, 11)),
    ((1, 2, 4, 5), (3, 2), (1, 3), (1, 1), (2, 1), (6, 13)),
    ((1, 1, 3, 3), 17, 3, 0, 1, (23, 23)),
    ((2, 8, 3, 4), 2, 2, 0, 1, (3, 4)),  # smaller than the windows reach
]


@pytest.mark.parametrize("windowed", [False, True], ids=["map", "windows"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unpool_and_its_adjoint(emulated: ModuleType, dtype: torch.dtype, channels_last: bool, windowed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for shape, kernel, stride, padding, dilation, size in UNPOOLS:
        window = tuple(map(pair, (kernel, stride, padding, dilation)))
        taps = window[0][0] * window[0][1]
        for relu, skew in ((False, 0), (True, 0), (True, 1)):
            case = f"{shape} {window} {size} relu={relu} skew={skew}"
            pooled = torch.randn(shape, generator=generator).to(dtype)
            # one tap too many: a switch that points nowhere gives nothing
            switches = torch.randint(0, taps + 1, shape, generator=generator)
            switches = switches.to(torch.uint8 if taps < 256 else torch.int32)
            origin = torch.randint(-2, 3, (shape[0], 2), generator=generator) if windowed else None
            wanted = unpool_reference.max_unpool2d(pooled, switches, *window, size, relu, origin)
            pooled, _ = guarded(pooled, channels_last, skew, float("nan"))
            switches, _ = guarded(switches, channels_last, skew, 0)
            out, before = guarded(torch.full_like(wanted, float("nan")), channels_last, skew, -777.0)
            emulated.max_unpool2d(pooled, switches, out, *window, size, relu, origin, 0)
            assert torch.equal(out, wanted), case
            assert torch.equal(guards(out, skew), before), case

            grad = torch.randn(wanted.shape, generator=generator).to(dtype)
            wanted = unpool_reference.max_unpool2d_backward(grad, switches, *window, size, origin)
            grad, _ = guarded(grad, channels_last, skew, float("nan"))
            out, before = guarded(torch.full_like(wanted, float("nan")), channels_last, skew, -777.0)
            emulated.max_unpool2d_backward(grad, switches, out, *window, size, origin, 0)
            assert torch.equal(out, wanted), case
            assert torch.equal(guards(out, skew), before), case


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_peaks(emulated: ModuleType, dtype: torch.dtype, channels_last: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    cases = [("noise", reduce, skew) for reduce in ("max", "sum", "mean") for skew in (0, 3)]
    cases += [(kind, "max", 0) for kind in ("ties", "nan", "infinite")]
    for shape in ((2, 8, 5, 7), (1, 1, 70, 64), (1, 8, 30, 33)):  # the second is cut into slices
        for kind, reduce, skew in cases:
            case = f"{shape} {kind} {reduce} skew={skew}"
            x = values(kind, shape, generator).to(dtype)
            wanted, positions = peaks_reference.channel_peaks(x, reduce)
            x, _ = guarded(x, channels_last, skew, float("nan"))
            got, found = torch.full_like(wanted, -9), torch.full_like(positions, -9)
            emulated.channel_peaks(x, got, found, ("max", "sum", "mean").index(reduce), 0)
            assert torch.equal(found, positions), case
            rtol, atol = (0.0, 0.0) if reduce == "max" else (2 * torch.finfo(dtype).eps, 1e-4)
            torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol, equal_nan=True, msg=case)


GATHERS = [  # samples, channels, map, patch or None, window
    (1, 16, (9, 10), (4, 5), (6, 8)),
    (3, 32, (7, 6), (3, 3), (5, 5)),
    (2, 3, (7, 6), (3, 9), (9, 16)),
    (1, 5, (12, 20), (6, 12), (8, 12)),
    (2, 16, (5, 5), None, (6, 4)),
]


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8, torch.int32], ids=str)
def test_gather_windows(emulated: ModuleType, dtype: torch.dtype, channels_last: bool) -> None:
    """Windows across every border and far outside; a row that base does not have gives the fill."""
    generator = torch.Generator().manual_seed(0)
    floating = dtype.is_floating_point
    for samples, channels, size, patch_size, window in GATHERS:
        units = 7
        place = torch.randint(-3, 10, (units, 2), generator=generator)
        place[-1] = torch.tensor([2**63 - 1, 0])
        origin = (place - torch.randint(0, 4, place.shape, generator=generator)).int()
        rows = torch.randint(0, samples, (units,), generator=generator)
        rows[:2] = torch.tensor([-1, samples])
        for add, skew in ((False, 0), (False, 1), *(((True, 0), (True, 1)) if floating and patch_size else ())):
            case = f"{samples, channels} {size} {patch_size} {window} add={add} skew={skew}"
            shapes = [(samples, channels, *size)] + ([(units, channels, *patch_size)] if patch_size else [])
            maps = [(torch.randn(shape, generator=generator) * 9).abs().to(dtype) for shape in shapes]
            base, patch = maps[0], maps[1] if patch_size else None
            patch_origin = place if patch_size else None
            fill = -float("inf") if floating else 7.0
            wanted = gather_reference.gather_windows(base, patch, patch_origin, origin, window, rows, fill, add)
            base, *rest = (guarded(x, channels_last, skew, float("nan") if floating else 99)[0] for x in maps)
            out, before = guarded(torch.full_like(wanted, 55), channels_last, skew, 77)
            assert emulated.gather_windows(base, *(rest or [None]), patch_origin, origin, rows, out, fill, add, 0)
            assert torch.equal(out, wanted), case
            assert torch.equal(guards(out, skew), before), case


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_relu_change(emulated: ModuleType, dtype: torch.dtype, channels_last: bool) -> None:
    """Places also outside the map, a row that is not there, and in place."""
    generator = torch.Generator().manual_seed(0)
    for samples, channels, size, _, window in GATHERS:
        origin = torch.randint(-9, 13, (7, 2), generator=generator)
        rows = torch.randint(0, samples + 1, (7,), generator=generator, dtype=torch.int32)
        for skew in (0, 1):
            case = f"{samples, channels} {size} {window} skew={skew}"
            change = values("nan", (7, channels, *window), generator).to(dtype)
            base = values("nan", (samples, channels, *size), generator).to(dtype)
            wanted = relu_reference.relu_change(change, base, origin, rows)
            change, around = guarded(change, channels_last, skew, -777.0)
            base, _ = guarded(base, channels_last, skew, float("nan"))
            out, before = guarded(torch.full_like(wanted, 55), channels_last, skew, -777.0)
            for target, guard in ((out, before), (change, around)):
                assert emulated.relu_change(change, base, origin, rows, target, 0)
                torch.testing.assert_close(target, wanted, rtol=0, atol=0, equal_nan=True, msg=case)
                assert torch.equal(guards(target, skew), guard), case


FEW_OUTPUTS = [  # samples, channels in and out, kernel, padding, size of y, windowed, output cells to spare
    (1, 64, 3, (3, 3), (1, 1), (35, 40), False, (0, 0)),  # several strips and bands
    (2, 32, 1, (3, 3), (0, 2), (7, 33), False, (1, 0)),
    (1, 32, 4, (2, 3), (1, 0), (31, 62), False, (0, 2)),
    (2, 32, 4, (1, 3), (0, 1), (5, 6), True, (0, 0)),
    (1, 128, 3, (3, 3), (1, 1), (4, 5), True, (0, 0)),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_few_output_channels(emulated: ModuleType, dtype: torch.dtype) -> None:
    """The tensor-core kernel, with the fragments of the PTX manual; y lies between NaN."""
    generator = torch.Generator().manual_seed(0)
    for samples, c_in, c_out, kernel, padding, size, windowed, spare in FEW_OUTPUTS:
        y = torch.randn(samples, c_in, *size, generator=generator).to(dtype)
        weight = torch.randn(c_in, c_out, *kernel, generator=generator).to(dtype)
        origin = torch.tensor([[-2, 1], [1, -1]])[:samples] if windowed else None
        on = (size[0] - 1, size[1] + 1) if windowed else size
        to = tuple(on[a] - 2 * padding[a] + kernel[a] - 1 + spare[a] for a in (0, 1))
        window = ((1, 1), padding, 1, (1, 1), to, on)
        y, _ = guarded(y, True, 0, float("nan"))
        for relu, channels_last in ((False, True), (True, False)):
            case = f"{samples, c_in, c_out} {kernel} {padding} {size} windowed={windowed} relu={relu}"
            wanted = deconv_reference.deconv2d(y.double(), weight.double(), *window, None, None, relu, origin)
            out, before = guarded(torch.full_like(wanted, float("nan"), dtype=dtype), channels_last, 0, -777.0)
            emulated.deconv2d(y, weight, out, *window, None, None, relu, origin, 0)
            error = (out.double() - wanted).norm() / wanted.norm()
            assert error < torch.finfo(dtype).eps, case
            assert torch.equal(guards(out, 0), before), case
