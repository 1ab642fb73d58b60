"""The deconvnet by autograd: an independent oracle that shares no code with the engine.

Running a model under :class:`DeconvnetMode` gives every ReLU the backward rule ``clamp(gradient, 0)`` and response normalisation
the identity; autograd does the rest: pools accumulate at torch's own indices, branches sum at the fan-out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class _Rectify(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
            return x.clamp_(min=0)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.clamp(min=0), None


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Tensor:
        return F.local_response_norm(x, *args)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        return gradient, None, None, None, None


class DeconvnetMode(TorchFunctionMode):
    """Replaces ReLU in the spellings that the tests use."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("relu", "relu_"):
            inplace = name == "relu_" or bool(kwargs.get("inplace")) or (len(args) > 1 and bool(args[1]))
            return _Rectify.apply(args[0], inplace)
        if name in ("clamp", "clamp_min") and (kwargs.get("min", args[1] if len(args) > 1 else None)) == 0 and "max" not in kwargs:
            return _Rectify.apply(args[0], False)
        if name == "local_response_norm":
            order = ("size", "alpha", "beta", "k")
            bound = dict(zip(order, args[1:], strict=False)) | {k: v for k, v in kwargs.items() if k in order}
            defaults = {"alpha": 1e-4, "beta": 0.75, "k": 1.0}
            return _Normalise.apply(args[0], *({**defaults, **bound}[n] for n in order))
        return func(*args, **kwargs)


def deconvnet_by_autograd(
    model: nn.Module, images: Tensor, module: str, units: list[tuple[int, int, int, int]]
) -> tuple[Tensor, Tensor]:
    """(projections [U, C, H, W], activity [U]) of units (image, channel, y, x) of the output of ``module`` ('' = the model)."""
    captured: list[Tensor] = []
    handle = model.get_submodule(module).register_forward_hook(lambda m, i, o: captured.append(o.clone()))
    try:
        leaf = images.detach().clone().requires_grad_()
        with DeconvnetMode():
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
