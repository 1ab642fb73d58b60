"""How the GPU table measures: a correctness gate before every time, medians of event timings with a cold L2."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

import torch
from torch import Tensor
from triton.testing import do_bench

DEVICE = "cuda"
BF16, CL, NCHW = torch.bfloat16, torch.channels_last, torch.contiguous_format
Run = Callable[[], Tensor]


@dataclass
class Row:
    """One measurement; times in ms, `share` = floor / ours, `gain` = best other / ours."""

    section: str
    name: str
    ours: dict[str, float] = field(default_factory=dict)
    others: dict[str, float] = field(default_factory=dict)
    floor: float | None = None
    target: str = ""
    problem: str = ""

    def __str__(self) -> str:
        best = min(self.ours.values(), default=float("nan"))
        other = min(self.others.values(), default=float("nan"))
        share = f"{100 * self.floor / best:5.1f} %" if self.floor else "       "
        times = "  ".join(f"{k} {v:.4f}" for k, v in (self.ours | self.others).items())
        return f"{self.name:38} {share}  x{other / best:6.2f}  [{times}] {self.target} {self.problem}"


@dataclass
class Machine:
    """Measured limits: bytes per ms of a large copy (read + written), FLOP per ms of a bf16 matrix product."""

    copy: float
    matmul: float


def milliseconds(run: Callable[[], object], rep: int = 60) -> float:
    return float(do_bench(run, warmup=20, rep=rep, quantiles=[0.5]))


def measure_machine() -> Machine:
    source = torch.empty(1 << 30, dtype=BF16, device=DEVICE).normal_()
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / milliseconds(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=BF16) for _ in range(2))
    return Machine(copy, 2 * 8192**3 / milliseconds(lambda: a @ b))


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))


def compare(row: Row, ours: dict[str, Run], others: dict[str, Run], tolerance: float) -> Row:
    """Gate, then times. The first of `others` is the truth; a wrong or failing contender loses its column."""
    truth: Tensor | None = None
    for column, contenders in ((row.others, others), (row.ours, ours)):
        for name, run in contenders.items():
            try:
                got = run()
                truth = got if truth is None else truth
                error = relative_error(got, truth)
                if not error <= tolerance:
                    row.problem += f"{name} is wrong ({error:.1e}) "
                    continue
                del got
                column[name] = milliseconds(run)
            except Exception as failure:  # a row is lost, the table is not
                row.problem += f"{name}: {type(failure).__name__} {str(failure).splitlines()[:1]} "
    return row


def compiled(function: Callable[..., Tensor], *args: object) -> Run:
    torch._dynamo.reset()
    fast = torch.compile(function)
    return lambda: fast(*args)


def random(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=layout)


def write_rows(rows: Iterable[Any], file: TextIO, deadline: float) -> int:
    """Print each row and append it to ``file`` as soon as it is measured, until ``deadline``; 1 where a result is wrong."""
    wrong = 0
    for row in rows:
        print(row, flush=True)
        file.write(json.dumps(asdict(row)) + "\n")
        file.flush()
        wrong += " is wrong" in row.problem
        if time.monotonic() > deadline:
            print("the time is used up: the rest was not measured")
            break
    return 1 if wrong else 0
