"""GPU rows of the explanatory graph's operations, at the sizes of VGG-16 layers on CUB."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu_measure import Machine, Row, compare, compiled
from conelens import ops

EXPONENTIALS = 3.7e9  # per ms: 16 per multiprocessor and clock on an H200
Grid = tuple[float, float, float, float]
FLOAT32 = 5.9e10  # operations per ms of float32 without tensor cores


def gathered(displacement: Tensor, sigma: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    precision = sigma.reciprocal().square()[edges]
    share = precision / precision.sum(-1, keepdim=True)
    moved = displacement[:, edges]
    shift = (share[..., None] * moved).sum(-2)
    spread = (moved - shift[..., None, :]).square().sum(-1)
    return shift, -0.5 * (precision * spread).mean(-1)


def collapse_row(machine: Machine, images: int, parents: int, nodes: int) -> Row:
    displacement, sigma = 20 * torch.randn(images, parents, 2, device="cuda"), 5 + torch.rand(parents, device="cuda")
    args = (displacement, sigma, torch.randint(0, parents, (nodes, 15), device="cuda"))
    out = ops.collapse_parents(*args)
    fused = torch.compile(gathered, dynamic=False)
    label = f"collapse 15 of {parents} for {nodes} nodes, {images} images"
    return compare(
        Row("graph", label, floor=sum(x.nbytes for x in (*args, *out)) / machine.copy),
        {"ours": lambda: ops.collapse_parents(*args, out=out).log_agreement},
        {"gather": lambda: gathered(*args)[1], "compile": lambda: fused(*args)[1]},
        1e-5,
    )


def collapses(machine: Machine) -> Iterator[Row]:
    for images, parents, nodes in ((64, 600, 20480), (64, 20480, 20480), (8, 600, 20480)):
        yield collapse_row(machine, images, parents, nodes)


def three_products(displacement: Tensor, weight: Tensor, parent: Tensor) -> Tensor:
    nodes = torch.cat([weight * displacement[..., 0], weight * displacement[..., 1], weight])
    parents = torch.cat([-2 * parent[..., 0], -2 * parent[..., 1], parent.square().sum(-1)])
    return torch.addmm((weight * displacement.square().sum(-1)).sum(0)[:, None], nodes.t(), parents)


def broadcast(displacement: Tensor, weight: Tensor, parent: Tensor, scale: Tensor) -> Tensor:
    squares = (displacement[:, :, None] - parent[:, None]).square().sum(-1)
    return (weight[..., None] * torch.exp(squares * scale[:, None])).sum(0)


def edges(machine: Machine) -> Iterator[Row]:
    images, nodes, parents = 500, 20480, 600
    displacement, parent = (10 * torch.randn(images, n, 2, device="cuda") for n in (nodes, parents))
    weight, bandwidth = torch.rand(images, nodes, device="cuda"), torch.full((nodes,), 400.0, device="cuda")
    args = (displacement, weight, parent)
    terms = images * nodes * parents
    label = f"{nodes} x {parents}, {images} images"
    yield compare(
        Row("graph", f"edge scores, quadratic, {label}", floor=6 * terms / FLOAT32),
        {"ours": lambda: ops.edge_scores(*args)},
        {"products": lambda: three_products(*args)},
        1e-5,
    )
    yield compare(
        Row("graph", f"edge scores, kernel, {label}", floor=terms / EXPONENTIALS),
        {"ours": lambda: ops.edge_scores(*args, bandwidth=bandwidth)},
        {"compile": compiled(broadcast, *args, -0.5 / bandwidth)},
        1e-5,
    )


def two_ways(
    features: Tensor, mean: Tensor, shift: Tensor, sigma: Tensor, weight: Tensor, tau: float, grid: Grid
) -> tuple[Tensor, Tensor]:
    """The separable E-step in matrix products -> second moment, log-likelihood."""
    centre, scale = mean + shift, (-0.5 / sigma.square())[..., None]
    y, x = (grid[a] + grid[2 + a] * torch.arange(features.shape[2 + a], device=features.device) for a in (0, 1))
    dy, dx = y - centre[..., 0, None], x - centre[..., 1, None]
    row, column = torch.exp(dy.square() * scale) * weight[..., None], torch.exp(dx.square() * scale)
    activity, total = features.clamp(min=0), row.mT @ column + tau
    evidence = activity / total
    moments = (column @ evidence.mT * row * dy.square()).sum(-1) + (row @ evidence * column * dx.square()).sum(-1)
    return moments, (activity * total.log()).sum((2, 3))


def e_step_row(machine: Machine, side: int, nodes: int, argmax: bool, images: int = 64, channels: int = 512) -> Row:
    shape, stride = (images, channels, nodes), 224 / side
    features, weight = torch.rand(images, channels, side, side, device="cuda"), torch.rand(shape, device="cuda")
    mean, shift = 224 * torch.rand(channels, nodes, 2, device="cuda"), 16 * torch.randn(*shape, 2, device="cuda")
    sigma, grid = 0.15 * 224 * (0.5 + torch.rand(channels, nodes, device="cuda")), (stride / 2, stride / 2, stride, stride)
    args = (features, mean, shift, sigma, weight, 0.1)
    out = tuple(x for x in ops.graph_e_step(*args, grid=grid, argmax=argmax) if x is not None)
    moved = sum(x.nbytes for x in (features, shift, weight, *out)) / machine.copy
    products = 6.0 * features[0, 0].numel() * weight.numel() / FLOAT32
    fused = torch.compile(two_ways, dynamic=False)
    promised = {14: 0.8, 28: 5.0}[side] * (2 if argmax else 1) * images / 1000
    return compare(
        Row("graph", f"E-step {side}x{side}, {nodes} nodes, {images} images{' arg-max' * argmax}", floor=max(moved, products),
            target=f"<= {promised:.2f} ms"),
        {"ours": lambda: ops.graph_e_step(*args, grid=grid, argmax=argmax, out=out).second},
        {"products": lambda: two_ways(*args, grid)[0], "compile": lambda: fused(*args, grid)[0]},
        1e-5,
    )  # fmt: skip


def e_steps(machine: Machine) -> Iterator[Row]:
    for argmax in (False, True):
        for side, nodes in ((14, 20), (28, 40)):
            yield e_step_row(machine, side, nodes, argmax)
