"""Running a traced graph: forward on whole maps, forward on cones, and the top-down pass on cones.

One kernel sequence per layer whatever the number of units: windows of all units are stacked along the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from conelens import ops
from conelens.cone import ConePlan
from conelens.errors import ArgumentError
from conelens.graph import Graph
from conelens.operators import (
    Affine,
    Conv2d,
    Edge,
    Linear,
    MaxPool2d,
    Offset,
    Operator,
    Pad,
    Pair,
    Rectify,
    Step,
    inside,
)
from conelens.ops.deconv2d import transposed_filters
from conelens.ops.max_pool2d_with_switches import pool_and_switches

Observer = Callable[[int, Tensor], None]


def exact_dtype(device: torch.device) -> AbstractContextManager[Any]:
    """A block in which the caller's autocast does not reach the network: results are in the dtype that was traced."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def take(x: Tensor, offset: Offset, size: Pair, fill: float = 0.0, rows: Tensor | None = None) -> Tensor:
    """Windows of ``size`` that start at ``offset`` inside ``x`` [N, C, h, w]; ``fill`` where they leave it.

    ``rows`` [U] picks the sample of each unit; without it sample u belongs to unit u. No copy where a slice will do.
    """
    if not isinstance(offset, tuple):
        return _gather(x, offset, size, fill, rows)
    if rows is not None:
        x = x[rows]
    if offset == (0, 0) and size == x.shape[2:]:
        return x
    rows_kept, above, below = _overlap(offset[0], size[0], x.shape[2])
    columns_kept, before, after = _overlap(offset[1], size[1], x.shape[3])
    x = x[:, :, rows_kept, columns_kept]
    return F.pad(x, (before, after, above, below), value=fill) if above or below or before or after else x


def _overlap(start: int, length: int, held: int) -> tuple[slice, int, int]:
    """The part of [start, start + length) inside [0, held), and how many cells are missing before and after it."""
    low, high = min(max(start, 0), held), max(min(start + length, held), 0)
    if high <= low:
        return slice(0, 0), length, 0
    return slice(low, high), low - start, start + length - high


def _gather(x: Tensor, offset: np.ndarray, size: Pair, fill: float, rows: Tensor | None) -> Tensor:
    origin = torch.from_numpy(offset.astype(np.int64)).to(x.device)
    return ops.gather_windows(x, None, None, origin, size, rows=rows, fill=fill)


class Turn(NamedTuple):
    """One node's turn in a pass, with all that is known beforehand about fusing, overwriting and dropping."""

    node: int
    op: Operator  # as it runs: filters laid out for the device, the affine map behind folded in
    sources: tuple[int, ...]
    passed: bool  # done by a neighbour: a ReLU that only max pools read, an affine map folded into its convolution
    rectifies: bool  # a max pool that rectifies its input
    in_place: bool  # a ReLU that may overwrite a fresh tensor nobody else reads
    rectified: bool  # the convolution in front of such a ReLU
    narrow: bool  # the convolution of which single units need but their own channel
    last_reads: list[int]  # values that nobody reads afterwards


def schedule(graph: Graph, targets: tuple[int, ...], observed: bool = False) -> list[Turn]:
    """The turns of a pass to ``targets``, made once per graph; ``observed`` passes keep every pool's own input."""

    def make() -> list[Turn]:
        readers = graph.consumers(targets)
        ready: dict[int, Operator] = {}
        passed: set[int] = set()
        rectifying: set[int] = set()
        in_place: set[int] = set()
        rectified: set[int] = set()
        last_reads: dict[int, list[int]] = {index: [] for index in readers}
        for index, consumers in readers.items():
            if consumers and index not in targets:
                last_reads[max(consumers)].append(index)
            op = ready[index] = graph[index].op
            private = index not in targets and len(consumers) == 1
            if isinstance(op, Conv2d):
                folds = private and isinstance(graph[consumers[0]].op, Affine)
                ready[index] = _prepared(graph, index, consumers[0] if folds else None)
                passed.update(consumers if folds else ())
            elif isinstance(op, Rectify) and not observed and index not in targets and _only_pools(graph, consumers):
                passed.add(index)
                rectifying.update(consumers)
            elif isinstance(op, Rectify):
                (source,) = graph[index].inputs
                fresh = isinstance(graph[source].op, Conv2d) or source in passed
                if fresh and len(readers[source]) == 1 and source not in targets:
                    in_place.add(index)
                    rectified.add(source if isinstance(graph[source].op, Conv2d) else graph[source].inputs[0])
        narrow = _narrow(graph, targets, readers)
        return [
            Turn(
                i, op, graph[i].inputs, i in passed, i in rectifying, i in in_place, i in rectified, i == narrow, last_reads[i]
            )
            for i, op in ready.items()
        ]  # fmt: skip

    return graph.remember(("schedule", targets, observed), make)


def _narrow(graph: Graph, targets: tuple[int, ...], readers: dict[int, list[int]]) -> int | None:
    """The convolution that ``targets`` is, or that only it reads through a ReLU and a folded affine map."""
    if len(targets) > 1:
        return None
    index = targets[0]
    if isinstance(graph[index].op, Rectify) and len(readers[graph[index].inputs[0]]) == 1:
        (index,) = graph[index].inputs
    if isinstance(graph[index].op, Affine) and len(readers[graph[index].inputs[0]]) == 1:
        (index,) = graph[index].inputs
    return index if isinstance(graph[index].op, Conv2d) else None


def _prepared(graph: Graph, index: int, affine: int | None) -> Conv2d:
    """The convolution ready to run. On CPUs oneDNN wants channels_last filters, or reorders them on every call."""

    def make() -> Conv2d:
        op, behind = graph[index].op, None if affine is None else graph[affine].op
        assert isinstance(op, Conv2d)
        if isinstance(behind, Affine):
            op = op.folded(behind.factor, behind.shift)
        if op.weight.device.type == "cpu" and op.weight.dtype != torch.float64:
            op = replace(op, weight=op.weight.contiguous(memory_format=torch.channels_last))
        return op

    return graph.remember(("filters", index, affine), make)


def _only_pools(graph: Graph, consumers: list[int]) -> bool:
    return bool(consumers) and all(isinstance(graph[c].op, MaxPool2d) for c in consumers)


def forward_whole(
    graph: Graph,
    images: Tensor,
    targets: tuple[int, ...],
    *,
    switches: dict[int, Tensor] | None = None,
    observe: Observer | None = None,
    keep: frozenset[int] = frozenset(),
) -> dict[int, Tensor]:
    """Whole-map forward pass: the maps of ``targets``, and of ``keep``; fills ``switches`` per max-pool node when given.

    ``observe(node, last input)`` sees every node's input map (a gate's is the gate).
    """
    values: dict[int, Tensor] = {}
    for turn in schedule(graph, targets, observe is not None):
        index, op = turn.node, turn.op
        inputs = [values[i] for i in turn.sources]
        if not inputs:
            value = _finite(images)
        elif turn.passed:
            value = inputs[0]
        elif isinstance(op, MaxPool2d):
            value, chosen = op.pool(inputs[0], True, relu=turn.rectifies)
            if switches is not None:
                switches[index] = chosen
        elif turn.in_place and turn.sources[0] not in keep:
            value = torch.relu_(inputs[0])
        else:
            value = op.forward(inputs, None)
        if observe is not None and inputs:
            observe(index, inputs[-1])
        values[index] = value
        for source in turn.last_reads:
            if source not in keep:
                del values[source]
    return {index: values[index] for index in keep.union(targets)}


def forward_cone(
    graph: Graph, plan: ConePlan, images: Tensor, rows: Tensor | None, channels: Tensor, *, observe: Observer | None = None
) -> tuple[Tensor, dict[int, Step]]:
    """Forward pass on the windows of ``plan``: the units' own values [U] in ``channels`` [U], and the steps of the pass."""
    nodes, places, hangs = graph.nodes, plan.places, plan.hangs
    values: dict[int, Tensor] = {}
    steps: dict[int, Step] = {}
    narrowed = False
    for turn in schedule(graph, (plan.target,), observe is not None):
        index, op, sources = turn.node, turn.op, turn.sources
        place = places[index]
        if not sources:
            values[index] = _finite(take(images, place.origin, place.size, rows=rows))
            continue
        steps[index] = step = plan.step(nodes[index])
        if isinstance(op, MaxPool2d):
            value = _pool_window(graph, plan, index, values[sources[0]], step, turn.rectifies, observe)
        else:
            inputs = [take(values[source], edge.offset, edge.size) for source, edge in zip(sources, step.edges, strict=True)]
            if turn.passed:
                value = inputs[0]
            elif turn.in_place:
                value = torch.relu_(inputs[0])
            elif turn.narrow and isinstance(op, Conv2d):
                value, narrowed = op.unit(inputs[0], channels), True
            else:
                value = op.forward(inputs, step)
        if hangs[index] and not op.keeps_zero and not turn.passed:
            value = value.masked_fill(~inside(place, nodes[index].size, value.device), 0.0)
        values[index] = value
        for source in turn.last_reads:
            del values[source]
    value = values[plan.target].flatten(1)
    return value[:, 0] if narrowed else value.gather(1, channels[:, None])[:, 0], steps


def _finite(windows: Tensor) -> Tensor:
    total = float(windows.sum())  # one pass; only a suspicious sum is looked at cell by cell
    if not math.isfinite(total) and not bool(torch.isfinite(windows).all()):
        raise ArgumentError("images: the pixels a unit sees hold NaN or infinity; clean the data first")
    return windows


def _pool_window(
    graph: Graph, plan: ConePlan, index: int, x: Tensor, step: Step, rectify: bool, observe: Observer | None
) -> Tensor:
    """Max pooling of one window, in which a tap outside the map must lose against every tap inside."""
    op, (source,), (edge,) = graph[index].op, graph[index].inputs, step.edges
    assert isinstance(op, MaxPool2d)
    if plan.hangs[source] or _pads(edge.offset, edge.size, plan.places[source].size):
        if rectify:
            x, rectify = torch.relu(x), False
        if plan.hangs[source]:
            x = x.masked_fill(~inside(plan.places[source], graph[source].size, x.device), op.outside)
    x = take(x, edge.offset, edge.size, op.outside)
    if observe is not None:
        observe(index, x)
    pooled, step.memo["switches"] = pool_and_switches(x, op.kernel, op.stride, (0, 0), op.dilation, False, rectify)
    return pooled


def _pads(offset: Offset, size: Pair, held: Pair) -> bool:
    """Does a window leave the one held for its source?"""
    if isinstance(offset, tuple):
        return min(offset) < 0 or offset[0] + size[0] > held[0] or offset[1] + size[1] > held[1]
    return bool((offset < 0).any() or (offset + size > np.asarray(held)).any())


def steps_from_whole(
    graph: Graph, plan: ConePlan, rows: Tensor | None, switches: dict[int, Tensor], memory: dict[int, Tensor]
) -> dict[int, Step]:
    """The steps of the top-down pass, cut out of a whole-map forward pass instead of computed on the cone."""
    steps: dict[int, Step] = {}
    for index in plan.order:
        op, place = graph[index].op, plan.places[index]
        steps[index] = step = plan.step(graph[index])
        if isinstance(op, MaxPool2d):
            step.memo["switches"] = take(switches[index], place.origin, place.size, rows=rows)
        elif index in memory:
            key = "gate" if op.kind == "gate" else "input"
            held = step.read(-1)
            step.memo[key] = take(memory[index], held.origin, held.size, rows=rows)
    return steps


@dataclass
class Signal:
    """A top-down signal on its way: what has been computed, and what is still to be done so that one kernel can do it all.

    ``data`` [U, C, h, w]; or a ``seed``: single units, not yet written into a map. ``pool``: still to be unpooled.
    ``relu``: still to be rectified, after the unpooling.
    """

    data: Tensor | None
    seed: Seed | None = None
    pool: Unpool | None = None
    relu: bool = False

    def settle(self) -> Tensor:
        """Everything pending, done."""
        if self.seed is not None:
            self.data = self.seed.map()
        assert self.data is not None
        if self.pool is not None:
            self.data = self.pool.run(self.data, self.relu)
        elif self.relu:
            self.data = torch.relu(self.data)
        self.seed, self.pool, self.relu = None, None, False
        return self.data


@dataclass
class Seed:
    """Single units of a 1x1 window: ``values`` [U] >= 0 at ``channels`` [U] of ``width``."""

    values: Tensor
    channels: Tensor
    width: int

    def map(self) -> Tensor:
        """[U, width, 1, 1]"""
        empty = self.values.new_zeros((len(self.values), self.width, 1, 1))
        return empty.scatter_(1, self.channels[:, None, None, None], self.values[:, None, None, None])


@dataclass
class Unpool:
    """A pending unpooling onto a window of ``size``, which begins ``padding`` cells after the first tap."""

    op: MaxPool2d
    switches: Tensor
    padding: Pair
    size: Pair

    @property
    def window(self) -> tuple[int, ...]:
        """Kernel, stride, padding and dilation of the unpooling, each (y, x), in one row."""
        return *self.op.kernel, *self.op.stride, *self.padding, *self.op.dilation

    def run(self, data: Tensor, relu: bool) -> Tensor:
        op = self.op
        return ops.max_unpool2d(
            data, self.switches, op.kernel, op.stride, self.padding, op.dilation, output_size=self.size, relu=relu
        )


def topdown(graph: Graph, plan: ConePlan, steps: dict[int, Step], values: Tensor, channels: Tensor) -> Tensor:
    """Deconvnet pass from seeds ``values`` [U] at ``channels`` [U] of the target to the input's windows [U, C, h, w]."""
    seed = Seed(values, channels, graph[plan.target].shape[0])
    signals: dict[int, Signal] = {plan.target: Signal(None, seed)}
    for turn in reversed(schedule(graph, (plan.target,))):
        signal = signals.pop(turn.node, None)
        if signal is None:
            continue
        if not turn.sources:
            return signal.settle()
        sent = _send(graph, plan, turn, signal, steps[turn.node])
        for source, part in zip(turn.sources, sent, strict=True):
            if part is None:
                continue
            if plan.hangs[source] and isinstance(turn.op, Conv2d | Pad):
                mask = ~inside(plan.places[source], graph[source].size, values.device)
                part = Signal(part.settle().masked_fill(mask, 0.0))
            held = signals.get(source)
            signals[source] = part if held is None else Signal(held.settle() + part.settle())
    return values.new_zeros((len(values), graph[0].shape[0], *plan.places[0].size))


def _place(data: Tensor, edge: Edge, held: Pair) -> Tensor:
    """Move a signal from the window an edge reads to the one held for its source."""
    offset = edge.offset
    back: Offset = (-offset[0], -offset[1]) if isinstance(offset, tuple) else -offset
    return take(data, back, held)


def _send(graph: Graph, plan: ConePlan, turn: Turn, signal: Signal, step: Step) -> list[Signal | None]:
    """Signals for the inputs of one node, on the windows held for them."""
    index, op, edges = turn.node, turn.op, step.edges
    if turn.passed and isinstance(op, Affine):
        return [signal]  # its factor is in the filters below
    held = [place.size for place in step.sources]
    trimmed = isinstance(edges[0].offset, tuple) and max(edges[0].offset) <= 0
    if isinstance(op, Rectify) and edges[0].offset == (0, 0) and held[0] == plan.places[index].size:
        return [Signal(signal.data, signal.seed, signal.pool, True)]
    if isinstance(op, MaxPool2d):
        data, switches = signal.settle(), step.memo["switches"]
        if trimmed and not plan.hangs[index]:
            return [Signal(data, None, Unpool(op, switches, _negative(edges[0].offset), held[0]))]
        (source,) = turn.sources
        origin = torch.from_numpy(plan.places[index].low).to(data.device)
        data = ops.max_unpool2d(
            data,
            switches,
            op.kernel,
            op.stride,
            op.padding,
            op.dilation,
            output_size=graph[source].size,
            origin=origin,
        )
        return [Signal(_place(data, edges[0], held[0]))]
    if signal.seed is not None and isinstance(op, (Conv2d, Linear)):
        unit = op.project_unit(signal.seed.values, signal.seed.channels)
        return [Signal(_place(unit, edges[0], held[0]))]
    if isinstance(op, Conv2d):
        if trimmed:
            return [Signal(_through_filters(op, signal, _negative(edges[0].offset), held[0]))]
        return [Signal(_place(_through_filters(op, signal, (0, 0), edges[0].size), edges[0], held[0]))]
    sent = op.topdown(signal.settle(), step)
    return [
        None if part is None else Signal(_place(part, edge, size)) for part, edge, size in zip(sent, edges, held, strict=True)
    ]


def _through_filters(op: Conv2d, signal: Signal, padding: Pair, size: Pair) -> Tensor:
    """Transposed filters, with a pending unpooling and rectification done on the way in."""
    assert signal.data is not None
    data, unpool = signal.data, signal.pool
    window, switches, on = (None, None, data.shape[2:]) if unpool is None else (unpool.window, unpool.switches, unpool.size)
    return transposed_filters(
        data, op.weight, op.stride, padding, op.groups, op.dilation, size, on, window, switches, signal.relu, None
    )


def _negative(offset: Offset) -> Pair:
    return -int(offset[0]), -int(offset[1])
