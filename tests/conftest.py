"""Fixtures for all tests: poisoned outputs, one run per instruction set, and a reason wherever a GPU is missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from conelens import _native
from conelens.ops import _arguments


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device that torch can use"))


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh outputs of operations start as NaN (or 0xEE), so that a cell that a kernel leaves out fails its test."""
    fresh = _arguments.empty

    def poisoned(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        out = fresh(shape, like, dtype)
        real = type(out) is Tensor and out.device.type != "meta"
        return out.fill_(torch.nan if out.is_floating_point() else 0xEE) if real else out

    monkeypatch.setattr(_arguments, "empty", poisoned)


def _available_isas() -> list[str]:
    core: Any = _native.cpu().module
    return core.isa()["available"] if core is not None else []


@pytest.fixture(params=_available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction set that this machine has."""
    core: Any = _native.cpu().module
    before = core.isa()["active"]
    core.select_isa(request.param)
    yield request.param
    core.select_isa(before)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
