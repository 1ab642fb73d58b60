"""The deconvnet by autograd: an independent oracle that shares no code with the engine.

Running a model under :class:`DeconvnetMode` gives every ReLU the backward rule ``clamp(gradient, 0)`` and
response normalisation the identity; autograd does the rest: pools accumulate at torch's own indices, branches
sum at the fan-out. A ``policy`` as for ``conelens.trace`` says what the operators without a canonical rule
do; without one they pass plain gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary


class Rectified(torch.autograd.Function):
    """Any element-wise function whose backward is ``clamp(gradient, 0)``, in place or not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], inplace: bool) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
            return x.copy_(function(x.clone()))
        return function(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.clamp(min=0), None, None


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Tensor:
        return F.local_response_norm(x, *args)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        return gradient, None, None, None, None


SQUASHING = ("sigmoid", "hardsigmoid", "tanh", "softmax", "relu6")
ELEMENTWISE = (
    *SQUASHING,
    "silu",
    "hardswish",
    "gelu",
    "elu",
    "selu",
    "celu",
    "mish",
    "softplus",
    "leaky_relu",
    "prelu",
    "hardtanh",
)
SELF_GATED = {
    ("sigmoid",): "silu",
    ("add", "relu6"): "hardswish",
    ("add", "relu6", "div"): "hardswish",
    ("softplus", "tanh"): "mish",
}


class DeconvnetMode(TorchFunctionMode):
    """Replaces ReLU in the spellings that the tests use, other non-linearities and gates by ``policy``."""

    def __init__(self, policy: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.policy = policy or {}
        self.squashed: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensors that a bounded function produced
        self.history: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor -> (where it came from, by which functions)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        inplace = _in_place(func, args, kwargs)
        if name == "relu":
            return Rectified.apply(args[0], torch.relu, inplace)
        if (
            name in ("clamp", "clamp_min")
            and (kwargs.get("min", args[1] if len(args) > 1 else None)) == 0
            and "max" not in kwargs
        ):
            return Rectified.apply(args[0], torch.relu, inplace)
        if name == "local_response_norm" and self.policy.get("lrn") != "jacobian":
            order = ("size", "alpha", "beta", "k")
            bound = dict(zip(order, args[1:], strict=False)) | {k: v for k, v in kwargs.items() if k in order}
            defaults = {"alpha": 1e-4, "beta": 0.75, "k": 1.0}
            return _Normalise.apply(args[0], *({**defaults, **bound}[n] for n in order))
        if name in ("instance_norm", "group_norm") and self.policy.get(name) == "hold":
            return _hold_statistics(func, *args, **kwargs)
        if name in ("mul", "imul", "rmul") and all(isinstance(a, Tensor) and a.requires_grad for a in args[:2]):
            return self._product(args[0], args[1])
        return self._remember(name, func, args, kwargs, inplace)

    def _remember(self, name: str, func: Any, args: Any, kwargs: Any, inplace: bool) -> Any:
        """Run an element-wise function by its policy, and note what its result is made of."""
        x = args[0] if args else kwargs.get("input")
        if (name == "hardtanh" and (kwargs.get("min_val"), kwargs.get("max_val")) == (0.0, 6.0)) or (
            name == "hardtanh" and args[1:3] == (0.0, 6.0)
        ):
            name = "relu6"
        source = self.history.get(x, (x, ())) if isinstance(x, Tensor) else (None, ())
        if isinstance(x, Tensor) and name in ELEMENTWISE and name != "softmax" and self.policy.get(name) == "clamp":
            rest = {k: v for k, v in kwargs.items() if k not in ("input", "inplace")}
            pure = getattr(torch, name, None) or getattr(F, name)
            extra = args[1:3] if name == "hardtanh" else args[1:2] if name in ("prelu", "leaky_relu", "elu") else ()
            if name == "relu6":
                pure, rest = F.relu6, {}
            result = Rectified.apply(x, lambda t: pure(t, *extra, **rest), inplace)
        else:
            result = func(*args, **kwargs)
        if isinstance(result, Tensor) and isinstance(x, Tensor) and x.requires_grad:
            constant = name in ("add", "div", "iadd", "truediv", "itruediv", "mul") and not any(
                isinstance(a, Tensor) for a in args[1:]
            )
            if name in SQUASHING or (constant and x in self.squashed):
                self.squashed[result] = True
            if constant or name in ELEMENTWISE:
                plain = {"iadd": "add", "truediv": "div", "itruediv": "div"}.get(name, name)
                self.history[result] = (source[0], (*source[1], plain))
        return result

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        """A function that multiplies its own input, or a map times a gate: the smaller one, else the squashed
        one.
        """
        root, functions = self.history.get(right, (None, ()))
        if root is left and functions in SELF_GATED:
            rule = self.policy.get(SELF_GATED[functions])
            return Rectified.apply(left, lambda t: t * _again(functions)(t), False) if rule == "clamp" else left * right
        if left.numel() < right.numel() or (left.numel() == right.numel() and left in self.squashed):
            left, right = right, left
        return left * right.detach() if self.policy.get("gate") == "hold" else left * right


def _hold_statistics(norm: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """x * a + b, where a and b are read off the norm at x and held constant: the norm is affine per channel
    and sample.
    """
    with torch.no_grad():
        y = norm(x, *args, **kwargs)
        middle_x, middle_y = x.mean((2, 3), keepdim=True), y.mean((2, 3), keepdim=True)
        scale = ((y - middle_y) * (x - middle_x)).sum((2, 3), keepdim=True) / (x - middle_x).square().sum((2, 3), keepdim=True)
        shift = middle_y - scale * middle_x
    return x * scale + shift


def _again(functions: tuple[str, ...]) -> Callable[[Tensor], Tensor]:
    constants: dict[str, Callable[[Tensor], Tensor]] = {"add": lambda t: t + 3, "div": lambda t: t / 6}

    def run(x: Tensor) -> Tensor:
        for name in functions:
            x = (constants.get(name) or getattr(F, name))(x)
        return x

    return run


def _in_place(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return True
    if "inplace" in kwargs:
        return bool(kwargs["inplace"])
    return len(args) > 1 and args[-1] is True


def deconvnet_by_autograd(
    model: nn.Module,
    images: Tensor,
    module: str,
    units: Sequence[tuple[int, int, int, int]],
    policy: Mapping[str, str] | None = None,
) -> tuple[Tensor, Tensor]:
    """(projections [U, C, H, W], activity [U]) of units (image, channel, y, x) of the output of ``module``
    ('' = the model).
    """
    captured: list[Tensor] = []
    handle = model.get_submodule(module).register_forward_hook(lambda m, i, o: captured.append(o.clone()))
    try:
        leaf = images.detach().clone().requires_grad_()
        with DeconvnetMode(policy):
            model(leaf.clone())
    finally:
        handle.remove()
    target = captured[0] if captured[0].ndim == 4 else captured[0][:, :, None, None]
    rows, values = [], []
    for image, channel, y, x in units:
        unit = target[image, channel, y, x]
        seed = unit.detach().clamp(min=0)
        (gradient,) = torch.autograd.grad(unit, leaf, seed, retain_graph=True)
        rows.append(gradient[image])
        values.append(seed)
    return torch.stack(rows), torch.stack(values)


def relative(got: Tensor, wanted: Tensor) -> float:
    """Relative 2-norm of the difference; both zero counts as equal."""
    norm = float(wanted.double().norm())
    difference = float((got.double() - wanted.double()).norm())
    return difference / norm if norm else difference
