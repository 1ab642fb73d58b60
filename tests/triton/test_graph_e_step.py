"""The Triton graph_e_step in the interpreter against the reference in float64, inside guarded buffers."""

from __future__ import annotations

import math

import pytest
import torch

from conelens import ops
from conelens.kernels.graph_e_step import reference
from tests.kit.compare import packed_in_guards
from tests.kit.e_step import GRID, problem

pytest.importorskip("triton", reason="needs conelens[triton]")

from conelens.kernels.graph_e_step import triton_kernel

SIZES = [(2, 3, 14, 14, 20), (1, 2, 28, 28, 40), (2, 2, 5, 19, 3), (1, 3, 1, 1, 1), (2, 1, 17, 8, 17)]


@pytest.mark.parametrize("argmax", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_the_reference(size: tuple[int, int, int, int, int], argmax: bool) -> None:
    args = problem(*size, shifted=size[0] == 2)
    wide = [x if x is None else x.double() for x in args]
    wanted = reference.graph_e_step(*wide, GRID, argmax)  # type: ignore[arg-type]
    with packed_in_guards(*reference.empty_results(args[0], size[-1], argmax)) as out:
        assert triton_kernel.run(*args, GRID, argmax, out=out) is out  # type: ignore[arg-type]
    for found, expected in zip(out, wanted, strict=True):
        if found.dtype == torch.int32:
            assert torch.equal(found, expected)
        else:
            assert float((found.double() - expected).norm()) <= 2e-6 * float(expected.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_and_strides(dtype: torch.dtype) -> None:
    args = problem(2, 3, 6, 9, 5)
    args[0] = args[0].to(dtype).contiguous(memory_format=torch.channels_last)
    args[4] = torch.tensor([0.1, 0.5, 0.9, 0.2, 0.7]).expand(2, 3, 5)
    wanted = reference.graph_e_step(*args, GRID, True)  # type: ignore[arg-type]
    for found, expected in zip(triton_kernel.run(*args, GRID, True), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_dark_channels_unseen_nodes_ties_and_nan() -> None:
    features, mean, _, sigma, weight, tau = problem(1, 4, 6, 6, 3, shifted=False)
    features[0, 0] = -1
    features[0, 1], mean[1, 0] = 1, torch.tensor([GRID[0] + 2.5 * GRID[2], GRID[1] + 3.5 * GRID[3]])
    features[0, 2, 2, 5] = features[0, 2, 4, 0] = math.nan
    weight[0, 3, 1] = 0
    mass, first, second, likelihood, position, score = triton_kernel.run(features, mean, None, sigma, weight, tau, GRID, True)
    assert not any(x[0, 0].any() for x in (mass, first, second, likelihood, score))
    assert position[0, 0].tolist() == [-1, -1, -1]
    assert position[0, 1, 0] == 2 * 6 + 3, "the first of four equal cells"
    assert all(x[0, 2].isnan().all() for x in (mass, first, second, likelihood, score))
    assert (position[0, 2] == 2 * 6 + 5).all()
    assert position[0, 3, 1] == -1 and mass[0, 3, 1] == 0 and position[0, 3, 0] >= 0


def test_a_lit_cell_out_of_everyones_reach() -> None:
    features = torch.ones(1, 1, 3, 40)
    args = (features, torch.zeros(1, 2, 2), None, torch.full((1, 2), 5.0), torch.ones(1, 1, 2), torch.zeros(1), GRID, False)
    found, wanted = triton_kernel.run(*args), reference.graph_e_step(*args)
    assert found[3].item() == wanted[3].item() == -math.inf
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=0)


def test_the_operation_runs_it_when_asked() -> None:
    args = problem(2, 2, 7, 7, 4)
    wanted = ops.graph_e_step(*args, grid=GRID, argmax=True)
    with ops.use_backend("triton"):
        found = ops.graph_e_step(*args, grid=GRID, argmax=True)
        assert ops.graph_e_step(args[0][:0], args[1], None, args[3], args[4][:0], 0.1, grid=GRID).mass.shape == (0, 2, 4)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_what_it_cannot_take_is_told() -> None:
    args = problem(1, 1, 7, 7, 4)
    assert triton_kernel.supports(*args) is None
    assert "float64" in (triton_kernel.supports(args[0].double()) or "")
    assert "does not fit" in (triton_kernel.supports(torch.zeros(1, 1, 56, 56)) or "")
    assert "200 nodes" in (triton_kernel.supports(args[0], args[1], None, torch.ones(1, 200)) or "")
