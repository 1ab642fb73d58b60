"""One command from nothing to the table: gate, measurement, benchmarks/RESULTS.md.

python -m benchmarks.table                       # everything, a few minutes on two cores
python -m benchmarks.table --only "pool|conv3_3" # cases whose "section | name" matches; prints, keeps nothing
python -m benchmarks.table --from-results        # write the table again from the kept times
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "cpu.json"
TABLE = HERE / "RESULTS.md"
REUSED = " reused"

Case = Mapping[str, Any]


# --- measuring ------------------------------------------------------------------------------------


def measure(only: str, threads: int, compile_seconds: float) -> dict[str, Any]:
    """Run the cases in a process of its own, with its threads fixed from the start -> slim results."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "CONELENS_BENCH_COMPILE_SECONDS": str(compile_seconds),
        }
        command = [
            sys.executable,
            "-m",
            "pytest",
            str(HERE / "test_speed.py"),
            "-q",
            "--no-header",
            "-p",
            "no:cacheprovider",
        ]
        command += ["--benchmark-json", str(raw), "--benchmark-disable-gc", "--benchmark-quiet", "--tb=line"]
        if only:
            command += ["--cases", only]
        subprocess.run(command, env=environment, cwd=HERE.parent, check=False)
        if not raw.exists():
            raise SystemExit("nothing was measured; see the messages above")
        return slim(json.loads(raw.read_text()))


def slim(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What the table needs of pytest-benchmark's file; names of hosts and paths stay behind."""
    cases = {f"{case['section']} | {case['name']}": {**case, "times": {}} for case in raw["cases"]}
    for entry in raw["benchmarks"]:
        info = entry["extra_info"]
        cases[info["case"]]["times"].setdefault(info["contender"], []).extend(entry["stats"]["data"])
    for case in cases.values():
        for contender, times in case["times"].items():
            case["times"][contender] = summary(times, case["positions"].get(contender, 1))
    return {"machine": raw["machine"], "date": raw["datetime"][:10], "cases": list(cases.values())}


def summary(seconds: Sequence[float], positions: int) -> dict[str, float]:
    """Of all rounds of a contender, over all its turns; seconds per position where a call does many."""
    q1, median, q3 = (float(q) / positions for q in np.quantile(seconds, (0.25, 0.5, 0.75)))
    return {"min": min(seconds) / positions, "q1": q1, "median": median, "q3": q3, "rounds": len(seconds)}


# --- rendering ------------------------------------------------------------------------------------


def render(results: Mapping[str, Any], statistic: str = "median") -> str:
    """The whole table in Markdown. Rows that lose stay; a row whose gate is red shows no speed."""
    machine = results["machine"]
    lines = [
        "# Speed on the CPU",
        "",
        "Made by `python -m benchmarks.table`; what the columns mean: [README.md](README.md).",
        "",
        f"{machine['cpu']}, {machine['threads']} threads of {machine['cores']} cores, "
        f"ISA {machine['isa']}, torch {machine['torch']}, Python {machine['python']}, "
        f"commit {machine['commit']}, {results['date']}, load before the run {machine['load']:.1f}.  ",
        f"Copy {machine['copy'] / 1e9:.1f} GB/s (float32, into a reused buffer, read + written); "
        f"matrix peak {machine['matrix'] / 1e9:.0f} GFLOP/s (float32 `torch.mm`). Times: {statistic}.",
    ]
    sections: dict[str, list[Case]] = {}
    for case in results["cases"]:
        sections.setdefault(case["section"], []).append(case)
    for section, cases in sections.items():
        lines += ["", f"## {section}", "", *_section(cases, machine, statistic)]
    return "\n".join(lines) + "\n"


def _section(cases: Sequence[Case], machine: Mapping[str, Any], statistic: str) -> list[str]:
    others = list(dict.fromkeys(name for case in cases for name in case["others"]))
    facts = list(dict.fromkeys(name for case in cases for name in case["facts"]))
    facts += ["error"] if any(case["errors"] for case in cases) else []
    head = ["case", "conelens", "spread", *others, "against the strongest", "share of limit", *facts, "target"]
    rows = [head, ["---"] * len(head)]
    notes = []
    for case in cases:
        rows += [_row(case, name, others, facts, machine, statistic) for name in case["ours"]]
        notes += [f"{case['name']}: {case['note']}."] if case["note"] else []
        notes += [f"{case['name']}: **RED**, {name}: {why}." for name, why in case["red"].items()]
        notes += [f"{case['name']}: no {name}: {why}." for name, why in case["unavailable"].items()]
    return ["| " + " | ".join(row) + " |" for row in rows] + (["", *(f"- {note}" for note in notes)] if notes else [])


def _row(
    case: Case, name: str, others: Sequence[str], facts: Sequence[str], machine: Mapping[str, Any], statistic: str
) -> list[str]:
    title = case["name"] if name == "conelens" else f"{case['name']}, {name}"
    times = {contender: stats[statistic] for contender, stats in case["times"].items()}
    if case["red"] or name not in times:
        return [title, "RED" if case["red"] else "-", *["-"] * (len(others) + len(facts) + 4)]
    ours = times[name]
    spread = case["times"][name]
    show = rate if case["positions"] else duration
    known = {**case["facts"], "error": f"{case['errors'][name]:.0e}" if name in case["errors"] else "-"}
    return [
        title,
        f"**{show(ours)}**",
        f"{show(spread['q1'])} to {show(spread['q3'])}" if spread["rounds"] > 1 else "one run",
        *(show(times[other]) if other in times else "-" for other in others),
        _ratio(ours, rivals(case, name, times)),
        _share(case, ours, machine),
        *(known.get(fact, "-") for fact in facts),
        "; ".join(verdict(target, case, times, machine) for target in case["targets"] if target["row"] == name),
    ]


def rivals(case: Case, name: str, times: Mapping[str, float]) -> dict[str, float]:
    """The alternatives a row is held against: a fresh row is not held against reused buffers."""
    return {
        other: times[other]
        for other in case["others"]
        if other in times and (name.endswith(REUSED) or not other.endswith(REUSED))
    }


def _ratio(ours: float, against: Mapping[str, float]) -> str:
    if not against:
        return "-"
    strongest = min(against, key=lambda other: against[other])
    ratio = against[strongest] / ours
    return f"{ratio:.3g}x ({strongest})"


def _share(case: Case, ours: float, machine: Mapping[str, Any]) -> str:
    kind = case["floor"]["kind"]
    limit = "copy" if kind == "bytes" else "matrix"
    return f"{share(case, ours, machine):.0%} of {limit}"


def share(case: Case, ours: float, machine: Mapping[str, Any]) -> float:
    """Floor / time / measured limit."""
    limit = machine["copy"] if case["floor"]["kind"] == "bytes" else machine["matrix"]
    return float(case["floor"]["amount"] / ours / limit)


def verdict(target: Mapping[str, Any], case: Case, times: Mapping[str, float], machine: Mapping[str, Any]) -> str:
    """A target in words, and whether it is met."""
    ours, least = times[target["row"]], target["at_least"]
    if not target["against"]:
        reached = share(case, ours, machine)
        return f">= {least:.0%} of copy: {_met(reached >= least)}"
    against = [times[name] for name in target["against"] if name in times]
    label = target["against"][0] if len(target["against"]) == 1 else "plain"
    if len(against) < len(target["against"]):
        return f">= {least:g}x {label}: not measured"
    reached = min(against) / ours
    return f">= {least:g}x {label}: {reached:.3g}x, {_met(reached >= least)}"


def _met(yes: bool) -> str:
    return "met" if yes else "**missed**"


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def rate(seconds: float) -> str:
    """Of seconds per position."""
    return f"{1 / seconds:.3g}/s"


# --- the command ----------------------------------------------------------------------------------


def updated(kept: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """The kept results with the measured cases in their places, new ones last; the machine's limits stay the kept run's."""
    measured = {(case["section"], case["name"]): case for case in results["cases"]}
    cases = [measured.pop((case["section"], case["name"]), case) for case in kept["cases"]]
    return {**kept, "cases": [*cases, *measured.values()]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="REGEX", help='cases whose "section | name" matches')
    parser.add_argument("--update", action="store_true", help="with --only: put these cases' rows into the kept table")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile-seconds", type=float, default=90, help="limit for each torch.compile")
    parser.add_argument("--statistic", choices=("median", "min"), default="median", help="min for a busy machine")
    parser.add_argument("--from-results", action="store_true", help="no measurement: the times kept in results/")
    options = parser.parse_args(arguments)
    re.compile(options.only)
    if options.from_results:
        results = json.loads(RESULTS.read_text())
    else:
        results = measure(options.only, options.threads, options.compile_seconds)
    if options.only and options.update:
        results = updated(json.loads(RESULTS.read_text()), results)
    table = render(results, options.statistic)
    print(table)
    if options.update or not options.only:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        TABLE.write_text(table)
    red = [f"{case['section']} | {case['name']}" for case in results["cases"] if case["red"]]
    if red:
        print(f"the gate is red, so these show no speed: {'; '.join(red)}", file=sys.stderr)
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
