"""edge_scores on a GPU against the reference on the CPU in float64; TF32 must not get in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from conelens import ops
from conelens.kernels.edge_scores import reference


@pytest.fixture(params=[False, True], ids=["float32 products", "TF32 allowed"])
def _products(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = request.param
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("_products")
@pytest.mark.parametrize("kernel", [False, True], ids=["quadratic", "kernel"])
@pytest.mark.parametrize("size", [(300, 257, 600), (5, 64, 64), (1, 3, 5), (129, 1000, 33)], ids=str)
def test_matches_the_reference(size: tuple[int, int, int], kernel: bool) -> None:
    images, nodes, parents = size
    generator = torch.Generator().manual_seed(0)
    moved = 20 * torch.randn(images, 1, 2, generator=generator)
    displacement, parent = (moved + 3 * torch.randn(images, n, 2, generator=generator) for n in (nodes, parents))
    weight, bandwidth = torch.rand(images, nodes, generator=generator), 1 + 20 * torch.rand(nodes, generator=generator)
    given = bandwidth if kernel else None
    exact = [None if x is None else x.double() for x in (displacement, weight, parent, given)]
    wanted = reference.edge_scores(*exact)  # type: ignore[arg-type]
    centre = parent.double().mean(1, keepdim=True)
    around = [(x.double() - centre).square().sum(-1) for x in (displacement, parent)]
    weights = weight.double()
    terms = weights.sum(0)[:, None] if kernel else (weights * around[0]).sum(0)[:, None] + weights.t() @ around[1]
    on_gpu = [None if x is None else x.cuda() for x in (displacement, weight, parent, given)]
    with ops.require_kernels():
        found, again = (ops.edge_scores(*on_gpu[:3], bandwidth=on_gpu[3]) for _ in range(2))  # type: ignore[arg-type]
    assert torch.equal(found, again)
    assert (found >= 0).all()
    assert ((found.cpu() - wanted).abs() <= 1e-5 * terms).all()
