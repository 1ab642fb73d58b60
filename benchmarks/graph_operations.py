"""Cases of the explanatory graph's operations, each against every stock spelling of the same job that we know of. float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case, Floor, Target, compiled
from conelens import ops
from conelens.kernels.graph_e_step.reference import graph_e_step

IMAGES, NODES, CANDIDATES, EDGES = 64, 20480, 600, 15  # a block of images, a 28x28 layer of VGG-16 (512 x 40), the pool, M
Results = tuple[Tensor, Tensor, Tensor]


# --- collapse of parents --------------------------------------------------------------------------


@dataclass
class CollapseInputs:
    displacement: Tensor
    sigma: Tensor
    edges: Tensor
    out: Results


def _collapse_inputs(images: int, parents: int) -> CollapseInputs:
    generator = torch.Generator().manual_seed(0)
    displacement = 20 * torch.randn(images, parents, 2, generator=generator)
    sigma = 5 + 10 * torch.rand(parents, generator=generator)
    edges = torch.randint(0, parents, (NODES, EDGES), generator=generator)
    return CollapseInputs(displacement, sigma, edges, tuple(ops.collapse_parents(displacement, sigma, edges)))


def _shares(sigma: Tensor, edges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    precision = sigma.reciprocal().square()[edges]
    mean = precision.mean(-1)
    return precision, precision / (EDGES * mean[:, None]), mean


def _gather(displacement: Tensor, sigma: Tensor, edges: Tensor) -> Results:
    precision, share, mean = _shares(sigma, edges)
    moved = displacement[:, edges]
    shift = (share[..., None] * moved).sum(-2)
    spread = (moved - shift[..., None, :]).square().sum(-1)
    return shift, mean.rsqrt(), -0.5 / EDGES * (precision * spread).sum(-1)


def _moments(displacement: Tensor, mean: Tensor, sums: Tensor) -> Results:
    """Results of the sums of shares times (y, x, y^2 + x^2), [V, 3 I]; views, so that their layout costs nobody anything."""
    images = displacement.shape[0]
    shift, squares = sums[:, : 2 * images].view(-1, images, 2), sums[:, 2 * images :]
    agreement = -0.5 * mean[:, None] * (squares - shift.square().sum(-1))
    return shift.transpose(0, 1), mean.rsqrt(), agreement.t()


def _table(displacement: Tensor) -> Tensor:
    """(y, x) of all images, then y^2 + x^2 of all: [U, 3 I]."""
    of_parents = displacement.transpose(0, 1)
    return torch.cat([of_parents.flatten(1), of_parents.square().sum(-1)], 1)


def _bags(displacement: Tensor, sigma: Tensor, edges: Tensor) -> Results:
    _, share, mean = _shares(sigma, edges)
    sums = F.embedding_bag(edges, _table(displacement), per_sample_weights=share, mode="sum")
    return _moments(displacement, mean, sums)


def _sparse(displacement: Tensor, sigma: Tensor, edges: Tensor) -> Results:
    _, share, mean = _shares(sigma, edges)
    rows = torch.arange(0, edges.numel() + 1, EDGES)
    shape = (edges.shape[0], displacement.shape[1])
    matrix = torch.sparse_csr_tensor(rows, edges.flatten(), share.flatten(), shape, check_invariants=False)
    return _moments(displacement, mean, matrix @ _table(displacement))


def collapse_case(images: int, parents: int) -> Case:
    compiled_gather = compiled(_gather)

    def floor(i: CollapseInputs) -> Floor:
        return Floor("bytes", float(sum(t.nbytes for t in (i.displacement, i.edges, *i.out))))

    return Case(
        section="Collapse of parents",
        name=f"{EDGES} of {parents} parents for {NODES} nodes in {images} images",
        inputs=lambda: _collapse_inputs(images, parents),
        ours={
            "conelens": lambda i: ops.collapse_parents(i.displacement, i.sigma, i.edges),
            "conelens reused": lambda i: ops.collapse_parents(i.displacement, i.sigma, i.edges, out=i.out),
        },
        others={
            "gather": lambda i: _gather(i.displacement, i.sigma, i.edges),
            "torch.compile": lambda i: compiled_gather(i.displacement, i.sigma, i.edges),
            "embedding_bag": lambda i: _bags(i.displacement, i.sigma, i.edges),
            "sparse matrix": lambda i: _sparse(i.displacement, i.sigma, i.edges),
        },
        read=lambda _, result: tuple(result),
        floor=floor,
        tolerance=1e-5,
        note="embedding_bag and the sparse matrix take a difference of squares, which fails where displacements nearly agree",
    )


# --- edge scores ----------------------------------------------------------------------------------


@dataclass
class EdgeInputs:
    displacement: Tensor
    weight: Tensor
    parent: Tensor
    bandwidth: Tensor
    out: Tensor


def _edge_inputs(images: int, nodes: int) -> EdgeInputs:
    generator = torch.Generator().manual_seed(0)
    displacement, parent = (10 * torch.randn(images, n, 2, generator=generator) for n in (nodes, CANDIDATES))
    weight = torch.rand(images, nodes, generator=generator)
    bandwidth = displacement.square().sum(-1).mean(0) + parent.square().sum(-1).mean()  # the release's rule
    return EdgeInputs(displacement, weight, parent, bandwidth, torch.empty(nodes, CANDIDATES))


def _three_products(i: EdgeInputs) -> Tensor:
    """One matrix product over axes and images: what one writes who does not mind rounding."""
    d, p = i.displacement, i.parent
    nodes = torch.cat([i.weight * d[..., 0], i.weight * d[..., 1], i.weight])
    parents = torch.cat([-2 * p[..., 0], -2 * p[..., 1], p.square().sum(-1)])
    return torch.addmm((i.weight * d.square().sum(-1)).sum(0)[:, None], nodes.t(), parents)


def _image_by_image(i: EdgeInputs, kernel: bool) -> Tensor:
    total, scale = torch.zeros(i.displacement.shape[1], CANDIDATES), -0.5 / i.bandwidth[:, None]
    for d, w, p in zip(i.displacement, i.weight, i.parent, strict=True):
        terms = torch.cdist(d, p, compute_mode="donot_use_mm_for_euclid_dist").square_()
        if kernel:
            terms.mul_(scale).exp_()
        total.addcmul_(terms, w[:, None])
    return total


def _products_then_exp(i: EdgeInputs) -> Tensor:
    """Squares of one image by a matrix product: |d|^2 + |p|^2 - 2 d p in four columns."""
    total, scale = torch.zeros(i.displacement.shape[1], CANDIDATES), -0.5 / i.bandwidth[:, None]
    terms = torch.empty_like(total)
    for d, w, p in zip(i.displacement, i.weight, i.parent, strict=True):
        left = torch.cat([-2 * d, d.square().sum(-1, keepdim=True), torch.ones(len(d), 1)], 1).mul_(scale)
        right = torch.cat([p, torch.ones(len(p), 1), p.square().sum(-1, keepdim=True)], 1)
        torch.mm(left, right.t(), out=terms)
        total.addcmul_(terms.exp_(), w[:, None])
    return total


def _broadcast(d: Tensor, weight: Tensor, parent: Tensor, bandwidth: Tensor | None) -> Tensor:
    squares = (d[:, :, None] - parent[:, None]).square().sum(-1)
    terms = squares if bandwidth is None else torch.exp(squares * (-0.5 / bandwidth)[:, None])
    return (weight[..., None] * terms).sum(0)


def edge_case(kernel: bool) -> Case:
    fused = compiled(_broadcast)
    steps = 10 if kernel else 3  # multiply-adds of a term: of its square, an exponential's polynomial, the sum

    def ours(i: EdgeInputs, out: Tensor | None = None) -> Tensor:
        bandwidth = i.bandwidth if kernel else None
        return ops.edge_scores(i.displacement, i.weight, i.parent, bandwidth=bandwidth, out=out)

    others: dict[str, Any] = {
        "image by image": lambda i: _image_by_image(i, kernel),
        "torch.compile": lambda i: fused(i.displacement, i.weight, i.parent, i.bandwidth if kernel else None),
    }
    others |= {"products, exp": _products_then_exp} if kernel else {"three products": _three_products}
    return Case(
        section="Edge scores",
        name=f"{'kernel' if kernel else 'quadratic'} criterion, {NODES} nodes x {CANDIDATES} candidates, {IMAGES} images",
        inputs=lambda: _edge_inputs(IMAGES, NODES),
        ours={"conelens": ours, "conelens reused": lambda i: ours(i, i.out)},
        others=others,
        read=lambda _, result: (result,),
        floor=lambda i: Floor("flops", 2.0 * steps * i.weight.numel() * CANDIDATES),
        tolerance=1e-5,
        check_inputs=lambda: _edge_inputs(IMAGES, NODES // 16),
        check_part=1 / 16,
    )


# --- E-step ---------------------------------------------------------------------------------------

CHANNELS = 512
LAYERS = {14: (8, 20), 28: (4, 40)}  # VGG-16 at 224 pixels, side of the map: images, nodes of a channel


@dataclass
class StepInputs:
    features: Tensor
    mean: Tensor
    shift: Tensor | None
    sigma: Tensor
    weight: Tensor
    tau: Tensor
    grid: tuple[float, float, float, float]
    out: Any = ()

    @property
    def nodes(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
        return self.mean, self.shift, self.sigma, self.weight, self.tau


def _step_inputs(side: int, images: int, shifted: bool, lit: float, argmax: bool) -> StepInputs:
    """Activity anywhere, or, as behind a ReLU, in spots that cover the share `lit` of the cells."""
    generator = torch.Generator().manual_seed(0)
    nodes, stride = LAYERS[side][1], 224 / side
    features = torch.rand(images, CHANNELS, side, side, generator=generator)
    if lit < 1:
        smooth = F.avg_pool2d(torch.randn(images, CHANNELS, side + 2, side + 2, generator=generator), 3, 1)
        features = (smooth - smooth.flatten()[::97].quantile(1 - lit)).clamp_(min=0)
    shape = (images, CHANNELS, nodes)
    inputs = StepInputs(
        features,
        224 * torch.rand(CHANNELS, nodes, 2, generator=generator),
        16 * torch.randn(*shape, 2, generator=generator) if shifted else None,
        0.15 * 224 * (0.5 + torch.rand(CHANNELS, nodes, generator=generator)),
        torch.rand(shape, generator=generator),
        torch.full((images,), 0.1),
        (stride / 2, stride / 2, stride, stride),
    )
    results = ops.graph_e_step(inputs.features, *inputs.nodes, grid=inputs.grid, argmax=argmax)
    inputs.out = tuple(x for x in results if x is not None)
    return inputs


def _axes(features: Tensor, mean: Tensor, shift: Tensor | None, sigma: Tensor, grid: Any) -> tuple[Tensor, ...]:
    """Distances from the nodes and Gaussians of them, along y and along x: [I or 1, D, K, H or W] each."""
    centre = mean[None] if shift is None else mean + shift
    y, x = (grid[axis] + grid[2 + axis] * torch.arange(features.shape[2 + axis]) for axis in (0, 1))
    dy, dx = y - centre[..., 0, None], x - centre[..., 1, None]
    scale = (-0.5 / sigma.square())[..., None]
    return dy, dx, torch.exp(dy.square() * scale), torch.exp(dx.square() * scale)


def _flat(x: Tensor, images: int) -> Tensor:
    return x.expand(images, *x.shape[1:]).flatten(0, 1)


def _evidence(features: Tensor, gy: Tensor, gx: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.bmm(gy.mT, gx).view(features.shape) + tau[:, None, None, None]
    activity = features.clamp(min=0)
    return (activity / total).flatten(0, 1), (activity * total.log()).sum((2, 3))


def _two_ways(
    features: Tensor, mean: Tensor, shift: Tensor | None, sigma: Tensor, weight: Tensor, tau: Tensor, grid: Any
) -> Any:
    """Three products: the densities, their evidence down the columns, and along the rows."""
    images = features.shape[0]
    dy, dx, gy, gx = _axes(features, mean, shift, sigma, grid)
    row, column = _flat(gy * weight[..., None], images), _flat(gx, images)
    evidence, likelihood = _evidence(features, row, column, tau)
    down = (torch.bmm(row, evidence) * column).view(*weight.shape, -1)
    along = (torch.bmm(column, evidence.mT) * row).view(*weight.shape, -1)
    moment_y, moment_x = along * dy, down * dx
    first = torch.stack((moment_y.sum(-1), moment_x.sum(-1)), -1)
    return down.sum(-1), first, (moment_y * dy).sum(-1) + (moment_x * dx).sum(-1), likelihood


def _stacked(
    features: Tensor, mean: Tensor, shift: Tensor | None, sigma: Tensor, weight: Tensor, tau: Tensor, grid: Any
) -> Any:
    """Two products, the second three times as tall: Gaussians of y times 1, distance and its square."""
    images = features.shape[0]
    dy, dx, gy, gx = _axes(features, mean, shift, sigma, grid)
    row = gy * weight[..., None]
    evidence, likelihood = _evidence(features, _flat(row, images), _flat(gx, images), tau)
    tall = torch.cat((row, row * dy, row * dy * dy), 2).flatten(0, 1)
    sums = torch.bmm(tall, evidence).view(*weight.shape[:2], 3, weight.shape[2], -1) * gx[:, :, None]
    moment = sums[:, :, 0] * dx
    mass, first_y, second_y = sums.sum(-1).unbind(2)
    return mass, torch.stack((first_y, moment.sum(-1)), -1), second_y + (moment * dx).sum(-1), likelihood


def _largest(
    features: Tensor, mean: Tensor, shift: Tensor | None, sigma: Tensor, weight: Tensor, tau: Tensor, grid: Any
) -> Any:
    """Three products, and the maximum over all cells and nodes by broadcasting."""
    _, _, gy, gx = _axes(features, mean, shift, sigma, grid)
    density = (gy * weight[..., None])[..., None] * gx[..., None, :]
    score, position = (density * features.clamp(min=0)[:, :, None]).flatten(-2).max(-1)
    return *_two_ways(features, mean, shift, sigma, weight, tau, grid), position, score


def _dense(features: Tensor, mean: Tensor, shift: Tensor | None, sigma: Tensor, weight: Tensor, tau: Tensor, grid: Any) -> Any:
    """Every density of every cell written out, one image at a time."""
    arguments = zip(features, shift if shift is not None else [None] * len(features), weight, tau, strict=True)
    images = (
        graph_e_step(f[None], mean, None if s is None else s[None], sigma, w[None], t[None], grid, False)
        for f, s, w, t in arguments
    )
    return [torch.cat(parts) for parts in zip(*images)][:4]


def step_case(side: int, *, shifted: bool = True, lit: float = 1.0, argmax: bool = False) -> Case:
    images, nodes = LAYERS[side]
    plain = _largest if argmax else _two_ways
    fused = compiled(plain)
    kind = ("" if lit == 1 else f", {lit:.0%} lit") + ("" if shifted else ", no shift") + (", arg-max" if argmax else "")

    def stock(function: Any) -> Any:
        return lambda i: function(i.features, *i.nodes, i.grid)

    others = {"bmm": stock(plain), "torch.compile": stock(fused)}
    if not argmax:
        others |= {"bmm, stacked": stock(_stacked), "dense": stock(_dense)}
    return Case(
        section="E-step",
        name=f"{side}x{side}, {nodes} nodes of {CHANNELS} channels in {images} images{kind}",
        inputs=lambda: _step_inputs(side, images, shifted, lit, argmax),
        ours={
            "conelens": lambda i: ops.graph_e_step(i.features, *i.nodes, grid=i.grid, argmax=argmax),
            "conelens reused": lambda i: ops.graph_e_step(i.features, *i.nodes, grid=i.grid, argmax=argmax, out=i.out),
        },
        others=others,
        read=lambda _, result: tuple(
            x for x in result if x is not None and x.is_floating_point()
        ),  # ties fall as rounding has it
        floor=lambda i: Floor("flops", 6.0 * i.features[0, 0].numel() * i.weight.numel()),
        tolerance=1e-5,
        targets=(Target("conelens", 3.0, ("bmm",)),) if shifted and lit == 1 and not argmax else (),
        check_inputs=lambda: _step_inputs(side, 1, shifted, lit, argmax),
        check_part=1 / images,
    )


def cases() -> list[Case]:
    return [
        collapse_case(16, NODES),
        collapse_case(IMAGES, CANDIDATES),
        edge_case(kernel=False),
        edge_case(kernel=True),
        *(step_case(side) for side in LAYERS),
        *(step_case(side, argmax=True) for side in LAYERS),
        *(step_case(side, lit=0.15) for side in LAYERS),
        step_case(14, shifted=False),
    ]
