"""Learning one layer of an explanatory graph: expectation-maximisation over streamed images (Zhang et al., Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from conelens import ops
from conelens.errors import DataError
from conelens.explanatory.features import Grid
from conelens.explanatory.layer import LEAST_MASS, TOP_SIGMA, Expected, Found, GraphLayer, Parents, Placement
from conelens.explanatory.rules import Rules
from conelens.explanatory.statistics import Statistics, Summary, nothing, nothing_of_parents

_BLOCK_BYTES = 256 << 20
_TABLE_CELLS = 1 << 24
_BORDER = 0.1  # of the map: candidates whose mean position lies there are left out


def blocks(images: int, channels: int, nodes: int, cells: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of images that are worked on at once: fixed by the sizes alone, so that a run repeats to the bit."""
    each = channels * (2 * cells + 40 * nodes)
    step = max(1, min(128, _BLOCK_BYTES // each))
    for start in range(0, images, step):
        yield start, min(start + step, images)


def _rows(nodes: int, candidates: int) -> Iterator[slice]:
    """Nodes of which a table [V, U] is worked on at once."""
    step = max(1, _TABLE_CELLS // max(1, candidates))
    for start in range(0, nodes, step):
        yield slice(start, min(start + step, nodes))


def first_layer_state(name: str, grid: Grid, channels: int, nodes: int, seed: int) -> GraphLayer:
    """Nodes on distinct random cells of each filter's map, without parents."""
    cells = grid.size[0] * grid.size[1]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(channels, cells, generator=generator).argsort(1)[:, :nodes]
    mean = grid.pixels(chosen)
    sigma = torch.full((channels, nodes), TOP_SIGMA * math.sqrt(cells) * grid.cell)
    layer = GraphLayer(name, grid, mean, sigma, sigma.clone(), mean.clone(), mean_score=0.0)
    layer.sigma = layer.sigma.clamp(*layer.least_sigma())
    return layer


class LayerFit:
    """A layer being learned from the images at hand.

    Over several workers, each makes one of its own images and begins with the same layer. In every iteration all add their
    ``statistics`` and everybody takes the same ``update``; then all add their ``summary``, everybody takes the same ``finish``
    and :func:`choose_candidates`, and has ``as_parents`` what the layer below needs.

    Args:
        layer: its state; changed in place by :meth:`update`.
        features: F [I, D, H, W] of the images at hand.
        rules: see :class:`Rules`.
        edges: parents per node.
        parents: the layer above in the images at hand; None for the top layer.
        first_image: number of the first image at hand among all.
    """

    def __init__(
        self,
        layer: GraphLayer,
        features: Tensor,
        rules: Rules,
        edges: int,
        parents: Parents | None,
        first_image: int = 0,
    ) -> None:
        self.layer = layer
        self.features = features
        self.rules = rules
        self.parents = parents
        self.edges = 0 if self.parents is None else min(edges, len(self.parents.nodes))
        self.first_image = first_image
        self._known: dict[int, float] = {}  # sum of F of each block, which iterations do not change
        self.device = layer.mean.device

    def _blocks(self) -> Iterator[tuple[int, Tensor, Parents | None]]:
        """(first image, features, parents) of what is worked on at once."""
        channels, nodes = self.layer.shape
        cells = self.layer.grid.size[0] * self.layer.grid.size[1]
        for start, stop in blocks(len(self.features), channels, nodes, cells):
            parents = None if self.parents is None else self.parents.part(start, stop)
            yield start, self.features[start:stop].to(self.device), parents

    def statistics(self) -> Statistics:
        """One E-step over the images at hand."""
        nodes, parents, by_kernel = self.layer.sigma.numel(), self.parents, self.rules.edges == "kernel"
        if parents is None or by_kernel:
            total = nothing(nodes, self.device)
        else:
            total = nothing_of_parents(nodes, len(parents.nodes), parents.displacement)
        for start, features, here in self._blocks():
            expected = self.layer.expect(self.rules, len(features), here)
            found = self.layer.find(features, expected, self.rules, argmax=by_kernel and here is not None)
            self._add(total, found, self.first_image + start, features)
            if here is not None:
                self._add_displacements(total, expected, found, self.first_image + start, here)
        if not bool(torch.isfinite(total.mass).all()):
            raise DataError(f"layer {self.layer.name}: its features hold NaN or infinity, from which nothing can be learned")
        return total

    def _add(self, total: Statistics, found: Found, first_image: int, features: Tensor) -> None:
        wide = torch.float64
        total.mass += found.mass.flatten(1).sum(0, dtype=wide)
        total.residual += found.first.flatten(1, 2).sum(0, dtype=wide)
        total.second += found.second.flatten(1).sum(0, dtype=wide)
        total.likelihood += float(found.log_likelihood.sum(dtype=wide))
        total.activity += self._activity(first_image, features)

    def _add_displacements(
        self, total: Statistics, expected: Expected, found: Found, first_image: int, parents: Parents
    ) -> None:
        """What the choice of parents needs."""
        if self.rules.edges == "kernel":
            assert found.positions is not None and found.scores is not None
            total.seen.append((first_image, found.positions.flatten(1, 2), found.scores.flatten(1), parents.displacement))
            return
        assert total.moved is not None and total.spread is not None and total.squares is not None and total.pull is not None
        mass = found.mass.flatten(1)
        own = found.first.flatten(1, 2) / mass.clamp(min=LEAST_MASS)[..., None]
        if expected.shift is not None:
            own = own + expected.shift.flatten(1, 2)
        weighted = mass[..., None] * own
        total.moved += weighted.sum(0, dtype=torch.float64)
        total.spread += (weighted * own).sum((0, 2), dtype=torch.float64)
        for rows in _rows(*total.squares.shape):
            total.squares[rows] += ops.edge_scores(own[:, rows], mass[:, rows], parents.displacement)
            for axis in (0, 1):
                total.pull[axis, rows].addmm_(mass[:, rows].T, parents.displacement[..., axis])

    def _activity(self, first_image: int, features: Tensor) -> float:
        if first_image not in self._known:
            self._known[first_image] = float(features.sum((2, 3), dtype=self.layer.mean.dtype).sum(dtype=torch.float64))
        return self._known[first_image]

    def update(self, total: Statistics, iteration: int) -> None:
        """The M-step: means move, spreads are estimated, parents are chosen anew. ``iteration`` counts from 1."""
        step = self.move(total, iteration)
        if self.parents is None:
            return
        if self.rules.edges == "kernel":
            self._choose_by_kernel(total)
        else:
            self._choose_by_likelihood(total, torch.zeros_like(step) if self.rules.edges_first else step)

    def move(self, total: Statistics, iteration: int) -> Tensor:
        """Means and spreads alone, at fixed parents: never lowers the likelihood. -> how far each mean went [V, 2]."""
        layer = self.layer
        layer.history.append(total.likelihood / max(total.activity, LEAST_MASS))
        mass = total.mass
        alive = mass >= LEAST_MASS  # the others keep their place
        offset = torch.where(alive[:, None], total.residual / mass.clamp(min=LEAST_MASS)[:, None], 0)
        share = torch.ones_like(mass)
        if self.rules.damped:
            sigma = layer.prior_sigma.flatten().double()
            share = (sigma.min() / sigma).square() / math.sqrt(iteration)
        step = share[:, None] * offset
        variance = total.second / mass.clamp(min=LEAST_MASS) - 2 * (step * offset).sum(-1) + step.square().sum(-1)
        sigma = (variance / 2).clamp(min=0).sqrt().clamp(*layer.least_sigma())
        layer.sigma = torch.where(alive, sigma, layer.sigma.flatten().double()).to(layer.sigma).view(layer.shape)
        layer.mean = layer.mean + step.to(layer.mean).view(layer.mean.shape)
        layer.anchor = layer.mean
        if self.parents is None and self.rules.top_sigma == "estimated":
            layer.prior_sigma = layer.sigma
        return step

    def _choose_by_likelihood(self, total: Statistics, step: Tensor) -> None:
        """Parents under which a node's own displacement d is most likely: per unit of its mass, log N(d; delta, sigma^2).

        The expected log-likelihood of a product of Gaussians is a sum over its factors, so that choosing one parent after the
        other, as the papers do, and choosing the best M at once is the same.
        """
        assert self.parents is not None and total.squares is not None and total.pull is not None
        assert total.moved is not None and total.spread is not None
        # displacements are counted from the means as they are now, not from where they were in the E-step
        moved, far = (step * total.moved).sum(-1), total.mass * step.square().sum(-1)
        shorter, spread = far - 2 * moved, total.spread - 2 * moved + far
        real = total.squares.dtype
        variance = self.parents.sigma.to(real).square()
        chosen = []
        for rows in _rows(*total.squares.shape):
            squares = total.squares[rows] + shorter[rows, None].to(real)
            for axis in (0, 1):
                squares.addcmul_(total.pull[axis, rows], step[rows, axis, None].to(real), value=2)
            explained = 1 - squares / spread[rows, None].to(real).clamp(min=LEAST_MASS)
            score = squares.div_(total.mass[rows, None].to(real).clamp(min=LEAST_MASS)).div_(-2 * variance).sub_(variance.log())
            chosen.append(self._best(score, explained))
        best, strength = (torch.cat(parts) for parts in zip(*chosen, strict=True))
        self._take(best, strength, total.mass >= LEAST_MASS)

    def _choose_by_kernel(self, total: Statistics) -> None:
        """The release's criterion (its §2.6): kernel consistency of relative displacements, from empirical mean positions."""
        positions, scores, parent = (torch.cat(parts) for parts in list(zip(*total.seen, strict=True))[1:])
        own = positions - positions.mean(0)
        together = (own * parent.mean(1)[:, None]).sum(-1).mean(0)
        distance = own.square().sum(-1).mean(0) + parent.square().sum(-1).mean() - 2 * together  # of all images and candidates
        kernel = ops.edge_scores(own.contiguous(), scores, parent, bandwidth=distance.clamp(min=1e-6))
        weight = scores.sum(0)
        self._take(*self._best(kernel, kernel / weight.clamp(min=1e-30)[:, None]), weight > 0)

    def _best(self, score: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
        """The candidates with the M best scores, best first, and their strengths."""
        best = score.topk(self.edges, dim=1).indices
        return best, strength.gather(1, best)

    def _take(self, best: Tensor, strength: Tensor, alive: Tensor) -> None:
        """Candidates ``best`` [V, M] become parents. Nodes without any mass keep the parents they have."""
        assert self.parents is not None
        layer, count = self.layer, self.edges
        edges, strength = self.parents.nodes[best], strength.to(layer.mean)
        if layer.edges is not None and layer.strength is not None:
            edges = torch.where(alive[:, None], edges, layer.edges.view(-1, count))
            strength = torch.where(alive[:, None], strength, layer.strength.view(-1, count))
        layer.edges, layer.strength = edges.view(*layer.shape, count), strength.view(*layer.shape, count)
        precision = self.parents.sigma.square().reciprocal()[self.parents.local[edges]]
        layer.prior_sigma = precision.mean(-1).rsqrt().view(layer.shape)

    def places(self) -> Iterator[tuple[Placement, Tensor]]:
        """Where the nodes are, and are as parents, block by block, with the layer as it is now."""
        for _, features, parents in self._blocks():
            yield self.layer.place(features, parents, self.rules)

    def summary(self) -> Summary:
        """Where the nodes of the learned layer are found in the images at hand; sums over workers as statistics do."""
        nobody = self.layer.mean.new_empty(0, self.layer.sigma.numel(), 2)
        total = Summary.of(nobody, nobody[..., 0])
        for placement, centres in self.places():
            total = total + summarise(self.layer, centres, placement.scores)
        return total

    def finish(self, summary: Summary) -> None:
        """Note of the learned layer what only all images together tell."""
        self.layer.mean_score = float(summary.score.sum() / (summary.count * len(summary.score))) or 1.0
        if self.rules.anchor == "empirical":
            self.layer.anchor = mean_positions(self.layer, summary)

    def as_parents(self, nodes: Tensor) -> Parents:
        """The candidates ``nodes`` of the finished layer in the images at hand, for the layer below."""
        positions = [self.layer.mean.new_empty(0, len(nodes), 2)]  # a worker may have no images
        positions += [centres.flatten(1, 2)[:, nodes] for _, centres in self.places()]
        return Parents.of(self.layer, nodes, torch.cat(positions))


def choose_candidates(layer: GraphLayer, summary: Summary, rules: Rules, edges: int) -> Tensor:
    """Which nodes [U] of a finished layer may become parents.

    With a pool: nodes that were never found are left out, those that move least (see :class:`Rules`), and those with a mean
    position within a tenth of the map from its border; of the rest the best by score. Fewer than ``edges`` left: as many as it
    takes by score alone, found ones first.
    """
    nodes = layer.sigma.numel()
    if rules.pool is None:
        return torch.arange(nodes, device=layer.mean.device)
    _, half = _frame(layer.grid)
    order = torch.sort(summary.score, descending=True, stable=True).indices
    found = summary.score > 0
    moving = torch.zeros(nodes, dtype=torch.bool, device=order.device)
    by_variance = torch.sort(torch.where(found, summary.variance, -1), descending=True, stable=True).indices
    moving[by_variance[: max(1, int(int(found.sum()) * (1 - rules.still)))]] = True
    inner = (summary.mean.abs() <= half.to(summary.mean) * (1 - 2 * _BORDER)).all(-1)
    kept = order[(found & moving & inner)[order]][: rules.pool]
    if len(kept) < min(edges, nodes):
        others = order[~torch.isin(order, kept)]
        kept = torch.cat((kept, others[: min(edges, nodes) - len(kept)]))
    return kept


def _frame(grid: Grid) -> tuple[Tensor, Tensor]:
    """Middle of the map and half its extent, (y, x) in pixels."""
    size, step = torch.tensor(grid.size), torch.tensor(grid.step)
    return torch.tensor(grid.start) + step * (size - 1) / 2, step * size / 2


def summarise(layer: GraphLayer, positions: Tensor, scores: Tensor) -> Summary:
    """A block's contribution to where the nodes are found: positions [I, D, K, 2] as parents, scores [I, D, K]."""
    middle, _ = _frame(layer.grid)
    return Summary.of((positions - middle.to(positions)).flatten(1, 2), scores.flatten(1))


def mean_positions(layer: GraphLayer, summary: Summary) -> Tensor:
    """Where the nodes were found on average [D, K, 2]: what the release measures displacements from."""
    middle, _ = _frame(layer.grid)
    return (summary.mean + middle.to(summary.mean)).to(layer.mean).view(layer.mean.shape)
