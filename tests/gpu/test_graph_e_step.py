"""graph_e_step on a GPU against the reference on the CPU in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conelens import ops
from conelens.kernels.graph_e_step import reference
from tests.kit.e_step import GRID, problem


def on_gpu(args: list[Any]) -> list[Any]:
    return [x if x is None else x.cuda() for x in args]


@pytest.mark.parametrize("shifted", [True, False], ids=["shifted", "shared"])
@pytest.mark.parametrize("size", [(16, 64, 14, 14, 20), (8, 64, 28, 28, 40), (2, 5, 7, 19, 3), (1, 3, 1, 1, 1)], ids=str)
def test_matches_the_reference(size: tuple[int, int, int, int, int], shifted: bool) -> None:
    args = problem(*size, shifted)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        args[0] = args[0].to(dtype)
        wanted = reference.graph_e_step(*(x if x is None else x.double() for x in args), GRID, True)  # type: ignore[arg-type]
        with ops.require_kernels():
            found, again = (ops.graph_e_step(*on_gpu(args), grid=GRID, argmax=True) for _ in range(2))
            plain = ops.graph_e_step(*on_gpu(args), grid=GRID)
        for a, b, c in zip(found, again, wanted, strict=True):
            assert torch.equal(a, b), "the same input gave other bits"
            if a.dtype == torch.int32:
                assert float((a.cpu() == c).float().mean()) > 0.999  # cells that equal each other but for rounding
            else:
                assert float((a.double().cpu() - c).norm()) <= 1e-5 * float(c.norm())
        for a, b in zip(plain[:4], found):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_nan_dark_channels_and_nodes_seen_nowhere() -> None:
    args = problem(2, 4, 14, 14, 20, True)
    args[0][0, 1], args[4][0, 2, 3] = -1, 0
    args[0][1, 0, 3, 4] = args[0][1, 0, 9, 9] = float("nan")
    found = ops.graph_e_step(*on_gpu(args), grid=GRID, argmax=True)
    assert (found.position[0, 1] == -1).all() and not found.mass[0, 1].any() and not found.log_likelihood[0, 1].any()
    assert found.position[0, 2, 3] == -1 and found.score[0, 2, 3] == 0
    assert all(x[1, 0].isnan().all() for x in (*found[:4], found.score))
    assert (found.position[1, 0] == 3 * 14 + 4).all()
    assert not found.mass[1, 1:].isnan().any()


def test_what_the_kernel_does_not_take_runs_the_reference() -> None:
    for size, dtype in (((1, 2, 14, 14, 5), torch.float64), ((1, 2, 60, 60, 5), torch.float32)):
        args = [x if x is None else x.to(dtype) for x in problem(*size, True)]
        found = ops.graph_e_step(*on_gpu(args), grid=GRID)
        wanted = reference.graph_e_step(*(x.double() for x in args), GRID, False)  # type: ignore[arg-type]
        assert float((found.mass.cpu().double() - wanted[0]).norm()) <= 1e-5 * float(wanted[0].norm())
