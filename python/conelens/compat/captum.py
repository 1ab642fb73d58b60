"""``captum.attr.Occlusion`` with conelens underneath: change the import, keep the call. Captum itself is not needed.

Source: Captum 0.9, ``captum/attr/_core/occlusion.py`` and ``feature_ablation.py`` (BSD 3-clause), read for what they compute.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from conelens.compat._plain import Grid, as_tensor, attribute, select
from conelens.compat._progress import bar
from conelens.compat._traced import Traced
from conelens.errors import ArgumentError, ConelensError
from conelens.network import Network
from conelens.occlusion import Sweep, occlude


class Occlusion:
    """Occlusion attribution with Captum's signature, shapes and numbers.

    With a ``torch.nn.Module`` in evaluation mode and windows that span all channels, :func:`conelens.occlude` computes only
    what a window can change. Everything else (functions, modules that train or cannot be traced, several inputs, further
    arguments, inputs that are no images, windows over some channels) runs batch by batch as in Captum; a warning says why.

    Args:
        forward_func: the model, or any function of the inputs. A module is traced once, and again after its weights changed.
    """

    def __init__(self, forward_func: Callable[..., Any]) -> None:
        if not callable(forward_func):
            raise ArgumentError(f"forward_func: got {type(forward_func).__name__}, wanted a module or a function")
        self.forward_func = forward_func
        self._traced = Traced(forward_func) if isinstance(forward_func, nn.Module) else None

    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        sliding_window_shapes: tuple[int, ...] | tuple[tuple[int, ...], ...],
        strides: int | tuple[Any, ...] | None = None,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """How much the target falls where a window covers each input value, averaged over the windows that do.

        Args:
            inputs: a tensor whose first dimension is the batch, images [N, C, H, W] as a rule, or a tuple of such tensors.
            sliding_window_shapes: the window without the batch dimension, (C, h, w); one for each of several inputs.
            strides: a number, or one per dimension of the window, (C, sy, sx); default 1. At the border the last window is cut.
            baselines: what a window shows: a number (default 0) or a tensor that broadcasts to the inputs; one per input.
            target: a class; a list or tensor [N] of one per image; a tuple that indexes outputs of more dimensions; a list of
                tuples; None for every output.
            additional_forward_args: further arguments of ``forward_func``; tensors have the batch first.
            perturbations_per_eval: windows in one batch. It matters only where a warning says that everything runs anew;
                elsewhere memory is bounded without it.
            show_progress: a bar on the error stream, when it is a terminal (extra 'cli').

        Returns:
            float32, as Captum's, on the inputs' device: the shape of the inputs where the target is one value per example, else
            [outputs, ...]. A tuple for a tuple.

        Raises:
            ArgumentError: shapes, strides, baselines or a target that do not fit.
        """
        given = (inputs,) if isinstance(inputs, Tensor) else inputs
        if not isinstance(given, tuple) or not given or not all(isinstance(x, Tensor) and x.ndim and x.numel() for x in given):
            raise ArgumentError("inputs: wanted a tensor with the batch first, or a tuple of them, none of them empty")
        if not isinstance(perturbations_per_eval, int) or perturbations_per_eval < 1:
            raise ArgumentError(f"perturbations_per_eval: got {perturbations_per_eval!r}, wanted a whole number from 1")
        given = tuple(x.detach() for x in given)
        grids = _grids(given, sliding_window_shapes, strides, baselines)
        extra = additional_forward_args if isinstance(additional_forward_args, tuple) else (additional_forward_args,)
        extra = () if additional_forward_args is None else extra
        with torch.no_grad(), bar("Occlusion attribution", show_progress) as progress:
            initial = as_tensor(self.forward_func(*given, *extra))
            select(initial, target)  # a target that does not fit is refused before the work begins
            network, reason = self._network(given, grids, extra, initial)
            if network is None:
                warnings.warn(f"every position runs everything anew, in batches, because {reason}", stacklevel=2)
                results = attribute(self.forward_func, given, grids, initial, target, extra, perturbations_per_eval, progress)
            else:
                results = (_swept(network, given[0], grids[0], initial, target, progress),)
        return results[0] if isinstance(inputs, Tensor) else results

    def _network(
        self, inputs: tuple[Tensor, ...], grids: Sequence[Grid], extra: tuple[Any, ...], initial: Tensor
    ) -> tuple[Network | None, str]:
        """The traced module, or None and why it cannot be used."""
        images, grid = inputs[0], grids[0]
        if self._traced is None:
            return None, "only a torch.nn.Module can be traced"
        if len(inputs) > 1 or extra:
            return None, "the model takes more than images"
        if images.ndim != 4 or not images.is_floating_point():
            return None, f"the inputs {list(images.shape)} ({images.dtype}) are no images [N, C, H, W]"
        if grid.window[0] != images.shape[1]:
            return None, f"the window covers {grid.window[0]} of {images.shape[1]} channels at a time"
        if not bool(torch.isfinite(images).all() and torch.isfinite(grid.fill).all()):
            return None, "the inputs or baselines hold NaN or infinity"
        try:
            return self._traced.network(images, initial), ""
        except ConelensError as error:
            return None, str(error)


def _swept(
    network: Network, images: Tensor, grid: Grid, initial: Tensor, target: Any, progress: Callable[[int, int], None] | None
) -> Tensor:
    sweep = occlude(network, images, grid.window[1:], grid.steps[1:], grid.fill, "clip", progress=progress)
    count = len(images)
    places = torch.arange(initial[0].numel(), device=images.device).expand(count, -1).reshape(initial.shape)
    chosen = select(places, target).reshape(count, -1)
    clean, outputs = sweep.clean.flatten(1).gather(1, chosen), _chosen(sweep, chosen)
    exact = torch.float64 if clean.dtype == torch.float64 else torch.float32
    drops = clean.to(exact)[:, :, None, None] - outputs.to(exact)
    pixels = sweep.pixel_map(drops.flatten(0, 1)).float()
    return pixels[:, None].expand(-1, images.shape[1], -1, -1).contiguous()


def _chosen(sweep: Sweep, chosen: Tensor) -> Tensor:
    """Outputs [N, K, rows, cols] out of [N, rows, cols, ...] by flat numbers [N, K]."""
    outputs = sweep.outputs.flatten(3) if sweep.outputs.ndim > 3 else sweep.outputs[..., None]
    index = chosen[:, None, None, :].expand(*outputs.shape[:3], -1)
    return outputs.gather(3, index).permute(0, 3, 1, 2)


def _grids(inputs: tuple[Tensor, ...], shapes: Any, strides: Any, baselines: Any) -> list[Grid]:
    """Windows, strides and baselines of every input, checked; ArgumentError says which does not fit."""
    count = len(inputs)
    windows = (shapes,) if isinstance(shapes, tuple) and (not shapes or isinstance(shapes[0], int)) else shapes
    if strides is None:
        strides = (1,) * count
    elif count == 1 and not (isinstance(strides, tuple) and len(strides) == 1):
        strides = (strides,)
    fills = (0,) * count if baselines is None else baselines if isinstance(baselines, tuple) else (baselines,)
    for name, values in (("sliding_window_shapes", windows), ("strides", strides), ("baselines", fills)):
        if not isinstance(values, tuple) or len(values) != count:
            raise ArgumentError(f"{name}: got {values!r}, wanted a tuple with one for each of the {count} input(s)")
    return [_grid(x, window, step, fill) for x, window, step, fill in zip(inputs, windows, strides, fills)]


def _grid(x: Tensor, window: Any, step: Any, fill: Any) -> Grid:
    shape = list(x.shape[1:])
    if not isinstance(window, tuple) or len(window) != len(shape) or not all(_positive(w) for w in window):
        raise ArgumentError(f"sliding_window_shapes: got {window!r}, wanted {len(shape)} positive numbers for {shape}")
    steps = (step,) * len(shape) if isinstance(step, int) else step
    if not isinstance(steps, tuple) or len(steps) != len(shape) or not all(_positive(s) for s in steps):
        raise ArgumentError(f"strides: got {step!r}, wanted a positive number, or one for each of {shape}")
    for cells, size, stride in zip(shape, window, steps):
        if size > cells:
            raise ArgumentError(f"sliding_window_shapes: got {window}, larger than the input {shape}; take a smaller one")
        if size < cells and stride > size:
            raise ArgumentError(
                f"strides: got {steps} for windows {window}, which leave values uncovered; wanted at most the window"
            )
    if not isinstance(fill, Tensor | int | float):
        raise ArgumentError(f"baselines: got {type(fill).__name__}, wanted a number or a tensor")
    try:
        shown = torch.as_tensor(fill, device=x.device).to(x.dtype).broadcast_to(x.shape)
    except RuntimeError:
        got = list(torch.as_tensor(fill).shape)
        raise ArgumentError(f"baselines: got shape {got}, wanted one that broadcasts to {list(x.shape)}") from None
    return Grid(window, steps, shown)


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
