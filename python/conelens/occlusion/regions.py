"""What a sweep has to compute: the changed region of every layer, position by position, and how positions share the work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from conelens.changed import AxisClass, AxisSpans, changed_spans, whole_class
from conelens.execution import Turn, schedule
from conelens.graph import Graph
from conelens.occlusion.classes import RATES, axis_classes
from conelens.occlusion.windows import Windows
from conelens.operators import Edge, Flatten, Place, Spatial, Step

# A layer of which this share is changed, on average over the positions, is computed whole, and all layers behind it.
WHOLE_SHARE = 0.95


@dataclass
class SweepRegions:
    """The regions of one grid of windows on one network.

    The turns of the ``head`` run on changed regions, class of rows by class of columns; those of the ``tail`` on whole maps,
    for many positions at once. ``seam``: nodes of the head that the tail reads.
    """

    graph: Graph
    order: list[int]
    targets: tuple[int, ...]
    rows: AxisSpans
    columns: AxisSpans
    head: list[Turn]
    tail: list[Turn]
    seam: list[int]
    row_classes: list[AxisClass]
    column_classes: list[AxisClass]

    def whole(self) -> tuple[AxisClass, AxisClass]:
        """The classes that the tail runs in."""
        return whole_class(self.graph, self.order, 0), whole_class(self.graph, self.order, 1)


def sweep_regions(graph: Graph, targets: tuple[int, ...], windows: Windows, device: str, delta: bool) -> SweepRegions:
    """Regions of all ancestors of ``targets`` under ``windows``, with classes for a device ("cpu", "cuda") and a form.

    Remembered with the graph: on a GPU the algebra takes longer than the sweep.
    """
    grid = tuple(edges.tobytes() for edges in (windows.tops, windows.bottoms, windows.lefts, windows.rights))
    return graph.remember(("regions", targets, grid, device, delta), lambda: _regions(graph, targets, windows, device, delta))


def _regions(graph: Graph, targets: tuple[int, ...], windows: Windows, device: str, delta: bool) -> SweepRegions:
    order = graph.ancestors(targets)
    rows = changed_spans(graph, order, 0, windows.tops, windows.bottoms)
    columns = changed_spans(graph, order, 1, windows.lefts, windows.rights)
    turns = schedule(graph, targets)
    behind: set[int] = set()
    for turn in turns:
        height, width = graph[turn.node].size
        share = rows.widths(turn.node).mean() / height * (columns.widths(turn.node).mean() / width)
        whole = isinstance(turn.op, Flatten) or (share >= WHOLE_SHARE and not isinstance(turn.op, Spatial))
        if turn.sources and (whole or not behind.isdisjoint(turn.sources)):
            behind.add(turn.node)
    head = [turn for turn in turns if turn.node not in behind]
    tail = [turn for turn in turns if turn.node in behind]
    seam = sorted({source for turn in tail for source in turn.sources} - behind)
    classes = [axis_classes(graph, head, axis, RATES.get(device, RATES["cpu"]), delta) for axis in (rows, columns)]
    return SweepRegions(graph, order, targets, rows, columns, head, tail, seam, classes[0], classes[1])


class Batch:
    """Some units that run together: all in one class of rows and one class of columns.

    ``row`` and ``column`` [U] index the members of the classes; ``image`` [U] the images of the cache; ``units`` [U, 3] are for
    those who ask what has changed in a class of whole maps.
    """

    def __init__(
        self, regions: SweepRegions, classes: tuple[AxisClass, AxisClass], row: np.ndarray, column: np.ndarray, image: Tensor,
        units: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        self.graph, self.classes, self.image = regions.graph, classes, image
        self._sweep, self._index, self._units = regions, (row, column), units
        self._regions: dict[int, Place] = {}

    def region(self, node: int) -> Place:
        """Where the patches of ``node`` lie."""
        if node not in self._regions:
            lows, sizes = zip(*((c.low[node], c.size[node]) for c in self.classes), strict=True)
            self._regions[node] = self._place(lows, sizes)
        return self._regions[node]

    def read(self, node: int, edge: int) -> Place:
        """Where the cells lie that the patches of ``node`` read from input ``edge``."""
        lows, sizes = zip(*(c.read(self.graph, node, edge) for c in self.classes), strict=True)
        return self._place(lows, sizes)

    def step(self, node: int, reads: list[Place]) -> Step:
        """What the operator of ``node`` is told about its windows."""
        return Step([Edge((0, 0), read.size) for read in reads], reads, self.region(node))

    def changed(self, node: int, axis: int) -> tuple[np.ndarray, np.ndarray]:
        """The exact changed interval of each unit on the map of ``node``, [U] and [U]."""
        assert self._units is not None
        low, high = (self._sweep.rows, self._sweep.columns)[axis].spans[node]
        position = self._units[:, 1 + axis]
        return low[position], high[position]

    def whole(self, node: int) -> bool:
        """Is the region of ``node`` its whole map?"""
        return self.region(node).size == self.graph[node].size

    def runs_whole(self, turn: Turn) -> bool:
        """Is there nothing but whole maps to read and to write?"""
        return self.whole(turn.node) and all(map(self.whole, turn.sources))

    def _place(self, lows: tuple[np.ndarray, ...], sizes: tuple[int, ...]) -> Place:
        low = np.stack([axis[index] for axis, index in zip(lows, self._index, strict=True)], 1)
        return Place(low, (sizes[0], sizes[1]))

    def origin(self, place: Place) -> Tensor:
        """``place.low`` [U, 2] as a tensor where the images are; the GPU is not waited for."""
        return torch.from_numpy(place.low).to(self.image.device, non_blocking=True)


def same_place(a: Place, b: Place) -> bool:
    """Do two batches of windows cover the same cells?"""
    return a.size == b.size and bool((a.low == b.low).all())


def peak_cells(graph: Graph, turns: Sequence[Turn], classes: tuple[AxisClass, AxisClass], keep: set[int]) -> int:
    """Cells per position that ``turns`` have alive at most: patches that are still read, and what a step reads and writes."""
    alive: dict[int, int] = {}
    peak = 0
    for turn in turns:
        channels = graph[turn.node].shape[0]
        own = channels * classes[0].size[turn.node] * classes[1].size[turn.node]
        step = 2 * own
        for edge, source in enumerate(turn.sources):
            reads = (kind.read(graph, turn.node, edge)[1] for kind in classes)
            step += 2 * graph[source].shape[0] * math.prod(reads)
        peak = max(peak, sum(alive.values()) + step)
        alive[turn.node] = own
        for source in turn.last_reads:
            if source not in keep:
                alive.pop(source, None)
    return peak
