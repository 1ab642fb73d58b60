"""All tests here need a CUDA device and the compiled kernels; without one they are skipped, saying why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conelens import _native


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _kernels_are_usable() -> None:
    """On a CUDA machine missing kernels are a failure, not a skip: every test would silently test the reference."""
    reason = _native.cuda().reason
    assert reason is None, f"the compiled CUDA kernels cannot be used: {reason}"
