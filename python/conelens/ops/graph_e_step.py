"""graph_e_step: one channel's Gaussians over the cells of its map, and what of the activity each of them explains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from conelens._native import Native
from conelens.errors import ArgumentError
from conelens.kernels.graph_e_step import reference
from conelens.ops import _arguments as arguments
from conelens.ops._dispatch import Implementations
from conelens.ops._register import Operator


class EStep(NamedTuple):
    """Sums over the cells of a map, per image and node; distances in the units of the grid.

    mass [I,D,K]: activity that the node owns; first [I,D,K,2]: that times (y, x) from the node's centre; second [I,D,K]: that
    times the squared distance; log_likelihood [I,D]: activity times the log of the sum of all densities. With ``argmax``
    position [I,D,K] int32: the cell y * W + x of the largest density times activity, -1 where that is 0; score [I,D,K].
    """

    mass: Tensor
    first: Tensor
    second: Tensor
    log_likelihood: Tensor
    position: Tensor | None = None
    score: Tensor | None = None


@arguments.takes_arrays
def graph_e_step(
    features: Tensor,
    mean: Tensor,
    shift: Tensor | None,
    sigma: Tensor,
    weight: Tensor,
    tau: Tensor | float,
    *,
    grid: Sequence[float],
    argmax: bool = False,
    out: Sequence[Tensor] | None = None,
) -> EStep:
    """Expectation step of an explanatory graph (Zhang et al., "Interpreting CNN Knowledge via an Explanatory Graph", 2018).

    Each channel of an image is a mixture: node k has density ``weight[i,d,k] * exp(-|p - c|^2 / (2 * sigma[d,k]^2))`` at p,
    around ``c = mean[d,k] + shift[i,d,k]``, and noise has density ``tau[i]`` everywhere. Cell (a, b) of features [I,D,H,W] is
    at ``p = (y0 + dy * a, x0 + dx * b)``, grid = (y0, x0, dy, dx). Its activity, max(feature, 0), is divided among densities.

    mean [D,K,2] and shift [I,D,K,2] are (y, x); without a shift (None) all images share the exponentials. sigma [D,K] > 0,
    weight [I,D,K] (may be expanded), tau [I] or a number, >= 0. These and the results are float32, or float64 for float64
    features; features may also be halves. Where all densities and tau are 0 under an active cell, that cell has no owner and
    the log-likelihood is -inf. A NaN feature makes its channel's results NaN. Of equal cells the first wins the arg-max.

    ``out`` = (mass, first, second, log_likelihood), with ``argmax`` also position and score, is written. Not differentiable.
    Raises ArgumentError for a wrong shape, dtype or device and, on the CPU, for values of sigma or tau out of range.
    """
    arguments.check_map(features, "features")
    if features.shape[2] * features.shape[3] >= 2**31:
        raise ArgumentError(f"features have {features.shape[2]}x{features.shape[3]} cells, too many for int32 positions")
    tau = _check_nodes(features, mean, shift, sigma, weight, tau)
    args = (features, mean, shift, sigma, weight, tau, _check_grid(grid), bool(argmax))
    if out is None:
        results = _OPERATOR(*args)
        return EStep(*results) if argmax else EStep(*results[:4])
    names = EStep._fields if argmax else EStep._fields[:4]
    if not isinstance(out, tuple | list) or len(out) != len(names):
        raise ArgumentError(f"out must be ({', '.join(names)}), got {_kind(out)}")
    fresh = reference.empty_results(features, sigma.shape[1], argmax)
    wanted = [(f"out[{i}]", x, like.shape, like.dtype) for i, (x, like) in enumerate(zip(out, fresh))]
    _OPERATOR.into((*arguments.check_outs(wanted, features, "features"), *fresh[len(names) :]), *args)
    return EStep(*out)


def _kind(x: Any) -> str:
    return f"{type(x).__name__} of {len(x)}" if isinstance(x, tuple | list) else type(x).__name__


def _check_nodes(features: Tensor, mean: Any, shift: Any, sigma: Any, weight: Any, tau: Any) -> Tensor:
    """All of one number of nodes; -> tau as a tensor."""
    images, channels = features.shape[:2]
    if not isinstance(sigma, Tensor) or sigma.dim() != 2:
        raise ArgumentError(f"sigma must be a tensor [D,K], got {getattr(sigma, 'shape', sigma)!r}")
    nodes = sigma.shape[1]
    if isinstance(tau, int | float):
        tau = features.new_full((images,), tau, dtype=reference.real_dtype(features))
    tensors = {
        "sigma": (sigma, (channels, nodes)),
        "mean": (mean, (channels, nodes, 2)),
        "weight": (weight, (images, channels, nodes)),
        "tau": (tau, (images,)),
    }
    if shift is not None:
        tensors["shift"] = (shift, (images, channels, nodes, 2))
    for name, (x, shape) in tensors.items():
        arguments.check_like(x, name, features, "features", shape=shape, dtype=reference.real_dtype(features))
    return tau


_REFERENCE_CELLS = 1 << 26  # densities at a time: a quarter of a GiB


def _check_grid(grid: Any) -> list[float]:
    values = list(grid) if isinstance(grid, Sequence) else []
    if len(values) != 4 or not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
        raise ArgumentError(f"grid must be four finite numbers (y0, x0, dy, dx), got {grid!r}")
    return [float(v) for v in values]


def _refuse_values(sigma: Tensor, tau: Tensor) -> None:
    """A CUDA device is not waited for."""
    if sigma.device.type != "cpu":
        return
    if not bool((sigma > 0).all()):
        raise ArgumentError(f"sigma must be positive, got {float(sigma[~(sigma > 0)][0])}")
    if not bool((tau >= 0).all()):
        raise ArgumentError(f"tau must be at least 0, got {float(tau[~(tau >= 0)][0])}")


def _fake(
    features: Tensor,
    mean: Tensor,
    shift: Tensor | None,
    sigma: Tensor,
    weight: Tensor,
    tau: Tensor,
    grid: Sequence[float],
    argmax: bool,
) -> reference.Results:
    return reference.empty_results(features, sigma.shape[1], argmax)


def _reference(features: Tensor, mean: Tensor, shift: Tensor | None, sigma: Tensor, *rest: Any) -> reference.Results:
    """The specification, so few images at a time that large problems still fit."""
    weight, tau, grid, argmax = rest
    _refuse_values(sigma, tau)
    each = sigma.numel() * features.shape[2] * features.shape[3]
    block = max(1, _REFERENCE_CELLS // max(1, each))
    if len(features) <= block:
        return reference.graph_e_step(features, mean, shift, sigma, weight, tau, grid, argmax)
    parts = []
    for start in range(0, len(features), block):
        here = slice(start, start + block)
        moved = None if shift is None else shift[here]
        parts.append(reference.graph_e_step(features[here], mean, moved, sigma, weight[here], tau[here], grid, argmax))
    mass, first, second, likelihood, position, score = (torch.cat(column) for column in zip(*parts, strict=True))
    return mass, first, second, likelihood, position, score


def _compiled(
    native: Native,
    features: Tensor,
    mean: Tensor,
    shift: Tensor | None,
    sigma: Tensor,
    weight: Tensor,
    tau: Tensor,
    grid: Sequence[float],
    argmax: bool,
    out: reference.Results | None = None,
) -> reference.Results:
    _refuse_values(sigma, tau)
    features = features.resolve_neg()
    features = features if features.stride(3) == 1 else arguments.packed(features)
    mean, sigma, tau = mean.contiguous(), sigma.contiguous(), tau.contiguous()
    shift = None if shift is None else shift.contiguous()
    if out is None or not all(x.is_contiguous() for x in out):
        out = reference.empty_results(features, sigma.shape[1], argmax)
    chosen = out[4:] if argmax else (None, None)
    module, context = native.module, native.context(features.device)
    module.graph_e_step(  # type: ignore[union-attr]
        features, mean, shift, sigma, weight.resolve_neg(), tau, grid[:2], grid[2:], *out[:4], *chosen, context
    )
    return out


_OPERATOR = Operator(
    "Tensor features, Tensor mean, Tensor? shift, Tensor sigma, Tensor weight, Tensor tau, float[] grid, bool argmax",
    ("mass", "first", "second", "log_likelihood", "position", "score"),
    Implementations("graph_e_step", compiled=_compiled, reference=_reference),
    _fake,
)
_OPERATOR.refuse_gradients()
