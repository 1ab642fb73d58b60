"""A small graph made by hand, its placement, and photographs whose pixels tell where they are."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import torch

from conelens.explanatory.features import Grid
from conelens.explanatory.graph import ExplanatoryGraph
from conelens.explanatory.layer import GraphLayer, Placement
from conelens.explanatory.rules import rules_of

SIZE = 120
GRID = Grid((7.5, 7.5), (16.0, 16.0), (7, 7))


class Coordinates:
    """Photographs with y in the red, x in the green and their number in the blue channel."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.count

    def frame(self, index: int) -> np.ndarray:
        self.read.append(index)
        y, x = np.mgrid[:SIZE, :SIZE]
        return np.stack([y, x, np.full_like(y, index)], -1).astype(np.uint8)


def layer(name: str, filters: int, nodes: int, edges: object = None, strength: object = None) -> GraphLayer:
    """A layer whose node (d, k) stands at (10 + 10 d, 20 + 5 k), with sigma 4 + d + k / 2."""
    d, k = torch.meshgrid(torch.arange(filters), torch.arange(nodes), indexing="ij")
    mean = torch.stack([10.0 + 10 * d, 20.0 + 5 * k], -1)
    sigma = 4.0 + d + k / 2
    links = None if edges is None else torch.tensor(edges)
    weights = None if strength is None else torch.tensor(strength)
    return GraphLayer(name, GRID, mean, sigma, sigma, mean, links, weights, history=[-3.0, -2.0, -1.5])


def graph_of(*layers: GraphLayer) -> ExplanatoryGraph:
    """A graph of layers, bottom first."""
    return ExplanatoryGraph({layer.name: layer for layer in layers}, {}, {"rules": asdict(rules_of("recommended", None))})


def place(scores: object, seed: int = 0) -> Placement:
    """Scores [N, D, K] at random positions within the photographs."""
    values = torch.as_tensor(scores, dtype=torch.float32)
    positions = torch.rand(*values.shape, 2, generator=torch.Generator().manual_seed(seed)) * (SIZE - 1)
    return Placement(positions, values, values)


def small() -> tuple[ExplanatoryGraph, dict[str, Placement]]:
    """Layers low (3 filters x 2), middle (2 x 2), top (2 x 2), of two images.

    Ranks, by filter then node: top 4, 1 | 3, 9; middle 5, 6 | 2, 1; low 1, 2 | 3, 4 | 5, 0. Top node 1/1 (rank 9) has no nodes
    below it; nor has middle 1/1.
    """
    middle_edges = [[[0, 1], [0, 2]], [[2, 1], [1, 0]]]
    middle_strength = [[[0.9, 0.2], [0.5, 0.4]], [[0.8, 0.1], [0.3, -0.2]]]
    low_edges = [[[0, 1], [1, 0]], [[2, 0], [0, 2]], [[1, 2], [2, 0]]]
    low_strength = [[[0.5, 0.25], [1.0, 0.125]], [[0.5, 0.25], [0.25, 0.125]], [[0.5, 0.25], [0.5, 0.25]]]
    graph = graph_of(
        layer("low", 3, 2, low_edges, low_strength), layer("middle", 2, 2, middle_edges, middle_strength), layer("top", 2, 2)
    )
    ranks = {
        "low": [[1.0, 2.0], [3.0, 4.0], [5.0, 0.0]],
        "middle": [[5.0, 6.0], [2.0, 1.0]],
        "top": [[4.0, 1.0], [3.0, 9.0]],
    }
    share = torch.tensor([0.25, 0.75])[:, None, None]
    placements = {name: place(share * torch.tensor(value), seed) for seed, (name, value) in enumerate(ranks.items())}
    return graph, placements
