"""The table maker: what it shows, and what it refuses to show. No timing here."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch

from benchmarks import table
from benchmarks.cases import Case, Floor, Unavailable, check, compiled, deadline, disagreement
from benchmarks.table import render, slim
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
                "stats": {**stats(1.0), "data": [1.0] * 3},
            }
        ],
    }
    kept = slim(copy.deepcopy(raw))
    assert "secret" not in str(kept)
    assert kept["cases"][0]["times"] == {"eager": stats(1.0)}


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
