"""max_pool2d_with_switches: maximum pooling that records where in its window each maximum was."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from conelens._native import Native
from conelens.errors import ArgumentError
from conelens.kernels.max_pool2d_with_switches import reference
from conelens.ops import _arguments as arguments
from conelens.ops._dispatch import Implementations
from conelens.ops._register import Operator
from conelens.ops.max_unpool2d import unpool

Pair = tuple[int, int]


class PooledSwitches(NamedTuple):
    """pooled [N,C,h,w] in the input's dtype; switches [N,C,h,w], the row-major tap inside each window."""

    pooled: Tensor
    switches: Tensor


@arguments.takes_arrays
def max_pool2d_with_switches(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    *,
    relu: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> PooledSwitches:
    """Pool x [N,C,H,W] (float32, float16, bfloat16, float64) and record each window's maximum as a switch.

    A switch is the row-major index ``ky * kw + kx`` inside its own window: uint8 for up to 256 taps, else int32.
    The first maximum wins; of NaNs the last, as in ``F.max_pool2d``. With ``relu`` the values are max(x, 0) and a
    window without a positive value takes its first tap inside the map. Sizes are counted as in ``F.max_pool2d``, but
    ``padding`` may be any size that leaves each window a cell of the map. Results follow x's memory format.

    Returns ``(pooled, switches)``, or writes them into ``out``. Differentiable in x.
    Raises ArgumentError for a wrong shape, dtype, device or a window without a cell.
    """
    arguments.check_map(x, "x")
    kernel = arguments.window(kernel_size, "kernel_size")
    step = kernel if stride is None or stride == () or stride == [] else arguments.pair(stride, "stride", 1)
    pad = arguments.pair(padding, "padding", 0)
    spread = arguments.pair(dilation, "dilation", 1)
    args = (x, kernel, step, pad, spread, bool(ceil_mode), bool(relu))
    if out is None:
        return PooledSwitches(*_OPERATOR(*args))
    if not isinstance(out, tuple) or len(out) != 2:
        raise ArgumentError(f"out must be (pooled, switches), got {type(out).__name__}")
    shape = _output_shape(x.shape, *args[1:-1])
    _OPERATOR.into(
        arguments.check_outs(
            [
                ("out[0] (pooled)", out[0], shape, x.dtype),
                ("out[1] (switches)", out[1], shape, reference.switch_dtype(kernel)),
            ],
            x,
            "x",
        ),
        *args,
    )
    return PooledSwitches(*out)


def _output_shape(
    shape: Sequence[int], kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
) -> tuple[int, int, int, int]:
    sizes = []
    for axis, name in enumerate(("height", "width")):
        size = shape[2 + axis]
        k, s, p, d = kernel[axis], stride[axis], padding[axis], dilation[axis]
        length = reference.output_length(size, k, s, p, d, ceil_mode)
        if length < 1:
            raise ArgumentError(f"x is too small: {name} {size} with padding {p} is shorter than a window of {d * (k - 1) + 1}")
        # only windows that start in the near padding, and the last one, can miss the map
        for window in [*range(min(length, -(-p // s))), length - 1]:
            start = window * s - p
            first_inside = start + max(0, -(start // d)) * d
            if first_inside > start + d * (k - 1) or first_inside >= size:
                raise ArgumentError(
                    f"window {window} along {name} has no cell of the map "
                    f"(size {size}, kernel {k}, stride {s}, padding {p}, dilation {d}); reduce the padding"
                )
        sizes.append(length)
    return shape[0], shape[1], sizes[0], sizes[1]


_known_shape = functools.lru_cache(maxsize=4096)(_output_shape)  # a small window costs less than counting it


def _allocate(x: Tensor, shape: Sequence[int], kernel: Pair) -> tuple[Tensor, Tensor]:
    return arguments.empty(shape, x), arguments.empty(shape, x, dtype=reference.switch_dtype(kernel))


def _fake(
    x: Tensor, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, relu: bool
) -> tuple[Tensor, Tensor]:
    return _allocate(x, _output_shape(x.shape, kernel_size, stride, padding, dilation, ceil_mode), kernel_size)


def _compiled(
    native: Native,
    x: Tensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: bool,
    relu: bool,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    x = arguments.readable(x)
    if out is not None and all(arguments.same_layout(o, x) for o in out):
        pooled, switches = out
    else:
        window = (tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation))  # the dispatcher brings lists
        pooled, switches = _allocate(x, _known_shape(x.shape, *window, ceil_mode), kernel_size)
    native.module.max_pool2d_with_switches(  # type: ignore[union-attr]
        x, pooled, switches, kernel_size, stride, padding, dilation, relu, native.context(x.device)
    )
    return pooled, switches


def _reference(
    x: Tensor, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, relu: bool
) -> tuple[Tensor, Tensor]:
    _output_shape(x.shape, kernel_size, stride, padding, dilation, ceil_mode)
    pooled, switches = reference.max_pool2d_with_switches(x, kernel_size, stride, padding, dilation, ceil_mode, relu)
    layout = torch.channels_last if arguments.is_channels_last(x) else torch.contiguous_format
    return pooled.contiguous(memory_format=layout), switches.contiguous(memory_format=layout)


_OPERATOR = Operator(
    "Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode, bool relu",
    ("pooled", "switches"),
    Implementations("max_pool2d_with_switches", compiled=_compiled, reference=_reference),
    _fake,
)
pool_and_switches = _OPERATOR  # for callers who know their arguments to fit, in the schema's form: the engine's small calls


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *window, _, relu = inputs
    pooled, switches = output
    ctx.mark_non_differentiable(switches)
    ctx.save_for_backward(switches, pooled if relu else None)
    ctx.window, ctx.size = window, x.shape[2:]


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    switches, pooled = ctx.saved_tensors
    if pooled is not None:
        grad = grad.masked_fill(pooled <= 0, 0)
    return unpool(grad, switches, *ctx.window, ctx.size, False, None, False), *[None] * 6


_OPERATOR.register_autograd(_backward, _setup_context)
