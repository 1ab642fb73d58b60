"""The checked-in cost model: cone or whole map, and how many units share one kernel sequence. Never measured at run time."""

from __future__ import annotations

import numpy as np

from conelens.cone import cone_cells, cone_macs, whole_macs
from conelens.graph import Graph

# A layer costs its multiply-accumulates plus a fixed launch and weight-reading cost, both in units of one MAC at full speed.
# Small windows run below the speed of whole maps; the factor was read off VGG-16 on two AVX-512 cores (benchmarks/NOTES.md).
LAYER_OVERHEAD = 2.0e6
WINDOW_PENALTY = 1.1
# Map cells of all units of a chunk that may be alive at once: 128 MiB of float32 for a CPU's caches, 4 GiB to fill a GPU.
CHUNK_CELLS = {"cpu": 2**25, "cuda": 2**30}


def choose_route(graph: Graph, target: int, rows: np.ndarray) -> str:
    """ "cone" or "full", whichever forward pass the model expects to be cheaper for all units (image ``rows`` [U]) together."""
    layers = LAYER_OVERHEAD * len(graph.ancestors((target,)))
    cone = WINDOW_PENALTY * cone_macs(graph, target) * len(rows) + layers
    full = whole_macs(graph, target) * len(set(rows.tolist())) + layers
    return "cone" if cone < full else "full"


def units_per_chunk(graph: Graph, target: int, units: int, device: str) -> list[tuple[int, int]]:
    """Ranges of units that run together, bounded by the memory their windows take."""
    size = max(1, int(CHUNK_CELLS.get(device, CHUNK_CELLS["cpu"]) // (3 * cone_cells(graph, target))))
    return [(start, min(start + size, units)) for start in range(0, units, size)]
