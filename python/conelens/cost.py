"""The checked-in cost model: cone or whole map, and how many units share one kernel sequence. Never measured at run time."""

from __future__ import annotations

import numpy as np

from conelens.cone import cone_macs, plan_cone, whole_macs
from conelens.graph import Graph

# A layer costs its multiply-accumulates plus a fixed launch and weight-reading cost, both in units of one MAC at full speed.
# Small windows run below the speed of whole maps; the factor was read off VGG-16 on two AVX-512 cores (benchmarks/NOTES.md).
LAYER_OVERHEAD = 2.0e6
WINDOW_PENALTY = 1.1
CHUNK_CELLS = 2**25  # map cells of all units of a chunk that may be alive at once (128 MiB in float32)


def choose_route(graph: Graph, target: int, positions: np.ndarray, rows: np.ndarray) -> str:
    """ "cone" or "full", whichever forward pass the model expects to be cheaper for all units together."""
    layers = len(graph.ancestors((target,)))
    images = len(np.unique(rows))
    middle = positions[len(positions) // 2][None]
    per_unit = cone_macs(graph, plan_cone(graph, target, middle))
    cone = WINDOW_PENALTY * per_unit * len(positions) + LAYER_OVERHEAD * layers
    full = whole_macs(graph, target) * images + LAYER_OVERHEAD * layers
    return "cone" if cone < full else "full"


def units_per_chunk(graph: Graph, target: int, positions: np.ndarray) -> list[tuple[int, int]]:
    """Ranges of units that run together, bounded by the memory their windows take."""
    plan = plan_cone(graph, target, positions[:1])
    cells = max(graph[i].shape[0] * h * w for i, (h, w) in ((i, p.size) for i, p in plan.places.items()))
    units = max(1, int(CHUNK_CELLS // (3 * cells)))
    return [(start, min(start + units, len(positions))) for start in range(0, len(positions), units)]
