"""What `graph_e_step` would launch on an H200, compiled without one: tensor cores, no spills."""

from __future__ import annotations

import pytest
import torch
import triton_build

from conelens.kernels.graph_e_step import triton_kernel

PRODUCTS = 3  # of two tf32 numbers each, for a product of float32


def build(side: int, nodes: int, argmax: bool, dtype: torch.dtype = torch.float32, shifted: bool = True) -> triton_build.Built:
    images, channels = 2, 8
    features, shift = torch.empty(images, channels, side, side, dtype=dtype), torch.empty(images, channels, nodes, 2)
    of_channel = torch.empty(channels, nodes, 2), shift if shifted else None, torch.empty(channels, nodes)
    weight, tau = torch.empty(images, channels, nodes), torch.empty(images)
    with triton_build.compile_instead_of_running(triton_kernel, ("graph_e_step_kernel",)) as built:
        triton_kernel.run(features, *of_channel, weight, tau, (7.5, 7.5, 16.0, 16.0), argmax)
    assert len(built) == 1 and built[0].grid == (images * channels,)
    return built[0]


def blocks(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


@pytest.mark.parametrize("argmax", [False, True])
@pytest.mark.parametrize(("side", "nodes"), [(7, 10), (14, 20), (14, 40), (28, 20), (28, 40), (28, 64), (32, 17)])
def test_no_spills(side: int, nodes: int, argmax: bool) -> None:
    built = build(side, nodes, argmax)
    assert built.spilled == 0
    assert built.shared <= triton_build.SHARED_LIMIT
    assert "HMMA" in built.sass or "HGMMA" in built.sass


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_and_nodes_without_a_shift_do_not_spill(dtype: torch.dtype) -> None:
    for side, nodes in ((14, 20), (28, 40)):
        assert build(side, nodes, True, dtype, shifted=False).spilled == 0


def test_a_warp_multiplies_no_more_than_three_products_of_three() -> None:
    """16 x 8 x 8 at a time: more would mean operands that several warps compute again."""
    built = build(14, 20, False)
    cells = blocks(14) * blocks(14) * blocks(20)
    assert built.sass.count(" HMMA.1688") == 3 * PRODUCTS * cells // (16 * 8 * 8)
