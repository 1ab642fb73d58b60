"""What `edge_scores` would launch on an H200, compiled without one: no spills, one hardware exponential per term."""

from __future__ import annotations

import pytest
import torch
import triton_build

from conelens.kernels.edge_scores import triton_kernel

MOST_REGISTERS = 128  # 16 warps of a multiprocessor share the units of exponentials
THREADS = 4 * 32


@pytest.mark.parametrize(("nodes", "parents"), [(20480, 600), (10240, 601), (7, 20480)])
def test_no_spills_and_one_exponential_per_term(nodes: int, parents: int) -> None:
    tensors = torch.empty(3, nodes, 2), torch.empty(3, nodes), torch.empty(3, parents, 2), torch.ones(nodes)
    with triton_build.compile_instead_of_running(triton_kernel, ("edge_scores_kernel",)) as built:
        triton_kernel.run(*tensors)
    (kernel,) = built
    assert kernel.spilled == 0
    assert kernel.registers <= MOST_REGISTERS
    terms = triton_kernel.NODES * triton_kernel.PARENTS // THREADS
    assert kernel.sass.count("MUFU.EX2") == terms
    in_loop = sum(kernel.sass.count(f" {name} ") for name in ("FADD", "FMUL", "FFMA")) - terms  # the sums of blocks
    assert in_loop <= 6 * terms, "more arithmetic than two differences, their square, the weight and the sum take"
