"""gather_windows: windows of cached maps, overlaid with each unit's own changed patch, in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from conelens._native import Native
from conelens.errors import ArgumentError
from conelens.kernels.gather_windows import reference
from conelens.ops import _arguments as arguments
from conelens.ops._dispatch import Implementations
from conelens.ops._register import Operator

DTYPES = (*arguments.FLOATS, torch.uint8, torch.int32)  # maps, and switches


@arguments.takes_arrays
def gather_windows(
    base: Tensor,
    patch: Tensor | None,
    patch_origin: Tensor | None,
    window_origin: Tensor,
    window_size: int | Sequence[int],
    *,
    rows: Tensor | None = None,
    fill: float = 0.0,
    add: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Windows of base [B,C,H,W] in which patch [U,C,h,w] lies over it -> [U,C,*window_size], in base's layout.

    Cell (i, j) of unit u's window is map cell ``window_origin[u] + (i, j)``: ``fill`` outside the map; ``patch`` where the
    unit's patch, whose first cell is map cell ``patch_origin[u]``, covers it (``base + patch`` with ``add``); else sample
    ``rows[u]`` of ``base``. Origins are int32 or int64 [U,2], (y, x), anywhere inside or outside the map; so are ``rows``
    [U], without which unit u reads sample u, or all units read the one there is. ``patch`` may be None, with its origin.

    Bits are copied as they are; sums round once. Maps are float32, float16, bfloat16, float64, or, but for ``add``, uint8
    or int32. A row that base does not have raises ArgumentError on the CPU and gives ``fill`` on CUDA. Differentiable in
    base and patch, twice. Raises ArgumentError for a wrong shape, dtype or device.
    """
    arguments.check_map(base, "base", DTYPES)
    size = arguments.pair(window_size, "window_size", 1)
    units = arguments.check_integers(window_origin, "window_origin", base, None, 2)
    if (patch is None) != (patch_origin is None):
        raise ArgumentError("patch and patch_origin go together: give both or neither")
    if patch is not None and patch_origin is not None:
        arguments.check_map(patch, "patch", DTYPES)
        shape = (units, base.shape[1], *patch.shape[2:])
        arguments.check_like(patch, "patch", base, "base", shape=shape, dtype=base.dtype)
        arguments.check_integers(patch_origin, "patch_origin", base, units, 2)
    elif add:
        raise ArgumentError("add=True has nothing to add without patch")
    if rows is not None:
        arguments.check_integers(rows, "rows", base, units)
    elif base.shape[0] not in (1, units):
        raise ArgumentError(f"base has {base.shape[0]} samples for {units} windows: rows must say which one each reads")
    if add and not base.dtype.is_floating_point:
        raise ArgumentError(f"add=True wants floats, got {base.dtype}")
    _check_fill(fill, base.dtype)
    args = (base, patch, patch_origin, window_origin, size, rows, float(fill), bool(add))
    if out is None:
        return _OPERATOR(*args)
    shape = (units, base.shape[1], *size)
    _OPERATOR.into(arguments.check_outs([("out", out, shape, base.dtype)], base, "base"), *args)
    return out


def _check_fill(fill: float, dtype: torch.dtype) -> None:
    if dtype.is_floating_point:
        held = not torch.finfo(dtype).max < abs(fill) < math.inf
    else:
        held = torch.iinfo(dtype).min <= fill <= torch.iinfo(dtype).max and fill == int(fill)
    if not held:
        raise ArgumentError(f"fill must be a number that {dtype} holds, got {fill!r}")


def _fake(
    base: Tensor,
    patch: Tensor | None,
    patch_origin: Tensor | None,
    window_origin: Tensor,
    window_size: Any,
    rows: Tensor | None,
    fill: float,
    add: bool,
) -> Tensor:
    return arguments.empty((window_origin.shape[0], base.shape[1], *window_size), base)


def _reference(base: Tensor, *args: Any) -> Tensor:
    rows = args[4]
    if rows is not None and rows.device.type == "cpu":  # a CUDA device is not waited for
        arguments.refuse_missing_row(rows, base.shape[0])
    layout = torch.channels_last if arguments.is_channels_last(base) else torch.contiguous_format
    return reference.gather_windows(base, *args).contiguous(memory_format=layout)


def _compiled(
    native: Native,
    base: Tensor,
    patch: Tensor | None,
    patch_origin: Tensor | None,
    window_origin: Tensor,
    window_size: Any,
    rows: Tensor | None,
    fill: float,
    add: bool,
    out: Tensor | None = None,
) -> Tensor:
    base = arguments.readable(base)
    if patch is not None:
        patch = arguments.in_layout_of(patch.resolve_neg(), base)
    if out is None or not arguments.same_layout(out, base):
        out = arguments.empty((window_origin.shape[0], base.shape[1], *window_size), base)
    origins = (None if t is None else t.contiguous() for t in (patch_origin, window_origin, rows))
    module, context = native.module, native.context(base.device)
    valid = module.gather_windows(base, patch, *origins, out, fill, add, context)  # type: ignore[union-attr]
    if not valid and rows is not None:
        arguments.refuse_missing_row(rows, base.shape[0])
    return out


_OPERATOR = Operator(
    "Tensor base, Tensor? patch, Tensor? patch_origin, Tensor window_origin, SymInt[2] window_size, Tensor? rows, "
    "float fill, bool add",
    ("out",),
    Implementations("gather_windows", compiled=_compiled, reference=_reference),
    _fake,
)


# --- gradient: every cell goes back to where it was read ------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    base, patch, patch_origin, window_origin, _, rows, _, ctx.add = inputs
    ctx.save_for_backward(patch_origin, window_origin, rows)
    ctx.base_shape = tuple(base.shape)
    ctx.patch_size = None if patch is None else (patch.shape[2], patch.shape[3])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    patch_origin, window_origin, rows = ctx.saved_tensors
    place = (ctx.base_shape, ctx.patch_size, patch_origin, window_origin, rows, ctx.add)
    return *reference.gather_windows_backward(grad, *place), *[None] * 6


_OPERATOR.register_autograd(_backward, _setup_context)
