"""Every case: first all contenders must agree, then each is timed. Run by `python -m benchmarks.table`."""

from __future__ import annotations

import dataclasses
import gc
import time
from typing import Any

import pytest

from benchmarks import graph_operations, occlusion, operations, projections
from benchmarks.cases import Case, Floor, Run, Verdicts, check, disagreement, relative

CASES = [*operations.cases(), *graph_operations.cases(), *projections.cases(), *occlusion.cases()]
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
        inputs, small, floor, known = None, None, Floor("bytes", 0.0), {}
        try:
            inputs = case.inputs()
            small = inputs if case.check_inputs is None else case.check_inputs()
            floor, known = case.floor(inputs), case.facts(inputs) if case.facts is not None else {}
            verdicts = check(case, small)
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
            "positions": dict(case.positions),
            "facts": known,
            "errors": {},
            **dataclasses.asdict(verdicts),
        }
        _ready = (case.identity, inputs, small)
    return _ready[1:]


@pytest.mark.parametrize(
    ("case", "contender"),
    [pytest.param(case, name, id=f"{case.identity} | {name}") for case in CASES for name in case.turns],
)
def test_speed(case: Case, contender: str, facts: dict[str, dict[str, Any]], benchmark: Any) -> None:
    inputs, small = prepare(case, facts)
    red, unavailable = facts[case.identity]["red"], facts[case.identity]["unavailable"]
    if red:
        pytest.fail(f"the gate is red, so nothing is timed: {red}", pytrace=False)
    if contender in unavailable:
        pytest.skip(unavailable[contender])
    run = case.contenders[contender]
    benchmark.extra_info.update(case=case.identity, contender=contender)
    if case.schedule:
        result = benchmark.pedantic(run, args=(inputs,), rounds=1, iterations=1)
        if contender in case.ours:
            compare(case, contender, inputs, result, facts[case.identity])
        return
    seconds = once(run, small) / case.check_part
    if seconds < SAMPLE_SECONDS / 4:  # the gate was warm-up enough for the slow ones
        seconds = min(seconds, once(run, inputs))
    rounds = max(1 if seconds > 2 else 3, min(ROUNDS, int(SAMPLE_SECONDS / seconds)))
    benchmark.pedantic(run, args=(inputs,), rounds=rounds, iterations=1, warmup_rounds=min(10, rounds // 5))


def compare(case: Case, contender: str, inputs: Any, result: Any, facts: dict[str, Any]) -> None:
    """The very result that was timed against what is wanted: a difference makes the case red."""
    assert case.wanted is not None, f"{case.identity} has a schedule and no result to compare with"
    wanted, found = case.read(inputs, case.wanted(inputs)), case.read(inputs, result)
    facts["errors"][contender] = max(relative(a, b) for a, b in zip(wanted, found, strict=True))
    difference = disagreement(wanted, found, case.tolerance)
    if difference:
        facts["red"][contender] = difference
        pytest.fail(f"timed, and wrong: {difference}", pytrace=False)


def once(run: Run, inputs: Any) -> float:
    start = time.perf_counter()
    run(inputs)
    return time.perf_counter() - start
