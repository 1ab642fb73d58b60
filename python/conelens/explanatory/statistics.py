"""What images tell about a graph's layer: sums that add up, over blocks, workers, or both, in any order."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor


@dataclass
class Statistics:
    """Sufficient statistics of one E-step over some images, V = D * K nodes, U candidate parents; ``a + b`` merges.

    mass [V]: activity n owned by each node.  residual [V, 2]: sum of n (position - expected position), pixels.
    second [V]: sum of n |position - expected|^2.  likelihood: sum of F log P; activity: sum of F.
    moved [V, 2], spread [V]: sums of n d and n |d|^2 over images, d the node's displacement from its mean in an image.
    squares [V, U], pull [2, V, U]: sums of n |d - delta|^2 and n delta over the candidates' displacements delta.
    seen: what the release's criterion needs of each image instead: (first image, positions [I, V, 2] and scores [I, V] of the
        nodes, displacements [I, U, 2] of the candidates).
    """

    mass: Tensor
    residual: Tensor
    second: Tensor
    likelihood: float = 0.0
    activity: float = 0.0
    moved: Tensor | None = None
    spread: Tensor | None = None
    squares: Tensor | None = None
    pull: Tensor | None = None
    seen: list[tuple[int, Tensor, Tensor, Tensor]] = field(default_factory=list)

    def __add__(self, other: Statistics) -> Statistics:
        if not isinstance(other, Statistics):
            return NotImplemented
        merged = Statistics(*_sums(self, other))
        merged.seen.sort(key=lambda part: part[0])
        return merged


@dataclass
class Summary:
    """Where the nodes of a finished layer were found, summed over images; ``a + b`` merges.

    count: images.  score [V], position [V, 2], square [V]: sums of scores, positions, squared distances from the map's middle.
    """

    count: int
    score: Tensor
    position: Tensor
    square: Tensor

    def __add__(self, other: Summary) -> Summary:
        if not isinstance(other, Summary):
            return NotImplemented
        return Summary(*_sums(self, other))

    @classmethod
    def of(cls, positions: Tensor, scores: Tensor) -> Summary:
        """positions [I, V, 2] measured from the map's middle, so that the variance does not drown; scores [I, V]."""
        wide = positions.double()
        return cls(len(positions), scores.double().sum(0), wide.sum(0), wide.square().sum((0, 2)))

    @property
    def mean(self) -> Tensor:
        """[V, 2], from the map's middle."""
        return self.position / self.count

    @property
    def variance(self) -> Tensor:
        """[V]: of y plus of x."""
        return self.square / self.count - self.mean.square().sum(-1)


def _sums(a: Any, b: Any) -> list[Any]:
    """Field by field; what only one of them has is taken as it is."""
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(a)]
    return [x if y is None else y if x is None else x + y for x, y in pairs]


def nothing(nodes: int, device: torch.device) -> Statistics:
    """The neutral element."""
    zeros = torch.zeros(nodes, dtype=torch.float64, device=device)
    return Statistics(zeros, torch.zeros(nodes, 2, dtype=torch.float64, device=device), zeros.clone())


def nothing_of_parents(nodes: int, candidates: int, like: Tensor) -> Statistics:
    """The same with room for displacements."""
    zeros = nothing(nodes, like.device)
    zeros.moved, zeros.spread = zeros.residual.clone(), zeros.second.clone()
    zeros.squares, zeros.pull = like.new_zeros(nodes, candidates), like.new_zeros(2, nodes, candidates)
    return zeros
