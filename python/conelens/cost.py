"""The checked-in cost model: cone or whole map, and how many units share one kernel sequence. Never measured at run time."""

from __future__ import annotations

import math

import numpy as np

from conelens.cone import cone_cells, cone_macs, unit_boxes, whole_macs
from conelens.graph import Graph

# Windows run a little below the speed of whole maps where the two are close enough to choose between (benchmarks/NOTES.md).
WINDOW_PENALTY = 1.1
# Map cells of all units of a chunk that may be alive at once: 128 MiB of float32 for a CPU's caches, 4 GiB to fill a GPU.
CHUNK_CELLS = {"cpu": 2**25, "cuda": 2**30}
# Cones of more work than this are sorted by how far they hang over each border, in this many steps of their size.
GROUPING_MACS = 2.0e8
HANG_STEPS = 4


def choose_route(graph: Graph, target: int, rows: np.ndarray) -> str:
    """ "cone" or "full", whichever forward pass the model expects to be cheaper for all units (image ``rows`` [U]) together."""
    cone = WINDOW_PENALTY * cone_macs(graph, target) * len(rows)
    full = whole_macs(graph, target) * len(set(rows.tolist()))
    return "cone" if cone < full else "full"


def chunks_of_units(graph: Graph, target: int, places: np.ndarray, device: str) -> list[np.ndarray]:
    """Indices of units [U, 2] that run together: bounded by the memory of their windows, and alike in what they leave out.

    Where cones are large, units that hang over the same borders share a chunk, so that what hangs over can be trimmed.
    """
    size = max(1, int(CHUNK_CELLS.get(device, CHUNK_CELLS["cpu"]) // (3 * cone_cells(graph, target))))
    order = np.arange(len(places))
    groups = [order]
    if len(places) > 1 and cone_macs(graph, target) > GROUPING_MACS:
        boxes = unit_boxes(graph, target, places)
        extent = np.array(graph[0].size)
        span = np.maximum(boxes[:, 2:] - boxes[:, :2], 1)
        hang = np.concatenate([np.maximum(-boxes[:, :2], 0) / span, np.maximum(boxes[:, 2:] - extent, 0) / span], 1)
        _, group = np.unique((hang * HANG_STEPS).astype(np.int64), axis=0, return_inverse=True)
        groups = [order[group.reshape(-1) == g] for g in range(int(group.max()) + 1)]
    return [members[start : start + size] for members in groups for start in range(0, len(members), size)]


def images_per_pass(graph: Graph, target: int, device: str) -> int:
    """Images of one whole forward pass, bounded by the memory of their maps."""
    cells = max(math.prod(graph[i].shape) for i in graph.ancestors((target,)))
    return max(1, int(CHUNK_CELLS.get(device, CHUNK_CELLS["cpu"]) // (3 * cells)))
