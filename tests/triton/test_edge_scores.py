"""The Triton edge_scores in the interpreter against the reference in float64, inside guarded buffers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from conelens import ops
from conelens.kernels.edge_scores import reference
from tests.kit.compare import packed_in_guards

pytest.importorskip("triton", reason="needs conelens[triton]")

from conelens.kernels.edge_scores import triton_kernel

SIZES = [(1, 1, 1), (3, 5, 7), (130, 33, 70), (5, 64, 64), (2, 31, 129), (0, 3, 4)]  # images, nodes, parents


def problem(images: int, nodes: int, parents: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    displacement, parent = (20 + 3 * torch.randn(images, n, 2, generator=generator) for n in (nodes, parents))
    weight, bandwidth = torch.rand(images, nodes, generator=generator), 1 + 20 * torch.rand(nodes, generator=generator)
    return displacement, weight, parent, bandwidth


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_the_reference(size: tuple[int, int, int]) -> None:
    args = problem(*size)
    wanted = reference.edge_scores(*(x.double() for x in args))
    with packed_in_guards(wanted.float()) as (out,):
        assert triton_kernel.run(*args, out=out) is out
    assert ((out - wanted).abs() <= 1e-6 * args[1].double().sum(0)[:, None]).all()


def test_nan_stays_where_it_belongs() -> None:
    displacement, weight, parent, bandwidth = problem(5, 20, 50)
    displacement[3, 4, 1] = weight[1, 9] = parent[2, 33, 0] = bandwidth[11] = math.nan
    wanted = torch.zeros(20, 50, dtype=torch.bool)
    wanted[[4, 9, 11]] = wanted[:, 33] = True
    assert torch.equal(triton_kernel.run(displacement, weight, parent, bandwidth).isnan(), wanted)


def test_the_operation_runs_it_when_asked_and_matrix_products_without_bandwidth() -> None:
    displacement, weight, parent, bandwidth = problem(4, 6, 5)
    for given in (None, bandwidth):
        with ops.use_backend("triton"):
            found = ops.edge_scores(displacement, weight, parent, bandwidth=given)
            assert ops.edge_scores(displacement, weight, parent[:, :0], bandwidth=given).shape == (6, 0)
        torch.testing.assert_close(found, ops.edge_scores(displacement, weight, parent, bandwidth=given))
    double = displacement.double()
    assert "float64" in (triton_kernel.supports(double, weight, parent, bandwidth) or "")
    assert triton_kernel.supports(double, weight, parent, None) is None
