"""Triton decides at import whether kernels are interpreted, so these tests run in a process of their own."""

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = os.path.dirname(__file__)
    for item in items:
        if not str(item.path).startswith(here):
            continue
        item.add_marker(pytest.mark.interpret)
        if not INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="own process: TRITON_INTERPRET=1 pytest tests/triton"))
