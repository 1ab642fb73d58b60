"""Rules that turn one torch call into operators of the graph, keyed by the function's name in every spelling."""

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
    Activation,
    Add,
    Affine,
    Conv2d,
    Gate,
    GroupNorm,
    Linear,
    LocalResponseNorm,
    MaxPool2d,
    Opaque,
    Operator,
    Pad,
    Pair,
    Product,
    Rectify,
    SelectChannels,
    Spatial,
)  # fmt: skip
from conelens.tracing import layouts
from conelens.tracing.recorder import Meaning, Recorder

Result = Node | Meaning | list[Any] | None


def _pair(value: Any) -> Pair:
    if isinstance(value, int):
        return value, value
    values = [int(v) for v in value]
    return (values[0], values[0]) if len(values) == 1 else (values[0], values[1])


def _out(rec: Recorder, out: Tensor, op: Operator, *inputs: Node) -> Node:
    """A node whose shape is read off the tensor that torch computed."""
    if out.ndim == 2:
        return rec.emit(op, inputs, (out.shape[1], 1, 1), vector=True)
    if out.ndim != 4:
        raise UnsupportedOperatorError(
            f"{rec.here}: gives shape {tuple(out.shape)}, wanted [N, C, H, W] or [N, F]"
        )
    return rec.emit(op, inputs, (out.shape[1], out.shape[2], out.shape[3]))


def _pointwise(rec: Recorder, out: Tensor, op: Operator, *inputs: Node) -> Node | Meaning:
    """The same for operators that act cell by cell, whose inputs may be views with split channels (``Recorder.flat_of``)."""
    if out.ndim == 2:
        return _out(rec, out, op, *inputs)
    channels, height, width = (max(sizes) for sizes in zip(*(n.shape for n in inputs), strict=True))
    node = rec.emit(op, inputs, (channels, height, width))
    return layouts.arrange(rec, node, torch.arange(channels * height * width).reshape(out.shape[1:]))


# --- linear maps -----------------------------------------------------------------------------------------------------


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
    return _out(rec, out, op, rec.map_of(input))


def linear(rec: Recorder, out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Result:
    node = rec.map_of(input)
    if not node.vector and input.ndim != 2:
        raise UnsupportedOperatorError(
            f"{rec.here}: a linear layer needs a vector [N, F], got shape {tuple(input.shape)}"
        )
    _constant(rec, weight, "weight")
    return _out(rec, out, Linear(weight.detach(), None if bias is None else bias.detach()), node)


def batch_norm(
    rec: Recorder, out: Tensor, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Result:  # fmt: skip
    if training or running_mean is None or running_var is None:
        raise UnsupportedOperatorError(
            f"{rec.here}: batch statistics mix the samples; call model.eval() first"
        )
    factor = 1 / torch.sqrt(running_var.detach().double() + eps)
    if weight is not None:
        factor = factor * weight.detach().double()
    shift = -running_mean.detach().double() * factor
    if bias is not None:
        shift = shift + bias.detach().double()
    node = rec.map_of(input)
    return _out(rec, out, Affine(factor.to(input.dtype), shift.to(input.dtype), kind="batch_norm"), node)


def instance_norm(
    rec: Recorder, out: Tensor, input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None,
    weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
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
    return _out(rec, out, GroupNorm(num_groups, weight, bias, eps, node.size, rec.rule_for(kind), kind), node)


def _separable(
    rec: Recorder, out: Tensor, x: Tensor, kind: str, function: Callable[[Tensor], Tensor], **extra: Any
) -> Result:
    """Any separable linear map of space, read off two probes: unit rows and unit columns."""
    node = rec.map_of(x)
    height, width = node.size
    # Dividing by the response to a constant along the other axis leaves each axis its own, correctly normalised share.
    ones = function(torch.ones(1, 1, height, width, dtype=torch.float64))
    rows = function(torch.eye(height, dtype=torch.float64)[:, None, :, None].expand(height, 1, height, width))
    columns = function(
        torch.eye(width, dtype=torch.float64)[:, None, None, :].expand(width, 1, height, width)
    )
    at_y, at_x = (int(v) for v in torch.nonzero(ones[0, 0] == ones[0, 0].max())[0])
    peak = ones[0, 0, at_y, at_x]
    op = Spatial(
        (rows[:, 0, :, at_x] / peak).T.contiguous(), columns[:, 0, at_y, :].T.contiguous(), kind=kind, **extra
    )
    return _out(rec, out, op, node)


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
    return _separable(
        rec, out, input, "avg_pool", partial(F.adaptive_avg_pool2d, output_size=tuple(out.shape[2:]))
    )


def mean(
    rec: Recorder, out: Tensor, input: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any
) -> Result:
    return _reduced(rec, out, input, dim, lambda count: 1 / count)


def total(
    rec: Recorder, out: Tensor, input: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any
) -> Result:
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
            raise UnsupportedOperatorError(
                f"{rec.here}: no rule for reducing a view {tuple(x.shape)} over dimensions {dims}"
            )
        parts = [layouts.arrange(rec, node, part) for part in found.cells.unbind(dims[0] - 1)]
        if any(isinstance(part, Meaning) and part.layout == "view" for part in parts):
            raise UnsupportedOperatorError(f"{rec.here}: the parts of a sum over dimension {dim} are no maps")
        nodes = [part if isinstance(part, Node) else rec.graph[part.node] for part in parts]
        summed = rec.emit(Add(), nodes, nodes[0].shape)
        factor = torch.full((nodes[0].shape[0],), weight(len(nodes)), dtype=x.dtype, device=x.device)
        scaled = (
            summed if weight(len(nodes)) == 1 else rec.emit(Affine(factor, None), (summed,), summed.shape)
        )
        return layouts.arrange(rec, scaled, torch.arange(math.prod(scaled.shape)).reshape(out.shape[1:]))
    if dims == [1] and not node.vector:
        kernel = torch.full((1, channels, 1, 1), weight(channels), dtype=x.dtype, device=x.device)
        made = rec.emit(Conv2d(kernel, None, (1, 1), (0, 0, 0, 0), (1, 1), 1), (node,), (1, height, width))
    elif set(dims) <= {2, 3}:
        matrices = [
            torch.full((1, size), weight(size), dtype=torch.float64)
            if axis in dims
            else torch.eye(size, dtype=torch.float64)
            for axis, size in ((2, height), (3, width))
        ]
        shape = (channels, len(matrices[0]), len(matrices[1]))
        made = rec.emit(Spatial(*matrices, kind="avg_pool"), (node,), shape)
    else:
        raise UnsupportedOperatorError(
            f"{rec.here}: no rule for reducing {tuple(x.shape)} over dimensions {dims}"
        )
    return layouts.arrange(rec, made, torch.arange(math.prod(made.shape)).reshape(out.shape[1:]))


def interpolate(
    rec: Recorder, out: Tensor, input: Tensor, size: Any = None, scale_factor: Any = None, mode: str = "nearest",
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
        return _out(rec, out, Pad((top, left, bottom, right), float(value or 0.0), node.size), node)
    return _separable(rec, out, input, "pad", partial(F.pad, pad=(left, right, top, bottom), mode=mode))


# --- pooling ---------------------------------------------------------------------------------------------------------


def max_pool2d(
    rec: Recorder, out: Any, input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> Result:  # fmt: skip
    kernel = _pair(kernel_size)
    stride = kernel if stride is None or stride == [] else _pair(stride)
    first = out if isinstance(out, Tensor) else out[0]
    op = MaxPool2d(kernel, stride, _pair(padding), _pair(dilation), ceil_mode)
    node = _out(rec, first, op, rec.map_of(input))
    return node if isinstance(out, Tensor) else [node]


def adaptive_max_pool2d(
    rec: Recorder, out: Any, input: Tensor, output_size: Any, return_indices: bool = False
) -> Result:
    first = out if isinstance(out, Tensor) else out[0]
    node = rec.map_of(input)
    window = []
    for had, gives in zip(node.size, first.shape[2:], strict=True):
        if had % gives:
            raise UnsupportedOperatorError(
                f"{rec.here}: {had} cells do not divide into {gives} equal windows"
            )
        window.append(had // gives)
    kernel = (window[0], window[1])
    made = _out(rec, first, MaxPool2d(kernel, kernel, (0, 0), (1, 1), False), node)
    return made if isinstance(out, Tensor) else [made]


def amax(rec: Recorder, out: Tensor, input: Tensor, dim: Any = (), keepdim: bool = False) -> Result:
    """The maximum over rows and columns is a max pool; that across channels runs forward alone."""
    node, dims = rec.map_of(input), _dimensions(rec, input, dim)
    channels, height, width = node.shape
    if dims == [2, 3]:
        made = rec.emit(MaxPool2d(node.size, node.size, (0, 0), (1, 1), False), (node,), (channels, 1, 1))
    elif dims == [1] and not node.vector:
        made = rec.emit(
            Opaque("max", partial(torch.amax, dim=1, keepdim=True), "max"), (node,), (1, height, width)
        )
    else:
        raise UnsupportedOperatorError(
            f"{rec.here}: only the maximum over rows and columns has a rule (got dim={dim})"
        )
    return layouts.arrange(rec, made, torch.arange(math.prod(made.shape)).reshape(out.shape[1:]))


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
    return _out(rec, out, LocalResponseNorm(size, alpha, beta, k, jacobian), rec.map_of(input))


# --- non-linearities -------------------------------------------------------------------------------------------------


def relu(rec: Recorder, out: Tensor, input: Tensor, inplace: bool = False) -> Result:
    return _pointwise(rec, out, Rectify(), rec.flat_of(input))


def clamp(rec: Recorder, out: Tensor, input: Tensor, min: Any = None, max: Any = None) -> Result:
    if min == 0 and max is None:
        return relu(rec, out, input)
    if isinstance(min, Tensor) or isinstance(max, Tensor):
        raise UnsupportedOperatorError(f"{rec.here}: clamping to a tensor has no rule")
    name = "relu6" if (min, max) == (0, 6) else "clamp"
    return _activation(rec, out, input, name, partial(torch.clamp, min=min, max=max))


def threshold(
    rec: Recorder, out: Tensor, input: Tensor, threshold: float, value: float, inplace: bool = False
) -> Result:
    if threshold == 0 and value == 0:
        return relu(rec, out, input)
    return _activation(rec, out, input, "threshold", partial(F.threshold, threshold=threshold, value=value))


def hardtanh(
    rec: Recorder,
    out: Tensor,
    input: Tensor,
    min_val: float = -1.0,
    max_val: float = 1.0,
    inplace: bool = False,
) -> Result:
    name = "relu6" if (min_val, max_val) == (0, 6) else "hardtanh"
    return _activation(rec, out, input, name, partial(F.hardtanh, min_val=min_val, max_val=max_val))


def maximum(rec: Recorder, out: Any, input: Tensor, other: Any = None, *args: Any, **kwargs: Any) -> Result:
    """torch.maximum(x, 0) and its mirror image are ReLUs; x.max(dim) is a reduction."""
    dim = kwargs.pop("dim", other)
    if not isinstance(dim, Tensor):
        values = out if isinstance(out, Tensor) else out[0]
        return [amax(rec, values, input, () if dim is None else dim), None]
    x, constant = (input, dim) if rec.meaning(input) is not None else (dim, input)
    if (
        isinstance(constant, Tensor)
        and rec.meaning(constant) is None
        and not constant.any()
        and not args
        and not kwargs
    ):
        return relu(rec, out, x)
    raise UnsupportedOperatorError(f"{rec.here}: only the maximum with zero has a rule")


def greater(rec: Recorder, out: Tensor, input: Tensor, other: Any) -> Result:
    zero = not other.any() if isinstance(other, Tensor) and rec.meaning(other) is None else other == 0
    if zero is not True and not (isinstance(zero, Tensor) and bool(zero)):
        raise UnsupportedOperatorError(f"{rec.here}: only the comparison x > 0 has a rule")
    return Meaning(rec.map_of(input).index, "positive")


def where(rec: Recorder, out: Tensor, condition: Tensor, input: Any = None, other: Any = None) -> Result:
    """torch.where(x > 0, x, 0) is a ReLU."""
    if isinstance(input, Tensor) and input.dtype == torch.bool:  # x.where(x > 0, 0)
        condition, input = input, condition
    mask, x = rec.meaning(condition), rec.meaning(input)
    zero = other == 0 if not isinstance(other, Tensor) else rec.meaning(other) is None and not other.any()
    if mask is None or mask.layout != "positive" or x is None or x.node != mask.node or not zero:
        raise UnsupportedOperatorError(f"{rec.here}: only where(x > 0, x, 0) has a rule")
    return relu(rec, out, input)


def leaky_relu(
    rec: Recorder, out: Tensor, input: Tensor, negative_slope: float = 0.01, inplace: bool = False
) -> Result:
    if negative_slope == 0:
        return relu(rec, out, input)
    return _activation(rec, out, input, "leaky_relu", partial(F.leaky_relu, negative_slope=negative_slope))


def prelu(rec: Recorder, out: Tensor, input: Tensor, weight: Tensor) -> Result:
    return _activation(rec, out, input, "prelu", partial(F.prelu, weight=weight.detach()))


def elementwise(rec: Recorder, out: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Result:
    """Any other non-linearity that acts on one value at a time; it needs a stated policy to be projected through."""
    kwargs.pop("inplace", None)
    name = rec.here.split(" ", 1)[0]
    function = getattr(torch, name, None) or getattr(F, name)
    return _activation(rec, out, input, name, partial(function, **kwargs))


def softmax(
    rec: Recorder, out: Tensor, input: Tensor, dim: int | None = None, *args: Any, **kwargs: Any
) -> Result:
    name = rec.here.split(" ", 1)[0]
    node = rec.flat_of(input)
    split = tuple(out.shape[1:]) if node.size == (1, 1) else tuple(out.shape[1:-2])
    axis = (1 if dim is None else dim) % out.ndim
    if not 1 <= axis <= len(split):
        raise UnsupportedOperatorError(
            f"{rec.here}: only channels may compete (got dim={dim} of {tuple(out.shape)})"
        )
    return _pointwise(
        rec, out, Opaque(name, partial(_compete, getattr(torch, name), split, axis), name), node
    )


def _compete(function: Callable[..., Tensor], split: tuple[int, ...], axis: int, x: Tensor) -> Tensor:
    return function(x.reshape(x.shape[0], *split, *x.shape[2:]), dim=axis).reshape(x.shape)


def _activation(
    rec: Recorder, out: Tensor, x: Tensor, name: str, function: Callable[[Tensor], Tensor]
) -> Result:
    rule = rec.rule_for(name)
    return _pointwise(rec, out, Activation(name, function, rule, kind=name), rec.flat_of(x))


def constant(rec: Recorder, out: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Result:
    """zeros_like and its kin: only the shape of the input matters."""
    return None


def dropout(
    rec: Recorder,
    out: Tensor,
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    *args: Any,
    **kwargs: Any,
) -> Result:
    if kwargs.pop("train", training):
        raise UnsupportedOperatorError(f"{rec.here}: dropout is active; call model.eval() first")
    return rec.meaning(input)


# --- arithmetic ------------------------------------------------------------------------------------------------------


def add(rec: Recorder, out: Tensor, input: Any, other: Any, *, alpha: float = 1) -> Result:
    if rec.meaning(input) is None:
        input, other, factor = other, input, alpha
        return _affine(rec, out, input, factor=factor, shift=other)
    if rec.meaning(other) is None:
        return _affine(rec, out, input, shift=other if alpha == 1 else other * alpha)
    left, right = rec.flat_of(input), rec.flat_of(other)
    if left.shape != right.shape:
        shape = (
            max(left.shape[0], right.shape[0]),
            max(left.shape[1], right.shape[1]),
            max(left.shape[2], right.shape[2]),
        )
        left, right = layouts.broadcast(rec, left, shape), layouts.broadcast(rec, right, shape)
    if alpha != 1:
        factor = torch.full((right.shape[0],), float(alpha), dtype=out.dtype, device=out.device)
        right = rec.emit(Affine(factor, None), (right,), right.shape, right.vector)
    return _pointwise(rec, out, Add(), left, right)


def sub(rec: Recorder, out: Tensor, input: Any, other: Any, *, alpha: float = 1) -> Result:
    if rec.meaning(other) is None:
        return _affine(rec, out, input, shift=-other * alpha)
    if rec.meaning(input) is None:
        return _affine(rec, out, other, factor=-alpha, shift=input)
    return add(rec, out, input, other, alpha=-alpha)


def rsub(rec: Recorder, out: Tensor, input: Any, other: Any, *, alpha: float = 1) -> Result:
    return sub(rec, out, other, input, alpha=alpha)


def mul(rec: Recorder, out: Tensor, input: Any, other: Any) -> Result:
    left, right = rec.meaning(input), rec.meaning(other)
    if left is None or right is None:
        x, constant = (other, input) if left is None else (input, other)
        return _affine(rec, out, x, factor=constant)
    if left.node == right.node and {left.layout, right.layout} == {"map", "positive"}:  # x * (x > 0)
        return relu(rec, out, input if left.layout == "map" else other)
    first, second = rec.flat_of(input), rec.flat_of(other)
    for x, tensor, factor in ((first, input, second), (second, other, first)):
        made = _made_from(rec, factor, x)
        if made is not None:  # x * f(x) acts on one value at a time
            name = _SELF_GATED.get(tuple(op.kind for op in made), "self_gate")
            return _activation(rec, out, tensor, name, partial(_times, functions=made))
    return _gate(rec, out, first, second)


_SELF_GATED = {
    (): "square", ("sigmoid",): "silu", ("softplus", "tanh"): "mish", ("hardsigmoid",): "hardswish", ("affine", "relu6"): "hardswish",
    ("affine", "relu6", "affine"): "hardswish",
}  # fmt: skip


def _made_from(rec: Recorder, node: Node, x: Node) -> list[Operator] | None:
    """The element-wise operators that turn ``x`` into ``node``, or None where something else is between them."""
    made: list[Operator] = []
    while node.index != x.index:
        if not isinstance(node.op, Activation | Affine | Rectify):
            return None
        made.insert(0, node.op)
        node = rec.graph[node.inputs[0]]
    return made


def _times(x: Tensor, functions: Sequence[Operator]) -> Tensor:
    y = x
    for function in functions:
        y = function.forward([y], None)
    return x * y


def div(rec: Recorder, out: Tensor, input: Any, other: Any, *, rounding_mode: str | None = None) -> Result:
    if rec.meaning(other) is not None or rounding_mode is not None:
        raise UnsupportedOperatorError(f"{rec.here}: division by a computed map has no rule")
    return _affine(rec, out, input, factor=1 / other)


_BOUNDED = ("sigmoid", "hardsigmoid", "softmax", "tanh", "relu6", "hardtanh")


def _bounded(rec: Recorder, node: Node) -> bool:
    """Does a bounded non-linearity give these values, scaled or moved at most?"""
    while isinstance(node.op, Affine | Spatial | SelectChannels):
        node = rec.graph[node.inputs[0]]
    return getattr(node.op, "name", "") in _BOUNDED


def _gate(rec: Recorder, out: Tensor, left: Node, right: Node) -> Result:
    """Which factor is the gate: the smaller map, else the one that a bounded non-linearity produced."""
    cells = [n.shape[0] * n.size[0] * n.size[1] for n in (left, right)]
    bounded = [_bounded(rec, n) for n in (left, right)]
    clear = cells[0] != cells[1] or bounded[0] != bounded[1]
    if cells[0] < cells[1] or (cells[0] == cells[1] and bounded == [True, False]):
        left, right = right, left
    if any(small not in (1, large) for small, large in zip(right.shape, left.shape, strict=True)):
        raise UnsupportedOperatorError(
            f"{rec.here}: gate of shape {right.shape} does not fit the map {left.shape}"
        )
    spatial = (right.size[0] == left.size[0], right.size[1] == left.size[1])
    return _pointwise(
        rec, out, Gate(spatial, rec.rule_for("gate")) if clear else Product(spatial, None), left, right
    )


def _affine(rec: Recorder, out: Tensor, x: Tensor, factor: Any = None, shift: Any = None) -> Result:
    node = rec.flat_of(x)
    return _pointwise(rec, out, _constant_affine(rec, x, node.shape[0], factor, shift), node)


def _constant_affine(rec: Recorder, x: Tensor, channels: int, factor: Any, shift: Any) -> Affine:
    """Constants as per-channel vectors; anything that varies over space or samples has no rule."""

    def vector(constant: Any) -> Tensor | None:
        if constant is None:
            return None
        t = torch.as_tensor(constant, dtype=x.dtype, device=x.device).detach()
        for axis in range(t.ndim):
            if axis != 1 - (x.ndim - t.ndim) and bool((t == t.narrow(axis, 0, 1)).all()):
                t = t.narrow(axis, 0, 1)  # the same for all samples, rows or columns
        if t.numel() and bool((t == t.reshape(-1)[0]).all()):
            t = t.reshape(-1)[0]
        shape = (1,) * (x.ndim - t.ndim) + tuple(t.shape)
        if (
            t.ndim > x.ndim
            or any(s != 1 for i, s in enumerate(shape) if i != 1)
            or shape[1] not in (1, channels)
        ):
            raise UnsupportedOperatorError(
                f"{rec.here}: a constant of shape {tuple(t.shape)} is no per-channel constant"
            )
        return t.reshape(-1).expand(channels).contiguous()

    return Affine(vector(factor), vector(shift))


def _constant(rec: Recorder, tensor: Tensor, what: str) -> None:
    if rec.meaning(tensor) is not None:
        raise UnsupportedOperatorError(
            f"{rec.here}: {what} depends on the input (dynamic filters have no rule)"
        )


RULES: dict[str, Callable[..., Any]] = {
    **layouts.RULES,
    **dict.fromkeys(("relu",), relu),
    **dict.fromkeys(("clamp", "clip", "clamp_min"), clamp),
    **dict.fromkeys(("max_pool2d", "max_pool2d_with_indices", "_max_pool2d"), max_pool2d),
    **dict.fromkeys(("adaptive_max_pool2d", "adaptive_max_pool2d_with_indices", "_adaptive_max_pool2d"), adaptive_max_pool2d),
    **dict.fromkeys(("dropout", "dropout2d", "feature_dropout", "alpha_dropout", "dropout1d", "dropout3d"), dropout),
    **dict.fromkeys(
        ("sigmoid", "hardsigmoid", "tanh", "silu", "hardswish", "gelu", "elu", "selu", "celu", "mish", "softplus", "softsign",
         "logsigmoid", "relu6", "exp", "abs", "sqrt", "square", "tanhshrink", "hardshrink", "softshrink"),
        elementwise,
    ),
    **dict.fromkeys(("softmax", "log_softmax"), softmax),
    **dict.fromkeys(("maximum", "max"), maximum),
    **dict.fromkeys(("gt", "ge"), greater),
    **dict.fromkeys(
        ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"),
        constant,
    ),
    "instance_norm": instance_norm, "group_norm": group_norm, "conv2d": conv2d, "linear": linear, "batch_norm": batch_norm, "avg_pool2d": avg_pool2d, "adaptive_avg_pool2d": adaptive_avg_pool2d,
    "mean": mean, "sum": total, "interpolate": interpolate, "upsample": interpolate, "pad": pad, "amax": amax, "local_response_norm": lrn,
    "threshold": threshold, "hardtanh": hardtanh, "where": where, "leaky_relu": leaky_relu, "prelu": prelu,
    "add": add, "sub": sub, "rsub": rsub, "mul": mul, "div": div,
}  # fmt: skip
