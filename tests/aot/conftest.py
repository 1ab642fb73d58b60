"""What the ahead-of-time checks build, once per session."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # cuda_build, triton_build: helpers of this folder alone

KERNELS = Path(__file__).parents[2] / "kernels"


@pytest.fixture(scope="session")
def nvcc() -> str:
    found = shutil.which("nvcc")
    if found is None:
        pytest.skip("no nvcc on PATH: CUDA kernels are checked where the toolkit is")
    return found
