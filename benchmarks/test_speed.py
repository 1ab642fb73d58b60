"""Every case: first all contenders must agree, then each is timed. Run by `python -m benchmarks.table`."""

from __future__ import annotations

import dataclasses
import gc
import time
from typing import Any

import pytest

from benchmarks import operations, projections
from benchmarks.cases import Case, Floor, Run, Verdicts, check

CASES = [*operations.cases(), *projections.cases()]
SAMPLE_SECONDS = 0.5  # per contender
ROUNDS = 300  # at most

_ready: tuple[str, Any, Any] = ("", None, None)


def prepare(case: Case, facts: dict[str, dict[str, Any]]) -> tuple[Any, Any]:
    """Inputs to time and inputs to check with, behind the case's gate. Only the latest case is held in memory.

    What the table needs besides times goes into `facts`.
    """
    global _ready
    if _ready[0] != case.identity:
        _ready = ("", None, None)
        gc.collect()
        inputs, small, floor = None, None, Floor("bytes", 0.0)
        try:
            inputs = case.inputs()
            small = inputs if case.check_inputs is None else case.check_inputs()
            floor, verdicts = case.floor(inputs), check(case, small)
        except Exception as error:  # a case that cannot be set up is as red as one that disagrees
            verdicts = Verdicts(red={"set-up": f"{type(error).__name__}: {error}"})
        facts[case.identity] = {
            "section": case.section,
            "name": case.name,
            "ours": list(case.ours),
            "others": list(case.others),
            "floor": dataclasses.asdict(floor),
            "tolerance": case.tolerance,
            "targets": [dataclasses.asdict(target) for target in case.targets],
            "note": case.note,
            **dataclasses.asdict(verdicts),
        }
        _ready = (case.identity, inputs, small)
    return _ready[1:]


@pytest.mark.parametrize(
    ("case", "contender"),
    [pytest.param(case, name, id=f"{case.identity} | {name}") for case in CASES for name in case.contenders],
)
def test_speed(case: Case, contender: str, facts: dict[str, dict[str, Any]], benchmark: Any) -> None:
    inputs, small = prepare(case, facts)
    red, unavailable = facts[case.identity]["red"], facts[case.identity]["unavailable"]
    if red:
        pytest.fail(f"the gate is red, so nothing is timed: {red}", pytrace=False)
    if contender in unavailable:
        pytest.skip(unavailable[contender])
    run = case.contenders[contender]
    seconds = once(run, small) / case.check_part
    if seconds < SAMPLE_SECONDS / 4:  # the gate was warm-up enough for the slow ones
        seconds = min(seconds, once(run, inputs))
    rounds = max(1 if seconds > 2 else 3, min(ROUNDS, int(SAMPLE_SECONDS / seconds)))
    benchmark.extra_info.update(case=case.identity, contender=contender)
    benchmark.pedantic(run, args=(inputs,), rounds=rounds, iterations=1, warmup_rounds=min(10, rounds // 5))


def once(run: Run, inputs: Any) -> float:
    start = time.perf_counter()
    run(inputs)
    return time.perf_counter() - start
