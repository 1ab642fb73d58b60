"""What `collapse_parents` would launch on an H200, compiled without one: no spills, coalesced rows in and out."""

from __future__ import annotations

import pytest
import torch
import triton_build

from conelens.kernels.collapse_parents import triton_kernel

MOST_REGISTERS = 128  # 16 warps of a multiprocessor hide the way to the second-level cache


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(("images", "parents"), [(64, 20480), (64, 600), (32, 600), (8, 20480), (1, 600)])
def test_no_spills(images: int, parents: int, index: torch.dtype) -> None:
    tensors = torch.empty(images, parents, 2), torch.empty(parents), torch.empty(20480, 15, dtype=index)
    with triton_build.compile_instead_of_running(triton_kernel, ("collapse_parents_kernel",)) as built:
        triton_kernel.run(*tensors)
    (kernel,) = built
    assert kernel.spilled == 0
    assert kernel.registers <= MOST_REGISTERS
    assert kernel.shared <= triton_build.SHARED_LIMIT
    if images >= 8:
        assert "STG.E.64" in kernel.sass, "a shift's two axes are not written together"
