"""Cone algebra: which cells of every layer a unit depends on. Pure integer interval arithmetic on the traced graph.

Coordinates are those of each node's own map; intervals are half-open. *Unclipped* intervals continue past the border as if
the map went on (what a padded layer reads there); a :class:`ConePlan` clips them to what has to be computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from conelens.graph import Graph, Node
from conelens.operators import Bound, Edge, Pair, Place, Step


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

    def step(self, node: Node) -> Step:
        """Where the windows of ``node`` lie, for its operator."""
        return Step(self.edges[node.index], [self.places[source] for source in node.inputs], self.places[node.index])


@dataclass
class _Template:
    """The plan of every unit of a layer whose cone touches no border: the same windows, moved by the strides."""

    plan: ConePlan  # of a unit at (0, 0) of maps without borders
    strides: dict[int, np.ndarray]  # cells per step of the unit, [2]
    first: np.ndarray  # units first <= position <= last are interior, [2]
    last: np.ndarray

    def __post_init__(self) -> None:
        """The box on the input of the unit at (0, 0), and how it moves per step of the unit, [2, 4]; both zero without one."""
        place, stride = self.plan.places.get(0), self.strides.get(0, np.zeros(2, np.int64))
        self.corners = np.zeros(4, np.int64) if place is None else np.concatenate([place.low[0], place.low[0] + place.size])
        self.moves = np.tile(np.diag(stride), 2)

    def at(self, positions: np.ndarray) -> ConePlan | None:
        """The plan for ``positions`` [U, 2], or None when one of them is not interior."""
        if (positions < self.first).any() or (positions > self.last).any():
            return None
        places = {
            index: Place(None, place.size, (place.low, self.strides[index], positions))
            for index, place in self.plan.places.items()
        }
        return ConePlan(self.plan.target, self.plan.order, places, self.plan.hangs, self.plan.edges)


def plan_cone(graph: Graph, target: int, positions: np.ndarray) -> ConePlan:
    """The windows that exactly determine units ``positions`` [U, 2] of ``target``, for one kernel sequence per layer.

    Cells that leave the map for *every* unit are trimmed; a window as large as the map becomes the whole map.
    """
    template = graph.remember(("template", target), lambda: _template(graph, target))
    plan = None if template is None else template.at(positions)
    return plan or _plan(graph, target, positions.astype(np.int64), borders=True)


def _plan(graph: Graph, target: int, low: np.ndarray, borders: bool) -> ConePlan:
    needs: dict[int, tuple[np.ndarray, np.ndarray]] = {target: (low, low + 1)}
    order = graph.ancestors((target,))
    places: dict[int, Place] = {}
    hangs: dict[int, bool] = {}
    wants: dict[int, list[Place]] = {}
    for index in reversed(order):
        node = graph[index]
        places[index], hangs[index] = _fit(*needs[index], node.size if borders else None)
        wants[index] = []
        for edge, source in enumerate(node.inputs):
            reached = [_reach(node, edge, axis, places[index], graph[source].size[axis]) for axis in (0, 1)]
            start, end = (np.stack(bounds, 1) for bounds in zip(*reached, strict=True))
            sizes = (end - start).max(0)
            wants[index].append(Place(start, (int(sizes[0]), int(sizes[1]))))
            end = start + sizes
            if source in needs:
                start, end = np.minimum(start, needs[source][0]), np.maximum(end, needs[source][1])
            needs[source] = (start, end)
    edges = {
        index: [
            Edge(Place(want.low - places[source].low, want.size).origin, want.size)
            for want, source in zip(wants[index], graph[index].inputs, strict=True)
        ]
        for index in order
    }
    return ConePlan(target, order, places, hangs, edges)


def _reach(node: Node, edge: int, axis: int, place: Place, in_size: int) -> tuple[Bound, Bound]:
    low = place.low[:, axis]
    return node.op.reach(edge, axis, low, low + place.size[axis], in_size)


def _fit(low: np.ndarray, high: np.ndarray, map_size: Pair | None) -> tuple[Place, bool]:
    """One common window size; trimmed where all units hang over the border, never larger than the map (None: no borders)."""
    low = low.copy()
    size = [0, 0]
    hang = False
    for axis in (0, 1):
        length = int((high[:, axis] - low[:, axis]).max())
        if map_size is not None:
            cells = map_size[axis]
            over = max(0, int((-low[:, axis]).min()))
            under = max(0, int((low[:, axis] + length - cells).min()))
            low[:, axis] += over
            length -= over + under
            if length >= cells:
                low[:, axis], length = 0, cells
            elif length <= 0:  # the unit sees nothing but padding here: one harmless cell keeps the shapes sound
                low[:, axis], length = np.clip(low[:, axis], 0, cells - 1), 1
            hang = hang or bool((low[:, axis] < 0).any() or (low[:, axis] + length > cells).any())
        size[axis] = length
    return Place(low, (size[0], size[1])), hang


def _template(graph: Graph, target: int) -> _Template | None:
    """None where windows do not simply move with the unit: behind flattening, resizing, or branches of different stride."""
    strides: dict[int, np.ndarray] = {target: np.ones(2, np.int64)}
    for index in reversed(graph.ancestors((target,))):
        node = graph[index]
        if not node.op.translates:
            return None
        for source in node.inputs:
            stride = strides[index] * (node.op.scale(0), node.op.scale(1))
            if (strides.setdefault(source, stride) != stride).any():
                return None
    plan = _plan(graph, target, np.zeros((1, 2), np.int64), borders=False)
    first, last = np.full(2, np.iinfo(np.int64).min), np.full(2, np.iinfo(np.int64).max)
    for index, place in plan.places.items():
        first = np.maximum(first, -(place.low[0] // strides[index]))
        last = np.minimum(last, (np.array(graph[index].size) - place.size - place.low[0]) // strides[index])
    return _Template(plan, strides, first, last)


def unit_boxes(graph: Graph, target: int, positions: np.ndarray) -> np.ndarray:
    """Receptive-field boxes [U, 4] int64 of units ``positions`` [U, 2]: top, left, bottom, right; exclusive; unclipped pixels.

    Exact for every graph: the hull over all paths from the unit to the input. [0, 0, 0, 0] where no path leads to the input.
    """
    template = graph.remember(("template", target), lambda: _template(graph, target))
    if template is not None:
        return template.corners + positions @ template.moves
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


def cone_macs(graph: Graph, target: int) -> float:
    """Multiply-accumulates of one unit's forward pass on its cone (the unit in the middle of the map)."""

    def count() -> float:
        height, width = graph[target].size
        plan = plan_cone(graph, target, np.array([[height // 2, width // 2]]))
        return sum(graph[i].op.macs((graph[i].shape[0], *plan.places[i].size)) for i in plan.order)

    return graph.remember(("cone macs", target), count)


def whole_macs(graph: Graph, target: int) -> float:
    """Multiply-accumulates of one image's forward pass on whole maps."""
    return graph.remember(
        ("whole macs", target),
        lambda: sum(graph[i].op.macs(graph[i].shape) for i in graph.ancestors((target,))),
    )


def cone_cells(graph: Graph, target: int) -> int:
    """Cells of the largest map on one unit's cone."""

    def count() -> int:
        height, width = graph[target].size
        plan = plan_cone(graph, target, np.array([[height // 2, width // 2]]))
        return max(graph[i].shape[0] * p.size[0] * p.size[1] for i, p in plan.places.items())

    return graph.remember(("cone cells", target), count)
