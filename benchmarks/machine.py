"""The machine that a table was measured on, and the two limits that its shares refer to."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from conelens import _native

COPY_BYTES = 256 << 20  # far beyond any cache
MATRIX_SIZES = (1024, 2048, 3072)


@dataclass(frozen=True)
class Machine:
    """Where and with what a run was measured; `copy` in bytes/s (read plus written), `matrix` in FLOP/s."""

    cpu: str
    isa: str
    threads: int
    cores: int
    load: float  # runnable processes just before the run: anything but a small number means a busy machine
    python: str
    torch: str
    commit: str
    copy: float
    matrix: float


def describe() -> Machine:
    """Measures the limits, so it takes a second or two."""
    load = os.getloadavg()[0]
    native = _native.cpu()
    return Machine(
        cpu=_cpu_model(),
        isa=native.module.isa()["active"] if native.module is not None else f"none ({native.reason})",
        threads=torch.get_num_threads(),
        cores=len(os.sched_getaffinity(0)),
        load=load,
        python=platform.python_version(),
        torch=torch.__version__,
        commit=_commit(),
        copy=copy_bandwidth(),
        matrix=matrix_peak(),
    )


def copy_bandwidth() -> float:
    """Bytes read plus bytes written per second by the best of many float32 copies into a reused buffer."""
    source = torch.ones(COPY_BYTES // 4)
    target = torch.zeros(COPY_BYTES // 4)
    return 2 * COPY_BYTES / _best(lambda: target.copy_(source), rounds=15)


def matrix_peak() -> float:
    """FLOP/s of the best float32 torch.mm over a few square sizes."""
    rates = []
    for size in MATRIX_SIZES:
        a, b, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
        rates.append(2 * size**3 / _best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), rounds=7))
    return max(rates)


def _best(run: Callable[[], object], rounds: int) -> float:
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Short hash of the checkout, "+" when tracked files differ from it; "unknown" outside a checkout."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "..", ":!../benchmarks")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
