"""Near ties: switches of a projection that rounding could have decided otherwise, and what would change if it had."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from conelens.cone import ConePlan
from conelens.execution import take, topdown
from conelens.graph import Graph
from conelens.operators import MaxPool2d, Step, inside

ULPS = 8


class TieProbe:
    """Watches the max pools of one cone plan."""

    def __init__(self, graph: Graph, plan: ConePlan) -> None:
        self.graph = graph
        self.plan = plan
        self._windows: dict[int, Tensor] = {}

    def observe(self, index: int, x: Tensor) -> None:
        """Keep a max pool's input window, as the cone's forward pass reads it."""
        if isinstance(self.graph[index].op, MaxPool2d):
            self._windows[index] = x

    def observe_whole(self, maps: dict[int, Tensor], rows: Tensor) -> None:
        """The same, cut out of the whole maps that a full forward pass kept."""
        for index, x in maps.items():
            if index in self.plan.places:
                place = self.plan.step(self.graph[index]).read(0)
                op = self.graph[index].op
                self._windows[index] = take(x, place.origin, place.size, op.outside, rows)

    def report(self, steps: dict[int, Step], values: Tensor, channels: Tensor, windows: Tensor) -> tuple[Tensor, Tensor]:
        """(near ties [U] int64, relative change of the projection [U] when they all flip)."""
        count = torch.zeros(len(values), dtype=torch.int64, device=values.device)
        flipped = {index: copy.copy(step) for index, step in steps.items()}
        for index, x in self._windows.items():
            if index not in steps:
                continue
            near, second = near_ties(x, self.graph[index].op, steps[index].memo["switches"])  # type: ignore[arg-type]
            if self.plan.hangs[index]:
                near &= inside(self.plan.places[index], self.graph[index].size, x.device)
            count += near.flatten(1).sum(1)
            chosen = steps[index].memo["switches"]
            flipped[index].memo = {
                **steps[index].memo,
                "switches": torch.where(near, second.to(chosen.dtype), chosen),
            }
        if not bool(count.any()):
            return count, torch.zeros_like(values)
        other = topdown(self.graph, self.plan, flipped, values, channels)
        change = (other - windows).flatten(1).norm(dim=1) / windows.flatten(1).norm(dim=1)
        return count, torch.nan_to_num(change)


def near_ties(x: Tensor, op: MaxPool2d, switches: Tensor) -> tuple[Tensor, Tensor]:
    """(near [U, C, h, w] bool, tap of the runner-up) for pooling windows ``x`` [U, C, H, W] that need no padding.

    Near: the two best values of a window lie within 8 units in the last place of the largest value that the unit's cone
    holds in this layer. That is the scale at which the sums behind all of them were rounded; a value that is small
    because its sum cancelled is no more exact. An exact tie at zero is none: both are rectified, and every route takes the
    first tap.
    """
    taps = []
    height, width = switches.shape[2:]
    for ky in range(op.kernel[0]):
        for kx in range(op.kernel[1]):
            y, x0 = ky * op.dilation[0], kx * op.dilation[1]
            taps.append(
                x[
                    :,
                    :,
                    y : y + (height - 1) * op.stride[0] + 1 : op.stride[0],
                    x0 : x0 + (width - 1) * op.stride[1] + 1 : op.stride[1],
                ]
            )
    stacked = torch.stack(taps)
    best = stacked.gather(0, switches.long()[None])[0]
    rest = stacked.scatter(0, switches.long()[None], -float("inf"))
    second, tap = rest.max(0)
    scale = x.masked_fill(x.isinf(), 0.0).abs().flatten(1).amax(1)
    ulp = torch.finfo(x.dtype).eps * scale[:, None, None, None]
    near = (best - second <= ULPS * ulp) & ~((best == 0) & (second == 0))
    return near, tap
