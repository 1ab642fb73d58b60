"""conv2d_windows: the convolution of windows of a map, each with its unit's own changed patch in it, without writing them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from conelens._native import Native
from conelens.errors import ArgumentError
from conelens.kernels.conv2d_windows import reference
from conelens.kernels.conv2d_windows.triton_configs import prefer_triton, problem_of
from conelens.kernels.gather_windows.reference import gather_windows_backward
from conelens.ops import _arguments as arguments
from conelens.ops._dispatch import BACKENDS, Implementations
from conelens.ops._register import Operator
from conelens.ops.gather_windows import gather_windows

Pair = tuple[int, int]
IntOrPair = int | Sequence[int]


@arguments.takes_arrays
def conv2d_windows(
    base: Tensor,
    patch: Tensor,
    patch_origin: Tensor,
    window_origin: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    dilation: IntOrPair = 1,
    groups: int = 1,
    *,
    out_size: IntOrPair,
    rows: Tensor | None = None,
    relu: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Convolution [U,Co,*out_size], without padding, of the windows of base [B,Ci,H,W] in which patch [U,Ci,h,w] lies over it.

    Output (i, j) of unit u reads map cell ``window_origin[u] + (i, j) * stride`` and, ``dilation`` apart, its neighbours: zero
    outside the map; ``patch`` where the unit's patch, whose first cell is map cell ``patch_origin[u]``, covers the cell; else
    sample ``rows[u]`` of ``base``. What :func:`gather_windows` would give, filtered; padding is in ``window_origin``.

    weight [Co,Ci,kh,kw] (best in ``torch.channels_last``) and bias [Co] are those of ``F.conv2d``; ``groups`` can only be 1.
    ``relu`` rectifies the result; NaN stays. Origins are int32 or int64 [U,2], (y, x), anywhere; so are ``rows`` [U], without
    which unit u reads sample u, or all units read the one there is. Dtype and layout of the result are base's; halves
    accumulate in float32, and float32 in tf32 where torch lets cuDNN do so. A row that base does not have raises ArgumentError
    on the CPU and counts as zero on CUDA. Differentiable in base, patch, weight and bias, twice. Raises ArgumentError.
    """
    arguments.check_map(base, "base")
    arguments.check_map(patch, "patch")
    units = arguments.check_integers(window_origin, "window_origin", base, None, 2)
    arguments.check_integers(patch_origin, "patch_origin", base, units, 2)
    shape = (units, base.shape[1], *patch.shape[2:])
    arguments.check_like(patch, "patch", base, "base", shape=shape, dtype=base.dtype)
    _check_filters(weight, bias, groups, base)
    step, spread = arguments.pair(stride, "stride", 1), arguments.pair(dilation, "dilation", 1)
    size = arguments.pair(out_size, "out_size", 1)
    if rows is not None:
        arguments.check_integers(rows, "rows", base, units)
    elif base.shape[0] not in (1, units):
        raise ArgumentError(f"base has {base.shape[0]} samples for {units} windows: rows must say which one each reads")
    args = (base, patch, patch_origin, window_origin, weight, bias, step, spread, size, rows, bool(relu))
    if out is None:
        return _OPERATOR(*args)
    _OPERATOR.into(arguments.check_outs([("out", out, (units, weight.shape[0], *size), base.dtype)], base, "base"), *args)
    return out


def _check_filters(weight: Any, bias: Any, groups: int, base: Tensor) -> None:
    if groups != 1:
        raise ArgumentError(f"groups must be 1, got {groups}; gather_windows and F.conv2d take any")
    if not isinstance(weight, Tensor) or weight.dim() != 4 or 0 in weight.shape:
        raise ArgumentError(f"weight must be a tensor [Co,Ci,kh,kw], got {getattr(weight, 'shape', weight)!r}")
    shape = (weight.shape[0], base.shape[1], *weight.shape[2:])
    arguments.check_like(weight, "weight", base, "base", shape=shape, dtype=base.dtype)
    if bias is not None:
        if not isinstance(bias, Tensor):
            raise ArgumentError(f"bias must be a tensor [Co] or None, got {type(bias).__name__}")
        arguments.check_like(bias, "bias", base, "base", shape=weight.shape[:1], dtype=base.dtype)


def _window_size(weight: Tensor, stride: Any, dilation: Any, out_size: Any) -> Pair:
    return reference.window_size(out_size, (weight.shape[2], weight.shape[3]), stride, dilation)


def _fake(
    base: Tensor,
    patch: Tensor,
    patch_origin: Tensor,
    window_origin: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    dilation: Any,
    out_size: Any,
    rows: Tensor | None,
    relu: bool,
) -> Tensor:
    return arguments.empty((patch.shape[0], weight.shape[0], *out_size), base)


def _reference(base: Tensor, *args: Any) -> Tensor:
    rows = args[8]
    if rows is not None and rows.device.type == "cpu":  # a CUDA device is not waited for
        arguments.refuse_missing_row(rows, base.shape[0])
    return _in_layout_of(reference.conv2d_windows(base, *args), base)


def _compiled(
    native: Native,
    base: Tensor,
    patch: Tensor,
    patch_origin: Tensor,
    window_origin: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    dilation: Any,
    out_size: Any,
    rows: Tensor | None,
    relu: bool,
    out: Tensor | None = None,
) -> Tensor:
    """The windows by our kernel, then torch's own convolution (oneDNN, cuDNN)."""
    size = _window_size(weight, stride, dilation, out_size)
    windows = gather_windows(base, patch, patch_origin, window_origin, size, rows=rows)
    result = F.conv2d(windows, weight, bias, stride, 0, dilation)
    return _in_layout_of(torch.relu_(result) if relu else result, base)


def _in_layout_of(result: Tensor, like: Tensor) -> Tensor:
    layout = torch.channels_last if arguments.is_channels_last(like) else torch.contiguous_format
    return result.contiguous(memory_format=layout)


def _order(base: Tensor, *rest: Any) -> tuple[str, ...]:
    """On CUDA a checked-in table chooses between the Triton kernel and gathering the windows for cuDNN."""
    if len(rest) == 10:  # ops.backends may be asked about the tensors alone
        patch, _, _, weight, bias, stride, dilation, out_size, _, relu = rest
        window = _window_size(weight, stride, dilation, out_size)
        if prefer_triton(problem_of(base, patch.shape[0], weight, bias, out_size, window, relu)):
            return ("triton", "compiled", "reference")
        return ("compiled", "triton", "reference")
    return BACKENDS


_OPERATOR = Operator(
    "Tensor base, Tensor patch, Tensor patch_origin, Tensor window_origin, Tensor weight, Tensor? bias, int[2] stride, "
    "int[2] dilation, SymInt[2] out_size, Tensor? rows, bool relu",
    ("out",),
    Implementations("conv2d_windows", compiled=_compiled, reference=_reference, order=_order, native="gather_windows"),
    _fake,
)


# --- gradient: that of the convolution of gathered windows --------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    base, patch, patch_origin, window_origin, weight, _, ctx.stride, ctx.dilation, ctx.out_size, rows, relu = inputs
    ctx.save_for_backward(base, patch, patch_origin, window_origin, weight, rows, output if relu else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    base, patch, patch_origin, window_origin, weight, rows, rectified = ctx.saved_tensors
    if rectified is not None:
        grad = grad.masked_fill(rectified <= 0, 0)
    size = _window_size(weight, ctx.stride, ctx.dilation, ctx.out_size)
    needs = ctx.needs_input_grad
    grad_base = grad_patch = grad_weight = None
    if needs[0] or needs[1]:
        shape = (patch.shape[0], base.shape[1], *size)
        through = conv2d_input(shape, weight, grad, ctx.stride, 0, ctx.dilation)
        place = (tuple(base.shape), (patch.shape[2], patch.shape[3]), patch_origin, window_origin, rows, False)
        grad_base, grad_patch = gather_windows_backward(through, *place)
    if needs[4]:
        windows = gather_windows(base, patch, patch_origin, window_origin, size, rows=rows)
        grad_weight = conv2d_weight(windows, weight.shape, grad, ctx.stride, 0, ctx.dilation)
    grad_bias = grad.sum((0, 2, 3)) if needs[5] else None
    return grad_base, grad_patch, None, None, grad_weight, grad_bias, *[None] * 5


_OPERATOR.register_autograd(_backward, _setup_context)
