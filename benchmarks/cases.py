"""What a benchmark case is: inputs, contenders that must agree on them, a floor, and targets."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from conelens import ops

Run = Callable[[Any], Any]
COMPILE_SECONDS = float(os.environ.get("CONELENS_BENCH_COMPILE_SECONDS", "90"))


class Unavailable(Exception):
    """A contender cannot run here; it loses its column and nothing else."""


@dataclass(frozen=True)
class Floor:
    """The least a case has to do: `bytes` moved or `flops` of dense arithmetic."""

    kind: str  # "bytes" | "flops"
    amount: float


@dataclass(frozen=True)
class Target:
    """A promise: `row` is `at_least` times as fast as the fastest of `against`, or reaches that share of the
    measured limit."""

    row: str
    at_least: float
    against: tuple[str, ...] = ()  # empty: share of the measured limit


@dataclass(frozen=True)
class Case:
    """One line of work done by several contenders.

    ``inputs()`` makes what every contender reads; ``ours`` and ``others`` map names to functions of it; names
    that end in "reused" write into buffers of their own. ``read`` brings a result of any contender into one
    comparable form. ``check_inputs`` makes smaller inputs for the gate, ``check_part`` of the work, where a run
    of everybody would take too long. ``tolerance`` is the relative 2-norm allowed to floats; whole numbers must
    be equal. The gate compares with ``wanted``, by default the first of ours on the reference implementations.

    Sweeps: one call of a contender does so many ``positions``, and the table shows positions/s. Contenders run once
    each time ``schedule`` names them, ours are compared with ``wanted`` where they were timed as well, and ``facts``
    are columns of their own.
    """

    section: str
    name: str
    inputs: Callable[[], Any]
    ours: Mapping[str, Run]
    others: Mapping[str, Run]
    read: Callable[[Any, Any], tuple[Tensor, ...]]
    floor: Callable[[Any], Floor]
    tolerance: float = 0.0
    targets: tuple[Target, ...] = ()
    check_inputs: Callable[[], Any] | None = None
    check_part: float = 1.0
    note: str = ""
    wanted: Run | None = None
    positions: Mapping[str, int] = field(default_factory=dict)
    schedule: tuple[str, ...] = ()
    facts: Callable[[Any], dict[str, str]] | None = None

    @property
    def identity(self) -> str:
        return f"{self.section} | {self.name}"

    @property
    def contenders(self) -> dict[str, Run]:
        return {**self.ours, **self.others}

    @property
    def turns(self) -> tuple[str, ...]:
        """Who is timed, one after the other."""
        return self.schedule or tuple(self.contenders)


@dataclass
class Verdicts:
    """Outcome of the gate of one case: contender -> what is wrong. Empty dicts mean green."""

    red: dict[str, str] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)


def check(case: Case, inputs: Any) -> Verdicts:
    """Run every contender once, kernels forced for ours, and compare all of them with what is wanted."""
    if case.wanted is not None:
        wanted = case.read(inputs, case.wanted(inputs))
    else:
        first = next(iter(case.ours.values()))
        with ops.use_backend("reference"):
            wanted = tuple(t.clone() for t in case.read(inputs, first(inputs)))
    verdicts = Verdicts()
    for name, run in case.contenders.items():
        try:
            with ops.require_kernels() if name in case.ours else contextlib.nullcontext():
                found = case.read(inputs, run(inputs))
        except Unavailable as error:
            verdicts.unavailable[name] = str(error)
            continue
        except Exception as error:
            if name in case.ours:
                verdicts.red[name] = f"{type(error).__name__}: {error}"
            else:
                verdicts.unavailable[name] = f"{type(error).__name__}: {error}"
            continue
        difference = disagreement(wanted, found, case.tolerance)
        if difference:
            verdicts.red[name] = difference
    return verdicts


def disagreement(wanted: tuple[Tensor, ...], found: tuple[Tensor, ...], tolerance: float) -> str:
    """What differs, or "". Relative 2-norm for floats (both zero is equal), equality for whole numbers."""
    if len(wanted) != len(found):
        return f"{len(found)} results, wanted {len(wanted)}"
    for at, (a, b) in enumerate(zip(wanted, found, strict=True)):
        if a.shape != b.shape:
            return f"result {at} has shape {list(b.shape)}, wanted {list(a.shape)}"
        if not a.is_floating_point():
            wrong = int((a != b).sum())
            if wrong:
                return f"result {at} differs in {wrong} of {a.numel()} cells"
            continue
        apart = relative(a, b)
        if not apart <= tolerance:
            return f"result {at} differs by {apart:.1e} in relative 2-norm, allowed {tolerance:g}"
    return ""


def relative(wanted: Tensor, found: Tensor) -> float:
    """2-norm of the difference over that of ``wanted``; 0 where both are zero."""
    norm, apart = float(wanted.double().norm()), float((wanted.double() - found.double()).norm())
    return 0.0 if apart == 0 else apart / norm if norm else float("inf")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile in its default mode; failing, or taking more than COMPILE_SECONDS, raises Unavailable."""
    state: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def run(*args: Any) -> Any:
        shapes = tuple(tuple(a.shape) for a in args if isinstance(a, Tensor))
        if shapes not in state:
            try:
                with deadline(COMPILE_SECONDS):
                    fresh = torch.compile(function, dynamic=False)
                    fresh(*args)
            except Exception as error:
                raise Unavailable(f"torch.compile: {type(error).__name__}: {_first_line(error)}") from error
            state[shapes] = fresh
        return state[shapes](*args)

    return run


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """TimeoutError in the block when it takes longer. Main thread only."""

    def expire(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:120]
