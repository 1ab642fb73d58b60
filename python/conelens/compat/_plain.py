"""Captum's occlusion as it is defined, one batch of perturbed inputs after the other: for all that conelens cannot trace."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from conelens.errors import ArgumentError

Place = tuple[slice, ...]  # one slice per dimension of an input, without its batch


class Grid(NamedTuple):
    """The window of one input, its steps, and what it shows: a tensor of the input's shape. All without the batch dimension."""

    window: tuple[int, ...]
    steps: tuple[int, ...]
    fill: Tensor

    def places(self, shape: Sequence[int]) -> Iterator[Place]:
        """Every position of the window, the first dimension moving fastest; the last along a dimension is cut off."""
        starts = [range(0, cells - size + step, step) for cells, size, step in zip(shape, self.window, self.steps)]
        for corner in itertools.product(*reversed(starts)):
            yield tuple(slice(a, min(a + size, n)) for a, size, n in zip(reversed(corner), self.window, shape))


def attribute(
    forward: Callable[..., Any], inputs: tuple[Tensor, ...], grids: Sequence[Grid], initial: Tensor, target: Any,
    extra: tuple[Any, ...], at_once: int, progress: Callable[[int, int], None] | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Mean change of the target outputs over the windows that cover each input value, float32, [outputs, ...] per input."""
    before = select(initial, target).reshape(1, -1)
    outputs = before.shape[1]
    exact = torch.float32 if before.dtype in (torch.float16, torch.bfloat16, torch.float32) else torch.float64
    totals = [torch.zeros(outputs, *x.shape[1:], dtype=exact, device=x.device) for x in inputs]
    counts = [torch.zeros(x.shape[1:], device=x.device) for x in inputs]
    work = [(i, place) for i, grid in enumerate(grids) for place in grid.places(inputs[i].shape[1:])]
    for start in range(0, len(work), at_once):
        some = work[start : start + at_once]
        after = as_tensor(forward(*_occluded(inputs, grids, some), *_repeated(extra, len(some))))
        if at_once > 1 and (not after.ndim or not initial.ndim or len(after) != len(some) * len(initial)):
            raise ArgumentError(
                f"perturbations_per_eval: got {at_once}, but the output {list(initial.shape)} does not grow with the batch "
                f"({list(after.shape)} for {len(some)} perturbations); wanted 1"
            )
        chosen = select(after, _targets(target, len(some)))
        change = before.to(exact) - chosen.reshape(-1, outputs).to(exact)
        for (i, place), values in zip(some, change):
            totals[i][(slice(None), *place)] += values.to(totals[i].device).reshape(-1, *[1] * len(place))
            counts[i][place] += 1
        if progress is not None:
            progress(start + len(some), len(work))
    return tuple(total.float() / count for total, count in zip(totals, counts))


def _occluded(inputs: tuple[Tensor, ...], grids: Sequence[Grid], some: Sequence[tuple[int, Place]]) -> list[Tensor]:
    batches = [x.repeat(len(some), *[1] * (x.ndim - 1)) for x in inputs]
    count = len(inputs[0])
    for number, (i, place) in enumerate(some):
        batches[i][(slice(number * count, (number + 1) * count), *place)] = grids[i].fill[(slice(None), *place)]
    return batches


def _repeated(extra: tuple[Any, ...], times: int) -> list[Any]:
    return [torch.cat([value] * times) if isinstance(value, Tensor) and value.ndim else value for value in extra]


def _targets(target: Any, times: int) -> Any:
    """Targets given per example, for all examples of a batch of perturbations."""
    if isinstance(target, Tensor) and target.numel() > 1:
        return torch.cat([target] * times)
    return target * times if isinstance(target, list) else target


def as_tensor(output: Any) -> Tensor:
    """What a forward function returned; Captum's functions may also return a number."""
    if isinstance(output, int | float):
        return torch.tensor(output, dtype=torch.float64)
    if not isinstance(output, Tensor):
        raise ArgumentError(f"forward_func: returned {type(output).__name__}, wanted a tensor or a number")
    return output


def select(output: Tensor, target: Any) -> Tensor:
    """The outputs that ``target`` names, by Captum's rules, of ``output`` [N, ...].

    None: all. A number, or a tensor of one: that entry of dimension 1. A tuple: entries of dimensions 1, 2, ... .
    A tensor [N], a list of numbers or of tuples: one for each example.
    """
    if target is None:
        return output
    got = f"target: got {target!r} for an output {list(output.shape)}"
    if not output.ndim:
        raise ArgumentError(f"{got}, wanted None: there is one value for the whole batch")
    if isinstance(target, Tensor):
        if target.dtype.is_floating_point or target.ndim > 1:
            raise ArgumentError(f"{got}, wanted whole numbers, one or one per example")
        target = int(target) if target.numel() == 1 else target.tolist()
    if isinstance(target, list) and len(target) != len(output):
        raise ArgumentError(f"{got}, wanted one target for each of the {len(output)} examples")
    each: list[Any] = target if isinstance(target, list) else [target]
    indices = [index if isinstance(index, tuple) else (index,) for index in each]
    for index in indices:
        if not all(isinstance(k, int | slice) and not isinstance(k, bool) for k in index):
            raise ArgumentError(f"{got}, wanted a number, a tuple of numbers, or one of them per example (list, tensor)")
        if len(index) > output.ndim - 1:
            raise ArgumentError(f"{got}, wanted at most {output.ndim - 1} numbers" + " (or None)" * (output.ndim == 1))
        for k, cells in zip(index, output.shape[1:]):
            if isinstance(k, int) and not -cells <= k < cells:
                raise ArgumentError(f"{got}, wanted numbers from 0 to {cells - 1}")
    if isinstance(target, list):
        return torch.stack([output[(i, *index)] for i, index in enumerate(indices)])
    return output[(slice(None), *indices[0])]
