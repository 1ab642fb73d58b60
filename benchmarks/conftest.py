"""Puts the machine, the gate's verdicts and the rows' targets beside pytest-benchmark's timings."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

import pytest
import torch

from benchmarks import machine
from benchmarks.cases import Case

_SEEN = pytest.StashKey[tuple[machine.Machine, dict[str, dict[str, Any]]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", default="", help='regular expression on "section | name" of the cases to run')


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = re.compile(config.getoption("--cases"))

    def chosen(item: pytest.Item) -> bool:
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")  # type: ignore[attr-defined]
        return not isinstance(case, Case) or bool(wanted.search(case.identity))

    config.hook.pytest_deselected(items=[item for item in items if not chosen(item)])
    items[:] = [item for item in items if chosen(item)]


@pytest.fixture(scope="session")
def facts(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """Case -> what the table needs to know besides times. Made once, together with the machine's limits."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    request.config.stash[_SEEN] = machine.describe(), {}
    return request.config.stash[_SEEN][1]


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    if _SEEN in config.stash:
        described, facts = config.stash[_SEEN]
        output_json["machine"], output_json["cases"] = dataclasses.asdict(described), list(facts.values())
