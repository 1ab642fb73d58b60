"""Changed-region algebra: which cells of every layer a rectangle of changed pixels can change, exactly, per axis.

A rectangle that moves over a grid has one interval per grid row and one per grid column, and every operator maps intervals of
one axis to intervals of the same axis. All of it is therefore done twice in one dimension; regions are products. Totals over a
whole sweep are products of sums, and rows that go through the network alike form one class (``occlusion.md`` §1.2, §4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from conelens.graph import Graph
from conelens.operators import Conv2d, Flatten, Linear, MaxPool2d, Pad, Pair

Interval = tuple[np.ndarray, np.ndarray]  # half-open, of each position of one axis; empty where low >= high


@dataclass
class AxisSpans:
    """Changed interval of every node for each position of the rectangle along one axis."""

    axis: int
    spans: dict[int, Interval]

    def widths(self, node: int) -> np.ndarray:
        """Changed cells per position, [P]."""
        low, high = self.spans[node]
        return np.maximum(high - low, 0)


def changed_spans(graph: Graph, order: Sequence[int], axis: int, low: np.ndarray, high: np.ndarray) -> AxisSpans:
    """Exact changed intervals of all nodes of ``order`` for changed pixels ``[low, high)`` [P] along ``axis``."""
    spans: dict[int, Interval] = {}
    for index in order:
        node = graph[index]
        if not node.inputs:
            spans[index] = (low, high)
            continue
        first = np.full(len(low), np.iinfo(np.int64).max)
        last = np.full(len(low), np.iinfo(np.int64).min)
        for edge, source in enumerate(node.inputs):
            begin, end = spans[source]
            some = begin < end
            reached = node.op.spread(edge, axis, begin, end, graph[source].size[axis], node.size[axis])
            first = np.where(some, np.minimum(first, reached[0]), first)
            last = np.where(some, np.maximum(last, reached[1]), last)
        nothing = first >= last
        spans[index] = np.where(nothing, 0, first), np.where(nothing, 0, last)
    return AxisSpans(axis, spans)


@dataclass
class AxisClass:
    """Positions of one axis whose regions have one size per node, so that their patches stack.

    ``low`` [P'] is where each position's region begins, inside the map; ``size`` holds the widest changed interval.
    """

    axis: int
    members: np.ndarray
    low: dict[int, np.ndarray]
    size: dict[int, int]

    def read(self, graph: Graph, index: int, edge: int) -> tuple[np.ndarray, int]:
        """Where the cells begin that ``index`` reads from its input ``edge``, [P'], and how many they are."""
        node = graph[index]
        cells = graph[node.inputs[edge]].size[self.axis]
        low, high = node.op.reach(edge, self.axis, self.low[index], self.low[index] + self.size[index], cells)
        return low, int((high - low).max())

    def leads(self, graph: Graph, index: int) -> np.ndarray:
        """Cells that ``index`` reads before the region of its input begins, [P']."""
        return self.low[graph[index].inputs[0]] - self.read(graph, index, 0)[0]


def axis_class(graph: Graph, spans: AxisSpans, members: np.ndarray) -> AxisClass:
    """One class of ``members``: regions widened to a common size, moved inwards at the border."""
    low: dict[int, np.ndarray] = {}
    size: dict[int, int] = {}
    for index, (begin, end) in spans.spans.items():
        size[index] = max(1, int((end[members] - begin[members]).max()))
        low[index] = np.clip(begin[members], 0, graph[index].size[spans.axis] - size[index])
    return AxisClass(spans.axis, members, low, size)


def whole_class(graph: Graph, order: Sequence[int], axis: int) -> AxisClass:
    """The class of positions whose regions are the whole map, everywhere."""
    size = {index: graph[index].size[axis] for index in order}
    return AxisClass(axis, np.zeros(1, np.int64), dict.fromkeys(order, np.zeros(1, np.int64)), size)


def signatures(graph: Graph, spans: AxisSpans, nodes: Sequence[int]) -> list[np.ndarray]:
    """Positions grouped by how they go through ``nodes``: equal widths, and equal leads of what a layer reads."""
    columns = []
    for index in nodes:
        low, high = spans.spans[index]
        columns.append(high - low)
        op = graph[index].op
        if isinstance(op, Conv2d | MaxPool2d):
            source, _ = spans.spans[graph[index].inputs[0]]
            columns.append(source - low * op.stride[spans.axis])
    _, group = np.unique(np.stack(columns, 1), axis=0, return_inverse=True)
    group = group.reshape(-1)
    return [np.flatnonzero(group == g) for g in range(int(group.max()) + 1)]


# --- multiply-accumulates of whole sweeps ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerMacs:
    """Multiply-accumulates of one layer, mean over the positions of a sweep, under each scheme of ``occlusion.md`` §4.1."""

    node: int
    full: float  # everything, for every position
    krypton: float  # one width for all positions
    gather: float  # exactly the changed outputs, all their taps
    delta: float  # exactly the changed inputs, their taps


def sweep_macs(graph: Graph, order: Sequence[int], rows: AxisSpans, columns: AxisSpans, window: Pair) -> list[LayerMacs]:
    """Per convolution and fully connected layer of ``order``, for a rectangle of ``window`` pixels."""
    axes = (rows, columns)
    uniform = [_krypton_widths(graph, order, axis, window[axis]) for axis in (0, 1)]
    count = float(np.prod([len(axis.spans[order[0]][0]) for axis in axes]))
    result = []
    for index in order:
        node, op = graph[index], graph[index].op
        if isinstance(op, Conv2d):
            per_pair = float(op.weight.shape[0] * op.weight.shape[1])  # one tap of one output cell
            taps = op.taps(0) * op.taps(1)
            source = node.inputs[0]
            pairs = [_pairs(op, axis, axes[axis].spans[source], graph[source].size[axis], node.size[axis]) for axis in (0, 1)]
            result.append(
                LayerMacs(
                    index,
                    per_pair * taps * node.size[0] * node.size[1],
                    per_pair * taps * uniform[0][index] * uniform[1][index],
                    per_pair * taps * rows.widths(index).sum() * columns.widths(index).sum() / count,
                    per_pair * pairs[0] * pairs[1] / count,
                )
            )
        elif isinstance(op, Linear):
            full = float(op.weight.numel())
            result.append(LayerMacs(index, full, full, full, full * _changed_share(graph, index, rows, columns, count)))
    return result


def _pairs(op: Conv2d, axis: int, changed: Interval, in_size: int, out_size: int) -> float:
    """(output, tap) pairs along ``axis`` that read a changed input, summed over the positions."""
    stride, dilation, start = op.stride[axis], op.dilation[axis], op.padding[axis]
    cells = np.arange(out_size)[:, None] * stride - start + np.arange(op.taps(axis))[None] * dilation
    taps = np.bincount(cells[(cells >= 0) & (cells < in_size)], minlength=in_size)
    before = np.concatenate([[0], np.cumsum(taps)])
    return float((before[np.maximum(changed[1], changed[0])] - before[changed[0]]).sum())


def _changed_share(graph: Graph, index: int, rows: AxisSpans, columns: AxisSpans, count: float) -> float:
    """Changed share of the cells that a fully connected layer reads."""
    (source,) = graph[index].inputs
    if not isinstance(graph[source].op, Flatten):
        return 1.0
    (map_,) = graph[source].inputs
    height, width = graph[map_].size
    return float(rows.widths(map_).sum() * columns.widths(map_).sum()) / (count * height * width)


def _krypton_widths(graph: Graph, order: Sequence[int], axis: int, width: int) -> dict[int, int]:
    """Krypton's rule: ``min(ceil((w + k - 1) / s), O)`` for every position alike; joins take the widest."""
    widths: dict[int, int] = {}
    for index in order:
        node, op = graph[index], graph[index].op
        if not node.inputs:
            widths[index] = width
        elif isinstance(op, Conv2d | MaxPool2d):
            span, stride = op.span(axis), op.stride[axis]
            widths[index] = min(-(-(widths[node.inputs[0]] + span - 1) // stride), node.size[axis])
        elif isinstance(op, Pad) or all(graph[source].size[axis] == node.size[axis] for source in node.inputs):
            widths[index] = min(max(widths[source] for source in node.inputs), node.size[axis])
        else:
            widths[index] = node.size[axis]
    return widths
