"""collapse_parents on a GPU against the reference on the CPU in float64."""

from __future__ import annotations

import pytest
import torch

from conelens import ops
from conelens.kernels.collapse_parents import reference


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("size", [(64, 20480, 20480), (33, 600, 1001), (8, 600, 20480), (1, 3, 5)], ids=str)
def test_matches_the_reference(size: tuple[int, int, int], index: torch.dtype) -> None:
    images, parents, nodes = size
    generator = torch.Generator().manual_seed(0)
    displacement = 1e3 + torch.randn(images, parents, 2, generator=generator)
    sigma = 1 + 9 * torch.rand(parents, generator=generator)
    edges = torch.randint(0, parents, (nodes, 15), generator=generator)
    wanted = reference.collapse_parents(displacement.double(), sigma.double(), edges)
    on_gpu = displacement.cuda(), sigma.cuda(), edges.to(index).cuda()
    with ops.require_kernels():
        found, again = (ops.collapse_parents(*on_gpu) for _ in range(2))
    for a, b, c in zip(found, again, wanted, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a.cpu().double(), c, rtol=2e-6, atol=1e-7)
    doubles = ops.collapse_parents(*(x.double() for x in on_gpu[:2]), on_gpu[2])
    torch.testing.assert_close(tuple(x.cpu() for x in doubles), wanted, rtol=1e-9, atol=1e-9)


def test_a_parent_that_is_not_there_gives_nan() -> None:
    edges = torch.tensor([[0, 1], [1, 2], [-1, 0]]).cuda()
    found = ops.collapse_parents(torch.ones(4, 2, 2).cuda(), torch.ones(2).cuda(), edges)
    assert found.sigma.isnan().tolist() == [False, True, True]
    assert found.shift.isnan().all(-1).tolist() == [[False, True, True]] * 4
