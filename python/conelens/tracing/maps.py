"""Rules for whatever reads more than one cell: filters, norms, pools, reductions, resizing and padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from conelens.errors import UnsupportedOperatorError
from conelens.graph import Node
from conelens.operators import (
    Add,
    Affine,
    Conv2d,
    GroupNorm,
    Linear,
    LocalResponseNorm,
    MaxPool2d,
    Opaque,
    Pad,
    Pair,
    Spatial,
)
from conelens.tracing.layouts import Result, arrange, emit_like
from conelens.tracing.recorder import Meaning, Recorder


def _pair(value: Any) -> Pair:
    if isinstance(value, int):
        return value, value
    values = [int(v) for v in value]
    return (values[0], values[0]) if len(values) == 1 else (values[0], values[1])


def _constant(rec: Recorder, tensor: Tensor, what: str) -> None:
    if rec.meaning(tensor) is not None:
        raise UnsupportedOperatorError(f"{rec.here}: {what} depends on the input (dynamic filters have no rule)")


def conv2d(
    rec: Recorder, out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
    padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Result:  # fmt: skip
    stride, dilation = _pair(stride), _pair(dilation)
    kernel = (weight.shape[2], weight.shape[3])
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        top, left = total[0] // 2, total[1] // 2
        amounts = (top, left, total[0] - top, total[1] - left)
    else:
        top, left = (0, 0) if padding == "valid" else _pair(padding)
        amounts = (top, left, top, left)
    _constant(rec, weight, "weight")
    op = Conv2d(weight.detach(), None if bias is None else bias.detach(), stride, amounts, dilation, groups)
    return emit_like(rec, out, op, rec.map_of(input))


def linear(rec: Recorder, out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Result:
    node = rec.map_of(input)
    if not node.vector and input.ndim != 2:
        raise UnsupportedOperatorError(f"{rec.here}: a linear layer needs a vector [N, F], got shape {tuple(input.shape)}")
    _constant(rec, weight, "weight")
    return emit_like(rec, out, Linear(weight.detach(), None if bias is None else bias.detach()), node)


def batch_norm(
    rec: Recorder, out: Tensor, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False, momentum: float = 0.1,
    eps: float = 1e-5,
) -> Result:  # fmt: skip
    if training or running_mean is None or running_var is None:
        raise UnsupportedOperatorError(f"{rec.here}: batch statistics mix the samples; call model.eval() first")
    factor = 1 / torch.sqrt(running_var.detach().double() + eps)
    if weight is not None:
        factor = factor * weight.detach().double()
    shift = -running_mean.detach().double() * factor
    if bias is not None:
        shift = shift + bias.detach().double()
    node = rec.map_of(input)
    return emit_like(rec, out, Affine(factor.to(input.dtype), shift.to(input.dtype), kind="batch_norm"), node)


def instance_norm(
    rec: Recorder, out: Tensor, input: Tensor, running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True,
    momentum: float = 0.1, eps: float = 1e-5,
) -> Result:  # fmt: skip
    if not use_input_stats:
        return batch_norm(rec, out, input, running_mean, running_var, weight, bias, False, momentum, eps)
    return group_norm(rec, out, input, input.shape[1], weight, bias, eps)


def group_norm(
    rec: Recorder,
    out: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Result:
    kind, node = rec.here.split(" ", 1)[0], rec.map_of(input)
    weight, bias = (None if t is None else t.detach() for t in (weight, bias))
    return emit_like(rec, out, GroupNorm(num_groups, weight, bias, eps, node.size, rec.rule_for(kind), kind), node)


def _separable(rec: Recorder, out: Tensor, x: Tensor, kind: str, function: Callable[[Tensor], Tensor], **extra: Any) -> Result:
    """Any separable linear map of space, read off two probes: unit rows and unit columns."""
    node = rec.map_of(x)
    height, width = node.size
    # Dividing by the response to a constant along the other axis leaves each axis its own, correctly
    # normalised share.
    ones = function(torch.ones(1, 1, height, width, dtype=torch.float64))
    at_y, at_x = (int(v) for v in torch.nonzero(ones[0, 0] == ones[0, 0].max())[0])
    few = max(1, 2**22 // (height * width))  # probes at a time, so that large maps take no gigabytes
    rows, columns = ones.new_empty(height, ones.shape[2]), ones.new_empty(width, ones.shape[3])
    for first in range(0, height, few):
        unit = torch.eye(height, dtype=torch.float64)[first : first + few]
        rows[first : first + few] = function(unit[:, None, :, None].expand(-1, 1, height, width))[:, 0, :, at_x]
    for first in range(0, width, few):
        unit = torch.eye(width, dtype=torch.float64)[first : first + few]
        columns[first : first + few] = function(unit[:, None, None, :].expand(-1, 1, height, width))[:, 0, at_y, :]
    share = rows.T / ones[0, 0, at_y, at_x]
    return emit_like(rec, out, Spatial(share.contiguous(), columns.T.contiguous(), kind=kind, **extra), node)


def avg_pool2d(
    rec: Recorder, out: Tensor, input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0,
    ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None,
) -> Result:  # fmt: skip
    kernel, padding = _pair(kernel_size), _pair(padding)
    stride = kernel if stride is None or stride == [] else _pair(stride)
    function = partial(
        F.avg_pool2d, kernel_size=kernel, stride=stride, padding=padding, ceil_mode=ceil_mode,
        count_include_pad=count_include_pad, divisor_override=divisor_override,
    )  # fmt: skip
    return _separable(rec, out, input, "avg_pool", function, window=(kernel, stride, padding))


def adaptive_avg_pool2d(rec: Recorder, out: Tensor, input: Tensor, output_size: Any) -> Result:
    size = (out.shape[2], out.shape[3])
    return _separable(rec, out, input, "avg_pool", partial(F.adaptive_avg_pool2d, output_size=size))


def mean(rec: Recorder, out: Tensor, input: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Result:
    return _reduced(rec, out, input, dim, lambda count: 1 / count)


def total(rec: Recorder, out: Tensor, input: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Result:
    return _reduced(rec, out, input, dim, lambda count: 1.0)


def _dimensions(rec: Recorder, x: Tensor, dim: Any) -> list[int]:
    dims = sorted(d % x.ndim for d in ([dim] if isinstance(dim, int) else dim or ()))
    if not dims or dims[0] == 0:
        raise UnsupportedOperatorError(
            f"{rec.here}: reduces over the samples of a batch (dim={dim}), so that what follows depends on the data"
        )
    return dims


def _reduced(rec: Recorder, out: Tensor, x: Tensor, dim: Any, weight: Callable[[int], float]) -> Result:
    """Sums with a weight: over rows and columns, over channels, or over one dimension of split channels."""
    found, dims = rec.meaning(x), _dimensions(rec, x, dim)
    assert found is not None
    node = rec.graph[found.node]
    channels, height, width = node.shape
    if (
        found.cells is not None
        and dims == [2]
        and torch.equal(found.cells, torch.arange(found.cells.numel()).reshape(channels, -1))
    ):
        dims = [2, 3]  # x.view(n, c, -1).mean(2)
    elif found.cells is not None:
        if len(dims) != 1:
            raise UnsupportedOperatorError(f"{rec.here}: no rule for reducing a view {tuple(x.shape)} over dimensions {dims}")
        parts = [arrange(rec, node, part) for part in found.cells.unbind(dims[0] - 1)]
        if any(isinstance(part, Meaning) and part.layout == "view" for part in parts):
            raise UnsupportedOperatorError(f"{rec.here}: the parts of a sum over dimension {dim} are no maps")
        nodes = [part if isinstance(part, Node) else rec.graph[part.node] for part in parts]
        summed = rec.emit(Add(), nodes, nodes[0].shape)
        factor = torch.full((nodes[0].shape[0],), weight(len(nodes)), dtype=x.dtype, device=x.device)
        scaled = summed if weight(len(nodes)) == 1 else rec.emit(Affine(factor, None), (summed,), summed.shape)
        return arrange(rec, scaled, torch.arange(math.prod(scaled.shape)).reshape(out.shape[1:]))
    if dims == [1] and not node.vector:
        kernel = torch.full((1, channels, 1, 1), weight(channels), dtype=x.dtype, device=x.device)
        made = rec.emit(Conv2d(kernel, None, (1, 1), (0, 0, 0, 0), (1, 1), 1), (node,), (1, height, width))
    elif set(dims) <= {2, 3}:
        rows, columns = (
            torch.full((1, size), weight(size), dtype=torch.float64) if axis in dims else torch.eye(size, dtype=torch.float64)
            for axis, size in ((2, height), (3, width))
        )
        shape = (channels, len(rows), len(columns))
        made = rec.emit(Spatial(rows, columns, kind="avg_pool"), (node,), shape)
    else:
        raise UnsupportedOperatorError(f"{rec.here}: no rule for reducing {tuple(x.shape)} over dimensions {dims}")
    return arrange(rec, made, torch.arange(math.prod(made.shape)).reshape(out.shape[1:]))


def interpolate(
    rec: Recorder, out: Tensor, input: Tensor, size: Any = None, scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None, recompute_scale_factor: bool | None = None, antialias: bool = False,
) -> Result:  # fmt: skip
    function = partial(
        F.interpolate, size=size, scale_factor=scale_factor, mode=mode, align_corners=align_corners,
        recompute_scale_factor=recompute_scale_factor, antialias=antialias,
    )  # fmt: skip
    return _separable(rec, out, input, "upsample", function)


def pad(
    rec: Recorder,
    out: Tensor,
    input: Tensor,
    pad: Sequence[int],
    mode: str = "constant",
    value: float | None = None,
) -> Result:
    left, right, top, bottom, before, after, *samples = [*(int(p) for p in pad), *[0] * 8][:8]
    if any(samples) or ((before or after) and (mode != "constant" or value)):
        raise UnsupportedOperatorError(
            f"{rec.here}: only rows and columns may be padded, channels only by zeros (got {tuple(pad)})"
        )
    node = rec.map_of(input)
    if before or after:
        channels = torch.arange(-before, node.shape[0] + after)
        node = rec.select(node, channels.where((channels >= 0) & (channels < node.shape[0]), -1))
        if not any((left, right, top, bottom)):
            return node
    if mode == "constant":
        return emit_like(rec, out, Pad((top, left, bottom, right), float(value or 0.0), node.size), node)
    return _separable(rec, out, input, "pad", partial(F.pad, pad=(left, right, top, bottom), mode=mode))


def max_pool2d(
    rec: Recorder, out: Any, input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> Result:  # fmt: skip
    kernel = _pair(kernel_size)
    stride = kernel if stride is None or stride == [] else _pair(stride)
    first = out if isinstance(out, Tensor) else out[0]
    op = MaxPool2d(kernel, stride, _pair(padding), _pair(dilation), ceil_mode)
    node = emit_like(rec, first, op, rec.map_of(input))
    return node if isinstance(out, Tensor) else [node]


def adaptive_max_pool2d(rec: Recorder, out: Any, input: Tensor, output_size: Any, return_indices: bool = False) -> Result:
    first = out if isinstance(out, Tensor) else out[0]
    node = rec.map_of(input)
    window = []
    for had, gives in zip(node.size, first.shape[2:], strict=True):
        if had % gives:
            raise UnsupportedOperatorError(f"{rec.here}: {had} cells do not divide into {gives} equal windows")
        window.append(had // gives)
    kernel = (window[0], window[1])
    made = emit_like(rec, first, MaxPool2d(kernel, kernel, (0, 0), (1, 1), False), node)
    return made if isinstance(out, Tensor) else [made]


def amax(rec: Recorder, out: Tensor, input: Tensor, dim: Any = (), keepdim: bool = False) -> Result:
    """The maximum over rows and columns is a max pool; that across channels runs forward alone."""
    node, dims = rec.map_of(input), _dimensions(rec, input, dim)
    channels, height, width = node.shape
    if dims == [2, 3]:
        made = rec.emit(MaxPool2d(node.size, node.size, (0, 0), (1, 1), False), (node,), (channels, 1, 1))
    elif dims == [1] and not node.vector:
        made = rec.emit(Opaque("max", partial(torch.amax, dim=1, keepdim=True), "max"), (node,), (1, height, width))
    else:
        raise UnsupportedOperatorError(f"{rec.here}: only the maximum over rows and columns has a rule (got dim={dim})")
    return arrange(rec, made, torch.arange(math.prod(made.shape)).reshape(out.shape[1:]))


def lrn(
    rec: Recorder,
    out: Tensor,
    input: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
) -> Result:
    jacobian = rec.rule_for("lrn") in ("jacobian", "gradient")
    return emit_like(rec, out, LocalResponseNorm(size, alpha, beta, k, jacobian), rec.map_of(input))


RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("max_pool2d", "max_pool2d_with_indices", "_max_pool2d"), max_pool2d),
    **dict.fromkeys(
        ("adaptive_max_pool2d", "adaptive_max_pool2d_with_indices", "_adaptive_max_pool2d"),
        adaptive_max_pool2d,
    ),
    "conv2d": conv2d,
    "linear": linear,
    "batch_norm": batch_norm,
    "instance_norm": instance_norm,
    "group_norm": group_norm,
    "local_response_norm": lrn,
    "avg_pool2d": avg_pool2d,
    "adaptive_avg_pool2d": adaptive_avg_pool2d,
    "mean": mean,
    "sum": total,
    "amax": amax,
    "interpolate": interpolate,
    "upsample": interpolate,
    "pad": pad,
}
