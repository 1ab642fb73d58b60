"""Cone algebra: which cells of every layer a unit depends on. Pure integer interval arithmetic on the traced graph.

Coordinates are those of each node's own map; intervals are half-open. *Unclipped* intervals continue past the border as if
the map went on (what a padded layer reads there); a :class:`ConePlan` clips them to what has to be computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from conelens.graph import Graph, Node
from conelens.operators import Bound, Input, Pair, Place

Offset = Pair | np.ndarray  # one offset for all units, or [U, 2]


@dataclass
class Edge:
    """What one input of a node must provide: its place, and where that begins inside the window held for the input."""

    place: Place
    offset: Offset


@dataclass
class ConePlan:
    """Windows of all ancestors of ``target`` for a batch of units.

    Every node has one window size and an origin per unit. Window cells may leave the map (``hangs``); they hold zero.
    """

    target: int
    order: list[int]
    places: dict[int, Place]
    hangs: dict[int, bool]
    edges: dict[int, list[Edge]]


def unit_boxes(graph: Graph, target: int, positions: np.ndarray) -> np.ndarray:
    """Receptive-field boxes [U, 4] int64 (top, left, bottom, right; exclusive; pixels; not clipped) of units ``positions`` [U, 2].

    Exact for every graph: the hull over all paths from the unit to the input. [0, 0, 0, 0] where no path leads to the input.
    """
    needs: dict[int, np.ndarray] = {target: np.concatenate([positions, positions + 1], 1).astype(np.int64)}
    for index in reversed(graph.ancestors((target,))):
        node, need = graph[index], needs[index]
        for edge, source in enumerate(node.inputs):
            reached = np.empty_like(need)
            for axis in (0, 1):
                low, high = node.op.reach(edge, axis, need[:, axis], need[:, axis + 2], graph[source].size[axis])
                reached[:, axis], reached[:, axis + 2] = low, high
            held = needs.get(source)
            needs[source] = reached if held is None else _hull(held, reached)
    return needs.get(0, np.zeros((len(positions), 4), np.int64))


def _hull(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.concatenate([np.minimum(a[:, :2], b[:, :2]), np.maximum(a[:, 2:], b[:, 2:])], 1)


def plan_cone(graph: Graph, target: int, positions: np.ndarray) -> ConePlan:
    """The windows that exactly determine units ``positions`` [U, 2] of ``target``, for one kernel sequence per layer.

    Cells that leave the map for *every* unit are trimmed; a window as large as the map becomes the whole map.
    """
    low = positions.astype(np.int64)
    needs: dict[int, tuple[np.ndarray, np.ndarray]] = {target: (low, low + 1)}
    order = graph.ancestors((target,))
    places: dict[int, Place] = {}
    hangs: dict[int, bool] = {}
    wants: dict[int, list[Place]] = {}
    for index in reversed(order):
        node = graph[index]
        place, hang = _fit(*needs[index], node.size)
        places[index], hangs[index] = place, hang
        wants[index] = []
        for edge, source in enumerate(node.inputs):
            starts, ends = zip(*(_reach(node, edge, axis, place, graph[source].size[axis]) for axis in (0, 1)), strict=True)
            start, end = np.stack(starts, 1), np.stack(ends, 1)
            sizes = (end - start).max(0)
            wants[index].append(Place(start, (int(sizes[0]), int(sizes[1]))))
            end = start + sizes
            if source in needs:
                start, end = np.minimum(start, needs[source][0]), np.maximum(end, needs[source][1])
            needs[source] = (start, end)
    edges = {
        index: [
            Edge(want, _offset(want.low - places[source].low))
            for want, source in zip(wants[index], graph[index].inputs, strict=True)
        ]
        for index in order
    }
    return ConePlan(target, order, places, hangs, edges)


def _reach(node: Node, edge: int, axis: int, place: Place, in_size: int) -> tuple[Bound, Bound]:
    low = place.low[:, axis]
    return node.op.reach(edge, axis, low, low + place.size[axis], in_size)


def _fit(low: np.ndarray, high: np.ndarray, map_size: Pair) -> tuple[Place, bool]:
    """One common window size; trimmed where all units hang over the border, never larger than the map."""
    low = low.copy()
    size = [0, 0]
    hang = False
    for axis in (0, 1):
        cells = map_size[axis]
        length = int((high[:, axis] - low[:, axis]).max())
        over = max(0, int((-low[:, axis]).min()))
        under = max(0, int((low[:, axis] + length - cells).min()))
        low[:, axis] += over
        length -= over + under
        if length >= cells:
            low[:, axis], length = 0, cells
        elif length <= 0:  # the unit sees nothing but padding here: one harmless cell keeps the shapes sound
            low[:, axis], length = np.clip(low[:, axis], 0, cells - 1), 1
        size[axis] = length
        hang = hang or bool((low[:, axis] < 0).any() or (low[:, axis] + length > cells).any())
    return Place(low, (size[0], size[1])), hang


def _offset(offsets: np.ndarray) -> Offset:
    first = offsets[0]
    if len(offsets) == 1 or (offsets == first).all():
        return int(first[0]), int(first[1])
    return offsets


def cone_macs(graph: Graph, plan: ConePlan) -> float:
    """Multiply-accumulates of one unit's forward pass on the windows of ``plan``."""
    return sum(
        graph[i].op.macs((graph[i].shape[0], *plan.places[i].size)) for i in plan.order if not isinstance(graph[i].op, Input)
    )


def whole_macs(graph: Graph, target: int) -> float:
    """Multiply-accumulates of one image's forward pass on whole maps."""
    return sum(graph[i].op.macs(graph[i].shape) for i in graph.ancestors((target,)))
