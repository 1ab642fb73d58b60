"""GPU rows of the explanatory graph's collapse of parents and edge scores, at the sizes of a VGG-16 layer on CUB."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu_measure import Machine, Row, compare, compiled
from conelens import ops

EXPONENTIALS = 3.7e9  # per ms: 16 per multiprocessor and clock on an H200
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
