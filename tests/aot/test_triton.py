"""What `deconv2d` would launch on an H200, compiled without one: no spills, tensor cores, 16-byte accesses."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
import triton_build

from conelens.kernels.deconv2d import triton_configs, triton_kernel

KERNELS = ("deconv2d_kernel", "deconv2d_few_kernel")
HALF_2 = (2, 2, 2, 2, 0, 0, 1, 1)
OVERLAPPING = (3, 3, 2, 2, 0, 0, 1, 1)


@dataclass(frozen=True)
class Case:
    """A layer as a network has it; `size` is that of y."""

    name: str
    c_in: int
    c_out: int
    size: tuple[int, int]
    dtype: torch.dtype = torch.bfloat16
    pool: tuple[int, ...] | None = None
    windows: bool = False
    samples: int = 32
    kernel: int = 3
    stride: int = 1
    channels_last: bool = True
    skew: int = 0  # elements that y lies off its alignment

    def build(self) -> triton_build.Built:
        n, (h, w) = self.samples, self.size

        def tensor(channels: int, size: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
            flat = torch.empty(n * channels * size[0] * size[1] + self.skew, dtype=dtype)[self.skew :]
            if self.channels_last:
                return flat.view(n, *size, channels).permute(0, 3, 1, 2)
            return flat.view(n, channels, *size)

        y = tensor(self.c_in, (h, w), self.dtype)
        switches = None if self.pool is None else tensor(self.c_in, (h, w), torch.uint8)
        on = (h, w)
        if self.pool is not None:
            on = ((h - 1) * self.pool[2] + self.pool[0], (w - 1) * self.pool[3] + self.pool[1])
        to = tuple((size - 1) * self.stride - 2 * (self.kernel // 2) + self.kernel for size in on)
        weight = torch.empty(self.c_in, self.c_out, self.kernel, self.kernel, dtype=self.dtype)
        origin = torch.zeros(n, 2, dtype=torch.int32) if self.windows else None
        pads, steps = (self.kernel // 2,) * 2, (self.stride,) * 2
        with triton_build.compile_instead_of_running(triton_kernel, KERNELS) as built:
            triton_kernel.run(y, weight, steps, pads, 1, (1, 1), to, on, self.pool, switches, True, origin)
        assert len(built) == 1
        return built[0]


GEMM = [
    Case("conv1_2", 64, 64, (112, 112), pool=HALF_2),
    Case("conv2_2", 128, 128, (56, 56), pool=HALF_2),
    Case("conv3_3", 256, 256, (28, 28), pool=HALF_2),
    Case("conv4_3", 512, 512, (14, 14), pool=HALF_2),
    Case("without_pool", 256, 256, (28, 28)),
    Case("overlapping", 256, 192, (27, 27), pool=OVERLAPPING),
    Case("windows", 256, 256, (9, 9), pool=HALF_2, windows=True),
    Case("few_rows", 512, 512, (4, 4), pool=HALF_2, windows=True, samples=8),
    Case("float16", 128, 128, (56, 56), dtype=torch.float16, pool=HALF_2),
    Case("tf32", 128, 128, (56, 56), dtype=torch.float32, pool=HALF_2),
    Case("stride_2", 128, 64, (28, 28), stride=2),
    Case("ragged_channels", 60, 50, (28, 28)),
]
FEW = [
    Case("conv1_1", 64, 3, (224, 224)),
    Case("conv1_1_nchw", 64, 3, (224, 224), channels_last=False),
    Case("stem_7_2", 64, 3, (112, 112), kernel=7, stride=2),
    Case("stem_11_4_pool", 64, 3, (27, 27), kernel=11, stride=4, pool=OVERLAPPING),
    Case("windows", 64, 3, (14, 14), windows=True),
]


def problems(built: triton_build.Built, *needs: str) -> list[str]:
    found = [f"{built.name} spills {built.spilled} bytes"] if built.spilled else []
    if built.shared > triton_build.SHARED_LIMIT:
        found.append(f"{built.name} wants {built.shared} bytes of shared memory")
    narrow = set(re.findall(r"LDG\.E\.(?:U16|U8)", built.sass)) if "LDGSTS.E.BYPASS.128" in needs else set()
    found += [f"{built.name} loads elements one by one: {load}" for load in sorted(narrow)]
    return found + [f"{built.name} has no {need}" for need in needs if need not in built.sass]


@pytest.mark.parametrize("case", GEMM, ids=lambda case: case.name)
def test_matrix_product(case: Case) -> None:
    wide = () if case.c_in % 8 else ("LDGSTS.E.BYPASS.128", "STG.E.128")
    assert problems(case.build(), "HGMMA", *wide) == []


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_few_output_channels(case: Case) -> None:
    wide = ("LDG.E.128",) if case.channels_last else ()
    assert problems(case.build(), "HGMMA", *wide) == []


def test_exact_float32_stays_off_the_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_configs, "tf32_allowed", lambda: False)
    built = Case("exact", 128, 128, (56, 56), dtype=torch.float32, pool=HALF_2).build()
    assert problems(built) == []
    assert not any(unit in built.sass for unit in ("HGMMA", " HMMA"))


def test_a_misaligned_operand_is_found() -> None:
    """One element off its alignment, y cannot be read 16 bytes at a time: the check above must notice."""
    found = problems(Case("skewed", 64, 64, (112, 112), skew=1).build(), "HGMMA", "LDGSTS.E.BYPASS.128")
    assert found == ["deconv2d_kernel loads elements one by one: LDG.E.U16"]
