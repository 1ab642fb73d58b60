"""Rules for sums, products and constants; a product may be a gate, or an activation that multiplies its own
input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from conelens.errors import UnsupportedOperatorError
from conelens.graph import Node
from conelens.operators import (
    Activation,
    Add,
    Affine,
    Gate,
    Operator,
    Product,
    Rectify,
    SelectChannels,
    Spatial,
)
from conelens.tracing.layouts import Result, broadcast, emit_pointwise
from conelens.tracing.nonlinear import activation, relu
from conelens.tracing.recorder import Recorder


def add(rec: Recorder, out: Tensor, input: Any, other: Any, *, alpha: float = 1) -> Result:
    if rec.meaning(input) is None:
        return _affine(rec, out, other, factor=alpha, shift=input)
    if rec.meaning(other) is None:
        return _affine(rec, out, input, shift=other if alpha == 1 else other * alpha)
    left, right = rec.flat_of(input), rec.flat_of(other)
    if left.shape != right.shape:
        shape = (
            max(left.shape[0], right.shape[0]),
            max(left.shape[1], right.shape[1]),
            max(left.shape[2], right.shape[2]),
        )
        left, right = broadcast(rec, left, shape), broadcast(rec, right, shape)
    if alpha != 1:
        factor = torch.full((right.shape[0],), float(alpha), dtype=out.dtype, device=out.device)
        right = rec.emit(Affine(factor, None), (right,), right.shape, right.vector)
    return emit_pointwise(rec, out, Add(), left, right)


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
            return activation(rec, out, tensor, name, partial(_times, functions=made))
    return _gate(rec, out, first, second)


_SELF_GATED = {
    (): "square", ("sigmoid",): "silu", ("softplus", "tanh"): "mish", ("hardsigmoid",): "hardswish",
    ("affine", "relu6"): "hardswish",
    ("affine", "relu6", "affine"): "hardswish",
}  # fmt: skip


def _made_from(rec: Recorder, node: Node, x: Node) -> list[Operator] | None:
    """The element-wise operators that turn ``x`` into ``node``, or None where others are between them."""
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
        raise UnsupportedOperatorError(f"{rec.here}: gate of shape {right.shape} does not fit the map {left.shape}")
    spatial = (right.size[0] == left.size[0], right.size[1] == left.size[1])
    return emit_pointwise(rec, out, Gate(spatial, rec.rule_for("gate")) if clear else Product(spatial, None), left, right)


def _affine(rec: Recorder, out: Tensor, x: Tensor, factor: Any = None, shift: Any = None) -> Result:
    node = rec.flat_of(x)
    return emit_pointwise(rec, out, _constant_affine(rec, x, node.shape[0], factor, shift), node)


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
        if t.ndim > x.ndim or any(s != 1 for i, s in enumerate(shape) if i != 1) or shape[1] not in (1, channels):
            raise UnsupportedOperatorError(f"{rec.here}: a constant of shape {tuple(t.shape)} is no per-channel constant")
        return t.reshape(-1).expand(channels).contiguous()

    return Affine(vector(factor), vector(shift))


RULES: dict[str, Callable[..., Any]] = {"add": add, "sub": sub, "rsub": rsub, "mul": mul, "div": div}
