"""Cases of the operations, each against every stock spelling of the same job that we know of. float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case, Floor, Target, compiled
from conelens import ops

CL = torch.channels_last
Window = tuple[int, int]  # kernel, stride

VGG = (8, 64, 224, 224)
SHAPES: tuple[tuple[tuple[int, int, int, int], Window], ...] = (
    (VGG, (2, 2)),
    ((1, 64, 224, 224), (2, 2)),
    ((8, 96, 111, 111), (3, 2)),
)


def _title(shape: tuple[int, ...], window: Window) -> str:
    return f"{window[0]}x{window[0]}/{window[1]} on {list(shape)}"


# --- pool -----------------------------------------------------------------------------------------


@dataclass
class PoolInputs:
    x: Tensor
    x_last: Tensor
    window: Window
    ours: tuple[Tensor, Tensor]
    ours_last: tuple[Tensor, Tensor]
    rectified: Tensor  # buffers of the stock operators
    rectified_last: Tensor
    stock: tuple[Tensor, Tensor]
    stock_last: tuple[Tensor, Tensor]


def _pool_inputs(shape: tuple[int, int, int, int], window: Window) -> PoolInputs:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x_last = x.to(memory_format=CL)
    ours, ours_last = (tuple(ops.max_pool2d_with_switches(v, *window, relu=True)) for v in (x, x_last))
    stock, stock_last = (_eager_pool(v, *window) for v in (x, x_last))
    return PoolInputs(x, x_last, window, ours, ours_last, torch.empty_like(x), torch.empty_like(x_last), stock, stock_last)


def _eager_pool(x: Tensor, kernel: int, stride: int) -> tuple[Tensor, Tensor]:
    return F.max_pool2d(F.relu(x), kernel, stride, return_indices=True)


def _eager_pool_into(x: Tensor, window: Window, rectified: Tensor, out: tuple[Tensor, Tensor]) -> Any:
    torch.clamp_min(x, 0, out=rectified)
    kernel, stride = window
    return torch.ops.aten.max_pool2d_with_indices.out(rectified, [kernel, kernel], [stride, stride], out=out[0], indices=out[1])


def _read_pool(inputs: PoolInputs, result: Any) -> tuple[Tensor, Tensor]:
    """(pooled, taps as int64), whoever made them."""
    pooled, chosen = result
    if chosen.dtype == torch.int64:
        (kernel, stride), width = inputs.window, inputs.x.shape[3]
        rows, columns = (torch.arange(n) * stride for n in pooled.shape[2:])
        chosen = (chosen // width - rows[:, None]) * kernel + chosen % width - columns
    return pooled, chosen.long()


def pool_case(shape: tuple[int, int, int, int], window: Window) -> Case:
    out = shape[0] * shape[1] * ((shape[2] - window[0]) // window[1] + 1) * ((shape[3] - window[0]) // window[1] + 1)
    read = shape[0] * shape[1] * shape[2] * shape[3]
    promised = (
        Target("NCHW", 10, ("eager NCHW",)),
        Target("NCHW", 5, ("eager channels_last",)),
        Target("NCHW reused", 0.6),
    )
    compiled_pool = compiled(_eager_pool)
    return Case(
        section="ReLU + max pool + switches",
        name=_title(shape, window),
        inputs=lambda: _pool_inputs(shape, window),
        ours={
            "NCHW": lambda i: ops.max_pool2d_with_switches(i.x, *i.window, relu=True),
            "NCHW reused": lambda i: ops.max_pool2d_with_switches(i.x, *i.window, relu=True, out=i.ours),
            "channels_last": lambda i: ops.max_pool2d_with_switches(i.x_last, *i.window, relu=True),
            "channels_last reused": lambda i: ops.max_pool2d_with_switches(i.x_last, *i.window, relu=True, out=i.ours_last),
        },
        others={
            "eager NCHW": lambda i: _eager_pool(i.x, *i.window),
            "eager channels_last": lambda i: _eager_pool(i.x_last, *i.window),
            "torch.compile": lambda i: compiled_pool(i.x, *i.window),
            "eager NCHW reused": lambda i: _eager_pool_into(i.x, i.window, i.rectified, i.stock),
            "eager channels_last reused": lambda i: _eager_pool_into(i.x_last, i.window, i.rectified_last, i.stock_last),
        },
        read=_read_pool,
        floor=lambda _: Floor("bytes", 4 * read + 5 * out),
        targets=promised if shape == VGG else (),
    )


# --- unpool ---------------------------------------------------------------------------------------


@dataclass
class UnpoolInputs:
    signal: Tensor  # of either sign, as it arrives from above
    signal_last: Tensor
    switches: Tensor
    switches_last: Tensor
    indices: Tensor  # torch's flat positions
    indices_last: Tensor
    window: Window
    size: tuple[int, int]
    out: Tensor
    out_last: Tensor


def _unpool_inputs(shape: tuple[int, int, int, int], window: Window) -> UnpoolInputs:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    _, indices = _eager_pool(x, *window)
    _, switches = ops.max_pool2d_with_switches(x, *window, relu=True)
    signal = torch.randn(indices.shape, generator=generator)
    return UnpoolInputs(
        signal, signal.to(memory_format=CL), switches, switches.to(memory_format=CL),
        indices, indices.to(memory_format=CL), window, (shape[2], shape[3]),
        torch.empty(shape), torch.empty(shape).to(memory_format=CL),
    )  # fmt: skip


def _unpool(inputs: UnpoolInputs, last: bool, out: Tensor | None = None) -> Tensor:
    signal, switches = (inputs.signal_last, inputs.switches_last) if last else (inputs.signal, inputs.switches)
    return ops.max_unpool2d(signal, switches, *inputs.window, output_size=inputs.size, relu=True, out=out)


def _eager_unpool(signal: Tensor, indices: Tensor, kernel: int, stride: int, size: tuple[int, int]) -> Tensor:
    return F.relu(F.max_unpool2d(signal, indices, kernel, stride, output_size=size))


def _eager_unpool_into(signal: Tensor, indices: Tensor, size: tuple[int, int], out: Tensor) -> Tensor:
    return torch.ops.aten.max_unpool2d.out(signal, indices, list(size), out=out).clamp_min_(0)


def _adding_unpool(signal: Tensor, indices: Tensor, size: tuple[int, int]) -> Tensor:
    """What F.max_unpool2d should do where windows overlap."""
    flat = signal.new_zeros((*signal.shape[:2], size[0] * size[1]))
    return F.relu(flat.scatter_add_(2, indices.flatten(2), signal.flatten(2)).unflatten(2, size))


def _adding_unpool_into(signal: Tensor, indices: Tensor, size: tuple[int, int], out: Tensor) -> Tensor:
    flat = out.zero_().flatten(2)
    return flat.scatter_add_(2, indices.flatten(2), signal.flatten(2)).clamp_min_(0).unflatten(2, size)


OVERLAP_NOTE = (
    "eager and compiled are zeros + scatter_add_ + relu, as F.max_unpool2d is wrong here: it overwrites where windows overlap"
)


def unpool_case(shape: tuple[int, int, int, int], window: Window) -> Case:
    kernel, stride = window
    cells = shape[0] * shape[1]
    pooled = cells * ((shape[2] - kernel) // stride + 1) * ((shape[3] - kernel) // stride + 1)
    ours: dict[str, Callable[[UnpoolInputs], Tensor]] = {
        "NCHW": lambda i: _unpool(i, False),
        "NCHW reused": lambda i: _unpool(i, False, i.out),
        "channels_last": lambda i: _unpool(i, True),
        "channels_last reused": lambda i: _unpool(i, True, i.out_last),
    }
    others: dict[str, Callable[[UnpoolInputs], Tensor]]
    if kernel <= stride:
        compiled_unpool = compiled(_eager_unpool)
        others = {
            "eager NCHW": lambda i: _eager_unpool(i.signal, i.indices, *i.window, i.size),
            "eager channels_last": lambda i: _eager_unpool(i.signal_last, i.indices_last, *i.window, i.size),
            "torch.compile": lambda i: compiled_unpool(i.signal, i.indices, *i.window, i.size),
            "eager NCHW reused": lambda i: _eager_unpool_into(i.signal, i.indices, i.size, i.out),
            "eager channels_last reused": lambda i: _eager_unpool_into(i.signal_last, i.indices_last, i.size, i.out_last),
        }
    else:
        compiled_adding = compiled(_adding_unpool)
        others = {
            "eager NCHW": lambda i: _adding_unpool(i.signal, i.indices, i.size),
            "torch.compile": lambda i: compiled_adding(i.signal, i.indices, i.size),
            "eager NCHW reused": lambda i: _adding_unpool_into(i.signal, i.indices, i.size, i.out),
        }
    promised = (Target("NCHW", 4, ("eager NCHW",)), Target("NCHW reused", 10, ("eager NCHW",)))
    return Case(
        section="max unpool + ReLU",
        name=_title(shape, window),
        inputs=lambda: _unpool_inputs(shape, window),
        ours=ours,
        others=others,
        read=lambda _, result: (result,),
        floor=lambda _: Floor("bytes", 4 * cells * shape[2] * shape[3] + 5 * pooled),
        tolerance=0.0 if kernel <= stride else 1e-6,
        targets=promised if shape == VGG else (),
        note="" if kernel <= stride else OVERLAP_NOTE,
    )


# --- deconv2d -------------------------------------------------------------------------------------


@dataclass
class DeconvInputs:
    signal: Tensor  # pooled when there is a pool
    switches: Tensor | None
    indices: Tensor | None
    weight: Tensor
    flipped: Tensor
    size: tuple[int, int]
    last: DeconvInputs | None = None  # the same in channels_last


def _deconv_inputs(batch: int, channels: int, out_channels: int, size: int, pooled: bool) -> DeconvInputs:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((channels, out_channels, 3, 3), generator=generator) / (3 * channels**0.5)
    flipped = weight.flip(2, 3).transpose(0, 1).contiguous()
    switches = indices = None
    shape = (batch, channels, size, size)
    if pooled:
        x = torch.randn(shape, generator=generator)
        _, indices = _eager_pool(x, 2, 2)
        _, switches = ops.max_pool2d_with_switches(x, 2, relu=True)
        shape = tuple(indices.shape)
    signal = torch.randn(shape, generator=generator)
    tensors = (signal, switches, indices, weight, flipped)
    last = DeconvInputs(*(None if t is None else t.to(memory_format=CL) for t in tensors), (size, size))
    return DeconvInputs(*tensors, (size, size), last)


def _deconv(inputs: DeconvInputs) -> Tensor:
    pool = None if inputs.switches is None else (2, 2, 0, 1)
    return ops.deconv2d(
        inputs.signal,
        inputs.weight,
        padding=1,
        pool=pool,
        switches=inputs.switches,
        relu=True,
        output_size=inputs.size,
    )


def _eager_signal(signal: Tensor, indices: Tensor | None) -> Tensor:
    return F.relu(signal) if indices is None else torch.relu_(F.max_unpool2d(signal, indices, 2))


def _transposed(signal: Tensor, indices: Tensor | None, weight: Tensor) -> Tensor:
    return F.conv_transpose2d(_eager_signal(signal, indices), weight, padding=1)


def _flipped(signal: Tensor, indices: Tensor | None, flipped: Tensor) -> Tensor:
    return F.conv2d(_eager_signal(signal, indices), flipped, padding=1)


def deconv_case(label: str, batch: int, channels: int, out_channels: int, size: int, pooled: bool) -> Case:
    compiled_transposed = compiled(_transposed)
    return Case(
        section="unpool + ReLU + transposed filters" if pooled else "ReLU + transposed filters",
        name=f"{label}, batch {batch}",
        inputs=lambda: _deconv_inputs(batch, channels, out_channels, size, pooled),
        ours={"NCHW": _deconv, "channels_last": lambda i: _deconv(i.last)},
        others={
            "eager NCHW": lambda i: _transposed(i.signal, i.indices, i.weight),
            "eager channels_last": lambda i: _transposed(i.last.signal, i.last.indices, i.last.weight),
            "flipped conv2d NCHW": lambda i: _flipped(i.signal, i.indices, i.flipped),
            "flipped conv2d channels_last": lambda i: _flipped(i.last.signal, i.last.indices, i.last.flipped),
            "torch.compile": lambda i: compiled_transposed(i.signal, i.indices, i.weight),
        },
        read=lambda _, result: (result,),
        floor=lambda _: Floor("flops", 2.0 * batch * channels * out_channels * 9 * size * size),
        tolerance=1e-5,
    )


# --- peaks ----------------------------------------------------------------------------------------


def _peaks_inputs(shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x, x.to(memory_format=CL)


def _eager_peaks(x: Tensor) -> tuple[Tensor, Tensor]:
    values, positions = torch.max(x.flatten(2), 2)
    return values, positions


def peaks_case(shape: tuple[int, int, int, int]) -> Case:
    compiled_peaks = compiled(_eager_peaks)
    return Case(
        section="channel peaks",
        name=str(list(shape)),
        inputs=lambda: _peaks_inputs(shape),
        ours={"NCHW": lambda i: ops.channel_peaks(i[0]), "channels_last": lambda i: ops.channel_peaks(i[1])},
        others={
            "eager NCHW": lambda i: _eager_peaks(i[0]),
            "eager channels_last": lambda i: _eager_peaks(i[1]),
            "torch.compile": lambda i: compiled_peaks(i[0]),
        },
        read=lambda _, result: (result[0], result[1].long()),
        floor=lambda _: Floor("bytes", 4.0 * shape[0] * shape[1] * shape[2] * shape[3]),
    )


# --- windows --------------------------------------------------------------------------------------


@dataclass
class WindowInputs:
    base: Tensor
    patch: Tensor
    patch_origin: Tensor  # of each window's own place; the window reaches one cell further on all sides
    window_origin: Tensor
    side: int
    out: Tensor
    padded: Tensor  # base between the zeros that windows may reach, for copies of slices
    last: WindowInputs | None = None  # the same in channels_last


def _window_inputs(units: int, channels: int, size: int, patch_side: int) -> WindowInputs:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn((1, channels, size, size), generator=generator)
    patch = torch.randn((units, channels, patch_side, patch_side), generator=generator)
    places = torch.randint(0, size - patch_side + 1, (units, 2), generator=generator)
    side = patch_side + 2
    out, padded = torch.empty(units, channels, side, side), F.pad(base, (1, 1, 1, 1))
    tensors = [(t, t.to(memory_format=CL)) for t in (base, patch, out, padded)]
    first, last = (
        WindowInputs(base, patch, places, places - 1, side, out, padded) for base, patch, out, padded in zip(*tensors)
    )
    first.last = last
    return first


def _windows(inputs: WindowInputs, out: Tensor | None = None) -> Tensor:
    places = (inputs.patch_origin, inputs.window_origin)
    return ops.gather_windows(inputs.base, inputs.patch, *places, inputs.side, out=out)


def _cells(places: Tensor, side: int, size: int) -> tuple[Tensor, Tensor]:
    """[U, side] coordinates along one axis, pulled into [0, size), and which of them were inside."""
    cells = places[:, None] + torch.arange(side)
    return cells.clamp(0, size - 1), (cells >= 0) & (cells < size)


def _indexed_windows(base: Tensor, patch: Tensor, patch_origin: Tensor, window_origin: Tensor, side: int) -> Tensor:
    (y, y_inside), (x, x_inside) = (_cells(window_origin[:, a], side, base.shape[2 + a]) for a in (0, 1))
    moved = window_origin - patch_origin
    (row, row_inside), (column, column_inside) = (_cells(moved[:, a], side, patch.shape[2 + a]) for a in (0, 1))
    units = torch.arange(len(patch))[:, None, None]
    around = base[0].permute(1, 2, 0)[y[:, :, None], x[:, None, :]]
    own = patch.permute(0, 2, 3, 1)[units, row[:, :, None], column[:, None, :]]
    windows = torch.where((row_inside[:, :, None] & column_inside[:, None, :])[..., None], own, around)
    return windows.masked_fill_(~(y_inside[:, :, None] & x_inside[:, None, :])[..., None], 0).permute(0, 3, 1, 2)


def _sliced_windows(inputs: WindowInputs, out: Tensor | None = None) -> Tensor:
    """One slice copied per window, then all patches at once: these all lie at (1, 1) and wholly inside the map."""
    side, end = inputs.side, inputs.side - 1
    out = torch.empty_like(inputs.out) if out is None else out
    for window, (y, x) in zip(out, inputs.patch_origin.tolist(), strict=True):
        window.copy_(inputs.padded[0, :, y : y + side, x : x + side])
    out[:, :, 1:end, 1:end] = inputs.patch
    return out


def windows_case(label: str, units: int, channels: int, size: int, patch_side: int) -> Case:
    def spread(inputs: WindowInputs) -> tuple[Any, ...]:
        return inputs.base, inputs.patch, inputs.patch_origin, inputs.window_origin, inputs.side

    compiled_windows = compiled(_indexed_windows)
    promised = (Target("channels_last reused", 0.8),)
    return Case(
        section="windows of a cached map under each unit's patch",
        name=f"{label}: {units} of {[channels, patch_side + 2, patch_side + 2]} from {size}x{size}",
        inputs=lambda: _window_inputs(units, channels, size, patch_side),
        ours={
            "NCHW": _windows,
            "NCHW reused": lambda i: _windows(i, i.out),
            "channels_last": lambda i: _windows(i.last),
            "channels_last reused": lambda i: _windows(i.last, i.last.out),
        },
        others={
            "indexing NCHW": lambda i: _indexed_windows(*spread(i)),
            "indexing channels_last": lambda i: _indexed_windows(*spread(i.last)),
            "slices NCHW": _sliced_windows,
            "slices channels_last": lambda i: _sliced_windows(i.last),
            "torch.compile": lambda i: compiled_windows(*spread(i)),
            "slices NCHW reused": lambda i: _sliced_windows(i, i.out),
            "slices channels_last reused": lambda i: _sliced_windows(i.last, i.last.out),
        },
        read=lambda _, result: (result,),
        floor=lambda _: Floor("bytes", 8.0 * units * channels * (patch_side + 2) ** 2),
        targets=promised if channels > 3 else (),
    )


@dataclass
class ChangeInputs:
    change: Tensor  # a slice of a larger map, as a convolution's cropped result is
    base: Tensor
    origin: Tensor
    out: Tensor
    last: ChangeInputs | None = None  # the same in channels_last


def _change_inputs(units: int, channels: int, size: int, side: int) -> ChangeInputs:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn((1, channels, size, size), generator=generator)
    large = torch.randn((units, channels, side + 2, side + 2), generator=generator)
    origin = torch.randint(0, size - side + 1, (units, 2), generator=generator)
    out = torch.empty(units, channels, side, side)
    tensors = [(t, t.to(memory_format=CL)) for t in (large, base, out)]
    first, last = (ChangeInputs(large[:, :, 1:-1, 1:-1], base, origin, out) for large, base, out in zip(*tensors))
    first.last = last
    return first


def _relu_change(inputs: ChangeInputs, out: Tensor | None = None) -> Tensor:
    return ops.relu_change(inputs.change, inputs.base, inputs.origin, out=out)


def _five_passes(inputs: ChangeInputs) -> Tensor:
    """The windows below, then one operation of torch after the other."""
    clean = ops.gather_windows(inputs.base, None, None, inputs.origin, tuple(inputs.change.shape[2:]))
    below = (-clean).clamp_max_(0)
    return torch.maximum(clean.clamp_max_(0).add_(inputs.change), below)


def _indexed_change(change: Tensor, base: Tensor, origin: Tensor) -> Tensor:
    (y, _), (x, _) = (_cells(origin[:, a], change.shape[2 + a], base.shape[2 + a]) for a in (0, 1))
    clean = base[0].permute(1, 2, 0)[y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)
    return torch.maximum(clean.clamp_max(0) + change, -clean.clamp_min(0))


def changes_case(label: str, units: int, channels: int, size: int, side: int) -> Case:
    compiled_change = compiled(_indexed_change)
    return Case(
        section="changes through a ReLU over a cached map",
        name=f"{label}: {units} of {[channels, side, side]} from {size}x{size}",
        inputs=lambda: _change_inputs(units, channels, size, side),
        ours={
            "NCHW": _relu_change,
            "NCHW reused": lambda i: _relu_change(i, i.out),
            "channels_last": lambda i: _relu_change(i.last),
            "channels_last reused": lambda i: _relu_change(i.last, i.last.out),
        },
        others={
            "five passes NCHW": _five_passes,
            "five passes channels_last": lambda i: _five_passes(i.last),
            "torch.compile": lambda i: compiled_change(i.last.change, i.last.base, i.last.origin),
        },
        read=lambda _, result: (result,),
        floor=lambda _: Floor("bytes", 12.0 * units * channels * side**2),
        targets=(Target("channels_last", 2.0, ("five passes channels_last", "torch.compile")),),
    )


def cases() -> list[Case]:
    vgg = (("conv1_2", 64, 224), ("conv2_2", 128, 112), ("conv3_3", 256, 56), ("conv4_3", 512, 28))
    deconv = [deconv_case(f"{n} {c}->{c} at {s}", b, c, c, s, True) for n, c, s in vgg for b in (1, 8)]
    pixels = [deconv_case("conv1_1 64->3 at 224", b, 64, 3, 224, False) for b in (1, 8)]
    return [
        *(pool_case(*s) for s in SHAPES),
        *(unpool_case(*s) for s in SHAPES),
        *deconv,
        *pixels,
        *(peaks_case(s) for s in ((16, 512, 28, 28), VGG)),
        windows_case("conv4_2", 32, 512, 28, 10),
        windows_case("conv3_2", 128, 256, 56, 16),
        windows_case("pixels", 256, 3, 224, 16),
        changes_case("conv3_2", 128, 256, 56, 16),
    ]
