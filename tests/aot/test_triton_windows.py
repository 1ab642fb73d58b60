"""What `conv2d_windows` would launch on an H200, compiled without one: tensor cores kept busy, 16-byte accesses, no spills."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import triton_build
from triton_build import SHARED_LIMIT

from conelens.kernels.conv2d_windows import triton_configs, triton_kernel

NARROW = ("LDG.E.U16", "STG.E.U16")


@dataclass(frozen=True)
class Case:
    """A layer of a sweep: units of `side` x `side` outputs."""

    name: str
    c_in: int
    c_out: int
    side: int
    dtype: torch.dtype = torch.bfloat16
    units: int = 512
    kernel: int = 3
    stride: int = 1
    rows: bool = True
    skew: int = 0  # elements that the patches lie off their alignment

    def build(self) -> triton_build.Built:
        def maps(samples: int, side: int, skew: int = 0) -> torch.Tensor:
            flat = torch.empty(samples * side * side * self.c_in + skew, dtype=self.dtype)[skew:]
            return flat.view(samples, side, side, self.c_in).permute(0, 3, 1, 2)

        base, patch = maps(2, 56), maps(self.units, self.side, self.skew)
        weight = torch.empty(self.c_out, self.c_in, self.kernel, self.kernel, dtype=self.dtype)
        place = torch.zeros(self.units, 2, dtype=torch.int64)
        rows = place[:, 0] if self.rows else None
        window = ((self.stride,) * 2, (1, 1), (self.side,) * 2, rows, True)
        with triton_build.compile_instead_of_running(triton_kernel, ("conv2d_windows_kernel",)) as built:
            triton_kernel.run(base, patch, place, place, weight, weight[:, 0, 0, 0].contiguous(), *window)
        assert len(built) == 1
        return built[0]


CASES = [
    Case("vgg_conv1_2", 64, 64, 18),
    Case("vgg_conv2_2", 128, 128, 14),
    Case("vgg_conv3_3", 256, 256, 13),
    Case("vgg_conv4_3", 512, 512, 11),
    Case("float16", 128, 256, 9, dtype=torch.float16),
    Case("tf32", 256, 256, 13, dtype=torch.float32),
    Case("stride_2", 64, 128, 9, stride=2),
    Case("one_tap", 256, 64, 9, kernel=1),
    Case("alexnet_conv2", 64, 192, 8, kernel=5),
    Case("few_cells", 512, 512, 3, units=8),
    Case("one_sample", 128, 128, 14, rows=False),
]


def problems(built: triton_build.Built) -> list[str]:
    found = [f"spills {built.spilled} bytes"] if built.spilled else []
    if built.shared > SHARED_LIMIT:
        found.append(f"wants {built.shared} bytes of shared memory")
    found += [f"no {need}" for need in ("HGMMA", "LDGSTS.E.BYPASS.128", "STG.E.128") if need not in built.sass]
    if built.sass.count("WARPGROUP.ARRIVE") >= built.sass.count(" HGMMA"):
        found.append("waits for every product before the next")
    biases = 1 if "LDG.E.U16" in built.sass and built.sass.count("LDG.E.U16") == 1 else 0
    return found + ["single elements"] * (sum(built.sass.count(narrow) for narrow in NARROW) > biases)


@pytest.fixture(autouse=True)
def _tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_configs, "tf32_allowed", lambda: True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matrix_product(case: Case) -> None:
    assert problems(case.build()) == []


def test_exact_float32_and_ragged_channels_do_not_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Case("ragged", 60, 50, 9).build().spilled == 0
    monkeypatch.setattr(triton_configs, "tf32_allowed", lambda: False)
    built = Case("exact", 128, 128, 14, dtype=torch.float32).build()
    assert built.spilled == 0
    assert not any(unit in built.sass for unit in ("HGMMA", " HMMA"))


def test_misaligned_patches_are_found() -> None:
    """One element off their alignment they cannot be read 16 bytes at a time: the check above must notice."""
    assert "single elements" in problems(Case("skewed", 64, 64, 9, skew=1).build())


def test_serial_products_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 x 128 tiles in tf32 make ptxas wait after each product."""
    config = triton_configs.GemmConfig(128, 128, 32, 8, 3)
    monkeypatch.setattr(triton_kernel, "gemm_config", lambda problem: config)
    assert problems(Case("tf32", 256, 256, 13, dtype=torch.float32).build()) == ["waits for every product before the next"]
