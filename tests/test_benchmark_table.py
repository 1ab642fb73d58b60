"""The table maker: what it shows, and what it refuses to show. No timing here."""

from __future__ import annotations

import copy
import dataclasses
import sys
import time
from typing import Any

import pytest
import torch

import conelens
from benchmarks import occlusion, table, test_speed
from benchmarks.cases import Case, Floor, Unavailable, check, compiled, deadline, disagreement
from benchmarks.table import render, slim, summary
from conelens import ops

MACHINE = {
    "cpu": "A CPU", "isa": "avx2", "threads": 2, "cores": 2, "load": 0.1, "python": "3.11.0",
    "torch": "2.13.0", "commit": "abc", "copy": 10e9, "matrix": 100e9,
}  # fmt: skip


def stats(seconds: float) -> dict[str, float]:
    return {"min": seconds / 2, "q1": seconds, "median": seconds, "q3": seconds, "rounds": 3}


def example() -> dict[str, Any]:
    case = {
        "section": "pool",
        "name": "small",
        "ours": ["NCHW", "NCHW reused"],
        "others": ["eager", "torch.compile", "eager reused"],
        "floor": {"kind": "bytes", "amount": 1e6},
        "tolerance": 0.0,
        "targets": [
            {"row": "NCHW", "at_least": 4, "against": ["eager"]},
            {"row": "NCHW reused", "at_least": 0.6, "against": []},
        ],
        "note": "",
        "positions": {},
        "facts": {},
        "errors": {},
        "red": {},
        "unavailable": {},
        "times": {
            "NCHW": stats(1e-3),
            "NCHW reused": stats(2e-4),
            "eager": stats(5e-3),
            "torch.compile": stats(2e-3),
            "eager reused": stats(1e-4),
        },
    }
    return {"machine": MACHINE, "date": "2026-01-01", "cases": [case]}


def sweep_example() -> dict[str, Any]:
    case = {
        "section": "sweeps",
        "name": "net",
        "ours": ["delta", "gather"],
        "others": ["plain 1", "plain 8", "Captum"],
        "floor": {"kind": "flops", "amount": 1e8},
        "targets": [{"row": "delta", "at_least": 3, "against": ["plain 1", "plain 8"]}],
        "note": "",
        "positions": {"delta": 100, "gather": 100, "plain 1": 8, "plain 8": 8, "Captum": 65},
        "facts": {"MAC limits": "gather 3x, delta 5x"},
        "errors": {"delta": 4e-7, "gather": 2e-7},
        "red": {},
        "unavailable": {"Captum": "ModuleNotFoundError: No module named 'captum'"},
        "times": {"delta": {**stats(2e-3), "rounds": 1}, "gather": stats(4e-3), "plain 1": stats(1e-2), "plain 8": stats(8e-3)},
    }
    return {"machine": MACHINE, "date": "2026-01-01", "cases": [case]}


def row(text: str, title: str) -> dict[str, str]:
    """One row of the table that holds it, by column."""
    head: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "case":
            head = cells
        elif cells[0] == title:
            return dict(zip(head, cells, strict=True))
    raise AssertionError(f"no row {title!r} in\n{text}")


def test_row_states_time_ratio_share_and_verdict() -> None:
    cells = row(render(example()), "small, NCHW")
    assert cells["conelens"] == "**1 ms**"
    assert cells["eager"] == "5 ms"
    # a fresh row is not held against an alternative that reuses its output
    assert cells["against the strongest"] == "2x (torch.compile)"
    assert cells["share of limit"] == "10% of copy"
    assert cells["target"] == ">= 4x eager: 5x, met"


def test_rows_that_lose_or_miss_stay() -> None:
    cells = row(render(example()), "small, NCHW reused")
    assert cells["against the strongest"] == "0.5x (eager reused)"
    assert cells["target"] == ">= 60% of copy: **missed**"


def test_statistic_is_chosen_and_named() -> None:
    text = render(example(), "min")
    assert row(text, "small, NCHW")["conelens"] == "**500 µs**"
    assert "Times: min" in text


def test_red_gate_shows_no_speed() -> None:
    results = example()
    results["cases"][0]["red"] = {"eager": "result 0 differs by 1.0e+00"}
    text = render(results)
    cells = row(text, "small, NCHW")
    assert cells["conelens"] == "RED"
    assert set(cells.values()) == {"small, NCHW", "RED", "-"}
    assert "result 0 differs by 1.0e+00" in text


def test_missing_contender_loses_its_column_only() -> None:
    results = example()
    del results["cases"][0]["times"]["torch.compile"]
    results["cases"][0]["unavailable"] = {"torch.compile": "took more than 90 s"}
    text = render(results)
    cells = row(text, "small, NCHW")
    assert cells["torch.compile"] == "-"
    assert cells["against the strongest"] == "5x (eager)"
    assert "no torch.compile: took more than 90 s" in text


def test_target_against_something_unmeasured_has_no_verdict() -> None:
    results = example()
    del results["cases"][0]["times"]["eager"]
    assert row(render(results), "small, NCHW")["target"] == ">= 4x eager: not measured"


def test_sweeps_show_positions_per_second_limits_and_errors() -> None:
    text = render(sweep_example())
    cells = row(text, "net, delta")
    assert cells["conelens"] == "**500/s**"
    assert cells["spread"] == "one run"
    assert cells["plain 8"] == "125/s"
    assert cells["Captum"] == "-" and "no Captum: ModuleNotFoundError" in text
    assert cells["against the strongest"] == "4x (plain 8)"
    assert cells["share of limit"] == "50% of matrix"
    assert cells["MAC limits"] == "gather 3x, delta 5x"
    assert cells["error"] == "4e-07"
    assert cells["target"] == ">= 3x plain: 4x, met"
    assert row(text, "net, gather")["against the strongest"] == "2x (plain 8)"


def test_sweep_that_was_timed_and_wrong_shows_no_speed() -> None:
    results = sweep_example()
    results["cases"][0]["red"] = {"delta": "result 0 differs by 1.0e-04"}
    cells = row(render(results), "net, delta")
    assert cells["conelens"] == "RED"
    assert set(cells.values()) == {"net, delta", "RED", "-"}


def test_kept_results_name_no_host() -> None:
    case = {key: value for key, value in example()["cases"][0].items() if key != "times"}
    raw = {
        "machine_info": {"node": "secret-host"},
        "commit_info": {"id": "x"},
        "datetime": "2026-01-01T00:00:00",
        "machine": MACHINE,
        "cases": [case],
        "benchmarks": [
            {
                "fullname": "/secret/path",
                "extra_info": {"case": "pool | small", "contender": "eager"},
                "stats": {"data": [1.0] * 3},
            }
        ],
    }
    kept = slim(copy.deepcopy(raw))
    assert "secret" not in str(kept)
    assert kept["cases"][0]["times"] == {"eager": summary([1.0] * 3, 1)}


def test_turns_of_a_contender_are_one_sample_per_position() -> None:
    case = {key: value for key, value in sweep_example()["cases"][0].items() if key != "times"}
    turns = [("plain 8", [4.0, 8.0]), ("delta", [200.0]), ("plain 8", [16.0])]
    raw = {
        "datetime": "2026-01-01T00:00:00",
        "machine": MACHINE,
        "cases": [case],
        "benchmarks": [
            {"extra_info": {"case": "sweeps | net", "contender": name}, "stats": {"data": data}} for name, data in turns
        ],
    }
    times = slim(raw)["cases"][0]["times"]
    assert times["delta"] == {"min": 2.0, "q1": 2.0, "median": 2.0, "q3": 2.0, "rounds": 1}
    assert times["plain 8"] == {"min": 0.5, "q1": 0.75, "median": 1.0, "q3": 1.5, "rounds": 3}


def test_partial_runs_keep_nothing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "RESULTS", tmp_path / "results" / "cpu.json")
    monkeypatch.setattr(table, "TABLE", tmp_path / "RESULTS.md")
    monkeypatch.setattr(table, "measure", lambda *_: example())
    assert table.main(["--only", "pool"]) == 0
    assert not list(tmp_path.iterdir())
    assert table.main([]) == 0
    assert (tmp_path / "RESULTS.md").read_text() == render(example())
    assert table.main(["--from-results"]) == 0


def test_red_run_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    results = example()
    results["cases"][0]["red"] = {"NCHW": "wrong"}
    monkeypatch.setattr(table, "measure", lambda *_: results)
    assert table.main(["--only", "pool"]) == 1


# --- the gate -------------------------------------------------------------------------------------


def pool_case(**others: Any) -> Case:
    return Case(
        section="pool",
        name="tiny",
        inputs=lambda: torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(0)),
        ours={"NCHW": lambda x: ops.max_pool2d_with_switches(x, 2)},
        others=others,
        read=lambda _, result: (result[0], torch.as_tensor(result[1]).long()),
        floor=lambda _: Floor("bytes", 1.0),
    )


def test_gate_is_green_only_where_all_agree() -> None:
    def stray(x: torch.Tensor) -> Any:
        pooled, switches = ops.max_pool2d_with_switches(x, 2)
        switches[0, 0, 0, 0] ^= 1
        return pooled, switches

    def broken(_: torch.Tensor) -> Any:
        raise Unavailable("no compiler")

    case = pool_case(same=lambda x: ops.max_pool2d_with_switches(x, 2), stray=stray, broken=broken)
    verdicts = check(case, case.inputs())
    assert list(verdicts.red) == ["stray"]
    assert "1 of 27 cells" in verdicts.red["stray"]
    assert verdicts.unavailable == {"broken": "no compiler"}


def test_gate_is_red_when_no_kernel_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from conelens import _native

    monkeypatch.setattr(_native, "cpu", lambda: _native.Native(None, "not built"))
    case = pool_case()
    assert "not built" in check(case, case.inputs()).red["NCHW"]


def test_disagreement_is_measured_relative() -> None:
    a = torch.tensor([3.0, 4.0])
    assert disagreement((a,), (a + 1e-7,), 1e-6) == ""
    assert "relative 2-norm" in disagreement((a,), (a + 1e-3,), 1e-6)
    assert disagreement((a * 0,), (a * 0,), 0.0) == ""
    assert disagreement((a * 0,), (a,), 1.0) != ""
    assert disagreement((a,), (a * float("nan"),), 1.0) != ""
    assert disagreement((a,), (a[:1],), 1.0) != ""


def test_compilation_that_fails_or_hangs_is_unavailable() -> None:
    def wrong(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("not today")

    with pytest.raises(Unavailable, match="not today"):
        compiled(wrong)(torch.ones(1))
    with pytest.raises(TimeoutError), deadline(0.05):
        time.sleep(5)


# --- occlusion sweeps -----------------------------------------------------------------------------


def sweeps(stride: int = 4) -> Case:
    """A tiny network on 32x48 pixels: 5x9 windows."""

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Conv2d(4, 5, 3)]
        return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())

    image = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    return occlusion.sweep_case("tiny", occlusion.Work(model, stride, 1.0, batch=8), image)


def without_compilation(case: Case) -> Case:
    return dataclasses.replace(case, others={name: run for name, run in case.others.items() if name != "torch.compile"})


def test_contenders_of_a_sweep_agree_on_the_same_positions() -> None:
    case = without_compilation(sweeps())
    verdicts = check(case, case.check_inputs())
    assert verdicts.red == {} and verdicts.unavailable == {}

    def shifted(inputs: occlusion.SweepInputs) -> torch.Tensor:
        return case.ours["delta"](dataclasses.replace(inputs, image=inputs.image + 1e-3))

    wrong = dataclasses.replace(case, ours={"delta": shifted})
    assert "relative 2-norm" in check(wrong, case.check_inputs()).red["delta"]


@pytest.mark.parametrize("form", ["delta", "gather"])
def test_timed_sweep_is_compared_at_a_sample_of_its_own_positions(form: str) -> None:
    case = sweeps()
    inputs = case.inputs()
    facts: dict[str, Any] = {"errors": {}, "red": {}}
    result = case.ours[form](inputs)
    test_speed.compare(case, form, inputs, result, facts)
    assert inputs.units.shape == (32, 3) and len({tuple(unit) for unit in inputs.units}) == 32
    assert facts["red"] == {} and 0 <= facts["errors"][form] < 1e-6
    _, row, column = inputs.units[7]
    result.outputs[0, row, column] += 1e-2
    with pytest.raises(pytest.fail.Exception, match="timed, and wrong"):
        test_speed.compare(case, form, inputs, result, facts)
    assert "relative 2-norm" in facts["red"][form]


def test_positions_counted_are_positions_run() -> None:
    case = without_compilation(sweeps(stride=2))  # 9x17 windows
    inputs = case.inputs()
    seen: list[int] = []
    for model in (inputs.model, inputs.model_last):
        model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    for name, run in case.others.items():
        seen.clear()
        run(inputs)
        assert sum(seen) == case.positions[name], name
        assert name == "Captum" or set(seen) == {int(name.rpartition(" ")[2])}
    for name, run in case.ours.items():
        assert run(inputs).done.numel() == case.positions[name]


def test_a_missing_captum_loses_its_column_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    case = without_compilation(sweeps())
    verdicts = check(case, case.check_inputs())
    assert verdicts.red == {} and list(verdicts.unavailable) == ["Captum"]


def test_the_fastest_others_take_turns_around_ours() -> None:
    case = sweeps()
    assert set(case.schedule) == set(case.contenders)
    for name in ("plain channels_last 1", "plain channels_last 8", "plain channels_last 32"):
        assert name in case.targets[0].against
        turns = [at for at, turn in enumerate(case.schedule) if turn == name]
        assert turns[0] < case.schedule.index("delta") < turns[-1] and len(turns) == 4


def test_limit_of_squeezenet_is_what_is_promised() -> None:
    work = occlusion.WORK["SqueezeNet 1.1"]
    network = conelens.trace(work.model(), (3, 224, 224), policy="clamp")
    plan = conelens.plan_occlusion(network, occlusion.WINDOW, work.stride)
    assert work.promised == pytest.approx(plan.factors["gather"], abs=5e-3)
    assert plan.form == occlusion.DEFAULT
