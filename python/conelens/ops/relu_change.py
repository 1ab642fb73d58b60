"""relu_change: what a ReLU makes of changes to its input, over cached maps of that input, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from conelens._native import Native
from conelens.errors import ArgumentError
from conelens.kernels.relu_change import reference
from conelens.ops import _arguments as arguments
from conelens.ops._dispatch import Implementations
from conelens.ops._register import Operator


@arguments.takes_arrays
def relu_change(
    change: Tensor, base: Tensor, origin: Tensor, *, rows: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """``relu(z + change) - relu(z)`` over the clean input base [B,C,H,W] of a ReLU -> [U,C,h,w], in base's layout.

    z is what base has under change [U,C,h,w]: the first cell of unit u's change is map cell ``origin[u]``, (y, x), int32 or
    int64 [U,2], anywhere inside or outside the map; it belongs to sample ``rows[u]`` of ``base``, int32 or int64 [U], without
    which unit u belongs to sample u, or all units to the one there is. Cells outside the map give 0.

    Computed as ``max(change + min(z, 0), -max(z, 0))``: where a cell is on and stays on its change passes unrounded, and 0
    gives 0; NaN stays. float32, float16, bfloat16 or float64, halves in float32 and rounded once. ``out`` may be ``change``
    itself. A row that base does not have raises ArgumentError on the CPU and gives 0 on CUDA. Differentiable in change and
    base. Raises ArgumentError for a wrong shape, dtype or device.
    """
    arguments.check_map(change, "change")
    arguments.check_map(base, "base")
    units, channels = change.shape[:2]
    shape = (base.shape[0], channels, *base.shape[2:])
    arguments.check_like(base, "base", change, "change", shape=shape, dtype=change.dtype)
    arguments.check_integers(origin, "origin", base, units, 2)
    if rows is not None:
        arguments.check_integers(rows, "rows", base, units)
    elif base.shape[0] not in (1, units):
        raise ArgumentError(f"base has {base.shape[0]} samples for {units} changes: rows must say which one each belongs to")
    if out is None:
        return _OPERATOR(change, base, origin, rows)
    outs = arguments.check_outs([("out", out, change.shape, change.dtype)], change, "change")
    _OPERATOR.into(outs, change, base, origin, rows)
    return out


def _fake(change: Tensor, base: Tensor, origin: Tensor, rows: Tensor | None) -> Tensor:
    return arguments.empty(change.shape, base)


def _reference(change: Tensor, base: Tensor, origin: Tensor, rows: Tensor | None) -> Tensor:
    if rows is not None and rows.device.type == "cpu":  # a CUDA device is not waited for
        arguments.refuse_missing_row(rows, base.shape[0])
    layout = torch.channels_last if arguments.is_channels_last(base) else torch.contiguous_format
    return reference.relu_change(change, base, origin, rows).contiguous(memory_format=layout)


def _compiled(
    native: Native, change: Tensor, base: Tensor, origin: Tensor, rows: Tensor | None, out: Tensor | None = None
) -> Tensor:
    base = arguments.readable(base.resolve_neg())
    change = arguments.in_layout_of(change, base)
    if out is None or not arguments.same_layout(out, base):
        out = arguments.empty(change.shape, base)
    integers = (None if t is None else t.contiguous() for t in (origin, rows))
    module, context = native.module, native.context(base.device)
    valid = module.relu_change(change, base, *integers, out, context)  # type: ignore[union-attr]
    if not valid and rows is not None:
        arguments.refuse_missing_row(rows, base.shape[0])
    return out


_OPERATOR = Operator(
    "Tensor change, Tensor base, Tensor origin, Tensor? rows",
    ("out",),
    Implementations("relu_change", compiled=_compiled, reference=_reference),
    _fake,
    in_place="change",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *reference.relu_change_backward(grad, *ctx.saved_tensors), None, None


_OPERATOR.register_autograd(_backward, _setup_context)
