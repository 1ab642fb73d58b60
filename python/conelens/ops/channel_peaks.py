"""channel_peaks: the strongest response of every channel and where it is, in one read of the map."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from conelens._native import Native
from conelens.errors import ArgumentError
from conelens.kernels.channel_peaks import reference
from conelens.ops import _arguments as arguments
from conelens.ops._dispatch import Implementations
from conelens.ops._register import Operator

REDUCTIONS = ("max", "sum", "mean")


class ChannelPeaks(NamedTuple):
    """values [N,C] in the input's dtype; positions [N,C] int32, y * W + x of the first maximum."""

    values: Tensor
    positions: Tensor


@arguments.takes_arrays
def channel_peaks(x: Tensor, *, reduce: str = "max", out: tuple[Tensor, Tensor] | None = None) -> ChannelPeaks:
    """Per channel of x [N,C,H,W]: the maximum (or "sum" or "mean") and the position of the first maximum.

    As in ``torch.max`` a NaN counts as the maximum; the first NaN wins. Sums accumulate in float32 (float64
    in float64) in an order that shape and layout decide. ``out`` = (values, positions) is written.
    Differentiable in x, twice. Raises ArgumentError for a wrong shape, dtype, device or ``reduce``.
    """
    arguments.check_map(x, "x")
    if reduce not in REDUCTIONS:
        raise ArgumentError(f"reduce must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduce!r}")
    if x.shape[2] * x.shape[3] >= 2**31:
        raise ArgumentError(f"x has {x.shape[2]}x{x.shape[3]} cells, too many for int32 positions")
    if out is None:
        return ChannelPeaks(*_OPERATOR(x, reduce))
    if not isinstance(out, tuple | list) or len(out) != 2:
        raise ArgumentError(f"out must be (values, positions), got {type(out).__name__}")
    shape = x.shape[:2]
    wanted = [("out[0]", out[0], shape, x.dtype), ("out[1]", out[1], shape, torch.int32)]
    _OPERATOR.into(arguments.check_outs(wanted, x, "x"), x, reduce)
    return ChannelPeaks(*out)


def _outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    shape = x.shape[:2]
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int32)


def _fake(x: Tensor, reduce: str) -> tuple[Tensor, Tensor]:
    return _outputs(x)


def _compiled(native: Native, x: Tensor, reduce: str, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    x = arguments.readable(x)
    if out is None or not all(o.is_contiguous() for o in out):
        out = _outputs(x)
    module, context = native.module, native.context(x.device)
    module.channel_peaks(x, *out, REDUCTIONS.index(reduce), context)  # type: ignore[union-attr]
    return out


_OPERATOR = Operator(
    "Tensor x, str reduce",
    ("values", "positions"),
    Implementations("channel_peaks", compiled=_compiled, reference=reference.channel_peaks),
    _fake,
)


# --- gradient: a maximum sends it to its position, a sum to every cell --------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.reduce = inputs
    ctx.shape = x.shape
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
    (positions,) = ctx.saved_tensors
    cells = ctx.shape[2] * ctx.shape[3]
    grad = grad[:, :, None]
    if ctx.reduce == "max":
        flat = grad.new_zeros(*ctx.shape[:2], cells).scatter(2, positions[:, :, None].long(), grad)
    else:
        flat = (grad if ctx.reduce == "sum" else grad / cells).expand(*ctx.shape[:2], cells)
    return flat.reshape(ctx.shape), None


_OPERATOR.register_autograd(_backward, _setup_context)
