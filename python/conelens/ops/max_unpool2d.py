"""max_unpool2d: put pooled values back to where their switches point, adding where windows overlap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from conelens._native import Native
from conelens.errors import ArgumentError
from conelens.kernels.max_pool2d_with_switches.reference import switch_dtype
from conelens.kernels.max_unpool2d import reference
from conelens.ops import _arguments as arguments
from conelens.ops._dispatch import Implementations
from conelens.ops._register import Operator

Pair = tuple[int, int]


@arguments.takes_arrays
def max_unpool2d(
    pooled: Tensor,
    switches: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    output_size: Sequence[int],
    relu: bool = False,
    origin: Tensor | None = None,
    check: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Unpool pooled [N,C,h,w] by switches [N,C,h,w] (as max_pool2d_with_switches gives them) -> [N,C,*output_size].

    Cell Y collects pooled cell P through tap t where ``P * stride - padding + dilation * t == Y`` and the switch of
    P is t; overlapping windows add, always in the same order. ``relu`` rectifies the sum. ``padding`` may be any size.

    ``origin`` (int32 or int64 [N,2], may be negative) says that pooled is a window of a larger pooled map and gives the
    map coordinates (y, x) of each sample's first cell. The result is then the natural window, of size
    ``(h - 1) * stride + dilation * (kernel_size - 1) + 1`` per axis, whose first cell is at ``origin * stride -
    padding``; its cells outside the map of ``output_size`` are zero.

    A switch outside its window, or (without ``origin``) one that points outside the map, contributes nothing on CUDA
    unless ``check=True``; there, and always on the CPU, it raises ArgumentError naming the switch. ``check`` waits for
    the device. Differentiable in pooled, twice. Raises ArgumentError for a wrong shape, dtype or device.
    """
    arguments.check_map(pooled, "pooled")
    kernel = arguments.window(kernel_size, "kernel_size")
    step = kernel if stride is None or stride == () or stride == [] else arguments.pair(stride, "stride", 1)
    pad = arguments.pair(padding, "padding", 0)
    spread = arguments.pair(dilation, "dilation", 1)
    size = arguments.pair(output_size, "output_size", 0)
    check_switches(switches, pooled, kernel)
    check_origin(origin, pooled)
    args = (pooled, switches, kernel, step, pad, spread, size, bool(relu), origin, bool(check))
    if out is None:
        return _OPERATOR(*args)
    shape = _output_shape(pooled, kernel, step, spread, size, origin)
    _OPERATOR.into(arguments.check_outs([("out", out, shape, pooled.dtype)], pooled, "pooled"), *args)
    return out


def check_switches(switches: Tensor, pooled: Tensor, kernel: Pair) -> None:
    """switches fit pooled cell by cell, in the type that max_pool2d_with_switches gives."""
    if isinstance(switches, Tensor) and switches.dtype == torch.int64:
        raise ArgumentError(
            "switches is int64, which looks like the flat indices of F.max_pool2d; "
            "use the switches of conelens.ops.max_pool2d_with_switches"
        )
    if not isinstance(switches, Tensor):
        raise ArgumentError(f"switches must be a tensor, got {type(switches).__name__}")
    arguments.check_like(switches, "switches", pooled, "pooled", shape=pooled.shape, dtype=switch_dtype(kernel))


def check_origin(origin: Tensor | None, like: Tensor) -> None:
    if origin is None:
        return
    if not isinstance(origin, Tensor) or origin.dtype not in (torch.int32, torch.int64):
        raise ArgumentError(f"origin must be an int32 or int64 tensor [N,2], got {getattr(origin, 'dtype', origin)}")
    arguments.check_like(origin, "origin", like, "pooled", shape=(like.shape[0], 2), dtype=origin.dtype)


def _output_shape(
    pooled: Tensor, kernel: Pair, stride: Pair, dilation: Pair, output_size: Pair, origin: Tensor | None
) -> tuple[int, int, int, int]:
    size = output_size
    if origin is not None:
        size = reference.natural_size((pooled.shape[2], pooled.shape[3]), kernel, stride, dilation)
    return pooled.shape[0], pooled.shape[1], size[0], size[1]


def _fake(
    pooled: Tensor,
    switches: Tensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    output_size: Any,
    relu: bool,
    origin: Tensor | None,
    check: bool,
) -> Tensor:
    return arguments.empty(_output_shape(pooled, kernel_size, stride, dilation, output_size, origin), pooled)


def _refuse(switches: Tensor, *window: Any) -> None:
    """Name the first invalid switch, if there is one."""
    invalid = reference.invalid_switches(switches, *window)
    if not invalid.any():
        return
    n, c, y, x = invalid.nonzero()[0].tolist()
    kernel_size, *_, output_size, _ = window
    raise ArgumentError(
        f"switches[{n}, {c}, {y}, {x}] is {int(switches[n, c, y, x])}, which points outside its window of "
        f"{kernel_size[0]}x{kernel_size[1]} or outside the map of {list(output_size)}: "
        "switches, kernel_size, stride, padding and output_size must be those of the pooling"
    )


def _compiled(
    native: Native,
    pooled: Tensor,
    switches: Tensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    output_size: Any,
    relu: bool,
    origin: Tensor | None,
    check: bool,
    out: Tensor | None = None,
) -> Tensor:
    pooled = arguments.readable(pooled)
    switches = arguments.in_layout_of(switches, pooled)
    window = (kernel_size, stride, padding, dilation, output_size)
    if check and pooled.device.type != "cpu":
        _refuse(switches, *window, origin)
    if out is None or not arguments.same_layout(out, pooled):
        shape = _output_shape(pooled, kernel_size, stride, dilation, output_size, origin)
        out = arguments.empty(shape, pooled)
    valid = native.module.max_unpool2d(  # type: ignore[union-attr]
        pooled, switches, out, *window, relu, _contiguous(origin), native.context(pooled.device)
    )
    if not valid:
        _refuse(switches, *window, origin)
    return out


def _contiguous(origin: Tensor | None) -> Tensor | None:
    return None if origin is None else origin.contiguous()


def _reference(
    pooled: Tensor,
    switches: Tensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    output_size: Any,
    relu: bool,
    origin: Tensor | None,
    check: bool,
) -> Tensor:
    window = (kernel_size, stride, padding, dilation, output_size)
    if check or pooled.device.type == "cpu":
        _refuse(switches, *window, origin)
    out = reference.max_unpool2d(pooled, switches, *window, relu, origin)
    layout = torch.channels_last if arguments.is_channels_last(pooled) else torch.contiguous_format
    return out.contiguous(memory_format=layout)


_OPERATOR = Operator(
    "Tensor pooled, Tensor switches, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, "
    "SymInt[2] output_size, bool relu, Tensor? origin, bool check",
    ("out",),
    Implementations("max_unpool2d", compiled=_compiled, reference=_reference),
    _fake,
)
unpool = _OPERATOR  # for gradients of the pool, which skip the public checks


# --- gradient: the adjoint reads each switch's cell; its own gradient is the unpool again ---------


def _backward_fake(
    grad: Tensor,
    switches: Tensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    output_size: Any,
    origin: Tensor | None,
) -> Tensor:
    return arguments.empty(switches.shape, grad)


def _backward_compiled(
    native: Native,
    grad: Tensor,
    switches: Tensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    output_size: Any,
    origin: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    out = arguments.empty(switches.shape, grad) if out is None else out
    native.module.max_unpool2d_backward(  # type: ignore[union-attr]
        grad,
        switches,
        out,
        kernel_size,
        stride,
        padding,
        dilation,
        output_size,
        _contiguous(origin),
        native.context(grad.device),
    )
    return out


def _backward_reference(grad: Tensor, switches: Tensor, *window: Any) -> Tensor:
    out = reference.max_unpool2d_backward(grad, switches, *window)
    layout = torch.channels_last if arguments.is_channels_last(grad) else torch.contiguous_format
    return out.contiguous(memory_format=layout)


_BACKWARD = Operator(
    "Tensor grad, Tensor switches, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, "
    "SymInt[2] output_size, Tensor? origin",
    ("out",),
    Implementations("max_unpool2d_backward", compiled=_backward_compiled, reference=_backward_reference),
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, switches, *window, relu, origin, _ = inputs
    ctx.save_for_backward(switches, output if relu else None, origin)
    ctx.window = window


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    switches, rectified, origin = ctx.saved_tensors
    if rectified is not None:
        grad = grad.masked_fill(rectified <= 0, 0)
    return _BACKWARD(grad, switches, *ctx.window, origin), *[None] * 9


_OPERATOR.register_autograd(_backward, _setup_context)


def _setup_backward_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, switches, *window, origin = inputs
    ctx.save_for_backward(switches, origin)
    ctx.window = window


def _double_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    switches, origin = ctx.saved_tensors
    return _OPERATOR(grad, switches, *ctx.window, False, origin, False), *[None] * 7


_BACKWARD.register_autograd(_double_backward, _setup_backward_context)
