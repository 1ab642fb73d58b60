"""Rules for non-linearities, ReLU in all its spellings first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from conelens.errors import UnsupportedOperatorError
from conelens.operators import Activation, Opaque, Rectify
from conelens.tracing.layouts import Result, emit_pointwise
from conelens.tracing.maps import amax
from conelens.tracing.recorder import Meaning, Recorder


def relu(rec: Recorder, out: Tensor, input: Tensor, inplace: bool = False) -> Result:
    return emit_pointwise(rec, out, Rectify(), rec.flat_of(input))


def clamp(rec: Recorder, out: Tensor, input: Tensor, min: Any = None, max: Any = None) -> Result:
    if min == 0 and max is None:
        return relu(rec, out, input)
    if isinstance(min, Tensor) or isinstance(max, Tensor):
        raise UnsupportedOperatorError(f"{rec.here}: clamping to a tensor has no rule")
    name = "relu6" if (min, max) == (0, 6) else "clamp"
    return activation(rec, out, input, name, partial(torch.clamp, min=min, max=max))


def threshold(rec: Recorder, out: Tensor, input: Tensor, threshold: float, value: float, inplace: bool = False) -> Result:
    if threshold == 0 and value == 0:
        return relu(rec, out, input)
    return activation(rec, out, input, "threshold", partial(F.threshold, threshold=threshold, value=value))


def hardtanh(
    rec: Recorder,
    out: Tensor,
    input: Tensor,
    min_val: float = -1.0,
    max_val: float = 1.0,
    inplace: bool = False,
) -> Result:
    name = "relu6" if (min_val, max_val) == (0, 6) else "hardtanh"
    return activation(rec, out, input, name, partial(F.hardtanh, min_val=min_val, max_val=max_val))


def maximum(rec: Recorder, out: Any, input: Tensor, other: Any = None, *args: Any, **kwargs: Any) -> Result:
    """torch.maximum(x, 0) and its mirror image are ReLUs; x.max(dim) is a reduction."""
    dim = kwargs.pop("dim", other)
    if not isinstance(dim, Tensor):
        values = out if isinstance(out, Tensor) else out[0]
        return [amax(rec, values, input, () if dim is None else dim), None]
    x, constant = (input, dim) if rec.meaning(input) is not None else (dim, input)
    if isinstance(constant, Tensor) and rec.meaning(constant) is None and not constant.any() and not args and not kwargs:
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


def leaky_relu(rec: Recorder, out: Tensor, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Result:
    if negative_slope == 0:
        return relu(rec, out, input)
    return activation(rec, out, input, "leaky_relu", partial(F.leaky_relu, negative_slope=negative_slope))


def prelu(rec: Recorder, out: Tensor, input: Tensor, weight: Tensor) -> Result:
    return activation(rec, out, input, "prelu", partial(F.prelu, weight=weight.detach()))


def elementwise(rec: Recorder, out: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Result:
    """Any other non-linearity that acts on one value at a time; it needs a stated policy to be projected
    through.
    """
    kwargs.pop("inplace", None)
    name = rec.here.split(" ", 1)[0]
    function = getattr(torch, name, None) or getattr(F, name)
    return activation(rec, out, input, name, partial(function, **kwargs))


def softmax(rec: Recorder, out: Tensor, input: Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> Result:
    name = rec.here.split(" ", 1)[0]
    node = rec.flat_of(input)
    split = tuple(out.shape[1:]) if node.size == (1, 1) else tuple(out.shape[1:-2])
    axis = (1 if dim is None else dim) % out.ndim
    if not 1 <= axis <= len(split):
        raise UnsupportedOperatorError(f"{rec.here}: only channels may compete (got dim={dim} of {tuple(out.shape)})")
    return emit_pointwise(rec, out, Opaque(name, partial(_compete, getattr(torch, name), split, axis), name), node)


def _compete(function: Callable[..., Tensor], split: tuple[int, ...], axis: int, x: Tensor) -> Tensor:
    return function(x.reshape(x.shape[0], *split, *x.shape[2:]), dim=axis).reshape(x.shape)


def activation(rec: Recorder, out: Tensor, x: Tensor, name: str, function: Callable[[Tensor], Tensor]) -> Result:
    rule = rec.rule_for(name)
    return emit_pointwise(rec, out, Activation(name, function, rule, kind=name), rec.flat_of(x))


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


RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("clamp", "clip", "clamp_min"), clamp),
    **dict.fromkeys(("maximum", "max"), maximum),
    **dict.fromkeys(("gt", "ge"), greater),
    **dict.fromkeys(("softmax", "log_softmax"), softmax),
    **dict.fromkeys(("dropout", "dropout2d", "feature_dropout", "alpha_dropout", "dropout1d", "dropout3d"), dropout),
    **dict.fromkeys(
        (
            "sigmoid",
            "hardsigmoid",
            "tanh",
            "silu",
            "hardswish",
            "gelu",
            "elu",
            "selu",
            "celu",
            "mish",
            "softplus",
            "softsign",
            "logsigmoid",
            "relu6",
            "exp",
            "abs",
            "sqrt",
            "square",
            "tanhshrink",
            "hardshrink",
            "softshrink",
        ),
        elementwise,
    ),
    **dict.fromkeys(
        (
            "zeros_like",
            "ones_like",
            "empty_like",
            "full_like",
            "rand_like",
            "randn_like",
            "new_zeros",
            "new_ones",
            "new_full",
            "new_empty",
            "new_tensor",
        ),
        constant,
    ),
    "relu": relu,
    "threshold": threshold,
    "hardtanh": hardtanh,
    "where": where,
    "leaky_relu": leaky_relu,
    "prelu": prelu,
}
