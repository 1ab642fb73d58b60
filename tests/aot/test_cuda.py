"""The CUDA kernels, compiled for sm_90 where no GPU is: a spill or a lost 16-byte access fails here."""

from __future__ import annotations

from pathlib import Path

import cuda_build
import pytest

pytestmark = pytest.mark.skipif(
    cuda_build.disassembler() is None, reason="no cuobjdump: neither a full toolkit nor Triton is installed"
)

WANTED = {
    "channel_peaks": {
        r"peaks_of_rows<(Half|BFloat16|float), true": {"LDG.128"},
        r"peaks_of_channels<(Half|BFloat16), 8": {"LDG.128"},
        r"peaks_of_channels<float, 4": {"LDG.128"},
    },
    "deconv2d": {r"few_outputs<(Half|BFloat16)>": {"LDG.128", "HMMA"}},
    "gather_windows": {
        r"gather_channels<(double, 2|float, 4|Half, 8|BFloat16, 8), true": {"LDG.128", "STG.128"},
        r"gather_channels<unsigned (long, 2|int, 4|short, 8|char, 16), false": {"LDG.128", "STG.128"},
        r"gather_columns<(double, 2|float, 4|Half, 8|BFloat16, 8), true": {"STG.128"},
        r"gather_columns<unsigned (long, 2|int, 4|short, 8|char, 16), false": {"STG.128"},
    },
    "max_pool2d_with_switches": {
        r"pool_strips<(Half|BFloat16), 8, [23], (false|true)": {"LDG.128", "STG.128"},
        r"pool_strips<float, 4, [23], (false|true)": {"LDG.128", "STG.128"},
        r"pool_strips<(Half|BFloat16), 4, [23], false": {"LDG.128", "STG.64"},
    },
    "max_unpool2d": {
        r"unpool_strips<(Half|BFloat16), 8, [23], true": {"LDG.128", "LDG.64", "STG.128"},
        r"unpool_strips<float, 4, [23], true": {"LDG.128", "STG.128"},
        r"unpool_strips<(Half|BFloat16), 4, [23], false": {"LDG.64", "STG.128"},
        r"unpool_strips<float, 2, [23], false": {"LDG.64", "STG.128"},
    },
    "relu_change": {
        r"change_(channels|columns)<(double, 2|float, 4|Half, 8|BFloat16, 8)": {"LDG.128", "STG.128"},
        r"change_columns<(float, 2|Half, 4|BFloat16, 4)": {"LDG.64", "STG.64"},
    },
}


@pytest.mark.parametrize("operation", WANTED)
def test_no_spills_and_wide_accesses(operation: str, nvcc: str, tmp_path: Path) -> None:
    kernels = cuda_build.compile_kernels(nvcc, cuda_build.KERNELS / operation / "cuda.cu", tmp_path)
    assert cuda_build.problems(kernels, WANTED[operation]) == []


def test_a_lost_vector_store_is_found(nvcc: str, tmp_path: Path) -> None:
    """A plain store of the vector, which the compiler splits, is what the check above is for."""
    intrinsic = "__stwb(reinterpret_cast<Bits*>(to) + i, bits[i])"
    plain = "reinterpret_cast<Bits*>(to)[i] = bits[i]"
    header = (cuda_build.ROOT / "csrc" / "cuda_device.cuh").read_text()
    assert intrinsic in header
    (tmp_path / "cuda_device.cuh").write_text(header.replace(intrinsic, plain))
    source = tmp_path / "cuda.cu"
    source.write_text((cuda_build.KERNELS / "max_unpool2d" / "cuda.cu").read_text())
    found = cuda_build.problems(cuda_build.compile_kernels(nvcc, source, tmp_path), WANTED["max_unpool2d"])
    assert any("has no STG.128" in problem for problem in found)
