"""The Triton collapse_parents in the interpreter against the reference in float64, inside guarded buffers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from conelens import ops
from conelens.kernels.collapse_parents import reference
from tests.kit.compare import packed_in_guards

pytest.importorskip("triton", reason="needs conelens[triton]")

from conelens.kernels.collapse_parents import triton_kernel

SIZES = [(1, 1, 1, 1), (3, 5, 7, 2), (33, 40, 70, 15), (8, 9, 32, 3), (40, 3, 31, 4)]  # images, parents, nodes, edges


def problem(images: int, parents: int, nodes: int, degree: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    displacement = 20 * torch.randn(images, parents, 2, generator=generator)
    sigma = 1 + 9 * torch.rand(parents, generator=generator)
    return displacement, sigma, torch.randint(0, parents, (nodes, degree), generator=generator)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_the_reference(size: tuple[int, int, int, int], index: torch.dtype) -> None:
    displacement, sigma, edges = problem(*size)
    wanted = reference.collapse_parents(displacement.double(), sigma.double(), edges)
    with packed_in_guards(*(x.float() for x in wanted)) as out:
        assert triton_kernel.run(displacement, sigma, edges.to(index), out=out) is out  # type: ignore[arg-type]
    for found, expected in zip(out, wanted, strict=True):
        assert (found.double() - expected).abs().max() <= 1e-6 * max(1e-4, float(expected.abs().max()))


def test_parents_who_agree_and_parents_who_nearly_do() -> None:
    displacement, sigma, edges = problem(9, 30, 40, 15)
    one = displacement[:, :1].expand(9, 30, 2) * 1e6
    shift, _, agreement = triton_kernel.run(one, sigma, edges)
    assert torch.equal(shift, one[:, :1].expand(9, 40, 2)) and not agreement.any()
    near = (1e4 + displacement / 100).float()
    found = triton_kernel.run(near, sigma, edges)[2]
    wanted = reference.collapse_parents(near.double(), sigma.double(), edges)[2]
    assert ((found - wanted).abs() <= 1e-6 * wanted.abs()).all()


def test_a_parent_that_is_not_there_and_nan_give_nan_there_alone() -> None:
    displacement, sigma, edges = problem(5, 10, 40, 3)
    displacement[2, 4, 1] = math.nan
    lost = (edges == 7).any(1)
    shift, collapsed, agreement = triton_kernel.run(displacement, sigma, torch.where(edges == 7, 10, edges))
    of_place = (edges == 4).any(1)
    assert lost.any() and of_place.any()
    assert torch.equal(collapsed.isnan(), lost)
    for image in range(5):
        assert torch.equal(agreement[image].isnan(), lost | (of_place & (image == 2)))
        assert torch.equal(shift[image, :, 0].isnan(), lost)


def test_the_operation_runs_it_when_asked() -> None:
    displacement, sigma, edges = problem(4, 6, 5, 2)
    with ops.use_backend("triton"):
        found = ops.collapse_parents(displacement, sigma, edges)
        none = ops.collapse_parents(displacement[:0], sigma, edges)
        assert ops.collapse_parents(displacement, sigma, edges[:0]).shift.shape == (4, 0, 2)
    for a, b in zip(found, ops.collapse_parents(displacement, sigma, edges), strict=True):
        torch.testing.assert_close(a, b)
    assert none.shift.shape == (0, 5, 2) and torch.equal(none.sigma, found.sigma)
    assert "float64" in (triton_kernel.supports(displacement.double()) or "")
