"""One layer of an explanatory graph: its nodes, what they expect in an image, and where they are found there."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from conelens import ops
from conelens.explanatory.features import Grid
from conelens.explanatory.lattice import lattice_mass, lattice_step
from conelens.explanatory.rules import Rules

LEAST_MASS = 1e-8  # activity below which a node owns nothing
TOP_SIGMA = 0.15  # of the map's side: spread of a node without parents
_LEAST_LOG_WEIGHT = -60.0  # where no parents agree, something must own the activity all the same, within float32
_LEAST_SPREAD = 0.1  # of the distance between the nodes of a filter


class Placement(NamedTuple):
    """Where the nodes of a layer are in N images.

    positions [N, D, K, 2] float32: (y, x) in pixels of the network's input.
    scores [N, D, K] float32: activity times density of the unit taken, S = F(x) P(x | V, R); 0: the node is nowhere in this
        image, and its position is where it was expected.
    activations [N, D, K] float32: the normalised activity F of that unit.
    """

    positions: Tensor
    scores: Tensor
    activations: Tensor

    def __repr__(self) -> str:
        return f"Placement({', '.join(f'{name} {list(value.shape)}' for name, value in self._asdict().items())})"


class Expected(NamedTuple):
    """What a layer expects in some images, given its parents there: arguments of the E-step."""

    shift: Tensor | None  # [I, D, K, 2]
    sigma: Tensor  # [D, K]
    weight: Tensor  # [I, D, K]
    tau: Tensor  # [I]


class Found(NamedTuple):
    """An E-step's sums, and with them positions [I, D, K, 2] in pixels and scores [I, D, K] where they were asked for."""

    mass: Tensor
    first: Tensor
    second: Tensor
    log_likelihood: Tensor
    positions: Tensor | None
    scores: Tensor | None


@dataclass
class GraphLayer:
    """The nodes of one layer: K part patterns for each of its D filters. Pixels, (y, x).

    mean [D, K, 2]: prior position mu.
    sigma [D, K]: spread estimated from the images, with which a node constrains its children.
    prior_sigma [D, K]: spread of the node's own density (of its parents together, or 0.15 of the map in the top layer).
    anchor [D, K, 2]: position from which its displacement is measured.
    edges [D, K, M] int64 into the flattened D' * K' nodes of the layer above, strongest first; None in the top layer.
    strength [D, K, M]: share of the node's movement that the parent explains, at most 1 (the release's criterion: mean kernel).
    mean_score: mean of all scores over the images it was fitted on; scores divided by it compare between layers;
        0 while the layer is being learned.
    history: log-likelihood per unit of activity at each iteration.
    """

    name: str
    grid: Grid
    mean: Tensor
    sigma: Tensor
    prior_sigma: Tensor
    anchor: Tensor
    edges: Tensor | None = None
    strength: Tensor | None = None
    mean_score: float = 1.0
    history: list[float] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int]:
        """(D, K)"""
        return self.mean.shape[0], self.mean.shape[1]

    def to(self, device: torch.device | str) -> GraphLayer:
        """The same layer on another device."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def least_sigma(self) -> tuple[float, float]:
        """Bounds of ``sigma``: 0.1 to 1 times the distance between a filter's nodes if they were spread evenly."""
        apart = math.sqrt(self.grid.size[0] * self.grid.size[1] / self.mean.shape[1]) * self.grid.cell
        return _LEAST_SPREAD * apart, apart

    def expect(self, rules: Rules, images: int, parents: Parents | None) -> Expected:
        """What the nodes expect in ``images`` images, of which ``parents`` tells the displacements."""
        if self.edges is None or parents is None:
            shift, sigma = None, self.prior_sigma
            weight = _area(sigma).reciprocal().expand(images, *sigma.shape)
        else:
            edges = parents.local[self.edges].flatten(0, 1)
            shift, sigma, log_agreement = ops.collapse_parents(parents.displacement, parents.sigma, edges)
            each = parents.sigma.log()[edges]
            if rules.weight == "agreement":
                log_weight = -_area(sigma).log()
            elif rules.weight == "geometric":
                log_weight = -(2 * each.mean(-1) + math.log(2 * math.pi))
            else:  # over its own mean, as products of fifteen factors leave the range of float32
                log_weight = sigma.log() - each.sum(-1)
                log_weight = log_weight - log_weight.mean()
            weight = (log_agreement + log_weight).clamp_(min=_LEAST_LOG_WEIGHT).exp_().view(images, *self.shape)
            shift, sigma = shift.view(images, *self.shape, 2), sigma.view(self.shape)
        cell = self.grid.step[0] * self.grid.step[1]
        if rules.noise_scale == "absolute":
            tau = weight.new_full((images,), rules.noise / cell)
        else:
            whole = lattice_mass(sigma, self.sigma, self.grid) if rules.domain == "lattice" else _area(sigma) / cell
            tau = rules.noise * (weight * whole).mean((1, 2))
        return Expected(shift, sigma, weight, tau)

    def find(self, features: Tensor, expected: Expected, rules: Rules, argmax: bool) -> Found:
        """One E-step over features [I, D, H, W]; with ``argmax`` also where each node is in each image."""
        arguments = (features, self.mean, expected.shift, expected.sigma, expected.weight, expected.tau)
        if rules.domain == "lattice":
            return Found(*lattice_step(*arguments, self.grid, self.sigma))
        found = ops.graph_e_step(*arguments, grid=self.grid.numbers, argmax=argmax)
        positions = None
        if argmax:
            nowhere = (found.position < 0)[..., None]
            positions = torch.where(nowhere, self._prior(expected), self.grid.pixels(found.position.clamp(min=0)))
        return Found(found.mass, found.first, found.second, found.log_likelihood, positions, found.score)

    def place(self, features: Tensor, parents: Parents | None, rules: Rules) -> tuple[Placement, Tensor]:
        """Where the nodes are in features [I, D, H, W]: S_V = max over units of F(x) P(x | V, R), as in the papers.

        Beside it where they are as parents [I, D, K, 2]: there, or in the middle of the activity that they own.
        """
        expected = self.expect(rules, len(features), parents)
        found = self.find(features, expected, rules, argmax=True)
        assert found.positions is not None and found.scores is not None
        cells = self.grid.cells(found.positions).flatten(2)  # [I, D, K]
        activity = features.flatten(2).gather(2, cells).to(self.mean.dtype).clamp_(min=0)
        placement = Placement(found.positions, found.scores, activity.masked_fill_(found.scores == 0, 0))
        if rules.parents == "unit":
            return placement, found.positions
        return placement, self._prior(expected) + found.first / found.mass.clamp(min=LEAST_MASS)[..., None]

    def _prior(self, expected: Expected) -> Tensor:
        """Where the nodes are expected, [I, D, K, 2], or [D, K, 2] where that is the same in all images."""
        return self.mean if expected.shift is None else self.mean + expected.shift


class Parents(NamedTuple):
    """What children need of the layer above in some images: its candidate nodes alone."""

    displacement: Tensor  # [I, U, 2]
    sigma: Tensor  # [U]
    nodes: Tensor  # [U] int64: which nodes of the layer above the candidates are
    local: Tensor  # [D' * K'] int64: the candidate's number of each node, -1 for the others

    @classmethod
    def of(cls, above: GraphLayer, nodes: Tensor, positions: Tensor) -> Parents:
        """Candidates ``nodes`` [U] of a layer, found at ``positions`` [I, U, 2]."""
        local = torch.full((above.sigma.numel(),), -1, dtype=torch.int64, device=nodes.device)
        local[nodes] = torch.arange(len(nodes), device=nodes.device)
        displacement = positions - above.anchor.flatten(0, 1)[nodes]
        return cls(displacement, above.sigma.flatten()[nodes], nodes, local)

    def part(self, start: int, stop: int) -> Parents:
        """Of images [start, stop)."""
        return self._replace(displacement=self.displacement[start:stop])


def _area(sigma: Tensor) -> Tensor:
    """The integral of exp(-r^2 / (2 sigma^2))."""
    return 2 * math.pi * sigma.square()
